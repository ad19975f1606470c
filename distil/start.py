"""A student at the start of a training: with random weights, or with parts of a teacher.

    student = student_from_teacher(load_model(name), sizes, output_ids, layers='none')

Layers of a Gemma 3, Llama or Qwen 2 model can be taken over; of any other model its input embedding.
"""
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.nn as nn

from config import stop
from distil.reader import load_reader
from distil.space import tokenizer_hash
from distil.teacher import load_model, load_tokenizer
from model import Student, StudentConfig


def new_student(sizes, config, meta):
    """a Student at the start of a run, on the CPU. sizes: dict of StudentConfig fields; config: the settings of
    train.py; meta: the meta.json of its records. Exits with a message if it cannot be made."""
    try:
        if config['reader']:
            print(f'loading {config["reader"]}, which reads for the student')
            reader = load_reader(config['reader'], config['reader_layers'])
            V = sizes['output_vocab']                           # the table has the output tokens and a start
            sizes = {**sizes, 'vocab_size': V + 1, 'start_id': V, 'reader': asdict(reader.config)}
            return Student(StudentConfig(**sizes), reader)
        if config['init_from'] != 'teacher':
            return Student(StudentConfig(**sizes))
        start_model = config['start_model'] or meta['teacher']
        if config['start_model'] and tokenizer_hash(
                load_tokenizer(start_model).backend_tokenizer) != meta['tokenizer_hash']:
            stop(f'start_model = {start_model} has another tokenizer than {meta["teacher"]}, the teacher')
        parts = 'table' if config['teacher_layers'] == 'none' else 'table and layers'
        print(f'loading {start_model} for its {parts}')
        around = (meta['before'], meta['after']) if config['keep_prompt'] else ()
        student = student_from_teacher(load_model(start_model), sizes, meta['output_ids'],
                                       config['teacher_layers'], *around)
    except ValueError as error:
        stop(str(error))
    if config['freeze_table']:  # it never changes, so fp16 is enough: half the memory and a smaller checkpoint
        student.wte.requires_grad_(False).half()
    return student


def student_from_teacher(teacher, sizes, output_ids, layers='first', before=(), after=()):
    """a Student with parts of a transformers model, on the CPU. sizes: dict of StudentConfig fields.

    layers 'none': the input embedding alone, projected to n_embd. layers 'first': the first n_layer layers,
    with the input embedding, the final norm and the rows output_ids of the head. The shape is then the
    teacher's, and a student of all its layers computes the teacher's logits.

    before, after: ids of the teacher's prompt around the text, or (). With them the student keeps the keys and
    values of `before` as parameters, and reads `after` between text and answer. (Prefix tuning learns such
    keys and values from random ones, https://arxiv.org/abs/2101.00190.)

    ValueError if the teacher has fewer layers, or parts that the student's block lacks, or if some of its
    layers see fewer tokens than prompt and text have.
    """
    table = teacher.get_input_embeddings().weight               # (all ids, width)
    if layers == 'none':
        student = Student(StudentConfig(**{**sizes, 'n_table': table.size(1)}))
        copy_table(student, teacher)
        return student
    shape, kinds = teacher_shape(teacher.config)
    n, n_all = sizes['n_layer'], len(kinds)
    if n > n_all:
        raise ValueError(f'n_layer = {n}, but the model it starts from has {n_all}')
    rope_kinds = sorted(set(kinds))                             # each kind of attention has its own rotation
    rope_of_layer = tuple(rope_kinds.index(kind) for kind in kinds[:n])
    window = getattr(teacher.config.get_text_config(), 'sliding_window', None)
    n_tokens = len(before) + sizes['block_size']
    if before and window and window < n_tokens and 'sliding_attention' in kinds[:n]:
        raise ValueError(f'some of these layers see {window} tokens, prompt and text have {n_tokens}: '
                         'set keep_prompt = False')
    prompt = {'n_prompt': len(before), 'after': tuple(after), 'rope_of_layer': rope_of_layer}
    student = Student(StudentConfig(**{**sizes, **shape, **prompt}))
    copy_layers(student, teacher, output_ids)
    if before:
        copy_prompt(student, teacher, before)
    return student


# -----------------------------------------------------------------------------
# parts of a teacher


def teacher_shape(config):
    """StudentConfig fields that make a student's block the same function as that of a transformers config,
    and the kind of attention of each of its layers."""
    config = config.get_text_config()
    n_layer, gemma = config.num_hidden_layers, 'gemma' in config.model_type
    kinds = getattr(config, 'layer_types', None) or ['full_attention'] * n_layer
    head_size = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
    shape = dict(n_embd=config.hidden_size, n_head=config.num_attention_heads,
                 n_kv_head=config.num_key_value_heads, n_mlp=config.intermediate_size, head_size=head_size,
                 norm_eps=float(config.rms_norm_eps), activation='gelu' if gemma else 'silu',
                 qk_norm=gemma, sandwich=gemma, qkv_bias=config.model_type == 'qwen2')
    return shape, kinds


@torch.no_grad()
def copy_table(student, teacher):
    """the teacher's input embedding, with the scale it is multiplied by."""
    embed = teacher.get_input_embeddings()
    rows = embed.weight[:len(student.wte.weight)]  # it may be padded, or lack a token that no text has
    student.wte.weight[:len(rows)].copy_(rows * getattr(embed, 'embed_scale', 1.0))


@torch.no_grad()
def copy_layers(student, teacher, output_ids):
    """fills the student's blocks with the teacher's first layers, its head with the rows output_ids of the
    teacher's, and its table. ValueError where the teacher's block has parts the student's does not."""
    config, body = teacher.config.get_text_config(), teacher.get_decoder()
    known = config.model_type in ('gemma3_text', 'llama', 'qwen2')
    if not known or getattr(config, 'attention_bias', False):
        raise ValueError(f'layers of a {config.model_type} teacher cannot be taken over, only its table: '
                         'set teacher_layers = none')
    copy_table(student, teacher)
    student.lm_head.weight.copy_(teacher.get_output_embeddings().weight[output_ids])
    one = 1.0 if 'gemma' in config.model_type else 0.0  # Gemma stores norm weights less 1
    student.norm_f.weight.copy_(body.norm.weight + one)
    scale = 1.0                                             # of queries, where it is not 1 / sqrt(head_size)
    if hasattr(config, 'query_pre_attn_scalar'):
        scale = (config.query_pre_attn_scalar / student.h[0].attn.head_size) ** -0.5
    for block, layer in zip(student.h, body.layers):
        attn = layer.self_attn
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        block.attn.c_attn.weight.copy_(torch.cat([part.weight for part in qkv]))
        if student.config.qkv_bias:
            block.attn.c_attn.bias.copy_(torch.cat([part.bias for part in qkv]))
        block.attn.c_proj.weight.copy_(attn.o_proj.weight)
        block.mlp.c_gate.weight.copy_(layer.mlp.gate_proj.weight)
        block.mlp.c_up.weight.copy_(layer.mlp.up_proj.weight)
        block.mlp.c_proj.weight.copy_(layer.mlp.down_proj.weight)
        block.norm_1.weight.copy_(layer.input_layernorm.weight + one)
        if student.config.sandwich:
            block.post_1.weight.copy_(layer.post_attention_layernorm.weight + one)
            block.norm_2.weight.copy_(layer.pre_feedforward_layernorm.weight + one)
            block.post_2.weight.copy_(layer.post_feedforward_layernorm.weight + one)
        else:
            block.norm_2.weight.copy_(layer.post_attention_layernorm.weight + one)
        if student.config.qk_norm:
            block.attn.q_norm.weight.copy_((attn.q_norm.weight + one) * scale)
            block.attn.k_norm.weight.copy_(attn.k_norm.weight + one)
    kinds = sorted(set(teacher_shape(teacher.config)[1]))
    for row, kind in enumerate(kinds[:len(student.rope_freq)]):
        name = f'{kind}_inv_freq' if hasattr(body.rotary_emb, f'{kind}_inv_freq') else 'inv_freq'
        student.rope_freq[row] = getattr(body.rotary_emb, name)


@torch.no_grad()
def copy_prompt(student, teacher, before):
    """the keys and values of the ids before the text in the teacher's first layers."""
    read = teacher.get_decoder()(torch.tensor([list(before)]), use_cache=True).past_key_values.layers
    layers = [torch.cat((layer.keys, layer.values)) for layer in read[:len(student.h)]]
    student.prompt.copy_(torch.stack(layers))


# -----------------------------------------------------------------------------
# the input table in training


class SeenRows:
    """The input table, cut down to the tokens that occur in training while it is trained.

    AdamW leaves a row alone that never has a gradient (the table has no weight decay), so the others need not
    be given to it: the result is the same and a step no longer costs 262,144 rows.
    """

    def __init__(self, student, ids):
        self.student, self.table = student, student.wte
        weight = self.table.weight                              # (all ids, C)
        self.ids = torch.tensor(ids, device=weight.device)      # (seen,)
        self.lookup = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
        self.lookup[self.ids] = torch.arange(len(ids), device=weight.device)
        self.part = nn.Embedding(len(ids), weight.size(1), device=weight.device)
        self.part.weight.data.copy_(weight[self.ids])
        student.wte = self.part

    @contextmanager
    def whole(self):
        """the student with its whole table, what was learned in it: to evaluate, to save."""
        self.table.weight.data[self.ids] = self.part.weight.data
        self.student.wte = self.table
        yield
        self.student.wte = self.part
