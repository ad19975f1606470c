"""What an answer is made of: a tree of a few kinds, each of which reads, builds and writes its part of an answer. Only
the standard library.

    tree = Object((), {'tone': Choice(('tone',), ['neutral', 'friendly']),
                       'labels': Several(('labels',), ['bug', 'ui'])})
    dict(tree.numbers({'tone': 'friendly', 'labels': ['ui']}))  # {'tone': 1, 'labels.bug': 0, 'labels.ui': 1}
    tree.fill(lambda choice: 0)                                 # {'tone': 'neutral', 'labels': []}

The leaves of the tree are of two kinds: a Choice, one of some values, and Copied, what the text says. An Object has
properties, a list is Several (some of the values, each at most once, in their order: a yes or no for each of them) or
Items (any list: a yes or no before each item, whether there is one), and Maybe is a part that can be null or missing.
So whatever the schema, an answer is a number for each Choice that it comes to, and a value for each Copied;
everything else asks these.
"""
import math

from distil.copied import Copied
from distil.values import (MISSING, PRESENT, Mark, follow, group_of, json_text, path_of, plain, said, value_name,
                           value_names)
from distil.written import Fork, Place


class Choice:
    """a leaf: one of some values. keys: that lead to it; values: JSON constants and Marks, in the order of the config.

    path: the keys in one text, which names it; group: of all choices that are the same one of other items of a list.
    texts: its values as JSON texts; names: as different strings.
    """
    is_list, about = False, ''

    def __init__(self, keys, values, path=''):
        self.keys, self.values, self.path, self.group = keys, values, path or path_of(keys), path or group_of(keys)
        self.texts, self.names = list(map(json_text, values)), value_names(values)
        self.known = {text: n for n, text in enumerate(self.texts)}
        self.known_plain = {json_text(plain(value)): n for n, value in reversed([*enumerate(values)])}

    def __len__(self):
        return len(self.values)

    @property
    def choices(self):
        """all choices of this part of the tree, in the order of the answer; the other kinds have them, too."""
        return [self]

    def describe(self, most=12):
        """its first values in words."""
        return ', '.join(self.names[:most]) + (', ...' if len(self) > most else '')

    def number(self, value):
        """which of its values this is, from 0; 1.0 is 1, if it has no 1.0. ValueError if it is none. A value that is
        missing is null, if it may be null and not missing."""
        if isinstance(value, Mark):
            if value.name in self.texts or 'null' in self.texts:
                return self.texts.index(value.name if value.name in self.texts else 'null')
            raise ValueError(f'it has no {self.path}')
        for of, known in ((lambda value: value), self.known), (plain, self.known_plain):
            if (text := json_text(of(value))) in known:
                return known[text]
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
            if not isinstance(value, str) and word in (json_text(value).lower(), *usual.get(json_text(value), ())):
                meant.append(value)
        return meant[0] if meant else truth

    def get(self, answer):
        """its value in an answer, MISSING if there is none."""
        value = follow(answer, self.keys)
        return PRESENT if PRESENT in self.values and value is not None and value is not MISSING else value

    # as a part of the tree; the other kinds have the same methods

    def numbers(self, value):
        """yields (path of a Choice, number of its value) for each that the value of this part comes to. ValueError,
        which names it, if the value is not one of the schema."""
        yield self.path, self.number(value)

    def fill(self, choose):
        """the value of this part. choose: function of a Choice that returns the number of its value."""
        return self.values[choose(self) if len(self) > 1 else 0]

    def place(self, lead, rest, skip, style, depth):
        """the Place at which this part is written. lead: text before its value, which is left out with it; rest: the
        Place after it; skip: the Place if it is missing; depth: of the object or list that it stands in."""
        write = lambda value: style.value(value, depth)
        if len(self) == 1:
            return rest.after(lead + write(self.values[0]))
        if MISSING not in self.values:
            return Place(lead, Fork(option for n, value in enumerate(self.values)
                                    for option in rest.options(((self.path, n),), write(value))))
        options = []
        for n, value in enumerate(self.values):
            place, text = (skip, '') if value is MISSING else (rest, lead + write(value))
            options += place.options(((self.path, n),), text)
        return Place('', Fork(options))

    def json_schema(self):
        return {'enum': [value for value in self.values if value is not MISSING]}


class Object:
    """properties: {name: its part}."""
    about = ''

    def __init__(self, keys, properties):
        self.keys, self.properties = keys, properties
        self.choices = [choice for part in properties.values() for choice in part.choices]

    def numbers(self, value):
        if not isinstance(value, dict):
            raise ValueError(f'{path_of(self.keys)} is {said(value)[:80]}, not an object' if self.keys and value is not
                             MISSING else f'it has no {path_of(self.keys)}' if self.keys else
                             'its answer is not an object with a value for each field')
        for name, part in self.properties.items():
            yield from part.numbers(value.get(name, MISSING))

    def fill(self, choose):
        filled = {name: part.fill(choose) for name, part in self.properties.items()}
        return {name: value for name, value in filled.items() if value is not MISSING}

    def place(self, lead, rest, skip, style, depth):
        parts, known = list(self.properties.items()), {}

        def place_of(k, first):
            """before property k; first: none is written yet."""
            if (k, first) not in known:
                if k == len(parts):
                    known[k, first] = rest.after(lead + '{}' if first else style.line(depth) + '}')
                else:
                    name, part = parts[k]
                    before = (lead + '{' if first else ',') + style.line(depth + 1) + style.key(name)
                    later = place_of(k + 1, True) if can_be_missing(part) and first else None
                    known[k, first] = part.place(before, place_of(k + 1, False), later or place_of(k + 1, False), style,
                                                 depth + 1)
            return known[k, first]
        return place_of(0, True)

    def json_schema(self):
        required = [name for name, part in self.properties.items() if not can_be_missing(part)]
        return {'type': 'object', 'properties': {name: part.json_schema() for name, part in self.properties.items()},
                'required': required, 'additionalProperties': False}


def can_be_missing(part):
    """True if an object need not have this property."""
    choice = part.choice if isinstance(part, Maybe) else part
    return isinstance(choice, Choice) and MISSING in choice.values


class Several:
    """a list of some of the values, at least `least` and at most `most`, each once, in the order of the schema. A
    Choice for each value says whether it is in the list."""
    about = ''

    def __init__(self, keys, values, least=0, most=None):
        self.keys, self.values, self.least = keys, values, least
        self.most = len(values) if most is None else min(most, len(values))
        self.texts, self.names = list(map(json_text, values)), value_names(values)
        self.whole = Choice(keys, values)
        self.choices = [Choice((*keys, name), [MISSING, PRESENT], f'{path_of(keys)}.{name}') for name in self.names]
        for choice in self.choices:
            choice.group = group_of(keys)

    def numbers(self, value):
        path = path_of(self.keys)
        check_list(path, value)
        found = {self.whole.number(member) for member in value}
        check_length(path, len(found), self.least, self.most)
        yield from ((choice.path, int(n in found)) for n, choice in enumerate(self.choices))

    def fill(self, choose):
        found = []
        for n, value in enumerate(self.values):
            needed = len(found) + len(self.values) - n == self.least
            if needed or len(found) < self.most and choose(self.choices[n]):
                found.append(value)
        return found

    def place(self, lead, rest, skip, style, depth):
        n, known, fixed = len(self.values), {}, style.line(depth + 1)
        enough = self.most if self.most < n else max(1, self.least)  # how many need to be told apart
        missing = [((choice.path, 0),) for choice in self.choices]

        def place_of(k, count):
            """after the values before k, `count` of which are in the list."""
            if (k, count) in known:
                return known[k, count]
            options, made = [], ()
            for j in range(k, n if count < self.most or self.most == n else k):
                if count + n - j >= self.least:
                    option = (*made, (self.choices[j].path, 1)), ('[' if not count else ',') + fixed + style.value(
                        self.values[j], depth + 1)
                    options += place_of(j + 1, min(count + 1, enough)).options(*option)
                made += missing[j]
            end = rest.after('[]' if not count else style.line(depth) + ']')
            options += end.options(made) if count >= self.least else []
            known[k, count] = Place('', Fork(options)) if len(options) > 1 else Place(*options[0][1:])
            return known[k, count]
        return place_of(0, 0).after(lead)

    def json_schema(self):
        return {'type': 'array', 'items': {'enum': self.values}, 'minItems': self.least, 'maxItems': self.most,
                'uniqueItems': True}


class Items:
    """a list of `least` to `most` items. items: the part of each place; the Choice before says whether there is one."""
    about = ''

    def __init__(self, keys, items, least=0):
        self.keys, self.items, self.least = keys, items, least
        self.more = [Choice((*keys, n), [MISSING, PRESENT], f'{path_of(keys)}[+{n}]') for n in range(len(items))]
        for choice in self.more:
            choice.group = group_of(keys)
        self.choices = [choice for more, item in zip(self.more, items) for choice in (more, *item.choices)]

    def numbers(self, value):
        path = path_of(self.keys)
        check_list(path, value)
        check_length(path, len(value), self.least, len(self.items))
        for more, item, part in zip(self.more, self.items, value):
            yield more.path, 1
            yield from item.numbers(part)
        yield from ((more.path, 0) for more in self.more[len(value):len(value) + 1])

    def fill(self, choose):
        found = []
        for n, item in enumerate(self.items):
            if n >= self.least and not choose(self.more[n]):
                break
            found.append(item.fill(choose))
        return found

    def place(self, lead, rest, skip, style, depth):
        place = rest.after(style.line(depth) + ']')
        for n in reversed(range(len(self.items))):
            item = self.items[n].place(('[' if not n else ',') + style.line(depth + 1), place, None, style, depth + 1)
            if n >= self.least:
                end = rest.after(style.line(depth) + ']' if n else '[]')
                path = self.more[n].path
                item = Place('', Fork(item.options(((path, 1),)) + end.options(((path, 0),))))
            place = item
        return place.after(lead)

    def json_schema(self):
        return {'type': 'array', 'items': self.items[0].json_schema(), 'minItems': self.least,
                'maxItems': len(self.items)}


class Maybe:
    """a part that may be null or missing. others: None, MISSING or both; a Choice says which."""
    about = ''

    def __init__(self, keys, part, others):
        self.keys, self.part = keys, part
        self.choice = Choice(keys, [PRESENT, *others], path_of(keys) + '?')
        self.choice.group = group_of(keys) + '?'
        self.choices = [self.choice, *part.choices]

    def numbers(self, value):
        if value == '' and isinstance(self.part, Copied) and None in self.choice.values:
            value = None                                        # so LLMs write that there is nothing to copy
        if value is None or value is MISSING:
            yield self.choice.path, self.choice.number(value)
        else:
            yield self.choice.path, 0
            yield from self.part.numbers(value)

    def fill(self, choose):
        n = choose(self.choice)
        return self.choice.values[n] if n else self.part.fill(choose)

    def place(self, lead, rest, skip, style, depth):
        path = self.choice.path
        options = self.part.place(lead, rest, None, style, depth).options(((path, 0),))
        for n, value in enumerate(self.choice.values[1:], 1):
            options += (skip if value is MISSING else rest.after(lead + 'null')).options(((path, n),))
        return Place('', Fork(options))

    def json_schema(self):
        inner = self.part.json_schema()
        return {'anyOf': [inner, {'type': 'null'}]} if None in self.choice.values else inner


def check_list(path, value):
    """ValueError if this is no list."""
    if value is MISSING:
        raise ValueError(f'it has no {path}')
    if not isinstance(value, list):
        raise ValueError(f'{path} is {said(value)[:80]}, not a list')


def check_length(path, n, least, most):
    """ValueError if a list has too few or too many items."""
    if not least <= n <= most:
        raise ValueError(f'{path} has {n} items, and may have {least} to {most}')
