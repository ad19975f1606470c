"""How good and how fast a student is with 3 to 150 options a text, and whether their order matters: the table of
docs/results.md.

    python docs/options.py                                       # of out/intents, made by config/intents.py

Each text of data/intents/seen.jsonl and unseen.jsonl gets so many of the 150 intents, the right one among them.
"""
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, data_line, stop

import numpy as np

from distil.agreement import calibration_error
from distil.labeler import Labeler
from distil.options import write_options

run = 'intents'      # word; out/<run> is the student
texts = 600          # 1..; of each file
order_texts = 200    # 1..; answered again with their options in another order
config = configure(globals())


def ask(labeler, lines, options):
    """(records, seconds) of lines with these options each."""
    asked = [write_options(line['text'], {'intent': some}) for line, some in zip(lines, options)]
    start = time.perf_counter()
    return labeler(asked), time.perf_counter() - start


if __name__ == '__main__':
    folder, labeler, rng = Path('data/intents'), Labeler(Path('out', run)), random.Random(0)
    if not (folder / 'unseen.jsonl').is_file():
        stop('run: python data/intents/prepare.py')
    parts = {}
    for part in ('seen', 'unseen'):
        lines = list(map(json.loads, (folder / f'{part}.jsonl').read_text(encoding='utf-8').splitlines()))
        parts[part] = rng.sample(lines, min(texts, len(lines)))
    intents = sorted({line['answer']['intent'] for lines in parts.values() for line in lines})
    for n in (3, 10, 50, 150):
        for part, lines in parts.items():
            right = [line['answer']['intent'] for line in lines]
            options = [[one, *rng.sample([other for other in intents if other != one], min(n, len(intents)) - 1)]
                       for one in right]
            options = [rng.sample(some, len(some)) for some in options]
            records, seconds = ask(labeler, lines, options)
            hits = np.array([record['intent'] == one for record, one in zip(records, right)])
            p = np.array([record['_confidence']['intent'] for record in records])
            few = options[:order_texts]
            again, _ = ask(labeler, lines[:order_texts], [rng.sample(some, len(some)) for some in few])
            changed = np.mean([one['intent'] != other['intent'] for one, other in zip(records, again)])
            print(data_line('options', {
                'n': len(options[0]), 'of': part, 'texts': len(lines), 'right': float(hits.mean()),
                'ece': calibration_error(p, hits), 'changed_by_order': float(changed), 'texts_s': len(lines) / seconds,
            }), flush=True)
