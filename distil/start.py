"""A student at the start of a training: with random weights, with the teacher's input table, or with a pre-trained
encoder.
"""
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.nn as nn
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


class SeenRows:
    """The input table, cut down to the tokens that occur in training while it is trained.

    AdamW leaves a row alone that never has a gradient (the table has no weight decay), so the others need not
    be given to it: the result is the same and a step no longer costs 262,144 rows.
    """

    def __init__(self, student, ids):
        """ids: of the texts; those of the answers are added."""
        self.student, self.table, self.answer_row = student, student.wte, student.answer_row
        weight = self.table.weight                              # (all ids, C)
        ids = torch.tensor(ids, dtype=torch.long, device=weight.device)
        self.ids = torch.unique(torch.cat((ids, self.answer_row)))  # (seen,)
        self.row_of = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
        self.row_of[self.ids] = torch.arange(len(self.ids), device=weight.device)
        self.part = nn.Embedding(len(self.ids), weight.size(1), device=weight.device)
        self.part.weight.data.copy_(weight[self.ids])
        self.use_part()

    def use_part(self):
        self.student.wte, self.student.answer_row = self.part, self.row_of[self.answer_row]

    def convert(self, text):
        """ids (B, T), -1 on padding -> their rows in the part, -1 on padding."""
        return torch.where(text < 0, -1, self.row_of[text])

    @contextmanager
    def whole(self):
        """the student with its whole table, what was learned in it: to evaluate, to save."""
        self.table.weight.data[self.ids] = self.part.weight.data
        self.student.wte, self.student.answer_row = self.table, self.answer_row
        yield
        self.use_part()
