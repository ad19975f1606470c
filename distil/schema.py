"""A task's schema: the one place that knows what a field is. Only the standard library.

    schema = Schema({'tone': ['neutral', 'friendly'], 'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui']}}})
    [leaf.path for leaf in schema.leaves]                       # ['tone', 'labels']
    [choice.path for choice in schema.choices]                  # ['tone', 'labels.bug', 'labels.ui']
    schema.canonical({'labels': ['ui', 'bug'], 'tone': 'friendly', 'reason': '...'})  # as the student would write it

An answer is decided by *choices* (kinds.py), each one of some values: a property, whether a value is in a list, whether
a list goes on. A *leaf* is what people see and measure: one choice; a list of values; or a property of all items of a
list, such as findings[].kind, which is a list, too; or a copied value. In a flat schema leaves and choices are the
same. Everything else iterates over one or the other, and finds the value of a leaf in an answer by `get`.
json_schema.py reads `fields`.
"""
import copy
import json

from distil.json_schema import is_json_schema, read_fields
from distil.copied import Copied
from distil.kinds import Choice, Items, Maybe, Object, Several
from distil.values import MISSING, follow, json_text, value_names
from distil.written import Place, Style


class ListLeaf:
    """a leaf whose value is a list: of the values of Several, of the items of a list, or of a property of them. path:
    such as labels, findings, findings[].kind. choices: that decide it; values, texts, names: of its members; [] if
    they are objects."""
    is_list = True

    def __init__(self, path, keys, choices, values=(), about=''):
        self.about = about
        self.path, self.keys, self.choices, self.values = path, keys, choices, list(values)
        self.texts, self.names = list(map(json_text, self.values)), value_names(self.values)

    def __len__(self):
        return len(self.values)

    def describe(self, most=12):
        return 'some of ' + Choice.describe(self, most) if self.values else f'up to {len(self.choices)} items'

    def get(self, answer):
        """the list in an answer; an empty one if it has none."""
        value = follow(answer, self.keys)
        return value if isinstance(value, list) else []

    def meant_by(self, truth):
        """the list that a truth means: a text, such as a cell of a table, is one member, or a list as JSON."""
        if isinstance(truth, str):
            try:
                truth = json.loads(truth) if truth.startswith('[') else [truth] * bool(truth)
            except ValueError:
                truth = [truth]
        order = {text: n for n, text in enumerate(self.texts)}
        return sorted(truth, key=lambda value: order.get(json_text(value), 0)) if isinstance(truth, list) else truth


def members(text):
    """the members of a list leaf's value, as JSON texts. text: the value as JSON; no list, of an answer that is broken,
    has none."""
    value = json.loads(text) if text.startswith('[') else []
    return list(map(json_text, value))


def true_value(leaf, truth):
    """what a truth, {name or path: value}, says of a leaf; MISSING if nothing."""
    if leaf.path not in truth and leaf.keys[0] not in truth:
        return MISSING
    return leaf.meant_by(truth[leaf.path] if leaf.path in truth else leaf.get(truth))


def list_leaves(part):
    """the leaves of a part of the tree, in the order of the answer."""
    keys = tuple(None if isinstance(key, int) else key for key in part.keys)
    if isinstance(part, Choice):
        if None not in keys:
            return [part]
        return [ListLeaf(part.group, keys, [], part.values, part.about)]  # of an item: the list collects its choices
    if isinstance(part, Copied):
        return [part if None not in keys else ListLeaf(part.group, keys, [], about=part.about)]
    if isinstance(part, Several):
        return [ListLeaf(part.choices[0].group, keys, part.choices, part.values, part.about)]
    if isinstance(part, Maybe):
        return [*list_leaves(part.choice), *list_leaves(part.part)]
    if isinstance(part, Object):
        return [leaf for inner in part.properties.values() for leaf in list_leaves(inner)]
    return [ListLeaf(part.more[0].group, keys, part.more, about=part.about), *list_leaves(part.items[0])]


def copied_in(part):
    """the copied values of a part of the tree, in the order of the answer."""
    if isinstance(part, Copied):
        return [part]
    inner = part.properties.values() if isinstance(part, Object) else part.items if isinstance(part, Items) else [
        part.part] if isinstance(part, Maybe) else []
    return [copied for one in inner for copied in copied_in(one)]


class Schema:
    """fields: as in a config: {name: list of JSON constants, or JSON Schema}, or the JSON Schema of an object.
    left_out: paths of properties that are not answered. ValueError if it is no schema.

    tree: of kinds.py; choices, copied and leaves: in the order of the answer; decided: the leaves that are not
    constant.
    """

    def __init__(self, fields, left_out=(), tree=None):
        self.fields, self.left_out = fields, tuple(left_out or ())  # as they are stored in meta.json and task.json
        self.tree = tree or read_fields(fields, self.left_out)
        self.choices = self.tree.choices
        self.by_choice = {choice.path: choice for choice in self.choices}
        self.leaves = list_leaves(self.tree)
        self.by_path = {leaf.path: leaf for leaf in self.leaves}
        paths = [choice.path for choice in self.choices], [leaf.path for leaf in self.leaves]
        if twice := [path for of in paths for path in of if of.count(path) > 1]:
            raise ValueError(f'two fields have the same path, {twice[0]!r}: give one of them another name')
        for choice in self.choices:
            if choice.group != choice.path and choice not in self.by_path[choice.group].choices:
                self.by_path[choice.group].choices.append(choice)
        self.copied = copied_in(self.tree)
        for n, part in enumerate(self.copied):
            part.number = n
        self.decided = [leaf for leaf in self.leaves if leaf.is_list or len(leaf) > 1 or isinstance(leaf, Copied)]

    @property
    def paths(self):
        return list(self.by_path)

    @property
    def is_flat(self):
        """True if every leaf is a property with a choice of constants."""
        return not self.copied and all(not leaf.is_list and len(leaf.keys) == 1 and MISSING not in leaf.values
                                       for leaf in self.leaves)

    def leaf(self, path):
        """the leaf of a path. ValueError if there is none."""
        if path not in self.by_path:
            raise ValueError(f'there is no field {path!r}; there are: {", ".join(self.paths)}')
        return self.by_path[path]

    def is_copied(self, leaf):
        """True if its value has a part that is copied."""
        return any(part.group == leaf.path or part.group.startswith((f'{leaf.path}[', f'{leaf.path}.'))
                   for part in self.copied)

    def only(self, names):
        """the Schema of some of its properties; of all if names is empty."""
        properties = self.tree.properties
        if unknown := [name for name in names if name not in properties]:
            raise ValueError(f'there is no field {unknown[0]!r}; there are: {", ".join(properties)}')
        if not names:
            return self
        return Schema(self.fields, self.left_out, Object((), {k: v for k, v in properties.items() if k in names}))

    def paths_in(self, names):
        """the paths of the leaves in these properties."""
        return {leaf.path for leaf in self.leaves if leaf.keys[0] in names}

    def check(self):
        """returns itself. ValueError if there is nothing to decide."""
        if not self.decided:
            raise ValueError("nothing to decide; a task needs fields = {'name': [two or more values], ...}")
        return self

    def describe(self):
        """its leaves and their values in words."""
        return '; '.join(f'{leaf.path} ({leaf.describe()})' for leaf in self.leaves)

    def write_for_prompt(self):
        """a line for each leaf: its path, the description in its JSON Schema, all its values."""
        return ''.join(f'{leaf.path}: {leaf.about.strip()}{" " * bool(leaf.about)}({leaf.describe(10**6)})\n'
                       for leaf in self.leaves)

    # answers

    def fill(self, choose, copies=None):
        """the answer whose choices are these. choose: function of a Choice that returns the number of its value.
        copies: {path: copied value}; None for examples. KeyError if one is not among them."""
        def value_of(part):
            if not isinstance(part, Copied):
                return choose(part)
            return part.example if copies is None else copies[part.path]
        return self.tree.fill(value_of)

    def longest(self):
        """an answer whose text is about the longest."""
        return self.fill(lambda choice: max(range(len(choice)), key=lambda n: len(choice.texts[n])))

    def numbers(self, answer):
        """{path of a choice: the number of its value} for each choice that an answer comes to, and {path: value} for
        each copied value. ValueError, which names it, if the answer lacks one or has another value. A key that is
        missing means null, where that is a value."""
        return dict(self.tree.numbers(answer))

    def with_examples(self, answer):
        """an answer of which every copied value is one: an example in place of null, where the text has no number or
        date for it and it cannot be null."""
        answer = copy.deepcopy(answer) if self.copied else answer
        for part in self.copied:
            maybe = self.by_choice.get(f'{part.path}?')
            if part.get(answer) in (None, '') and not (maybe and None in maybe.values):
                follow(answer, part.keys[:-1])[part.keys[-1]] = part.example
        return answer

    def canonical(self, answer):
        """an answer with the schema's keys alone, in order, and its values as the schema spells them. ValueError as
        for numbers."""
        numbers = self.numbers(answer)
        return self.fill(lambda choice: numbers[choice.path], numbers)

    def is_answer(self, answer):
        """True if this is exactly an answer of the schema: no key is missing, and none is too many."""
        try:
            return json_text(self.canonical(answer)) == json_text(answer)
        except ValueError:
            return False

    def read_label(self, label):
        """{path of a choice: probabilities of its values, in their order} of a label, a dict with "probabilities" or
        "answer". If a field is in both, its probabilities are used: {path of a choice: {value: probability}}, and of a
        list of values {path: {value: probability that it is in the list}}. Zeros for a choice that the answer does not
        come to. ValueError, which names the field, if one is missing or has a value that the schema does not have."""
        answer, weights = label.get('answer'), {} if label.get('probabilities') is None else label['probabilities']
        if not isinstance(answer, dict | None) or not isinstance(weights, dict):
            raise ValueError('its answer is not an object with a value for each field')
        known = self.read_weights(weights)
        probabilities = {choice.path: known.get(choice.path, [1.0] if len(choice) == 1 else [0.0] * len(choice))
                         for choice in self.choices}
        if self.copied:                                         # they are in an answer alone, see read_copies
            self.numbers(answer or {})
        for part in self.tree.properties.values():
            if any(choice.path not in known and len(choice) > 1 for choice in part.choices):
                if answer is None and not any(choice.path in known for choice in part.choices):
                    raise ValueError(f'it has no {part.choices[0].path}' if len(part.choices) == 1 else
                                     f'it has no {part.keys[0]}')
                numbers = part.numbers(answer.get(part.keys[0], MISSING)) if answer is not None else ()
                probabilities |= {path: [float(k == n) for k in range(len(self.by_choice[path]))]
                                  for path, n in numbers if path in self.by_choice and path not in known}
        return probabilities

    def read_copies(self, label):
        """{path: value} of the copied values in the answer of a label."""
        return {} if not self.copied else {path: value for path, value in self.numbers(label['answer']).items()
                                           if path not in self.by_choice}

    def read_weights(self, weights):
        """{path of a choice: probabilities} of the "probabilities" of a label."""
        known = {}
        for path, row in weights.items():
            leaf = self.by_path.get(path)
            if leaf is not None and leaf.is_list and isinstance(row, dict) and leaf.path not in self.by_choice:
                row = {f'{path}.{name}': p for name, p in row.items()}
                if unknown := row.keys() - self.by_choice.keys():
                    raise ValueError(f'{path} has a probability of {min(unknown)[len(path) + 1:]!r}, which is not one '
                                     f'of {", ".join(leaf.names)[:200]}')
                if wrong := [p for p in row.values() if type(p) not in (int, float) or not 0 <= p <= 1]:
                    raise ValueError(f'{path}: {wrong[0]!r} is not the probability that a value is in the list')
                known |= {choice.path: [1 - row.get(choice.path, 0.0), row.get(choice.path, 0.0)]
                          for choice in leaf.choices}
            elif path in self.by_choice and len(self.by_choice[path]) > 1:
                choice = self.by_choice[path]
                known[path] = choice.read_weights(row) if isinstance(row, dict) else choice.read(row)
        return known

    def write_label(self, probabilities, answer=None):
        """the label with these probabilities, {path of a choice: list}, and this answer, for its copied values."""
        written = {}
        for path, p in probabilities.items():
            leaf, choice = self.by_path[self.by_choice[path].group], self.by_choice[path]
            if leaf.is_list and leaf.values and choice.path.startswith(f'{leaf.path}.'):  # a value of Several
                written.setdefault(leaf.path, {})[choice.path[len(leaf.path) + 1:]] = float(p[1])
            elif any(p):
                written[path] = choice.write_weights(p)
        return {'probabilities': written} | ({'answer': answer} if answer else {})

    def json_schema(self):
        """the JSON Schema of its answers: the user's own, where that is one."""
        return self.fields if is_json_schema(self.fields) else self.tree.json_schema()

    # the written form

    def place(self, indent=None, fence=False, end=''):
        """the written form of its answers, as the Place where they begin. indent, fence: of the config; end: what
        follows an answer."""
        left, right = ('```json\n', '\n```') if fence else ('', '')
        return self.tree.place(left, Place(right + end, None), None, Style(indent), 0)

    def write(self, answer, indent=None, fence=False):
        """an answer in its written form. ValueError if it is none."""
        text = Style(indent).value(self.canonical(answer), 0)
        return f'```json\n{text}\n```' if fence else text


# -----------------------------------------------------------------------------
# how an object is written; also for names and values that are not those of the schema


def write_gaps(names, indent=None, fence=False):
    """the fixed texts of a JSON object with these keys: before each value, and after the last."""
    style = Style(indent)
    before = [(',' if n else '{') + style.line(1) + style.key(name) for n, name in enumerate(names)]
    gaps = [*before, style.line(0) + '}' if names else '{}']
    if fence:
        gaps[0], gaps[-1] = '```json\n' + gaps[0], gaps[-1] + '\n```'
    return gaps


def write_value(value, indent=None):
    """a JSON value as it stands in the object that write_gaps begins."""
    return Style(indent).value(value)


def write_object(answer, indent=None):
    """a dict as JSON in the form of the answers."""
    values = [write_value(value, indent) for value in answer.values()] + ['']
    return ''.join(text for pair in zip(write_gaps([*answer], indent), values) for text in pair)
