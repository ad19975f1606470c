"""A larger student labels texts for a smaller one: few labels, much text, and a small student at the end.

    python train.py config/mine.py --reader=data/teachers/mpnet --run=large --reader_lr=0.04     # learns the few labels
    python tools/teach.py config/mine.py --run=large --input=texts.jsonl --out=taught.jsonl
    python extract.py config/mine.py --name=taught --labels=taught.jsonl --max_records=0
    python train.py config/mine.py --name=taught --max_records=0                                # learns all of them

Writes a line {"text": ..., "probabilities": {...}} for each record that the large student has learned from, as its
teacher labelled it, and then for each other text, with the large student's probabilities of all values, which say more
than its answers alone (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). What is held out stays held out, and none
of the other texts joins it: what train.py measures is agreement with the teacher. docs/students.md has what it brings.
"""
import os
import shlex
import sys
from itertools import islice, tee
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import STARTED_IN, configure, data_line, json_line, stop
from config.machine import pick_device, whole_file

import numpy as np
from tqdm import tqdm

from data import held_out
from data.lines import read_texts, text_hash
from distil.confidence import Values, learn, log_sum
from distil.labeler import Labeler
from distil.records import choose_rows, load_records

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use
input = ''           # file; .jsonl of {"text": ...}
out = ''             # file; .jsonl that is written
min_confidence = 0.0  # 0..1; texts with a field below it are left out
max_texts = 0        # 0..; of the first lines alone, this many; 0: all
sample_batch = 128   # 1..; texts answered together
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; as in sample.py
config = configure(globals())


def make_label(schema, record, problem):
    """(the line of a record of a Labeler with full confidence, without its text; the least of the confidences of its
    fields). None if there is no answer."""
    if problem in record:
        return None
    copied = {part.path for part in schema.copied}
    given = {path: row for path, row in record['_confidence'].items() if path not in copied}
    answer = {key: value for key, value in record.items() if key != '_confidence'}
    least = min((max(row.values()) for row in given.values() if isinstance(row, dict) and row), default=1.0)
    return {'probabilities': given} | ({'answer': answer} if schema.copied else {}), least


def stored_label(shards, space, i):
    """the line of record i, without its text: its teacher's probabilities. Values that differ after a token which the
    teacher did not choose share that token's probability."""
    outs, logits, decided = shards.outs(i), shards.logits(i), space.decides
    if shards.has_places:                                       # and that of all places, as one
        places = log_sum(shards.answer(i, 'weights').astype(np.float32))
        logits = np.column_stack((logits + shards.answer(i, 'stats')[:, :1], places))
    values, states = Values(space, outs), space.states_before(outs)
    learn([values], [(0, state, row) for state, row in zip(states, logits) if decided[state]], {})
    return space.schema.write_label(values.probabilities(), space.to_json(outs) if space.schema.copied else None)


def write_records(file, shards, space, rows):
    """writes the lines of the records `rows`."""
    for i in rows:
        text = space.tokenizer.decode(shards.ids(i).tolist())
        is_test = shards.own_split is not None and bool(held_out(shards.hashes[i], shards.own_split))
        file.write(json_line({'text': text} | ({'split': 'test'} if is_test else {})
                             | stored_label(shards, space, i)) + '\n')


if __name__ == '__main__':
    if not (name or run) or not input or not out:
        stop('no task or no file; run: python tools/teach.py config/mine.py --run=large --input=texts.jsonl '
             '--out=taught.jsonl')
    if not Path(input).is_file():
        stop(f'{input} does not exist')
    labeler = Labeler(Path('out', run or name), pick_device(device), which, sample_batch, confidence='full',
                      dtype=dtype)
    learned, space = labeler.checkpoint['config'], labeler.space
    if space.has_options:
        stop('the options of each text are not those that a label would be read with: such a task cannot be taught')
    shards = load_records(learned['dataset'], learned['name'], labeler.checkpoint)
    if not shards:
        stop(f'data/{learned["dataset"]} does not have the records of {learned["name"]}, from which this student '
             'learned: their labels are written, too')
    parts = choose_rows(shards, learned['max_records'], 0, learned.get('train_on', 'all'))
    rows = np.sort(np.concatenate(parts))
    known = {*shards.hashes[rows].tolist()}
    counts = {'records': len(rows)} | dict.fromkeys(('texts', 'labels', 'cut', 'unsure', 'held_out', 'errors'), 0)

    def list_texts():
        """yields the texts that have no record and are not held out."""
        for text, _, reason in islice(read_texts(input, None), max_texts or None):
            hash_ = text_hash(text)
            if reason or hash_ in known:
                continue
            known.add(hash_)
            counts['texts'] += 1
            if held_out(hash_, shards.own_split):
                counts['held_out'] += 1
            else:
                yield text

    asked, kept = tee(list_texts())
    target, again = Path(STARTED_IN, out), 'make room, and run the same command again'  # typed in the user's folder
    with whole_file(target, again) as tmp, open(tmp, 'w', encoding='utf-8') as file:
        write_records(file, shards, space, rows)
        for text, (record, n_cut) in zip(kept, tqdm(labeler.stream(asked), desc='teach', unit='text')):
            label = make_label(space.schema, record, labeler.problem)
            if label is None or label[1] < min_confidence:
                counts['errors' if label is None else 'unsure'] += 1
                continue
            file.write(json_line({'text': text, **label[0]}) + '\n')
            counts['labels'] += 1
            counts['cut'] += n_cut > 0                          # left out by extract.py, if too_long = 'refuse'
    task, labels = shlex.join(arg for arg in sys.argv[1:] if arg.endswith('.py')), os.path.relpath(target, STARTED_IN)
    print(f'Now: python extract.py {task} --name=taught --labels={shlex.quote(labels)} --max_records=0\n'
          f'     python train.py {task} --name=taught --max_records=0')
    print(data_line('teach', counts))
