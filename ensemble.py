"""Students of one teacher answer together the texts that it was not asked about, for one more to learn from.

    python train.py config/demo.py --run=demo_1 --seed=1        # and demo_2, demo_3
    python ensemble.py config/demo.py --students=out/demo_1,out/demo_2,out/demo_3
    python train.py config/demo.py --more=demo_more --run=demo_all --batch_size=64 --max_epochs=4

What one student gets wrong by the chance of its start others get right: their mean agrees more with the
teacher than any of them, and a student that learns from it nearly as much, and is no larger (Bucila et al.
2006, "Model compression", https://doi.org/10.1145/1150402.1150464). Writes data/<dataset>/<more>-00/ in the
format of extract.py. Held-out texts are left out: a student is only ever measured on what the teacher said.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from checkpoint import hours_of, load_checkpoint
from config import command, configure, on_stop, pick_device, stop
from data import (Shards, Writer, held_out, pad_batch, read_meta, read_texts, shard_folders, stored_hashes,
                  write_json)
from decode import generate
from texts import read_groups

name = ''            # word; data/<dataset>/<name>-* is what the students learned from ...
dataset = ''         # word
more = ''            # word; ... and data/<dataset>/<more>-00 gets what they say; '': <name>_more
students = ''        # folders of runs, parted by commas
max_more = 0         # 0..; stop after so many texts; 0: all that are worth labelling
too_long = 'refuse'  # 'refuse' or 'cut'; what becomes of longer texts, as in extract.py
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of large students' layers, as in sample.py
config = configure(globals())

# -----------------------------------------------------------------------------
# several students as one


class Ensemble(nn.Module):
    """students of one shape as one: its logits are the mean of their log-probabilities. decode.py decodes it
    like a student, with a cache that has the layers of all of them."""

    def __init__(self, students):
        super().__init__()
        self.students, c = nn.ModuleList(students), students[0].config
        self.config = replace(c, n_layer=c.n_layer * len(students))
        self.h = [block for student in students for block in student.h]
        self.lm_head = students[0].lm_head
        self.prompt = torch.cat([student.prompt for student in students]) if c.n_prompt else None

    def forward(self, idx, targets=None, cache=None, pos=None, keep=None):
        """as Student.forward"""
        total = 0
        for n, student in enumerate(self.students):
            part, first = None, n * student.config.n_layer      # its layers in the cache of all
            if cache is not None:
                attend = lambda layer, *new, first: cache.attend(first + layer, *new)
                part = SimpleNamespace(attend=partial(attend, first=first))
            total = total + student(idx, targets, part, pos, keep).float().log_softmax(-1)
        return total / len(self.students)


@torch.no_grad()
def answer(model, space, texts, bias, batch_size):
    """[(output indices (n,), logits (n, V))] of texts, lists of ids: what the model answers, held to the
    schema, and its logits at every token of that. bias (states, V): what calibration takes off the logits of
    a shard when they are read, or None."""
    outs = generate(model, space, texts, True, batch_size)
    idx, targets = pad_batch(texts, outs, space.output_ids, model.config.start)
    device = model.lm_head.weight.device
    logits = model(idx.to(device), targets.to(device)).cpu()    # (answer tokens of all texts, V)
    if bias is not None:
        logits = logits + bias[[state for one in outs for state in space.states(one)]]
    return list(zip(outs, logits.split([len(one) for one in outs])))


# -----------------------------------------------------------------------------
# what is read and written


def open_students(folders, shards, device, dtype):
    """the Ensemble of these runs, its OutputSpace, and {folder: hours of its training}; ends in one line
    where they are not of the task of these Shards, or not of one shape."""
    members, hours, keys = [], {}, ('prompt', 'fields', 'output_ids', 'bias')
    for folder in folders:
        checkpoint, student, space = load_checkpoint(folder, device, dtype=dtype)
        if any(shards.meta.get(key) != checkpoint['task'].get(key) for key in keys):
            stop(f'{folder} learned another task than that of {shards.folder}')
        if members and student.config != members[0].config:
            stop(f'{folder} has another shape than {folders[0]}; only students of one shape answer together')
        members.append(student)
        hours[folder] = hours_of(folder, checkpoint)
    return Ensemble(members), space, hours


def open_shard(folder, shards, hours):
    """the Writer of a folder, new or gone on with; ends in one line where it cannot be written, or has the
    answers of others. hours: of the students' trainings, which tell them apart."""
    try:
        writer = Writer(folder, len(shards.meta['output_ids']))
        if not (folder / 'meta.json').exists():
            own = 'timed', 'dropped', 'missing', 'counts'       # figures of the teacher's extraction
            meta = {key: value for key, value in shards.meta.items() if key not in own}
            (folder / 'tokenizer.json').write_bytes((shards.folder / 'tokenizer.json').read_bytes())
            write_json(folder / 'meta.json', meta | {'students': hours})
        elif read_meta(folder).get('students') != hours:
            stop(f'{folder} has the answers of others; choose another --more=, or remove the folder')
        return writer
    except BlockingIOError:
        stop(f'another run is writing to {folder}; wait for it or choose another --more=')
    except OSError as error:
        stop(f'cannot write to {folder}: {error.strerror}')


def texts_left(groups, known, limit):
    """yields of groups the (hash, ids) that are neither held out nor in any of the Hashes `known`; so many in
    all, or without limit where that is 0."""
    n = 0
    for group in groups:
        left = [(hash_, ids.tolist()) for hash_, ids, _ in group
                if not held_out(hash_) and not any(hash_ in hashes for hashes in known)]
        left = left[:limit - n] if limit else left
        n += len(left)
        if left:
            yield left
        if limit and n == limit:
            return


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    on_stop(lambda *_: stop('\nstopped; the answers written so far are safe, the same command goes on'))
    if not name or not students:
        stop('no task or no students; run: python ensemble.py config/demo.py '
             '--students=out/demo_1,out/demo_2')
    device, more, source = pick_device(device), more or f'{name}_more', Path('data', dataset, 'input.jsonl')
    if more == name:
        stop(f'more = {more} is what the teacher answered; choose another word')
    if not source.is_file():
        stop(f'{source} does not exist')
    try:
        shards = Shards(dataset, name)
    except (FileNotFoundError, ValueError) as error:
        stop(f'{error}; run: {command("extract.py")}')
    model, space, hours = open_students(students.split(','), shards, device, dtype)
    folder = Path('data', dataset, f'{more}-00')
    writer = open_shard(folder, shards, hours)
    filters = shards.meta['min_text'], shards.meta['max_text'], 0, too_long == 'cut'
    groups = read_groups(read_texts(source), space.tokenizer, 4 * sample_batch, *filters)
    known = [stored_hashes(shard_folders(dataset, part), shards.meta) for part in (name, more)]
    if not max_more or writer.n_records < max_more:
        bias = shards.space.bias if shards.space else None
        bar = tqdm(desc='answer', unit='rec', smoothing=0.05)
        for group in texts_left(groups, known, max_more and max_more - writer.n_records):
            answers = answer(model, space, [ids for _, ids in group], bias, sample_batch)
            try:
                writer.append([(hash_, ids, outs, logits.numpy(), np.full(len(outs), np.nan))
                               for (hash_, ids), (outs, logits) in zip(group, answers)])
            except OSError as error:
                sys.exit(f'cannot write to {folder}: {error.strerror}; its {writer.n_records} answers are '
                         'safe, the same command goes on')
            bar.update(len(group))
        bar.close()
    writer.close()
    print(f'{folder} has {writer.n_records} answers of {len(hours)} students; next: {command("train.py")} '
          f'--more={more} --run={name}_all --batch_size=64 --max_epochs=4')
