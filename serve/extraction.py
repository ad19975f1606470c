"""POST /v1/extraction: typed fields, answered with copied values and where they stand in the caller's text.

A field is the student's value of that name and kind, customer.name one inside of an object. What the student does not
copy is refused by name.
"""
import math
import re
from dataclasses import dataclass
from datetime import date

from distil.copied import Copied
from distil.kinds import Items, Maybe, Object
from distil.places import Source
from distil.schema import copied_in, list_leaves
from distil.space import clean
from distil.values import MISSING, follow, json_text, path_of, plain
from serve.completions import count_tokens, read_flag
from serve.options import find_name
from serve.request import Plan, Refusal, require

KINDS = {'text': ('text',), 'number': ('number', 'integer'), 'date': ('date',), 'time': ('time',),
         'datetime': ('date-time',)}
COMPUTED = ('estimate', 'forecast', 'duration')                 # no value of the text
OPTIONS = {'instructions', 'null_threshold'}                    # of each type, and of some:
MORE_OPTIONS = {'number': {'decimals', 'integer', 'unit'}, 'list': {'items'},
                'list of number': {'items', 'decimals', 'unit'}}
MOST_FIELDS = 100
NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_.-]{0,63}')
NEAR = 24  # characters that the text of a student may lack, or have more, at one place


@dataclass
class Field:
    """a field of a request. name, kind: the caller's; part: of the student's answers; path: of it."""
    name: str
    kind: str
    part: object
    path: str
    threshold: float = None     # of null; None: the student decides
    decimals: int = None
    whole: bool = False

    @property
    def leaf(self):
        """the list, or the Copied, without that it may be null."""
        return self.part.part if isinstance(self.part, Maybe) else self.part


# -----------------------------------------------------------------------------
# places: from the text that the student reads to the caller's


def align(read, text):
    """for each character of a text as the student reads it, the number of the same one in the text that was encoded.
    They differ a little where a tokenizer has no token for a character, or writes it otherwise."""
    found, i, j = [], 0, 0
    near = [(a, n - a) for n in range(1, NEAR) for a in range(n + 1)]
    while i < len(read):
        a, b = 1, 1                                             # how far it goes on in each
        if j >= len(text) or read[i] != text[j]:
            a, b = next(((a, b) for a, b in near
                         if i + a < len(read) and text.startswith(read[i + a:i + a + 3], j + b)), (1, 1))
        found += [min(j, len(text) - 1)] * a
        i, j = i + a, j + b
    return found


def map_places(read, state, from_end=False):
    """a function from (start, end) in characters of what a student reads to those of the caller's text. read: cleaned
    and maybe cut, the beginning, or from_end."""
    places = []                                                 # in state of each character of the cleaned text
    for word in re.finditer(r'\S+', state):
        places += ([places[-1] + 1] if places else []) + [*range(*word.span())]
    text = clean(state)
    if from_end:
        same = [len(text) - 1 - n for n in align(read[::-1], text[::-1])][::-1]
    else:
        same = range(len(read)) if text.startswith(read) else align(read, text)
    return lambda start, end: [places[same[start]], places[same[end - 1]] + 1]


# -----------------------------------------------------------------------------
# fields in


def find_parts(part):
    """{path: part} of the properties of an object, and of objects in it, which may be null."""
    inner = part.part if isinstance(part, Maybe) else part
    if isinstance(inner, Object):
        return {path: one for own in inner.properties.values() for path, one in find_parts(own).items()}
    return {path_of(inner.keys): part}


def describe_copied(parts):
    """what can be asked for, in words."""
    types, found = {own: name for name, kinds in KINDS.items() for own in kinds}, []
    for path, part in parts.items():
        leaf = part.part if isinstance(part, Maybe) else part
        item = leaf.items[0] if isinstance(leaf, Items) else leaf
        if isinstance(item, Copied):
            found.append(f'{path} ({"list of " * (item is not leaf)}{types[item.kind]})')
    return ', '.join(found)


def read_fields(body, schema):
    """(list of Fields, the parts of the body that are not used). Refusal, which names the field, if the student does
    not copy it."""
    given = require(body.get('fields'), dict, f'an object of 1 to {MOST_FIELDS} fields', 'fields')
    if not 1 <= len(given) <= MOST_FIELDS:
        raise Refusal(422, f'there are {len(given)} fields; 1 to {MOST_FIELDS} are allowed', 'fields')
    parts, fields, unused = find_parts(schema.tree), [], []
    for name, spec in given.items():
        where = 'fields', name
        if not NAME.fullmatch(name):
            raise Refusal(422, f'{name[:80]!r} is no name of a field: a letter or _, then letters, digits and _ . -, '
                          '64 at most', *where)
        spec = {key: value for key, value in require(spec, dict, 'an object', *where).items() if value is not None}
        kind = spec.pop('type', None)
        if kind in COMPUTED:
            raise Refusal(400, f'the field {name!r} is {"an" if kind == "estimate" else "a"} {kind}: the student '
                          'copies what the text says, and computes nothing', *where, 'type')
        if not isinstance(kind, str) or kind not in KINDS and kind != 'list':
            raise Refusal(422, f'the type of the field {name!r} must be one of {", ".join(KINDS)}, list',
                          *where, 'type')
        field = find_field(name, kind, spec, parts, where)
        read_options(field, spec, where)
        fields.append(field)
        unused += [f'fields.{name}.unit'] * ('unit' in spec)
    return fields, unused


def find_field(name, kind, spec, parts, where):
    """the Field of a name and a type."""
    path = find_name(name, parts)
    if path is None:
        raise Refusal(422, f'the student does not copy {name!r}; it copies: {describe_copied(parts)}', *where)
    field = Field(name, kind, parts[path], path)
    leaf, wanted = field.leaf, kind
    if kind == 'list':
        wanted = require(spec.get('items'), str, 'text, number or date', *where, 'items')
        if wanted not in ('text', 'number', 'date'):
            raise Refusal(422, f'{".".join(where)}.items must be text, number or date', *where, 'items')
        leaf = leaf.items[0] if isinstance(leaf, Items) else None
    if isinstance(leaf, Copied) and leaf.kind in KINDS[wanted]:
        return field
    own = field.leaf
    if not copied_in(own):
        what = '; '.join(one.describe() for one in list_leaves(own))
        raise Refusal(422, f'{name!r} is a choice of the student ({what}), not copied from the text: use /v1/decisions',
                      *where)
    what = own.describe() if isinstance(own, Copied) else f'a list, each item {own.items[0].describe()}' if isinstance(
        own.items[0], Copied) else 'a list of objects, or of what may be null'
    asked = f'a list of {wanted}' if kind == 'list' else kind
    raise Refusal(422, f'the field {name!r} of the student is {what}, not {asked}', *where, 'type')


def read_options(field, spec, where):
    """sets the options of a Field. Refusal if one is wrong."""
    kind = 'list of number' if spec.get('items') == 'number' else field.kind
    allowed = OPTIONS | MORE_OPTIONS.get(kind, set())
    if unknown := [key for key in spec if key not in allowed]:
        raise Refusal(422, f'the field {field.name!r}, a {kind}, has no option {unknown[0][:80]!r}; it may have: '
                      f'{", ".join(sorted(allowed))}', *where, unknown[0])
    for key in {'instructions', 'unit'} & {*spec}:
        require(spec[key], str, 'a string', *where, key)
    if 'integer' in spec:
        field.whole = require(spec['integer'], bool, 'true or false', *where, 'integer')
    threshold, decimals = spec.get('null_threshold'), plain(spec.get('decimals'))
    if threshold is not None and (type(threshold) not in (int, float) or not 0 <= threshold <= 1):
        raise Refusal(422, f'{".".join(where)}.null_threshold must be a number from 0 to 1', *where, 'null_threshold')
    if decimals is not None and (type(decimals) is not int or not 0 <= decimals <= 6):
        raise Refusal(422, f'{".".join(where)}.decimals must be a whole number from 0 to 6', *where, 'decimals')
    field.threshold, field.decimals = threshold, decimals


def read_date(body):
    """the reference_date of a request, '' if it has none."""
    given = body.get('reference_date')
    if given is None:
        return ''
    try:
        return date.fromisoformat(require(given, str, 'a date', 'reference_date')).isoformat()
    except ValueError:
        raise Refusal(422, f'reference_date is {given[:40]!r}; it must be a date such as 2026-05-03',
                      'reference_date') from None


# -----------------------------------------------------------------------------
# answers out


class Reading:
    """what an Answer says of fields. schema: of the student; answer: with copies; place: of map_places; source: a
    Source of the text if an LLM upstream has answered, else None."""

    def __init__(self, schema, answer, place, source):
        self.schema, self.answer, self.place, self.source = schema, answer, place, source

    def present(self, keys):
        """the probability that the value to which keys lead is there, and not null."""
        p = 1.0
        for n in range(1, len(keys) + 1):
            choice = self.schema.by_choice.get(f'{path_of(keys[:n])}?')
            if choice and choice.path in self.answer.probabilities:
                p *= self.answer.probabilities[choice.path][0]
        return p

    def spans(self, part):
        """[(start, end, value, probability if it is not null)] of a Copied: the student's own value first, if it is
        not null, then the likeliest."""
        own, found = part.get(self.answer.record), self.answer.copies.get(part.path, [])
        if own is None or own is MISSING:
            return found
        if self.source:                                         # an LLM may have written what is not there
            place, = self.source.find(part, own)[:1] or [(0, 0)]
            return [(*place, own, 1.0)]
        return sorted(found, key=lambda span: json_text(plain(span[2])) != json_text(plain(own)))

    def read(self, field):
        """the answer to a Field, as a dict."""
        there, read = self.present(field.leaf.keys), self.read_list if field.kind == 'list' else self.read_one
        p_null = min(1.0, max(0.0, 1 - there))
        answer = {'type': field.kind, 'value': None, 'p_null': p_null, 'confidence': p_null}
        return answer | read(field, there, p_null)

    def read_one(self, field, there, p_null):
        own, spans = field.leaf.get(self.answer.record), self.spans(field.leaf)
        whole, null = [span for span in spans if not field.whole or is_whole(span[2])], own is None or own is MISSING
        guess = {'guess': shorten(whole[0][2], field.decimals)} if whole else {}
        if not null and whole[:1] != spans[:1]:                 # its own value is not whole
            return guess | {'confidence': min(1.0, max(0.0, 1 - there * sum(span[3] for span in whole)))}
        if own is None and not spans:                           # it must be there, and the text has none
            return {'p_null': 1.0, 'confidence': 1.0}
        if not whole or (null if field.threshold is None else p_null > field.threshold):
            return guess
        start, end, _, p = whole[0]
        span = {'span': self.place(start, end)} if end > start else {}
        return {'value': guess['guess'], **guess, 'confidence': min(1.0, there * p), **span}

    def read_list(self, field, there, p_null):
        own = follow(self.answer.record, field.leaf.keys)
        if not isinstance(own, list):                           # there is no guess
            return {}
        found = [span for part in field.leaf.items[:len(own)] for span in self.spans(part)[:1]]
        values = [shorten(value, field.decimals) for _, _, value, _ in found]
        if field.threshold is not None and p_null > field.threshold:
            return {'guess': values}
        spans = [self.place(start, end) for start, end, _, _ in found if end > start]
        return {'value': values, 'guess': values, **({'spans': spans} if len(spans) == len(values) else {}),
                'confidence': there * math.prod(self.answer.confidence[leaf.path] for leaf in list_leaves(field.leaf))}


def is_whole(value):
    return not isinstance(value, float) or value.is_integer()


def shorten(value, decimals):
    """a value with so many decimals, if it is a number."""
    return value if decimals is None or isinstance(value, str) else plain(round(float(value), decimals))


# -----------------------------------------------------------------------------
# the route


def read_extraction(student, body):
    """the Plan of POST /v1/extraction."""
    schema = student.space.schema
    if body.get('images') or body.get('assets'):
        key = 'images' if body.get('images') else 'assets'
        raise Refusal(400, f'{key}: the student reads text alone', key)
    if not schema.copied:
        raise Refusal(400, f'the student {student.name} copies nothing from a text; its fields are choices: '
                      f'{schema.describe()}; ask /v1/decisions', 'fields')
    if read_flag(body, 'stream'):
        raise Refusal(400, 'stream: an extraction comes as a whole', 'stream')
    state = require(body.get('state'), str, 'a string', 'state')
    fields, unused = read_fields(body, schema)
    reference_date, options = read_date(body), require(body.get('options') or {}, dict, 'an object', 'options')
    read_flag(options, 'include_quantiles')                     # of estimates, which are refused
    with_text = read_flag(options, 'return_state_text')

    def reply(answers):
        answer, = answers
        known = answer.text or clean(state)
        place = map_places(known, state, bool(answer.text and student.task.get('keep_end')))
        space = student.service.space_on(reference_date)
        reading = Reading(schema, answer, place, Source(known, space) if answer.by == 'upstream' else None)
        n_in, n_out = count_tokens(answer)
        return {'model': student.name, 'answers': {field.name: reading.read(field) for field in fields},
                'truncated': answer.n_cut > 0, **({'state_text': state} if with_text else {}),
                'usage': {'input_tokens': n_in, 'output_tokens': n_out}}
    return Plan([state], ('state',), reply, full=True, ignored=unused, refuse_long=student.refuses_long(False),
                copies=True, reference_date=reference_date)
