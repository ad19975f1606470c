"""A task's schema: the one place that knows what a field is, and how an answer is written. Only the standard library.

    schema = Schema({'tone': ['neutral', 'friendly'], 'spam': [True, False]})
    [leaf.path for leaf in schema.leaves]                    # ['tone', 'spam']
    schema.leaf('spam').read(True)                           # [1.0, 0.0]: the probabilities of its values
    schema.pieces()                                          # ['{"tone":', Slot(...), ',"spam":', Slot(...), '}']

A schema is a small tree. Its root is an object, in the order of the answer; its *leaves* are the places where a value
stands. Today each property is a leaf of one kind, a Choice: one of some JSON constants, in short a list. Everything
else iterates over the leaves, and finds the value of one in an answer by `get`.
"""
import json
import math
from typing import NamedTuple

# -----------------------------------------------------------------------------
# JSON values


def plain(value):
    """a JSON value with whole numbers as such: 1.0 is 1, also in lists and objects."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


def json_text(value):
    """a JSON value as a text: two values are equal if their texts are. In Python 1 == True."""
    return json.dumps(value, sort_keys=True)


def value_name(value):
    """a JSON value as a string, for the keys of a JSON object; see value_names."""
    return value if isinstance(value, str) else json.dumps(value)


def value_names(values):
    """JSON values as different strings, for the keys of a JSON object: True is 'true'. If two would be the same, as
    True and 'true', all are written as JSON: 'true' and '"true"'."""
    names = list(map(value_name, values))
    return names if len(set(names)) == len(names) else list(map(json.dumps, values))


def has_object(value):
    """True if a JSON value is an object or a list with one in it."""
    return isinstance(value, dict) or isinstance(value, list) and any(map(has_object, value))


# -----------------------------------------------------------------------------
# leaves


class Choice:
    """a leaf: one of some JSON constants. keys: that lead to it; values: in the order of the config.

    path: the keys in one text, which names it. texts: its values as JSON texts; names: as different strings.
    """

    def __init__(self, keys, values):
        self.keys, self.path, self.values = keys, '.'.join(keys), values
        self.texts, self.names = list(map(json_text, values)), value_names(values)

    def __len__(self):
        return len(self.values)

    def describe(self, most=12):
        """its first values in words."""
        return ', '.join(self.names[:most]) + (', ...' if len(self) > most else '')

    def get(self, answer):
        """its value in an answer. KeyError if the answer has none."""
        for key in self.keys:
            answer = answer[key]
        return answer

    def find(self, answer):
        """its value in an answer; None, which is null, if the answer lacks it and it may be null. ValueError if the
        answer lacks it otherwise."""
        try:
            return self.get(answer)
        except (KeyError, TypeError):
            if 'null' not in self.texts:
                raise ValueError(f'it has no {self.path}') from None

    def number(self, value):
        """which of its values this is, from 0; 1.0 is 1, if it has no 1.0. ValueError if it is none."""
        for of in (lambda value: value), plain:
            text = json_text(of(value))
            if text in (texts := [json_text(of(other)) for other in self.values]):
                return texts.index(text)
        said = lambda value: json.dumps(value, ensure_ascii=False)
        folded = lambda value: value_name(value).strip().casefold()
        near = [other for other in self.values if folded(other) == folded(value)]
        raise ValueError(f'{self.path} is {said(value)[:80]}, ' + (
            f'{said(near[0])} in another case or type' if near else
            f'not one of {", ".join(map(said, self.values))[:200]}'))

    def read(self, value):
        """the probabilities of its values if one of them is the label: a list of 0 and 1. ValueError if it is none."""
        n = self.number(value)
        return [float(k == n) for k in range(len(self))]

    def read_weights(self, weights):
        """the probabilities of its values, with sum 1, of {name of a value: weight >= 0}. ValueError if that is not
        what it is."""
        for name, weight in weights.items():
            if name not in self.names:
                raise ValueError(f'{self.path} has a probability of {name!r}, which is not one of '
                                 f'{", ".join(self.names)[:200]}')
            if type(weight) not in (int, float) or not 0 <= weight < math.inf:
                raise ValueError(f'{self.path}: {weight!r} is not the probability of {name!r}')
        if not (total := sum(weights.values())):
            raise ValueError(f'{self.path} has no probability above 0')
        return [weights.get(name, 0) / total for name in self.names]

    def write_weights(self, probabilities):
        """{name of a value: its probability}, of a list."""
        return dict(zip(self.names, map(float, probabilities)))

    def meant_by(self, truth):
        """the one of its values that a truth means; the truth itself if it means none. A text, such as a cell of a
        table, that is none of the values means the number, boolean or null that it is a usual way to write: 1.0, TRUE,
        none."""
        if not isinstance(truth, str) or truth in self.values:
            return truth
        word = truth.strip().lower()
        usual = {'true': ('yes', '1', '1.0'), 'false': ('no', '0', '0.0'), 'null': ('none',)}
        try:
            meant = [value for value in self.values if type(value) in (int, float) and value == float(word)]
        except ValueError:                                      # no number
            meant = []
        for value in self.values:
            text = json.dumps(value)
            if not isinstance(value, str) and word in (text.lower(), *usual.get(text, ())):
                meant.append(value)
        return meant[0] if meant else truth


# -----------------------------------------------------------------------------
# the schema


class Schema:
    """fields: {name: [JSON constants]}, as in a config. ValueError if it is no schema.

    leaves: in the order of the answer; decided: those with more than one value.
    """

    def __init__(self, fields):
        for name, values in fields.items():
            check_field(name, values)
        self.fields = fields                                    # as it is stored in meta.json and task.json
        self.leaves = [Choice((name,), values) for name, values in fields.items()]
        self.decided = [leaf for leaf in self.leaves if len(leaf) > 1]
        self.by_path = {leaf.path: leaf for leaf in self.leaves}

    @property
    def paths(self):
        return list(self.by_path)

    def leaf(self, path):
        """the leaf of a path. ValueError if there is none."""
        if path not in self.by_path:
            raise ValueError(f'there is no field {path!r}; there are: {", ".join(self.paths)}')
        return self.by_path[path]

    def only(self, names):
        """the Schema of some of its fields; of all if names is empty."""
        for name in names:
            self.leaf(name)
        return Schema({name: values for name, values in self.fields.items() if name in names}) if names else self

    def check(self):
        """returns itself. ValueError if there is nothing to decide."""
        if not self.decided:
            raise ValueError("nothing to decide; a task needs fields = {'name': [two or more values], ...}")
        return self

    def describe(self):
        """its leaves and their values in words."""
        return '; '.join(f'{leaf.path} ({leaf.describe()})' for leaf in self.leaves)

    # answers

    def build(self, numbers):
        """the answer with these values. numbers: of the value of each leaf, in order."""
        return {leaf.keys[0]: leaf.values[n] for leaf, n in zip(self.leaves, numbers, strict=True)}

    def longest(self):
        """the answer whose text is longest."""
        return self.build([max(range(len(leaf)), key=lambda n: len(leaf.texts[n])) for leaf in self.leaves])

    def replace(self, leaf, value):
        """the answer with this value of a leaf, and the first value of all others."""
        return self.build([leaf.number(value) if other is leaf else 0 for other in self.leaves])

    def numbers(self, answer):
        """for each leaf the number of its value in an answer. ValueError, which names the leaf, if the answer lacks
        one or has another value. A key that is missing means null, for a leaf that has this value."""
        if not isinstance(answer, dict):
            raise ValueError('its answer is not an object with a value for each field')
        return [leaf.number(leaf.find(answer)) for leaf in self.leaves]

    def canonical(self, answer):
        """an answer with the schema's keys alone, in order, and its values as the schema spells them. ValueError as
        for numbers."""
        return self.build(self.numbers(answer))

    def is_answer(self, answer):
        """True if this is exactly an answer of the schema: no key is missing, and none is too many."""
        if not isinstance(answer, dict) or set(answer) != {leaf.keys[0] for leaf in self.leaves}:
            return False
        return all(json_text(leaf.get(answer)) in leaf.texts for leaf in self.leaves)

    def read_label(self, label):
        """{path: probabilities of its values, in their order} of a label, a dict with "probabilities" or "answer". If a
        leaf is in both, its probabilities are used; a key that an answer lacks is null, if the leaf has this value.
        ValueError, which names the leaf, if one is missing or has a value that the schema does not have."""
        answer, weights = label.get('answer'), {} if label.get('probabilities') is None else label['probabilities']
        if not isinstance(answer, dict | None) or not isinstance(weights, dict):
            raise ValueError('its answer is not an object with a value for each field')
        probabilities = {}
        for leaf in self.leaves:
            known = weights.get(leaf.path)
            if len(leaf) == 1:                                  # a constant
                probabilities[leaf.path] = [1.0]
            elif isinstance(known, dict):
                probabilities[leaf.path] = leaf.read_weights(known)
            elif leaf.path in weights:
                probabilities[leaf.path] = leaf.read(known)
            elif answer is None:
                raise ValueError(f'it has no {leaf.path}')
            else:
                probabilities[leaf.path] = leaf.read(leaf.find(answer))
        return probabilities

    def write_label(self, probabilities):
        """the label with these probabilities, {path: list}."""
        return {'probabilities': {path: self.leaf(path).write_weights(p) for path, p in probabilities.items()}}

    def json_schema(self):
        """the JSON Schema of its answers."""
        return {'type': 'object', 'properties': {leaf.keys[0]: {'enum': leaf.values} for leaf in self.leaves},
                'required': [leaf.keys[0] for leaf in self.leaves], 'additionalProperties': False}

    # the written form

    def pieces(self, indent=None, fence=False):
        """the written form of its answers: fixed texts and Slots in turn, a text at both ends. indent, fence: of the
        config."""
        gaps, pieces = write_gaps([leaf.keys[0] for leaf in self.leaves], indent, fence), ['']
        for gap, leaf in zip(gaps, self.leaves):
            pieces[-1] += gap
            texts = [write_value(value, indent) for value in leaf.values]
            if len(texts) > 1:
                pieces += [Slot(leaf.path, texts), '']
            else:                                               # a constant is fixed text
                pieces[-1] += texts[0]
        return [*pieces[:-1], pieces[-1] + gaps[-1]]

    def write(self, answer, indent=None, fence=False):
        """an answer in its written form."""
        values = [write_value(leaf.get(answer), indent) for leaf in self.leaves] + ['']
        gaps = write_gaps([leaf.keys[0] for leaf in self.leaves], indent, fence)
        return ''.join(text for pair in zip(gaps, values) for text in pair)


class Slot(NamedTuple):
    """where the value of a leaf stands in the written form. texts: of its values, in order."""
    path: str
    texts: list


def check_field(name, values):
    """ValueError if a name and its values are no field."""
    if not isinstance(name, str):
        raise ValueError(f'field names must be strings, not {name!r}')
    for constant in [name, *values] if isinstance(values, list) else [name]:
        try:
            json.dumps(constant, ensure_ascii=False, allow_nan=False).encode()  # raises on a lone surrogate
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f'field {name!r}: {constant!r} cannot be written as JSON') from None
        if has_object(constant):
            raise ValueError(f'field {name!r}: {constant!r} has a JSON object in it; values are strings, numbers, '
                             'true, false, null and lists of them')
    if not isinstance(values, list) or not values or len(set(map(json_text, values))) < len(values):
        raise ValueError(f'field {name!r} needs a list of different values, not {values!r}')


# -----------------------------------------------------------------------------
# how an object is written; also for names and values that are not those of the schema


def write_gaps(names, indent=None, fence=False):
    """the fixed texts of a JSON object with these keys: before each value, and after the last."""
    comma, colon, left, right = (',', ':', '{', '}') if indent is None else (
        f',\n{" " * indent}', ': ', f'{{\n{" " * indent}', '\n}')
    before = [(comma if n else left) + json.dumps(name, ensure_ascii=False) + colon for n, name in enumerate(names)]
    gaps = [*before, right if names else '{}']
    if fence:
        gaps[0], gaps[-1] = '```json\n' + gaps[0], gaps[-1] + '\n```'
    return gaps


def write_value(value, indent=None):
    """a JSON value as it stands in the object that write_gaps begins."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=(',', ':' if indent is None else ': '))
    return text if indent is None else text.replace('\n', '\n' + ' ' * indent)


def write_object(answer, indent=None):
    """a dict as JSON in the form of the answers."""
    values = [write_value(value, indent) for value in answer.values()] + ['']
    return ''.join(text for pair in zip(write_gaps([*answer], indent), values) for text in pair)
