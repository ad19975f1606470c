"""Tweets and sentences that people rated, from vaderSentiment's source package -> data/tweets/input.jsonl

    python data/tweets/prepare.py    # fetches the package with `pip download`, which installs nothing

4,200 tweets, then 19,503 sentences of reviews and news. 14 to 99 people rated the sentiment of each, from -4
to 4. (Hutto and Gilbert 2014, VADER, ICWSM. MIT licence.) `truth` is the sign of the mean rating, neutral if
that is within half a point of 0; `probabilities` is the share of people who chose each sign.
"""
import ast
import html
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

SETS = 'tweets', 'movieReviewSnippets', 'amazonReviewSnippets', 'nytEditorialSnippets'


def read_columns(archive, name):
    """{id: list of the other columns} of a file in the archive."""
    content = archive.extractfile(f'hutto_ICWSM_2014/{name}.txt').read().decode('utf-8-sig', 'replace')
    rows = [line.rstrip('\r').split('\t') for line in content.split('\n') if line.strip()]
    return {row[0]: row[1:] for row in rows}


def sign_name(rating):
    """the sentiment of one rating, or of a mean rating."""
    return 'positive' if rating > 0 else 'negative' if rating < 0 else 'neutral'


here = Path(__file__).parent
if not list(here.glob('*.tar.gz')):
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', 'vaderSentiment',
           '-d', here, 'vaderSentiment']
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or 'no reason given').splitlines()[-1]
        sys.exit(f'the ratings are in the source package of vaderSentiment, and pip did not fetch it '
                 f'({reason}); put its .tar.gz into {os.path.relpath(here)}')
records, n_differ = [], 0
with tarfile.open(sorted(here.glob('*.tar.gz'))[-1]) as package:
    inner = next(member for member in package if member.name.endswith('hutto_ICWSM_2014.tar.gz'))
    with tarfile.open(fileobj=package.extractfile(inner)) as archive:
        for name in SETS:
            ratings, part = read_columns(archive, f'{name}_anonDataRatings'), []
            for key, (mean, text) in read_columns(archive, f'{name}_GroundTruth').items():
                given = ast.literal_eval(ratings[key][-1])
                average = sum(given) / len(given)
                n_differ += abs(average - float(mean)) > 0.01  # then the ratings count, not this mean
                signs = Counter(map(sign_name, given))
                part.append({'text': html.unescape(text),
                             'truth': {'sentiment': 'neutral' if abs(average) <= 0.5 else sign_name(average)},
                             'probabilities': {'sentiment': {sign: round(n / len(given), 4)
                                                             for sign, n in signs.items()}}})
            random.Random(1337).shuffle(part)  # the same order on every machine
            records += part
target = here / 'input.jsonl'
write_lines(target, records)
print(f'{os.path.relpath(target)}: {len(records)} texts; the published mean of {n_differ} differs')
