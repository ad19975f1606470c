"""Train the student on what extract.py kept of the teacher.

    python train.py config/demo.py
    python train.py config/demo.py --max_epochs=2 --batch_size=32
    python train.py config/demo.py --init_from=resume       # after Ctrl-C: goes on as if nothing had happened

Reads data/<dataset>/<name>-*; writes out/<name>/: ckpt.pt, tokenizer.json and log.txt.
"""
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

from config import configure
from data import Shards, batches
from model import OutputSpace, Student, StudentConfig, pick_device
from sample import data_line, evaluate, load_checkpoint

# task
name = ''              # out/<name> is written
dataset = ''           # data/<dataset>/<name>-* is read
init_from = 'auto'     # 'scratch', 'resume' from out/<name>/ckpt.pt, or auto: resume where that is there
# student
n_layer = 16
n_head = 16
n_kv_head = 0          # 0: as many as n_head; fewer is grouped-query attention
n_embd = 1024
n_mlp = 4096
block_size = 75        # text + answer tokens; the start-up check says what the data needs
dropout = 0.0
# curriculum
kl_start = 0.9         # weight of the KL to the teacher's distribution at the first step ...
kl_end = 0.1           # ... and at the last, on a cosine; the rest of 1 is on the cross-entropy with its token
temperature = 1.0      # softens both distributions of the KL
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
log_steps = 10         # steps between train lines
seed = 1337
config = configure(globals())

# -----------------------------------------------------------------------------
# loss and schedule


def distill_loss(logits, teacher_logits, targets, kl_weight, temperature=1.0):
    """logits (..., V) of the student; teacher_logits the same shape; targets (...) output indices, -1 = ignore.

    Returns (loss, kl, ce, n): sums over the n positions with a target, in nats; divide by the step's token count.
    loss = kl_weight * tau^2 * kl + (1 - kl_weight) * ce, where kl is KL(teacher || student) at temperature tau over the
    output vocabulary, 0 when the two are equal, and ce the cross-entropy with the teacher's token. tau^2 keeps the
    gradient of the kl from shrinking with tau (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). float32.
    """
    keep = targets >= 0
    logits, teacher_logits, targets = logits[keep].float(), teacher_logits[keep].float(), targets[keep]
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_q = F.log_softmax(logits / temperature, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction='sum', log_target=True)
    ce = F.cross_entropy(logits, targets, reduction='sum')
    return kl_weight * temperature ** 2 * kl + (1 - kl_weight) * ce, kl.detach(), ce.detach(), len(targets)


def cosine(start, end, progress):
    """start at progress 0, end at progress 1, half a cosine between."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule(step, n_steps, learning_rate, min_lr, warmup, kl_start, kl_end):
    """learning rate and KL weight of a step, 0 <= step < n_steps."""
    n_warm = max(1, round(warmup * n_steps))
    lr = learning_rate * (step + 1) / n_warm if step < n_warm else \
        cosine(learning_rate, min_lr, (step - n_warm) / max(1, n_steps - 1 - n_warm))
    return lr, cosine(kl_start, kl_end, step / max(1, n_steps - 1))


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    if not name or not dataset:
        sys.exit('no task; run: python train.py config/demo.py')
    out, device = Path('out', name), pick_device(device)
    try:
        shards = Shards(dataset, name)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f'{error}; run: python extract.py config/{name}.py')
    meta = shards.meta
    train_rows, val_rows = shards.split()
    if len(train_rows) < batch_size or not len(val_rows):
        sys.exit(f'{len(train_rows)} records to train on and {len(val_rows)} held out are too few for batch_size = {batch_size}; extract more')
    if eval_records:
        val_rows = val_rows[np.random.default_rng(seed).permutation(len(val_rows))[:eval_records]]
    longest = max(len(shards.ids(i)) + len(shards.answer(i)) for i in range(len(shards)))
    if longest > block_size:
        sys.exit(f'the longest record has {longest} tokens; set block_size = {longest} or more')

    # a checkpoint goes on only as the run it was: same settings, same records
    student = StudentConfig(meta['vocab_size'], len(meta['output_ids']), block_size, n_layer, n_head, n_kv_head or n_head, n_embd, n_mlp,
                            dropout, start_id=meta['start_id'])
    task = {key: meta[key] for key in ('teacher', 'prompt', 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'tokenizer_hash', 'max_text')}
    free = {'init_from', 'device', 'dtype', 'compile', 'eval_records', 'log_steps', 'grad_accum'}  # may change in between
    facts = {'config': {k: v for k, v in config.items() if k not in free}, 'task': task, 'student': asdict(student), 'n_train': len(train_rows)}
    resume = init_from == 'resume' or init_from == 'auto' and (out / 'ckpt.pt').exists()
    torch.manual_seed(seed)
    if resume:
        checkpoint, model, space = load_checkpoint(out, device)
        old, new = ({**f['config'], **f['task'], **f['student'], 'n_train': f['n_train']} for f in (checkpoint, facts))
        differ = [f'{key} {old.get(key)!r:.40} there, {new[key]!r:.40} here' for key in new if new[key] != old.get(key)]
        if differ:
            sys.exit(f'{out} holds another run ({"; ".join(differ)}); choose another name, or replace it with --init_from=scratch')
    else:
        checkpoint, model = {'step': 0}, Student(student).to(device)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards.folder / 'tokenizer.json', out / 'tokenizer.json')
        space = OutputSpace(Tokenizer.from_file(str(out / 'tokenizer.json')), *(task[k] for k in ('fields', 'indent', 'fence', 'end_id', 'output_ids')))
        (out / 'log.txt').write_text('')
    step, per_epoch = checkpoint['step'], math.ceil(len(train_rows) / batch_size)
    n_steps = max_epochs * per_epoch
    if resume and step == n_steps:
        sys.exit(print(f'{out} is trained already ({step} steps); another run needs another name, or --init_from=scratch'))
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay), lr=learning_rate, betas=(beta1, beta2), fused=True)
    if resume:
        optimizer.load_state_dict(checkpoint['optimizer'])
    figures, per_field = checkpoint.get('figures'), checkpoint.get('per_field')
    del checkpoint

    on_gpu = str(device).startswith('cuda')
    bf16 = dtype == 'bfloat16' or dtype == 'auto' and on_gpu and torch.cuda.is_bf16_supported()
    autocast = torch.autocast(str(device).split(':')[0], torch.bfloat16) if bf16 else nullcontext()
    if compile == 'auto' and on_gpu or compile in ('True', 'true'):
        model.compile(dynamic=True)
    print('model ' + ' '.join(f'{k}={n / 1e6:.1f}M' for k, n in model.count_params().items()).replace('total', 'params'))
    print(f'records train={len(train_rows)} held_out={len(val_rows)} epochs={max_epochs} steps={n_steps} longest={longest} from_step={step}')

    def log(line):
        tqdm.write(line)
        with open(out / 'log.txt', 'a') as file:
            file.write(line + '\n')

    def save():
        """weights, plain facts and, until the run is over, what it takes to go on; whole or not at all."""
        state = {'format': 1, 'step': step, 'model': model.state_dict(), 'figures': figures, 'per_field': per_field, **facts}
        if step < n_steps:
            state['optimizer'] = optimizer.state_dict()
        try:
            torch.save(state, out / 'ckpt.tmp')
            os.replace(out / 'ckpt.tmp', out / 'ckpt.pt')
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            (out / 'ckpt.tmp').unlink(missing_ok=True)
            sys.exit(f'cannot write {out}/ckpt.pt: {str(error).splitlines()[0]}; the checkpoint before it is whole')

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, leave; a second signal is not caught
        signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))

    model.train()
    bar = tqdm(total=n_steps, initial=step, desc='train', unit='step', smoothing=0.05)
    since, seen, totals = time.time(), 0, np.zeros(4)  # totals: loss, kl, ce, answer tokens since the last line
    while step < n_steps and not stop:
        epoch, k = divmod(step, per_epoch)
        rows = train_rows[batches(len(train_rows), batch_size, seed, epoch)[k]]
        lr, kl_weight = schedule(step, n_steps, learning_rate, min_lr, warmup, kl_start, kl_end)
        for group in optimizer.param_groups:
            group['lr'] = lr
        torch.manual_seed(seed + step)  # dropout too is a function of the step: resuming needs no generator state
        n_tokens = sum(len(shards.answer(i)) for i in rows)  # one denominator, however the step is cut up
        for part in np.array_split(rows, grad_accum):
            idx, targets, teacher_logits = (x.to(device) for x in shards.batch(part, student.start_id))
            with autocast:
                logits = model(idx, targets)  # (n, V)
            loss, kl, ce, n = distill_loss(logits, teacher_logits, targets[targets >= 0], kl_weight, temperature)
            (loss / n_tokens).backward()
            totals += loss.item(), kl.item(), ce.item(), n
            seen += idx.numel()
        gnorm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()

        if step % log_steps == 0:
            seconds, sums = time.time() - since, totals[:3] / totals[3]
            log(data_line('train', {'step': step, 'loss': sums[0], 'kl': sums[1], 'ce': sums[2], 'kl_weight': kl_weight, 'lr': lr, 'gnorm': gnorm,
                                    'ms': seconds / log_steps * 1e3, 'tok_s': seen / seconds, 'eta_min': seconds / log_steps * (n_steps - step) / 60}))
            since, seen, totals = time.time(), 0, np.zeros(4)
        if step % per_epoch == 0:
            paused = time.time()
            figures, per_field, _ = evaluate(model, space, shards, val_rows, batch_size)
            log(data_line('val', {'step': step} | figures))
            for field, values in per_field.items():
                log(data_line('field', {'name': field} | values))
            save()
            since += time.time() - paused
    bar.close()
    if step < n_steps:
        if step % per_epoch:
            save()
        print(f'stopped after step {step} of {n_steps}; go on with: python {" ".join(sys.argv)} --init_from=resume')
    else:
        print(f'trained; try it: python sample.py {" ".join(a for a in sys.argv[1:] if a.endswith(".py"))} --text="..."')
