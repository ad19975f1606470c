"""A picture of a training run: out/<name>/report.png. Needs matplotlib; train.py draws it at the end where that is installed.

    python report.py out/demo
"""
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from data import Shards
from evaluate import data_line, evaluate
from model import generate
from sample import load_checkpoint


@torch.no_grad()
def reliability(model, space, shards, rows, n_bins=10):
    """per answer token that the schema does not force: how sure the student is of its choice, and whether it is the teacher's.
    Returns mean confidence, share right and number of tokens of each non-empty bin."""
    sure, right = [], []
    for i in rows:
        idx, targets, _ = shards.batch([i], model.config.start_id)
        p, choice = model(idx, targets).float().softmax(-1).max(-1)
        free = space.forced[space.states(shards.answer(i).tolist())] < 0
        sure += p[free].tolist()
        right += (choice == targets[targets >= 0])[free].tolist()
    sure, right = np.array(sure), np.array(right)
    bins = np.clip((sure * n_bins).astype(int), 0, n_bins - 1)
    return [(sure[bins == b].mean(), right[bins == b].mean(), (bins == b).sum()) for b in range(n_bins) if (bins == b).any()]


def draw(out, shards, rows):
    """writes out/report.png: losses and schedule over the steps, figures over the epochs, agreement per field beside its baselines,
    a reliability diagram and the confusion of every field."""
    checkpoint, model, space = load_checkpoint(out, 'cpu')
    lines = [(line.split()[0], dict(f.split('=') for f in line.split()[1:])) for line in (out / 'log.txt').read_text().splitlines()]
    column = lambda tag, key: [float(f[key]) for t, f in lines if t == tag]
    rows = rows[:500]
    _, per_field, answers = evaluate(model, space, shards, rows)
    n = max(3, len(per_field))
    fig, axes = plt.subplots(3, n, figsize=(4 * n, 10), squeeze=False)
    for key in ('loss', 'kl', 'ce'):
        axes[0, 0].plot(column('train', 'step'), column('train', key), label=key)
    axes[0, 0].plot(column('val', 'step'), column('val', 'kl'), 'k.--', label='held-out kl')
    axes[0, 0].set(title='nats per answer token', yscale='log', xlabel='step')
    axes[0, 1].plot(column('train', 'step'), column('train', 'kl_weight'), label='kl weight')
    axes[0, 1].plot(column('train', 'step'), column('train', 'tau'), label='temperature')
    axes[0, 1].plot(column('train', 'step'), np.array(column('train', 'lr')) / max(column('train', 'lr')), label='learning rate / peak')
    axes[0, 1].set(title='curriculum', xlabel='step', ylim=(0, None))
    for key in ('field', 'exact', 'majority', 'linear_field'):
        if all(key in f for t, f in lines if t == 'val'):
            axes[0, 2].plot(column('val', 'step'), column('val', key), '.-', label=key)
    axes[0, 2].set(title='held-out agreement', xlabel='step')
    x, bars = np.arange(len(per_field)), {'majority': [f['majority'] for f in per_field.values()], 'student': [f['agree'] for f in per_field.values()]}
    if checkpoint['linear']:
        bars['linear'] = [checkpoint['linear']['fields'][field] for field in per_field]
    for k, key in enumerate(('majority', 'linear', 'student')):
        if key in bars:
            axes[1, 0].bar(x + 0.25 * (k - 1), bars[key], 0.25, label=key)
    axes[1, 0].set(title='agreement per field', ylim=(min(bars['majority']) - 0.1, 1))
    axes[1, 0].set_xticks(x, per_field)
    points = reliability(model, space, shards, rows)
    axes[1, 1].plot([0, 1], [0, 1], 'k:')
    axes[1, 1].scatter(*zip(*[p[:2] for p in points]), s=[20 + 200 * p[2] / max(q[2] for q in points) for p in points])
    axes[1, 1].set(title='reliability of decisions', xlabel='confidence of the student', ylabel='share equal to the teacher')
    for ax in (*axes[0, :3], axes[1, 0]):
        ax.legend(fontsize=8)
    theirs = [space.to_json(shards.answer(i).tolist()) for i in rows]
    ours = [space.to_json(a) for a in answers]
    for k, (field, values) in enumerate(space.fields.items()):
        names = [json.dumps(v, ensure_ascii=False) for v in values][:12]
        table = np.zeros((len(names), len(names)))
        for a, b in zip(ours, theirs):
            pair = [json.dumps(o and o[field], ensure_ascii=False) for o in (b, a)]
            if all(p in names for p in pair):
                table[names.index(pair[0]), names.index(pair[1])] += 1
        axes[2, k].imshow(table / np.maximum(table.sum(1, keepdims=True), 1), vmin=0, vmax=1, cmap='Blues')
        for i, j in np.ndindex(table.shape):
            axes[2, k].text(j, i, int(table[i, j]), ha='center', va='center', fontsize=8)
        axes[2, k].set(title=field, xlabel='student', ylabel='teacher')
        axes[2, k].set_xticks(range(len(names)), names, rotation=45, fontsize=7)
        axes[2, k].set_yticks(range(len(names)), names, fontsize=7)
    for ax in axes.flat:
        if not ax.has_data():
            ax.axis('off')
    fig.tight_layout()
    fig.savefig(out / 'report.png', dpi=80)
    plt.close(fig)


def compare_runs(folders, device, say, rounds=5):
    """says a table of students (one 'student' line each) and writes out/compare.png: agreement against speed. The figures are those
    of each one's training; the speed is measured now, in alternating rounds, on the same number of its own held-out texts."""
    runs, times = [], []
    for folder in folders:
        checkpoint, model, space = load_checkpoint(folder, device)
        try:
            shards = Shards(checkpoint['config']['dataset'], checkpoint['config']['name'])
        except FileNotFoundError as error:
            sys.exit(f'{error}: {folder} cannot be timed without held-out texts')
        runs.append((folder, checkpoint, model, space, [shards.ids(i).tolist() for i in shards.split()[1][:128]]))
    for _ in range(rounds + 1):
        times.append([])
        for _, _, model, space, texts in runs:
            for some, batch in ((texts, 64), (texts[:32], 1)):
                start = time.perf_counter()
                generate(model, space, some, True, batch)
                times[-1].append((time.perf_counter() - start) / len(some))
    times = np.median(times[1:], axis=0).reshape(-1, 2)  # the first round warms up
    fig, ax = plt.subplots(figsize=(7, 5))
    for (folder, checkpoint, model, _, _), (throughput, latency) in zip(runs, times):
        params, figures = model.count_params(), checkpoint['figures']
        path = folder / 'best.pt' if (folder / 'best.pt').exists() else folder / 'ckpt.pt'
        say(data_line('student', {'run': folder.name, 'params_m': params['total'] / 1e6, 'without_embedding_m': (params['total'] - params['embedding']) / 1e6,
                                  **{key: figures[key] for key in ('records', 'field', 'majority', 'exact', 'kl')}, 'rec_s': 1 / throughput,
                                  'latency_ms': latency * 1e3, 'disk_mb': path.stat().st_size / 1e6}))
        ax.scatter(1 / throughput, figures['field'])
        ax.annotate(folder.name, (1 / throughput, figures['field']), xytext=(5, 5), textcoords='offset points')
    ax.set(xlabel='records/s in batches of 64', ylabel='field agreement with the teacher', xscale='log')
    fig.tight_layout()
    fig.savefig('out/compare.png', dpi=80)
    plt.close(fig)
    say('out/compare.png shows them')


if __name__ == '__main__':
    if len(sys.argv) != 2 or not Path(sys.argv[1], 'log.txt').is_file():
        sys.exit('which run? python report.py out/<name>')
    folder = Path(sys.argv[1])
    config = load_checkpoint(folder, 'cpu')[0]['config']
    shards = Shards(config['dataset'], config['name'])
    draw(folder, shards, shards.split()[1])
    print(f'{folder}/report.png')
