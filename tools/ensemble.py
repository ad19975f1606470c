r"""An ensemble of students answers the texts that their teacher did not, and one more student learns from it.

    for s in 1 2 3; do python train.py config/demo.py --run=demo_$s --seed=$s; done
    python tools/ensemble.py config/demo.py --students=out/demo_1,out/demo_2,out/demo_3
    python train.py config/demo.py --more=demo_more --run=demo_all --batch_size=64 --max_epochs=4 \
        --token_dropout=0

If there are few records, students with different seeds make different errors. Their mean agrees with the
teacher more often than any of them. So does a student that learns from the mean, and it is as small and as
fast as one of them (Bucila et al. 2006, "Model compression", https://doi.org/10.1145/1150402.1150464).
docs/results.md has the figures.

Answers the texts of data/<dataset>/input.jsonl that extract.py would label and that have no answer yet, but
not those held out: a student is only measured on answers of the teacher. Writes data/<dataset>/<more>-00, in
the format of extract.py.
"""
import hashlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, next_command, stop
from config.machine import on_stop, pick_device
from data import Hashes, Writer, held_out, pad_batch, read_meta, read_texts, stored_hashes, write_json
from data.texts import read_groups
from distil.checkpoint import TASK, load_checkpoint, read_work
from distil.decode import answer_ids, generate, input_ids
from distil.records import open_shards

name = ''            # word; data/<dataset>/<name>-* is what the students learned from ...
dataset = ''         # word
more = ''            # word; ... and data/<dataset>/<more>-00 gets their answers; '': <name>_more
students = ''        # folders of runs, separated by commas
max_more = 0         # 0..; stop after this number of texts; 0: all
too_long = 'refuse'  # 'refuse' or 'cut'; what happens to longer texts, as in extract.py
sample_batch = 128   # 1..; texts decoded together
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of large students' layers, as in sample.py
config = configure(globals())

# -----------------------------------------------------------------------------
# an ensemble as one model


class MemberCache:
    """the layers of a decode.Cache that belong to one student of an ensemble, from first_layer on."""

    def __init__(self, cache, first_layer):
        self.cache, self.first_layer = cache, first_layer

    def attend(self, layer, *new):
        return self.cache.attend(self.first_layer + layer, *new)


class Ensemble(nn.Module):
    """students of one shape as one model: its logits are the mean of their log-probabilities. decode.py
    decodes it like a student, with a cache that has the layers of all students."""

    def __init__(self, students):
        super().__init__()
        self.students, c = nn.ModuleList(students), students[0].config
        self.config = replace(c, n_layer=c.n_layer * len(students))
        self.h = [block for student in students for block in student.h]
        self.lm_head, self.reader = students[0].lm_head, students[0].reader  # it cuts the texts for all
        self.prompt = torch.cat([student.prompt for student in students]) if c.n_prompt else None

    def forward(self, idx, targets=None, cache=None, pos=None, keep=None):
        """as Student.forward."""
        log_p = 0
        for n, student in enumerate(self.students):
            own_cache = MemberCache(cache, n * student.config.n_layer) if cache else None
            log_p = log_p + student(idx, targets, own_cache, pos, keep).float().log_softmax(-1)
        return log_p / len(self.students)


@torch.no_grad()
def answer_texts(model, space, texts):
    """texts: lists of ids -> per text (output indices (n,), logits (n, V)): the model's answer, constrained
    to the schema, and its logits at every token of it. The bias of a calibrated teacher is added to the
    logits, because it is subtracted again when the shard is read."""
    outs, device = generate(model, space, texts, batch_size=len(texts)), model.lm_head.weight.device
    idx, targets = pad_batch(input_ids(model, space, texts), outs, answer_ids(model, space), model.config.start)
    logits = model(idx.to(device), targets.to(device)).cpu()    # (answer tokens of all texts, V)
    logits += space.bias[[state for answer in outs for state in space.states_before(answer)]]
    parts = logits.split([len(answer) for answer in outs])
    return [(answer, part.numpy()) for answer, part in zip(outs, parts)]


# -----------------------------------------------------------------------------
# input and output


def load_ensemble(folders, meta, device, dtype):
    """the Ensemble of these runs, its OutputSpace, and its members: [{run, weights: a hash, hours}]. Exits
    with a message if a student has another task than meta (of a shard), or if their shapes differ."""
    students, members = [], []
    for folder in folders:
        checkpoint, student, space = load_checkpoint(folder, device, dtype=dtype)
        if differing := [key for key in TASK if checkpoint['task'].get(key) != meta.get(key)]:
            stop(f'{folder} learned from another {", ".join(differing)}; train it on these records')
        c, first = student.config, (students or [student])[0].config
        if differing := [key for key, value in vars(c).items() if value != getattr(first, key)]:
            stop(f'{folder} has another {", ".join(differing)} than {folders[0]}; the students of an '
                 'ensemble must have the same shape')
        students.append(student)
        work, head = read_work(folder, checkpoint), student.lm_head.weight.detach().cpu().numpy()
        weights = hashlib.blake2b(head.tobytes(), digest_size=8).hexdigest()  # differs between trainings
        if weights in [member['weights'] for member in members]:
            stop(f'{folder} is the same student as one before it; name each student once')
        hours = work['train_hours'] + work.get('students_hours', 0.0)
        members.append({'run': folder.name, 'weights': weights, 'hours': hours})
    return Ensemble(students), space, members


def open_shard(folder, shards, members):
    """the Writer of a shard, which is created or continued, and its meta. Exits with a message if it cannot
    be written or has the answers of another ensemble. members: see load_ensemble."""
    excluded = 'timed', 'dropped', 'missing', 'counts'          # figures of the teacher's extraction
    meta = {key: value for key, value in shards.meta.items() if key not in excluded} | {'students': members}
    try:
        if (folder / 'meta.json').exists():
            old = read_meta(folder)
            old_weights = [member['weights'] for member in old.get('students', [])]
            if old_weights != [member['weights'] for member in members]:
                stop(f'{folder} has answers that are not of these students; choose another --more=')
            meta = old
        elif (index := folder / 'index.bin').exists() and index.stat().st_size:
            stop(f'{folder} has records and no meta.json; choose another --more=')
        writer = Writer(folder, len(meta['output_ids']))
        (folder / 'tokenizer.json').write_bytes((shards.folder / 'tokenizer.json').read_bytes())
        write_json(folder / 'meta.json', meta)
    except BlockingIOError:
        stop(f'another run is writing to {folder}; wait for it or choose another --more=')
    except ValueError as error:
        stop(str(error))
    except OSError as error:
        stop(f'cannot write to {folder}: {error.strerror}')
    return writer, meta


def select_unanswered(groups, known, limit):
    """yields lists of (hash, ids): the texts in groups (of read_groups) that are not held out and not in any
    of the Hashes `known`. limit: number of texts in all; None: all of them."""
    n = 0
    for group in groups:
        selected = [(hash_, ids.tolist()) for hash_, ids, _ in group
                    if not held_out(hash_) and not any(hash_ in hashes for hashes in known)]
        selected = selected if limit is None else selected[:limit - n]
        n += len(selected)
        if not selected and n == limit:
            return
        if selected:
            yield selected


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    on_stop(lambda *_: stop('\nstopped; the answers written so far are safe, the same command continues'))
    if not name or not dataset or not students:
        stop('no task or no students; run: python tools/ensemble.py config/demo.py '
             '--students=out/demo_1,out/demo_2')
    device, more, source = pick_device(device), more or f'{name}_more', Path('data', dataset, 'input.jsonl')
    if not source.is_file():
        stop(f'{source} does not exist; restore it: the students answer its texts')
    shards = open_shards(dataset, name)
    runs = [Path(folder.strip()) for folder in students.split(',')]
    model, space, members = load_ensemble(runs, shards.meta, device, dtype)
    folder = Path('data', dataset, f'{more}-00')
    writer, meta = open_shard(folder, shards, members)
    known = Hashes(shards.hashes), stored_hashes([folder], meta)
    limit = max(0, max_more - writer.n_records) if max_more else None
    filters = meta['min_text'], meta['max_text'], 0, too_long == 'cut'
    groups = read_groups(read_texts(source), space.tokenizer, sample_batch, *filters)
    timed = meta.setdefault('timed', {'records': 0, 'seconds': 0.0})
    start = time.perf_counter()
    with tqdm(desc='answer', unit='rec', smoothing=0.05) as bar:
        try:
            for group in select_unanswered(groups, known, limit):
                answers = answer_texts(model, space, [ids for _, ids in group])
                writer.append([(*text, outs, logits, np.full(len(outs), np.nan))
                               for text, (outs, logits) in zip(group, answers)])
                bar.update(len(group))
                timed['records'] += len(group)
                timed['seconds'] += time.perf_counter() - start
                start = time.perf_counter()
                write_json(folder / 'meta.json', meta)
        except OSError as error:
            stop(f'cannot write to {folder}: {error.strerror}; its {writer.n_records} answers are safe, '
                 'the same command continues')
    writer.close()
    if not writer.n_records:
        stop(f'no text of {source} is left to answer: its texts have an answer, are held out or are not '
             'worth labelling; add texts')
    n_train = len(shards.split()[0])
    print(f'{folder} has {writer.n_records} answers of {len(members)} students; next: '
          f'{next_command("train.py")} --more={more} --run={name}_all, with a smaller max_epochs: an epoch '
          f'is now {(n_train + writer.n_records) / n_train:.1f} times as long')
