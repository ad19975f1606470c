"""Where the answers of extract.py come from. Each source has answer(texts), which returns for each text (outs (n,)
output indices, logits (n, V), lse (n,)), or in one word the reason why there is no answer.
"""
import sys
from functools import partial

import numpy as np

from data import first_answers
from data.texts import Text
from distil.calibrate import calibrated_answers
from distil.drafts import Drafts
from distil.engine import answer_batched
from distil.free import open_free
from distil.shares import NotInText, find_known, record_from_label
from distil.values import said

DRAFT_TEXTS = 10000  # the drafts learn from the first answers: few enough to read again when a run continues


class FromTeacher:
    """a model that runs here answers, greedily and held to the schema: drafted, then verified many tokens at a time
    (distil/engine.py)."""
    is_costly = True            # so a text without an answer is stored, too: it is not asked about again

    def __init__(self, engine, space, meta, n_seen, n_full_lse):
        """n_seen: texts in the shard; n_full_lse: of the first ones also logsumexp over the whole vocabulary."""
        self.engine, self.space, self.meta, self.drafts = engine, space, meta, Drafts(space)
        self.free = open_free(space, meta)                      # what the teacher writes before it decides
        self.n_seen, self.n_full_lse, self.n_read = n_seen, n_full_lse, 0  # n_read: tokens

    def answer(self, texts, outs=None):
        """outs: answers (lists of output indices) to score in place of the model's own."""
        known = find_known(self.space, [text.given for text in texts], self.meta)  # of fields that have labels
        self.full_lse = self.n_seen < self.n_full_lse
        answers, n_read = answer_batched(
            self.engine, self.space, self.drafts, [text.ids for text in texts], self.meta['after'],
            self.meta['constrain'], self.full_lse, outs, self.meta['missing'], known, self.free)
        for answer in answers[:max(0, DRAFT_TEXTS - self.n_seen)]:
            if not isinstance(answer, str):
                self.drafts.add(answer[0])
        self.n_seen, self.n_read = self.n_seen + len(texts), self.n_read + n_read
        return answers


    def print_problems(self):
        pass                                                    # a teacher that is held to the text has none


class FromScore(FromTeacher):
    """the answers are given, the model only says how probable they are."""

    def answer(self, texts):
        outs = [self.space.from_json(text.given) for text in texts]
        valid = [n for n, of_text in enumerate(outs) if of_text]
        answers = ['invalid'] * len(texts)
        if valid:
            for n, answer in zip(valid, super().answer([texts[n] for n in valid], [outs[n] for n in valid])):
                answers[n] = answer
        return answers


class FromLabels:
    """the probabilities of the values are given, by people or by a log (distil/labels.py)."""
    is_costly, n_read = False, 0

    def __init__(self, space):
        self.space, self.not_in_text, self.n_labels = space, {}, 0  # not_in_text: {path: [(value, text)]}

    def answer(self, texts):
        return list(map(self.read, texts))

    def read(self, text):
        label, self.n_labels = text.given, self.n_labels + 1    # a dict, or a reason
        if isinstance(label, str):
            return label
        words = self.space.tokenizer.decode(list(map(int, text.ids))) if self.space.schema.copied else ''
        try:
            record = record_from_label(self.space, label, words)
        except NotInText as error:
            self.not_in_text.setdefault(error.path, []).append((error.value, words))
            return 'not_in_text'
        return 'invalid' if record is None else (*record[:2], np.full(len(record[0]), np.nan), *record[2:])

    def print_problems(self):
        """prints which values could not be copied from the texts, by field, with three examples of each."""
        for path, values in self.not_in_text.items():
            print(f'not_in_text: {len(values)} labels say what is not in the text at {path}, and are left out:', *(
                f'  {said(value)[:80]} of: {words[:120]}' for value, words in values[:3]), sep='\n')
            if len(values) > self.n_labels / 2:
                print(f'  most are not: leave it out, left_out = [{path!r}], or list its values (enum)')


class FromServer(FromLabels):
    """the probabilities come from an LLM server, as it answers (distil/server.py)."""
    is_costly = True

    def ask(self, server, groups, folder, meta, priors):
        """yields groups of texts with the server's label, or a reason, as what is given."""
        ask = partial(server.answered, decode=self.space.tokenizer.decode)
        labelled = calibrated_answers(ask, groups, folder, meta, priors) if priors else ask(groups)
        yield from ([Text(*text) for text in group] for group in labelled)


def open_source(kind, engine, space, meta, writer, full_lse):
    """the source of the answers. kind: see answers_from; writer: of this process's shard; full_lse: the setting."""
    if kind in ('labels', 'server'):
        return FromLabels(space) if kind == 'labels' else FromServer(space)
    on_gpu = engine.device.type == 'cuda'                       # where it is nearly free
    n_full_lse = full_lse if full_lse >= 0 else sys.maxsize if on_gpu else 64
    source = (FromScore if kind == 'score' else FromTeacher)(engine, space, meta, writer.n_records, n_full_lse)
    for outs in first_answers(writer.folder, meta, DRAFT_TEXTS):  # of the run that is continued
        source.drafts.add(outs.tolist())
    return source
