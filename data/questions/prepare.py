"""Questions of people, from the chitchat-dataset package -> data/questions/input.jsonl

    python data/questions/prepare.py

The last sentence of each message that ends in a question mark: like the questions to an assistant.
"""
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

if importlib.util.find_spec('chitchat_dataset') is None:
    sys.exit('the chat messages are in a Python package; run: pip install chitchat-dataset')
source = Path(importlib.util.find_spec('chitchat_dataset').origin).parent / 'dataset.json'
conversations = json.loads(source.read_text(encoding='utf-8')).values()
messages = [part['text'] for talk in conversations for turn in talk['messages'] for part in turn]
asking = [text.strip() for text in messages if text.strip().endswith('?')]
questions = sorted({re.split(r'(?<=[.!?])\s+', text)[-1] for text in asking})
random.Random(1337).shuffle(questions)  # on every machine alike: the first n texts are a random sample
target = Path(__file__).parent / 'input.jsonl'
write_lines(target, ({'text': text} for text in questions))
print(f'{target}: {len(questions)} questions from {len(messages)} messages')
