"""The pictures and figures of docs/how.md: one record, from the teacher to the student's answer.

    python docs/pictures.py config/chitchat_270m.py             # two minutes on 2 cores
    python docs/pictures.py config/chitchat_270m.py --train=False  # with the checkpoints of the last run

Needs the records that extract.py made. Trains the config's student as out/how and keeps its checkpoint after
some epochs. Prints the figures of how.md, and writes how_record.png, how_automaton.png and how_gradient.png.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, stop

import numpy as np
import torch
import torch.nn.functional as F

from data import Shards
from distil.agreement import evaluate, field_texts, same_values
from distil.checkpoint import load_checkpoint
from distil.confidence import confidence_of
from distil.decode import decode
from distil.report import start_drawing
from distil.space import OutputSpace
from train import distill_loss

name = ''              # data/<dataset>/<name>-* has the records
dataset = ''
run = 'how'            # the student is out/<run>
train = True           # train the student; False: use the checkpoints that exist
epochs = [1, 6, 12]    # its checkpoints after these are used; the last one answers
record = 16            # a held-out one whose logsumexp is stored. In config/chitchat_270m.py its first
                       # decision is a near tie and its second is clear
near = 0.25            # logits; a near tie has this margin or less between its two likeliest legal tokens
small = {'tone': ['neutral', 'friendly'], 'spam': [True, False]}  # the schema whose automaton is drawn
config = configure(globals())

DOCS = Path(__file__).resolve().parent
TAUS = *np.geomspace(0.05, 2, 60), 0.1, 0.3, 1.0, 2.0           # the last four are printed, the others drawn


def train_student(out, epochs):
    """trains with train.py on the config files of this command. Keeps out/epoch_<n>/ckpt.pt of these epochs,
    as a hard link: train.py replaces its checkpoint and never changes one."""
    path, link, seen, ended = out / 'ckpt.pt', out / 'link.tmp', None, False
    for old in (path, link, *out.glob('epoch_*/ckpt.pt')):
        old.unlink(missing_ok=True)
    files = [arg for arg in sys.argv[1:] if arg.endswith('.py')]
    training = subprocess.Popen([sys.executable, 'train.py', *files, f'--run={out.name}', '--overwrite=True'])
    while not ended:
        ended = training.poll() is not None  # before the look at the file, or the last one could be missed
        if path.exists() and path.stat().st_mtime_ns != seen:
            os.link(path, link)
            seen, facts = link.stat().st_mtime_ns, torch.load(link, 'cpu', weights_only=True, mmap=True)
            epoch = facts['step'] / -(-facts['n_train'] // facts['config']['batch_size'])
            if epoch in epochs:
                folder = out / f'epoch_{epoch:.0f}'
                folder.mkdir(exist_ok=True)
                shutil.copy(out / 'tokenizer.json', folder)
                os.rename(link, folder / 'ckpt.pt')
            link.unlink(missing_ok=True)
        time.sleep(0.05)
    if training.returncode:
        stop('the training failed')


def decode_text(space, outs):
    """output indices -> their text, on one line."""
    text = space.tokenizer.decode([space.output_ids[o] for o in outs], skip_special_tokens=False)
    return text.replace('\n', r'\n')


def measure_margins(shards, space, rows):
    """the margin of every answer token of these records, in their order, (n,): logits between the teacher's
    two likeliest legal tokens, inf for a forced token."""
    states = [state for i in rows for state in space.states_before(shards.outs(i))]
    logits = torch.from_numpy(np.concatenate([shards.answer(i, 'logits') for i in rows]).astype(np.float32))
    best = logits.masked_fill(space.next_state[states] < 0, -torch.inf).topk(2).values  # (n, 2)
    return (best[:, 0] - best[:, 1]).numpy()


def measure_kept_mass(shards, i):
    """the share of the teacher's probability on the kept tokens at each answer token of record i, (n,); nan
    if its logsumexp is not stored."""
    top, lse = shards.answer(i, 'stats').T
    return np.exp(shards.answer(i, 'logits').astype(np.float32) + (top - lse)[:, None]).sum(1)


def gradient_norms(logits, teacher, tau):
    """logits, teacher (n, V) -> (n,) norm of tau (q_tau - p_tau), the gradient of tau^2 KL_tau."""
    return (tau * ((logits / tau).softmax(-1) - (teacher / tau).softmax(-1))).norm(dim=-1).numpy()


# -----------------------------------------------------------------------------
# printed figures


def print_record(shards, space, i):
    """prints what is stored of record i, and the row that the student reads."""
    ids, outs = shards.ids(i).tolist(), shards.outs(i)
    comma = lambda numbers: ','.join(map(str, numbers))
    print('text:', space.tokenizer.decode(ids))
    print('tokens:', *map(space.tokenizer.id_to_token, ids))
    print('answer:', *(decode_text(space, [o]) for o in outs))
    print(data_line('record', {
        'number': i, 'text_tokens': len(ids), 'answer_tokens': len(outs), 'V': len(space.output_ids),
        'required': space.n_required, 'vocab': shards.meta['vocab_size'],
        'before': len(shards.meta['before']), 'after': comma(shards.meta['after'])}))
    sizes = {what: shards.answer(i, what).nbytes for what in ('output', 'logits', 'stats')}
    whole = len(outs) * shards.meta['vocab_size'] * 2           # if the logits of every token were kept
    print(data_line('bytes', {'input': shards.ids(i).nbytes, **sizes, 'whole_logits': whole}))
    text, answer, targets, _ = (part[0].tolist() for part in shards.batch([i]))
    print(data_line('row', {'text': comma(text), 'answer': comma(answer), 'targets': comma(targets)}))
    for k, (state, mass) in enumerate(zip(space.states_before(outs), measure_kept_mass(shards, i).tolist())):
        if len(legal := list(space.transitions[state])) > 1:
            top, lse = shards.answer(i, 'stats')[k].tolist()
            logits = torch.from_numpy(shards.answer(i, 'logits')[k].astype(np.float32))
            print(data_line('decision', {
                'field': space.leaf_at[state], 'position': k, 'chosen': decode_text(space, [outs[k]]),
                'top': top, 'lse': lse, 'kept': mass, 'of_all': (logits[outs[k]] + top - lse).exp().item(),
                'of_kept': logits.softmax(0)[outs[k]].item(),
                'of_legal': logits[legal].softmax(0)[legal.index(outs[k])].item()}))


def print_outside(shards, space):
    """prints how much of the teacher's probability is on no kept token, over the records whose logsumexp is
    stored."""
    missed = {}
    for i in range(len(shards)):
        for state, p in zip(space.states_before(shards.outs(i)), measure_kept_mass(shards, i)):
            if not np.isnan(p):
                missed.setdefault(space.leaf_at[state] or 'json', []).append(1 - p)
    mean = float(np.mean(sum(missed.values(), [])))
    print(data_line('outside', {'steps': sum(map(len, missed.values())), 'mean': mean,
                                **{field: float(np.mean(p)) for field, p in missed.items()}}))
    wanted = Counter(shards.meta.get('missing', {})).most_common(8)
    print('likeliest of those tokens:', *(repr(space.tokenizer.decode([int(token)])) for token, _ in wanted))


def print_gradient_shares(students, shards, space, rows):
    """prints the shares of near ties, other decisions and forced tokens in the gradient of the KL: sums of
    norms over the answer tokens of these records."""
    margin = measure_margins(shards, space, rows)
    kinds = {'ties': margin <= near, 'clearer': (margin > near) & (margin < np.inf),
             'forced': margin == np.inf}
    count = {kind: int(mask.sum()) for kind, mask in kinds.items()}
    text, answer, targets, teacher = shards.batch(rows)
    ce = F.cross_entropy(teacher, targets[targets >= 0]).item()  # of a student that equals its teacher
    print(data_line('tokens', {'records': len(rows), 'all': len(margin), **count, 'teacher_ce': ce}))
    for epoch, student in students.items():
        logits = student(text, answer)                          # (n, V)
        for tau in TAUS[-4:]:
            norm = gradient_norms(logits, teacher, tau)
            share = {kind: float(norm[mask].sum() / norm.sum()) for kind, mask in kinds.items()}
            print(data_line('share', {'epoch': epoch, 'tau': float(tau), **share}))


def print_answer(student, shards, space, i, rows):
    """prints the student's answer to record i, and the standard error of `field` on these records."""
    (outs, decisions), = decode(student, space, [shards.ids(i).tolist()])
    print('student:', json.dumps(space.to_json(outs)))
    confidence = confidence_of(space.schema.paths, decisions)
    print(data_line('decode', {'tokens': len(outs), 'passes': len(decisions), **confidence}))
    figures, _, answers, _ = evaluate(student, space, shards, rows)
    teacher_texts = field_texts(space, [shards.outs(n) for n in rows])
    right = same_values(field_texts(space, answers), teacher_texts).mean(1)  # (N,) share of a record's fields
    field, n = figures['field'], len(rows)
    print(data_line('error', {'records': n, 'field': field, 'by_record': float(right.std() / n ** 0.5),
                              'were_fields_independent': (field * (1 - field) / n / len(confidence)) ** 0.5}))


# -----------------------------------------------------------------------------
# pictures


def draw_record(plt, students, shards, space, i, positions):
    """draws the probabilities of the legal tokens at some positions of record i, given the teacher's tokens
    before them: the teacher's beside those of the students."""
    text, answer, targets, teacher = shards.batch([i])
    outs = targets[targets >= 0]
    logits = {'teacher': teacher} | {f'epoch {n}': student(text, answer) for n, student in students.items()}
    colors = 'black', *plt.cm.Blues(np.linspace(0.35, 0.9, len(students)))
    fig, axes = plt.subplots(len(positions), figsize=(8, 6.6))
    for ax, k in zip(axes, positions):
        state, margin = space.states_before(outs.tolist())[k], measure_margins(shards, space, [i])[k]
        legal = list(space.transitions[state])
        for n, (model, of_all) in enumerate(logits.items()):
            p = of_all[k, legal].softmax(0).tolist()
            _, kl, ce, _ = distill_loss(of_all[[k]], teacher[[k]], outs[[k]], kl_weight=1.0)
            print(data_line('bars', {'position': k, 'who': model.replace(' ', '_'), 'kl': kl.item(),
                                     'ce': ce.item(),
                                     **{decode_text(space, [o]): x for o, x in zip(legal, p)}}))
            label = f'student, {model}' if n else model
            bars = ax.bar(np.arange(len(legal)) + 0.2 * (n - 1.5), p, 0.19, label=label, color=colors[n])
            ax.bar_label(bars, fmt='%.2f', fontsize=8, padding=1)
        ax.set_xticks(range(len(legal)), [repr(decode_text(space, [o])) for o in legal])
        ax.set_title(f'{space.leaf_at[state]}: the two likeliest are {margin:.2f} logits apart', fontsize=10)
        ax.set(ylabel='probability', ylim=(0, ax.get_ylim()[1] * (1.2 if ax is axes[0] else 1.04)))
        ax.spines[['top', 'right']].set_visible(False)
    axes[0].legend(fontsize=9, frameon=False, ncols=4, loc='upper center')
    fig.suptitle(space.tokenizer.decode(shards.ids(i).tolist()))
    fig.tight_layout()
    fig.savefig(DOCS / 'how_record.png', dpi=100)


def draw_automaton(plt, space):
    """draws the states of a small schema from left to right; a run of forced tokens is one arrow."""
    x, todo, arrows = {0: 0}, [0], []                           # x: where each state is drawn
    while todo:
        state = todo.pop(0)
        branches = [([o], after) for o, after in space.transitions[state].items()]
        if len(branches) == 1:
            branches = [space.forced_runs[state]]
        for n, (outs, after) in enumerate(branches):
            bend = 0.8 * (n / (len(branches) - 1) - 0.5) if len(branches) > 1 else 0
            arrows.append((state, after, outs, bend, len(branches) > 1))
            if after not in x:
                x[after] = len(x)
                todo.append(after)
    fig, ax = plt.subplots(figsize=(10, 1.9))
    for state, after, outs, bend, choice in arrows:
        middle = (x[state] + x[after]) / 2
        ax.annotate('', (x[after], 0), (x[state], 0), arrowprops={
            'arrowstyle': '-|>', 'connectionstyle': f'arc3,rad={bend}', 'shrinkA': 15, 'shrinkB': 15,
            'color': 'tab:orange' if choice else 'grey', 'lw': 1.6})
        y, side = -bend * (x[after] - x[state]) / 2, 'top' if bend > 0 else 'bottom'
        ax.text(middle, y - 0.05 if bend > 0 else y + 0.05, decode_text(space, outs), ha='center', va=side,
                fontsize=11, family='monospace')
        if not choice:
            ax.text(middle, -0.06, f'{len(outs)} forced tokens', ha='center', va='top', fontsize=9,
                    color='grey')
    for state, at in x.items():
        choice, done = len(space.transitions[state]) > 1, state == space.done
        ax.scatter(at, 0, 650, 'orange' if choice else 'white', edgecolors='black', zorder=3)
        ax.text(at, 0, state, ha='center', va='center', zorder=4)
        under = f'{space.leaf_at[state]}?' if choice else 'done' if done else 'start' if state == 0 else ''
        ax.text(at, -0.24, under, ha='center', va='top', fontsize=10)
    ax.set(xlim=(-0.3, len(x) - 0.7), ylim=(-0.45, 0.45), aspect='equal')
    ax.axis('off')
    fig.tight_layout(pad=0.2)
    fig.savefig(DOCS / 'how_automaton.png', dpi=100)
    print(data_line('automaton', {'states': len(space.transitions), 'drawn': len(x)}))


def draw_gradient(plt, students, shards, i, positions):
    """draws the norm of the gradient of tau^2 KL_tau against tau, at two positions of record i: by autograd
    and by the formula."""
    text, answer, targets, teacher = shards.batch([i])
    outs = targets[targets >= 0]
    fig, axes = plt.subplots(1, len(students), figsize=(9, 3.6), sharey=True)
    for ax, (epoch, student) in zip(axes, students.items()):
        logits = student(text, answer).requires_grad_()         # (n, V)
        measured, formula = [], []                              # (n,) for each temperature
        for tau in TAUS:
            with torch.enable_grad():
                loss, *_ = distill_loss(logits, teacher, outs, kl_weight=1.0, temperature=tau)
            measured.append(torch.autograd.grad(loss, logits)[0].norm(dim=-1).numpy())
            formula.append(gradient_norms(logits, teacher, tau))
        measured, formula = np.array(measured)[:, positions], np.array(formula)[:, positions]
        for n, kind in enumerate(('a near tie', 'a clear case')):
            ax.plot(TAUS[:-4], measured[:-4, n], label=kind, color=f'C{n}')
            ax.plot(TAUS[:-4:4], formula[:-4:4, n], 'o', ms=4, color=f'C{n}')
        for tau, (tie, clear) in zip(TAUS[-4:], measured[-4:].tolist()):
            print(data_line('gradient', {'epoch': epoch, 'tau': float(tau), 'tie': tie, 'clear': clear}))
        print(data_line('formula', {'epoch': epoch, 'off_by': float(np.abs(measured - formula).max())}))
        ax.plot([], [], 'o', ms=4, color='grey', label=r'$\tau\,\|q_\tau - p_\tau\|$')
        ax.set(xscale='log', yscale='log', ylim=(1e-6, 4), xlabel=r'$\tau$', title=f'after epoch {epoch}')
        ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], [0.05, 0.1, 0.2, 0.5, 1, 2])
        ax.minorticks_off()
    axes[0].set_ylabel('norm of the gradient')
    axes[-1].legend(frameon=False, loc='lower right')
    fig.tight_layout()
    fig.savefig(DOCS / 'how_gradient.png', dpi=100)


if __name__ == '__main__':
    plt = start_drawing()
    if not name or not plt:
        stop('matplotlib is missing; run: pip install matplotlib' if name else
             'no task; run: python docs/pictures.py config/chitchat_270m.py')
    try:
        shards = Shards(dataset, name)
    except (FileNotFoundError, ValueError) as error:
        stop(f'{error}; run extract.py on this config')
    out, rows = Path('out', run), shards.split()[1]
    if record not in rows or np.isnan(measure_kept_mass(shards, record)).any():
        stop(f'record {record} is not held out, or its logsumexp is not stored; choose another --record')
    if train:
        train_student(out, epochs)
    students = {}
    for epoch in epochs:
        _, students[epoch], space = load_checkpoint(out / f'epoch_{epoch}', 'cpu')
    margin = measure_margins(shards, space, [record])
    decided = np.flatnonzero(margin < np.inf)
    positions = [decided[0], decided[margin[decided].argmax()]]  # the first decision, and the clearest one
    first_last = {epoch: students[epoch] for epoch in (epochs[0], epochs[-1])}
    with torch.no_grad():
        print_record(shards, space, record)
        print_outside(shards, space)
        draw_automaton(plt, OutputSpace(space.tokenizer, small))
        draw_record(plt, students, shards, space, record, positions)
        draw_gradient(plt, first_last, shards, record, positions)
        print_gradient_shares(first_last, shards, space, rows)
        print_answer(students[epochs[-1]], shards, space, record, rows)
