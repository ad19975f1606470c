"""The JSON Schema that the requests of a log ask for: which it is, what of it no student can answer, how long its
answers are. Only the standard library.

    schema = asked_schema(request, response)    # of a response_format, or of the tool that was called; or None
    fitted = Fit(schema, part)                  # part: all answers, a Part of data/infer.py
    fitted.schema, fitted.left_out              # {'type': 'object', ...}, {'reason': 'free text (...)'}

distil/json_schema.py reads what is made here, and refuses the rest; the rules are the same.
"""
import copy
import json
import math
import sys
from pathlib import Path

MOST_ITEMS = 16      # of a list without maxItems
MOST_NUMBERS = 1000  # values of an integer
FEW = 20             # values of a text that the schema does not list, and the log shows: at most these ...
OFTEN = 3            # ... and each as often as this, on average
WRAPPERS = 'json_schema', 'schema', 'format', 'function', 'parameters', 'input_schema'
# keys that say nothing about which values are allowed, or nothing that a list of constants does not say
IGNORED = ('patternProperties', 'propertyNames', 'not', 'if', 'prefixItems', 'contains', 'dependentSchemas')


def is_json_schema(schema):
    """True for the JSON Schema of an object."""
    return isinstance(schema, dict) and (isinstance(schema.get('properties'), dict) and not isinstance(
        schema.get('type'), list) or isinstance(schema.get('$ref'), str))


def unwrap(schema):
    """the JSON Schema in a response_format or a tool, or the schema itself; None if there is none."""
    for _ in range(4):
        if is_json_schema(schema):
            return schema
        schema = next((schema[key] for key in WRAPPERS if isinstance(schema, dict) and isinstance(
            schema.get(key), dict)), None)
    return None


def read_schema_file(path):
    """the JSON Schema in a file, which may be in a response_format or a tool. Exits with a message if there is none."""
    try:
        schema = unwrap(json.loads(Path(path).read_text(encoding='utf-8-sig')))
    except OSError as error:
        sys.exit(f'--schema={path} cannot be read: {error.strerror}')
    except (ValueError, RecursionError) as error:
        sys.exit(f'--schema={path} is not JSON: {error}')
    return schema or sys.exit(f'--schema={path} is no JSON Schema of an object with properties')


# -----------------------------------------------------------------------------
# of a request


def named_function(call):
    """the name of the function in a call or a choice of a tool; None if there is none."""
    inner = call.get('function') if isinstance(call, dict) else None
    return inner.get('name') if isinstance(inner, dict) else call.get('name') if isinstance(call, dict) else None


def called_function(request, response):
    """the name of the function that a response calls, else that the request demands; None if there is none."""
    calls = [request.get('tool_choice'), request.get('function_call')]
    for choice in response.get('choices') or ():
        message = choice.get('message') or {}
        content = message.get('content')
        calls += [message.get('function_call'), *(message.get('tool_calls') or ())]
        calls += [part for part in content if part.get('type') == 'tool_use'] if isinstance(content, list) else []
    calls += [item for item in response.get('output') or () if item.get('type') == 'function_call']
    return next(filter(None, map(named_function, reversed(calls))), None)


def asked_schema(request, response):
    """the JSON Schema that an answer was to follow: of a response_format, or the parameters of the tool that was
    called; None if there is none. request, response: the bodies, {} if they are not known."""
    try:
        for key in 'response_format', 'text', 'output_format', 'output_config':
            if schema := unwrap(request.get(key)):
                return schema
        tools = [*(request.get('tools') or ()), *(request.get('functions') or ())]
        name = called_function(request, response)
        if name or not response and len(tools) == 1:            # the latter: of a batch
            return next((unwrap(tool) for tool in tools if not name or named_function(tool) == name), None)
    except (LookupError, TypeError, AttributeError):            # of another form
        pass
    return None


def follow_ref(part, root):
    """(a part of a JSON Schema, or what its reference leads to; the name of that definition, or '')."""
    ref = part.get('$ref') if isinstance(part, dict) else None
    if not isinstance(ref, str):
        return part if isinstance(part, dict) else {}, ''
    target = root
    for key in ref.removeprefix('#').split('/')[1:]:
        target = target.get(key) if isinstance(target, dict) else None
    return target if isinstance(target, dict) else {}, ref.rpartition('/')[2]


def options_in(schema, path):
    """[option], see distil/options.py, that a JSON Schema lists for a property, such as customer.mood, or for the items
    of a list; [] if it lists none."""
    part, root = schema or {}, schema or {}
    for name in path.split('.'):
        part, _ = follow_ref((follow_ref(part, root)[0].get('properties') or {}).get(name), root)
    found, todo = [], [part]
    while todo:
        one, _ = follow_ref(todo.pop(0), root)
        todo += [*(one.get('anyOf') or one.get('oneOf') or ()), *([one['items']] if 'items' in one else ())]
        values = [one['const']] if 'const' in one else one.get('enum') or ()
        about = one.get('description') if 'const' in one else ''
        found += [{'value': value, 'description': about} if isinstance(about, str) and about else value
                  for value in values if isinstance(value, str) and value.strip()]
    return found


def with_options(schema, names):
    """a JSON Schema in which the options of these properties come with each request: {'x-options': true}."""
    schema = copy.deepcopy(schema)
    for name in names:
        part, definition = follow_ref(schema['properties'][name], schema)
        for key in ('$defs', 'definitions'):
            schema.get(key, {}).pop(definition, None)           # the references to it alone would differ
        kind = ['string', 'null'] if None in (part.get('enum') or ()) else 'string'
        about = {key: part[key] for key in ('description',) if key in part}
        schema['properties'][name] = {'type': kind, 'x-options': True, **about}
    return schema


def find_changing(schemas):
    """the names of those properties whose values differ from schema to schema: three times at least. schemas: different
    ones."""
    seen = {}
    for schema in schemas:
        for name in schema.get('properties') or {}:
            values = tuple(json.dumps(option) for option in options_in(schema, name))
            part, _ = follow_ref(schema['properties'][name], schema)
            if values and 'enum' in part:
                seen.setdefault(name, set()).add(frozenset(values))
    return [name for name, sets in seen.items() if len(sets) >= 3]


def find_difference(one, other, path='', of_names=False):
    """the path of a property in which two JSON Schemas differ. of_names: they are the properties of an object."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return path or 'the schema'
    for key in {**one, **other}:
        a, b = one.get(key), other.get(key)
        if a != b:
            if of_names:
                return find_difference(a, b, f'{path}.{key}'.removeprefix('.'))
            is_names = key in ('properties', '$defs', 'definitions')
            if is_names or key == 'items' or isinstance(a, dict) and isinstance(b, dict):
                return find_difference(a, b, f'{path}[]' if key == 'items' else path, is_names)
            return path or 'the schema'
    return path or 'the schema'


# -----------------------------------------------------------------------------
# what of it can be answered


class Fit:
    """a JSON Schema for a student. schema: a copy, in which a text that may be anything has the values of the log, if
    these are few; left_out: {path: why no student can answer it}; notes: lines about what was filled in; problem: why
    nothing of it can be answered, else ''. part: the Part of all answers."""

    def __init__(self, schema, part):
        self.schema, self.left_out, self.notes, self.filled = copy.deepcopy(schema), {}, [], set()
        self.problem = self.why_not(self.schema, '', part, frozenset('#'))

    def resolve(self, part, refs):
        """(a part without references at its top, the dict in it that has its type, the references on the way)."""
        owner = part
        while True:
            inner = part.get('allOf')
            if isinstance(ref := part.get('$ref'), str):
                owner = self.schema
                for key in ref.removeprefix('#').split('/')[1:]:
                    owner = owner.get(key.replace('~1', '/').replace('~0', '~')) if isinstance(owner, dict) else None
                if not isinstance(owner, dict) or not ref.startswith('#'):
                    raise ValueError(f'it refers to {ref}, which is not in the schema')
                if ref in refs:
                    raise ValueError(f'it refers to {ref}, in which it is, without end')
                part, refs = {**owner, **{key: value for key, value in part.items() if key != '$ref'}}, refs | {ref}
            elif isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner):
                part = {key: value for key, value in part.items() if key != 'allOf'}
                for one in inner:
                    one, other, refs = self.resolve(one, refs)
                    part, owner = {**one, **part}, other if 'type' in other else owner
            else:
                return part, owner, refs

    def alternatives(self, part, refs):
        """what resolve returns, of each of the parts of which one applies."""
        if not isinstance(part, dict):
            raise ValueError('any value')
        part, owner, refs = self.resolve(part, refs)
        for key in 'anyOf', 'oneOf':
            if isinstance(part.get(key), list):
                if part.get('type') == 'object' and 'properties' in part:
                    raise ValueError(f'it has {key} beside its properties')
                return [one for inner in part[key] for one in self.alternatives(inner, refs)]
        if isinstance(part.get('type'), list) and 'enum' not in part:
            return [({**part, 'type': kind}, owner, refs) for kind in part['type']]
        return [(part, owner, refs)]

    def why_not(self, part, path, seen, refs):
        """why no student can answer a part; '' if one can. seen: the Part of its values in the log, or None."""
        try:
            found = self.alternatives(part, refs)
        except ValueError as error:
            return str(error)
        compound, constants = [], []
        for one, owner, inner_refs in found:
            values = [one['const']] if 'const' in one else one.get('enum')
            kind = one.get('type')
            if one.get('x-options'):
                constants.append(True)
            elif isinstance(values, list) and id(owner) not in self.filled:
                constants += values
                if any(map(has_object, values)) or not values:
                    return 'its values are objects'
            elif kind in ('null', 'boolean'):
                constants += [None] if kind == 'null' else [True]
            elif kind in ('string', 'integer', 'number'):
                why = why_no_number(one, kind) if kind != 'string' else f'a text of the form {one["pattern"]}' \
                    if 'pattern' in one else f'a {one["format"]}' if 'format' in one else 'free text'
                if why and not self.fill(owner, kind, path, seen) and not is_copied(seen):
                    known = [seen.describe_values(path), seen.describe_copied()] if seen else []
                    known = '; '.join(filter(None, known))
                    return f'{why} ({known})' if known else why
                constants.append(True)
            else:
                compound.append((one, inner_refs))
        if compound and (len(compound) > 1 or any(value is not None for value in constants)):
            return 'values of different kinds'
        return self.why_no_compound(compound[0][0], path, seen, compound[0][1]) if compound else ''

    def why_no_compound(self, part, path, seen, refs):
        """why_not of an object or a list."""
        if unknown := [key for key in IGNORED if key in part]:
            return f'it has {unknown[0]}'
        kind = part.get('type') or ('object' if 'properties' in part else 'array' if 'items' in part else None)
        before, items, properties = dict(self.left_out), part.get('items'), part.get('properties')
        if kind == 'array':
            if not isinstance(items, dict) or not items:
                return 'a list of any values'
            why = self.why_not(items, f'{path}[]', seen and seen.item, refs)
            if why:
                self.left_out = before
            return f'a list of {why}' if why else ''
        if kind != 'object':
            return f'a value of the type {kind}' if kind else 'any value'
        if not isinstance(properties, dict) or not properties:
            return 'an object whose keys are not known'
        found = {}
        for name, inner in properties.items():
            name_path = f'{path}.{name}'.removeprefix('.')
            found[name_path] = self.why_not(inner, name_path, seen.properties.get(name) if seen else None, refs)
            self.left_out |= {name_path: found[name_path]} if found[name_path] else {}
        if all(found.values()):
            self.left_out = before
            return '; '.join(f'{name!r}: {why}' for name, why in found.items())
        return ''

    def fill(self, owner, kind, path, seen):
        """lists the values of the log in a part of the schema that allows any text or integer, if they are few. True if
        it has. owner: the dict that says so, which other properties may refer to."""
        values = {'string': str, 'integer': int}.get(kind)
        counts = seen.merged() if seen else {}
        counts = {text: n for text, n in counts.items() if type(json.loads(text)) is values}
        if not 0 < len(counts) <= FEW or sum(counts.values()) < OFTEN * len(counts):
            return False
        known = owner.get('enum', [])
        self.filled.add(id(owner))
        owner['enum'] = known + [value for value in map(json.loads, counts) if value not in known]
        if isinstance(owner.get('type'), list) and 'null' in owner['type'] and None not in owner['enum']:
            owner['enum'].append(None)
        self.notes.append(f'{path!r} may be any {"text" if kind == "string" else kind} in the schema; it has the '
                          f'{len(owner["enum"])} values of the log: are these all?')
        return True

    def longest(self, part=None, path='', refs=frozenset('#')):
        """about the length of the longest answer, in bytes: an upper bound. part: of the schema; '': all of it."""
        found = [0]
        for one, _, inner_refs in self.alternatives(self.schema if part is None else part, refs):
            items, properties = one.get('items'), one.get('properties')
            if 'const' in one or isinstance(one.get('enum'), list):
                found += [len(json.dumps(value)) for value in ([one['const']] if 'const' in one else one['enum'])]
            elif isinstance(properties, dict):
                inner = {name: f'{path}.{name}'.removeprefix('.') for name in properties}
                found.append(2 + sum(len(json.dumps(name)) + 4 + self.longest(properties[name], inner[name], inner_refs)
                                     for name in properties if inner[name] not in self.left_out))
            elif isinstance(items, dict):
                kinds = [kind for kind, _, _ in self.alternatives(items, inner_refs)]
                is_set = one.get('uniqueItems') is not False and all({'enum', 'const'} & {*kind} for kind in kinds)
                n = sum(len(kind.get('enum', [1])) for kind in kinds) if is_set else one.get('maxItems', MOST_ITEMS)
                found.append(2 + n * (2 + max(2, self.longest(items, f'{path}[]', inner_refs))))
            else:
                found.append(max([5, *(len(json.dumps(one[key])) for key in ('minimum', 'maximum', 'multipleOf')
                                       if key in one)]))
        return max(found)


def is_copied(seen):
    """True if the values of a Part stand in the texts, or if none are known."""
    return not seen or not seen.constants.keys() - {'null', '""'} or seen.copied() is not None


def has_object(value):
    """True if a JSON value is an object or a list with one in it."""
    return isinstance(value, dict) or isinstance(value, list) and any(map(has_object, value))


def why_no_number(part, kind):
    """why the values of a number cannot be listed; '' if they can."""
    step = part.get('multipleOf', 1 if kind == 'integer' else None)
    low = part.get('minimum', part.get('exclusiveMinimum'))
    high = part.get('maximum', part.get('exclusiveMaximum'))
    if not all(type(x) in (int, float) for x in (step, low, high)) or not step > 0:
        return f'any {kind}'
    n = math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9) + 1
    return '' if 0 < n <= MOST_NUMBERS else f'an {kind} with {n} values'
