"""Train the student on what extract.py kept of the teacher.

    python train.py config/demo.py
    python train.py config/demo.py --max_epochs=2 --overwrite=True
    python train.py config/demo.py                              # again, after Ctrl-C: continues exactly
    torchrun --nproc_per_node=2 train.py config/demo.py         # the same steps, each shared by two processes

Reads data/<dataset>/<name>-*. Writes out/<name>/:
ckpt.pt (the last epoch), best.pt (the best one), tokenizer.json, log.txt and, where matplotlib is installed,
report.png.
"""
import importlib
import importlib.util
import math
import random
import time
from pathlib import Path

# before torch, see config/machine.py
from config import configure, data_line, next_command, stop
from config.machine import RANK, WORLD, any_process, end_ranks, pick_device, run_in_first, start_ranks

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import batches
from distil.agreement import evaluate, linear_baseline, report_lines, update_best
from distil.reader import encode_records, leave_out_options
from distil.records import check_data, check_sizes, note_rare_values, open_records
from distil.report import draw_report, store_int8
from distil.resume import Meter, catch_signals, lock_folder, open_training
from distil.start import SeenRows

# task
name = ''              # word; data/<dataset>/<name>-* is read ...
dataset = ''           # word
run = ''               # word; ... and out/<run> written; '': out/<name>. One extraction, many students
max_records = 0        # 0..; train on the first records alone, at most this many; 0: on all
train_on = 'all'       # 'all', 'right'; right: only where the teacher says what "truth" of input.jsonl says; all
                       # held-out records stay
held_out = ''          # file; each text in it is held out; '': those with "split": "test", else a tenth
init_from = 'scratch'  # 'scratch', 'teacher', 'resume'; how a new run starts; teacher: with its embedding
                       # table. An interrupted run continues anyway; resume demands it
overwrite = False      # replace the run that out/<run> holds
freeze_table = True    # with init_from teacher: the table is not trained, so words unseen in training keep
                       # their meaning
# a pre-trained encoder that reads the text in place of the student's table (distil/reader.py)
reader = ''            # file; or a Hugging Face id; '': none
reader_layers = 0      # 0..; its first layers alone, this many; 0: all
reader_tokens = 0      # 0..; its likeliest tokens of the texts' letters alone, this many (distil/trim.py); 0: all
reader_lr = 0.1        # 0..; factor on its learning rate: it is trained already
# student
n_layer = 16           # 1..
n_head = 16            # 1..
n_kv_head = 0          # 0..; 0: as many as n_head; fewer is grouped-query attention
n_embd = 1024          # 1..
n_mlp = 4096           # 1..
block_size = 75        # 2..; text + answer tokens; if it is too small, a message says what the data needs
dropout = 0.0          # 0..1
token_dropout = 0.0    # 0..1; share of text tokens hidden at each step, against overfitting on few texts
# loss and curriculum
kl_start = 1.0         # 0..1; weight of the KL at the first step ...
kl_end = 1.0           # 0..1; ... and at the last, on a cosine; the cross-entropy has 1 less this weight
kd_temperature = 0.1   # 0.001..; tau: divides the logits of both in the KL. Above 1 softens, below 1 sharpens
                       # and puts more weight on near ties: of those tried, 0.1 agreed most (docs/results.md)
kd_anneal = True       # tau goes linearly from kd_temperature to 1 over the run
# optimizer
max_epochs = 15        # 1..
batch_size = 64        # 1..; records per optimizer step
grad_accum = 1         # 1..; micro-batches per step: same result, less memory
learning_rate = 6e-4   # 0..; the peak
min_lr = 6e-5          # 0..; at the last step
warmup = 0.05          # 0..1; share of the steps in which the learning rate rises
weight_decay = 0.1     # 0..; on matrices, not on the embedding or the norms
beta1 = 0.9            # 0..0.9999
beta2 = 0.95           # 0..0.9999
grad_clip = 1.0        # 0..; 0: off
# run
device = 'auto'        # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'         # 'auto', 'float32', 'bfloat16'; bfloat16 is autocast; auto: where it is faster
compile = 'auto'       # 'auto', 'True', 'False', 'true', 'false'; torch.compile; auto: on a GPU, and on a CPU
                       # in bfloat16 with a C++ compiler, in runs long enough to pay for it
eval_records = 2000    # 0..; of the held-out ones, at the end of each epoch; 0: all
best_by = 'field'      # 'field', 'exact', 'kl', 'ce', 'teacher_forced', 'student_only', 'valid'; which epoch
                       # becomes best.pt: the last of those within a standard error of the best
patience = 0           # 0..; stop after this many epochs without a better one; 0: never
save_steps = 0         # 0..; checkpoint also after this many steps, again and again; 0: at the end of each epoch
log_steps = 10         # 1..; steps between train lines
tracker = ''           # '', 'wandb', 'trackio'; the data lines go there too
seed = 1337            # 0..
config = configure(globals())

# -----------------------------------------------------------------------------
# loss and schedule


def distill_loss(logits, teacher_logits, targets, kl_weight, temperature=1.0):
    """logits (..., V) of the student; teacher_logits, the same shape; targets (...) output indices, -1 =
    ignore -> (loss, kl, ce, n), sums over the n positions with a target, in nats. float32.

    loss = kl_weight * tau^2 * kl + (1 - kl_weight) * ce. kl is KL(p || q) of the distributions p (teacher) and
    q (student) over the output vocabulary at temperature tau; it is 0 when they are equal. ce is the
    cross-entropy with the teacher's token. The gradient of tau^2 * kl is tau (q - p) (Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531): a lower tau keeps it at near ties and makes it small at clear decisions.
    """
    keep = targets >= 0
    logits, targets = logits[keep].float(), targets[keep]       # (n, V), (n,)
    teacher_logits = teacher_logits[keep].float()               # (n, V)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)  # (n, V)
    log_q = F.log_softmax(logits / temperature, dim=-1)         # (n, V)
    kl = F.kl_div(log_q, log_p, reduction='sum', log_target=True)  # all that the teacher might say
    ce = F.cross_entropy(logits, targets, reduction='sum')      # only what it said
    return kl_weight * temperature ** 2 * kl + (1 - kl_weight) * ce, kl.detach(), ce.detach(), len(targets)


def cosine(start, end, progress):
    """start at progress 0, end at progress 1, half a cosine between."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule(step, n_steps, config):
    """(learning rate, KL weight, temperature) of a step, 0 <= step < n_steps. config: the settings."""
    n_warm = max(1, round(config['warmup'] * n_steps))
    lr = config['learning_rate'] * (step + 1) / n_warm          # linear up ...
    if step >= n_warm:                                          # ... then half a cosine down
        lr = cosine(config['learning_rate'], config['min_lr'], (step - n_warm) / max(1, n_steps - 1 - n_warm))
    progress, tau = step / max(1, n_steps - 1), config['kd_temperature']
    if config['kd_anneal']:  # upwards; https://arxiv.org/abs/2104.07163 anneals downwards
        tau += (1 - tau) * progress
    return lr, cosine(config['kl_start'], config['kl_end'], progress), tau


# -----------------------------------------------------------------------------
# parts of a step, the end of an epoch


def make_optimizer(training, shards, train_rows, config, state):
    """gives the training its AdamW, with the state of a checkpoint if there is one. A table that is trained is
    cut down to the tokens that occur, see SeenRows."""
    student = training.student
    if student.encoder and not training.space.has_options:      # the texts of these change from epoch to epoch
        ids = {id for i in train_rows for id in shards.encoded[i]}
        ids |= {mask_id(student)} if config['token_dropout'] else set()
        training.seen = SeenRows(student.encoder, torch.tensor([*ids]))
    elif not student.encoder and student.wte.weight.requires_grad:
        ids = torch.from_numpy(np.unique(np.concatenate([shards.ids(i) for i in train_rows])).astype(np.int64))
        training.seen = SeenRows(student, torch.cat((ids.to(student.answer_row), student.answer_row)))
    groups = student.param_groups(config['weight_decay'])
    learned = [p for group in groups for p in group['params']]
    trainable = [p for p in student.parameters() if p.requires_grad]
    assert sorted(map(id, learned)) == sorted(map(id, trainable)), 'a parameter in no group, or in two'
    betas = config['beta1'], config['beta2']
    training.optimizer = torch.optim.AdamW(groups, lr=config['learning_rate'], betas=betas, fused=True)
    if state:
        training.optimizer.load_state_dict(state)
        if training.seen:
            training.seen.cut_state(training.optimizer)         # of an earlier version
    return learned


def hide_text(text, share, hidden_id):
    """replaces this share of the text's tokens, chosen at random, by hidden_id, in place. text (B, T) ids, -1 on
    padding."""
    text[(torch.rand(text.shape, device=text.device) < share) & (text >= 0)] = hidden_id


def mask_id(student):
    """the id that stands for a hidden token of a text: the start token, or the encoder's mask token."""
    if student.encoder is None:
        return student.config.start_id
    found = (student.encoder.tokenizer.token_to_id(name) for name in ('[MASK]', '<mask>'))
    return next(id for id in found if id is not None)


def add_up(learned, sums):
    """sums the gradients of the parameters, and sums (5,), over all processes. A sum, because each process divides
    by the tokens of the whole step."""
    for p in learned:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    sums = sums.to(learned[0].device)
    dist.all_reduce(sums)
    return sums.cpu()


def end_epoch(training, epoch, shards, val_rows, config, last):
    """evaluates on the held-out records, logs and saves; in the first process. Returns True if `patience`
    epochs have passed without a better one. last: no epoch follows."""
    with training.whole_table(), training.precision:
        figures, per_field, *_ = evaluate(training.student, training.space, shards, val_rows, config['batch_size'])
    training.figures, training.per_field = figures, per_field
    for tag, values in report_lines(training.step, figures, per_field, training.linear):
        training.log(tag, values)
    training.best, is_best = update_best(training.best, figures, config['best_by'], epoch, training.step)
    if is_best:
        training.save('best.pt', finished=True)                 # without the optimizer's state
    enough = bool(config['patience']) and epoch - training.best['top_epoch'] >= config['patience']
    training.save('ckpt.pt', finished=last or enough)
    if enough:
        print(f'no better {config["best_by"]} in {config["patience"]} epochs: stopping early')
    return enough


# -----------------------------------------------------------------------------
# main


def check_training(config):
    """exits with a message if settings contradict each other or a package is missing."""
    if not config['name'] or not config['dataset']:
        stop('no task; run: python train.py config/demo.py')
    tracker, tau = config['tracker'], config['kd_temperature']
    if config['reader'] and config['init_from'] == 'teacher':
        stop('init_from = teacher starts with the teacher\'s table, and a student with a reader has none; set reader = '
             "'', or init_from = 'scratch'")
    for key in ('reader_layers', 'reader_tokens'):
        if config[key] and not config['reader']:
            stop(f'{key} says how much of the reader is kept; set reader, too')
    if tracker and not importlib.util.find_spec(tracker):
        stop(f'tracker = {tracker}: this package is missing; run: pip install {tracker}')
    if tau < 1 and min(config['kl_start'], config['kl_end']) < 1:
        print(f'note: at kd_temperature = {tau} the gradient of the KL at a clear decision is far smaller than '
              'that of the cross-entropy beside it; for the curriculum set --kd_temperature=1')


if __name__ == '__main__':
    device = start_ranks(pick_device(device), 'nccl' if pick_device(device) == 'cuda' else 'gloo')
    check_training(config)
    out = Path('out', run or name)
    shards, train_rows, val_rows = open_records(config)
    check_sizes(config, shards.meta, len(train_rows), len(val_rows))
    torch.manual_seed(seed)
    lock = lock_folder(out) if RANK == 0 else None              # held until the program ends
    training, optimizer_state = open_training(out, config, shards, train_rows, device)
    student = training.student
    counts = student.count_params()
    print('model', *(f'{"params" if k == "total" else k}={n / 1e6:.1f}M' for k, n in counts.items()))
    checked = check_data(shards, training.space, train_rows, val_rows, np.random.default_rng(seed))
    print(data_line('check', checked))
    note_rare_values(shards, training.space, train_rows, val_rows, max_epochs)
    n_cut = encode_records(student, training.space, shards, [*train_rows, *val_rows])
    if n_cut:
        print(f'note: {n_cut} texts do not fit into block_size = {block_size} with their answers: their ends are lost')
    learned = make_optimizer(training, shards, train_rows, config, optimizer_state)
    if training.linear is None and RANK == 0:                   # the yardstick: counts of words, of letters
        training.linear = linear_baseline(shards, training.space, train_rows, val_rows)
    if tracker and RANK == 0:
        training.tracker = importlib.import_module(tracker)
        training.tracker.init(project='distillation', name=out.name, config=training.facts['config'])

    lengths = np.array([len(shards.encoded.get(i, shards.ids(i))) + len(shards.steps(i)) for i in train_rows])
    per_epoch = math.ceil(len(train_rows) / batch_size)
    n_steps, first = max_epochs * per_epoch, training.step
    autocast = training.set_precision(dtype, compile, device, max_epochs * int(lengths.sum()))
    print(f'records train={len(train_rows)} held_out={len(val_rows)} epochs={max_epochs} steps={n_steps} '
          f'longest={lengths.max()} from_step={first}')
    caught, enough, stopping, meter = catch_signals(), False, False, Meter(n_steps)
    student.train()
    bar = tqdm(total=n_steps, initial=first, desc='train', unit='step', smoothing=0.05, disable=RANK > 0)
    while training.step < n_steps and not (stopping or enough):
        began, (epoch, k) = time.time(), divmod(training.step, per_epoch)
        if k == 0 or training.step == first:
            order = batches(lengths, batch_size, seed, epoch)   # of (seed, epoch) alone: resume needs no more
            if training.space.has_options:
                leave_out_options(student, training.space, shards, train_rows, random.Random(1000 * seed + epoch))
        torch.manual_seed((seed + training.step) * WORLD + RANK)  # and dropout is a function of the step
        lr, kl_weight, tau = schedule(training.step, n_steps, config)
        for group in training.optimizer.param_groups:
            group['lr'] = lr * (reader_lr if group['of_encoder'] else 1.0)

        rows = train_rows[order[k]]                             # of this step, shared by processes, in micro-batches
        n_tokens = sum(len(shards.steps(i)) for i in rows)      # one denominator for all of them
        sums = torch.zeros(5, dtype=torch.float64)              # loss, kl, ce, answer tokens right, answer tokens
        for part in np.array_split(rows, grad_accum * WORLD)[RANK::WORLD]:
            if not len(part):
                continue
            # text (B, T) ids; answer, targets (B, T) output indices, -1 on padding;
            # teacher_logits (n, V), a row a target
            text, answer, targets, teacher_logits = (x.to(device) for x in shards.batch(part))
            targets = targets[targets >= 0]                     # (n,)
            if token_dropout:
                hide_text(text, token_dropout, mask_id(student))
            with autocast:
                logits = student(text, answer)  # (n, V)
            loss, kl, ce, n = distill_loss(logits, teacher_logits, targets, kl_weight, tau)
            (loss / n_tokens).backward()
            hits = (logits.argmax(-1) == targets).sum()
            sums += torch.tensor([loss.item(), kl.item(), ce.item(), hits.item(), n], dtype=torch.float64)
        sums = add_up(learned, sums) if WORLD > 1 else sums
        gnorm = torch.nn.utils.clip_grad_norm_(learned, grad_clip or math.inf).item()
        if not math.isfinite(gnorm + sums.sum()):
            bar.close()
            stop(f'the loss of step {training.step} is nan or infinite: try a lower learning_rate; {out} keeps its '
                 'last checkpoint')
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        training.step += 1

        stopping = any_process(caught, device)
        meter.add(sums.numpy(), int(lengths[order[k]].sum()), time.time() - began)
        bar.update()
        if RANK == 0 and training.step == min(first + 100, n_steps):
            training.log('plan', {'epochs': max_epochs, 'hours': meter.hours(), 'records': len(train_rows)})
        if training.step % log_steps == 0:
            means, speed = meter.read(training.step)
            if RANK == 0:
                training.log('train', {'step': training.step, **means, 'kl_weight': kl_weight, 'tau': tau, 'lr': lr,
                                       'gnorm': gnorm, **speed})
        if training.step % per_epoch == 0:
            is_last = training.step == n_steps
            enough = run_in_first(lambda: end_epoch(training, epoch + 1, shards, val_rows, config, is_last))
        elif RANK == 0 and (stopping or save_steps and training.step % save_steps == 0):
            training.save('ckpt.pt')
    bar.close()
    end_ranks()                                                 # only the first process goes on
    if training.tracker:
        training.tracker.finish()
    if training.step < n_steps and not enough:
        stop(f'stopped after step {training.step} of {n_steps}; the same command continues')
    store_int8(out, shards, val_rows, device)
    draw_report(out, shards, val_rows[:500], dtype)
    if training.best['top_epoch'] == max_epochs:
        print(f'the last epoch was the best: more (max_epochs = {2 * max_epochs}) may be better still')
    print(f'trained; best {best_by} at step {training.best["step"]}, chosen on the held-out records, which flatters a '
          f'little. Look: {next_command("tools/evaluate.py")}. Use it: {next_command("sample.py")} --text="..."')
