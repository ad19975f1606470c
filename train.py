"""Train the student on what extract.py kept of the teacher.

    python train.py config/demo.py
    python train.py config/demo.py --max_epochs=2 --overwrite=True
    python train.py config/demo.py  # again, after Ctrl-C: goes on as if nothing had happened
    torchrun --nproc_per_node=2 train.py config/demo.py         # the same steps, each shared by two processes

Reads data/<dataset>/<name>-*, and with `more` what students said (ensemble.py). Writes out/<name>/: ckpt.pt
(the last epoch), best.pt (the best one), tokenizer.json, log.txt and, where matplotlib is installed,
report.png.
"""
import importlib
import importlib.util
import math
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from agreement import evaluate, linear_baseline, report_lines
from checkpoint import is_large
from config import (RANK, WORLD, can_compile, command, configure, data_line, end_ranks, pick_device,
                    pick_dtype, start_ranks, stop, tell_all)
from data import Shards, batches
from model import SeenRows, Student, StudentConfig
from report import draw
from resume import catch_signals, facts_of, lock_folder, new_training, resume_training
from space import tokenizer_hash
from teacher import load_model, load_tokenizer

# task
name = ''              # word; data/<dataset>/<name>-* is read ...
dataset = ''           # word
run = ''               # word; ... and out/<run> written; '': out/<name>. One extraction, many students
max_records = 0        # 0..; train on those of the first so many records that are not held out; 0: all
more = ''              # word; train also on data/<dataset>/<more>-*: what students answered (ensemble.py)
init_from = 'scratch'  # 'scratch', 'teacher', 'resume'; how a new run starts; teacher: with its embedding
                       # table and some of its layers. One cut off goes on anyway; resume insists on it
overwrite = False      # start over where out/<run> holds another or a finished run
teacher_layers = 'first'  # 'first', 'none'; of a teacher's start: its first n_layer layers, or the table alone.
                       # With layers the student has the teacher's shape: of the sizes below only n_layer counts
keep_prompt = False    # with layers: and what they saw of the prompt, keys and values as parameters
freeze_table = True    # of a 'teacher' start: keep the table as it is. It knows words never seen in training
start_model = ''       # file; of a 'teacher' start: table and layers of this model instead, one that has the
                       # teacher's tokenizer, such as a smaller one of its family
# student
n_layer = 16           # 1..
n_head = 16            # 1..
n_kv_head = 0          # 0..; 0: as many as n_head; fewer is grouped-query attention
n_embd = 1024          # 1..
n_mlp = 4096           # 1..
block_size = 75        # 2..; text + answer tokens; the start-up check says what the data needs
dropout = 0.0          # 0..1
token_dropout = 0.0    # 0..1; share of text tokens hidden at each step, against learning few texts by heart
# loss and curriculum
kl_start = 1.0         # 0..1; weight of the KL at the first step ...
kl_end = 1.0           # 0..1; ... and at the last, on a cosine; the rest of 1 is the cross-entropy's
kd_temperature = 0.1   # 0.001..; tau: both's logits are divided by it in the KL. Above 1 it softens, below 1
                       # it sharpens, and near ties weigh more: that agreed most (docs/results.md)
kd_anneal = True       # from kd_temperature to 1 over the run, in a line
# optimizer
max_epochs = 15        # 1..
batch_size = 64        # 1..; records per optimizer step
grad_accum = 1         # 1..; micro-batches a step is computed in: same result, less memory
learning_rate = 6e-4   # 0..; its peak
min_lr = 6e-5          # 0..; at the last step
warmup = 0.05          # 0..1; share of the run
weight_decay = 0.1     # 0..; on matrices, not on the embedding or the norms
beta1 = 0.9            # 0..0.9999
beta2 = 0.95           # 0..0.9999
grad_clip = 1.0        # 0..; 0: off
# run
device = 'auto'        # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'         # 'auto', 'float32', 'bfloat16'; bfloat16 is autocast; auto: where it is faster
compile = 'auto'       # 'auto', 'True', 'False', 'true', 'false'; torch.compile; auto: on a GPU, and on a CPU
                       # in bfloat16, where there is a compiler, in a run that is long enough to pay for it
eval_records = 2000    # 0..; of the held-out tenth, at the end of each epoch; 0: all
best_by = 'field'      # 'field', 'exact', 'kl', 'ce', 'teacher_forced', 'student_only', 'valid'; which epoch
                       # becomes best.pt
patience = 0           # 0..; stop after so many epochs without a better one; 0: never
save_steps = 0         # 0..; checkpoint also every so many steps; 0: at the end of each epoch
log_steps = 10         # 1..; steps between train lines
tracker = ''           # '', 'wandb', 'trackio'; lines go there too
seed = 1337            # 0..
config = configure(globals())

# -----------------------------------------------------------------------------
# loss and schedule


def distill_loss(logits, teacher_logits, targets, kl_weight, temperature=1.0):
    """logits (..., V) of the student; teacher_logits the same shape; targets (...) output indices, -1 =
    ignore.

    Returns (loss, kl, ce, n): sums over the n positions with a target, in nats; divide by the step's token
    count. loss = kl_weight * tau^2 * kl + (1 - kl_weight) * ce. kl is KL(p || q) of the distributions p
    (teacher) and q (student) at temperature tau over the output vocabulary, 0 when they are equal; ce is the
    cross-entropy with the teacher's token. tau^2 (Hinton et al. 2015, https://arxiv.org/abs/1503.02531) makes
    the kl's gradient tau (q - p): at a near tie much the same for every tau, at a clear decision less, the
    lower tau is. float32.
    """
    keep = targets >= 0
    logits, targets = logits[keep].float(), targets[keep]       # (n, V), (n,)
    teacher_logits = teacher_logits[keep].float()               # (n, V)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)  # (n, V)
    log_q = F.log_softmax(logits / temperature, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction='sum', log_target=True)  # covers all that the teacher might say
    ce = F.cross_entropy(logits, targets, reduction='sum')
    return kl_weight * temperature ** 2 * kl + (1 - kl_weight) * ce, kl.detach(), ce.detach(), len(targets)


def cosine(start, end, progress):
    """start at progress 0, end at progress 1, half a cosine between."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule(step, n_steps, learning_rate, min_lr, warmup, kl_start, kl_end, kd_temperature, kd_anneal):
    """learning rate, KL weight and temperature of a step, 0 <= step < n_steps."""
    n_warm = max(1, round(warmup * n_steps))
    lr = learning_rate * (step + 1) / n_warm                    # a line up, ...
    if step >= n_warm:                                          # ... then half a cosine down
        lr = cosine(learning_rate, min_lr, (step - n_warm) / max(1, n_steps - 1 - n_warm))
    progress, tau = step / max(1, n_steps - 1), kd_temperature
    if kd_anneal:  # annealing, the other way round than in https://arxiv.org/abs/2104.07163
        tau += (1 - kd_temperature) * progress
    return lr, cosine(kl_start, kl_end, progress), tau


# -----------------------------------------------------------------------------
# records, and the student to train on them


def open_records(dataset, name, more, max_records, eval_records):
    """the Shards of a task, numbers of the records to train on and of those to evaluate on."""
    try:
        shards = Shards(dataset, name, more=more)
    except FileNotFoundError as error:
        stop(f'{error}; run: {command("extract.py")}')
    except ValueError as error:
        stop(str(error))
    if more and len(shards) == shards.n_teacher:
        stop(f'data/{dataset} has no answers of students in {more!r}; run: {command("ensemble.py")} '
             f'--more={more} --students=...')
    train_rows, val_rows = shards.split()
    if max_records:
        train_rows = train_rows[(train_rows < max_records) | (train_rows >= shards.n_teacher)]
    if eval_records:  # the same for every seed
        val_rows = val_rows[np.random.default_rng(0).permutation(len(val_rows))[:eval_records]]
    return shards, train_rows, val_rows


def check_records(config, meta, n_train, n_val):
    """ends in one line where these records are not for this training."""
    keep_prompt, batch_size, block_size = (config[key] for key in ('keep_prompt', 'batch_size', 'block_size'))
    if keep_prompt and not (meta['before'] and meta['after']):
        stop('keep_prompt wants a prompt with something before and after its {text}; set keep_prompt = False')
    if n_train < batch_size or not n_val:
        stop(f'{n_train} records to train on and {n_val} held out are too few for '
             f'batch_size = {batch_size}; extract more')
    follows = meta['max_answer'] + (len(meta['after']) - 1 if keep_prompt else 0)
    needs = meta['max_text'] + follows
    if needs > block_size:
        stop(f'a text may have {meta["max_text"]} tokens and what follows it {follows}; '
             f'set block_size = {needs} or more')


def check_data(shards, space, train_rows, val_rows, rng):
    """what must hold before it makes sense to train, on a sample of the data: the figures of the check line.
    SystemExit else. teacher_ce: the cross-entropy that a student equal to its teacher would have."""
    wrong = steps = ce = 0
    for i in rng.permutation(train_rows[train_rows < shards.n_teacher])[:1000]:
        outs = shards.answer(i).tolist()
        logits, targets = torch.from_numpy(shards.logits(i)), torch.tensor(outs)  # (n, V), (n,)
        best = logits.masked_fill(space.next_state[space.states(outs)] < 0, -math.inf).amax(-1)
        wrong += (best - logits.gather(1, targets[:, None])[:, 0] > 0.02).sum().item()  # fp16 keeps no more
        ce += F.cross_entropy(logits, targets, reduction='sum').item()
        steps += len(outs)
    if wrong > 1e-3 * steps and not shards.meta.get('score'):
        stop(f'{wrong} of {steps} stored tokens are not the teacher\'s likeliest legal one; '
             f'the files of {shards.folder} do not belong together')
    texts = [{shards.ids(i).tobytes() for i in rows} for rows in (train_rows, val_rows)]
    overlap = len(texts[0] & texts[1])
    if overlap:
        stop(f'{overlap} held-out texts are also trained on; extract again')
    return {'stored_tokens': 1 - wrong / steps, 'teacher_ce': ce / steps, 'overlap': overlap}


def new_student(sizes, init_from, start_model, teacher_layers, keep_prompt, freeze_table, meta):
    """a Student at the start of a run, on the CPU. sizes: its StudentConfig fields."""
    try:
        if init_from != 'teacher':
            return Student(StudentConfig(**sizes))
        if start_model and tokenizer_hash(
                load_tokenizer(start_model).backend_tokenizer) != meta['tokenizer_hash']:
            stop(f'start_model = {start_model} has another tokenizer than {meta["teacher"]}, the teacher')
        start_model = start_model or meta['teacher']
        parts = 'table' if teacher_layers == 'none' else 'table and layers'
        print(f'loading {start_model} for its {parts}')
        around = (meta['before'], meta['after']) if keep_prompt else ()
        student = Student.from_teacher(load_model(start_model), sizes, meta['output_ids'], teacher_layers,
                                       *around)
    except ValueError as error:
        stop(str(error))
    if freeze_table:
        student.wte.requires_grad_(False).half()  # it never changes: half the memory and a smaller checkpoint
    return student


# -----------------------------------------------------------------------------
# a training: begun or gone on with, its optimizer and its precision


def open_training(out, config, shards, n_train, device):
    """the Training in the folder `out`, begun or gone on with, and the state of its optimizer. It goes on
    only as the run it was: same settings, same records. Ends the program where nothing is left to do."""
    meta = shards.meta
    facts = facts_of(config, shards, n_train)
    resume = (out / 'ckpt.pt').exists() and not config['overwrite']
    if config['init_from'] == 'resume' and not resume:
        stop(f'{out}/ckpt.pt does not exist; there is nothing to resume')
    if resume:
        training, optimizer_state = resume_training(out, facts, config['freeze_table'], device)
    else:
        keys = 'block_size', 'n_layer', 'n_head', 'n_embd', 'n_mlp', 'dropout'
        sizes = dict(vocab_size=meta['vocab_size'], output_vocab=len(meta['output_ids']),
                     start_id=meta['start_id'], n_kv_head=config['n_kv_head'] or config['n_head'],
                     **{key: config[key] for key in keys})
        keys = 'init_from', 'start_model', 'teacher_layers', 'keep_prompt', 'freeze_table'
        student = new_student(sizes, *(config[key] for key in keys), meta).to(device)
        training, optimizer_state = new_training(out, facts, student, shards), None
    if training.finished:
        print(f'{out} is trained already ({training.step} steps); train another beside it with --run=other, '
              'or again with --overwrite=True')
        sys.exit()
    return training, optimizer_state


def make_optimizer(training, shards, train_rows, weight_decay, learning_rate, betas, state):
    """gives the run its AdamW, with the state where there is one, and a table of the rows that training can
    change."""
    if training.student.wte.weight.requires_grad:
        texts = [shards.ids(i) for i in train_rows]
        c = training.student.config
        training.seen = SeenRows(training.student, np.unique(np.concatenate(
            [*texts, shards.meta['output_ids'], c.start, [c.start_id]])))
    groups = training.student.param_groups(weight_decay)
    learned = [p for group in groups for p in group['params']]
    due = [p for p in training.student.parameters() if p.requires_grad]
    assert sorted(map(id, learned)) == sorted(map(id, due)), 'a parameter is learned twice, or not at all'
    training.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    if state:
        training.optimizer.load_state_dict(state)


def work_before(shards):
    """what the student has cost before it is trained, for evaluate.py."""
    timed, students = Counter(), Counter()
    for meta in shards.metas:
        (students if 'students' in meta else timed).update(meta.get('timed', {}))
    teacher_rec_s = timed['records'] / timed['seconds'] if timed else math.nan
    work = {'extract_hours': shards.n_teacher / teacher_rec_s / 3600, 'train_hours': 0.0,
            'teacher_rec_s': teacher_rec_s}
    if shards.students:
        hours = sum(one['hours'] for some in shards.students for one in some)
        work['students_hours'] = students['seconds'] / 3600 + hours
    return work


def pays_to_compile(student, device, bf16, n_tokens):
    """whether torch.compile makes training on so many tokens shorter. On a CPU it takes half a minute, and
    makes steps in bfloat16 a third faster, those in float32 4 %."""
    if not device.startswith('cpu'):
        return device.startswith('cuda')
    n_weights = sum(p.numel() for p in student.h.parameters())
    return bf16 and 6 * n_weights * n_tokens > 4e13 and can_compile()


def choose_precision(training, dtype, compile, device, n_tokens):
    """the autocast of the coming steps, on so many tokens in all; compiles the student's layers where that
    pays."""
    bf16 = tell_all(lambda: pick_dtype(dtype, device)) == torch.bfloat16
    autocast = torch.autocast(device.split(':')[0], torch.bfloat16) if bf16 else nullcontext()
    training.precision = autocast if is_large(training.student) else nullcontext()  # as sample.py has it
    training.compiled = compile in ('True', 'true') or compile == 'auto' and pays_to_compile(
        training.student, device, bf16, n_tokens)
    if training.compiled:
        for block in training.student.h:  # one after the other: they share what is compiled
            block.compile(dynamic=True)
    print(f'training in {"bfloat16" if bf16 else "float32"} on {device}'
          + (', compiled' if training.compiled else ''))
    return autocast


# -----------------------------------------------------------------------------
# one step, the end of an epoch


def hide_text(idx, targets, share, start_id, n_start=1):
    """replaces this share of the text tokens, chosen at random, by start_id, in place: neither the answer nor
    the n_start tokens before it are touched. idx (B, T) ids, targets (B, T) output indices, -1 on text and
    padding."""
    first = (targets >= 0).int().argmax(1, keepdim=True)        # (B, 1) where the answer is asked for
    text = torch.arange(idx.size(1), device=idx.device) <= first - n_start
    idx[(torch.rand(idx.shape, device=idx.device) < share) & text] = start_id


def take_step(training, shards, rows, lr, grad_accum, grad_clip, token_dropout, autocast, **loss_options):
    """one optimizer step on the records `rows`, shared among the processes and micro-batches: the result does
    not depend on how. FloatingPointError where the loss is no number. Returns sums over the step, (loss, kl,
    ce, answer tokens right, answer tokens), and the gradient's norm."""
    learned = [p for group in training.optimizer.param_groups for p in group['params']]
    device, c = training.student.lm_head.weight.device, training.student.config
    n_tokens = sum(len(shards.answer(i)) for i in rows)         # one denominator, however the step is cut
    sums = torch.zeros(5, dtype=torch.float64)
    for part in np.array_split(rows, grad_accum * WORLD)[RANK::WORLD]:
        if not len(part):
            continue
        batch = shards.batch(part, c.start)                     # (B, T), (B, T), (n, V)
        idx, targets, teacher_logits = (x.to(device) for x in batch)
        if token_dropout:
            hide_text(idx, targets, token_dropout, c.start_id, len(c.start))
        with autocast:
            logits = training.student(training.seen.lookup[idx] if training.seen else idx, targets)  # (n, V)
        targets = targets[targets >= 0]                         # (n,)
        loss, kl, ce, n = distill_loss(logits, teacher_logits, targets, **loss_options)
        (loss / n_tokens).backward()
        hits = (logits.argmax(-1) == targets).sum()
        sums += torch.tensor([loss.item(), kl.item(), ce.item(), hits.item(), n], dtype=torch.float64)
    if WORLD > 1:  # a sum, since every part was divided by the tokens of the whole step
        for p in learned:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        sums = sums.to(device)
        dist.all_reduce(sums)
    gnorm = torch.nn.utils.clip_grad_norm_(learned, grad_clip or math.inf).item()
    if not math.isfinite(gnorm + sums.sum()):
        raise FloatingPointError(f'the loss of step {training.step} is no number any more: try a lower '
                                 f'learning_rate; {training.out} keeps its last checkpoint')
    for group in training.optimizer.param_groups:
        group['lr'] = lr
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.step += 1
    return np.array(sums.tolist()), gnorm


def end_epoch(training, epoch, shards, val_rows, batch_size, best_by, patience, last):
    """evaluates, logs and saves, in the first process. Whether it is enough: no better epoch for so long."""
    with training.whole_table(), training.precision:
        figures, per_field, *_ = evaluate(training.student, training.space, shards, val_rows, batch_size)
    training.figures, training.per_field = figures, per_field
    for line in report_lines(training.step, figures, per_field, training.linear):
        training.log(*line)
    value, best = figures[best_by] * (-1 if best_by in ('kl', 'ce') else 1), training.best
    if best is None or (value, -figures['kl']) > (best['value'], -best['kl']):  # equals: lower kl
        training.best = {'value': value, 'kl': figures['kl'], 'epoch': epoch, 'step': training.step}
        training.save('best.pt', finished=True)
    enough = bool(patience) and epoch - training.best['epoch'] >= patience
    training.save('ckpt.pt', finished=last or enough)
    if enough:
        print(f'no better {best_by} in {patience} epochs: that is enough')
    return enough


def any_process(flag, device):
    """whether the flag is set in any of the processes."""
    flags = torch.tensor([float(bool(flag))], device=device)
    if WORLD > 1:
        dist.all_reduce(flags)
    return flags.item() > 0


# -----------------------------------------------------------------------------
# main


def check_settings(config):
    """ends in one line where a setting cannot be."""
    if not config['name'] or not config['dataset']:
        stop('no task; run: python train.py config/demo.py')
    tracker, tau = config['tracker'], config['kd_temperature']
    if config['keep_prompt'] and (config['init_from'] == 'scratch' or config['teacher_layers'] == 'none'):
        stop('keep_prompt keeps what the teacher\'s layers saw; set init_from = teacher and '
             'teacher_layers = first')
    if config['start_model'] and config['init_from'] == 'scratch':
        stop('start_model is the model to start from; set init_from = teacher')
    if tracker and not importlib.util.find_spec(tracker):
        stop(f'tracker = {tracker}: no such package here; run: pip install {tracker}')
    if tau < 1 and min(config['kl_start'], config['kl_end']) < 1:
        print(f'note: at kd_temperature = {tau} the KL has {tau:g} times the gradient it has at 1 where the '
              'teacher is sure, so the cross-entropy beside it takes nearly all; for the curriculum set '
              '--kd_temperature=1')


if __name__ == '__main__':
    device = start_ranks(pick_device(device), 'nccl' if pick_device(device) == 'cuda' else 'gloo')
    check_settings(config)
    out = Path('out', run or name)
    shards, train_rows, val_rows = open_records(dataset, name, more, max_records, eval_records)
    check_records(config, shards.meta, len(train_rows), len(val_rows))
    torch.manual_seed(seed)
    lock = lock_folder(out) if RANK == 0 else None
    training, optimizer_state = open_training(out, config, shards, len(train_rows), device)
    counts = training.student.count_params()
    print('model', *(f'{"params" if k == "total" else k}={n / 1e6:.1f}M' for k, n in counts.items()))
    checked = check_data(shards, training.space, train_rows, val_rows, np.random.default_rng(seed))
    print(data_line('check', checked))
    make_optimizer(training, shards, train_rows, weight_decay, learning_rate, (beta1, beta2), optimizer_state)
    if training.linear is None and RANK == 0:
        training.linear = linear_baseline(shards, training.space, train_rows, val_rows)
    if training.work is None:
        training.work = work_before(shards)
    if tracker and RANK == 0:
        training.track = importlib.import_module(tracker)
        training.track.init(project='distillation', name=out.name, config=training.facts['config'])

    lengths = np.array([len(shards.ids(i)) + len(shards.answer(i)) for i in train_rows])
    per_epoch = math.ceil(len(train_rows) / batch_size)
    n_steps, first = max_epochs * per_epoch, training.step
    autocast = choose_precision(training, dtype, compile, device, max_epochs * int(lengths.sum()))
    print(f'records train={len(train_rows)} held_out={len(val_rows)} epochs={max_epochs} steps={n_steps} '
          f'longest={lengths.max()} from_step={first}')
    caught, enough, stopping = catch_signals(), False, False
    sums, n_seen, seconds = np.zeros(5), 0, 0.0  # since the last train line
    all_seconds = 0.0                            # of the steps made here
    training.student.train()
    bar = tqdm(total=n_steps, initial=first, desc='train', unit='step', smoothing=0.05, disable=RANK > 0)
    while training.step < n_steps and not (stopping or enough):
        start, (epoch, k) = time.time(), divmod(training.step, per_epoch)
        if k == 0 or training.step == first:
            order = batches(lengths, batch_size, seed, epoch)
        lr, kl_weight, tau = schedule(training.step, n_steps, learning_rate, min_lr, warmup, kl_start, kl_end,
                                      kd_temperature, kd_anneal)
        torch.manual_seed((seed + training.step) * WORLD + RANK)  # dropout too is a function of the step
        try:
            step_sums, gnorm = take_step(training, shards, train_rows[order[k]], lr, grad_accum, grad_clip,
                                         token_dropout, autocast, kl_weight=kl_weight, temperature=tau)
        except FloatingPointError as error:
            bar.close()
            stop(str(error))
        stopping = any_process(caught, device)
        sums, n_seen, spent = sums + step_sums, n_seen + int(lengths[order[k]].sum()), time.time() - start
        seconds, all_seconds = seconds + spent, all_seconds + spent
        bar.update()
        if training.step == min(first + 100, n_steps) and RANK == 0:
            hours = all_seconds / (training.step - first) * n_steps / 3600
            training.log('plan', {'epochs': max_epochs, 'hours': hours, 'records': len(train_rows)})
        if training.step % log_steps == 0:
            means = dict(zip(('loss', 'kl', 'ce', 'teacher_forced'), (sums[:4] / sums[4]).tolist()))
            step_s = seconds / log_steps
            if RANK == 0:
                training.log('train', {
                    'step': training.step, **means, 'kl_weight': kl_weight, 'tau': tau, 'lr': lr,
                    'gnorm': gnorm, 'ms': step_s * 1e3, 'tok_s': n_seen / seconds,
                    'eta_min': step_s * (n_steps - training.step) / 60})
            sums, n_seen, seconds = np.zeros(5), 0, 0.0
        if training.step % per_epoch == 0:
            last = training.step == n_steps
            ending = training, epoch + 1, shards, val_rows, batch_size, best_by, patience, last
            enough = tell_all(partial(end_epoch, *ending))
        elif RANK == 0 and (stopping or save_steps and training.step % save_steps == 0):
            training.save('ckpt.pt')
    bar.close()
    end_ranks()
    if RANK:
        sys.exit()
    if training.track:
        training.track.finish()
    if training.step < n_steps and not enough:
        print(f'stopped after step {training.step} of {n_steps}; the same command goes on')
        sys.exit()
    draw(out, shards, val_rows[:500], dtype)
    if training.best['step'] == n_steps:
        print(f'the last epoch was the best: more (max_epochs = {2 * max_epochs}) may be better still')
    print(f'trained; best {best_by} at step {training.best["step"]}. Look: {command("evaluate.py")}. '
          f'Use it: {command("sample.py")} --text="..."')
