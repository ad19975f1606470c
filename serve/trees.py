"""Parts of the student's answers that are more than one choice (lists, objects, what can be null or missing) in the
names and words of a caller's JSON Schema.

A part is written in the caller's words by a function of its value in an answer and of `sure`, a function of paths of
leaves that returns the lowest confidence of these. What it returns is MISSING if the property is left out.
"""
import random
import re
from dataclasses import dataclass, field

from distil.copied import EXAMPLES, Copied
from distil.kinds import Choice, Maybe, Object, Several
from distil.options import tidy
from distil.schema import list_leaves
from distil.values import MISSING, Mark, group_of, json_text, path_of, said, value_name
from serve.options import alternatives, find_name, loose, match_options, match_yes_and_no, read_options, resolve
from serve.request import Refusal

CERTAINTY = re.compile('(confidence|probability|certainty|score)')
NOTHING = {'array': [], 'object': {}, 'boolean': False, 'integer': 0, 'number': 0}  # what `fill` may be, for a message


class ExampleText(str):
    """a copied text, in the answers that a schema is checked with."""


class ExampleNumber(float):
    """a copied number."""


class ExampleInteger(int):
    """a copied whole number."""


COPIES = {kind: ExampleText(value) if isinstance(value, str) else ExampleInteger(7) if kind == 'integer' else
          ExampleNumber(1.5) for kind, value in EXAMPLES.items()}
LIMITS = ('minLength', 'maxLength', 'pattern', 'format', 'minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum',
          'multipleOf')                                         # are not held against what a text says


def is_limit(error):
    """True if a jsonschema error is about the limits of a copied value, which a student cannot follow."""
    if not isinstance(error.instance, (ExampleText, ExampleNumber, ExampleInteger)):
        return False
    ways = {}
    for inner in error.context or ():                           # of anyOf: one way with limits alone
        ways.setdefault(inner.schema_path[0], []).append(inner)
    return error.validator in LIMITS or any(all(map(is_limit, way)) for way in ways.values())


@dataclass
class Caller:
    """a caller's JSON Schema. root: it; true_value, fill: as the settings of serve.py; paths: of the student's leaves;
    fields: these in words; options: {name: [option]} that it gives for those that come with a text, see
    distil/options.py."""
    root: dict
    true_value: dict
    paths: list
    fields: str
    fill: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


# -----------------------------------------------------------------------------
# the student's tree


def parts_of(part):
    """the parts of an object, and of objects in it: those that every answer has."""
    if isinstance(part, Object):
        return [inner for one in part.properties.values() for inner in parts_of(one)]
    return [part]


def is_scalar(part):
    """True if a part is a choice of JSON constants."""
    return isinstance(part, Choice) and not any(isinstance(value, Mark) for value in part.values)


def scalars(schema):
    """{path: leaf} of those leaves of a Schema that are constants, and that every answer has."""
    return {part.path: part for part in parts_of(schema.tree) if is_scalar(part)}


def copies(schema):
    """{path: part} of what is copied from the text in every answer; it may be null or missing."""
    return {path_of(part.keys): part for part in parts_of(schema.tree)
            if isinstance(part.part if isinstance(part, Maybe) else part, Copied)}


def lists(schema):
    """the parts of a Schema that are a list of some of its values; they may be null or missing."""
    parts = parts_of(schema.tree)
    return [part for part in parts if isinstance(part.part if isinstance(part, Maybe) else part, Several)]


def examples(part, n_random=30):
    """values of a part, each once: all values of each choice, in the fullest and in the emptiest answer, and random
    ones. A choice in several items of a list has the same value in all, a copied value is one of COPIES."""
    rng, found = random.Random(0), []
    copy = lambda leaf: COPIES.get(leaf.kind, COPIES['text'])   # of an option, too
    fill = lambda choose: part.fill(lambda leaf: copy(leaf) if isinstance(leaf, Copied) else choose(leaf))
    group = lambda choice: re.sub(r'\[\d+\]', '[]', choice.path)
    absent = lambda choice: [n for n, value in enumerate(choice.values) if value is None or value is MISSING]
    full = lambda choice: len(choice) - 1 if absent(choice) == [0] else 0
    empty = lambda choice: (absent(choice) or [0])[-1]
    for path, length in {group(choice): len(choice) for choice in part.choices}.items():
        for n in range(length):
            found += [fill(lambda choice: n if group(choice) == path else base(choice)) for base in (full, empty)]
    found += [fill(lambda choice: rng.randrange(len(choice))) for _ in range(n_random)]
    return list({json_text(value): value for value in found}.values())


# -----------------------------------------------------------------------------
# properties that the student does not answer


def answer_otherwise(name, inner, required, path, caller):
    """what stands for a property that no part of the student's answers is: ('constant', value), ('confidence', ''),
    ('confidence', path of the leaf in its name), or None if it is left out. path: of the property; required: True or
    False; None: it must be answered. ValueError if there is nothing."""
    options, types, nullable = read_options(inner, caller.root)
    if options is not None and len(options) == 1:
        return 'constant', options[0]
    limits, words = [resolve(inner, caller.root).get(key) for key in ('minimum', 'maximum')], loose(name)
    certainty = CERTAINTY.search(words) if types == {'number'} else None
    if certainty and (limits == [0, 1] or limits == [None, None] and certainty[1] != 'score'):
        fields = [leaf for leaf in caller.paths if loose(leaf) in words]
        return 'confidence', fields[0] if len(fields) == 1 else ''
    if required and (key := next((key for key in (path, name) if key in caller.fill), None)) is not None:
        return 'constant', caller.fill[key]
    if required is False:
        return None
    if nullable and required:
        return 'constant', None
    what = 'a list' if 'array' in types else 'an object in it' if 'object' in types else \
        'free text' if types == {'string'} and options is None else 'a field of its own'
    offered = f' ({", ".join(map(value_name, options[:12]))})' if options else ''
    nothing = options[0] if options else next((NOTHING[kind] for kind in NOTHING if kind in types), '')
    advice = f'; fill = {{{path!r}: {nothing!r}}} would answer it so' if required else ''
    raise ValueError(f'the student does not answer {path!r}{offered}, which is {what}; its fields are: {caller.fields}'
                     + advice)


# -----------------------------------------------------------------------------
# the parts in the caller's words


def translate(part, inner, required, caller):
    """the function that writes a part, see the top of this file. inner: the caller's JSON Schema of it; required: False
    if it may be left out. ValueError, which names the property, if the schema does not allow it."""
    if isinstance(part, Choice):
        return translate_choice(part, inner, required, caller)
    if isinstance(part, Copied):
        return translate_copied(part, inner, caller)
    if isinstance(part, Maybe):
        write = translate(part.part, inner, True, caller)
        away = stand_ins(part.choice, inner, required, caller)
        return lambda value, sure: away[text] if (text := json_text(value)) in away else write(value, sure)
    if isinstance(part, Object):
        return translate_object(part, inner, caller)
    path = group_of(part.keys)
    items = find_kind(inner, 'array', path, caller).get('items', {})
    if isinstance(part, Several):
        write = translate_choice(Choice(part.keys, part.values, path), items, True, caller)
    else:
        write = translate(part.items[0], items, True, caller)
    return lambda value, sure: [write(item, sure) for item in value]


def translate_choice(part, inner, required, caller):
    options, types, nullable = read_options(inner, caller.root)
    known = Choice(part.keys, [value for value in part.values if not isinstance(value, Mark)], part.group)
    words = dict(enumerate(known.values)) if options is None else match_options(options, known)
    if options is None and types == {'boolean'} or len(words) < len(known):
        words = match_yes_and_no(options, types, known, caller.true_value.get(known.path, True)) or words
    if options is None and types and not nullable:
        words = {n: word for n, word in words.items() if word is not None}
    if lacking := [value for n, value in enumerate(known.values) if n not in words and value is not None]:
        raise ValueError(f'{known.path!r} does not offer {", ".join(map(said, lacking[:12]))}, which the student can '
                         'answer')
    spelled = {text: words[n] for n, text in enumerate(known.texts) if n in words}
    others = [value for value in part.values if json_text(value) not in spelled]
    spelled |= stand_ins(Choice(part.keys, others, part.group), inner, required, caller)
    return lambda value, sure: spelled[json_text(value)]


def option_parts(schema):
    """{path: part} of those properties whose options come with each text, in every answer; they may be null."""
    return {path: part for path, part in copies(schema).items()
            if (part.part if isinstance(part, Maybe) else part).is_option}


def translate_option(part, inner, caller):
    """what the property offers becomes the options that stand behind the text."""
    offered = {}                                                # {a word as it stands there: (it, its meaning)}
    for one in alternatives(inner, caller.root):
        about = one.get('description') if 'const' in one and isinstance(one.get('description'), str) else ''
        for word in one.get('enum', [one['const']] if 'const' in one else []):
            if isinstance(word, str) and tidy(word):
                offered.setdefault(tidy(word), (word, about))
    if not offered:
        raise ValueError(f'{part.group!r} is {part.describe()} in the answers of the student, and the schema offers '
                         'none (enum)')
    caller.options[part.of] = [
        {'value': word, 'description': about} for word, about in offered.values()]
    words = {tidied: word for tidied, (word, _) in offered.items()}
    return lambda value, sure: next(iter(words.values())) if isinstance(value, ExampleText) else words.get(value, value)


def translate_copied(part, inner, caller):
    if part.is_option:
        return translate_option(part, inner, caller)
    options, types, nullable = read_options(inner, caller.root)
    found = f'{part.group!r} is {part.describe()} in the answers of the student, and the schema '
    if options is not None:
        raise ValueError(f'{found}offers {", ".join(map(said, options[:12]))}')
    wanted = ('number', 'integer') if part.kind == 'integer' else ('number',) if part.is_number else ('string',)
    if types and not types & {*wanted}:
        raise ValueError(f'{found}asks for {" or ".join(sorted(types))}')
    formats = {one.get('format') for one in alternatives(inner, caller.root) if one.get('type') != 'null'}
    other = [name for name in formats if name in EXAMPLES and name != part.kind]
    if other and not part.is_number:                            # those of a number are float, int32, ...
        raise ValueError(f'{found}asks for a {other[0]}')

    def write(value, sure):
        if value is None and not nullable and types:
            raise Refusal(422, f'the text has nothing to copy for {part.group!r}, which is {part.describe()}')
        return value
    return write


def stand_ins(choice, inner, required, caller):
    """{JSON text: what stands for it} of those values of a choice that are null or missing: null for a property that
    may be null, nothing for one that may be left out."""
    options, types, nullable = read_options(inner, caller.root)
    allowed = [MISSING] * (not required) + [None] * (nullable or options is None and not types)
    away = [value for value in choice.values if value is None or value is MISSING]
    if away and not allowed:
        raise ValueError(f'{group_of(choice.keys)!r} can be {" or ".join(map(said, away))} in the answers of the '
                         'student, but the schema requires a value')
    return {json_text(value): value if value in allowed else allowed[0] for value in away}


def translate_object(part, inner, caller):
    path = group_of(part.keys)
    shape = find_kind(inner, 'object', path, caller)
    properties, required = shape.get('properties') or {}, shape.get('required') or []
    if not properties and not required:
        return lambda value, sure: value
    writers, inside = {}, [leaf.path for leaf in list_leaves(part)]
    for name in [*properties, *(name for name in required if name not in properties)]:
        of_name, needed = properties.get(name, {}), name in required
        own = find_name(name, part.properties)
        if own is not None:
            writers[name] = own, translate(part.properties[own], of_name, needed, caller)
        elif other := answer_otherwise(name, of_name, needed, f'{path}.{name}', caller):
            source, constant = other
            writers[name] = None, (lambda value, sure, constant=constant: constant) if source == 'constant' else (
                lambda value, sure: sure(inside))
    if all(own is None for own, _ in writers.values()):
        raise ValueError(f'{path!r} has none of the properties that the student answers: {", ".join(part.properties)}')

    def write(value, sure):
        written = {name: write_part(value.get(own, MISSING), sure) for name, (own, write_part) in writers.items()}
        return {name: word for name, word in written.items() if word is not MISSING}
    return write


def find_kind(inner, kind, path, caller):
    """the alternative of a JSON Schema that allows an array, or an object. ValueError if there is not one."""
    def allows(one):
        types = one.get('type', kind)
        return kind in (types if isinstance(types, list) else [types]) and not {'enum', 'const'} & {*one}
    found = [one for one in alternatives(inner, caller.root) if allows(one)]
    if len(found) != 1:
        what = 'a list' if kind == 'array' else 'an object'
        raise ValueError(f'{path!r} is {what} in the answers of the student, and the schema ' + (
            'allows several kinds of them' if found else 'does not allow one'))
    return found[0]
