"""GoEmotions' Reddit comments from their public home -> data/reddit/input.jsonl

    python data/reddit/prepare.py

The three files (text, labels, id; no header, no quotes) may also lie beside this script. For other comments,
from a file of your own: python data/prepare.py reddit FILE.

If all emotions that people chose for a comment belong to one group of the paper (Demszky et al. 2020,
https://arxiv.org/abs/2005.00547), that group is the comment's true sentiment.
"""
import os
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines, write_text

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

HOME = 'https://raw.githubusercontent.com/google-research/google-research/master/goemotions/data/'
FILES = 'train.tsv', 'dev.tsv', 'test.tsv'

GROUPS = {  # the numbers in the labels column; 6, 7, 22 and 26 (confusion, curiosity, ...) are ambiguous
    'positive': {0, 1, 4, 5, 8, 13, 15, 17, 18, 20, 21, 23},
    'negative': {2, 3, 9, 10, 11, 12, 14, 16, 19, 24, 25},
    'neutral': {27},
}


def find_sentiment(labels):
    """the group that contains all the numbers of labels, such as '2,3'; None if no group does."""
    numbers = {int(label) for label in labels.split(',') if label.isdigit()}
    return next((name for name, group in GROUPS.items() if numbers and numbers <= group), None)


here, texts = Path(__file__).parent, {}  # texts: {text: sentiment or None}, in the order of the files
for name in FILES:
    path = here / name
    if not path.exists():
        print(f'fetching {HOME}{name}')
        try:
            with urllib.request.urlopen(HOME + name, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            sys.exit(f'cannot fetch {HOME}{name} ({error}); without a network put the file beside this '
                     'script, or use a file of your own: python data/prepare.py reddit FILE')
        write_text(path, [content.decode('utf-8', 'replace')])
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        text, labels = (line.split('\t') + [''])[:2]
        if text.strip():
            texts.setdefault(text.strip(), find_sentiment(labels))
target = here / 'input.jsonl'
write_lines(target, ({'text': text} | ({'truth': {'sentiment': sentiment}} if sentiment else {})
                     for text, sentiment in texts.items()))
known = sum(sentiment is not None for sentiment in texts.values())
print(f'{os.path.relpath(target)}: {len(texts)} texts, the true sentiment of {known} is known')
