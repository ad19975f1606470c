"""A student's file, out/<run>/best.pt or ckpt.pt: weights and plain facts, written whole or not at all.

    checkpoint, student, space = load_checkpoint('out/demo', 'cpu')

checkpoint is a dict: student (its StudentConfig), config (the settings it was trained with), task (TASK, and
the students it learned from), n_train, step, finished, best (the best epoch so far), figures and per_field (of
the last evaluation), linear (of word counts), work (hours and speeds), target (where evaluate.py set one),
format. The file also has model, the weights, and a ckpt.pt that is not finished optimizer. resume.py puts it
together.
"""
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

from config import next_command, stop
from config.machine import pick_dtype
from distil.space import OutputSpace, tokenizer_hash
from model import Student, StudentConfig

CHECKPOINT = 4  # version of the file

# what of meta.json it keeps: all that it takes to answer, and to ask the teacher
TASK = ('teacher', 'prompt', 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'tokenizer_hash',
        'max_text', 'before', 'after', 'fingerprint', 'bias')

# what torch.load and a look at what it loaded raise where a file is not what it should be
NOT_WHOLE = RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, TypeError


class NoInit(torch.overrides.TorchFunctionMode):
    """leaves out torch.nn.init, for weights that a file is about to give: memory that nobody writes to costs
    nothing. (The meta device would do it too, but loads torch._dynamo: most of a second.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', '') != 'torch.nn.init':
            return func(*args, **(kwargs or {}))


def checkpoint_path(folder, which='best'):
    path = Path(folder, 'best.pt')
    return Path(folder, 'ckpt.pt') if which == 'last' or not path.is_file() else path


def is_large(student):
    """whether products are most of what its decoding takes; else lower precision would gain nothing."""
    return sum(p.numel() for p in student.h.parameters()) > 1e7


def lower_precision(student, dtype):
    """lets the products of a large student's layers be made in this type, in place: as a setting, see
    pick_dtype. Norms, a cache's attention, the sum of the layers and the head stay in float32."""
    device = student.lm_head.weight.device.type
    if not is_large(student) or pick_dtype(dtype, device) != torch.bfloat16:
        return
    for module in student.h.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    student.forward = torch.autocast(device, torch.bfloat16)(student.forward)


def read_checkpoint(path, device):
    """the dict of a file, with its weights; SystemExit with one line where it is not whole."""
    if not path.is_file():
        stop(f'{path} does not exist; run: {next_command("train.py")}')
    try:
        with zipfile.ZipFile(path) as file:  # torch keeps a checksum of each tensor, and does not look at it
            if damaged := file.testzip():
                stop(f'{path} is damaged at {damaged}; copy it again, or train again')
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
        if checkpoint['format'] != CHECKPOINT:
            stop(f'{path} has format {checkpoint["format"]}, this version reads {CHECKPOINT}; train again')
    except NOT_WHOLE as error:
        stop(f'{path} is not a whole checkpoint ({type(error).__name__}); train again')
    return checkpoint


def load_checkpoint(folder, device, which='best', dtype='float32'):
    """folder of a training run -> checkpoint dict, Student, OutputSpace. SystemExit with one line where it
    will not do. which: the 'best' epoch's, or the 'last' one's. dtype: see lower_precision."""
    path = checkpoint_path(folder, which)
    checkpoint = read_checkpoint(path, device)
    try:
        with NoInit():
            student = Student(StudentConfig(**checkpoint['student']))
        student.load_state_dict(checkpoint.pop('model'), assign=True)  # a frozen table stays fp16
        task = checkpoint['task']
    except NOT_WHOLE as error:
        stop(f'{path} is not a whole checkpoint ({type(error).__name__}); train again')
    try:
        tokenizer = Tokenizer.from_file(str(Path(folder, 'tokenizer.json')))
        space = OutputSpace.from_task(tokenizer, task)
    except Exception as error:  # tokenizers raises nothing narrower
        stop(f'{folder}/tokenizer.json cannot be used: {error}; copy it from where the student was trained')
    if tokenizer_hash(tokenizer) != task['tokenizer_hash'] or space.output_ids != task['output_ids']:
        stop(f'{folder}/tokenizer.json is not the tokenizer {path} was trained with; '
             'copy the right one beside it')
    lower_precision(student.to(device).eval(), dtype)
    return checkpoint, student, space


def read_work(folder, checkpoint):
    """what the whole training cost, beyond the epoch that a best.pt is of; see evaluate.cost."""
    if (last := Path(folder, 'ckpt.pt')).is_file():
        checkpoint = read_checkpoint(last, 'cpu')
    return checkpoint['work']


def warn_changed_task(task, fields, prompt):
    """says so where the config file's fields or prompt are no longer those the student was trained with."""
    now = {'fields': fields, 'prompt': prompt}
    changed = [key for key, value in now.items() if value and json.dumps(value) != json.dumps(task[key])]
    if changed:
        said = ' and '.join(changed)
        print(f'note: {said} changed since the training; the student answers as it was trained',
              file=sys.stderr, flush=True)


def save_checkpoint(path, state):
    """writes the dict whole or not at all; ends in one line where the disk is full."""
    tmp = path.with_suffix('.tmp')
    try:
        torch.save(state, tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
        tmp.unlink(missing_ok=True)
        why = str(error).splitlines()[0]
        sys.exit(f'cannot write {path}: {why}; the checkpoint before it is whole')
