"""What answers hold, of an LLM or of people: the fields of a config, and what no student can answer.

    found = infer([('a text', {'tone': 'friendly', 'tags': ['a'], 'why': '...'}), ...], True)
    found.fields                # {'tone': [...], 'tags': {'type': 'array', ...}}
    found.left_out              # {'why': '312 different texts in 340 answers'}
"""
import json
import math
import re
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

from objects import plain  # it lies beside this file

MANY = 20        # a part with more values may be free text
MOST_ITEMS = 16  # of a list that is no set of constants
PAIRS = 100      # members of lists whose order is counted
IN_TEXT = 0.8    # share of the values of a copied part that stand in the texts
ISO_DATE = re.compile(r'\d{4}-\d\d-(\d\d)')


def stands_in(value, text):
    """True if a text or number is to be read in a text, in small letters. Of a date its day, since 2026-05-03 is
    written in many ways."""
    if isinstance(value, str):
        date = ISO_DATE.fullmatch(value)
        return bool(value.strip()) and value.casefold().strip() in text or bool(date) and stands_in(int(date[1]), text)
    if type(value) not in (int, float):
        return False
    return value in {float(digits.replace(',', '')) for digits in re.findall(r'\d+(?:,\d{3})*(?:\.\d+)?', text)}


class Part:
    """all that stands at one place of the answers, such as customer.mood or findings[].kind."""

    def __init__(self):
        self.constants, self.n_copied = Counter(), 0            # {JSON text: n}; those that stand in what was asked
        self.forms, self.properties = Counter(), defaultdict(Part)  # of objects: {their keys: n}
        self.lengths, self.item = Counter(), None               # of lists
        self.n_repeated, self.pairs = 0, Counter()              # lists with a member twice; {(member, a later one): n}

    def add(self, value, text):
        """text: what the answer is about, in small letters."""
        if isinstance(value, dict):
            self.forms[frozenset(value)] += 1
            for name, inner in value.items():
                self.properties[name].add(inner, text)
        elif isinstance(value, list):
            self.item = self.item or Part()
            self.lengths[len(value)] += 1
            for inner in value:
                self.item.add(inner, text)
            texts = [json.dumps(inner) for inner in value if not isinstance(inner, (dict, list))]
            self.n_repeated += len(set(texts)) < len(texts)
            if len(self.item.constants) <= PAIRS:
                self.pairs.update((one, other) for n, one in enumerate(texts) for other in texts[n + 1:n + PAIRS])
        elif not isinstance(value, float) or math.isfinite(value):
            self.constants[json.dumps(value)] += 1
            self.n_copied += stands_in(value, text)

    def merged(self):
        """the Counter of its constants in which 1 and 1.0 are one value, in its more common spelling."""
        spelled, merged = {}, Counter()
        for text, n in self.constants.most_common():
            merged[spelled.setdefault(json.dumps(plain(json.loads(text))), text)] += n
        return merged

    def copied(self):
        """the JSON Schema of its values, if they are copied from the texts, else None."""
        values = [json.loads(text) for text in self.constants.elements() if text not in ('null', '""')]
        kinds = {type(value) for value in values}
        if not values or self.n_copied < IN_TEXT * len(values) or not (kinds == {str} or kinds <= {int, float}):
            return None
        if kinds == {str}:
            is_date = all(ISO_DATE.fullmatch(value) for value in values)
            return {'type': 'string', 'format': 'date'} if is_date else {'type': 'string'}
        return {'type': 'integer' if all(value == int(value) for value in values) else 'number'}

    def describe_copied(self):
        """how many of its values stand in the texts, if these are many; else ''."""
        n = sum(k for text, k in self.constants.items() if text not in ('null', '""'))
        return f'{self.n_copied} of {n} stand in the texts: take it out of left_out to learn these' \
            if self.n_copied > n / 2 else ''

    def describe_values(self, path):
        """how many different values it has, '' if none. path: where it stands."""
        counts = self.merged()
        values = [json.loads(text) for text in counts if text != 'null']
        kind = 'texts' if values and all(isinstance(value, str) for value in values) else \
            'numbers' if all(type(value) in (int, float) for value in values) else 'values'
        where = 'items' if '[]' in path else 'answers'
        return f'{len(values)} different {kind} in {counts.total()} {where}' if values else ''


@dataclass
class Found:
    """what infer has found: fields as in a config; notes: {name: lines about its values}; left_out: {path: why}; part:
    the Part of whole answers; longest_text, longest_answer: in bytes."""
    fields: dict = field(default_factory=dict)
    notes: dict = field(default_factory=dict)
    left_out: dict = field(default_factory=dict)
    part: Part = field(default_factory=Part)
    longest_text: int = 0
    longest_answer: int = 0

    @property
    def json_schema(self):
        """the fields as the JSON Schema of an object."""
        if isinstance(self.fields.get('type'), str):
            return self.fields
        properties = {name: {'enum': part} if isinstance(part, list) else part for name, part in self.fields.items()}
        return {'type': 'object', 'properties': properties, 'required': [*properties]}

    @property
    def decides(self):
        """True if a field has something to decide."""
        return has_choice(self.json_schema)


def has_choice(schema):
    """True if a JSON Schema that infer makes is more than constants."""
    if 'enum' in schema or not {'properties', 'items', 'anyOf'} & {*schema}:
        return len(schema.get('enum', (0, 1))) > 1
    return 'properties' not in schema or any(map(has_choice, schema['properties'].values())) or \
        {*schema['properties']} != {*schema['required']}


# -----------------------------------------------------------------------------
# a part of the fields


def why_no_field(part, counts, path):
    """why constants are not those of a field; '' if they are. counts: of part.merged()."""
    if not counts:
        return 'no answer has a value for it'
    rare = sum(n == 1 for n in counts.values())
    is_float = any(isinstance(json.loads(text), float) for text in counts)
    return part.describe_values(path) if len(counts) > MANY and (rare > len(counts) / 2 or is_float) else ''


def describe_counts(counts):
    return ', '.join(f'{text} {n}' for text, n in counts.most_common(12)) + ', ...' * (len(counts) > 12)


def sort_members(counts, pairs):
    """the members of lists, JSON texts, in the order that agrees with most lists; by their counts if they are too many.
    pairs: {(one, a later one): n}."""
    rest, found = [text for text, _ in counts.most_common()], []
    while rest and len(counts) <= PAIRS:
        first = min(rest, key=lambda one: sum(pairs[other, one] > pairs[one, other] for other in rest))
        rest.remove(first)
        found.append(first)
    return found or rest


def read_part(part, path, left_out, notes):
    """the JSON Schema of a Part; None if no student can answer it: then left_out[path] says why. notes: lines about its
    values, which are added to it."""
    counts = part.merged()
    n_null = counts['null']
    sizes = {'constants': counts.total() - n_null, 'objects': part.forms.total(), 'lists': part.lengths.total()}
    kind = max(sizes, key=sizes.get)
    n_others = sum(sizes.values()) - sizes[kind]
    if n_others * 20 > sum(sizes.values()):
        left_out[path] = 'its values are ' + ', '.join(f'{n} {kind}' for kind, n in sizes.items() if n)
        return None
    if n_others:
        notes.append(f'{path!r}: not used, as they are no {kind}: {n_others}')
    if kind == 'constants':
        if reason := why_no_field(part, counts, path):
            if copied := part.copied():
                notes.append(f'{path!r}: copied from the text: {reason}' + f', null {n_null}' * bool(n_null))
                return {**copied, 'type': [copied['type'], 'null']} if n_null or '""' in counts else copied
            left_out[path] = reason
            return None
        notes.append(f'{path!r}: {describe_counts(counts)}')
        return {'enum': [json.loads(text) for text, _ in counts.most_common()]}
    schema = (read_list if kind == 'lists' else read_object)(part, path, left_out, notes)
    if schema is None or not n_null:
        return schema
    notes.append(f'{path!r}: null {n_null}')
    return {'anyOf': [schema, {'type': 'null'}]}


def read_list(part, path, left_out, notes):
    """read_part of lists."""
    least, most = min(part.lengths), max(part.lengths)
    sizes = f'{path!r}: {least} to {most} in a list' if least < most else f'{path!r}: {most} in each list'
    if not most:
        notes.append(sizes)
        return {'enum': [[]]}
    inner_left, inner_notes = {}, []
    item = read_part(part.item, f'{path}[]', inner_left, inner_notes)
    if item is None:
        left_out[path] = f'a list of {inner_left[f"{path}[]"]}'
        return None
    schema = {'type': 'array', 'items': item}
    is_set = 'enum' in item and part.n_repeated * 100 <= part.lengths.total()
    if 'enum' in item:
        item['enum'] = [json.loads(text) for text in sort_members(part.item.merged(), part.pairs)]
    if not is_set:
        if most > MOST_ITEMS:
            left_out[path] = f'lists of up to {most} items; {MOST_ITEMS} can be learned'
            return None
        schema |= {'uniqueItems': False} if 'enum' in item else {}
        schema['maxItems'] = min(MOST_ITEMS, most + max(1, most // 4))  # a little more than was seen
    left_out.update(inner_left)
    notes += [*inner_notes, sizes]
    return schema


def read_object(part, path, left_out, notes):
    """read_part of objects."""
    n, properties, required, inner_left = part.forms.total(), {}, [], {}
    present = Counter()
    for form, times in part.forms.items():
        present.update(dict.fromkeys(form, times))
    if len(present) > MANY and sum(times == 1 for times in present.values()) > len(present) / 2:
        left_out[path] = f'{len(present)} different keys in {n} objects'
        return None
    for name, inner in part.properties.items():
        schema = read_part(inner, f'{path}.{name}', inner_left, notes)
        if schema is not None:
            properties[name] = schema
            required += [name] if present[name] == n else []
            if present[name] < n:
                notes.append(f'{path + "." + name!r}: missing {n - present[name]}')
    if not properties:
        left_out[path] = '; '.join(f'{name!r}: {why}' for name, why in inner_left.items()) or 'it is empty'
        return None
    left_out.update(inner_left)
    return {'type': 'object', 'properties': properties, 'required': required}


# -----------------------------------------------------------------------------
# whole answers


def infer(answers, is_log):
    """the Found of (text, answer as dict or None) each. is_log: False if each label may tell of some fields only."""
    found = Found()
    part = found.part
    for text, answer in answers:
        text = ' '.join(text.split())
        found.longest_text = max(found.longest_text, len(text.encode(errors='replace')))
        with suppress(ValueError, RecursionError):
            if answer is not None:
                part.add(answer, text.casefold())
            found.longest_answer = max(found.longest_answer, len(json.dumps(answer or {}, allow_nan=False)))
    usual = max(part.forms, key=part.forms.get, default=frozenset())
    alike = {form: n for form, n in part.forms.items() if form & usual or not form}  # {"error": ...} is another one
    whole = is_log or any(form >= part.properties.keys() for form in part.forms)
    found.longest_answer += whole * sum(len(f'"{name}": null, ') for name in part.properties
                                        if any(name not in form for form in part.forms))
    for name, inner in part.properties.items():
        n_missing = sum(n for form, n in alike.items() if name not in form)
        if whole and not any(name in form for form in alike):
            found.left_out[name] = 'only answers without the usual keys have it'
            continue
        if whole and n_missing:                                 # a key that is missing means null
            inner.constants['null'] += n_missing
        notes = []
        schema = read_part(inner, name, found.left_out, notes)
        if schema is not None:
            found.fields[name] = schema['enum'] if 'enum' in schema else schema
            found.notes[name] = [line.removeprefix(f'{name!r}: ') for line in notes] if 'enum' in schema else notes
    if isinstance(found.fields.get('properties'), dict):        # else these would be read as a JSON Schema
        found.fields = found.json_schema
        found.notes = {'type': [line for lines in found.notes.values() for line in lines]}
    return found
