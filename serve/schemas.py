"""JSON Schemas: which of the student's fields answer a schema, and the reply in the caller's names and
values.

A property is the field of its name, whatever its case, `-`, `_` and blanks; or, under another name, the only
field with exactly its options. Options are compared in the same way. A list or an object is one of the student's,
whose parts must all be allowed (trees.py). What is copied from the text is a string, a number or a date, whatever
length, pattern or bounds the caller gives. Properties that no field answers: a constant is itself, a probability is
the confidence, `fill` says what a required one gets, an optional one is left out, a nullable one is null. All others
are refused by name.
"""
import json
import math
from functools import lru_cache
from itertools import product

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from distil.kinds import Maybe
from distil.schema import copied_in
from distil.values import MISSING, group_of, path_of, value_name
from serve.options import alternatives, find_name, loose, match_options, match_yes_and_no, read_options, resolve
from serve.request import Refusal
from serve.shapes import Part, Shape, Tree, whole_shape
from serve.trees import Caller, answer_otherwise, copies, is_limit, is_scalar, lists, option_parts, scalars, translate

MAX_CHECKS = 20_000  # answers times objects of the schema, for one schema


def match_field(name, options, types, leaves, true_value):
    """(field, {number of a value: the caller's word}) of the field that answers a property, or None. leaves: {path:
    leaf} of the scalars; a field is a path."""
    same, yes_named = find_name(name, leaves), [path for path, value in true_value.items()
                                                if path in leaves and loose(value_name(value)) == loose(name)]
    if same is not None or types == {'boolean'} and len(yes_named) == 1 and not any(
            loose(path) == loose(name) for path in leaves):
        leaf = leaves[yes_named[0] if same is None else same]
        words = {} if options is None else match_options(options, leaf)
        if same is None or len(words) < 2:
            words = match_yes_and_no(options, types, leaf, true_value.get(leaf.path, True)) or words
        if not words and options is None:
            words = dict(enumerate(leaf.values))
        if len(words) < min(2, len(leaf)):
            raise ValueError(f'{name!r} offers none or one of the values of the field {leaf.path}: '
                             f'{", ".join(leaf.names)}')
        return leaf.path, words
    if options and len(options) > 1:
        exact = [(path, words) for path, leaf in leaves.items()
                 if len(words := match_options(options, leaf)) == len(leaf) == len(options)]
        return the_only(exact, name)
    return None


def match_list(name, inner, schema, root):
    """the part of a Schema that is a list of the caller's options, whatever its name; None if there is none."""
    arrays = [one for one in alternatives(inner, root) if one.get('type') == 'array']
    options = read_options(arrays[0].get('items', {}), root)[0] if len(arrays) == 1 else None
    exact = []
    for part in lists(schema) if options else ():
        several = part.part if isinstance(part, Maybe) else part
        if len(match_options(options, several)) == len(several.values) == len(options):
            exact.append((group_of(part.keys), part))
    found = the_only(exact, name)
    return found and found[1]


def the_only(found, name):
    """the only one of those fields, (path, ...) each, that have the options of a property; None if there is none."""
    if len(found) > 1:
        raise ValueError(f'several fields have the options of {name!r}: {", ".join(path for path, _ in found)}; '
                         'name the property after one')
    return found[0] if found else None


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


def make_part(name, inner, required, schema, caller):
    """the Part of a property, or None if it is left out. ValueError if it cannot be answered. required: True
    or False; None: it must be a field. schema: the student's; caller: a Caller."""
    options, types, nullable = read_options(inner, caller.root)
    own, properties = find_name(name, schema.tree.properties), schema.tree.properties
    part = None if own is None or is_scalar(properties[own]) else properties[own]
    if part is None and (match := match_field(name, options, types, scalars(schema), caller.true_value)):
        field, words = match
        return Part(name, 'field', field, tuple(sorted(words.items())))
    if part is None and (copied := find_name(name, copies(schema))):
        part = copies(schema)[copied]                           # by its path
    if part is None and options and len(given := option_parts(schema)) == 1:  # whatever its name
        part = next(iter(given.values()))
    if part is None and 'array' in types:
        part = match_list(name, inner, schema, caller.root)
    if part is not None:
        return Part(name, 'tree', tree=Tree(part, translate(part, inner, bool(required), caller)))
    source, value = answer_otherwise(name, inner, required, name, caller) or ('', None)
    if source == 'confidence':
        return Part(name, source, value)
    return Part(name, source, spelled=(value,)) if source else None


def make_shape(schema, space, true_value, fill):
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
    caller = Caller(root, true_value, space.schema.paths, space.schema.describe(), fill)
    if options is not None and not properties:
        shape = Shape((make_part('answer', root, True, space.schema, caller),), bare=True, options=caller.options)
    elif 'array' in types or types - {'object'}:
        raise ValueError(f'the schema asks for {" or ".join(sorted(types))}; the student answers one object')
    elif not properties and not required:
        shape = whole_shape(space)
    else:
        names = [*properties, *(name for name in required if name not in properties)]
        parts = [make_part(name, properties.get(name, {}), name in required, space.schema, caller) for name in names]
        shape = Shape(tuple(part for part in parts if part), options=caller.options)
        if not any(part and part.source in ('field', 'tree') for part in parts):  # none is answered; the first says why
            make_part(names[0], properties.get(names[0], {}), None, space.schema, caller)
    check_answers(shape, space, validator, n_objects)
    return shape


def check_answers(shape, space, validator, n_objects):
    """ValueError if a schema does not allow every answer of a Shape, or if there is nothing to decide."""
    rows = [part.examples() for part in shape.parts]
    if not any(part.source in ('field', 'tree') and len(row) > 1 or part.tree and copied_in(part.tree.part)
               for part, row in zip(shape.parts, rows)):
        names = ', '.join(part.name for part in shape.parts)
        raise ValueError(f'there is nothing to decide: {names} can have only one value; the fields of the '
                         f'student are: {", ".join(space.schema.paths)}')
    first = [row[0] for row in rows]
    answers = [[*first[:n], word, *first[n + 1:]] for n, row in enumerate(rows) for word in row]
    if math.prod(map(len, rows)) * n_objects <= MAX_CHECKS:     # few enough to check all combinations
        answers += product(*rows)
    for answer in answers:
        named = {part.name: word for part, word in zip(shape.parts, answer) if word is not MISSING}
        answer = answer[0] if shape.bare else named
        for error in validator.iter_errors(answer):
            if is_limit(error):
                continue
            field = path_of(error.absolute_path)
            of_field = f' (field {field!r})' if field else ''
            raise ValueError(f'the student can answer {json.dumps(answer, ensure_ascii=False)[:400]}, which the schema '
                             f'does not allow{of_field}: {error.message[:200]}')


@lru_cache(maxsize=256)  # a caller sends the same one every time
def plan_schema(text, space, true_values, fill):
    """the Shape of a JSON Schema, or a string: why there is none. text, fill: as JSON; true_values: items of
    true_value."""
    try:
        return make_shape(json.loads(text), space, dict(true_values), json.loads(fill))
    except (SchemaError, Unresolvable, RecursionError, TypeError, AttributeError, LookupError) as error:
        return f'the schema cannot be read: {str(error)[:200]}'
    except ValueError as error:
        return str(error)


def read_schema(schema, space, true_value, *where, fill=None):
    """the Shape of a JSON Schema (a dict). where: keys that lead to it in the body, for a Refusal; true_value, fill: as
    the settings of serve.py."""
    true_values = tuple(sorted((field, value) for field, value in true_value.items()))
    shape = plan_schema(json.dumps(schema), space, true_values, json.dumps(fill or {}))
    if isinstance(shape, str):
        raise Refusal(400, shape, *where)
    return shape
