"""How well a student agrees with its teacher on held-out records, how well it knows that, and whether it is
worth it.

    python evaluate.py config/demo.py  # examples side by side, figures, cost, a picture
    python evaluate.py config/demo.py --examples=40
    python evaluate.py --compare=out/demo,out/other  # students side by side: a table, and out/compare.png

Reads out/<name>/ and the held-out tenth of data/<dataset>/<name>-*; writes out/<name>/report.png where
matplotlib is installed. What the words mean: README.md and docs/results.md. train.py calls the same functions
after every epoch.
"""
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from config import configure, pick_device, stop
from data import Shards, first_tokens, read_texts, text_hash
from sample import checkpoint_path, confidence_of, decode, generate, load_checkpoint, note_changes

name = ''            # word; data/<dataset>/<name>-* has the held-out records
dataset = ''         # word
run = ''             # word; out/<run> is the student; '': out/<name>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
examples = 8         # 0..; held-out texts shown
# doubt
target_agreement = 0.0  # 0..1; find the lowest min_confidence at which the answers that are kept agree as a
                        # whole at least so often, with 95 % certainty, and store it in the student. 0: do not
# savings
hour_price = 1.0     # 0..; of the machine that runs teacher and student, in any currency
teacher_price = 0.0  # 0..; of a million calls, where it is bought by the call; 0: what its hours cost
calls_per_day = 100_000  # 1..
# instead
compare = ''         # folders of runs, parted by commas: a table of them, and out/compare.png
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of a large student's layers, as in sample.py
# of the config file, to say so where the student was trained with others
fields = {}
prompt = ''
config = configure(globals())

BROKEN = ''  # the value in an answer that breaks the schema: no JSON text is empty, so it agrees with nothing


def data_line(tag, figures):
    """<tag> key=value ...; floats to four figures."""
    pairs = (f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in figures.items())
    return ' '.join([tag, *pairs])


def field_texts(space, answers):
    """{field: the JSON text of its value in each answer}; answers: lists of output indices. As texts 1, '1'
    and true differ; BROKEN where an answer breaks the schema."""
    parsed = [space.to_json(outs) for outs in answers]
    text = lambda answer, field: json.dumps(answer[field]) if answer else BROKEN
    return {field: [text(answer, field) for answer in parsed] for field in space.fields}


def same_values(ours, theirs):
    """two results of field_texts -> (N, fields) bool: where they are the same."""
    return np.array([[a == b for a, b in zip(ours[field], theirs[field])] for field in ours]).T


# -----------------------------------------------------------------------------
# agreement


def agreement(ours, theirs):
    """two equally long lists of JSON texts, the student's and the teacher's values of one field -> agreement,
    majority, macro f1, Cohen's kappa (0 to 1; kappa also below).

    majority: share of the commonest value among theirs. f1 averages over the values that either side uses.
    kappa: (agreement - chance) / (1 - chance), Cohen 1960, https://doi.org/10.1177/001316446002000104
    """
    values, n = sorted({*ours, *theirs}), len(theirs)
    table = np.zeros((len(values), len(values)))                # [teacher, student]
    np.add.at(table, ([values.index(v) for v in theirs], [values.index(v) for v in ours]), 1)
    hit, rows, columns = table.diagonal(), table.sum(1), table.sum(0)
    chance = (rows * columns).sum() / n ** 2
    agree = hit.sum() / n
    figures = {'agree': agree, 'majority': rows.max() / n, 'f1': (2 * hit / (rows + columns)).mean(),
               'kappa': (agree - chance) / (1 - chance) if chance < 1 else 1.0}
    return {key: float(value) for key, value in figures.items()}  # plain numbers: they go into checkpoints


def teacher_forced_sums(student, shards, rows, batch_size):
    """kl, ce, hits and steps summed over the answer tokens of these records, each given the teacher's tokens
    before."""
    device, sums = student.lm_head.weight.device, np.zeros(4)
    order = sorted(rows, key=lambda i: len(shards.ids(i)))      # texts of like length pad little
    for start in range(0, len(rows), batch_size):
        batch = shards.batch(order[start:start + batch_size], student.config.start)
        idx, targets, teacher_logits = (x.to(device) for x in batch)
        logits, targets = student(idx, targets).float(), targets[targets >= 0]  # (n, V), (n,)
        log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum().item()
        ce = F.nll_loss(log_q, targets, reduction='sum').item()
        hits = (logits.argmax(-1) == targets).sum().item()
        sums += kl, ce, hits, len(targets)
    return sums.tolist()


@torch.no_grad()
def evaluate(student, space, shards, rows, batch_size=64):
    """How well the student agrees with the teacher on records `rows` of shards (words: README.md).

    Returns figures, {field: figures}, and of each record the student's free-running answer as output indices
    and its decisions. An answer that breaks the schema agrees in no field. The temperature of a field is
    fitted on the even record numbers, so that the odd ones can judge it.
    """
    training = student.training
    student.eval()
    kl, ce, hits, steps = teacher_forced_sums(student, shards, rows, batch_size)
    texts = (shards.ids(i).tolist() for i in rows)
    answers, decisions = map(list, zip(*decode(student, space, texts, batch_size, constrain=False)))
    student.train(training)

    targets = [shards.answer(i).tolist() for i in rows]
    ours, theirs = field_texts(space, answers), field_texts(space, targets)
    whole = [space.to_json(outs) is not None for outs in answers]
    per_field = {}
    for field in space.fields:
        even = [n for n, i in enumerate(rows) if i % 2 == 0 and whole[n]]
        of_field = [[d for d in decisions[n] if d[0] == field] for n in even]
        right = [ours[field][n] == theirs[field][n] for n in even]
        per_field[field] = agreement(ours[field], theirs[field])
        per_field[field]['temperature'] = fit_temperature(of_field, right)
    mean = float(np.mean([of_field['agree'] for of_field in per_field.values()]))
    majority = float(np.mean([of_field['majority'] for of_field in per_field.values()]))
    same = sum(a == b for outs, target in zip(answers, targets) for a, b in zip(outs, target))
    figures = {'records': len(rows), 'kl': kl / steps, 'ce': ce / steps, 'teacher_forced': hits / steps,
               'student_only': same / steps,
               'exact': sum(outs == target for outs, target in zip(answers, targets)) / len(rows),
               'field': mean, 'majority': majority,
               'closed': (mean - majority) / (1 - majority) if majority < 1 else math.nan,
               'valid': sum(whole) / len(rows)}
    return figures, per_field, answers, decisions


def read_truth(path, shards, rows):
    """{number in rows: {field: value}} of the texts of the .jsonl at path that carry the truth, {"text": ...,
    "truth": {...}}, and are among these records, whole or cut."""
    tokenizer = Tokenizer.from_file(str(shards.folder / 'tokenizer.json'))
    numbers, found = {int(shards.hashes[row]): n for n, row in enumerate(rows)}, {}
    for text, truth, _ in read_texts(path, 'truth'):
        if not isinstance(truth, dict):
            continue
        if text_hash(text) not in numbers:
            encoding = tokenizer.encode(text, add_special_tokens=False)
            text = first_tokens(text, encoding, shards.meta['max_text'])[1]
        if text_hash(text) in numbers:
            found[numbers[text_hash(text)]] = truth
    return found


def truth_lines(space, truth, answers):
    """yields per field how often the answers are right, in all (the name) and on average over the true values
    (balanced). truth: of read_truth. answers: {'teacher': list of output indices of each of these texts, ...}.
    """
    said = {who: field_texts(space, outs) for who, outs in answers.items()}
    for field in space.fields:
        known = [(n, json.dumps(of_text[field]))
                 for n, of_text in enumerate(truth.values()) if field in of_text]
        if not known:
            continue
        numbers, due = map(np.array, zip(*known))
        values, counts = np.unique(due, return_counts=True)
        figures = {}
        for who in answers:
            right = np.array(said[who][field])[numbers] == due
            balanced = float(np.mean([right[due == value].mean() for value in values]))
            figures |= {who: float(right.mean()), 'balanced' if not figures else f'{who}_balanced': balanced}
        yield 'truth', {'name': field, 'records': len(due), **figures, 'majority': counts.max() / len(due)}


def word_counts():
    """an untrained linear model of texts: TF-IDF of words and pairs of words, logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r'\S+')
    return make_pipeline(words, LogisticRegression(max_iter=1000))


def linear_baseline(shards, space, train_rows, rows):
    """What a linear model learns from the same records, as the yardstick of whether a student is worth it:
    word_counts per field. {} where scikit-learn is missing, else field, exact and fields: {name:
    agreement}."""
    if not importlib.util.find_spec('sklearn'):
        return {}
    texts, held = ([space.tokenizer.decode(shards.ids(i).tolist()) for i in some]
                   for some in (train_rows, rows))
    known, theirs = (field_texts(space, [shards.answer(i).tolist() for i in some])
                     for some in (train_rows, rows))
    right = {}
    for field in space.fields:
        guess = known[field][:1] * len(held)
        if len(set(known[field])) > 1:
            guess = word_counts().fit(texts, known[field]).predict(held)
        right[field] = np.array([g == t for g, t in zip(guess, theirs[field])])
    return {'field': float(np.mean([r.mean() for r in right.values()])),
            'exact': float(np.all(list(right.values()), axis=0).mean()),
            'fields': {field: float(r.mean()) for field, r in right.items()}}


def report_lines(step, figures, per_field, linear):
    """yields (tag, figures) of the val line and of a line per field, the linear baseline in each."""
    beside = {'linear_field': linear['field'], 'linear_exact': linear['exact']} if linear else {}
    yield 'val', {'step': step, **figures, **beside}
    for field, values in per_field.items():
        beside = {'linear': linear['fields'][field]} if linear else {}
        yield 'field', {'name': field, **values, **beside}


# -----------------------------------------------------------------------------
# doubt


def fit_temperature(decisions, right):
    """the temperature, 0.1 to 10, at which the confidence in one field's values is most likely to have come
    with these hits. decisions: per record those of the field (see sample.confidence_of); right: per record
    whether its value is the teacher's.

    One number per field, after https://arxiv.org/abs/1706.04599, but fitted on the student's own answers: its
    probabilities are of a value given the fields it has answered before, and do not know that those can be
    wrong.
    """
    some = [n for n, of_record in enumerate(decisions) if of_record]
    if not some:
        return 1.0
    flat = [(k, logits, choice) for k, n in enumerate(some) for _, logits, choice in decisions[n]]
    record, logits, choice = zip(*flat)
    record, choice = torch.tensor(record), torch.tensor(choice)  # (n,), (n,)
    logits = torch.stack(logits)                                # (n, V)
    hit, grid = torch.tensor([float(right[n]) for n in some]), torch.logspace(-1, 1, 81)
    losses = []
    for t in grid:
        log_p = (logits / t).log_softmax(-1).gather(1, choice[:, None])[:, 0]
        p = torch.zeros(len(some)).index_add(0, record, log_p).exp()  # the product along a value's tokens
        losses.append(F.binary_cross_entropy(p.clamp(1e-6, 1 - 1e-6), hit))
    return grid[torch.stack(losses).argmin()].item()


def bins_of(sure, right, n_bins=10):
    """confidences and hits, the same shape -> [(mean confidence, share of hits, share of all)] per non-empty
    bin."""
    sure, right = np.ravel(sure), np.ravel(right)
    number = np.clip((sure * n_bins).astype(int), 0, n_bins - 1)
    return [(sure[number == b].mean(), right[number == b].mean(), (number == b).mean())
            for b in range(n_bins) if (number == b).any()]


def calibration_error(sure, right):
    """expected calibration error: how far confidence is from the share of hits, on average over bins of
    confidence. https://arxiv.org/abs/1706.04599"""
    return float(sum(abs(confidence - hits) * share for confidence, hits, share in bins_of(sure, right)))


def cascade(sure, right, shares=(0, 0.05, 0.1, 0.2, 0.3, 0.5)):
    """what becomes of the agreement when the records with the least sure field go to the teacher: yields
    {deferred, min_confidence, field, exact, kept_field}. sure, right (N, fields); kept_field: of the
    student's own."""
    least = sure.min(1)                                         # (N,)
    order = np.argsort(least, kind='stable')
    for share in shares:
        n = round(share * len(order))
        mixed, kept = right.copy(), order[n:]
        mixed[order[:n]] = True
        yield {'deferred': n / len(order), 'min_confidence': float(least[kept[0]]) if len(kept) else 1.0,
               'field': float(mixed.mean()), 'exact': float(mixed.all(1).mean()),
               'kept_field': float(right[kept].mean()) if len(kept) else 1.0}


def at_least(hits, n, doubt=0.05):
    """the share of hits that n trials with so many hits show with 95 % certainty: the lower end of the
    one-sided interval of Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404"""
    low, high = 0.0, hits / n if n else 0.0
    k = np.arange(hits, n + 1)
    ways = math.lgamma(n + 1) - np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in k])
    for _ in range(40):  # bisection: at `low` so many hits or more are too rare
        p = (low + high) / 2
        if not 0 < p < 1:
            break
        rare = np.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p)).sum() < doubt
        low, high = (p, high) if rare else (low, p)
    return low


def find_target(sure, right, target):
    """the lowest confidence at which the records that are kept agree as a whole in a share of `target`, for
    sure (see at_least): {agreement, min_confidence, kept, agree, at_least}, or None. sure, right (N,
    fields)."""
    least, whole = sure.min(1), right.all(1)                    # (N,) each
    for threshold in np.unique(least):
        kept = least >= threshold
        bound = at_least(int(whole[kept].sum()), int(kept.sum()))
        if bound >= target:
            return {'agreement': target, 'min_confidence': float(threshold), 'kept': float(kept.mean()),
                    'agree': float(whole[kept].mean()), 'at_least': bound}
    return None


def store_target(folder, which, target):
    """writes it into the checkpoint, which is whole before and after."""
    path = checkpoint_path(folder, which)
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    try:
        torch.save(checkpoint | {'target': target}, path.with_suffix('.tmp'))
        os.replace(path.with_suffix('.tmp'), path)
    except (OSError, RuntimeError) as error:
        stop(f'cannot write to {folder}: {str(error).splitlines()[0]}; the student is as it was')


def cost(work, student_rec_s, hour_price, teacher_price, calls_per_day):
    """when a student has paid for itself. work: {extract_hours, train_hours, teacher_rec_s}. Prices are per
    million calls; break_even is in calls, inf where a call of the student saves nothing, nan where the
    teacher was not timed."""
    million = lambda rec_s: 1e6 / rec_s / 3600 * hour_price
    teacher_million, student_million = teacher_price or million(work['teacher_rec_s']), million(student_rec_s)
    spent = (work['extract_hours'] + work['train_hours']) * hour_price
    saved = teacher_million - student_million
    calls = spent / saved * 1e6 if saved > 0 else math.inf
    return {**work, 'student_rec_s': student_rec_s, 'teacher_million': teacher_million,
            'student_million': student_million, 'spent': spent, 'break_even': calls,
            'days': calls / calls_per_day}


# -----------------------------------------------------------------------------
# pictures


def start_drawing():
    """matplotlib.pyplot without a screen, or None where matplotlib is not installed: pictures are
    optional."""
    if not importlib.util.find_spec('matplotlib'):
        return None
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw_log(axes, log):
    """three axes: losses, curriculum and held-out agreement over the steps. log: the lines of log.txt."""
    lines = [(line.split()[0], dict(pair.split('=') for pair in line.split()[1:])) for line in log]

    def curve(ax, tag, key, style='-', label=None, of_peak=False):
        points = [(int(f['step']), float(f[key])) for t, f in lines if t == tag and key in f]
        if points:  # a run may be shorter than log_steps, or without a linear baseline
            steps, values = np.array(points).T
            ax.plot(steps, values / values.max() if of_peak else values, style, label=label or key)

    for key in ('loss', 'kl', 'ce'):
        curve(axes[0], 'train', key)
    curve(axes[0], 'val', 'kl', 'k.--', 'held-out kl')
    curve(axes[1], 'train', 'kl_weight', label='kl weight')
    curve(axes[1], 'train', 'tau', label='temperature')
    curve(axes[1], 'train', 'lr', label='learning rate / peak', of_peak=True)
    for key in ('field', 'exact', 'majority', 'linear_field', 'teacher_forced'):
        curve(axes[2], 'val', key, '.-')
    curve(axes[2], 'train', 'teacher_forced', ':', 'teacher_forced in training')
    axes[0].set(title='nats per answer token', yscale='log', xlabel='step')
    axes[1].set(title='curriculum', xlabel='step', ylim=(0, None))
    axes[2].set(title='agreement', xlabel='step')


def draw_confusion(ax, field, values, ours, theirs):
    """how often the teacher's value (down) became which of the student's (across); at most twelve values."""
    names = [json.dumps(value) for value in values][:12]
    table = np.zeros((len(names), len(names)))
    for a, b in zip(theirs, ours):
        if a in names and b in names:
            table[names.index(a), names.index(b)] += 1
    ax.imshow(table / np.maximum(table.sum(1, keepdims=True), 1), vmin=0, vmax=1, cmap='Blues')
    for i, j in np.ndindex(table.shape):
        ax.text(j, i, int(table[i, j]), ha='center', va='center', fontsize=8)
    ax.set(title=field, xlabel='student', ylabel='teacher')
    ax.set_xticks(range(len(names)), names, rotation=45, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)


def draw(out, shards, rows, dtype='float32'):
    """writes out/report.png: the training, agreement per field beside its baselines, a reliability diagram
    and the confusion of every field, on these held-out records. Returns its path, or None without matplotlib
    or a log."""
    plt = start_drawing()
    if not plt or not (out / 'log.txt').is_file():
        return None
    checkpoint, student, space = load_checkpoint(out, 'cpu', dtype=dtype)
    _, per_field, answers, decisions = evaluate(student, space, shards, rows)
    ours, theirs = field_texts(space, answers), field_texts(space, [shards.answer(i).tolist() for i in rows])
    n = max(3, len(per_field))
    fig, axes = plt.subplots(3, n, figsize=(4 * n, 10), squeeze=False)
    draw_log(axes[0], (out / 'log.txt').read_text().splitlines())

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
    odd = [n for n, i in enumerate(rows) if i % 2]              # temperatures were fitted on the even ones
    sure = [list(confidence_of(space.fields, decisions[n], temperature).values()) for n in odd]
    points = bins_of(sure, same_values(ours, theirs)[odd])
    axes[1, 1].plot([0, 1], [0, 1], 'k:')
    axes[1, 1].scatter([p[0] for p in points], [p[1] for p in points], s=[20 + 400 * p[2] for p in points])
    axes[1, 1].set(title='reliability', xlabel='confidence of the student',
                   ylabel='share equal to the teacher')
    for ax in (*axes[0, :3], axes[1, 0]):
        ax.legend(fontsize=7, framealpha=0.5)
    for k, (field, values) in enumerate(space.fields.items()):
        draw_confusion(axes[2, k], field, values, ours[field], theirs[field])
    for ax in axes.flat:
        if not ax.has_data():
            ax.axis('off')
    fig.tight_layout()
    fig.savefig(out / 'report.png', dpi=80)
    plt.close(fig)
    return out / 'report.png'


def compare_runs(folders, device, dtype, rounds=5):
    """prints a table of students (one 'student' line each) and writes out/compare.png: agreement against
    speed. The figures are those of each one's training; the speed is measured now, in alternating rounds, on
    the same number of its own held-out texts."""
    runs, times = [], []
    for folder in folders:
        checkpoint, student, space = load_checkpoint(folder, device, dtype=dtype)
        task = checkpoint['config']
        shards = find_shards(task['dataset'], task['name'], checkpoint['task'])
        if not shards:
            stop(f'{folder} cannot be timed: its held-out texts are not here')
        texts = [shards.ids(i).tolist() for i in shards.split()[1][:128]]
        runs.append((folder, checkpoint, student, space, texts))
    for _ in range(rounds + 1):
        times.append([])
        for *_, student, space, texts in runs:
            for some, batch_size in ((texts, 64), (texts[:32], 1)):
                start = time.perf_counter()
                generate(student, space, some, True, batch_size)
                times[-1].append((time.perf_counter() - start) / len(some))
    times = np.median(times[1:], axis=0).reshape(-1, 2).tolist()  # the first round warms up
    plt, points = start_drawing(), []
    for (folder, checkpoint, student, *_), (throughput, latency) in zip(runs, times):
        params, figures = student.count_params(), checkpoint['figures']
        path = folder / 'best.pt' if (folder / 'best.pt').exists() else folder / 'ckpt.pt'
        points.append((folder.name, 1 / throughput, figures['field']))
        print(data_line('student', {
            'run': folder.name, 'params_m': params['total'] / 1e6,
            'without_embedding_m': (params['total'] - params['embedding']) / 1e6,
            **{key: figures[key] for key in ('records', 'field', 'majority', 'exact', 'kl')},
            'rec_s': 1 / throughput, 'latency_ms': latency * 1e3, 'disk_mb': path.stat().st_size / 1e6}))
    if not plt:
        return
    fig, ax = plt.subplots(figsize=(7, 5))
    for label, rec_s, field in points:
        ax.scatter(rec_s, field)
        ax.annotate(label, (rec_s, field), xytext=(5, 5), textcoords='offset points')
    ax.set(xlabel='records/s in batches of 64', ylabel='field agreement with the teacher', xscale='log')
    fig.tight_layout()
    fig.savefig('out/compare.png', dpi=80)
    print('out/compare.png shows them')


# -----------------------------------------------------------------------------
# main


def find_shards(dataset, name, task):
    """the Shards a student was trained on, or None where they are not here."""
    try:
        shards = Shards(dataset, name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        stop(str(error))
    if any(shards.meta[key] != task[key] for key in ('tokenizer_hash', 'output_ids')):
        stop(f'{shards.folder} and this student have different tokenizers or output vocabularies; '
             'train again')
    return shards


def print_examples(space, shards, rows, answers, n):
    """prints n texts, the values of teacher and student side by side; < marks where they differ."""
    def values(outs):
        answer = space.to_json(outs)
        return [str(value) for value in answer.values()] if answer else ['(not JSON)'] * len(space.fields)
    some = list(zip(rows, answers))[:n]
    pairs = [(values(shards.answer(i).tolist()), values(outs)) for i, outs in some]
    widths = [max(map(len, column)) for column in zip(space.fields, *(row for pair in pairs for row in pair))]
    print(' ' * 10, *(name.ljust(width + 1) for name, width in zip(space.fields, widths)))
    for (i, _), (theirs, ours) in zip(some, pairs):
        print(space.tokenizer.decode(shards.ids(i).tolist()))
        print('   teacher', *(value.ljust(width + 1) for value, width in zip(theirs, widths)))
        marked = [value + '<' * (value != due) for value, due in zip(ours, theirs)]
        print('   student', *(value.ljust(width + 1) for value, width in zip(marked, widths)))


def print_in_words(figures, linear, money):
    """prints what the figures say: how often the student agrees, beside simpler ways, and how fast it is."""
    of_100 = lambda share: f'{100 * share:.0f}'
    line = (f'the student agrees with its teacher in {of_100(figures["field"])} of 100 fields; always saying '
            f'the commonest value would in {of_100(figures["majority"])}')
    if linear:
        line += (f', counting words in {of_100(linear["field"])}. Whole answers: {of_100(figures["exact"])}, '
                 f'counting words {of_100(linear["exact"])}')
    print(line)
    line = f'it answers {money["student_rec_s"]:,.0f} texts a second here'
    if money['teacher_rec_s'] > 0:
        line += f', its teacher {money["teacher_rec_s"]:,.0f}'
    print(line)


def print_doubt_and_cost(checkpoint, student, space, shards, rows, free_answers, batch_size, *prices):
    """prints how well the student knows what it does not know, what a cascade gives, and when it has paid for
    itself. prices: the last arguments of cost. Returns that cost, and of the odd records how sure the student
    is and whether its value is the teacher's, (N, fields) each."""
    start = time.perf_counter()
    held, decisions = zip(*decode(student, space, (shards.ids(i).tolist() for i in rows), batch_size))
    money = cost(checkpoint['work'], len(rows) / (time.perf_counter() - start), *prices)
    odd = [n for n, i in enumerate(rows) if i % 2]              # temperatures were fitted on the even ones
    ours = field_texts(space, [held[n] for n in odd])
    theirs = field_texts(space, [shards.answer(rows[n]).tolist() for n in odd])
    right = same_values(ours, theirs)
    temperature = {field: figures['temperature'] for field, figures in checkpoint['per_field'].items()}
    before, sure = (np.array([list(confidence_of(space.fields, decisions[n], t).values()) for n in odd])
                    for t in (None, temperature))
    differs = float(np.mean([a != b for a, b in zip(held, free_answers)]))
    print(data_line('calibration', {'records': len(odd), 'ece_before': calibration_error(before, right),
                                    'ece_after': calibration_error(sure, right), 'free_differs': differs}))
    points = list(cascade(sure, right))
    for point in points:
        million = money['student_million'] + point['deferred'] * money['teacher_million']
        print(data_line('cascade', point | {'million': million}))
    if max(point['kept_field'] for point in points[1:]) <= points[0]['kept_field']:
        print('where it is surest no more fields agree than anywhere: its confidence is of no use yet')
    print(data_line('cost', money))
    if money['break_even'] == math.inf:
        print('at these prices a call of the student is no cheaper than one of the teacher: keep the teacher')
    return money, sure, right


def set_target(folder, which, sure, right, target):
    """finds, prints and stores the threshold for an agreement; see find_target."""
    found = find_target(sure, right, target)
    store_target(folder, which, found)
    if found:
        print(data_line('target', found))
        print('stored in the student: sample.py takes --min_confidence=target')
    else:
        print(f'no threshold keeps records that agree in {target:g} for sure: more held-out records, a lower '
              'target or a better student')


if __name__ == '__main__':
    if not name and not compare:
        stop('no task; run: python evaluate.py config/demo.py')
    device = pick_device(device)
    if compare:
        sys.exit(compare_runs([Path(folder) for folder in compare.split(',')], device, dtype))
    out = Path('out', run or name)
    checkpoint, student, space = load_checkpoint(out, device, which, dtype)
    note_changes(checkpoint['task'], fields, prompt)
    shards = find_shards(dataset, name, checkpoint['task'])
    if not shards:
        print('no held-out records here; these figures are from the end of training')
        for line in report_lines(*(checkpoint[key] for key in ('step', 'figures', 'per_field', 'linear'))):
            print(data_line(*line))
        sys.exit()
    rows = shards.split()[1]
    if (out / 'ckpt.pt').exists():  # it knows how long the whole training took
        last = torch.load(out / 'ckpt.pt', map_location='cpu', weights_only=True, mmap=True)
        checkpoint['work'] = last['work']
    figures, per_field, answers, _ = evaluate(student, space, shards, rows, sample_batch)
    for line in report_lines(checkpoint['step'], figures, per_field, checkpoint['linear']):
        print(data_line(*line))
    source = Path('data', dataset, 'input.jsonl')
    if source.is_file():
        truth = read_truth(source, shards, rows)
        theirs = [shards.answer(rows[n]).tolist() for n in truth]
        for line in truth_lines(space, truth, {'teacher': theirs, 'student': [answers[n] for n in truth]}):
            print(data_line(*line))
    money, sure, right = print_doubt_and_cost(checkpoint, student, space, shards, rows, answers, sample_batch,
                                              hour_price, teacher_price, calls_per_day)
    if target_agreement:
        set_target(out, which, sure, right, target_agreement)
    print_examples(space, shards, rows, answers, examples)
    print_in_words(figures, checkpoint['linear'], money)
    if picture := draw(out, shards, rows[:500], dtype):
        print(f'{picture} shows the training, the fields, the confidence and the confusions')
