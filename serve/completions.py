"""Chat completions: the student's answer as JSON, whole or the part of it that a JSON Schema names, with
logprobs, or as a stream of events."""
import json
import math
from collections import deque
from functools import lru_cache
from itertools import product

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from distil.space import OutputSpace
from serve.request import Refusal, require

MAX_CHECKS = 20_000  # answers times objects of the schema, for one schema


# -----------------------------------------------------------------------------
# the fields that a schema names


def read_response_format(form, space):
    """names of the fields that a response_format names, in the student's order. Refusal if it names another
    one, or does not allow every answer of the student."""
    kind = require(form, dict, 'an object', 'response_format', status=400).get('type')
    if kind in ('text', 'json_object'):
        return tuple(space.fields)
    wrapped = form.get('json_schema')
    if kind != 'json_schema' or not isinstance(wrapped, dict) or not isinstance(wrapped.get('schema'), dict):
        raise Refusal(400, 'response_format must be text, json_object, or json_schema with a schema',
                      'response_format')
    return read_schema(json.dumps(wrapped['schema']), space)


def count_objects(part, defs):
    """number of objects in a part of a JSON Schema, each $ref replaced by its target. ValueError if it has
    references of another kind. defs: {name: its definition}, changed in place to {name: its count}."""
    if isinstance(part, list):
        return sum(count_objects(inner, defs) for inner in part)
    if not isinstance(part, dict):
        return 0
    total = 1 + sum(count_objects(inner, defs) for key, inner in part.items() if key != '$defs')
    if part.keys() & {'$id', '$anchor', '$dynamicRef', '$dynamicAnchor'}:
        raise ValueError('$id, $anchor and $dynamicRef are not supported')
    if isinstance(ref := part.get('$ref'), str):
        name = ref.removeprefix('#/$defs/')
        if name not in defs:
            raise ValueError(f'there is no {ref!r}; references must be #/$defs/...')
        if not isinstance(defs[name], int):
            inner, defs[name] = defs[name], MAX_CHECKS  # the count if it refers to itself: too large
            defs[name] = count_objects(inner, defs)
        total += defs[name]
    return total


@lru_cache(maxsize=256)  # a caller sends the same one every time
def read_schema(text, space):
    """see read_response_format. text: the JSON Schema."""
    schema = json.loads(text)
    try:
        if (n_objects := count_objects(schema, dict(schema.get('$defs', {})))) > MAX_CHECKS / 20:
            raise ValueError('it is too large')
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema, registry=Registry())  # an empty registry: fetches nothing
        wanted = [*schema.get('properties', {}), *schema.get('required', [])]
        for field in wanted:
            if field not in space.fields:
                raise Refusal(400, f'the student does not answer {field!r}, only: {", ".join(space.fields)}',
                              'response_format')
        names = tuple(field for field in space.fields if field in wanted) or tuple(space.fields)
        values = [space.fields[field] for field in names]
        if all(len(of_field) == 1 for of_field in values):
            raise Refusal(400, f'there is nothing to decide: {", ".join(names)} can have only one value',
                          'response_format')
        first = {field: space.fields[field][0] for field in names}
        answers = [first | {field: value} for field in names for value in space.fields[field]]
        if math.prod(map(len, values)) * n_objects <= MAX_CHECKS:  # few enough to check all combinations
            answers += [dict(zip(names, answer)) for answer in product(*values)]
        for answer in answers:
            for error in validator.iter_errors(answer):
                field = next(iter(error.absolute_path), '')
                of_field = f' (field {field!r})' if field else ''
                raise Refusal(400, f'the student can answer {json.dumps(answer)}, which the schema does not '
                              f'allow{of_field}: {error.message[:200]}', 'response_format')
    except (SchemaError, Unresolvable, RecursionError, TypeError, ValueError, AttributeError) as error:
        raise Refusal(400, f'the schema cannot be read: {str(error)[:200]}', 'response_format') from None
    return names


@lru_cache(maxsize=256)
def restrict_space(space, names, fence):
    """the OutputSpace of the answers that have only the fields in names (a tuple)."""
    return OutputSpace(space.tokenizer, {name: space.fields[name] for name in names}, space.indent, fence,
                       space.end_id)


# -----------------------------------------------------------------------------
# the body of the reply


def split_answer(answer, decisions, reply_space, space, temperature):
    """the text of an answer in pieces: [(text, log p, {text: log p} of all legal tokens)]; for forced tokens
    0 and {}. A piece is a token, or several if one alone is not a whole character.

    answer: {field: value}. decisions: the student's, of decode.decode; [] if the answer is not its own.
    reply_space: the OutputSpace of the reply, see restrict_space; space: the student's.
    """
    def decode_ids(ids):
        return reply_space.tokenizer.decode(ids, skip_special_tokens=True)

    decisions_left = {name: deque(d for d in decisions if d[0] == name) for name in reply_space.fields}
    outs = reply_space.from_json({name: answer[name] for name in reply_space.fields})
    whole = reply_space.text(answer[name] for name in reply_space.fields).strip()
    pieces, ids, n_done = [], [], 0                             # n_done: characters of whole in pieces
    log_p, legal_log_p = 0.0, {}
    for out, state in zip(outs, reply_space.states_before(outs)):
        ids.append(reply_space.output_ids[out])
        if len(reply_space.transitions[state]) > 1 and decisions_left[reply_space.field[state]]:
            name, logits, choice = decisions_left[reply_space.field[state]].popleft()
            row = (logits / temperature.get(name, 1.0)).log_softmax(-1)  # (V,)
            log_p = row[choice].item()
            legal = row.isfinite().nonzero()[:, 0].tolist()
            legal_log_p = {decode_ids([space.output_ids[o]]): row[o].item() for o in legal}
        text = decode_ids(ids)
        if n_done < len(text) <= len(whole) and not text.endswith('\ufffd'):
            pieces.append((text[n_done:], log_p, legal_log_p))
            n_done, log_p, legal_log_p = len(text), 0.0, {}
    return pieces


def logprobs_body(pieces, top):
    """the logprobs of a choice. pieces: of split_answer. top: number of likeliest tokens to list for each."""
    def token_body(text, log_p):
        return {'token': text, 'logprob': log_p, 'bytes': list(text.encode('utf-8', 'replace'))}
    content = []
    for text, log_p, legal_log_p in pieces:
        ranked = sorted(legal_log_p.items(), key=lambda item: -item[1]) or [(text, log_p)]
        top_logprobs = [token_body(*item) for item in ranked[:top]]
        content.append(token_body(text, log_p) | {'top_logprobs': top_logprobs})
    return {'content': content, 'refusal': None}


def completion_body(text, logprobs, head, usage):
    """the body of a chat completion. logprobs: of logprobs_body, or None. head: id, created, model."""
    choice = {'index': 0, 'message': {'role': 'assistant', 'content': text, 'refusal': None},
              'logprobs': logprobs, 'finish_reason': 'stop'}
    return head | {'object': 'chat.completion', 'choices': [choice], 'usage': usage}


def completion_events(pieces, top, head, usage):
    """the same as server-sent events. top: see logprobs_body, None for no logprobs. usage: None for none."""
    def chunk(delta, logprobs=None, reason=None):
        choice = {'index': 0, 'delta': delta, 'logprobs': logprobs, 'finish_reason': reason}
        return {'choices': [choice]} | ({} if usage is None else {'usage': None})
    chunks = [chunk({'role': 'assistant', 'content': ''})]
    for piece in pieces:
        chunks.append(chunk({'content': piece[0]}, None if top is None else logprobs_body([piece], top)))
    chunks.append(chunk({}, reason='stop'))
    if usage is not None:
        chunks.append({'choices': [], 'usage': usage})
    head = head | {'object': 'chat.completion.chunk'}
    return ''.join(f'data: {json.dumps(head | c)}\n\n' for c in chunks) + 'data: [DONE]\n\n'
