"""Records from labels that exist already: from people, from a panel, from the log of an API.

    python extract.py config/tweets.py                      # it sets labels = 'data/tweets/input.jsonl'
    python extract.py config/mine.py --labels=mine.jsonl
    python extract.py config/mine.py --labels=log.jsonl     # what an LLM answered: data/logs.py has the forms
    python extract.py config/mine.py --labels=output.jsonl,requests.jsonl  # of a batch: joined by custom_id
    python extract.py config/email.py                       # labels of one field; a teacher answers the others

No teacher is run, only its tokenizer is needed. But where label_fields names the fields that the labels have, the
teacher answers the others, with the labels of these in its answer. A line has the probability of each value, or
the answer:

    {"text": "...", "probabilities": {"sentiment": {"positive": 0.7, "neutral": 0.2, "negative": 0.1}}}
    {"text": "...", "answer": {"sentiment": "positive"}}

or is a call to an LLM. Its probabilities are used if it has the answer's log probabilities. Several labels of
one text are averaged, also those of a request with n > 1.

The stored logits are those of a teacher with exactly these probabilities: at each decision, the probability
of a token is the sum over the values that it leads to. Only each field's own (marginal) probabilities are
known, so a field is assumed to be independent of the fields before it.
"""
import json
import math
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from config import split_paths, stop
from config.machine import RANK
from data import Shards, text_hash
from data.calls import read_replies
from data.logs import Log
from data.objects import fill_missing, find_object, same_value
from data.templates import check_template
from distil.answers import label_from_answer
from distil.prompts import prompt_text
from distil.space import check_fields, clean, value_names

ILLEGAL_LOGIT = -30.0   # logit of a token that the schema forbids: a probability of 1e-13
MIN_PROBABILITY = 1e-6  # smallest probability of a legal token


def read_value(name, value, values):
    """the probabilities of a field's values if one of them is the label: a list of 0 and 1. ValueError if it is
    none of them."""
    try:
        found = same_value(value, values)
    except ValueError:
        shown = ', '.join(json.dumps(other, ensure_ascii=False) for other in values)
        raise ValueError(f'{name} is {json.dumps(value, ensure_ascii=False)[:80]}, not one of {shown[:200]}') from None
    return [float(other is found) for other in values]


def read_weights(name, weights, values):
    """the probabilities of a field's values, in their order: a list with sum 1. weights: {value: weight >= 0}.
    ValueError if that is not what it is."""
    names = value_names(values)
    for key, weight in weights.items():
        if key not in names:
            raise ValueError(f'{name} has a probability of {key!r}, which is not one of {", ".join(names)[:200]}')
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            raise ValueError(f'{name}: {weight!r} is not the probability of {key!r}')
    if not (total := sum(weights.values())):
        raise ValueError(f'{name} has no probability above 0')
    return [weights.get(key, 0) / total for key in names]


def read_label(fields, label):
    """{field: probabilities of its values, in their order} of a label, a dict with "probabilities" or "answer".
    If a field is in both, its probabilities are used; if an answer lacks a field that may be null, it is null.
    ValueError, which names the field, if one is missing or has a value that the schema does not have."""
    answer, weights = ({} if label.get(part) is None else label[part] for part in ('answer', 'probabilities'))
    if not isinstance(answer, dict) or not isinstance(weights, dict):
        raise ValueError('its answer is not an object with a value for each field')
    answer, probabilities = answer if label.get('answer') is None else fill_missing(fields, answer), {}
    for name, values in fields.items():
        known = weights.get(name, answer.get(name, ''))
        if len(values) == 1:                                    # a constant
            probabilities[name] = [1.0]
        elif name not in weights and name not in answer:
            raise ValueError(f'it has no {name}')
        elif name in weights and isinstance(known, dict):
            probabilities[name] = read_weights(name, known, values)
        else:
            probabilities[name] = read_value(name, known, values)
    return probabilities


def label_shares(space, label, fields=None):
    """({field: probabilities of its values}, {state: {output index: probability}} at the decisions of these fields)
    of a label, a dict. fields: {name: values} of those that it has; None: all. ValueError if one is missing or
    has a value that the schema does not have."""
    probabilities, shares = read_label(fields or space.fields, label), {}
    for name in probabilities:
        shares |= space.token_shares(name, probabilities[name])
    return probabilities, shares


def logits_of(shares, V):
    """{output index: probability} -> logits (V,) float32."""
    row = np.full(V, ILLEGAL_LOGIT, np.float32)
    for token, p in shares.items():
        row[token] = math.log(max(p, MIN_PROBABILITY))
    return row


def find_known(space, labels, meta):
    """for each label {state: logits (V,), a tensor} at the decisions of the fields in meta['label_fields'], for
    engine.answer. None if there are no such fields."""
    fields, V = {name: space.fields[name] for name in meta.get('label_fields') or ()}, len(space.output_ids)
    if not fields:
        return None
    shares = (label_shares(space, label, fields)[1] for label in labels)
    return [{state: torch.from_numpy(logits_of(row, V)) for state, row in of_label.items()} for of_label in shares]


def record_from_label(space, label):
    """a label as dict -> output indices (n,) of its most probable answer, and logits (n, V) float32. None if a
    field is missing or has a value that the schema does not have."""
    try:
        probabilities, shares = label_shares(space, label)
    except ValueError:
        return None
    outs = space.from_json({name: values[int(np.argmax(probabilities[name]))]
                            for name, values in space.fields.items()})
    rows = [shares.get(state, {out: 1.0}) for state, out in zip(space.states_before(outs), outs)]
    return outs, np.stack([logits_of(row, len(space.output_ids)) for row in rows])


# -----------------------------------------------------------------------------
# files


def read_text(line):
    """the text of a line (data.logs.Line). ValueError(reason, what is wrong) if it has none."""
    if line.problem:
        raise ValueError(*line.problem)
    record = line.record if isinstance(line.record, dict) else {}
    text = line.text if line.reply is not None else record.get('text')
    if not isinstance(text, str):
        raise ValueError('bad_json', 'it has no text')
    if not (text := clean(text)):
        raise ValueError('empty', 'its text is empty')
    try:
        text.encode()
    except UnicodeError:
        raise ValueError('bad_utf8', 'its text has half a character') from None
    return text


class Labels:
    """the labelled texts of some files. Each iteration yields (text, label, '') or ('', None, reason) for each
    line, as data.read_texts does.

    paths: files of labelled texts and of calls to an LLM. template, prompt: see data.logs.Log. The labels of a
    text that comes several times are averaged; `conflicting` counts those with another answer than the first
    one. Keeps the labels in memory, not the texts. problems: {reason: [which line, and what is wrong with it]}.
    """

    def __init__(self, paths, fields, template='', prompt=''):
        self.log, self.fields, self.problems = Log(paths, template, prompt), fields, {}
        self.outcomes = []      # of each line: '', or the reason why it has no record; None for the input of a batch
        self.known = {}         # {hash of a text: (mean probabilities of all values, labels, the first best answer)}
        for line in self.log:
            try:
                hash_, answers = text_hash(read_text(line)), self.read_labels(line)
            except ValueError as error:
                reason, what = error.args
                if reason == 'request':                         # of a batch: its output has the label
                    self.outcomes.append(None)
                    continue
                self.problems.setdefault(reason, []).append(line.say(what))
                self.outcomes.append(reason)
                continue
            self.outcomes.append(self.add_label(hash_, answers[0]))
            for probabilities in answers[1:]:                   # of one request
                self.add_label(hash_, probabilities)

    def add_label(self, hash_, probabilities):
        """adds a label, {field: probabilities}, to those of a text. Returns '' if it is the first one, 'duplicate' if
        its best answer is that of the first one, else 'conflicting'."""
        p = np.concatenate([*probabilities.values()], dtype=np.float32)
        best = [int(np.argmax(of_field)) for of_field in probabilities.values()]
        mean, n, first = self.known.get(hash_, (p, 0, best))
        self.known[hash_] = mean + (p - mean) / (n + 1), n + 1, first
        return '' if not n else 'duplicate' if best == first else 'conflicting'

    def __iter__(self):
        for line, outcome in zip(self.log, self.outcomes):
            if outcome:
                yield '', None, outcome
            elif outcome == '':
                text = read_text(line)
                yield text, self.label_of(text_hash(text)), ''

    def label_of(self, hash_):
        """the label of a text, the mean of all that it has."""
        ends = np.cumsum([len(values) for values in self.fields.values()])
        parts = np.split(self.known[hash_][0], ends[:-1])
        return {'probabilities': {name: dict(zip(value_names(values), part.tolist()))
                                  for (name, values), part in zip(self.fields.items(), parts)}}

    def read_labels(self, line):
        """[{field: probabilities}] of a line: one, or one for each of the answers to a request with n > 1.
        ValueError(reason, what is wrong) if it has none."""
        try:
            answers = None if line.reply is None else read_replies(line.reply)
        except ValueError as error:                             # such as an error of the server
            raise ValueError('unusable', str(error)) from None
        found, wrong = [], []
        for answer in [None] if answers is None else answers:
            try:
                found.append(read_label(self.fields, line.record) if answer is None else self.read_answer(*answer))
            except ValueError as error:
                wrong.append(str(error))
        if not found:
            raise ValueError('dropped_invalid', wrong[0])
        if wrong:                                               # the others are used
            self.problems.setdefault('dropped_invalid', []).append(
                line.say(f'{len(wrong)} of {len(answers)} answers are left out: {wrong[0]}'))
        return found

    def read_answer(self, content, tokens):
        """{field: probabilities} of an answer of an LLM. ValueError if it breaks the schema."""
        label, (answer, _) = label_from_answer(self.fields, content, tokens)[0], find_object(content)
        if answer is None:
            raise ValueError(f'its answer has no JSON object: {content[:80]!r}')
        return read_label(self.fields, label or {'answer': answer})

    def count_changed(self, shards, space):
        """number of the records in shards whose label differs now from the stored one."""
        n_changed = 0
        for i, hash_ in enumerate(map(int, shards.hashes)):
            if hash_ in self.known:
                _, shares = label_shares(space, self.label_of(hash_), self.fields)
                rows = zip(space.states_before(shards.answer(i).tolist()), shards.logits(i))
                rows = [(stored, logits_of(shares[state], len(stored))) for state, stored in rows if state in shares]
                n_changed += not all(np.allclose(stored, row - row.max(), atol=0.05) for stored, row in rows)
        return n_changed


def open_labels(config):
    """the Labels of extract.py's settings. Prints the template of a log, and which lines cannot be used. Exits
    with a message if the files cannot be read."""
    paths = split_paths(config['labels'])
    for path in paths:
        if not Path(path).is_file():
            maker = Path(path).parent / 'prepare.py'
            advice = f'; run: python {os.path.relpath(maker)}' if maker.is_file() else ''
            stop(f'{path} is not a file' if Path(path).exists() else f'{path} does not exist{advice}')
    try:
        check_template(config['template'] or '{text}')
    except ValueError as error:
        stop(f'the template {error}')
    try:
        check_fields(config['fields'])
        fields = {name: config['fields'][name] for name in config['label_fields'] or config['fields']}
        labels = Labels(paths, fields, config['template'], prompt_text(config['prompt']))
    except ValueError as error:
        stop(f'fields: {error}')
    except (OSError, EOFError, zlib.error) as error:
        stop(f'{config["labels"]} cannot be read: {error}')
    if RANK == 0:
        labels.log.print_template()
        for reason, lines in labels.problems.items():
            if reason != 'empty':
                print('\n'.join(lines[:3]) + (f'\n... and {len(lines) - 3} more' if len(lines) > 3 else ''))
        if labels.log.n_unanswered:
            print(f'{labels.log.n_unanswered} requests of the batch have no output')
    return labels


def print_changed(labels, dataset, name, space):
    """prints how many stored texts have another label now, if there are any. labels: None if none are given."""
    if labels and RANK == 0:
        with suppress(FileNotFoundError):
            if n := labels.count_changed(Shards(dataset, name), space):
                print(f'another label now: {n} of the stored texts, which keep the old one; to learn the new ones, '
                      'choose another name')
