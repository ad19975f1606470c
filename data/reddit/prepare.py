"""GoEmotions' Reddit comments from their public home -> data/reddit/input.jsonl

    python data/reddit/prepare.py

Their three files (text, labels, id; no header, no quotes) may also be put beside this script. Other comments,
from a file of your own: python data/prepare.py reddit FILE.

Where all emotions that people saw in a comment fall into one group of the paper (Demszky et al. 2020,
https://arxiv.org/abs/2005.00547), that group is the comment's true sentiment.
"""
import json
import os
import sys
import urllib.request
from pathlib import Path

HOME = 'https://raw.githubusercontent.com/google-research/google-research/master/goemotions/data/'
FILES = 'train.tsv', 'dev.tsv', 'test.tsv'

GROUPS = {  # numbers of the labels column; 6, 7, 22 and 26 (confusion, curiosity, ...) are ambiguous
    'positive': {0, 1, 4, 5, 8, 13, 15, 17, 18, 20, 21, 23},
    'negative': {2, 3, 9, 10, 11, 12, 14, 16, 19, 24, 25},
    'neutral': {27},
}


def sentiment_of(labels):
    """the group that holds all of these numbers, or None. labels: '2,3'."""
    numbers = {int(label) for label in labels.split(',') if label.isdigit()}
    return next((name for name, group in GROUPS.items() if numbers and numbers <= group), None)


here, texts = Path(__file__).parent, {}  # the sentiment of each text, in the order of the files
for name in FILES:
    path = here / name
    if not path.exists():
        print(f'fetching {HOME}{name}')
        try:
            with urllib.request.urlopen(HOME + name, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            sys.exit(f'cannot fetch {HOME}{name} ({error}); without a network put it beside this script, or '
                     'give a file of your own: python data/prepare.py reddit FILE')
        path.write_bytes(content)
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        text, labels = (line.split('\t') + [''])[:2]
        if text.strip():
            texts.setdefault(text.strip(), sentiment_of(labels))
target = here / 'input.jsonl'
with open(target.with_suffix('.tmp'), 'w', encoding='utf-8') as file:
    for text, sentiment in texts.items():
        truth = {'truth': {'sentiment': sentiment}} if sentiment else {}
        file.write(json.dumps({'text': text, **truth}) + '\n')
os.replace(target.with_suffix('.tmp'), target)
known = sum(sentiment is not None for sentiment in texts.values())
print(f'{os.path.relpath(target)}: {len(texts)} texts, the sentiment of {known} is known')
