"""How fast is it? This project and the usual way, timed in one run on the user's task.

    python tools/bench.py config/demo.py --what=extract    # the engine and transformers' generate
    python tools/bench.py config/demo.py --what=train      # a training step and that of a plain loop
    python tools/bench.py config/demo.py --what=decode     # the student, one token per pass, and its teacher

Needs the records that extract.py made of the task; train and decode also need the student. Timings are
medians of alternating rounds. A ratio holds for the machine and the shapes it was measured with.
"""
import copy
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before torch, see config/machine.py
from config import configure, data_line, stop
from config.machine import can_compile, pick_device, pick_dtype

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.utils import logging

from data import batches
from distil.checkpoint import load_checkpoint
from distil.precision import lower_precision
from distil.decode import generate
from distil.drafts import Drafts
from distil.engine import Teacher, answer_batched, peak_memory_gb
from distil.reader import encode_records
from distil.records import open_shards
from distil.space import OutputSpace
from distil.start import SeenRows
from distil.teacher import load_model, load_tokenizer, rounding_tolerance
from model import Student, StudentConfig
from tools.baselines import Classifier, generate_constrained, stepwise
from train import distill_loss

name = ''            # word; data/<dataset>/<name>-* has the texts
dataset = ''         # word
run = ''             # word; out/<run> is the student; '': out/<name>
what = 'extract'     # 'extract', 'train', 'decode'; what is timed, see above
teacher = ''         # file; loaded as extract.py does
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; as in the other programs
extract_batch = 128  # 1..; texts answered together
compile = 'auto'     # 'auto', 'True', 'False', 'true', 'false'; auto: as in a long run
batch_size = 64      # 1..; records per training step
config = configure(globals())

ROUNDS = 3  # timed rounds; each figure is their median


def clock(work, device):
    """calls work() and returns (the seconds it takes, its result)."""
    sync = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    sync()
    start = time.perf_counter()
    result = work()
    sync()
    return time.perf_counter() - start, result


# -----------------------------------------------------------------------------
# extraction


def is_same_answer(engine_answer, generated, space, atol):
    """True if the engine's answer (outs, logits (n, V), lse; or the reason why it has none) equals the output
    indices of generate. If they first differ at a token whose logit is within atol of the engine's choice,
    they count as equal: it is a near tie."""
    if isinstance(engine_answer, str):
        return space.state_after(generated[:-1]) < 0
    outs, logits, _ = engine_answer
    for out, other, row in zip(outs, generated, logits):
        if out != other:
            return bool(other >= 0 and row[out] - row[other] <= atol)
    return True


@torch.inference_mode()
def bench_extract(engine, space, shards, n_texts, compiled, n_generate=32):
    """returns a line with the records/s of the engine and of generate on the same texts, and the bound: the
    speed if matrix products were all the work and every token were read once. identical: share of equal
    answers, in float32 token for token, else except for near ties (is_same_answer)."""
    model, meta, drafts, device = engine.model, shards.meta, Drafts(space), engine.device.type
    size, whole = 8192 if device == 'cuda' else 2048, device == 'cuda'
    square, constrain = torch.randn(size, size, dtype=model.dtype, device=model.device), meta['constrain']
    atol = 0.0 if model.dtype == torch.float32 else rounding_tolerance(model.dtype)
    rates, totals, identical = {'engine': [], 'generate': [], 'products': []}, Counter(), []
    for n in tqdm(range(ROUNDS + 1), desc='bench', unit='round'):  # the first one warms up: drafts learn
        rows = [(n * 2 * n_texts + k) % len(shards) for k in range(2 * n_texts)]
        texts = [shards.ids(i) for i in rows]

        def answer_all():
            answers, n_read = [], 0
            for part in (texts[:n_texts], texts[n_texts:]):
                new, n_more = answer_batched(engine, space, drafts, part, meta['after'], constrain, whole)
                for a in new:
                    if not isinstance(a, str):
                        drafts.add(a[0])
                answers, n_read = answers + new, n_read + n_more
            return answers, n_read
        if compiled:
            engine.compile()
        seconds, (answers, n_read) = clock(answer_all, device)
        engine.compile(False)
        if n == 0:
            continue
        rates['engine'].append(len(texts) / seconds)
        totals.update(read=n_read, texts=len(texts))
        for ids, a in zip(texts, answers):
            totals['needed'] += 0 if isinstance(a, str) else len(ids) + len(meta['after']) + len(a[0]) - 1
        few_texts = texts[:n_generate]
        work = lambda: generate_constrained(model, space, meta, few_texts, constrain)
        seconds, generated = clock(work, device)
        rates['generate'].append(n_generate / seconds)
        identical += [is_same_answer(a, outs, space, atol) for a, outs in zip(answers, generated)]
        seconds, _ = clock(lambda: [square @ square for _ in range(8)], device)
        rates['products'].append(8 * 2 * size ** 3 / seconds)
    rec_s, generate_rec_s, flops = (float(np.median(values)) for values in rates.values())
    shape = model.config.get_text_config()
    weights = sum(p.numel() for key, p in engine.body.named_parameters()
                  if p.dim() == 2 and 'embed' not in key)
    needed = totals['needed'] / totals['texts']                 # tokens of a record
    context = len(meta['before']) + needed / 2                  # tokens that a token attends to, on average
    head_size = getattr(shape, 'head_dim', None) or shape.hidden_size // shape.num_attention_heads
    attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * head_size * context
    bound = flops / ((2 * weights + attention) * needed)
    return data_line('bench', {
        'what': 'extract', 'dtype': str(model.dtype).removeprefix('torch.'), 'compiled': compiled,
        'rec_s': rec_s, 'generate_rec_s': generate_rec_s, 'ratio': rec_s / generate_rec_s,
        'passes': totals['read'] / max(1, totals['needed']), 'identical': float(np.mean(identical)),
        'bound_rec_s': bound, 'of_bound': rec_s / bound, 'matmul_gflops': flops / 1e9,
        'peak_gb': peak_memory_gb(device)})


# -----------------------------------------------------------------------------
# training


def plain_decoder(student, output_ids):
    """(a Hugging Face Gemma 3 of a student's width and depth with the usual head over the whole vocabulary, a function
    (text, answer, targets) -> its loss). output_ids: of the output indices and the start token."""
    c, device = student.config, student.lm_head.weight.device
    plain = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_mlp, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.n_embd // c.n_head,
        attn_implementation='sdpa')).to(device).train()

    def loss_of(text, answer, targets):
        # rows of text and answer as it reads them, ids padded on the right
        rows = [torch.cat((t[t >= 0], output_ids[a[a >= 0]])) for t, a in zip(text, answer)]
        idx = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
        labels = torch.full_like(idx, -100)
        for label, t, target in zip(labels, text, targets):
            of_target = output_ids[target[target >= 0]]
            label[(t >= 0).sum():][:len(of_target)] = of_target
        return F.cross_entropy(plain(idx).logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
    return plain, loss_of


def plain_encoder(student, space):
    """(a student's encoder with the heads of tools/baselines.py, a function as that of plain_decoder, with the first
    value of each field as its label: which one makes no difference to the time)"""
    counts, n_tags = [len(choice) for choice in space.schema.choices], 1 + 2 * len(space.schema.copied)
    plain = Classifier(copy.deepcopy(student.encoder), counts, n_tags).to(student.lm_head.weight.device).train()

    def loss_of(text, answer, targets):
        fields, tags = plain([row[row >= 0].tolist() for row in text])
        return sum(F.cross_entropy(logits.float(), logits.new_zeros(len(logits), dtype=torch.long))
                   for logits in (*fields, tags))
    return plain, loss_of


def count_flops(student, lengths, n_text):
    """floating-point operations of a step of a student: 6 a weight and token, and the attention's. lengths (B,): of the
    rows, which are padded to the longest; n_text (B,): of their texts, which an encoder reads without padding."""
    weights = {False: 0, True: 0}                               # of the student's own matrices, of its encoder's
    for key, p in student.named_parameters():
        if p.dim() == 2 and not any(part in key for part in ('wte', 'wpe', 'wre', 'lm_head')):
            weights[key.startswith('encoder.')] += p.numel()
    c, B, longest, flops = student.config, len(lengths), int(lengths.max()), 0
    flops += 6 * weights[False] * B * longest + 6 * c.n_layer * c.n_embd * B * longest ** 2  # causal: half the square
    if student.encoder:
        e = student.encoder.config
        flops += 6 * weights[True] * int(n_text.sum()) + 12 * e.n_layer * e.n_embd * int((n_text ** 2).sum())
    return flops


def bench_train(student, space, shards, rows, batch_size, dtype, compiled, steps=12):
    """returns a line with the tokens/s (without padding) of a training step, its share of this machine's matrix product
    rate, and the tokens/s of a plain loop in the same batches: plain_decoder, or for a student with an encoder
    plain_encoder."""
    c, device = student.config, student.lm_head.weight.device
    output_ids = torch.tensor([*shards.meta['output_ids'], c.start_id], device=device)
    encode_records(student, space, shards, rows)
    plain, plain_loss = plain_encoder(student, space) if student.encoder else plain_decoder(student, output_ids)
    if student.encoder or student.wte.weight.dtype == torch.float32:  # else a teacher's, which is frozen
        texts = [torch.tensor(shards.encoded[i] if student.encoder else shards.ids(i).tolist()) for i in rows]
        SeenRows(student.encoder or student, torch.cat((*texts, student.answer_row.cpu())))
    else:
        student.wte.requires_grad_(False)
    optimizers = {m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-4, fused=True)
                  for m in (student, plain)}
    bf16 = dtype == torch.bfloat16
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
    if compiled:
        for block in student.h:
            block.compile(dynamic=True)

    def step(model, part):
        """makes one optimizer step of either model."""
        text, answer, targets, teacher_logits = (x.to(device) for x in shards.batch(part))
        with autocast:
            loss = student(text, answer) if model is student else plain_loss(text, answer, targets)
        if model is student:
            loss, *_, n = distill_loss(loss, teacher_logits, targets[targets >= 0], 0.5)
            loss = loss / n
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers[model].step()
        optimizers[model].zero_grad(set_to_none=True)

    sizes = student.encoder.config if student.encoder else c
    shapes = [(sizes.n_embd, sizes.n_mlp), (sizes.n_mlp, sizes.n_embd), (sizes.n_embd, sizes.n_embd)]  # of its products
    n_text = np.array([len(shards.encoded.get(i, shards.ids(i))) for i in rows])
    lengths = n_text + [len(shards.steps(i)) for i in rows]
    rates = {'student': [], 'plain': [], 'products': [], 'used': []}
    order = batches(lengths, batch_size, 0, 0)
    student.train()
    for n in tqdm(range(steps + 2), desc='bench', unit='step'):  # the first two warm up
        part = order[n % len(order)]
        n_tokens, n_positions = int(lengths[part].sum()), len(part) * int(lengths[part].max())
        seconds, _ = clock(lambda: step(student, rows[part]), device.type)
        plain_seconds = clock(lambda: step(plain, rows[part]), device.type)[0] if n % 3 == 0 else None
        for m, k in shapes:
            x, w = (torch.randn(size, device=device).to(dtype) for size in ((n_positions, m), (m, k)))
            x @ w
            product_seconds, _ = clock(lambda: [x @ w for _ in range(5)], device.type)
            rates['products'].append(5 * 2 * n_positions * m * k / product_seconds)
        if n < 2:
            continue
        rates['student'].append(n_tokens / seconds)
        rates['used'].append(count_flops(student, lengths[part], n_text[part]) / seconds)
        if plain_seconds:
            rates['plain'].append(n_tokens / plain_seconds)
    student_tok_s, plain_tok_s, products, used = (float(np.median(values)) for values in rates.values())
    return data_line('bench', {
        'what': 'train', 'dtype': str(dtype).removeprefix('torch.'), 'compiled': compiled,
        'tok_s': student_tok_s, 'mfu': used / products, 'plain_tok_s': plain_tok_s,
        'ratio': student_tok_s / plain_tok_s, 'matmul_gflops': products / 1e9})


# -----------------------------------------------------------------------------
# decoding


def bench_style(style, student, space, texts, device, batch_size):
    """returns a line: the speed of the student's decoding in a style of JSON, and of one token per pass."""
    texts, passes = texts if batch_size > 1 else texts[:32], []
    parts = [texts[i:i + batch_size] for i in range(0, len(texts), batch_size)]
    decoders = {'rec_s': lambda: generate(student, space, texts, True, batch_size),
                'lossless_rec_s': lambda: generate(student, space, texts, False, batch_size),
                'stepwise_rec_s': lambda: [outs for part in parts for outs in stepwise(student, space, part)]}
    times = [[clock(decode, device)[0] for decode in decoders.values()] for _ in range(ROUNDS + 1)]
    rates = dict(zip(decoders, (len(texts) / np.median(times[1:], axis=0)).tolist()))  # the first warms up
    hook = student.register_forward_pre_hook(lambda *_: passes.append(1))
    answers = decoders['rec_s']()
    hook.remove()
    identical = [a == b for a, b in zip(answers, decoders['stepwise_rec_s']())]
    return data_line('bench', {
        'what': 'decode', 'style': style, 'tokens': float(np.mean([len(a) for a in answers])),
        'batch': batch_size, **rates, 'ratio': rates['rec_s'] / rates['stepwise_rec_s'],
        'passes': len(passes) / len(parts), 'identical': float(np.mean(identical))})


def bench_decode(student, space, task, texts, teacher, device, dtype, n_generate=32):
    """prints bench lines: the student's decoding and one token per pass, alone and in batches of 64, in the
    task's style and fenced (the latter with a student of the same shape and random weights); its latency; and
    its records/s and those of the teacher, with generate and with the engine."""
    fenced = OutputSpace(space.tokenizer, space.schema.fields, 2, True, space.end_id, space.output_ids)
    V, longer = len(fenced.output_ids), max(0, fenced.max_answer - space.max_answer)
    shape = asdict(student.config) | {'output_vocab': V, 'block_size': student.config.block_size + longer}
    shape |= {'vocab_size': V + 1, 'start_id': V} if student.encoder else {'output_ids': fenced.output_ids}
    random_student = Student(StudentConfig(**shape), student.encoder).to(device).eval()
    # an encoder that is in 8 bits is so already
    lower_precision(random_student, student.precision.replace('int8', 'auto'))
    for style, of_style, its_space in (('own', student, space), ('fenced', random_student, fenced)):
        for batch_size in (1, 64):
            print(bench_style(style, of_style, its_space, texts, device, batch_size))
    times = [clock(lambda: generate(student, space, [text], True, 1), device)[0] * 1e3 for text in texts]
    print(data_line('bench', {'what': 'latency', 'records': len(times), 'median_ms': float(np.median(times)),
                              'p99_ms': float(np.quantile(times, 0.99))}))
    student_gb = peak_memory_gb(device)

    large = load_model(teacher, pick_dtype(dtype, device), device)
    engine, drafts = Teacher(large, task['before'], space.output_ids), Drafts(space)
    answer_texts = lambda batch: answer_batched(engine, space, drafts, batch, task['after'])[0]
    for outs, *_ in answer_texts(texts[-64:]):
        drafts.add(outs)
    batch, small_batch = texts[:64], texts[:n_generate]
    decoders = {
        'student_rec_s': (len(texts), lambda: generate(student, space, texts, True, 64)),
        'engine_rec_s': (len(batch), lambda: answer_texts(batch)),
        'generate_rec_s': (len(small_batch), lambda: generate_constrained(large, space, task, small_batch))}
    times = [[clock(decode, device)[0] / n for n, decode in decoders.values()] for _ in range(ROUNDS + 1)]
    rates = dict(zip(decoders, (1 / np.median(times[1:], axis=0)).tolist()))
    print(data_line('bench', {
        'what': 'teacher', **rates, 'of_generate': rates['student_rec_s'] / rates['generate_rec_s'],
        'of_engine': rates['student_rec_s'] / rates['engine_rec_s'], 'student_peak_gb': student_gb,
        'both_peak_gb': peak_memory_gb(device)}))


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    logging.set_verbosity_error()
    device = pick_device(device)
    if not name or not dataset:
        stop('no task; run: python tools/bench.py config/demo.py --what=extract')
    shards = open_shards(dataset, name)
    meta, dtype_setting, dtype = shards.meta, dtype, pick_dtype(dtype, device)
    teacher = teacher or meta['teacher']
    compiled = compile in ('True', 'true')
    if compile == 'auto' and what in ('extract', 'train'):
        gains = device == 'cpu' if what == 'extract' else device == 'cuda' or dtype == torch.bfloat16
        compiled = gains and can_compile()
    if what == 'extract':
        style = meta['fields'], meta['indent'], meta['fence'], meta['end_id']
        space = OutputSpace(load_tokenizer(teacher).backend_tokenizer, *style, meta['output_ids'])
        engine = Teacher(load_model(teacher, dtype, device), meta['before'], space.output_ids)
        print(bench_extract(engine, space, shards, extract_batch, compiled))
    else:
        student_dtype = None if what == 'train' else dtype_setting
        checkpoint, student, space = load_checkpoint(Path('out', run or name), device, dtype=student_dtype)
        train_rows, val_rows = shards.split()
        if what == 'train':
            print(bench_train(student, space, shards, train_rows, batch_size, dtype, compiled))
        else:
            texts = [shards.ids(i).tolist() for i in val_rows[:256]]
            bench_decode(student, space, checkpoint['task'], texts, teacher, device, dtype_setting)
