"""Equations such as 6x + 7 = 55, without an answer -> data/equations/input.jsonl

    python data/equations/prepare.py

ax + b = c with a from 2 to 9, x from 1 to 10 and b from 1 to 9: 720 different ones, in a seeded order. So few that
some hundred labels are enough for a student: a teacher that writes its steps is slow.
`truth` has ax and x, which nobody is trained on: a teacher solves them (config/equations.py).
"""
import random
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

records = [{'text': f'{a}x + {b} = {a * x + b}', 'truth': {'ax': a * x, 'x': x}}
           for a, x, b in product(range(2, 10), range(1, 11), range(1, 10))]
random.Random(1337).shuffle(records)
target = Path(__file__).parent / 'input.jsonl'
write_lines(target, records)
print(f'{target}: {len(records)} equations')
