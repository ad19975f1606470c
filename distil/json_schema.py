"""JSON Schema, as structured outputs take it, as a tree of kinds. Only the standard library.

    tree = read_fields(Ticket.model_json_schema())              # pydantic's, zod's, a tool's parameters
    tree = read_fields({'tone': ['neutral', 'friendly'], 'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui']}}})

What a student can answer is what is known beforehand: constants, lists of them, objects, lists of objects. All else is
refused with a sentence that names the property and says what to do.
"""
import json
import math
import re

from distil.kinds import Choice, Items, Maybe, Object, Several
from distil.values import MISSING, json_text, path_of

MOST_ITEMS = 16  # of a list without maxItems
MOST_NUMBERS = 1000  # values of an integer with a minimum and a maximum
# keys that say nothing about which values are allowed, or nothing that a list of constants does not say
IGNORED = ('patternProperties', 'propertyNames', 'not', 'if', 'prefixItems', 'contains', 'dependentSchemas')


def is_json_schema(fields):
    """True if fields are a whole JSON Schema of an object, False if they map names to values."""
    return isinstance(fields, dict) and (isinstance(fields.get('properties'), dict) and not isinstance(
        fields.get('type'), list) or isinstance(fields.get('$ref'), str))


def unwrap(schema):
    """the JSON Schema in a response_format, a tool or a tool's parameters; the schema itself if it is none."""
    for _ in range(4):
        inner = [schema[key] for key in ('json_schema', 'schema', 'function', 'parameters', 'input_schema')
                 if isinstance(schema, dict) and isinstance(schema.get(key), dict)]
        if is_json_schema(schema) or not inner:
            break
        schema = inner[0]
    return schema


def read_fields(fields, left_out=()):
    """the tree of fields: {name: list of constants, or JSON Schema}, or the JSON Schema of an object. left_out: paths
    of properties that are not in it. ValueError, which names the property, if it cannot be answered."""
    if is_json_schema(fields):
        return Reader(fields, left_out).read(fields, ())
    return Reader(fields, left_out).read_object((), {name: (part, True) for name, part in fields.items()})


class Reader:
    """root: the JSON Schema that references point into; left_out: paths."""

    def __init__(self, root, left_out):
        self.root, self.left_out = root, set(left_out)

    def resolve(self, part, keys):
        """a part without references at its top, and what stands beside them. ValueError if there is no such target."""
        for _ in range(100):
            inner = part.get('allOf')
            if isinstance(ref := part.get('$ref'), str):
                target = self.root
                for key in ref.removeprefix('#').split('/')[1:]:
                    target = target.get(key.replace('~1', '/').replace('~0', '~')) if isinstance(target, dict) else None
                if not isinstance(target, dict) or not ref.startswith('#'):
                    raise ValueError(f'{path_of(keys) or "the schema"} refers to {ref}, which is not in the schema')
                part = {**target, **{key: value for key, value in part.items() if key != '$ref'}}
            elif isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner):
                part = {key: value for key, value in part.items() if key != 'allOf'}
                for one in inner:
                    part = {**self.resolve(one, keys), **part}
            else:
                return part
        raise ValueError(f'{path_of(keys) or "the schema"} refers to itself without end')

    def alternatives(self, part, keys):
        """the parts of which one applies, each without anyOf, oneOf and a list of types."""
        part = self.resolve(part, keys)
        for key in 'anyOf', 'oneOf':
            if isinstance(part.get(key), list):
                rest = {k: v for k, v in part.items() if k != key}
                if rest.get('type') == 'object' and 'properties' in rest:
                    refuse(keys, f'has {key} beside its properties', 'write its properties in one object')
                return [one for inner in part[key] for one in self.alternatives(inner, keys)]
        if isinstance(part.get('type'), list) and 'enum' not in part:
            return [{**part, 'type': kind} for kind in part['type']]
        return [part]

    def read(self, part, keys, required=True):
        """the tree of a part. keys: that lead to it; required: False if it may be missing."""
        if len(keys) > 40:
            raise ValueError(f'{path_of(keys[:3])} ... refers to itself without end: write it out as deep as it is needed, '
                             f'or leave it out: left_out = [{path_of(keys[:1])!r}]')
        if isinstance(part, list):
            return Choice(keys, check_constants(keys, part) + [MISSING] * (not required))
        if not isinstance(part, dict):
            if part is True:
                refuse(keys, 'allows any value')
            raise ValueError(f'field {path_of(keys)!r} needs a list of different values, or a JSON Schema, not {part!r}')
        found, constants = [], None
        for one in self.alternatives(part, keys):
            values = self.constants(one, keys)
            if values is None:
                found.append(one)
            else:
                constants = (constants or []) + [value for value in values if json_text(value) not in map(
                    json_text, constants or [])]
        if not found and constants is not None:
            return Choice(keys, check_constants(keys, constants) + [MISSING] * (not required))
        if len(found) > 1 or not all(value is None for value in constants or ()):
            refuse(keys, f'may be {len(found)} different kinds of objects, lists or texts' if len(found) > 1 else
                   'may be a constant, or an object, a list or a text')
        inner = self.read_compound(found[0], keys)
        others = [None] * bool(constants) + [MISSING] * (not required and bool(keys))
        return Maybe(keys, inner, others) if others else inner

    def constants(self, part, keys):
        """the values of a part that is a choice of constants, or None."""
        kind = part.get('type')
        if 'const' in part:
            return [part['const']]
        if isinstance(part.get('enum'), list):
            return part['enum']
        if kind == 'null':
            return [None]
        if kind == 'boolean':
            return [True, False]
        if kind in ('integer', 'number'):
            step = part.get('multipleOf', 1 if kind == 'integer' else None)
            low = part.get('minimum', part.get('exclusiveMinimum'))
            high = part.get('maximum', part.get('exclusiveMaximum'))
            if not all(type(x) in (int, float) for x in (step, low, high)) or not step > 0:
                refuse(keys, f'is any {kind}', 'give it a minimum and a maximum' + (
                    ' and a multipleOf' if kind == 'number' else ''))
            n = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
            if len(n) > MOST_NUMBERS:
                refuse(keys, f'has {len(n)} values', f'at most {MOST_NUMBERS} can be learned')
            values = [round(k * step, 9) for k in n]
            values = [int(value) if kind == 'integer' else value for value in values]
            return [value for value in values if not ('minimum' not in part and value == low
                                                      or 'maximum' not in part and value == high)]
        return None

    def read_compound(self, part, keys):
        """the tree of an object or a list."""
        kind = part.get('type') or ('object' if 'properties' in part else 'array' if 'items' in part else None)
        if unknown := [key for key in IGNORED if key in part]:
            refuse(keys, f'has {unknown[0]}', 'list its values or properties')
        if kind == 'array':
            return self.read_list(part, keys)
        if kind == 'object':
            properties = part.get('properties') or {}
            required = part.get('required', properties)         # without the key, as people write by hand: all of them
            if not properties:
                refuse(keys, 'is an object whose keys are not known', 'list its properties')
            return self.read_object(keys, {name: (inner, name in required) for name, inner in properties.items()})
        if kind == 'string':
            why = f'is a text of the form {part["pattern"]}' if 'pattern' in part else \
                f'is a {part["format"]}' if isinstance(part.get('format'), str) else 'is free text'
            refuse(keys, why, 'list its values (enum)')
        refuse(keys, 'allows any value' if kind is None else f'has the type {kind}', 'list its values (enum)')

    def read_object(self, keys, properties):
        """the tree of an object. properties: {name: (its part, is it required?)}."""
        parts = {}
        for name, (part, required) in properties.items():
            check_name(name)
            if re.sub(r'\[\d+\]', '[]', path_of((*keys, name))) not in self.left_out:
                parts[name] = self.read(part, (*keys, name), required)
        if keys and not parts:
            raise ValueError(f'all properties of {path_of(keys)} are left out; leave it out as a whole')
        return Object(keys, parts)

    def read_list(self, part, keys):
        """the tree of a list: Several if its items are constants that come once each, else Items."""
        items = part.get('items')
        if not isinstance(items, (dict, list)) or items == {}:
            refuse(keys, 'is a list of any values', 'say what its items are')
        least, most = part.get('minItems', 0), part.get('maxItems')
        item = self.read(items, (*keys, 0))
        if isinstance(item, Choice) and part.get('uniqueItems') is not False:
            return Several(keys, item.values, min(least, len(item)), most)
        most = MOST_ITEMS if most is None else most
        if not 0 <= least <= most:
            raise ValueError(f'{path_of(keys)} has minItems = {least} and maxItems = {most}')
        return Items(keys, [self.read(items, (*keys, n)) for n in range(most)], least) if most else Choice(keys, [[]])


def refuse(keys, why, advice='list its values'):
    path = re.sub(r'\[\d+\]', '[]', path_of(keys)) or 'the schema'
    raise ValueError(f'{path} {why}: {advice}, or leave it out: left_out = [{path!r}]')


def check_name(name):
    """ValueError if this is no name of a property."""
    if not isinstance(name, str):
        raise ValueError(f'field names must be strings, not {name!r}')
    check_constant(name, name)


def check_constant(path, constant):
    try:
        json.dumps(constant, ensure_ascii=False, allow_nan=False).encode()  # raises on a lone surrogate
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f'field {path!r}: {constant!r} cannot be written as JSON') from None


def check_constants(keys, values):
    """the values of a choice. ValueError if they are none."""
    path = path_of(keys)
    for value in values:
        check_constant(path, value)
        if has_object(value):
            raise ValueError(f'field {path!r}: {value!r} has a JSON object in it; values are strings, numbers, '
                             'true, false, null and lists of them')
    if not values or len(set(map(json_text, values))) < len(values):
        raise ValueError(f'field {path!r} needs a list of different values, not {values!r}')
    return list(values)


def has_object(value):
    """True if a JSON value is an object or a list with one in it."""
    return isinstance(value, dict) or isinstance(value, list) and any(map(has_object, value))
