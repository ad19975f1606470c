"""How well a student agrees with its teacher on held-out records, how well it knows that, and the yardsticks beside it."""
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

from data import read_texts, text_hash
from model import decode


def data_line(tag, figures):
    """<tag> key=value ...; floats to four figures."""
    return ' '.join([tag, *(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in figures.items())])


# -----------------------------------------------------------------------------
# agreement


def agreement(ours, theirs):
    """two equally long lists of values of one field -> agreement, majority, macro f1, Cohen's kappa (0 to 1; kappa below).

    majority: share of the commonest value among theirs. f1 averages over the values that either side uses.
    kappa: (agreement - chance) / (1 - chance), Cohen 1960, https://doi.org/10.1177/001316446002000104
    """
    ours, theirs = ([json.dumps(v) for v in values] for values in (ours, theirs))
    values, n = sorted({*ours, *theirs}), len(theirs)
    table = np.zeros((len(values), len(values)))  # [teacher, student]
    np.add.at(table, ([values.index(v) for v in theirs], [values.index(v) for v in ours]), 1)
    hit, rows, columns = table.diagonal(), table.sum(1), table.sum(0)
    chance = (rows * columns).sum() / n ** 2
    agree = hit.sum() / n
    figures = {'agree': agree, 'majority': rows.max() / n, 'f1': (2 * hit / (rows + columns)).mean(),
               'kappa': (agree - chance) / (1 - chance) if chance < 1 else 1.0}
    return {key: float(value) for key, value in figures.items()}  # plain numbers: they go into checkpoints


@torch.no_grad()
def evaluate(model, space, shards, rows, batch_size=64):
    """How well the student agrees with the teacher on records `rows` of shards (words: README.md).

    Returns (figures, per field figures, the student's free-running answers as output indices). An answer that breaks the
    schema agrees in no field. The temperature of a field is fitted on the even rows, so that the odd ones can judge it.
    """
    training, device = model.training, model.lm_head.weight.device
    model.eval()
    kl = ce = hits = steps = 0
    order = sorted(range(len(rows)), key=lambda i: len(shards.ids(rows[i])))  # texts of like length pad little
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in order[start:start + batch_size]]
        idx, targets, teacher_logits = (x.to(device) for x in shards.batch(batch, model.config.start_id))
        logits, targets = model(idx, targets).float(), targets[targets >= 0]
        log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        ce += F.nll_loss(log_q, targets, reduction='sum').item()
        hits += (logits.argmax(-1) == targets).sum().item()
        steps += len(targets)
    texts = (shards.ids(i).tolist() for i in rows)
    answers, decisions = map(list, zip(*decode(model, space, lambda wait: next(texts), batch_size, constrain=False)))
    model.train(training)

    targets = [shards.answer(i).tolist() for i in rows]
    ours, theirs = [space.to_json(a) for a in answers], [space.to_json(t) for t in targets]
    per_field = {f: agreement([o and o[f] for o in ours], [t[f] for t in theirs]) for f in space.fields}
    even = [i for i, row in enumerate(rows) if row % 2 == 0 and ours[i]]
    for f, values in per_field.items():
        values['temperature'] = fit_temperature([[d for d in decisions[i] if d[0] == f] for i in even], [json.dumps(ours[i][f]) == json.dumps(theirs[i][f]) for i in even])
    field, majority = (float(np.mean([v[key] for v in per_field.values()])) for key in ('agree', 'majority'))
    figures = {
        'records': len(rows), 'kl': kl / steps, 'ce': ce / steps, 'teacher_forced': hits / steps,
        'student_only': sum(a == b for x, y in zip(answers, targets) for a, b in zip(x, y)) / steps,
        'exact': sum(a == t for a, t in zip(answers, targets)) / len(rows),  # tokens: to Python true is 1
        'field': field, 'majority': majority, 'closed': (field - majority) / (1 - majority) if majority < 1 else math.nan,
        'valid': sum(o is not None for o in ours) / len(rows)}
    return figures, per_field, answers


def truth_lines(path, space, shards, rows, answers):
    """where texts of the .jsonl at path carry the truth, {"text": ..., "truth": {field: value}}: yields per field how often the
    teacher and the student say it. rows: held-out records; answers: the student's, as output indices. Texts that were cut are not found."""
    place, said = {int(hash_): n for n, hash_ in enumerate(shards.hashes[rows])}, {field: [] for field in space.fields}
    for text, truth, _ in read_texts(path, 'truth'):
        if not isinstance(truth, dict) or (n := place.get(text_hash(text))) is None:
            continue
        teacher, student = space.to_json(shards.answer(rows[n]).tolist()), space.to_json(answers[n]) or {}
        for field in said.keys() & truth:
            said[field].append([json.dumps(answer.get(field)) == json.dumps(truth[field]) for answer in (teacher, student)])
    for field, pairs in said.items():
        if pairs:
            teacher, student = np.mean(pairs, axis=0)
            yield 'truth', {'name': field, 'records': len(pairs), 'teacher': float(teacher), 'student': float(student)}


def linear_baseline(shards, space, train_rows, rows):
    """What a linear model learns from the same records, as the yardstick of whether a student is worth it: TF-IDF of words and
    pairs of words, logistic regression per field. {} where scikit-learn is missing, else field, exact and fields: {name: agreement}."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        return {}
    texts, held = ([space.tokenizer.decode(shards.ids(i).tolist()) for i in r] for r in (train_rows, rows))
    labels, truth = ([space.to_json(shards.answer(i).tolist()) for i in r] for r in (train_rows, rows))
    right = {}
    for field in space.fields:
        known = [json.dumps(a[field]) for a in labels]
        guess = known[:1] * len(held)
        if len(set(known)) > 1:
            pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r'\S+'), LogisticRegression(max_iter=1000))
            guess = pipeline.fit(texts, known).predict(held)
        right[field] = np.array([g == json.dumps(a[field]) for g, a in zip(guess, truth)])
    return {'field': float(np.mean([r.mean() for r in right.values()])), 'exact': float(np.all(list(right.values()), axis=0).mean()),
            'fields': {field: float(r.mean()) for field, r in right.items()}}


def report_lines(step, figures, per_field, linear):
    """yields (tag, figures) of the val line and of a line per field, the linear baseline in each."""
    yield 'val', {'step': step} | figures | {f'linear_{key}': linear[key] for key in ('field', 'exact') if linear}
    for field, values in per_field.items():
        yield 'field', {'name': field} | values | ({'linear': linear['fields'][field]} if linear else {})


# -----------------------------------------------------------------------------
# doubt


def fit_temperature(decisions, right):
    """the temperature, 0.1 to 10, at which the confidence in one field's values is most likely to have come with these hits.
    decisions: per record those of the field (see model.confidence); right: per record whether its value is the teacher's.

    One number per field, after https://arxiv.org/abs/1706.04599, but fitted on the student's own answers: its probabilities are those
    of a value given the fields it has answered before, and do not know that those can be wrong.
    """
    rows = [i for i, d in enumerate(decisions) if d]
    if not rows:
        return 1.0
    record = torch.tensor([n for n, i in enumerate(rows) for _ in decisions[i]])
    logits, choice = torch.stack([z for i in rows for _, z, _ in decisions[i]]), torch.tensor([c for i in rows for *_, c in decisions[i]])
    hit, grid = torch.tensor([float(right[i]) for i in rows]), torch.logspace(-1, 1, 81)
    losses = []
    for t in grid:
        log_p = (logits / t).log_softmax(-1).gather(1, choice[:, None])[:, 0]
        p = torch.zeros(len(rows)).index_add(0, record, log_p).exp().clamp(1e-6, 1 - 1e-6)
        losses.append(F.binary_cross_entropy(p, hit))
    return grid[torch.stack(losses).argmin()].item()


def calibration_error(sure, right, n_bins=10):
    """confidences and hits, the same shape -> expected calibration error: how far confidence is from the share of hits, on
    average over bins of confidence. https://arxiv.org/abs/1706.04599"""
    sure, right = np.ravel(sure), np.ravel(right)
    bins = np.clip((sure * n_bins).astype(int), 0, n_bins - 1)
    return float(sum(abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in range(n_bins) if (bins == b).any()))


def cascade(sure, right, shares=(0, 0.05, 0.1, 0.2, 0.3, 0.5)):
    """what becomes of the agreement when the records with the least sure field go to the teacher: yields
    {deferred, min_confidence, field, exact, kept_field}. sure, right (N, fields); kept_field: of the student's own records."""
    least = sure.min(1)
    order = np.argsort(least, kind='stable')
    for share in shares:
        n = round(share * len(order))
        mixed = right.copy()
        mixed[order[:n]] = True
        yield {'deferred': n / len(order), 'min_confidence': float(least[order[n]]) if n < len(order) else 1.0, 'field': float(mixed.mean()),
               'exact': float(mixed.all(1).mean()), 'kept_field': float(right[order[n:]].mean()) if n < len(order) else 1.0}
