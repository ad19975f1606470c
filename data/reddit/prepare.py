"""GoEmotions' Reddit comments from their public home -> data/reddit/input.jsonl

    python data/reddit/prepare.py

Their three files (text, labels, id; no header, no quotes) may also be put beside this script. Other comments,
from a file of your own: python data/prepare.py reddit FILE.
"""
import json
import os
import sys
import urllib.request
from pathlib import Path

HOME = 'https://raw.githubusercontent.com/google-research/google-research/master/goemotions/data/'
FILES = 'train.tsv', 'dev.tsv', 'test.tsv'

here, texts = Path(__file__).parent, {}  # texts in the order of the files, each once
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
        text = line.partition('\t')[0].strip()
        if text:
            texts[text] = None
target = here / 'input.jsonl'
with open(target.with_suffix('.tmp'), 'w', encoding='utf-8') as file:
    file.writelines(json.dumps({'text': text}) + '\n' for text in texts)
os.replace(target.with_suffix('.tmp'), target)
print(f'{os.path.relpath(target)}: {len(texts)} texts')
