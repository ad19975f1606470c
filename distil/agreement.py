"""How well a student agrees with its teacher: agreement, truth, the linear baseline, the reliability of
its confidence. No settings, no printing.

    figures, per_field, answers, decisions = evaluate(student, space, shards, rows)

train.py calls evaluate after every epoch, tools/evaluate.py on the finished student. extract.py prints how
often the teacher's answers are true. README.md and docs/results.md define the words.
"""
import importlib.util
import json
import math
import re
from collections import Counter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

from data.lines import cut_text, read_texts, text_hash
from distil.decode import decode
from distil.reader import encode_records
from distil.schema import members, true_value
from distil.values import MISSING, json_text

BROKEN = ''  # the value in an answer that breaks the schema: no JSON text is empty, so it equals no value


def field_texts(space, answers):
    """{field: [JSON text of its value in each answer]}, BROKEN if an answer breaks the schema. answers: lists
    of output indices. JSON texts, because 1, '1' and true must differ. A field is named by the path of its leaf."""
    parsed = [space.to_json(outs) for outs in answers]
    text = lambda answer, leaf: json_text(leaf.get(answer)) if answer else BROKEN
    return {leaf.path: [text(answer, leaf) for answer in parsed] for leaf in space.schema.leaves}


def same_values(first, second):
    """two results of field_texts -> (N, fields) bool: True if the values are equal."""
    return np.array([[a == b for a, b in zip(first[field], second[field])] for field in first]).T


# -----------------------------------------------------------------------------
# agreement


def measure_agreement(student_values, teacher_values):
    """values of one field, two lists of N JSON texts -> {agree, majority, f1, kappa}: share of equal values,
    majority baseline, macro F1, Cohen's kappa (0 to 1; kappa also below).

    majority: share of the teacher's commonest value. f1 averages over the values that either of them uses.
    kappa: (agreement - chance) / (1 - chance), Cohen 1960, https://doi.org/10.1177/001316446002000104
    """
    n, theirs, ours = len(teacher_values), Counter(teacher_values), Counter(student_values)
    hits = Counter(a for a, b in zip(teacher_values, student_values) if a == b)
    chance, agree = sum(theirs[value] * ours[value] for value in theirs) / n ** 2, hits.total() / n
    f1 = [2 * hits[value] / (theirs[value] + ours[value]) for value in sorted(theirs | ours)]
    return {'agree': agree, 'majority': max(theirs.values()) / n, 'f1': float(np.mean(f1)),
            'kappa': (agree - chance) / (1 - chance) if chance < 1 else 1.0}


def measure_members(student_lists, teacher_lists):
    """values of a field that is a list, two lists of N JSON texts -> {micro_f1, f1} over their members: of all
    together, and averaged over the members that either of them uses. A member that comes twice counts twice. 1 if
    there is none."""
    hits, both = Counter(), Counter()
    for ours, theirs in zip(student_lists, teacher_lists):
        ours, theirs = Counter(members(ours)), Counter(members(theirs))
        hits += ours & theirs
        both += ours + theirs
    f1 = [2 * hits[member] / n for member, n in sorted(both.items())]
    return {'micro_f1': 2 * hits.total() / both.total() if both else 1.0, 'f1': float(np.mean(f1)) if f1 else 1.0}


def measure_words(student_values, teacher_values):
    """values of a field that is copied, two lists of N JSON texts -> {token_f1}, over the words of all values together:
    a value that is cut in another place counts for the part that it shares (as in SQuAD,
    https://arxiv.org/abs/1606.05250)."""
    hits = both = 0
    for ours, theirs in zip(student_values, teacher_values):
        ours, theirs = (Counter(re.findall(r'\w+|[^\w\s]', ' '.join(strings_in(json.loads(text or '""')))))
                        for text in (ours, theirs))
        hits, both = hits + (ours & theirs).total(), both + ours.total() + theirs.total()
    return {'token_f1': 2 * hits / both if both else 1.0}


def strings_in(value):
    """the texts and numbers of a JSON value, as texts."""
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in strings_in(part)]
    return [] if value is None else [str(value)]


def teacher_forced_sums(student, space, shards, rows, batch_size):
    """[kl, ce, hits, steps], teacher-forced, summed over the answer tokens of the records `rows`. kl and ce
    are in nats."""
    device, sums = student.lm_head.weight.device, np.zeros(4)
    encode_records(student, space, shards, rows)
    order = sorted(rows, key=lambda i: len(shards.ids(i)))      # similar lengths need little padding
    for start in range(0, len(rows), batch_size):
        batch = shards.batch(order[start:start + batch_size])
        text, answer, targets, teacher_logits = (x.to(device) for x in batch)
        logits, targets = student(text, answer).float(), targets[targets >= 0]  # (n, V), (n,)
        log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum().item()
        ce = F.nll_loss(log_q, targets, reduction='sum').item()
        hits = (logits.argmax(-1) == targets).sum().item()
        sums += kl, ce, hits, len(targets)
    return sums.tolist()


@torch.no_grad()
def evaluate(student, space, shards, rows, batch_size=64):
    """measures how well the student agrees with the teacher on records `rows` of shards (words: README.md).

    Returns figures, {field: figures}, and for each record the student's free-running answer (output indices)
    and its decisions. An answer that breaks the schema agrees in no field. If there are lists or objects in the schema,
    all but `valid` is of answers that are held to it, as those of the teacher are: left alone, a teacher writes the
    values of a list in another order, and its student learns this, too. The temperature of a field is
    fitted on the even records, so that the odd ones (Shards.is_odd) can test it.
    """
    training = student.training
    student.eval()
    kl, ce, forced_hits, steps = teacher_forced_sums(student, space, shards, rows, batch_size)
    texts = [shards.ids(i).tolist() for i in rows]
    answers, decisions = map(list, zip(*decode(student, space, texts, batch_size, constrain=False)))
    valid = [space.to_json(outs) is not None for outs in answers]
    share_valid = sum(valid) / len(rows)
    if not space.schema.is_flat:
        answers, decisions = map(list, zip(*decode(student, space, texts, batch_size)))
        valid = [True] * len(rows)
    student.train(training)

    targets = [shards.outs(i) for i in rows]
    student_values, teacher_values = field_texts(space, answers), field_texts(space, targets)
    per_field, even = {}, [n for n, odd in enumerate(shards.is_odd(rows)) if not odd and valid[n]]
    for field in space.schema.paths:
        of_field = [[d for d in decisions[n] if d[0] == field] for n in even]
        hits = [student_values[field][n] == teacher_values[field][n] for n in even]
        per_field[field] = measure_agreement(student_values[field], teacher_values[field])
        if space.schema.leaf(field).is_list:
            per_field[field] |= measure_members(student_values[field], teacher_values[field])
        if space.schema.is_copied(space.schema.leaf(field)):
            per_field[field] |= measure_words(student_values[field], teacher_values[field])
        per_field[field]['temperature'] = fit_temperature(of_field, hits)
    mean = float(np.mean([of_field['agree'] for of_field in per_field.values()]))
    majority = float(np.mean([of_field['majority'] for of_field in per_field.values()]))
    read = [shards.steps(i) for i in rows]                      # the tokens that a student writes
    free_hits = sum(a[n] == b[n] for a, b, of_row in zip(answers, targets, read) for n in of_row if n < len(a))
    figures = {'records': len(rows), 'kl': kl / steps, 'ce': ce / steps,
               'teacher_forced': forced_hits / steps, 'student_only': free_hits / steps,
               'exact': sum(outs == target for outs, target in zip(answers, targets)) / len(rows),
               'field': mean, 'majority': majority,
               'closed': (mean - majority) / (1 - majority) if majority < 1 else math.nan,
               'valid': share_valid}
    return figures, per_field, answers, decisions


def update_best(best, figures, best_by, epoch, step):
    """(what is known of the best epoch after this one, is it this one?). best: before, a dict or None; figures: of
    this epoch; best_by: key of figures.

    Of kl and ce the lowest is best. A share has a standard error: of the epochs that are less than one below the
    highest, the *last* is best. So few records cannot tell these apart, and the learning rate has been falling. (The
    one-standard-error rule of Breiman et al. 1984 for choices that measure alike.)
    """
    is_loss = best_by in ('kl', 'ce')
    value = -figures[best_by] if is_loss else figures[best_by]
    best = best or {'value': value, 'epoch': epoch}
    best = {'top': best['value'], 'top_epoch': best['epoch'], **best}  # older checkpoints have none
    if value > best['top']:
        best |= {'top': value, 'top_epoch': epoch}
    margin = 0 if is_loss else math.sqrt(best['top'] * (1 - best['top']) / figures['records'])
    is_best = not value < best['top'] - margin                  # also if it is nan
    return best | ({'value': value, 'epoch': epoch, 'step': step} if is_best else {}), is_best


def report_lines(step, figures, per_field, linear):
    """yields (tag, figures) of the val line and of a field line per field, each with the linear baseline."""
    baseline = {'linear_field': linear['field'], 'linear_exact': linear['exact']} if linear else {}
    yield 'val', {'step': step, **figures, **baseline}
    for field, values in per_field.items():
        baseline = {'linear': linear['fields'][field]} if linear else {}
        if linear and field in linear.get('micro_f1', {}):
            baseline['linear_micro_f1'] = linear['micro_f1'][field]
        yield 'field', {'name': field, **values, **baseline}


# -----------------------------------------------------------------------------
# truth and the linear baseline


def read_truth(path, shards, rows):
    """{position in rows: {field: true value}}, from the lines {"text": ..., "truth": {...}} of the .jsonl at
    path whose text, whole or cut, is one of these records."""
    tokenizer = Tokenizer.from_file(str(shards.folder / 'tokenizer.json'))
    numbers, truths = {int(shards.hashes[row]): n for n, row in enumerate(rows)}, {}
    for text, truth, _ in read_texts(path, 'truth'):
        if not isinstance(truth, dict):
            continue
        if text_hash(text) not in numbers:
            text = cut_text(text, tokenizer, shards.meta)[1]
        if text_hash(text) in numbers:
            truths[numbers[text_hash(text)]] = truth
    return truths


def truth_lines(space, truth, answers):
    """yields ('truth', figures) per field: the share of true answers of each model (under its name), and its
    average over the true values (balanced). truth: of read_truth. answers: {model, such as 'teacher': [output
    indices of its answer to each of these texts]}."""
    values_of = {model: field_texts(space, outs) for model, outs in answers.items()}
    for leaf in space.schema.leaves:
        field = leaf.path
        values = [true_value(leaf, of_text) for of_text in truth.values()]
        known = [(n, json_text(value)) for n, value in enumerate(values) if value is not MISSING]
        if not known:
            continue
        numbers, expected = map(np.array, zip(*known))
        values, counts = np.unique(expected, return_counts=True)
        figures, said = {}, lambda model: [values_of[model][field][n] for n in numbers]
        for model in answers:
            hits = np.array(values_of[model][field])[numbers] == expected
            balanced = float(np.mean([hits[expected == value].mean() for value in values]))
            key = f'{model}_balanced' if figures else 'balanced'
            figures |= {model: float(hits.mean()), key: balanced}
            if leaf.is_list:
                figures[f'{model}_micro_f1'] = measure_members(said(model), expected)['micro_f1']
        majority = counts.max() / len(expected)
        yield 'truth', {'name': field, 'records': len(expected), **figures, 'majority': majority}


def linear_models():
    """{name: TF-IDF of n-grams, to be followed by logistic regression}: of words, and of characters, for
    languages without blanks, endings and misspellings."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    common = dict(min_df=2, sublinear_tf=True)
    return {'words': TfidfVectorizer(ngram_range=(1, 2), token_pattern=r'\S+', **common),
            'characters': TfidfVectorizer(analyzer='char_wb', ngram_range=(1, 4), max_features=50000, **common)}


LINEAR_COST = 4_000_000  # records times values of a field that a linear model learns from: a minute or two


def linear_baseline(shards, space, train_rows, rows):
    """trains linear models per field on train_rows and measures their agreement on rows: a student should be
    better. Returns the figures of the better one, {field, exact, fields: {name: agreement}, ngrams: its name};
    {} if scikit-learn is missing, or if no n-gram comes twice. With hundreds of values it learns from the first
    records alone, and a note says so."""
    if not importlib.util.find_spec('sklearn'):
        return {}
    n_values = max(map(len, space.schema.leaves))
    cost = max(len(leaf) * (10 if leaf.is_list else 1) for leaf in space.schema.leaves) or 1  # a model for each member
    if len(train_rows) > (most := LINEAR_COST // cost):
        print(f'note: with {n_values} values the linear baseline learns from the first {most} records alone')
        train_rows = train_rows[:most]
    from sklearn.linear_model import LogisticRegression
    train_texts, texts = ([space.tokenizer.decode(shards.ids(i).tolist()) for i in split]
                          for split in (train_rows, rows))
    train_values, values = (field_texts(space, [shards.outs(i) for i in split])
                            for split in (train_rows, rows))
    best = {}
    for name, vectorizer in linear_models().items():
        try:
            train_x = vectorizer.fit_transform(train_texts)
        except ValueError:                                      # after pruning, no terms remain
            continue
        x, hits, micro_f1 = vectorizer.transform(texts), {}, {}

        def learn(labels):
            """labels of the training texts -> those predicted."""
            if len(set(labels)) < 2:
                return labels[:1] * len(texts)
            return LogisticRegression(max_iter=1000).fit(train_x, labels).predict(x).tolist()
        for leaf in space.schema.leaves:
            field = leaf.path
            learned = train_values[field]
            if space.schema.is_copied(leaf):                    # words of each text: it knows the commonest alone
                predicted = Counter(learned).most_common(1)[0][:1] * len(texts)
            else:
                predicted = learn_lists(learn, learned, len(texts), leaf) if leaf.is_list else learn(learned)
            hits[field] = np.array([a == b for a, b in zip(predicted, values[field])])
            if leaf.is_list:
                micro_f1[field] = measure_members(predicted, values[field])['micro_f1']
        fields = {field: float(of_field.mean()) for field, of_field in hits.items()}
        if not best or np.mean(list(fields.values())) > best['field']:
            best = {'field': float(np.mean(list(fields.values()))),
                    'exact': float(np.all(list(hits.values()), axis=0).mean()), 'fields': fields, 'ngrams': name,
                    'micro_f1': micro_f1}
    return best


def learn_lists(learn, train_lists, n, leaf):
    """the lists that one model for each member predicts, against the rest: the usual way to learn a list. train_lists:
    JSON texts; n: texts to predict; learn: function of a list of booleans that returns those predicted."""
    known = [set(members(text)) for text in train_lists]
    count = Counter(member for of_text in known for member in of_text)
    order = leaf.texts or [member for member, k in count.most_common(100) if k > 1]
    found = [[] for _ in range(n)]
    for member in filter(count.get, order):
        for of_text, is_in in zip(found, learn([member in of_text for of_text in known])):
            of_text += [json.loads(member)] * bool(is_in)
    return list(map(json_text, found))


# -----------------------------------------------------------------------------
# reliability of the confidence


def fit_temperature(decisions, hits):
    """the temperature, 0.1 to 10, at which the student's confidence in its values of one field predicts the
    hits best (cross-entropy). decisions: per record those of the field (see confidence.confidence_of); hits: per
    record, True if its value is the teacher's.

    One number per field, after https://arxiv.org/abs/1706.04599, but fitted on free-running answers: the
    probability of a value assumes that the fields before it are answered correctly, which can be wrong.
    """
    used = [n for n, of_record in enumerate(decisions) if of_record]
    if not used:
        return 1.0
    flat = [(k, logits, choice) for k, n in enumerate(used) for _, logits, choice in decisions[n]]
    record, logits, choice = zip(*flat)
    record, choice = torch.tensor(record), torch.tensor(choice)  # (n,), (n,)
    logits = nn.utils.rnn.pad_sequence(logits, True, -math.inf)  # (n, V), or (n, V + 1 + T): texts differ in length
    hit = torch.tensor([float(hits[n]) for n in used])
    grid = torch.logspace(-1, 1, 81)
    losses = []
    for t in grid:
        log_p = (logits / t).log_softmax(-1).gather(1, choice[:, None])[:, 0]
        p = torch.zeros(len(used)).index_add(0, record, log_p).exp()  # the product along a value's tokens
        losses.append(F.binary_cross_entropy(p.clamp(1e-6, 1 - 1e-6), hit))
    return grid[torch.stack(losses).argmin()].item()


def reliability_bins(confidence, hits, n_bins=10):
    """confidence (0 to 1) and hits (bool), of the same shape -> [(mean confidence, share of hits, share of
    all values)] per bin that is not empty."""
    confidence, hits = np.ravel(confidence), np.ravel(hits)
    number = np.clip((confidence * n_bins).astype(int), 0, n_bins - 1)
    return [(confidence[number == b].mean(), hits[number == b].mean(), (number == b).mean())
            for b in range(n_bins) if (number == b).any()]


def calibration_error(confidence, hits):
    """expected calibration error: the difference between confidence and share of hits, averaged over bins of
    confidence. https://arxiv.org/abs/1706.04599"""
    bins = reliability_bins(confidence, hits)
    return float(sum(abs(mean - share_of_hits) * weight for mean, share_of_hits, weight in bins))
