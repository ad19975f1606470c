"""Chat messages from the chitchat-dataset package -> data/chitchat/input.jsonl

    python data/chitchat/prepare.py

Keeps the messages with at least one of the words below. Small talk is nearly always neutral, respectful and
safe, and a task whose answer never changes needs no model. The words lower the share of the commonest answer.
"""
import importlib.util
import json
import os
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

WORDS = '''
love loved lovely great awesome amazing thanks thank glad happy beautiful best fun nice cool sweet
excited perfect welcome hate hated stupid idiot dumb ugly terrible awful horrible worst gross disgusting
sucks sucked crap annoying boring lame weird creepy scary sad angry mad kill die dead hell damn shut liar
lying fake trash loser fool jerk wrong sorry sick cry hurt pain lonely afraid worried tired racist evil
'''.split()
OPINION = re.compile(rf'\b({"|".join(WORDS)})\b', re.I)

if importlib.util.find_spec('chitchat_dataset') is None:
    sys.exit('the chat messages are in a Python package; run: pip install chitchat-dataset')
source = Path(importlib.util.find_spec('chitchat_dataset').origin).parent / 'dataset.json'
conversations = json.loads(source.read_text(encoding='utf-8')).values()
texts = [part['text'] for talk in conversations for turn in talk['messages'] for part in turn]
kept = sorted({text for text in texts if OPINION.search(text)})
random.Random(1337).shuffle(kept)  # on every machine alike: the first n texts are a random sample
target = Path(__file__).parent / 'input.jsonl'
write_lines(target, ({'text': text} for text in kept))
print(f'{os.path.relpath(target)}: {len(kept)} of {len(texts)} messages')
