"""Tiny equations with their solutions -> data/math/input.jsonl

    python data/math/prepare.py

ax + b = c or ax = c, with one integer solution from -99 to 99, written in several ways. The answer of each is the
value of the term with x, then x. The generator is seeded, so the file is the same on every machine.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()


def make_equation(rng):
    """returns a random equation as text, and its solution: {'ax': the value of the term with x, 'x': x}."""
    size = rng.choice([9, 30, 99])  # each of the three ranges is as frequent
    x, a, b = rng.randint(-size, size), rng.choice([1, 1, 2, 3, 4, 5]), rng.randint(1, size)
    ax, sign = 'x' if a == 1 else f'{a}x', rng.choice('+-')
    c = a * x + (b if sign == '+' else -b)
    third = f'{ax} = {a * x}' if a > 1 else f'x {sign} {b} = {c}'
    return rng.choice([f'{ax} {sign} {b} = {c}', f'{c} = {ax} {sign} {b}', third]), {'ax': a * x, 'x': x}


rng, solutions = random.Random(1337), {}
while len(solutions) < 60000:
    text, solution = make_equation(rng)
    solutions[text] = solution
target = Path(__file__).parent / 'input.jsonl'
write_lines(target, ({'text': text, 'answer': solution} for text, solution in solutions.items()))
print(f'{target}: {len(solutions)} equations')
