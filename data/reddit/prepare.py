"""Reddit comments -> data/reddit/input.jsonl

    python data/reddit/prepare.py                      # GoEmotions' comments from their public home
    python data/reddit/prepare.py --input=FILE         # your own .txt, .jsonl, .csv or .tsv

.txt: a text a line. .jsonl: {"text": ...} a line. .csv, .tsv: a column named text, or else the first one.
"""
import csv
import json
import os
import sys
import urllib.request
from pathlib import Path

HOME = 'https://raw.githubusercontent.com/google-research/google-research/master/goemotions/data/'
FILES = 'train.tsv', 'dev.tsv', 'test.tsv'  # text, labels, id; no header


def read(path):
    """yields the texts of a local file; bytes that are no UTF-8 become U+FFFD, lines that hold no text are
    passed over."""
    with open(path, encoding='utf-8', errors='replace', newline='') as file:
        lines = (line.replace('\0', '') for line in file)  # the csv module stops at a NUL
        if path.suffix == '.jsonl':
            for line in lines:
                try:
                    yield json.loads(line)['text']
                except (ValueError, KeyError, TypeError):
                    pass
        elif path.suffix in ('.csv', '.tsv'):
            csv.field_size_limit(1 << 30)
            quoting = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE} if path.suffix == '.tsv' else {}
            rows = (row for row in csv.reader(lines, **quoting) if row)
            first = next(rows, [])
            column = first.index('text') if 'text' in first else 0
            if first and 'text' not in first:
                yield first[column]
            yield from (row[column] for row in rows if len(row) > column)
        else:
            yield from lines


here = Path(__file__).parent
arguments = dict(arg.partition('=')[::2] for arg in sys.argv[1:])
source = arguments.pop('--input', None)
if arguments or source == '':
    sys.exit(f'cannot read {" ".join(sys.argv[1:])!r}; a file is given as --input=FILE')
if source:
    if not Path(source).is_file():
        sys.exit(f'{source} does not exist')
    sources = [Path(source)]
else:
    sources = [here / name for name in FILES]
    for path in sources:
        if not path.exists():
            print(f'fetching {HOME}{path.name}')
            try:
                with urllib.request.urlopen(HOME + path.name, timeout=60) as reply:
                    content = reply.read()
            except OSError as error:
                sys.exit(f'cannot fetch {HOME}{path.name} ({error}); without a network give a file: '
                         'python data/reddit/prepare.py --input=FILE')
            path.write_bytes(content)
texts = {}  # in the order of the files, each once
for path in sources:
    for text in read(path):
        if isinstance(text, str) and text.strip():
            texts[text.strip()] = None
target = here / 'input.jsonl'
with open(target.with_suffix('.tmp'), 'w', encoding='utf-8') as file:
    file.writelines(json.dumps({'text': text}) + '\n' for text in texts)
os.replace(target.with_suffix('.tmp'), target)
print(f'{os.path.relpath(target)}: {len(texts)} texts')
