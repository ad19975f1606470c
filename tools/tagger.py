"""What people do without this project for values that stand in a text: a token tagger on an encoder (BIO tags), beside
the heads of tools/baselines.py for what is chosen.

    tags = Tags(space, answers)                                 # the tags of answers, with their spans
    tags.label(starts, ends, outs)                              # a tag for each token of a text
    tags.answers(texts, starts, ends, rows)                     # {field: its values}, from predicted tags

A tag is B- or I- and what the value is: its path and, in an object in a list, what else the object says, as the name of
a slot. A list is in the order of the text. (Ramshaw and Marcus 1995, https://arxiv.org/abs/cmp-lg/9505040)
"""
import json

from distil.copied import Copied
from distil.kinds import Items, Maybe, Object
from distil.values import follow, json_text


def spans_of(space, outs):
    """[(start, end, what it is)] of the copied values of an answer; what: (path, the rest of its object as JSON)."""
    answer, found = space.to_json(outs), []
    parts = [space.copy_at[state] for state, out in zip(space.states_before(outs), outs) if out >= space.V][::2]
    for part, (start, end, _) in zip(parts, outs.spans):
        rest = ''
        if len(part.keys) > 1 and isinstance(part.keys[-2], int):
            rest = json_text({k: v for k, v in follow(answer, part.keys[:-1]).items() if k != part.keys[-1]})
        found.append((start, end, (part.group, rest)))
    return found


class Tags:
    """The tags of a task. properties: {name: its part} of those that have copied values. ValueError if a list has
    objects with several copied values, which no tag can join."""

    def __init__(self, space, answers):
        self.space = space
        self.properties = {name: part for name, part in space.schema.tree.properties.items()
                           if any(copied.keys[0] == name for copied in space.schema.copied)}
        for part in space.schema.copied:
            of_item = [other for other in space.schema.copied if other.keys[:-1] == part.keys[:-1]]
            if len(of_item) > 1 and any(isinstance(key, int) for key in part.keys[:-1]):
                raise ValueError(f'{part.group} is one of several copied values of an item: a tagger cannot join them')
        kinds = dict.fromkeys(kind for outs in answers for *_, kind in spans_of(space, outs))
        self.tags = [None, *((letter, kind) for kind in kinds for letter in 'BI')]
        self.number = {tag: n for n, tag in enumerate(self.tags)}

    @property
    def paths(self):
        """of the fields that are told by tags."""
        return self.space.schema.paths_in([*self.properties])

    def label(self, starts, ends, outs):
        """the numbers of the tags of a text's tokens. starts, ends: their characters, -1 for none."""
        row = [0] * len(starts)
        for start, end, kind in spans_of(self.space, outs):
            inside = [t for t, (a, b) in enumerate(zip(starts, ends)) if a >= start and b <= end and a >= 0]
            for t in inside:
                row[t] = self.number[('B' if t == inside[0] else 'I'), kind]
        return row

    def read(self, text, starts, ends, row):
        """[(what it is, value)] of the predicted tags of a text."""
        found, kind = [], None
        for start, end, number in zip(starts, ends, row):
            if start < 0:
                continue
            tag = self.tags[number]
            if tag and (tag[0] == 'B' or tag[1] != kind):       # an I- without a B- begins one, too
                found.append([tag[1], start, end])
            elif tag:
                found[-1][2] = end
            kind = tag and tag[1]
        return [(kind, text[start:end]) for kind, start, end in found]

    def build(self, part, found):
        """the value of a part of the tree."""
        if isinstance(part, Object):
            return {name: self.build(inner, found) for name, inner in part.properties.items()}
        if isinstance(part, Maybe):
            return self.build(part.part, found)
        if isinstance(part, Copied):
            return next((value for (path, _), value in found if path == part.group), None)
        inner = part.items[0] if isinstance(part, Items) else None
        if isinstance(inner, Copied):
            return [value for (path, _), value in found if path == inner.group][:len(part.items)]
        groups = {copied.group: copied.keys[-1] for copied in self.space.schema.copied
                  if copied.keys[:len(part.keys)] == part.keys}
        items = [{**json.loads(rest), groups[path]: value} for (path, rest), value in found if path in groups]
        return [{name: item[name] for name in inner.properties if name in item} for item in items][:len(part.items)]

    def answers(self, texts, starts, ends, rows):
        """{path of a field: [JSON text of its value in each text]}."""
        read = [self.read(*of_text) for of_text in zip(texts, starts, ends, rows)]
        built = [{name: self.build(part, found) for name, part in self.properties.items()} for found in read]
        return {path: [json_text(self.space.schema.leaf(path).get(answer)) for answer in built] for path in self.paths}
