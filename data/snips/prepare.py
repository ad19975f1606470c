"""Requests to a voice assistant, with what each wants and the words that say it -> data/snips/input.jsonl

    python data/snips/prepare.py 2017-06-custom-intent-engines  # the published folder
    python data/snips/prepare.py train.jsonl                    # or lines of {"text", "answer": {"intent", "slots"}}

In the folder each of seven intents has a file train_<intent>_full.json, in which the texts lie in pieces, some with the
name of a slot. In an answer a slot is {"slot", "value"}; its value stands in the text. (Coucke et al. 2018,
https://arxiv.org/abs/1805.10190; CC0; https://github.com/sonos/nlu-benchmark)
"""
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import describe_error, exit_on_stop, write_lines


def read_published(folder):
    """yields {"text", "answer"} of the published files in a folder. ValueError if there are none, or wrong ones."""
    paths = sorted(Path(folder).rglob('train_*_full.json'))
    if not paths:
        raise ValueError(f'{folder} has no files train_<intent>_full.json')
    for path in paths:
        content = path.read_bytes()
        try:
            text = content.decode('utf-8')
        except UnicodeDecodeError:                              # some are in Latin-1
            text = content.decode('latin-1')
        try:
            for intent, requests in json.loads(text).items():
                for pieces in (request['data'] for request in requests):
                    slots = [{'slot': piece['entity'], 'value': piece['text'].strip()}
                             for piece in pieces if 'entity' in piece]
                    whole = ''.join(piece['text'] for piece in pieces)
                    yield {'text': whole, 'answer': {'intent': intent, 'slots': slots}}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f'{path} is not {{intent: [{{"data": [{{"text", "entity"}}, ...]}}, ...]}}') from None


def read_lines(path):
    """yields {"text", "answer"} of a .jsonl. ValueError if a line has another form."""
    with open(path, encoding='utf-8') as file:
        for n, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                text, intent = record['text'], record['answer']['intent']
                slots = [{'slot': slot['slot'], 'value': slot['value']} for slot in record['answer']['slots']]
                parts = [text, intent, *(part for slot in slots for part in slot.values())]
                assert all(isinstance(part, str) for part in parts)
            except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
                raise ValueError(f'{path}, line {n} is not {{"text", "answer": {{"intent", "slots": '
                                 f'[{{"slot", "value"}}, ...]}}}}') from None
            yield {'text': text, 'answer': {'intent': intent, 'slots': slots}}


if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()
if len(sys.argv) != 2:
    sys.exit('run: python data/snips/prepare.py FILE (the published folder, or a .jsonl)')
try:
    records = list((read_published if os.path.isdir(sys.argv[1]) else read_lines)(sys.argv[1]))
except (OSError, ValueError) as error:
    sys.exit(describe_error(error) if isinstance(error, OSError) else str(error))
random.Random(1337).shuffle(records)                            # the files have one intent after another
target = Path(__file__).parent / 'input.jsonl'
write_lines(target, records)
n_slots = sum(len(record['answer']['slots']) for record in records)
print(f'{os.path.relpath(target)}: {len(records)} texts, {n_slots} slots')
