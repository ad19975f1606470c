"""What a training tells at its end: the picture out/<run>/report.png (losses, curriculum, agreement, reliability,
confusion; without matplotlib nothing is drawn), and what 8 bits would cost its student.
"""
import importlib.util
import logging
import warnings
from collections import Counter
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from config import data_line, read_data_line
from config.machine import whole_file
from data.lines import cut_text, read_texts, text_hash
from distil.agreement import evaluate, field_texts, reliability_bins, same_values
from distil.checkpoint import checkpoint_path, load_checkpoint, read_checkpoint, save_checkpoint
from distil.confidence import confidence_of
from distil.decode import generate
from distil.int8 import find_peaks, linears, to_int8
from distil.schema import members
from distil.space import clean
from distil.values import said


SCRIPTS = 'CJK', 'Gothic', 'YaHei', 'Hiragino', 'PingFang', 'Devanagari'  # in names of fonts of other scripts


def start_drawing():
    """returns matplotlib.pyplot, set to draw without a screen, or None if matplotlib is not installed. Values in
    scripts that its own font lacks are drawn with the fonts of this machine; without one they are boxes."""
    if not importlib.util.find_spec('matplotlib'):
        return None
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcParams['text.parse_math'] = False              # a $ in a name is a $
    import matplotlib.font_manager
    import matplotlib.pyplot
    names = sorted({font.name for font in matplotlib.font_manager.fontManager.ttflist})
    matplotlib.rcParams['font.family'] = ['DejaVu Sans', *(n for n in names if any(script in n for script in SCRIPTS))]
    warnings.filterwarnings('ignore', 'Glyph')
    logging.getLogger('matplotlib.font_manager').setLevel(logging.ERROR)
    return matplotlib.pyplot


def save_picture(plt, fig, path):
    """writes a figure to a file. Exits with a message if it cannot be written."""
    fig.tight_layout()
    with whole_file(path, 'all figures are complete, only the picture is missing') as tmp:
        fig.savefig(tmp, dpi=80, format='png')
    plt.close(fig)


def draw_log(axes, log):
    """draws losses, curriculum and held-out agreement over the steps on three axes. log: lines of log.txt."""
    lines = [read_data_line(line) for line in log]

    def draw_curve(ax, tag, key, style='-', label=None, of_peak=False):
        points = [(int(f['step']), float(f[key])) for t, f in lines if t == tag and key in f]
        if points:  # a run may be shorter than log_steps, or have no linear baseline
            steps, values = np.array(points).T
            ax.plot(steps, values / values.max() if of_peak else values, style, label=label or key)

    for key in ('loss', 'kl', 'ce'):
        draw_curve(axes[0], 'train', key)
    draw_curve(axes[0], 'val', 'kl', 'k.--', 'held-out kl')
    draw_curve(axes[1], 'train', 'kl_weight', label='kl weight')
    draw_curve(axes[1], 'train', 'tau', label='temperature')
    draw_curve(axes[1], 'train', 'lr', label='learning rate / peak', of_peak=True)
    for key in ('field', 'exact', 'majority', 'linear_field', 'teacher_forced'):
        draw_curve(axes[2], 'val', key, '.-')
    draw_curve(axes[2], 'train', 'teacher_forced', ':', 'teacher_forced in training')
    axes[0].set(title='nats per answer token', yscale='log', xlabel='step')
    axes[0].yaxis.set_major_formatter('{x:g}')              # its own has mathematics in it, which is switched off
    axes[0].yaxis.set_minor_formatter('')
    axes[1].set(title='curriculum', xlabel='step', ylim=(0, None))
    axes[2].set(title='agreement', xlabel='step')


def draw_members(ax, leaf, student_lists, teacher_lists):
    """draws how often each member is in a list, at most twelve, by the teacher and by the student."""
    counts = [Counter(text for value in lists for text in members(value)) for lists in (teacher_lists, student_lists)]
    names = [text for text, _ in counts[0].most_common(12)][::-1]
    for count, label, shift in zip(counts, ('teacher', 'student'), (0.2, -0.2)):
        ax.barh(np.arange(len(names)) + shift, [count[name] / max(1, len(teacher_lists)) for name in names], 0.4,
                label=label)
    ax.set_yticks(range(len(names)), [name[:30] for name in names], fontsize=7)
    ax.set(title=leaf.path, xlabel='members per text')
    ax.legend(fontsize=7)


def draw_confusion(ax, leaf, student_values, teacher_values):
    """draws the confusion matrix of a leaf: teacher's values (rows), student's (columns), at most twelve; of one that
    is copied the commonest. Both: JSON texts of its value in each answer."""
    names = list(leaf.texts[:12]) or [text for text, _ in Counter(teacher_values).most_common(12)]
    table = np.zeros((len(names), len(names)))
    for row, column in zip(teacher_values, student_values):
        if row in names and column in names:
            table[names.index(row), names.index(column)] += 1
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    ax.imshow(share, vmin=0, vmax=1, cmap='Blues')
    for i, j in np.ndindex(table.shape):
        ax.text(j, i, int(table[i, j]), ha='center', va='center', fontsize=8,
                color='white' if share[i, j] > 0.5 else 'black')
    ax.set(title=leaf.path, xlabel='student', ylabel='teacher')
    shown = list(map(said, leaf.values[:12])) or [name[:20] for name in names]
    ax.set_xticks(range(len(shown)), shown, rotation=45, fontsize=7)
    ax.set_yticks(range(len(shown)), shown, fontsize=7)


def draw_report(out, shards, rows, dtype='float32', which='best'):
    """writes out/report.png: the training, agreement per field with its baselines, a reliability diagram and
    the confusion matrix of every field, on the held-out records `rows`. Returns its path, or None without
    matplotlib or without a log."""
    plt = start_drawing()
    if not plt or not (out / 'log.txt').is_file():
        return None
    checkpoint, student, space = load_checkpoint(out, 'cpu', which, dtype)
    _, per_field, answers, decisions = evaluate(student, space, shards, rows)
    student_values = field_texts(space, answers)
    teacher_values = field_texts(space, [shards.outs(i) for i in rows])
    n = max(3, len(per_field))
    fig, axes = plt.subplots(3, n, figsize=(4 * n, 10), squeeze=False)
    draw_log(axes[0], (out / 'log.txt').read_text(encoding='utf-8').splitlines())

    bars = {'majority': [figures['majority'] for figures in per_field.values()]}
    if checkpoint['linear']:
        bars['linear'] = [checkpoint['linear']['fields'][field] for field in per_field]
    bars['student'] = [figures['agree'] for figures in per_field.values()]
    x = np.arange(len(per_field))
    for k, (key, heights) in enumerate(bars.items()):
        axes[1, 0].bar(x + 0.25 * (k - 1), heights, 0.25, label=key)
    axes[1, 0].set(title='agreement per field', ylim=(max(0, min(bars['majority']) - 0.1), 1))
    axes[1, 0].set_xticks(x, per_field)

    temperature = {field: figures['temperature'] for field, figures in checkpoint['per_field'].items()}
    odd = np.flatnonzero(shards.is_odd(rows))                   # temperatures are fitted on the even ones
    confidence = [list(confidence_of(space.schema.paths, decisions[n], temperature).values()) for n in odd]
    points = reliability_bins(confidence, same_values(student_values, teacher_values)[odd])
    axes[1, 1].plot([0, 1], [0, 1], 'k:')
    axes[1, 1].scatter([p[0] for p in points], [p[1] for p in points], s=[20 + 400 * p[2] for p in points])
    axes[1, 1].set(title='reliability', xlabel='confidence of the student',
                   ylabel='share equal to the teacher')
    for ax in (*axes[0, :3], axes[1, 0]):
        if ax.get_legend_handles_labels()[0]:                   # a run of a few steps has no line yet
            ax.legend(fontsize=7, ncols=3, loc='upper center', bbox_to_anchor=(0.5, -0.2), frameon=False)  # below
    for k, leaf in enumerate(space.schema.leaves):
        draw = draw_members if leaf.is_list else draw_confusion
        draw(axes[2, k], leaf, student_values[leaf.path], teacher_values[leaf.path])
    for ax in axes.flat:
        if not ax.has_data():
            ax.axis('off')
    save_picture(plt, fig, out / 'report.png')
    return out / 'report.png'


# -----------------------------------------------------------------------------
# what 8 bits would cost


def measure_int8(student, space, texts):
    """answers texts, lists of ids, in float32 and in 8 bits -> {texts: how many, equal_8: share of the fields that
    stay the same, equal_7: with weights of 7 bits, peaks: of find_peaks}; None for a student without an encoder. The
    student is as before."""
    if not (student.encoder and texts):
        return None
    answers, plain = [], linears(student)
    peaks = find_peaks(student, lambda: answers.extend(generate(student, space, texts)))
    values, found = field_texts(space, answers), {'texts': len(texts)}
    for bits in (8, 7):
        to_int8(student, peaks, bits, kernel=False)
        changed = field_texts(space, generate(student, space, texts))
        found[f'equal_{bits}'] = float(same_values(values, changed).mean())
        for block, attribute, layer in plain.values():
            setattr(block, attribute, layer)
    return found | {'peaks': peaks}


def unlabelled(path, shards):
    """yields the texts, as lists of ids, of the .jsonl at path that no record has."""
    tokenizer, known = Tokenizer.from_file(str(shards.folder / 'tokenizer.json')), {*shards.hashes.tolist()}
    for text, *_ in read_texts(path) if path.is_file() else ():
        ids, text = cut_text(clean(text), tokenizer, shards.meta)
        if ids and text_hash(text) not in known:
            yield ids


def store_int8(folder, shards, rows, device, n=1000):
    """measures what 8 bits cost the best student of a folder on n texts, held-out records and then texts without
    labels, and stores it in the checkpoint, see measure_int8. Prints a data line, if the student has an encoder."""
    _, student, space = load_checkpoint(folder, device)
    texts = [shards.ids(i).tolist() for i in rows[:n]]
    texts += islice(unlabelled(shards.folder.parent / 'input.jsonl', shards), n - len(texts))
    if found := measure_int8(student, space, texts):
        path = checkpoint_path(folder)
        save_checkpoint(path, read_checkpoint(path, 'cpu') | {'int8': found})
        print(data_line('int8', {key: value for key, value in found.items() if key != 'peaks'}))
