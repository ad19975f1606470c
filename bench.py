"""What --bench=True of extract.py and train.py measures: our way beside the usual one, in one run, on the user's task.

Timings are medians of alternating rounds; a ratio holds on the machine and for the shapes it was measured with.
"""
import sys
import time
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LogitsProcessor

from data import batches
from sample import data_line
from teacher import Drafts, answer_fitting, peak_gb
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
def bench_task(engine, space, groups, meta, whole, n_generate=32, rounds=3):
    """a line with the records/s of answer() beside generate's on the same texts, medians of alternating rounds, and the
    speed that matrix products alone would have if every token were read once."""
    model, drafts, rates, identical, tokens, needed = engine.model, Drafts(space), ([], [], []), [], 0, 0
    config, now = model.config.get_text_config(), lambda: (torch.cuda.synchronize() if model.device.type == 'cuda' else None, time.perf_counter())[1]
    size = 8192 if model.device.type == 'cuda' else 2048
    square = torch.randn(size, size, dtype=model.dtype, device=model.device)
    ends = {space.output_ids[o] for row in space.moves for o, state in row.items() if state == space.done}
    ends -= {space.output_ids[o] for row in space.moves for o, state in row.items() if state != space.done}
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
        rows = [[*meta['before'], *map(int, ids), *meta['after']] for ids in sum(texts, [])[:n_generate]]
        width = max(map(len, rows))
        idx = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        start = now()
        out = model.generate(idx, attention_mask=mask, max_new_tokens=space.max_answer, do_sample=False, output_logits=True, return_dict_in_generate=True,
                             logits_processor=[Held(space, width)] if meta['constrain'] else None, pad_token_id=0, eos_token_id=list(ends) or None)
        rates[1].append(len(rows) / (now() - start))
        for theirs, ours in zip(out.sequences[:, width:].tolist(), answers):
            outs = [space.output_index.get(i, -1) for i in theirs]
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
