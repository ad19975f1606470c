"""JSON Schema, as structured outputs take it, as a tree of kinds. Only the standard library.

    tree = read_fields(Ticket.model_json_schema())              # pydantic's, zod's, a tool's parameters
    tree = read_fields({'tone': ['neutral', 'friendly'], 'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui']}}})

What a student can answer is what is known beforehand, constants, and what the text says: a string without enum is
copied, a number without bounds, a date or a time is read. In lists, objects, lists of objects. All else is refused
with a sentence that names the property and says what to do.
"""
import json
import math
from urllib.parse import unquote

from distil.copied import EXAMPLES, Copied
from distil.kinds import Choice, Items, Maybe, Object, Several
from distil.values import MISSING, group_of, json_text, path_of

MOST_ITEMS = 16  # of a list without maxItems
MOST_NUMBERS = 1001  # values of an integer with a minimum and a maximum
WRAPPERS = ('response_format', 'text', 'format', 'json_schema', 'schema', 'function', 'parameters', 'input_schema',
            'inputSchema', 'responseSchema', 'response_json_schema')
# keys of a whole JSON Schema, and what stands there: in a map of names to values there is a list, or a schema
WHOLE = {'type': str, '$ref': str, '$schema': str, '$defs': dict, 'anyOf': list, 'oneOf': list, 'allOf': list,
         'additionalProperties': bool}
# keys that cannot be followed
REFUSED = 'patternProperties', 'not', 'if', 'prefixItems', 'contains', 'dependentSchemas'
TYPES = {'string': str, 'integer': int, 'number': (int, float), 'boolean': bool, 'null': type(None), 'array': list}


def is_json_schema(fields):
    """True if fields are a whole JSON Schema, False if they map names to values."""
    if not isinstance(fields, dict) or isinstance(fields.get('type'), list | dict):
        return False
    return isinstance(fields.get('properties'), dict) or any(isinstance(fields.get(key), kind)
                                                             for key, kind in WHOLE.items())


def unwrap(schema):
    """the JSON Schema in a response_format, a tool or a tool's parameters; the schema itself if it is none."""
    for _ in range(6):
        inner = [schema[key] for key in WRAPPERS if isinstance(schema, dict) and isinstance(schema.get(key), dict)]
        if not inner or isinstance(schema.get('properties'), dict):
            break
        schema = inner[0]
    return schema


def read_fields(fields, left_out=()):
    """the tree of fields: {name: list of constants, or JSON Schema}, or the JSON Schema of an object. left_out: paths
    of properties that are not in it. ValueError, which names the property, if it cannot be answered."""
    if not isinstance(fields, dict):
        raise ValueError("fields must be {'name': [values], ...}, or the JSON Schema of an object")
    if not is_json_schema(fields):
        tree = Reader(fields, left_out).read_object((), {name: (part, True) for name, part in fields.items()})
    else:
        tree = Reader(fields, left_out).read(fields, ())
    if not isinstance(tree, Object):
        raise ValueError('nothing to decide: every property is left out' if tree is None else
                         'the schema must be that of an object: make what it is a property of one')
    return tree


class Reader:
    """root: the JSON Schema that references point into; left_out: paths. Each read method returns None for a part of
    which everything is left out."""

    def __init__(self, root, left_out):
        self.root, self.left_out, self.open = root, {path.removesuffix('[]') for path in left_out}, []

    def find(self, ref, keys):
        """what a reference leads to. ValueError if there is nothing."""
        target = self.root
        for key in ref.removeprefix('#').split('/')[1:]:
            key = unquote(key).replace('~1', '/').replace('~0', '~')
            if isinstance(target, list):
                target = target[int(key)] if key.isdigit() and int(key) < len(target) else None
            else:
                target = target.get(key) if isinstance(target, dict) else None
        if not isinstance(target, dict) or not ref.startswith('#'):
            raise ValueError(f'{path_of(keys) or "the schema"} refers to {ref}, which is not in the schema')
        return target

    def resolve(self, part, keys):
        """a part without references and allOf at its top. `$from` of it: the references that led to it."""
        while True:
            inner = part.get('allOf')
            if isinstance(ref := part.get('$ref'), str):
                came = part.get('$from', ())
                if ref in came or ref in self.open:
                    refuse(keys, f'refers to {ref} again, in which it stands', 'write it out as deep as it is needed')
                rest = {key: value for key, value in part.items() if key != '$ref'}
                part = merge(self.find(ref, keys), rest | {'$from': (*came, ref)})
            elif isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner):
                both = {'$from': part.get('$from', ())}
                for one in inner:
                    both = merge(both, self.resolve({**one, '$from': both['$from']}, keys))
                part = merge(both, {key: value for key, value in part.items() if key not in ('allOf', '$from')})
            else:
                return part

    def alternatives(self, part, keys):
        """the parts of which one applies, each without anyOf, oneOf and a list of types."""
        part = self.resolve(part, keys)
        if isinstance(kind := part.get('type'), str):           # Gemini's are in capitals
            part = {**part, 'type': kind.lower()}
        if 'enum' in part or 'const' in part:
            return [part]
        nothing = [{'type': 'null'}] if part.get('nullable') is True else []
        for key in 'anyOf', 'oneOf':
            if isinstance(part.get(key), list):
                rest = {k: v for k, v in part.items() if k != key}
                if 'properties' in rest:
                    refuse(keys, f'has {key} beside its properties', 'write its properties in one object')
                inner = [merge(one, rest) for one in part[key] if isinstance(one, dict)]
                return [one for other in inner for one in self.alternatives(other, keys)] + nothing
        if isinstance(part.get('type'), list):
            return [{**part, 'type': kind} for kind in part['type']]
        return [part, *nothing]

    def read(self, part, keys, required=True):
        """the tree of a part. keys: that lead to it; required: False if it may be missing."""
        path = path_of(keys)
        if isinstance(part, list):
            return Choice(keys, check_constants(path, part) + [MISSING] * (not required))
        if not isinstance(part, dict):
            if keys and keys[-1] in ('additionalProperties', 'required') and isinstance(part, bool | list):
                raise ValueError(f'{path} stands among the properties; it belongs beside them')
            if part is True:
                refuse(keys, 'allows any value')
            raise ValueError(f'field {path!r} needs a list of different values, or a JSON Schema, not {part!r}')
        found, constants, about = [], {}, ''
        for one in self.alternatives(part, keys):
            about = about or one.get('description') or ''
            values = self.constants(one, keys)
            constants |= {json_text(value): value for value in values or ()}
            found += [] if values is not None else [one]
        if not found:
            tree = Choice(keys, check_constants(path, list(constants.values())) + [MISSING] * (not required))
            tree.about = about
            return tree
        if len(found) > 1 or constants.keys() - {'null'}:
            refuse(keys, f'may be one of {len(found)} kinds of objects, lists or texts' if len(found) > 1 else
                   'may be a constant, or an object, a list or a text', 'choose one')
        self.open += (came := found[0].get('$from', ()))
        inner = self.read_compound(found[0], keys)
        del self.open[len(self.open) - len(came):]
        if inner:
            inner.about = about                                 # its description
        others = [None] * bool(constants) + [MISSING] * (not required)
        return Maybe(keys, inner, others) if others and inner else inner

    def constants(self, part, keys):
        """the values of a part that is a choice of constants, or None."""
        kind, step = part.get('type'), part.get('multipleOf', 1 if part.get('type') == 'integer' else None)
        if 'const' in part:
            return [part['const']]
        if isinstance(part.get('enum'), list):
            kinds = tuple(TYPES[one] for one in ([kind] if isinstance(kind, str) else kind or ()) if one in TYPES)
            known = [value for value in part['enum'] if not kinds or any(
                isinstance(value, one) and (one is not int or type(value) is not bool) for one in kinds)]
            return known + [None] * (part.get('nullable') is True and None not in known)
        if kind == 'null':
            return [None]
        if kind == 'boolean':
            return [True, False]
        if kind not in ('integer', 'number'):
            return None
        limits = [[part[key] for key in pair if type(part.get(key)) in (int, float)]
                  for pair in (('minimum', 'exclusiveMinimum'), ('maximum', 'exclusiveMaximum'))]
        if not all(limits) or type(step) not in (int, float) or not step > 0:
            return None                                         # it is read from the text
        low, high = max(limits[0]), min(limits[1])
        if (high - low) / step > MOST_NUMBERS - 1:
            return None
        values = [round(k * step, 9) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        allowed = [value for value in values if value > part.get('exclusiveMinimum', -math.inf)
                   and value < part.get('exclusiveMaximum', math.inf)]
        if not allowed:
            raise ValueError(f'{path_of(keys)} has no value from {low} to {high}')
        return [int(value) if kind == 'integer' else value for value in allowed]

    def read_compound(self, part, keys):
        """the tree of an object, a list or a value that is copied."""
        kind = part.get('type') or ('object' if 'properties' in part else 'array' if 'items' in part else None)
        if unknown := [key for key in REFUSED if key in part]:
            refuse(keys, f'has {unknown[0]}', 'list its values or properties')
        if kind == 'array':
            return self.read_list(part, keys)
        if kind == 'object':
            properties = part.get('properties') or {}
            names = self.constants(self.resolve(part.get('propertyNames') or {}, keys), keys)
            if not properties and names and isinstance(part.get('additionalProperties'), dict):  # dict[Enum, ...]
                properties = dict.fromkeys(names, part['additionalProperties'])
            if not properties:
                refuse(keys, 'is an object whose keys are not known', 'list its properties')
            # without `required`, as people write by hand, all of them are; pydantic, which writes titles, means none
            required = part.get('required', () if 'title' in part else properties)
            required = required if isinstance(required, list | dict | tuple) else ()
            return self.read_object(keys, {name: (inner, name in required) for name, inner in properties.items()})
        if kind in ('string', 'number', 'integer'):
            named = part.get('format') if kind == 'string' else kind
            if kind == 'string' and part.get('x-options'):
                return Copied(keys, 'option:' + '.'.join(key for key in keys if isinstance(key, str)))
            return Copied(keys, named if named in EXAMPLES else 'text')
        refuse(keys, 'allows any value' if kind is None else f'has the type {kind}', 'list its values (enum)')

    def read_object(self, keys, properties):
        """the tree of an object. properties: {name: (its part, is it required?)}."""
        parts = {}
        for name, (part, required) in properties.items():
            check_name(name)
            if group_of((*keys, name)) not in self.left_out:
                parts[name] = self.read(part, (*keys, name), required)
        parts = {name: part for name, part in parts.items() if part}
        return Object(keys, parts) if parts or not keys else None

    def read_list(self, part, keys):
        """the tree of a list: Several if its items are texts that come once each, else Items."""
        items, least, most = part.get('items'), part.get('minItems', 0), part.get('maxItems')
        if not isinstance(items, dict) or items == {}:
            refuse(keys,
                   'is a list of several kinds of items' if isinstance(items, list) else 'is a list of any values',
                   'say what its items are')
        item, unique = self.read(items, (*keys, 0)), part.get('uniqueItems')
        if most is not None and not 0 <= least <= most:
            raise ValueError(f'{path_of(keys)} has minItems = {least} and maxItems = {most}')
        texts = isinstance(item, Choice) and all(isinstance(value, str) for value in item.values)
        if isinstance(item, Choice) and least <= len(item) and (unique or texts and unique is None):
            return Several(keys, item.values, least, most)
        most = max(MOST_ITEMS, least) if most is None else most
        parts = [self.read(items, (*keys, n)) for n in range(most)]
        return (Items(keys, parts, least) if most else Choice(keys, [[]])) if item else None


def merge(first, second):
    """one part that says what two say."""
    both = {**first, **second}
    if isinstance(first.get('properties'), dict) and isinstance(second.get('properties'), dict):
        both['properties'] = {**first['properties'], **second['properties']}
    if isinstance(first.get('required'), list) and isinstance(second.get('required'), list):
        both['required'] = list(dict.fromkeys(first['required'] + second['required']))
    if isinstance(first.get('enum'), list) and isinstance(second.get('enum'), list):
        texts = list(map(json_text, second['enum']))
        both['enum'] = [value for value in first['enum'] if json_text(value) in texts]
    return both


def refuse(keys, why, advice='list its values'):
    path = group_of(keys).removesuffix('[]')
    raise ValueError(f'{group_of(keys)} {why}: {advice}, or leave it out: left_out = [{path!r}]' if keys else
                     f'the schema {why}: {advice}')


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


def check_constants(path, values):
    """the values of a choice. ValueError if they are none."""
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
