"""The places of a text at which a copied value may stand, in characters and in the tokens of a student.

    source = Source('Please call Anna Smith.', space)
    source.find(part, 'Anna Smith')                             # [(12, 22)]
    page = Page(source, offsets)                                # offsets: of the student's tokens
    page.span(part, first, last)                                # (12, 22, 'Anna Smith')

A value begins and ends at an *edge*: where no letter or digit stands on both sides, so never within a word. Chinese,
Japanese and Thai are written without blanks: there each letter is a word. A number or a date is one of the candidates
that candidates.py finds, an option one of those behind the text (options.py). Places are characters where answers are
stored, since teacher and student cut a text into different tokens.
"""
import re
import unicodedata
from functools import lru_cache

import numpy as np

from distil.candidates import find_candidates
from distil.options import find_options, text_end
from distil.values import json_text, plain

MOST_PLACES = 8  # of a copied value that are stored
HIDDEN = -1e4    # logit of a place where none may come
ALONE = re.compile('[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]')


@lru_cache(100_000)
def is_word(char):
    """True for a letter or digit, and for what is joined to one: an accent, a joiner."""
    return char.isalnum() or char == '_' or unicodedata.category(char)[0] == 'M' or char in '\u200c\u200d'


def find_edges(text):
    """(len(text) + 1,) bool: where a value may begin or end, white space aside."""
    inner = [not (is_word(a) and is_word(b)) or bool(ALONE.match(a) or ALONE.match(b)) for a, b in zip(text, text[1:])]
    return [True, *inner, True] if text else [True]


class Source:
    """a text, and where its values stand. space: an OutputSpace: its locale and reference_date say how numbers and
    dates are read, has_options whether options stand behind a text."""

    def __init__(self, text, space):
        self.text, self.space, self.found = text, space, {}
        n = text_end(text) if space.has_options else len(text)
        self.own, self.edges = text[:n], [*find_edges(text[:n]), *[False] * (len(text) - n)]  # without the options

    def candidates(self, kind):
        """[(start, end, value)] of a kind of copied.Copied but 'text'."""
        if kind not in self.found:
            self.found[kind] = find_options(self.text, kind[7:]) if kind.startswith('option:') else find_candidates(
                kind, self.own, self.space.locale, self.space.reference_date)
        return self.found[kind]

    def begins(self, at):
        return self.edges[at] and at < len(self.text) and not self.text[at].isspace()

    def ends(self, at):
        return self.edges[at] and at > 0 and not self.text[at - 1].isspace()

    def find(self, part, value):
        """[(start, end)]: all places of a copied value, a copied.Copied; first as it is written, else in another case.
        [] if it is not in the text."""
        if part.kind != 'text':
            return [(start, end) for start, end, other in self.candidates(part.kind)
                    if json_text(plain(other)) == json_text(plain(value))]
        for flags in (0, re.IGNORECASE):
            found = [match.span(1) for match in re.finditer(f'(?=({re.escape(value)}))', self.own, flags)]
            found = [(start, end) for start, end in found if self.begins(start) and self.ends(end)]
            if found:
                return found
        return []

    def value(self, part, start, end):
        """the value at a place. None if there is no number or date."""
        if part.kind == 'text':
            return self.text[start:end]
        return next((value for a, b, value in self.candidates(part.kind) if (a, b) == (start, end)), None)


class Page:
    """a text as a student reads it. offsets: list of (start, end) in characters of its tokens, (0, 0) for one that
    stands for no text.

    starts, ends: (T,) arrays of these, without white space, -1 for no text; begins, closes: bool, whether a value may
    begin or end with the token."""

    def __init__(self, source, offsets):
        self.source, self.starts, self.ends, text = source, [], [], source.text
        for start, end in offsets:
            while start < end and text[start].isspace():
                start += 1
            while start < end and text[end - 1].isspace():
                end -= 1
            self.starts.append(start if start < end else -1)
            self.ends.append(end if start < end else -1)
        self.starts, self.ends = np.array(self.starts, int), np.array(self.ends, int)
        self.begins = np.array([start >= 0 and source.begins(start) for start in self.starts], bool)
        self.closes = np.array([end >= 0 and source.ends(end) for end in self.ends], bool)
        self.spans_of = {}

    def token_of(self, at, is_end):
        """the number of the token that begins or, if is_end, ends at a character; else that in which it is; -1 if the
        student does not read it."""
        at = at - is_end
        inside = np.flatnonzero((self.starts <= at) & (at < self.ends))
        return int(inside[-1 if is_end else 0]) if len(inside) else -1

    def spans(self, kind):
        """[(first token, last token, start, end, value)] of the candidates of a kind that the student reads."""
        if kind not in self.spans_of:
            found = [(self.token_of(start, False), self.token_of(end, True), start, end, value)
                     for start, end, value in self.source.candidates(kind)]
            self.spans_of[kind] = [span for span in found if min(span[:2]) >= 0]
        return self.spans_of[kind]

    def firsts(self, part, taken=()):
        """the tokens with which a value may begin. taken: that earlier items of the same list begin with."""
        if part.kind == 'text':
            able = np.flatnonzero(self.begins).tolist()
        else:
            able = sorted({span[0] for span in self.spans(part.kind)})
        return [token for token in able if token not in taken] or able

    def lasts(self, part, first):
        """the tokens with which a value may end that begins with this one."""
        if part.kind == 'text':
            able = np.flatnonzero(self.closes).tolist()
            return [token for token in able if token >= first] or [first]
        return sorted({span[1] for span in self.spans(part.kind) if span[0] == first}) or [first]

    def span(self, part, first, last):
        """(start, end, value) of the copied value that begins and ends with these tokens; its value is None where there
        is none."""
        if part.kind == 'text':
            start, end = int(self.starts[first]), int(self.ends[last])
            return start, end, self.source.text[start:end]
        return next(
            ((start, end, value) for a, b, start, end, value in self.spans(part.kind) if (a, b) == (first, last)),
            (0, 0, None))


def place_input(V, token, is_last):
    """what a student reads of a place: see model.py."""
    return V + 1 + 2 * token + is_last


def point(shards, i, T):
    """(what a student reads of the answer of record i, its targets, its logits (n, V + 1 + T)), as Shards.batch gives
    them: of the decisions alone, with places as tokens of a text of up to T. A token has the probability of all
    characters in it; what the student does not read has none, or if it is the answer that of the last token."""
    outs, logits, tops = shards.answer(i).astype(np.int64), shards.logits(i), shards.answer(i, 'stats')[:, 0]
    places, weights = shards.answer(i, 'places'), shards.answer(i, 'weights').astype(np.float32)
    V, (starts, ends), is_last = logits.shape[1], shards.pages[i], False
    wide = np.concatenate((logits, np.full((len(outs), 1 + T), HIDDEN, np.float32)), 1)
    read, targets = outs.copy(), outs.copy()
    for n in np.flatnonzero((weights > -np.inf).any(1)):
        known = weights[n] > -np.inf
        at = places[n][known].astype(np.int64)[:, None] - is_last  # (k, 1) characters
        inside = (starts <= at) & (at < ends)                   # (k, T of the text)
        token = np.where(inside.any(1), inside.argmax(1), len(starts) - 2)
        wide[n, :V] += tops[n]                                  # these are log probabilities
        there = inside.any(1) | (np.arange(len(token)) == 0)
        np.logaddexp.at(wide[n], V + 1 + token[there], weights[n][known][there])
        if outs[n] >= V:
            targets[n], read[n] = V + 1 + token[0], place_input(V, token[0], is_last)
            is_last = not is_last
    steps = shards.steps(i)
    return read[steps], targets[steps], wide[steps]
