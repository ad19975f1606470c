"""The Shape of a reply: its properties in the caller's names and words, and the field behind each."""
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from distil.options import write_options
from distil.schema import list_leaves
from distil.values import MISSING, follow
from serve.trees import examples, is_scalar


@dataclass(frozen=True, eq=False)
class Tree:
    """a part of the student's answers and the function that writes it in the caller's words, see trees.py."""
    part: object
    write: Callable

    def value(self, answer):
        """the caller's value in an Answer, MISSING if it is left out."""
        sure = lambda paths: round(min(answer.confidence[path] for path in paths), 4)
        return self.write(follow(answer.record, self.part.keys), sure)

    def confidence(self, answer):
        """{path: probability of its value} of its leaves."""
        return {leaf.path: answer.confidence[leaf.path] for leaf in list_leaves(self.part)}


@dataclass(frozen=True)
class Part:
    """a property of the reply, or a reply that is one value. source: 'field', 'tree', 'confidence' or 'constant'."""
    name: str                   # the caller's
    source: str
    field: str = ''             # of the confidence: '' for the lowest in the reply
    spelled: tuple = ()         # of a field (number of a value, the caller's word) of those offered; of a
                                # constant its word alone
    tree: Tree = None

    def examples(self):
        """words that it can be, among them all that differ in what a schema may forbid."""
        if self.source == 'tree':
            values = examples(self.tree.part)
            return [self.tree.write(value, lambda paths: p) for p, n in ((0.5, len(values)), (0.0, 5), (1.0, 5))
                    for value in values[:n]]
        if self.source == 'confidence':
            return [0.5, 0.0, 1.0]
        return [self.spelled[0]] if self.source == 'constant' else [word for _, word in self.spelled]


@dataclass(frozen=True)
class Shape:
    """what a reply is made of. bare: it is its only value, not an object; options: that the caller gives, {name of a
    property: [option]}, see distil/options.py."""
    parts: tuple
    bare: bool = False
    options: dict = field(default_factory=dict, hash=False)

    def with_options(self, text):
        return write_options(text, self.options) if self.options else text

    def offered(self, space):
        """{field: JSON of the values that the caller allows}, of each field that has others too."""
        found = {}
        for part in self.parts:
            if part.source == 'field' and len(part.spelled) < len(leaf := space.schema.leaf(part.field)):
                allowed = {leaf.texts[n] for n, _ in part.spelled}
                found[part.field] = found.get(part.field, allowed) & allowed
        return found

    def values(self, answer, space):
        """list of (name, value, log p of the value, {JSON of each value offered: log p}) for each part; the
        last is {} if there is no choice, or if the Answer has no probabilities."""
        chosen = [choose_word(part, answer, space) if part.source == 'field' else None for part in self.parts]
        confidence = {part.field: math.exp(word[1]) for part, word in zip(self.parts, chosen) if word}
        for part in self.parts:
            confidence |= part.tree.confidence(answer) if part.tree else {}
        rows = []
        for part, word in zip(self.parts, chosen):
            if word:
                rows.append((part.name, *word))
            elif part.source == 'constant':
                rows.append((part.name, part.spelled[0], 0.0, {}))
            elif part.source == 'tree':
                log_p = sum(math.log(max(p, 1e-30)) for p in part.tree.confidence(answer).values())
                rows.append((part.name, part.tree.value(answer), log_p, {}))
            else:
                p = (answer.confidence | confidence).get(part.field, min(confidence.values()))
                rows.append((part.name, round(p, 4), 0.0, {}))
        return [row for row in rows if row[1] is not MISSING]


def choose_word(part, answer, space):
    """(the caller's word for a field's value in an Answer, its log p, {JSON of each word: log p}). If the
    caller does not offer that value, it is the likeliest of those offered."""
    row, words, leaf = answer.probabilities.get(part.field), dict(part.spelled), space.schema.leaf(part.field)
    n = leaf.number(leaf.get(answer.record))
    if row is None or len(leaf) == 1:
        return words[n], math.log(max(answer.confidence[part.field], 1e-30)), {}
    if n not in words:
        n = max(words, key=row.__getitem__)
    total = sum(row[k] for k in words) or 1.0
    log_p = {k: math.log(max(row[k] / total, 1e-30)) for k in words}
    return words[n], log_p[n], {json.dumps(words[k], ensure_ascii=False): log_p[k] for k in words}


def whole_shape(space):
    """the Shape of all fields, as the student was trained."""
    parts = space.schema.tree.properties
    return Shape(tuple(Part(name, 'field', part.path, tuple(enumerate(part.values))) if is_scalar(part) else
                       Part(name, 'tree', tree=Tree(part, lambda value, sure: value)) for name, part in parts.items()))
