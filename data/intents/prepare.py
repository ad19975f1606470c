"""CLINC150's sentences, each with some intents to choose from -> data/intents/*.jsonl

    python data/intents/prepare.py                       # of data/clinc, which python data/clinc/prepare.py makes
    python data/intents/prepare.py --options=10          # to learn from fewer than 50

An intent is named by its words: "exchange rate". 30 of the 150 are never in input.jsonl, neither as the answer nor
among the 50 options; it has 50 sentences of each of the others. seen.jsonl and unseen.jsonl have the sentences of
val.jsonl, with ten options drawn from all 150, for tools/accuracy.py: what is right was learned from, or was never
seen.
"""
import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

here, n_options = Path(__file__).parent, 50
for argument in sys.argv[1:]:
    if not argument.startswith('--options=') or not argument[10:].isdigit() or not 2 <= int(argument[10:]) <= 150:
        sys.exit(f'{argument}: the only setting is --options=, from 2 to 150')
    n_options = int(argument[10:])


def read(part):
    """[(text, intent)] of a part of data/clinc."""
    path = here.parent / 'clinc' / part
    if not path.is_file():
        sys.exit(f'data/clinc/{part} does not exist; run: python data/clinc/prepare.py')
    records = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    return [(record['text'], record['answer']['intent'].replace('_', ' ')) for record in records]


rng = random.Random(1337)
learned, asked = read('input.jsonl'), read('val.jsonl')
intents = sorted({intent for _, intent in learned})
unseen = {*rng.sample(intents, 30)}
seen = [intent for intent in intents if intent not in unseen]


def write(name, rows, known, n_options):
    """rows: (text, intent); known: the intents that n_options are drawn from, as many as there are."""
    lines = []
    for text, intent in rows:
        others = rng.sample([other for other in known if other != intent], min(n_options, len(known)) - 1)
        lines.append({'text': text, 'options': {'intent': rng.sample([intent, *others], len(others) + 1)},
                      'answer': {'intent': intent}})
    write_lines(here / name, lines)
    print(f'data/intents/{name}: {len(lines)} sentences')


count, rows = Counter(), []
for text, intent in learned:
    count[intent] += 1
    if intent not in unseen and count[intent] <= 50:
        rows.append((text, intent))
write('input.jsonl', rows, seen, n_options)
write('seen.jsonl', [row for row in asked if row[1] not in unseen], intents, 10)
write('unseen.jsonl', [row for row in asked if row[1] in unseen], intents, 10)
