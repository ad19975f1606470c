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

distil/shares.py makes logits of the probabilities.
"""
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from config import split_paths, stop
from config.machine import RANK
from data import Shards
from data.lines import text_hash
from data.calls import read_replies
from data.logs import Log
from data.objects import find_object
from data.templates import check_template
from distil import options
from distil.answers import label_from_answer
from distil.prompts import prompt_text
from distil.schema import Schema
from distil.values import json_text
from distil.shares import best_answer, logits_of

def read_text(line):
    """the text of a line (data.logs.Line). ValueError(reason, what is wrong) if it has none."""
    if line.problem:
        raise ValueError(*line.problem)
    record = line.record if isinstance(line.record, dict) else {}
    text = line.text if line.reply is not None else record.get('text')
    if not isinstance(text, str):
        raise ValueError('bad_json', 'it has no text')
    try:
        text = options.read_text({**record, 'text': text} | ({'options': line.options} if line.options else {}))
    except ValueError as error:
        raise ValueError('bad_json', str(error)) from None
    if not text:
        raise ValueError('empty', 'its text is empty')
    try:
        text.encode()
    except UnicodeError:
        raise ValueError('bad_utf8', 'its text has half a character') from None
    return text


class Labels:
    """the labelled texts of some files. Each iteration yields (text, label, '') or ('', None, reason) for each
    line, as data.lines.read_texts does.

    paths: files of labelled texts and of calls to an LLM. template, prompt: see data.logs.Log. The labels of a
    text that comes several times are averaged; `conflicting` counts those with another answer than the first
    one. Keeps the labels in memory, not the texts. problems: {reason: [which line, and what is wrong with it]}.
    """

    def __init__(self, paths, schema, template='', prompt=''):
        self.log, self.schema, self.problems = Log(paths, template, prompt), schema, {}
        self.log.given = [*dict.fromkeys(part.of for part in schema.copied if part.is_option)]
        self.outcomes = []      # of each line: '', or the reason why it has no record; None for the input of a batch
        # {hash of a text: (mean probabilities of all values, labels, the first's best answer, and its copied values)}
        self.known = {}
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
            self.outcomes.append(self.add_label(hash_, *answers[0]))
            for answer in answers[1:]:                          # of one request
                self.add_label(hash_, *answer)

    def add_label(self, hash_, probabilities, answer):
        """adds a label, {path of a choice: probabilities}, to those of a text; answer: with its copied values, if there
        are any: then the first label counts alone. Returns '' if it is the first one, 'duplicate' if its best answer is
        that of the first one, else 'conflicting'."""
        p = np.concatenate([[], *probabilities.values()], dtype=np.float32)
        best = json_text(answer or best_answer(self.schema, probabilities))
        mean, n, first, answer = self.known.get(hash_, (p, 0, best, answer))
        self.known[hash_] = mean if answer else mean + (p - mean) / (n + 1), n + 1, first, answer
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
        choices = self.schema.choices
        parts = np.split(self.known[hash_][0], np.cumsum([len(choice) for choice in choices])[:-1])
        probabilities = {choice.path: part for choice, part in zip(choices, parts)}
        return self.schema.write_label(probabilities, self.known[hash_][3])

    def read_labels(self, line):
        """[({path of a choice: probabilities}, see add_label)] of a line: one, or one for each of the answers to a
        request with n > 1. ValueError(reason, what is wrong) if it has none."""
        try:
            answers = None if line.reply is None else read_replies(line.reply)
        except ValueError as error:                             # such as an error of the server
            raise ValueError('unusable', str(error)) from None
        found, wrong = [], []
        for answer in [None] if answers is None else answers:
            try:
                found.append(self.read_label(line.record) if answer is None else self.read_answer(*answer))
            except ValueError as error:
                wrong.append(str(error))
        if not found:
            raise ValueError('dropped_invalid', wrong[0])
        if wrong:                                               # the others are used
            self.problems.setdefault('dropped_invalid', []).append(
                line.say(f'{len(wrong)} of {len(answers)} answers are left out: {wrong[0]}'))
        return found

    def read_label(self, label):
        """(probabilities, answer), see add_label, of a label."""
        probabilities = self.schema.read_label(label)
        return probabilities, self.schema.canonical(label['answer']) if self.schema.copied else None

    def read_answer(self, content, tokens):
        """the same of an answer of an LLM. ValueError if it breaks the schema."""
        label, (answer, _) = label_from_answer(self.schema, content, tokens)[0], find_object(content)
        if answer is None:
            raise ValueError(f'its answer has no JSON object: {content[:80]!r}')
        return self.read_label(label or {'answer': answer})

    def count_changed(self, shards, space):
        """number of the records in shards whose label differs now from the stored one."""
        n_changed = 0
        for i, hash_ in enumerate(map(int, shards.hashes)):
            if hash_ in self.known:
                outs = shards.outs(i)
                entries = [(k, state) for k, state, _ in space.walk(space.to_json(outs))]
                shares = space.token_shares(self.schema.read_label(self.label_of(hash_)), entries)
                rows = zip(space.states_before(outs), shards.logits(i))
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
        schema = Schema(config['fields'], config['left_out']).check().only(config['label_fields'])
        labels = Labels(paths, schema, config['template'], prompt_text(config['prompt']))
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
