"""How often is a student right on texts of your own whose answers are known? And is it unsure where none
fits?

    python tools/accuracy.py config/clinc.py --input=data/clinc/val.jsonl
    python tools/accuracy.py config/clinc.py --input=data/clinc/val.jsonl --outside=data/clinc/oos_val.jsonl

A line of `input` has a text and the true values of some fields: {"text": "...", "answer": {"intent":
"translate"}}, or under "truth". The lines of `outside` have texts that no value fits; `auroc` tells how
well the student's confidence parts them from the others. Of a field with two values, `recall_at_95` is the share of
the rarer one that is found if 95 in 100 of what is found shall be right. `ece` is how far the student's confidence is
from the share that is right. tools/evaluate.py measures agreement
with the teacher instead.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, stop
from config.machine import pick_device

import numpy as np

from data.lines import read_texts
from distil.agreement import calibration_error, measure_members
from distil.records import load_records
from distil.schema import true_value
from distil.values import MISSING, json_text
from distil.split import hash_texts
from distil.labeler import Labeler

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
input = ''           # file; texts with answers
outside = ''         # file; texts without
which = 'best'       # 'best' or 'last'; the epoch to use
sample_batch = 128   # 1..; texts decoded together
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; of a large student's layers, as in sample.py
config = configure(globals())


def area_under_roc(inside, outside):
    """the probability that a text inside gets a higher confidence than one outside, ties count half: the
    area under the ROC curve (Hanley and McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747)."""
    inside = np.sort(inside)
    below, up_to = (np.searchsorted(inside, outside, side) for side in ('left', 'right'))
    return float(1 - (below + up_to).mean() / 2 / len(inside))


def recall_at_precision(scores, positive, precision=0.95):
    """the largest share of the positives that a threshold on the scores finds while at least this share of all
    that it finds are positive; 0 if no threshold does. scores (n,) float; positive (n,) bool."""
    order = np.argsort(-scores, kind='stable')
    found, last = np.cumsum(positive[order]), np.append(np.diff(scores[order]) != 0, True)  # ties stay together
    good = last & (found >= precision * np.arange(1, len(found) + 1))
    return float(found[good].max(initial=0) / max(1, positive.sum()))


def read_with_truth(path):
    """[(text, {field: true value}, {} if the line has none)] of a .jsonl. Exits if there is no such
    file."""
    if not Path(path).is_file():
        stop(f'{path} does not exist')
    lines = []
    for text, line, reason in read_texts(path, None):
        known = {} if reason else line.get('answer') or line.get('truth')
        if not reason:
            lines.append((text, known if isinstance(known, dict) else {}))
    return lines


def count_trained(texts, labeler):
    """how many of these texts the student was trained on; 0 if its records are not here."""
    checkpoint, task = labeler.checkpoint, labeler.task
    settings, trained = checkpoint['config'], set()
    if shards := load_records(settings['dataset'], settings['name'], checkpoint):
        rows = shards.split()[0]
        trained = set(shards.hashes[rows[rows < (settings['max_records'] or len(shards))]].tolist())
    hashes = (hash_texts([text], labeler.space.tokenizer, task).tolist() for text in texts)
    return sum(not trained.isdisjoint(of_text) for of_text in hashes)


def measure(leaf, records, answers, others, problem='error'):
    """the figures of a leaf's accuracy line, or None if no answer names it. records: of a Labeler with confidence, for
    the texts with answers [{path: true value}]; others: its records for the texts outside; problem: the key of records
    without an answer."""
    field, said = leaf.path, lambda record: json_text(leaf.get(record))
    pairs = [(record, json_text(value)) for record, answer in zip(records, answers)
             if (value := true_value(leaf, answer)) is not MISSING and problem not in record]
    if not pairs:
        return None
    if leaf.is_list:
        ours, theirs = [said(record) for record, _ in pairs], [value for _, value in pairs]
        right = float(np.mean([a == b for a, b in zip(ours, theirs)]))
        return {'name': field, 'texts': len(pairs), 'right': right, **measure_members(ours, theirs)}
    truth = np.array([value for _, value in pairs])
    right = np.array([said(record) for record, _ in pairs]) == truth
    balanced = np.mean([right[truth == value].mean() for value in set(truth)])
    figures = {'name': field, 'texts': len(right), 'right': float(right.mean()), 'balanced': float(balanced)}
    name_of = dict(zip(leaf.texts, leaf.names))                 # {JSON text: key of _confidence}

    def confidence(records):
        known = [(record['_confidence'][field], said(record)) for record in records if problem not in record]
        return [p[name_of[value]] if isinstance(p, dict) else p for p, value in known]
    figures['ece'] = calibration_error(np.array(confidence(record for record, _ in pairs)), right)
    if len(leaf) == 2 and len({*truth}) == 2:                   # the rarer one is what people look for
        rare = min(name_of, key=[*truth].count)
        scores = np.array([record['_confidence'][field][name_of[rare]] for record, _ in pairs])
        figures |= {'rare': name_of[rare], 'recall_at_95': recall_at_precision(scores, truth == rare)}
    if others:
        figures |= {'outside': len(others),
                    'auroc': area_under_roc(confidence(record for record, _ in pairs), confidence(others))}
    return figures


if __name__ == '__main__':
    if not (name or run) or not input:
        stop('no task or no texts; run: python tools/accuracy.py config/clinc.py --input=data/clinc/val.jsonl')
    lines, others = read_with_truth(input), read_with_truth(outside) if outside else []
    labeler = Labeler(Path('out', run or name), pick_device(device), which, sample_batch, dtype=dtype)
    if any(len(leaf) == 2 and not leaf.is_list for leaf in labeler.space.schema.leaves):
        labeler.confidence = 'full'                             # recall_at_95 needs the probability of both values
    start = time.perf_counter()
    records = labeler([text for text, _ in lines])
    seconds = time.perf_counter() - start
    others = labeler([text for text, _ in others])
    found = [measure(leaf, records, [answer for _, answer in lines], others, labeler.problem)
             for leaf in labeler.space.schema.leaves]
    if not any(found):
        stop(f'no line of {input} has the answer to one of: {", ".join(labeler.space.schema.paths)}')
    for figures in filter(None, found):
        print(data_line('accuracy', figures))
    if n := count_trained([text for text, answer in lines if answer], labeler):
        print(f'the student was trained on {n} of these texts, which flatters')
    if errors := [record[labeler.problem] for record in records if labeler.problem in record]:
        print(f'{len(errors)} texts have no answer: {errors[0]}')
    print(f'the student answers {len(lines) / seconds:,.0f} texts per second here')
