"""CLINC150's sentences to a voice assistant, each with one of 150 intents -> data/clinc/*.jsonl

    python data/clinc/prepare.py                       # fetches data_full.json from its public home
    python data/clinc/prepare.py data_full.json        # or takes it from a file
    python data/clinc/prepare.py train.jsonl val.jsonl # or the parts as {"text": ..., "answer": {"intent": ...}}

input.jsonl has the training part, so ordered that each 150 lines have one sentence of every intent: the first
1,500 are ten of each. val.jsonl and, with data_full.json, test.jsonl are for tools/accuracy.py. oos_val.jsonl and
oos_test.jsonl have sentences of no intent. (Larson et al. 2019, https://aclanthology.org/D19-1131, CC BY 3.0.)
"""
import json
import os
import sys
import urllib.request
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines, write_text

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

HOME = 'https://raw.githubusercontent.com/clinc/oos-eval/master/data/data_full.json'


def read_parts(path):
    """{part, such as 'train': [(text, intent)]} of a file of the data set. ValueError if it is something else."""
    content = path.read_text(encoding='utf-8')
    if path.suffix == '.json':
        return {part: [(text, intent) for text, intent in rows] for part, rows in json.loads(content).items()}
    records = map(json.loads, content.splitlines())
    return {path.stem: [(record['text'], record['answer']['intent']) for record in records]}


def interleave(rows):
    """(text, intent) pairs, reordered so that the intents take turns."""
    of_intent = defaultdict(list)
    for text, intent in rows:
        of_intent[intent].append((text, intent))
    return [row for turn in zip_longest(*of_intent.values()) for row in turn if row]


here = Path(__file__).parent
paths = [Path(name) for name in sys.argv[1:]] or [here / 'data_full.json']
if len(sys.argv) == 1 and not paths[0].is_file():
    print(f'fetching {HOME}')
    try:
        with urllib.request.urlopen(HOME, timeout=60) as reply:
            content = reply.read()
    except OSError as error:
        sys.exit(f'cannot fetch {HOME} ({error}); without a network: python data/clinc/prepare.py FILE')
    write_text(paths[0], [content.decode('utf-8', 'replace')])
for path in paths:
    try:
        parts = read_parts(path)
    except OSError as error:
        sys.exit(f'{path} cannot be read: {error.strerror}')
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        sys.exit(f'{path} is neither data_full.json nor a part of it as .jsonl: {error!r}')
    for part, rows in parts.items():
        target = here / ('input.jsonl' if part == 'train' else f'{part}.jsonl')
        write_lines(target, ({'text': text, 'answer': {'intent': intent}} for text, intent in interleave(rows)))
        print(f'{os.path.relpath(target)}: {len(rows)} sentences')
