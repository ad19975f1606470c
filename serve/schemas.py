"""JSON Schemas: which of the student's fields answer a schema, and the reply in the caller's names and
values.

A property is the field of its name, whatever its case, `-`, `_` and blanks; or, under another name, the only
field with exactly its options. Options are compared in the same way. Properties that no field answers: an
optional one is left out, a nullable one is null, a constant is itself, a probability is the confidence. All
others are refused by name.
"""
import json
import math
import re
from functools import lru_cache
from itertools import product

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from distil.schema import value_name
from serve.request import Refusal
from serve.shapes import Part, Shape, whole_shape

MAX_CHECKS = 20_000  # answers times objects of the schema, for one schema
CERTAINTY = re.compile('(confidence|probability|certainty|score)')


def loose(name):
    """a name without case, `-`, `_` and blanks."""
    return re.sub(r'[\s_-]+', '', name).casefold()


# -----------------------------------------------------------------------------
# the options of a property


def resolve(part, root):
    """a part of a schema without references at its top: the target and what stands beside the reference."""
    for _ in range(20):
        if not isinstance(part, dict):
            return {}
        inner = part.get('allOf')
        if isinstance(part.get('$ref'), str):
            target = root
            for key in part['$ref'].removeprefix('#').split('/')[1:]:
                target = target[key.replace('~1', '/').replace('~0', '~')] if isinstance(target, dict) else {}
            part = {**target, **{key: value for key, value in part.items() if key != '$ref'}}
        elif isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], dict):
            part = {**inner[0], **{key: value for key, value in part.items() if key != 'allOf'}}
        else:
            return part
    raise ValueError('its references go in a circle')


def read_options(part, root):
    """(options or None if the part names none, set of its types, True if it may be null)."""
    part = resolve(part, root)
    types = part.get('type', [])
    types = set(types) if isinstance(types, list) else {types}
    options = part['enum'] if isinstance(part.get('enum'), list) else None
    options = [part['const']] if 'const' in part else options
    for one in part.get('anyOf') or part.get('oneOf') or []:
        inner_options, inner_types, nullable = read_options(one, root)
        types |= inner_types | ({'null'} if nullable else set())
        if inner_options is not None:
            options = (options or []) + inner_options
    nullable = 'null' in types or options is not None and None in options
    return options, types - {'null'}, nullable


def match_options(options, leaf):
    """{number of a value: the caller's word for it} of those of a leaf's values that are among the
    options."""
    names, option_names = leaf.names, [value_name(option) for option in options]
    found = {n: options[option_names.index(name)] for n, name in enumerate(names) if name in option_names}
    if len({*map(loose, names)}) == len(names):                 # else two values differ in case alone
        for n, name in enumerate(names):
            alike = [option for option in options if loose(value_name(option)) == loose(name)]
            if n not in found and len(alike) == 1 and alike[0] not in found.values():
                found[n] = alike[0]
    return found


def match_yes_and_no(options, types, leaf, yes):
    """the same for true and false, or options that say yes and no, about a leaf with two values, one of
    which means yes."""
    yes = next((n for n, value in enumerate(leaf.values) if value_name(value) == value_name(yes)), None)
    if len(leaf) != 2 or yes is None:
        return {}
    if options is None:
        return {yes: True, 1 - yes: False} if types == {'boolean'} else {}
    lower = {value_name(option).lower(): option for option in options}
    pair = next((pair for pair in (('yes', 'no'), ('true', 'false')) if {*pair} <= {*lower}), None)
    return {yes: lower[pair[0]], 1 - yes: lower[pair[1]]} if pair and len(lower) == 2 else {}


def match_field(name, options, types, space, true_value):
    """(field, {number of a value: the caller's word}) of the field that answers a property, or None. A field is the path
    of a leaf."""
    paths = space.schema.paths
    same = [path for path in paths if path == name] or [path for path in paths if loose(path) == loose(name)]
    yes_named = [path for path, value in true_value.items() if loose(value_name(value)) == loose(name)]
    if len(same) == 1 or not same and types == {'boolean'} and len(yes_named) == 1:
        leaf = space.schema.leaf((same or yes_named)[0])
        words = {} if options is None else match_options(options, leaf)
        if not same or len(words) < 2:
            words = match_yes_and_no(options, types, leaf, true_value.get(leaf.path, True)) or words
        if not words and options is None:
            words = dict(enumerate(leaf.values))
        if len(words) < min(2, len(leaf)):
            raise ValueError(f'{name!r} offers none or one of the values of the field {leaf.path}: '
                             f'{", ".join(leaf.names)}')
        return leaf.path, words
    if options and len(options) > 1:
        exact = [(leaf.path, words) for leaf in space.schema.leaves
                 if len(words := match_options(options, leaf)) == len(leaf) == len(options)]
        if len(exact) > 1:
            raise ValueError(f'several fields have the options of {name!r}: '
                             f'{", ".join(field for field, _ in exact)}; name the property after one')
        return exact[0] if exact else None
    return None


# -----------------------------------------------------------------------------
# from a schema to a Shape


def count_objects(part, defs):
    """number of objects in a part of a JSON Schema, each $ref replaced by its target. ValueError if it has
    references of another kind. defs: {reference: its definition}, changed in place to {reference: its
    count}."""
    if isinstance(part, list):
        return sum(count_objects(inner, defs) for inner in part)
    if not isinstance(part, dict):
        return 0
    total = 1 + sum(count_objects(inner, defs) for key, inner in part.items()
                    if key not in ('$defs', 'definitions'))
    if part.keys() & {'$id', '$anchor', '$dynamicRef', '$dynamicAnchor'}:
        raise ValueError('the schema has $id, $anchor or $dynamicRef inside of it, which is not supported')
    if isinstance(ref := part.get('$ref'), str):
        if ref not in defs:
            raise ValueError(f'the schema has no {ref!r}; references are #/$defs/... or #/definitions/...')
        if not isinstance(defs[ref], int):
            inner, defs[ref] = defs[ref], MAX_CHECKS            # the count if it refers to itself: too large
            defs[ref] = count_objects(inner, defs)
        total += defs[ref]
    return total


def make_part(name, inner, required, root, space, true_value):
    """the Part of a property, or None if it is left out. ValueError if it cannot be answered. required: True
    or False; None: it must be a field."""
    options, types, nullable = read_options(inner, root)
    match = match_field(name, options, types, space, true_value)
    if match:
        field, words = match
        return Part(name, 'field', field, tuple(sorted(words.items())))
    if options is not None and len(options) == 1:
        return Part(name, 'constant', spelled=(options[0],))
    limits = [resolve(inner, root).get(key) for key in ('minimum', 'maximum')]
    certainty = CERTAINTY.search(loose(name)) if types == {'number'} else None
    if certainty and (limits == [0, 1] or limits == [None, None] and certainty[1] != 'score'):
        fields = [path for path in space.schema.paths if loose(path) in loose(name)]
        return Part(name, 'confidence', fields[0] if len(fields) == 1 else '')
    if required is False:
        return None
    if nullable and required:
        return Part(name, 'constant', spelled=(None,))
    what = 'a list' if 'array' in types else 'an object in it' if 'object' in types else \
        'free text' if types == {'string'} and options is None else 'a field of its own'
    offered = f' ({", ".join(map(value_name, options[:12]))})' if options else ''
    raise ValueError(f'the student does not answer {name!r}{offered}, which is {what}; its fields are: '
                     + space.schema.describe())


def make_shape(schema, space, true_value):
    """the Shape of a schema's answers. ValueError with the reason if there is none."""
    root = {key: value for key, value in schema.items() if key not in ('$id', '$schema')}
    defs = {f'#/{key}/{name}': inner for key in ('$defs', 'definitions')
            for name, inner in dict(root.get(key) or {}).items()}
    if (n_objects := count_objects(root, defs)) > MAX_CHECKS / 20:
        raise ValueError('the schema cannot be read: it is too large')
    Draft202012Validator.check_schema(root)
    validator = Draft202012Validator(root, registry=Registry())  # an empty registry: fetches nothing
    top = resolve(root, root)
    properties, required = top.get('properties', {}), top.get('required', [])
    options, types, _ = read_options(root, root)
    if options is not None and not properties:
        shape = Shape((make_part('answer', root, True, root, space, true_value),), bare=True)
    elif 'array' in types or types - {'object'}:
        raise ValueError(f'the schema asks for {" or ".join(sorted(types))}; the student answers one object')
    elif not properties and not required:
        shape = whole_shape(space)
    else:
        names = [*properties, *(name for name in required if name not in properties)]
        parts = [make_part(name, properties.get(name, {}), name in required, root, space, true_value)
                 for name in names]
        shape = Shape(tuple(part for part in parts if part))
        if not any(part and part.source == 'field' for part in parts):  # none is answered; the first says why
            make_part(names[0], properties.get(names[0], {}), None, root, space, true_value)
    check_answers(shape, space, validator, n_objects)
    return shape


def check_answers(shape, space, validator, n_objects):
    """ValueError if a schema does not allow every answer of a Shape, or if there is nothing to decide."""
    rows = [[part.spelled[0]] if part.source == 'constant' else [0.5, 0.0, 1.0] if part.source == 'confidence'
            else [word for _, word in part.spelled] for part in shape.parts]
    if not any(part.source == 'field' and len(part.spelled) > 1 for part in shape.parts):
        names = ', '.join(part.name for part in shape.parts)
        raise ValueError(f'there is nothing to decide: {names} can have only one value; the fields of the '
                         f'student are: {", ".join(space.schema.paths)}')
    first = [row[0] for row in rows]
    answers = [[*first[:n], word, *first[n + 1:]] for n, row in enumerate(rows) for word in row]
    if math.prod(map(len, rows)) * n_objects <= MAX_CHECKS:     # few enough to check all combinations
        answers += product(*rows)
    for answer in answers:
        answer = answer[0] if shape.bare else dict(zip([part.name for part in shape.parts], answer))
        for error in validator.iter_errors(answer):
            field = next(iter(error.absolute_path), '')
            of_field = f' (field {field!r})' if field else ''
            raise ValueError(f'the student can answer {json.dumps(answer, ensure_ascii=False)}, which the schema does '
                             f'not allow{of_field}: {error.message[:200]}')


@lru_cache(maxsize=256)  # a caller sends the same one every time
def plan_schema(text, space, true_values):
    """the Shape of a JSON Schema, or a string: why there is none. true_values: items of true_value."""
    try:
        return make_shape(json.loads(text), space, dict(true_values))
    except (SchemaError, Unresolvable, RecursionError, TypeError, AttributeError, LookupError) as error:
        return f'the schema cannot be read: {str(error)[:200]}'
    except ValueError as error:
        return str(error)


def read_schema(schema, space, true_value, *where):
    """the Shape of a JSON Schema (a dict). where: keys that lead to it in the body, for a Refusal."""
    true_values = tuple(sorted((field, value) for field, value in true_value.items()))
    shape = plan_schema(json.dumps(schema), space, true_values)
    if isinstance(shape, str):
        raise Refusal(400, shape, *where)
    return shape
