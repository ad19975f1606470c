r"""Students of one teacher answer together the texts that it was not asked about, for one more to learn from.

    for s in 1 2 3; do python train.py config/demo.py --run=demo_$s --seed=$s; done
    python tools/ensemble.py config/demo.py --students=out/demo_1,out/demo_2,out/demo_3
    python train.py config/demo.py --more=demo_more --run=demo_all --batch_size=64 --max_epochs=4 \
        --token_dropout=0

Where records are few, what one student gets wrong by the chance of its start others get right: their mean
agrees more with the teacher than any of them, and so does one that learns from it, as small and as fast as
before (Bucila et al. 2006, "Model compression", https://doi.org/10.1145/1150402.1150464; figures:
docs/results.md).

Answers the texts of data/<dataset>/input.jsonl that extract.py would label and that have no answer yet, but
for those held out: a student is only ever measured on what the teacher said. Writes data/<dataset>/<more>-00,
in the format of extract.py.
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
from data import Hashes, Shards, Writer, held_out, pad_batch, read_meta, read_texts, stored_hashes, write_json
from data.texts import read_groups
from distil.checkpoint import TASK, load_checkpoint, read_work
from distil.decode import generate

name = ''            # word; data/<dataset>/<name>-* is what the students learned from ...
dataset = ''         # word
more = ''            # word; ... and data/<dataset>/<more>-00 gets what they say; '': <name>_more
students = ''        # folders of runs, parted by commas
max_more = 0         # 0..; stop after so many texts; 0: all
too_long = 'refuse'  # 'refuse' or 'cut'; what becomes of longer texts, as in extract.py
sample_batch = 128   # 1..; texts decoded together
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of large students' layers, as in sample.py
config = configure(globals())

# -----------------------------------------------------------------------------
# several students as one


class PartOfCache:
    """a decode.Cache as one of several students sees it: its layers come after those of the ones before."""

    def __init__(self, cache, first):
        self.cache, self.first = cache, first

    def attend(self, layer, *new):
        return self.cache.attend(self.first + layer, *new)


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
        log_p = 0
        for n, student in enumerate(self.students):
            part = PartOfCache(cache, n * student.config.n_layer) if cache else None
            log_p = log_p + student(idx, targets, part, pos, keep).float().log_softmax(-1)
        return log_p / len(self.students)


@torch.no_grad()
def answer(model, space, texts):
    """(output indices (n,), logits (n, V)) for each of texts, lists of ids: what the model answers, held to
    the schema, and its logits at every token of that, with the bias of a calibrated teacher put on: it is
    taken off again when a shard is read."""
    outs, device = generate(model, space, texts, batch_size=len(texts)), model.lm_head.weight.device
    idx, targets = pad_batch(texts, outs, space.output_ids, model.config.start)
    logits = model(idx.to(device), targets.to(device)).cpu()    # (answer tokens of all texts, V)
    logits += space.bias[[state for one in outs for state in space.states_before(one)]]
    return [(one, part.numpy()) for one, part in zip(outs, logits.split([len(one) for one in outs]))]


# -----------------------------------------------------------------------------
# what is read and written


def open_students(folders, meta, device, dtype):
    """the Ensemble of these runs, its OutputSpace, and who they are: [{run, weights, hours}]. Ends in one
    line where they are not of the task that meta.json tells of, or not of one shape."""
    members, who = [], []
    for folder in folders:
        checkpoint, student, space = load_checkpoint(folder, device, dtype=dtype)
        if differ := [key for key in TASK if checkpoint['task'].get(key) != meta.get(key)]:
            stop(f'{folder} learned from another {", ".join(differ)}; train it on these records')
        c, first = student.config, (members or [student])[0].config
        if differ := [key for key, value in vars(c).items() if value != getattr(first, key)]:
            stop(f'{folder} has another {", ".join(differ)} than {folders[0]}; students answer together '
                 'where they are of one shape')
        members.append(student)
        work, head = read_work(folder, checkpoint), student.lm_head.weight.detach().cpu().numpy()
        weights = hashlib.blake2b(head.tobytes(), digest_size=8).hexdigest()  # no two trainings' are the same
        if weights in [one['weights'] for one in who]:
            stop(f'{folder} is the same student as one before it')
        hours = work['train_hours'] + work.get('students_hours', 0.0)
        who.append({'run': folder.name, 'weights': weights, 'hours': hours})
    return Ensemble(members), space, who


def open_shard(folder, shards, who):
    """the Writer of a folder, new or gone on with, and its meta. Ends in one line where it cannot be written,
    or has other answers. who: the students, see open_students."""
    own = 'timed', 'dropped', 'missing', 'counts'               # figures of the teacher's extraction
    meta = {key: value for key, value in shards.meta.items() if key not in own} | {'students': who}
    try:
        if (folder / 'meta.json').exists():
            old = read_meta(folder)
            if [one['weights'] for one in old.get('students', [])] != [one['weights'] for one in who]:
                stop(f'{folder} has the answers of others; choose another --more=')
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


def texts_left(groups, known, limit):
    """yields lists of (hash, ids): of the groups of read_groups those texts that are not held out, and not in
    any of the Hashes `known`. limit: so many in all; None: all of them."""
    n = 0
    for group in groups:
        left = [(hash_, ids.tolist()) for hash_, ids, _ in group
                if not held_out(hash_) and not any(hash_ in hashes for hashes in known)]
        left = left if limit is None else left[:limit - n]
        n += len(left)
        if not left and n == limit:
            return
        if left:
            yield left


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    on_stop(lambda *_: stop('\nstopped; the answers written so far are safe, the same command goes on'))
    if not name or not dataset or not students:
        stop('no task or no students; run: python tools/ensemble.py config/demo.py '
             '--students=out/demo_1,out/demo_2')
    device, more, source = pick_device(device), more or f'{name}_more', Path('data', dataset, 'input.jsonl')
    if not source.is_file():
        stop(f'{source} does not exist; bring it back: its texts are what students answer')
    try:
        shards = Shards(dataset, name)
    except FileNotFoundError as error:
        stop(f'{error}; run: {next_command("extract.py")}')
    except ValueError as error:
        stop(str(error))
    runs = [Path(folder.strip()) for folder in students.split(',')]
    model, space, who = open_students(runs, shards.meta, device, dtype)
    folder = Path('data', dataset, f'{more}-00')
    writer, meta = open_shard(folder, shards, who)
    known = Hashes(shards.hashes), stored_hashes([folder], meta)
    limit = max(0, max_more - writer.n_records) if max_more else None
    filters = meta['min_text'], meta['max_text'], 0, too_long == 'cut'
    groups = read_groups(read_texts(source), space.tokenizer, sample_batch, *filters)
    timed = meta.setdefault('timed', {'records': 0, 'seconds': 0.0})
    start = time.perf_counter()
    with tqdm(desc='answer', unit='rec', smoothing=0.05) as bar:
        try:
            for group in texts_left(groups, known, limit):
                answers = answer(model, space, [ids for _, ids in group])
                writer.append([(*text, outs, logits, np.full(len(outs), np.nan))
                               for text, (outs, logits) in zip(group, answers)])
                bar.update(len(group))
                timed['records'] += len(group)
                timed['seconds'] += time.perf_counter() - start
                start = time.perf_counter()
                write_json(folder / 'meta.json', meta)
        except OSError as error:
            stop(f'cannot write to {folder}: {error.strerror}; its {writer.n_records} answers are safe, '
                 'the same command goes on')
    writer.close()
    if not writer.n_records:
        stop(f'no text of {source} is left to answer: the others have an answer, are held out or not worth '
             'labelling; add texts')
    n_train = len(shards.split()[0])
    print(f'{folder} has {writer.n_records} answers of {len(who)} students; next: {next_command("train.py")} '
          f'--more={more} --run={name}_all, with a smaller max_epochs: an epoch is now '
          f'{(n_train + writer.n_records) / n_train:.1f} times as long')
