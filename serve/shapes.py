"""The Shape of a reply: its properties in the caller's names and words, and the field behind each."""
import json
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """a property of the reply, or a reply that is one value. source: 'field', 'confidence' or 'constant'."""
    name: str                   # the caller's
    source: str
    field: str = ''             # of the confidence: '' for the lowest in the reply
    spelled: tuple = ()         # of a field (number of a value, the caller's word) of those offered; of a
                                # constant its word alone


@dataclass(frozen=True)
class Shape:
    """what a reply is made of. bare: it is its only value, not an object."""
    parts: tuple
    bare: bool = False

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
        rows = []
        for part, word in zip(self.parts, chosen):
            if word:
                rows.append((part.name, *word))
            elif part.source == 'constant':
                rows.append((part.name, part.spelled[0], 0.0, {}))
            else:
                p = (answer.confidence | confidence).get(part.field, min(confidence.values()))
                rows.append((part.name, round(p, 4), 0.0, {}))
        return rows


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
    return Shape(tuple(Part(leaf.path, 'field', leaf.path, tuple(enumerate(leaf.values)))
                       for leaf in space.schema.leaves))
