"""A training under way in out/<run>/: its checkpoints, and how it continues after an interruption.

ckpt.pt has all that is needed to continue bit for bit, best.pt is the epoch that agreed most; both are whole at
any moment. The order of the records and the dropout are functions of (seed, step), see train.py, so they need
not be saved.
"""
import fcntl
import math
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from config import data_line, stop
from config.machine import RANK, can_compile, on_stop, pick_dtype, run_in_first, whole_file
from data import answers_from
from distil.checkpoint import CHECKPOINT, TASK, load_checkpoint, save_checkpoint, what_is_kept
from distil.precision import is_large
from distil.space import OutputSpace
from distil.split import describe_split, pack_split
from distil.start import SeenRows, new_student
from model import Student

# settings that may change when a run continues: they change where and how fast it runs, not its result
FREE = ('device', 'dtype', 'compile', 'eval_records', 'log_steps', 'grad_accum', 'overwrite', 'save_steps',
        'tracker', 'held_out')                               # the split itself is compared

# values of settings that older checkpoints lack, and of a setting that only older ones have
MISSING = {'reader': '', 'reader_layers': 0, 'reader_tokens': 0, 'reader_lr': 0.1, 'divergence': 'forward',
           'train_on': 'all'}


@dataclass
class Training:
    """a training under way: what its checkpoints hold, and what the next step needs."""
    out: Path
    facts: dict            # config, task, n_train, split: a run continues only with the same
    student: Student
    space: OutputSpace
    step: int = 0
    finished: bool = False
    figures: dict = None   # of the last evaluation
    per_field: dict = None  # of the last evaluation, for each field
    best: dict = None      # of the best epoch so far, see agreement.update_best
    linear: dict = None    # figures of the linear baseline, {} without scikit-learn
    work: dict = None      # hours and speeds, for the cost line of tools/evaluate.py
    optimizer: object = None
    seen: SeenRows = None  # None if the table is frozen, or all of it is trained
    tracker: object = None  # the tracker's module
    compiled: bool = False
    precision: object = field(default_factory=nullcontext)  # autocast of evaluations
    began: float = field(default_factory=time.time)

    @contextmanager
    def whole_table(self):
        """the student with its whole input table and without torch.compile, for evaluations and saving."""
        with torch.compiler.set_stance('force_eager') if self.compiled else nullcontext():
            with self.seen.whole() if self.seen else nullcontext():
                yield

    def log(self, tag, figures):
        """writes a data line to the terminal, log.txt and the tracker."""
        line = data_line(tag, figures)
        tqdm.write(line)
        try:
            append_whole(self.out / 'log.txt', line.encode() + b'\n')
        except OSError as error:
            stop(f'cannot write {self.out}/log.txt: {error.strerror}; {what_is_kept(self.out)}')
        if self.tracker and tag != 'field':
            self.tracker.log({f'{tag}/{key}': v for key, v in figures.items() if isinstance(v, (int, float))})

    def save(self, file, finished=False):
        """writes a checkpoint, whole or not at all. Without `finished` ckpt.pt also gets the optimizer."""
        hours = self.work['train_hours'] + (time.time() - self.began) / 3600
        state = {'format': CHECKPOINT, 'student': asdict(self.student.config), 'finished': finished,
                 'step': self.step, 'figures': self.figures, 'per_field': self.per_field, 'best': self.best,
                 'linear': self.linear, 'work': self.work | {'train_hours': hours}, **self.facts}
        if file == 'ckpt.pt' and not finished:
            state['optimizer'] = self.optimizer.state_dict()
        with self.whole_table():
            state['model'] = self.student.state_dict()
        save_checkpoint(self.out / file, state)

    def set_precision(self, dtype, compile, device, n_tokens):
        """sets the precision of evaluations, compiles the student's layers if that pays off for a run over
        n_tokens, and returns the autocast context of the training steps."""
        bf16 = run_in_first(lambda: pick_dtype(dtype, device)) == torch.bfloat16
        autocast = torch.autocast(device.split(':')[0], torch.bfloat16) if bf16 else nullcontext()
        self.precision = autocast if is_large(self.student) else nullcontext()  # the same as in sample.py
        self.compiled = compile in ('True', 'true') or compile == 'auto' and compiling_pays(
            self.student, device, bf16, n_tokens)
        if self.compiled:
            for block in self.student.h:                        # one by one: they share the compiled code
                block.compile(dynamic=True)
        print(f'training in {"bfloat16" if bf16 else "float32"} on {device}'
              + (', compiled' if self.compiled else ''))
        return autocast


def append_whole(path, data):
    """appends bytes to a file. After an OSError it is as long as before."""
    with open(path, 'ab', buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data):]
        except OSError:
            with suppress(OSError):                             # no file of this disk, such as a pipe
                file.truncate(size)
            raise


def compiling_pays(student, device, bf16, n_tokens):
    """True if torch.compile shortens a training over so many tokens. On a CPU compiling takes half a minute,
    and then steps in bfloat16 are a third faster, steps in float32 4 %."""
    if not device.startswith('cpu'):
        return device.startswith('cuda')
    n_weights = sum(p.numel() for p in student.h.parameters())
    return bf16 and 6 * n_weights * n_tokens > 4e13 and can_compile()


class Meter:
    """the means and the speed that a train line shows: of the steps since the last one, in this process."""

    def __init__(self, n_steps):
        self.n_steps = n_steps
        self.all_seconds, self.all_steps = 0.0, 0
        self.clear()

    def clear(self):
        self.sums, self.n_read, self.seconds, self.n = np.zeros(5), 0, 0.0, 0

    def add(self, sums, n_read, seconds):
        """counts a step. sums (5,): of loss, kl, ce, hits and answer tokens; n_read: tokens read; seconds it took."""
        self.sums, self.n_read = self.sums + sums, self.n_read + n_read
        self.seconds, self.n = self.seconds + seconds, self.n + 1
        self.all_seconds, self.all_steps = self.all_seconds + seconds, self.all_steps + 1

    def hours(self):
        """that all steps of the run take at the mean speed so far."""
        return self.all_seconds / self.all_steps * self.n_steps / 3600

    def read(self, step):
        """({loss, kl, ce, teacher_forced}, {ms, tok_s, eta_min}) since the last call."""
        means = dict(zip(('loss', 'kl', 'ce', 'teacher_forced'), (self.sums[:4] / self.sums[4]).tolist()))
        step_s = self.seconds / self.n
        speed = {'ms': step_s * 1e3, 'tok_s': self.n_read / self.seconds,
                 'eta_min': step_s * (self.n_steps - step) / 60}
        self.clear()
        return means, speed


# -----------------------------------------------------------------------------
# a new training, or one that continues


def open_training(out, config, shards, train_rows, device):
    """(Training in the folder `out`, optimizer state or None). It continues if there is a checkpoint of the
    same settings and records. Exits with a message if the training is finished or is another one.

    config: the settings of train.py; shards: its records; train_rows: those of them that are trained on.
    """
    facts = run_facts(config, shards, len(train_rows))
    resume = (out / 'ckpt.pt').exists() and not config['overwrite']
    if config['init_from'] == 'resume' and not resume:
        stop(f'{out}/ckpt.pt does not exist; there is nothing to resume')
    if resume:
        training, optimizer_state = resume_training(out, facts, config['freeze_table'], device)
    else:
        student = new_student(config, shards, train_rows).to(device)
        training, optimizer_state = new_training(out, facts, student, shards), None
    if training.finished:
        print(f'{out} is trained already ({training.step} steps); train another beside it with --run=other, '
              'or again with --overwrite=True')
        sys.exit()
    return training, optimizer_state


def run_facts(config, shards, n_train):
    """what identifies a training: it continues only with the same settings, task, records and split."""
    fixed = {key: value for key, value in config.items() if key not in FREE}
    task = {key: shards.meta.get(key) for key in TASK}
    return {'config': fixed, 'task': task, 'n_train': n_train, 'split': pack_split(shards.own_split)}


def describe_differences(old, new):
    """a phrase for each of the run_facts in which two runs differ."""
    old, new = ({**MISSING, **facts['config'], **facts['task'], 'n_train': facts['n_train'],
                 'split': describe_split(facts.get('split'))} for facts in (old, new))
    differ = [key for key in new if new[key] != old.get(key) and (key, new[key]) != ('init_from', 'resume')]
    return [f'{key} {old.get(key)!r:.40} there, {new[key]!r:.40} here' for key in differ]


def new_training(out, facts, student, shards):
    """a Training at its first step. The first process also removes an earlier training from the folder."""
    task = facts['task']
    tokenizer = Tokenizer.from_file(str(shards.folder / 'tokenizer.json'))
    space = OutputSpace.from_task(tokenizer, task)
    if RANK == 0:
        contents = {'tokenizer.json': (shards.folder / 'tokenizer.json').read_bytes()}
        if student.encoder:
            contents['reader.json'] = student.encoder.tokenizer.to_str(True).encode()
        for file, content in contents.items():
            with whole_file(out / file, what_is_kept(out)) as tmp:
                tmp.write_bytes(content)
        for file in ('ckpt.pt', 'best.pt'):
            (out / file).unlink(missing_ok=True)
        (out / 'log.txt').write_text('')
    return Training(out, facts, student, space, work=work_before(shards))


def work_before(shards):
    """what the labels have cost, for the cost line of tools/evaluate.py: {extract_hours, train_hours: 0,
    teacher_rec_s}."""
    timed = Counter()
    for meta in shards.metas:
        timed.update(meta.get('timed', {}))
    teacher_rec_s = timed['records'] / timed['seconds'] if timed else math.nan
    hours = 0.0 if answers_from(shards.meta) == 'labels' else len(shards) / teacher_rec_s / 3600
    return {'extract_hours': hours, 'train_hours': 0.0, 'teacher_rec_s': teacher_rec_s}


def resume_training(out, facts, freeze_table, device):
    """(the Training of a folder at the step of its ckpt.pt, its optimizer state)."""
    checkpoint, student, space = load_checkpoint(out, device, 'last')
    if differ := describe_differences(checkpoint, facts):
        stop(f'{out} holds another run ({"; ".join(differ)}); keep both with --run=other, or replace it with '
             '--overwrite=True')
    if checkpoint['config']['init_from'] == 'teacher' and freeze_table and not student.encoder:
        student.wte.requires_grad_(False)
    keys = 'step', 'finished', 'figures', 'per_field', 'best', 'linear', 'work'
    kept = {key: checkpoint[key] for key in keys}
    training = Training(out, {**facts, 'config': checkpoint['config']}, student, space, **kept)
    return training, checkpoint.get('optimizer')


# -----------------------------------------------------------------------------
# other processes and signals


BUSY = 'another training is writing to {}; wait for it, or train beside it with --run=other'


def lock_folder(out, file='lock', busy=BUSY):
    """creates a folder and locks it for as long as the returned file, of this name, is open. Exits with the message
    `busy` if another program has the lock."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / file, 'w')
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(busy.format(out))
    except OSError as error:
        stop(f'cannot write to {out}: {error.strerror}')
    return lock


def catch_signals():
    """a list that gets an item when the user wants to stop (Ctrl-C, kill): the step is finished and the run
    saved. A second signal ends the program at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    on_stop(catch)
    return caught
