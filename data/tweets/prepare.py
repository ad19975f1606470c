"""Tweets and sentences that people rated, out of vaderSentiment's source package -> data/tweets/input.jsonl

    python data/tweets/prepare.py    # fetches the package with `pip download`, which installs nothing

4,200 tweets, then 19,503 sentences of reviews and news; 14 to 99 people said of each how it feels, from -4 to
4. (Hutto and Gilbert 2014, VADER, ICWSM. MIT licence.) `truth` is the sign of their mean rating, neutral
within half a point of 0; `probabilities` is the share of people on each side.
"""
import ast
import html
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

SETS = 'tweets', 'movieReviewSnippets', 'amazonReviewSnippets', 'nytEditorialSnippets'


def lines_of(archive, name):
    """{id: the other columns} of a file of the archive."""
    content = archive.extractfile(f'hutto_ICWSM_2014/{name}.txt').read().decode('utf-8-sig', 'replace')
    rows = [line.rstrip('\r').split('\t') for line in content.split('\n') if line.strip()]
    return {row[0]: row[1:] for row in rows}


def say(rating):
    return 'positive' if rating > 0 else 'negative' if rating < 0 else 'neutral'


here = Path(__file__).parent
if not list(here.glob('*.tar.gz')):
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', 'vaderSentiment',
           '-d', here, 'vaderSentiment']
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or 'no reason given').splitlines()[-1]
        sys.exit(f'the ratings come in the source package of vaderSentiment, and pip did not fetch it '
                 f'({why}); put its .tar.gz into {os.path.relpath(here)}')
records, odd = [], 0
with tarfile.open(sorted(here.glob('*.tar.gz'))[-1]) as package:
    inner = next(member for member in package if member.name.endswith('hutto_ICWSM_2014.tar.gz'))
    with tarfile.open(fileobj=package.extractfile(inner)) as archive:
        for name in SETS:
            ratings, part = lines_of(archive, f'{name}_anonDataRatings'), []
            for key, (mean, text) in lines_of(archive, f'{name}_GroundTruth').items():
                given = ast.literal_eval(ratings[key][-1])
                average = sum(given) / len(given)
                odd += abs(average - float(mean)) > 0.01  # where they disagree the ratings count
                sides = Counter(map(say, given))
                part.append({'text': html.unescape(text),
                             'truth': {'sentiment': 'neutral' if abs(average) <= 0.5 else say(average)},
                             'probabilities': {'sentiment': {side: round(n / len(given), 4)
                                                             for side, n in sides.items()}}})
            random.Random(1337).shuffle(part)  # one order on every machine
            records += part
target = here / 'input.jsonl'
with open(target.with_suffix('.tmp'), 'w', encoding='utf-8') as file:
    file.writelines(json.dumps(record) + '\n' for record in records)
os.replace(target.with_suffix('.tmp'), target)
print(f'{os.path.relpath(target)}: {len(records)} texts; the mean of {odd} is not that of their ratings')
