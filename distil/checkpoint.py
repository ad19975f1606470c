"""The file of a student, out/<run>/best.pt or ckpt.pt: weights and plain values, written whole or not at
all.

    checkpoint, student, space = load_checkpoint('out/demo', 'cpu')

checkpoint is a dict: student (its StudentConfig), config (the settings it was trained with), task (TASK), n_train,
split (distil/split.py), step, finished, best (the best epoch so far), figures and per_field (of the last
evaluation), linear (the linear baseline), work (hours and speeds), target (if tools/evaluate.py set one), int8 (of a
best.pt whose student has an encoder, see report.py), format.
The file also has model (the weights), and a ckpt.pt that is not finished has optimizer. resume.py builds this dict.
"""
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

from config import next_command, stop
from config.machine import whole_file
from distil.encoder import Encoder, EncoderConfig
from distil.precision import lower_precision
from distil.space import OutputSpace, tokenizer_hash
from distil.reader import read_tokenizer
from model import Student, StudentConfig

CHECKPOINT = 5  # version of the file; 4 is read too, see upgrade

# keys of meta.json that a checkpoint keeps: all that is needed to answer, and to defer to the teacher
TASK = ('teacher', 'prompt', 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'tokenizer_hash',
        'max_text', 'before', 'after', 'fingerprint', 'bias', 'server', 'value_bias', 'label_fields', 'keep_end',
        'left_out', 'free_tokens', 'locale', 'reference_date')

# what torch.load and the use of its result raise if a file is incomplete or not a checkpoint
LOAD_ERRORS = RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, TypeError


class NoInit(torch.overrides.TorchFunctionMode):
    """skips torch.nn.init, for weights that a file will replace: memory that is never written to costs
    nothing. (The meta device would do it too, but it loads torch._dynamo, which takes most of a second.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', '') != 'torch.nn.init':
            return func(*args, **(kwargs or {}))


def checkpoint_path(folder, which='best'):
    """path of best.pt, or of ckpt.pt if which is 'last' or best.pt does not exist."""
    path = Path(folder, 'best.pt')
    return Path(folder, 'ckpt.pt') if which == 'last' or not path.is_file() else path


def read_checkpoint(path, device):
    """the dict of a file, with its weights. Exits with a message if the file is missing or not whole."""
    if not path.is_file():
        stop(f'{path} does not exist; run: {next_command("train.py")}')
    try:
        with zipfile.ZipFile(path) as file:  # torch stores a checksum of each tensor, but does not check it
            if damaged := file.testzip():
                stop(f'{path} is damaged at {damaged}; copy it again, or train again')
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
        if checkpoint['format'] == 4:
            upgrade(checkpoint, path)
        if checkpoint['format'] != CHECKPOINT:
            stop(f'{path} has format {checkpoint["format"]}, this version reads {CHECKPOINT}; train again')
    except LOAD_ERRORS as error:
        stop(f'{path} is not a whole checkpoint ({type(error).__name__}); train again')
    return checkpoint


def upgrade(checkpoint, path):
    """turns a checkpoint of format 4 into one of format 5, in place: other names, and the ids of the answer's tokens
    in the sizes. Exits with a message if its student has layers of its teacher, which are no longer read."""
    old = checkpoint['student']
    if old['rope_of_layer']:
        stop(f'{path} is a student with layers of its teacher, which this version does not read; train again, with '
             'reader = or with a table alone')
    keys = [key for key in StudentConfig.__dataclass_fields__ if key in old]
    ids = () if old['reader'] else tuple(checkpoint['task']['output_ids'])
    checkpoint['student'] = {**{key: old[key] for key in keys}, 'output_ids': ids, 'encoder': old['reader']}
    checkpoint['model'] = {re.sub('^reader', 'encoder', name): weight for name, weight in checkpoint['model'].items()
                           if name != 'rope_freq'}
    for group in checkpoint.get('optimizer', {}).get('param_groups', ()):
        group['of_encoder'] = group.pop('of_reader')
    checkpoint['format'] = CHECKPOINT


def load_checkpoint(folder, device, which='best', dtype=None):
    """folder of a training run -> checkpoint dict, Student, OutputSpace. which: the 'best' or the 'last'
    epoch. dtype: see lower_precision. Exits with a message if the folder does not hold a usable student."""
    path = checkpoint_path(folder, which)
    checkpoint = read_checkpoint(path, device)
    try:
        with NoInit():
            config = StudentConfig(**checkpoint['student'])
            student = Student(config, Encoder(EncoderConfig(**config.encoder)) if config.encoder else None)
        student.load_state_dict(checkpoint.pop('model'), assign=True)  # a frozen table stays fp16
        task = checkpoint['task']
    except LOAD_ERRORS as error:
        stop(f'{path} is not a whole checkpoint ({type(error).__name__}); train again')
    try:
        tokenizer = Tokenizer.from_file(str(Path(folder, 'tokenizer.json')))
        space = OutputSpace.from_task(tokenizer, task)
        if student.encoder:
            student.encoder.tokenizer, student.encoder.keep_end = read_tokenizer(folder), bool(task.get('keep_end'))
    except Exception as error:  # tokenizers raises no narrower type
        stop(f'{folder}/tokenizer.json cannot be used: {error}; copy it from where the student was trained')
    if tokenizer_hash(tokenizer) != task['tokenizer_hash'] or space.output_ids != task['output_ids']:
        stop(f'{folder}/tokenizer.json is not the tokenizer that {path} was trained with; '
             'copy the one it was trained with into its folder')
    lower_precision(student.to(device).eval(), dtype, checkpoint.get('int8'))
    return checkpoint, student, space


def find_threshold(checkpoint, min_confidence):
    """min_confidence as a number. 'target' stands for the one that tools/evaluate.py --target_agreement=
    stored. Exits with a message if there is none."""
    if min_confidence != 'target':
        return min_confidence
    if not (target := checkpoint.get('target')):
        stop(f'no target was set; run: {next_command("tools/evaluate.py")} --target_agreement=0.9')
    return target['min_confidence']


def read_work(folder, checkpoint):
    """hours and speeds of the whole training, also after the epoch of best.pt; see tools/evaluate.py."""
    if (last := Path(folder, 'ckpt.pt')).is_file():
        checkpoint = read_checkpoint(last, 'cpu')
    return checkpoint['work']


def problem_key(schema):
    """the key under which a record says why there is no answer: 'error', or '_error' if a field is called so."""
    return '_error' if 'error' in schema.paths else 'error'


def warn_changed_task(task, fields, prompt):
    """prints a note if the config file's fields or prompt are not those that the student was trained with."""
    now = {'fields': fields, 'prompt': prompt}
    changed = [key for key, value in now.items() if value and json.dumps(value) != json.dumps(task[key])]
    if changed:
        print(f'note: {" and ".join(changed)} changed since the training; the student answers as it was '
              'trained', file=sys.stderr, flush=True)


def what_is_kept(folder):
    """the advice after a file of a training could not be written."""
    if not Path(folder, 'ckpt.pt').is_file():
        return 'there is no checkpoint yet: make room, and run the same command again'
    return 'the last checkpoint is kept: make room, and the same command continues'


def save_checkpoint(path, state):
    """writes the dict whole or not at all. Exits with a message if it cannot be written."""
    with whole_file(path, what_is_kept(path.parent)) as tmp, open(tmp, 'wb') as file:
        torch.save(state, file)                                 # by its name torch would not say why it fails
