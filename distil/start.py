"""A student at the start of a training: with random weights, with the teacher's input table, or with a pre-trained
encoder.
"""
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

from config import stop
from distil.reader import keep_options_apart, load_encoder
from distil.schema import Schema
from distil.teacher import load_table
from distil.trim import trim_encoder
from model import Student, StudentConfig


def new_student(config, shards, train_rows):
    """a Student at the start of a run, on the CPU. config: the settings of train.py; shards: its records; train_rows:
    those of them that are trained on. Exits with a message if it cannot be made."""
    meta = shards.meta
    keys, V = ('block_size', 'n_layer', 'n_head', 'n_embd', 'n_mlp', 'dropout'), len(meta['output_ids'])
    sizes = {key: config[key] for key in keys}
    copied = Schema(meta['fields'], meta.get('left_out')).copied
    sizes |= {'n_kv_head': config['n_kv_head'] or config['n_head'], 'output_vocab': V, 'places': bool(copied)}
    if copied and not config['reader']:
        stop(f'{copied[0].group} is copied from the text, which a student without a reader cannot do: set reader = '
             f"'data/teachers/minilm', list its values (enum), or leave it out: left_out = [{copied[0].group!r}]")
    try:
        if config['reader']:
            print(f'loading {config["reader"]}, which reads for the student')
            encoder = load_encoder(config['reader'], config['reader_layers'])
            encoder.keep_end = bool(meta.get('keep_end'))
            if config['reader_tokens']:
                tokenizer = Tokenizer.from_file(str(shards.folder / 'tokenizer.json'))
                texts = tokenizer.decode_batch([shards.ids(i).tolist() for i in train_rows])
                trim_encoder(encoder, texts, config['reader_tokens'])
            if any(part.is_option for part in copied):
                keep_options_apart(encoder)
            # the table has the output tokens, the start token and two kinds of places
            sizes |= {'vocab_size': V + 1 + 2 * bool(copied), 'start_id': V, 'encoder': asdict(encoder.config)}
            return Student(StudentConfig(**sizes), encoder)
        sizes |= {key: meta[key] for key in ('vocab_size', 'output_ids', 'start_id')}
        if config['init_from'] != 'teacher':
            return Student(StudentConfig(**sizes))
        print(f'loading {meta["teacher"]} for its table')
        return student_from_table(load_table(meta['teacher']), sizes, config['freeze_table'])
    except ValueError as error:
        stop(str(error))


@torch.no_grad()
def student_from_table(table, sizes, freeze=True):
    """a Student with the input table of a teacher (ids, width); a matrix projects its rows to n_embd. sizes: dict of
    StudentConfig fields. freeze: the table is not trained."""
    student = Student(StudentConfig(**sizes, n_table=table.size(1)))
    rows = table[:len(student.wte.weight)]  # it may be padded, or lack a token that no text has
    student.wte.weight[:len(rows)].copy_(rows)
    if freeze:  # it never changes, so fp16 is enough: half the memory and a smaller checkpoint
        student.wte.requires_grad_(False).half()
    return student


class PartTable(nn.Module):
    """some rows of an embedding table, looked up by the ids they have in it; an id of another row is an IndexError."""

    def __init__(self, table, ids):
        super().__init__()
        self.ids = torch.unique(ids.to(table.weight.device))    # (seen,)
        self.row_of = torch.full((len(table.weight),), -1, device=self.ids.device)
        self.row_of[self.ids] = torch.arange(len(self.ids), device=self.ids.device)
        self.weight = nn.Parameter(table.weight.detach()[self.ids])

    def forward(self, ids):
        return F.embedding(self.row_of[ids], self.weight)


class SeenRows:
    """An input table, cut down to the tokens that occur in training while it is trained.

    AdamW leaves a row alone that never has a gradient (the table has no weight decay), so the others need not
    be given to it: the result is the same and a step no longer costs 262,144 rows, or 30,522.
    """

    def __init__(self, owner, ids):
        """owner: a Student without an encoder, or an Encoder; ids: tensor of all that it will look up."""
        self.owner, self.table, self.part = owner, owner.wte, PartTable(owner.wte, ids)
        owner.wte = self.part

    @contextmanager
    def whole(self):
        """the owner with its whole table, what was learned in it: to evaluate, to save."""
        self.table.weight.data[self.part.ids] = self.part.weight.data
        self.owner.wte = self.table
        yield
        self.owner.wte = self.part

    def cut_state(self, optimizer):
        """cuts what an optimizer keeps of the table, if it was saved when all rows were trained."""
        for key, rows in optimizer.state[self.part.weight].items():
            if rows.dim() and len(rows) == len(self.table.weight):
                optimizer.state[self.part.weight][key] = rows[self.part.ids]
