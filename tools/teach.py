"""A larger student labels texts for a smaller one: few labels, much text, and a small student at the end.

    python train.py config/mine.py --reader=data/teachers/mpnet --run=large --reader_lr=0.04     # learns the few labels
    python tools/teach.py config/mine.py --run=large --input=texts.jsonl --out=taught.jsonl     # answers other texts
    python extract.py config/mine.py --name=taught --labels=labels.jsonl,taught.jsonl
    python train.py config/mine.py --name=taught                                                 # learns both

Writes a line {"text": ..., "probabilities": {...}} for each text: the large student's probabilities of all values,
which say more than its answers alone (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). Leave the texts that
have labels out of `input`: labels of one text are averaged. docs/students.md has what it brings.
"""
import sys
from itertools import islice, tee
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, json_line, stop
from config.machine import pick_device, whole_file

from tqdm import tqdm

from data.lines import read_texts
from distil.labeler import Labeler

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use
input = ''           # file; .jsonl of {"text": ...}
out = ''             # file; .jsonl that is written
min_confidence = 0.0  # 0..1; texts with a field below it are left out
max_records = 0      # 0..; of the first texts alone, this many; 0: all
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


if __name__ == '__main__':
    if not (name or run) or not input or not out:
        stop('no task or no file; run: python tools/teach.py config/mine.py --run=large --input=texts.jsonl '
             '--out=taught.jsonl')
    if not Path(input).is_file():
        stop(f'{input} does not exist')
    labeler = Labeler(Path('out', run or name), pick_device(device), which, sample_batch, confidence='full',
                      dtype=dtype)
    if labeler.space.has_options:
        stop('the options of each text are not those that a label would be read with: such a task cannot be taught')
    lines = islice(read_texts(input, None), max_records or None)
    texts = (text for text, _, reason in lines if not reason)
    asked, kept = tee(texts)
    counts = {'texts': 0, 'labels': 0, 'unsure': 0, 'errors': 0}
    again = 'make room, and run the same command again'
    with whole_file(Path(out), again) as tmp, open(tmp, 'w', encoding='utf-8') as file:
        for text, (record, _) in zip(kept, tqdm(labeler.stream(asked), desc='teach', unit='text')):
            label = make_label(labeler.space.schema, record, labeler.problem)
            counts['texts'] += 1
            if label is None or label[1] < min_confidence:
                counts['errors' if label is None else 'unsure'] += 1
                continue
            file.write(json_line({'text': text, **label[0]}) + '\n')
            counts['labels'] += 1
    print(data_line('teach', counts))
