"""Train the student on what extract.py kept of the teacher.

    python train.py config/demo.py
    python train.py config/demo.py --max_epochs=2 --overwrite=True
    python train.py config/demo.py                          # again, after Ctrl-C: goes on as if nothing had happened
    python train.py config/demo.py --bench=True             # how fast is a step, beside a plain Hugging Face student's?
    torchrun --nproc_per_node=2 train.py config/demo.py     # the same steps, each shared by two processes

Reads data/<dataset>/<name>-*; writes out/<name>/: ckpt.pt (the last epoch), best.pt (the best one), tokenizer.json, log.txt
and, where matplotlib is installed, report.png.
"""
import importlib
import importlib.util
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

from config import configure
from data import Shards, batches
from evaluate import data_line, evaluate, linear_baseline, report_lines
from model import Student, StudentConfig, pick_device
from sample import load_checkpoint
from space import OutputSpace

# task
name = ''              # data/<dataset>/<name>-* is read ...
dataset = ''
run = ''               # ... and out/<run> written; '': out/<name>. Many students can learn from one extraction
max_records = 0        # train on those of the first so many records that are not held out; 0: all
init_from = 'scratch'  # how a new run starts: 'scratch', or 'teacher': with its embedding table and some of its layers.
                       # A run that was interrupted goes on either way; 'resume' insists on one
overwrite = False      # start over where out/<run> holds another or a finished run
teacher_layers = 'first'  # of a 'teacher' start: its 'first' n_layer layers, 'even'ly spaced ones, or 'none': the table alone.
                       # With layers, the student's shape is the teacher's and the sizes below, n_layer excepted, are not used
freeze_table = True    # of a 'teacher' start: keep the embedding table as it is. It knows words that training never shows
# student
n_layer = 16
n_head = 16
n_kv_head = 0          # 0: as many as n_head; fewer is grouped-query attention
n_embd = 1024
n_mlp = 4096
block_size = 75        # text + answer tokens; the start-up check says what the data needs
dropout = 0.0
token_dropout = 0.0    # share of text tokens hidden at each step, against learning few texts by heart
# loss and curriculum
divergence = 'forward'  # from the teacher's distribution: 'forward' KL, 'reverse' KL, or 'jsd'
jsd_beta = 0.5         # weight of the teacher in the mixture of jsd
kl_start = 1.0         # weight of the divergence at the first step ...
kl_end = 1.0           # ... and at the last, on a cosine; the rest of 1 is on the cross-entropy with the teacher's token
kd_temperature = 0.1   # tau: the logits of both are divided by it in the divergence. Above 1 it softens; below 1 it sharpens, and near ties
                       # weigh more beside the rest, which agreed most on the benchmark task (README.md, A better student)
kd_anneal = True       # from kd_temperature to 1 over the run, in a line
# optimizer
max_epochs = 15
batch_size = 64        # records per optimizer step
grad_accum = 1         # micro-batches a step is computed in: same result, less memory
learning_rate = 6e-4   # its peak
min_lr = 6e-5          # at the last step
warmup = 0.05          # share of the run
weight_decay = 0.1     # on matrices, not on the embedding or the norms
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0        # 0: off
# run
device = 'auto'        # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'         # auto: bfloat16 autocast on a GPU that has it, else float32
compile = 'auto'       # torch.compile; auto: on a GPU. Short runs on a CPU never earn back the minute it takes
eval_records = 2000    # of the held-out tenth, at the end of each epoch; 0: all
best_by = 'field'      # the figure of the val line that says which epoch becomes best.pt
patience = 0           # stop after so many epochs without a better one; 0: never
save_steps = 0         # checkpoint also every so many steps; 0: at the end of each epoch
log_steps = 10         # steps between train lines
tracker = ''           # 'wandb' or 'trackio': lines go there too
bench = False          # measure instead of training
seed = 1337
config = configure(globals())

# -----------------------------------------------------------------------------
# loss and schedule


def distill_loss(logits, teacher_logits, targets, kl_weight, temperature=1.0, divergence='forward', jsd_beta=0.5):
    """logits (..., V) of the student; teacher_logits the same shape; targets (...) output indices, -1 = ignore.

    Returns (loss, kl, ce, n): sums over the n positions with a target, in nats; divide by the step's token count.
    loss = kl_weight * tau^2 * kl + (1 - kl_weight) * ce. kl is the divergence of p (teacher) and q (student) at temperature
    tau over the output vocabulary, 0 when they are equal; ce is the cross-entropy with the teacher's token. tau^2 (Hinton et al.
    2015, https://arxiv.org/abs/1503.02531) makes the kl's gradient tau (q - p): at a near tie much the same for every tau, at a
    clear decision less, the lower tau is. float32.
    """
    keep = targets >= 0
    logits, teacher_logits, targets = logits[keep].float(), teacher_logits[keep].float(), targets[keep]
    log_p, log_q = F.log_softmax(teacher_logits / temperature, dim=-1), F.log_softmax(logits / temperature, dim=-1)
    kl_div = lambda log_a, log_b: F.kl_div(log_b, log_a, reduction='sum', log_target=True)  # KL(a || b)
    if divergence == 'forward':    # covers all that the teacher might say
        kl = kl_div(log_p, log_q)
    elif divergence == 'reverse':  # seeks its modes; MiniLLM, https://arxiv.org/abs/2306.08543
        kl = kl_div(log_q, log_p)
    else:                          # generalised Jensen-Shannon; GKD, https://arxiv.org/abs/2306.13649
        log_m = torch.logaddexp(log_p + math.log(jsd_beta), log_q + math.log(1 - jsd_beta))
        kl = jsd_beta * kl_div(log_p, log_m) + (1 - jsd_beta) * kl_div(log_q, log_m)
    ce = F.cross_entropy(logits, targets, reduction='sum')
    return kl_weight * temperature ** 2 * kl + (1 - kl_weight) * ce, kl.detach(), ce.detach(), len(targets)


def cosine(start, end, progress):
    """start at progress 0, end at progress 1, half a cosine between."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule(step, n_steps, learning_rate, min_lr, warmup, kl_start, kl_end, kd_temperature, kd_anneal):
    """learning rate, KL weight and temperature of a step, 0 <= step < n_steps."""
    n_warm = max(1, round(warmup * n_steps))
    lr = learning_rate * (step + 1) / n_warm if step < n_warm else \
        cosine(learning_rate, min_lr, (step - n_warm) / max(1, n_steps - 1 - n_warm))
    progress = step / max(1, n_steps - 1)
    tau = kd_temperature + (1 - kd_temperature) * progress if kd_anneal else kd_temperature  # https://arxiv.org/abs/2104.07163
    return lr, cosine(kl_start, kl_end, progress), tau


# -----------------------------------------------------------------------------
# the student to train


def new_student(sizes, init_from, teacher_layers, freeze_table, meta):
    """a Student at the start of a run, on the CPU. sizes: its StudentConfig fields."""
    if init_from != 'teacher':
        return Student(StudentConfig(**sizes))
    from transformers import AutoModelForCausalLM  # a student from scratch can do without
    from teacher import copy_layers, copy_table, load, student_shape
    print(f'loading {meta["teacher"]} for its {"table" if teacher_layers == "none" else "table and layers"}')
    model = load(AutoModelForCausalLM, meta['teacher'], dtype=torch.float32)
    table = model.get_input_embeddings().weight
    if teacher_layers == 'none':
        student = Student(StudentConfig(**{**sizes, 'n_table': table.size(1)}))
        copy_table(student, model)
    else:
        shape, types = student_shape(model.config)
        n = sizes['n_layer']
        layers = list(range(n)) if teacher_layers == 'first' else [round(i * (len(types) - 1) / max(1, n - 1)) for i in range(n)]
        if n > len(types):
            sys.exit(f'n_layer = {n}, but the teacher has {len(types)}')
        kinds = sorted(set(types))
        student = Student(StudentConfig(**{**sizes, **shape, 'rope_of_layer': tuple(kinds.index(types[i]) for i in layers)}))
        try:
            copy_layers(student, model, meta['output_ids'], layers)
        except ValueError as error:
            sys.exit(str(error))
    if freeze_table:
        student.wte.requires_grad_(False).half()  # it never changes: half the memory and a smaller checkpoint
    return student


class SeenRows:
    """The input table, cut down to the tokens that occur in training while it is trained.

    AdamW leaves a row alone that never has a gradient (the table has no weight decay), so the others need not be given to
    it: the result is the same and a step no longer costs 262,144 rows. `cut` and `restore` swap the tables of the model.
    """

    def __init__(self, model, ids):
        self.model, self.whole = model, model.wte
        self.ids = torch.tensor(ids, device=self.whole.weight.device)
        self.lookup = torch.zeros(len(self.whole.weight), dtype=torch.long, device=self.whole.weight.device)
        self.lookup[self.ids] = torch.arange(len(ids), device=self.lookup.device)
        self.part = nn.Embedding(len(ids), self.whole.weight.size(1), device=self.lookup.device)
        self.part.weight.data.copy_(self.whole.weight[self.ids])

    def cut(self):
        self.model.wte = self.part

    def restore(self):
        self.whole.weight.data[self.ids] = self.part.weight.data
        self.model.wte = self.whole


def check_data(shards, space, train_rows, val_rows, rng):
    """what must hold before it makes sense to train, on a sample of the data: the figures of the check line. SystemExit else."""
    sample, wrong, steps = rng.permutation(train_rows)[:1000], 0, 0
    for i in sample:
        outs = shards.answer(i)
        legal = space.next_state[space.states(outs.tolist())] >= 0
        logits = torch.from_numpy(shards.answer(i, 'logits').astype(np.float32))
        wrong += (logits.masked_fill(~legal, -math.inf).argmax(-1).numpy() != outs).sum().item()
        steps += len(outs)
    if wrong > 1e-3 * steps and not shards.meta.get('score'):
        sys.exit(f'{wrong} of {steps} stored tokens are not the teacher\'s likeliest legal one; the files of {shards.folder} do not belong together')
    texts = lambda rows: {shards.ids(i).tobytes() for i in rows}
    overlap = len(texts(train_rows) & texts(val_rows))
    if overlap:
        sys.exit(f'{overlap} held-out texts are also trained on; extract again')
    _, targets, teacher_logits = shards.batch(sample[:32], 0)
    perfect = distill_loss(teacher_logits, teacher_logits, targets[targets >= 0], 1.0)[0].item()
    assert abs(perfect) < 1e-3, perfect
    return {'stored_tokens': 1 - wrong / steps, 'perfect_loss': perfect, 'overlap': overlap}


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    if not name or not dataset:
        sys.exit('no task; run: python train.py config/demo.py')
    choices = {'init_from': ('scratch', 'teacher', 'resume'), 'teacher_layers': ('first', 'even', 'none'), 'divergence': ('forward', 'reverse', 'jsd'),
               'compile': ('auto', 'True', 'true', 'False', 'false'), 'best_by': ('kl', 'ce', 'field', 'exact', 'teacher_forced', 'student_only', 'valid'),
               'tracker': ('', 'wandb', 'trackio')}
    for key, allowed in choices.items():
        if config[key] not in allowed:
            sys.exit(f'{key} is {config[key]!r}; it must be one of {", ".join(map(repr, allowed))}')
    if tracker and not importlib.util.find_spec(tracker):
        sys.exit(f'tracker = {tracker}: no such package here; run: pip install {tracker}')
    begin = time.time()
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))  # torchrun sets them
    out, device = Path('out', run or name), pick_device(device)
    task_file = next((a for a in sys.argv[1:] if a.endswith('.py')), f'config/{name}.py')
    if world > 1:
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
        if device == 'cuda':
            device = f'cuda:{os.environ["LOCAL_RANK"]}'
            torch.cuda.set_device(device)
    say = print if rank == 0 else lambda *_: None
    try:
        shards = Shards(dataset, name)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f'{error}; run: python extract.py {task_file}')
    meta = shards.meta
    train_rows, val_rows = shards.split()
    if max_records:
        train_rows = train_rows[train_rows < max_records]
    if len(train_rows) < batch_size or not len(val_rows):
        sys.exit(f'{len(train_rows)} records to train on and {len(val_rows)} held out are too few for batch_size = {batch_size}; extract more')
    if eval_records:
        val_rows = val_rows[np.random.default_rng(0).permutation(len(val_rows))[:eval_records]]  # the same for every seed
    if (needs := meta['max_text'] + meta['max_answer']) > block_size:
        sys.exit(f'a text may have {meta["max_text"]} tokens and an answer {meta["max_answer"]}; set block_size = {needs} or more')
    lengths = np.array([len(shards.ids(i)) + len(shards.answer(i)) for i in train_rows])

    # a run goes on only as the run it was: same settings, same records
    sizes = dict(vocab_size=meta['vocab_size'], output_vocab=len(meta['output_ids']), block_size=block_size, n_layer=n_layer, n_head=n_head,
                 n_kv_head=n_kv_head or n_head, n_embd=n_embd, n_mlp=n_mlp, dropout=dropout, start_id=meta['start_id'])
    task = {key: meta[key] for key in ('teacher', 'prompt', 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'tokenizer_hash', 'max_text',
                                        'before', 'after', 'fingerprint')}
    free = {'device', 'dtype', 'compile', 'eval_records', 'log_steps', 'grad_accum', 'overwrite', 'save_steps', 'tracker', 'bench'}  # may change in between
    facts = {'config': {k: v for k, v in config.items() if k not in free}, 'task': task, 'n_train': len(train_rows)}
    torch.manual_seed(seed)
    resume = (out / 'ckpt.pt').exists() and not overwrite and not bench
    if init_from == 'resume' and not resume:
        sys.exit(f'{out}/ckpt.pt does not exist; there is nothing to resume')
    if resume:
        checkpoint, model, space = load_checkpoint(out, device, 'last')
        old, new = ({**f['config'], **f['task'], 'n_train': f['n_train']} for f in (checkpoint, facts))
        differ = [f'{key} {old.get(key)!r:.40} there, {new[key]!r:.40} here' for key in new if new[key] != old.get(key) and (key, new[key]) != ('init_from', 'resume')]
        if differ:
            sys.exit(f'{out} holds another run ({"; ".join(differ)}); keep both with --run=other, or replace it with --overwrite=True')
        facts['config'] = checkpoint['config']
        if checkpoint['config']['init_from'] == 'teacher' and freeze_table:
            model.wte.requires_grad_(False)
    else:
        checkpoint, model = {'step': 0}, new_student(sizes, init_from, teacher_layers, freeze_table, meta).to(device)
        space = OutputSpace(Tokenizer.from_file(str(shards.folder / 'tokenizer.json')), *(task[k] for k in ('fields', 'indent', 'fence', 'end_id', 'output_ids')))
        if rank == 0 and not bench:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copy(shards.folder / 'tokenizer.json', out / 'tokenizer.json')
            for old in ('ckpt.pt', 'best.pt'):
                (out / old).unlink(missing_ok=True)
            (out / 'log.txt').write_text('')
    student = model.config
    if bench:
        from bench import bench_training  # it needs transformers, which training does without
        sys.exit(print(bench_training(model, shards, train_rows, batch_size)))
    step, per_epoch = checkpoint['step'], math.ceil(len(train_rows) / batch_size)
    n_steps = max_epochs * per_epoch
    if checkpoint.get('finished'):
        sys.exit(say(f'{out} is trained already ({step} steps); train another beside it with --run=other, or again with --overwrite=True'))
    counts = model.count_params()
    say('model ' + ' '.join(f'{k}={n / 1e6:.1f}M' for k, n in counts.items()).replace('total', 'params'))
    say(data_line('check', check_data(shards, space, train_rows, val_rows, np.random.default_rng(seed))))
    seen = None
    if model.wte.weight.requires_grad:
        seen = SeenRows(model, np.unique(np.concatenate([shards.ids(i) for i in train_rows] + [meta['output_ids'], [student.start_id]])))
        seen.cut()
    groups = model.param_groups(weight_decay)
    learned = [p for group in groups for p in group['params']]
    assert len(learned) == len({id(p) for p in learned}) == sum(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)
    if resume:
        optimizer.load_state_dict(checkpoint['optimizer'])
    figures, per_field, best = (checkpoint.get(key) for key in ('figures', 'per_field', 'best'))
    linear = checkpoint.get('linear') or (linear_baseline(shards, space, train_rows, val_rows) if rank == 0 else {})
    timed = sum((Counter(m.get('timed', {})) for m in shards.metas), Counter())  # what the student costs, for sample.py
    teacher_rec_s = timed['records'] / timed['seconds'] if timed else math.nan
    work = checkpoint.get('work') or {'extract_hours': len(shards) / teacher_rec_s / 3600, 'train_hours': 0.0, 'teacher_rec_s': teacher_rec_s}
    del checkpoint

    bf16 = dtype == 'bfloat16' or dtype == 'auto' and device.startswith('cuda') and torch.cuda.is_bf16_supported()
    autocast = torch.autocast(device.split(':')[0], torch.bfloat16) if bf16 else nullcontext()
    if compile == 'auto' and device.startswith('cuda') or compile in ('True', 'true'):
        model.compile(dynamic=True)
    say(f'records train={len(train_rows)} held_out={len(val_rows)} epochs={max_epochs} steps={n_steps} longest={lengths.max()} from_step={step}')
    if tracker and rank == 0:
        track = importlib.import_module(tracker)
        track.init(project='distillation', name=run or name, config=facts['config'])

    def log(tag, figures):
        line = data_line(tag, figures)
        tqdm.write(line)
        with open(out / 'log.txt', 'a') as file:
            file.write(line + '\n')
        if tracker and tag != 'field':
            track.log({f'{tag}/{k}': v for k, v in figures.items() if isinstance(v, (int, float))})

    def save(file, finished=False):
        """weights, plain facts and, where it is not over, what it takes to go on; whole or not at all."""
        state = {'format': 3, 'step': step, 'finished': finished, 'student': asdict(student), 'figures': figures, 'per_field': per_field, 'best': best,
                 'linear': linear, 'work': work | {'train_hours': work['train_hours'] + (time.time() - begin) / 3600}, **facts}
        if file == 'ckpt.pt' and not finished:
            state['optimizer'] = optimizer.state_dict()
        if seen:
            seen.restore()
        state['model'] = model.state_dict()
        if seen:
            seen.cut()
        try:
            torch.save(state, out / 'ckpt.tmp')
            os.replace(out / 'ckpt.tmp', out / file)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            (out / 'ckpt.tmp').unlink(missing_ok=True)
            sys.exit(f'cannot write {out}/{file}: {str(error).splitlines()[0]}; the checkpoint before it is whole')

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, leave; a second signal is not caught
        signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))

    model.train()
    bar = tqdm(total=n_steps, initial=step, desc='train', unit='step', smoothing=0.05, disable=rank > 0)
    since, n_seen, totals, stopping, begun, pilot = time.time(), 0, np.zeros(4), False, step, time.time()  # totals: loss, kl, ce, answer tokens
    enough, order, waited = False, None, 0 if best is None else (step // per_epoch) - best['epoch']
    while step < n_steps and not stopping:
        epoch, k = divmod(step, per_epoch)
        if k == 0 or order is None:
            order = batches(lengths, batch_size, seed, epoch)
        rows = train_rows[order[k]]
        lr, kl_weight, tau = schedule(step, n_steps, learning_rate, min_lr, warmup, kl_start, kl_end, kd_temperature, kd_anneal)
        for group in optimizer.param_groups:
            group['lr'] = lr
        torch.manual_seed((seed + step) * world + rank)  # dropout too is a function of the step: resuming needs no generator state
        n_tokens = sum(len(shards.answer(i)) for i in rows)  # one denominator, however the step is cut up
        sums = torch.zeros(5, dtype=torch.float64)
        for part in np.array_split(rows, grad_accum * world)[rank::world]:
            if not len(part):
                continue
            idx, targets, teacher_logits = (x.to(device) for x in shards.batch(part, student.start_id))
            if token_dropout:
                idx[(torch.rand(idx.shape, device=device) < token_dropout) & (targets < 0)] = student.start_id
            with autocast:
                logits = model(seen.lookup[idx] if seen else idx, targets)  # (n, V)
            loss, kl, ce, n = distill_loss(logits, teacher_logits, targets[targets >= 0], kl_weight, tau, divergence, jsd_beta)
            (loss / n_tokens).backward()
            sums += torch.tensor([loss.item(), kl.item(), ce.item(), n, 0], dtype=torch.float64)
        sums[4] = len(stop)
        if world > 1:  # a sum, since every part was divided by the tokens of the whole step
            for p in learned:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
            sums = sums.to(device)
            dist.all_reduce(sums)
        *part_totals, stopping = sums.tolist()
        totals += part_totals
        n_seen += int(lengths[order[k]].sum())
        gnorm = torch.nn.utils.clip_grad_norm_(learned, grad_clip or math.inf).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if rank:
            if step % per_epoch == 0 and patience:
                box = [None]
                dist.broadcast_object_list(box)
                stopping = stopping or box[0]
            continue

        if step == min(begun + 100, n_steps):
            hours = (time.time() - pilot) / (step - begun) * n_steps / 3600
            log('plan', {'epochs': max_epochs, 'hours': hours, 'records': len(train_rows)})
        if step % log_steps == 0:
            seconds, mean = time.time() - since, totals[:3] / totals[3]
            log('train', {'step': step, 'loss': mean[0], 'kl': mean[1], 'ce': mean[2], 'kl_weight': kl_weight, 'tau': tau, 'lr': lr, 'gnorm': gnorm,
                          'ms': seconds / log_steps * 1e3, 'tok_s': n_seen / seconds, 'eta_min': seconds / log_steps * (n_steps - step) / 60})
            since, n_seen, totals = time.time(), 0, np.zeros(4)
        if step % per_epoch == 0:
            paused = time.time()
            if seen:
                seen.restore()
            figures, per_field, _ = evaluate(model, space, shards, val_rows, batch_size)
            if seen:
                seen.cut()
            for tag, values in report_lines(step, figures, per_field, linear):
                log(tag, values)
            score = figures[best_by] * (-1 if best_by in ('kl', 'ce') else 1)
            waited += 1
            if best is None or score > best['score']:
                best, waited = {'score': score, 'epoch': step // per_epoch, 'step': step}, 0
                save('best.pt', finished=True)
            enough = bool(patience) and waited >= patience
            if patience and world > 1:
                dist.broadcast_object_list([enough])
            stopping = stopping or enough
            save('ckpt.pt', finished=step == n_steps or enough)
            if enough:
                say(f'no better {best_by} in {patience} epochs: that is enough')
            since, pilot = since + time.time() - paused, pilot + time.time() - paused
        elif stopping or save_steps and step % save_steps == 0:
            save('ckpt.pt')
    bar.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        sys.exit()
    if tracker:
        track.finish()
    if step < n_steps and not enough:
        print(f'stopped after step {step} of {n_steps}; the same command goes on')
        sys.exit()
    if importlib.util.find_spec('matplotlib'):
        from report import draw
        draw(out, shards, val_rows)
    if best['step'] == n_steps:
        print(f'the last epoch was the best: more of them (max_epochs = {2 * max_epochs}) may be better still')
    print(f'trained; best {best_by} at step {best["step"]}. Try it: python sample.py {task_file}{f" --run={run}" if run else ""} --text="..."')
