"""How well a student agrees with its teacher: agreement, truth, word counts beside it, calibration. No
settings, no printing.

    figures, per_field, answers, decisions = evaluate(student, space, shards, rows)

train.py calls evaluate after every epoch, evaluate.py on the finished student; extract.py prints how often the
teacher's answers are true. What the words mean: README.md and docs/results.md.
"""
import importlib.util
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from data import first_tokens, read_texts, text_hash
from distil.decode import decode

BROKEN = ''  # the value in an answer that breaks the schema: no JSON text is empty, so it agrees with nothing


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


def report_lines(step, figures, per_field, linear):
    """yields (tag, figures) of the val line and of a line per field, the linear baseline in each."""
    beside = {'linear_field': linear['field'], 'linear_exact': linear['exact']} if linear else {}
    yield 'val', {'step': step, **figures, **beside}
    for field, values in per_field.items():
        beside = {'linear': linear['fields'][field]} if linear else {}
        yield 'field', {'name': field, **values, **beside}


# -----------------------------------------------------------------------------
# beside truth, and beside word counts


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
    (balanced). truth: of read_truth. answers: {'teacher': output indices of each of these texts, ...}."""
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


def linear_model():
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
            guess = linear_model().fit(texts, known[field]).predict(held)
        right[field] = np.array([g == t for g, t in zip(guess, theirs[field])])
    return {'field': float(np.mean([r.mean() for r in right.values()])),
            'exact': float(np.all(list(right.values()), axis=0).mean()),
            'fields': {field: float(r.mean()) for field, r in right.items()}}


# -----------------------------------------------------------------------------
# calibration


def fit_temperature(decisions, right):
    """the temperature, 0.1 to 10, at which the confidence in one field's values is most likely to have come
    with these hits. decisions: per record those of the field (see decode.confidence_of); right: per record
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


def reliability_bins(sure, right, n_bins=10):
    """confidences and hits, the same shape -> [(mean confidence, share of hits, share of all)] per non-empty
    bin."""
    sure, right = np.ravel(sure), np.ravel(right)
    number = np.clip((sure * n_bins).astype(int), 0, n_bins - 1)
    return [(sure[number == b].mean(), right[number == b].mean(), (number == b).mean())
            for b in range(n_bins) if (number == b).any()]


def calibration_error(sure, right):
    """expected calibration error: how far confidence is from the share of hits, on average over bins of
    confidence. https://arxiv.org/abs/1706.04599"""
    return float(sum(abs(confidence - hits) * share for confidence, hits, share in reliability_bins(sure, right)))
