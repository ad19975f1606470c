"""The folder of a training, out/<run>/: what is kept in it, and how it goes on after it was cut off.

ckpt.pt has all that it takes to go on, bit for bit, and best.pt the epoch that agreed most; both are whole at
any moment. The order of the records and what is dropped at random are functions of (seed, step), see
train.py, so nothing of them need be kept.
"""
import fcntl
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from checkpoint import CHECKPOINT, TASK, load_checkpoint, save_checkpoint
from config import RANK, data_line, on_stop, stop
from model import SeenRows, Student
from space import OutputSpace

# settings that may change when a run goes on: where and how fast it runs, not what comes out
FREE = ('device', 'dtype', 'compile', 'eval_records', 'log_steps', 'grad_accum', 'overwrite', 'save_steps',
        'tracker')

# settings that older checkpoints do not have, as they were then, or only older ones, as it is now
SINCE = {'keep_prompt': False, 'start_model': '', 'divergence': 'forward', 'more': '', 'students': []}


@dataclass
class Training:
    """a training under way: what its checkpoints hold, and what it takes to make the next step."""
    out: Path
    facts: dict            # config, task and n_train: it goes on only as the training it was
    student: Student
    space: OutputSpace
    step: int = 0
    finished: bool = False
    figures: dict = None   # of the last evaluation; per_field: of each field
    per_field: dict = None
    best: dict = None      # {'value', 'kl', 'epoch', 'step'} of the best epoch so far
    linear: dict = None    # the linear baseline, {} where it cannot be had
    work: dict = None      # hours and speeds that evaluate.py's cost line is made of
    optimizer: object = None
    seen: SeenRows = None  # None: the table is frozen
    track: object = None   # the tracker's module
    compiled: bool = False
    precision: object = field(default_factory=nullcontext)  # of evaluations
    begun: float = field(default_factory=time.time)

    @contextmanager
    def whole_table(self):
        """the student with its whole table, and not compiled: what is compiled is a step of training."""
        with torch.compiler.set_stance('force_eager') if self.compiled else nullcontext():
            with self.seen.whole() if self.seen else nullcontext():
                yield

    def log(self, tag, figures):
        """a data line, to the terminal, log.txt and the tracker."""
        line = data_line(tag, figures)
        tqdm.write(line)
        with open(self.out / 'log.txt', 'a') as file:
            file.write(line + '\n')
        if self.track and tag != 'field':
            self.track.log({f'{tag}/{key}': v for key, v in figures.items() if isinstance(v, (int, float))})

    def save(self, file, finished=False):
        """weights, plain facts and, where it is not over, what it takes to go on; whole or not at all."""
        hours = self.work['train_hours'] + (time.time() - self.begun) / 3600
        state = {'format': CHECKPOINT, 'student': asdict(self.student.config), 'finished': finished,
                 'step': self.step, 'figures': self.figures, 'per_field': self.per_field, 'best': self.best,
                 'linear': self.linear, 'work': self.work | {'train_hours': hours}, **self.facts}
        if file == 'ckpt.pt' and not finished:
            state['optimizer'] = self.optimizer.state_dict()
        with self.whole_table():
            state['model'] = self.student.state_dict()
        save_checkpoint(self.out / file, state)


def facts_of(config, shards, n_train):
    """what makes a training the one it is: it goes on only with the same."""
    fixed = {key: value for key, value in config.items() if key not in FREE}
    task = {key: shards.meta.get(key) for key in TASK} | {'students': shards.students}
    return {'config': fixed, 'task': task, 'n_train': n_train}


def differences(old, new):
    """what of the facts of two runs is not the same, in words."""
    old, new = ({**SINCE, **facts['config'], **facts['task'], 'n_train': facts['n_train']}
                for facts in (old, new))
    differ = [key for key in new if new[key] != old.get(key) and (key, new[key]) != ('init_from', 'resume')]
    return [f'{key} {old.get(key)!r:.40} there, {new[key]!r:.40} here' for key in differ]


def new_training(out, facts, student, shards):
    """a Training at its first step; in the first process also its folder, emptied of an earlier training."""
    task = facts['task']
    tokenizer = Tokenizer.from_file(str(shards.folder / 'tokenizer.json'))
    space = OutputSpace.of(tokenizer, task)
    if RANK == 0:
        shutil.copy(shards.folder / 'tokenizer.json', out / 'tokenizer.json')
        for file in ('ckpt.pt', 'best.pt'):
            (out / file).unlink(missing_ok=True)
        (out / 'log.txt').write_text('')
    return Training(out, facts, student, space)


def resume_training(out, facts, freeze_table, device):
    """the Training in a folder, where it stopped, and the state of its optimizer."""
    checkpoint, student, space = load_checkpoint(out, device, 'last')
    if differ := differences(checkpoint, facts):
        stop(f'{out} holds another run ({"; ".join(differ)}); keep both with --run=other, or replace it with '
             '--overwrite=True')
    if checkpoint['config']['init_from'] == 'teacher' and freeze_table:
        student.wte.requires_grad_(False)
    keys = 'step', 'finished', 'figures', 'per_field', 'best', 'linear', 'work'
    kept = {key: checkpoint[key] for key in keys}
    training = Training(out, {**facts, 'config': checkpoint['config']}, student, space, **kept)
    return training, checkpoint.get('optimizer')


def lock_folder(out):
    """makes the folder of a training and keeps others out of it for as long as the returned file is open."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / 'lock', 'w')
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f'another training is writing to {out}; wait for it, or train beside it with --run=other')
    except OSError as error:
        stop(f'cannot write to {out}: {error.strerror}')
    return lock


def catch_signals():
    """a list that is no longer empty once the user wants to stop: the step is finished, the run saved. A
    second signal is not caught."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    on_stop(catch)
    return caught
