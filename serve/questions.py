"""What callers of serve.py ask, in terms of the student's fields, and its answers in their words.

Three ways to ask about a text: a chat completion (the whole answer as JSON, or the part of it that a JSON
Schema names), OpenAI's decisions and TypeSafe's System One: lists of typed questions, answered with the
probabilities of all options. A student answers the questions it was trained on; whatever else is asked is
refused by name.
"""
import json
import math
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from data import clean
from distil.space import OutputSpace, value_name

MAX_CHECKS = 20_000  # of an answer against a part of a schema


class Refusal(Exception):
    """why a request is not answered: HTTP status, words, and the part of the body that is to blame."""

    def __init__(self, status, message, *where):
        super().__init__(message)
        self.status, self.where = status, where


def need(part, kind, what, *where, status=422):
    """part if it is of that type, else a Refusal that says what was wanted."""
    if not isinstance(part, kind) or isinstance(part, bool) and kind is not bool:
        raise Refusal(status, f'{".".join(map(str, where))} must be {what}', *where)
    return part


# -----------------------------------------------------------------------------
# the text


def text_in(content, where):
    """the text of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = []
    for n, part in enumerate(need(content, list, 'a text or a list of parts', *where, status=400)):
        kind = part.get('type') if isinstance(part, dict) else None
        if kind in ('text', 'input_text') and isinstance(part.get('text'), str):
            parts.append(part['text'])
        elif kind == 'input_json' and 'data' in part:
            parts.append(text_of_state(part['data']))
        else:
            raise Refusal(400, f'the student reads text, not {kind!r}', *where, n)
    return '\n'.join(parts)


def text_of_messages(messages, prompt, where):
    """the text to be answered: what the teacher's prompt is put around, in the last user message alone or
    after a system message; else all of the last user message."""
    said = []
    for n, message in enumerate(need(messages, list, 'a list of messages', where, status=400)):
        need(message, dict, 'an object with role and content', where, n, status=400)
        if message.get('role') in ('user', 'system', 'developer'):
            said.append((message['role'], text_in(message.get('content'), (where, n, 'content'))))
    user = next((text for role, text in reversed(said) if role == 'user'), None)
    if user is None:
        raise Refusal(400, 'there is no message with the role user', where)
    system = next((text for role, text in said if role != 'user'), None)
    before, _, after = map(clean, prompt.partition('{text}'))  # a text's whitespace does not count
    for whole in map(clean, [user] if system is None else [user, f'{system} {user}']):
        if whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after):
            return whole[len(before):len(whole) - len(after)].strip()
    return user


def text_of_state(state):
    """the text of a state: itself, the only text somewhere in it, or its JSON."""
    def texts(part):
        if isinstance(part, (dict, list)):
            return [t for inner in (part.values() if isinstance(part, dict) else part) for t in texts(inner)]
        return [part]

    leaves = texts(state)
    if len(leaves) == 1 and isinstance(leaves[0], str):
        return leaves[0]
    return json.dumps(state, ensure_ascii=False)


# -----------------------------------------------------------------------------
# the answer as JSON, by a schema


def fields_of_format(form, space):
    """names of the fields that a response_format wants, in the student's order; Refusal that names the one it
    cannot answer."""
    kind = need(form, dict, 'an object', 'response_format', status=400).get('type')
    if kind in ('text', 'json_object'):
        return tuple(space.fields)
    wrapped = form.get('json_schema')
    if kind != 'json_schema' or not isinstance(wrapped, dict) or not isinstance(wrapped.get('schema'), dict):
        raise Refusal(400, 'response_format must be text, json_object or json_schema with a schema',
                      'response_format')
    return fields_of_schema(json.dumps(wrapped['schema']), space)


def weight(part, defs):
    """number of objects in a part of a JSON Schema, each $ref written out; ValueError where that cannot be
    told. defs: {name: what it refers to, and then its weight}."""
    if isinstance(part, list):
        return sum(weight(inner, defs) for inner in part)
    if not isinstance(part, dict):
        return 0
    total = 1 + sum(weight(inner, defs) for key, inner in part.items() if key != '$defs')
    if part.keys() & {'$id', '$anchor', '$dynamicRef', '$dynamicAnchor'}:
        raise ValueError('$id, $anchor and $dynamicRef are not read')
    if isinstance(ref := part.get('$ref'), str):
        name = ref.removeprefix('#/$defs/')
        if name not in defs:
            raise ValueError(f'there is no {ref!r}; references go to #/$defs/...')
        if not isinstance(defs[name], int):
            inner, defs[name] = defs[name], MAX_CHECKS  # which is what one that leads to itself weighs
            defs[name] = weight(inner, defs)
        total += defs[name]
    return total


@lru_cache(maxsize=256)  # a caller sends the same one every time
def fields_of_schema(text, space):
    """see fields_of_format. text: the JSON Schema. Every answer the student can give must be valid by it."""
    schema = json.loads(text)
    try:
        if (parts := weight(schema, dict(schema.get('$defs', {})))) > MAX_CHECKS / 20:
            raise ValueError('it is too large')
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema, registry=Registry())  # which fetches nothing
        wanted = [*schema.get('properties', {}), *schema.get('required', [])]
        for field in wanted:
            if field not in space.fields:
                raise Refusal(400, f'the student does not answer {field!r}, only: {", ".join(space.fields)}',
                              'response_format')
        names = tuple(field for field in space.fields if field in wanted) or tuple(space.fields)
        values = [space.fields[field] for field in names]
        if all(len(of_field) == 1 for of_field in values):
            raise Refusal(400, f'there is nothing to decide about {", ".join(names)}', 'response_format')
        first = {field: space.fields[field][0] for field in names}
        answers = [first | {field: value} for field in names for value in space.fields[field]]
        if math.prod(map(len, values)) * parts <= MAX_CHECKS:  # else not each with each
            answers += [dict(zip(names, answer)) for answer in product(*values)]
        for answer in answers:
            for error in validator.iter_errors(answer):
                field = next(iter(error.absolute_path), '')
                of_field = f' (about {field!r})' if field else ''
                raise Refusal(400, f'the student can say {json.dumps(answer)}, which the schema refuses'
                              f'{of_field}: {error.message[:200]}', 'response_format')
    except (SchemaError, Unresolvable, RecursionError, TypeError, ValueError, AttributeError) as error:
        raise Refusal(400, f'the schema cannot be read: {str(error)[:200]}', 'response_format') from None
    return names


# -----------------------------------------------------------------------------
# the answer as a chat completion


@lru_cache(maxsize=256)
def view(space, names, fence):
    """the OutputSpace of the answers with these of the fields alone."""
    return OutputSpace(space.tokenizer, {name: space.fields[name] for name in names}, space.indent, fence,
                       space.end_id)


def pieces_of(answer, decisions, view, space, temperature):
    """the text of an answer in tokens, and of each the log probability and those of all that was legal there:
    [(text, log p, {text: log p})]; 0 and {} where the schema left no choice. Tokens that are half a character
    are joined.

    answer: dict; decisions: how the student came to it (decode.decode), [] where it did not; view: of the
    answer, see above; space: the student's.
    """
    def spell(ids):
        return view.tokenizer.decode(ids, skip_special_tokens=True)

    due = {name: deque(d for d in decisions if d[0] == name) for name in view.fields}
    outs, pieces, at, ids = view.from_json({name: answer[name] for name in view.fields}), [], 0, []
    whole = view.text(answer[name] for name in view.fields).strip()
    log_p, others = 0.0, {}
    for out, state in zip(outs, view.states_before(outs)):
        ids.append(view.output_ids[out])
        if len(view.transitions[state]) > 1 and due[view.field[state]]:
            name, logits, choice = due[view.field[state]].popleft()
            row = (logits / temperature.get(name, 1.0)).log_softmax(-1)
            log_p = row[choice].item()
            legal = row.isfinite().nonzero()[:, 0].tolist()
            others = {spell([space.output_ids[o]]): row[o].item() for o in legal}
        text = spell(ids)
        if at < len(text) <= len(whole) and not text.endswith('\ufffd'):
            pieces.append((text[at:], log_p, others))
            at, log_p, others = len(text), 0.0, {}
    return pieces


def logprobs_of(pieces, top):
    """pieces as choices[].logprobs, with the `top` likeliest."""
    def say(text, log_p):
        return {'token': text, 'logprob': log_p, 'bytes': list(text.encode('utf-8', 'replace'))}
    content = []
    for text, log_p, others in pieces:
        ranked = sorted(others.items(), key=lambda item: -item[1]) or [(text, log_p)]
        content.append(say(text, log_p) | {'top_logprobs': [say(*item) for item in ranked[:top]]})
    return {'content': content, 'refusal': None}


def say_completion(text, logprobs, head, usage):
    """the body of a chat completion. logprobs: of logprobs_of, or None; head: id, created, model."""
    choice = {'index': 0, 'message': {'role': 'assistant', 'content': text, 'refusal': None},
              'logprobs': logprobs, 'finish_reason': 'stop'}
    return head | {'object': 'chat.completion', 'choices': [choice], 'usage': usage}


def say_chunks(pieces, top, head, usage):
    """the same as server-sent events. top: None where no logprobs are wanted; usage: None where it is not."""
    def event(delta, logprobs=None, reason=None):
        choice = {'index': 0, 'delta': delta, 'logprobs': logprobs, 'finish_reason': reason}
        return {'choices': [choice]} | ({} if usage is None else {'usage': None})
    events = [event({'role': 'assistant', 'content': ''})]
    for piece in pieces:
        events.append(event({'content': piece[0]}, None if top is None else logprobs_of([piece], top)))
    events.append(event({}, reason='stop'))
    if usage is not None:
        events.append({'choices': [], 'usage': usage})
    head = head | {'object': 'chat.completion.chunk'}
    return ''.join(f'data: {json.dumps(head | e)}\n\n' for e in events) + 'data: [DONE]\n\n'


# -----------------------------------------------------------------------------
# typed questions


@dataclass
class Question:
    """one that the student can answer. kind: 'choice', 'yes' or 'score'."""
    name: str       # as the caller calls it, or None
    kind: str
    options: list   # what may be answered, in the caller's order and words; of a score, lowest first
    field: str
    numbers: list   # for each option the number of the field's value; of a yes its one value

    def chances(self, rows):
        """probabilities of the options. rows: {field: probabilities of its values}."""
        return [rows[self.field][n] for n in self.numbers]


def find_field(space, name, kind, options, true_value, ordered, where):
    """the Question about a field: the field of that name, or the only one with these options (order free).
    The levels of a score may also have words of their own, lowest first, where the field is named.

    name: or None. kind: see Question. options: strings, booleans or parsed JSON. true_value: {field: the
    value that a yes stands for}, booleans need none; ordered: fields whose values are a scale, lowest first;
    integers are one anyway. Refusal where no field, or more than one, will do.
    """
    own = {field: [value_name(value) for value in of_field] for field, of_field in space.fields.items()}
    asked, fits = [value_name(option) for option in options], {}
    for field, names in own.items():
        values, yes = space.fields[field], value_name(true_value.get(field, True))
        integers = all(type(value) is int for value in values)
        same = sorted(asked) == sorted(names)
        if kind == 'choice' and same or kind == 'score' and same and (integers or field in ordered):
            fits[field] = [names.index(option) for option in asked]
        elif kind == 'score' and (integers or field in ordered):
            own_words = not set(asked) & set(names)
            if name == field and len(asked) == len(names) and own_words:
                fits[field] = sorted(range(len(names)), key=values.__getitem__ if integers else None)
        elif len(names) == 2 and yes in names:
            yes_or_no = [names.index(yes), 1 - names.index(yes)]
            said = [option.lower() for option in asked]
            if kind == 'yes' and name in (field, yes):
                fits[field] = yes_or_no[:1]
            elif kind == 'choice' and name == field and sorted(said) in (['no', 'yes'], ['false', 'true']):
                fits[field] = [yes_or_no[option in ('no', 'false')] for option in said]
    if name in fits:
        return Question(name, kind, options, name, fits[name])
    if len(fits) == 1 and name not in own:
        field, numbers = fits.popitem()
        return Question(name, kind, options, field, numbers)
    why = 'it knows: ' + '; '.join(f'{field} ({", ".join(names[:12])})' for field, names in own.items())
    if len(fits) > 1:
        why = f'its name must say which is meant: {", ".join(fits)}'
    kind = 'yes-or-no' if kind == 'yes' else kind
    raise Refusal(422, f'this student cannot answer the {kind} question {name or where[-1]!r}; {why}', *where)


def read_decisions(body, space, true_value, ordered):
    """body of /v1/decisions -> list of Questions, in their order."""
    asked = need(body.get('questions'), list, 'a list of 1 to 400 questions', 'questions')
    if not 1 <= len(asked) <= 400:
        raise Refusal(422, f'there are {len(asked)} questions; 1 to 400 can be asked', 'questions')
    result = []
    for n, question in enumerate(asked):
        where = 'questions', n
        kind = need(question, dict, 'an object', *where).get('type')
        name, options = question.get('name'), []
        if name is not None:
            need(name, str, 'a text', *where, 'name')
        if kind in ('choice', 'score'):
            part, key = ('choices', 'value') if kind == 'choice' else ('levels', 'label')
            listed = need(question.get(part), list, 'a list', *where, part)
            options = [need(option, dict, 'an object', *where, part, k).get(key)
                       for k, option in enumerate(listed)]
            if not all(isinstance(option, (str, bool)) for option in options):
                raise Refusal(422, f'each of {part} needs a {key} that is a text', *where, part)
        elif kind != 'predicate':
            raise Refusal(422, f'question {name or n!r}: a question is a choice, a predicate or a score',
                          *where, 'type')
        kind = 'yes' if kind == 'predicate' else kind
        result.append(find_field(space, name, kind, options, true_value, ordered, where))
    return result


def read_system_one(body, space, true_value, ordered):
    """body of /v1/systemone -> list of Questions."""
    asked = need(body.get('questions'), dict, 'an object of questions', 'questions')
    if not asked:
        raise Refusal(422, 'questions is empty', 'questions')
    result = []
    for name, question in asked.items():
        where = 'questions', name
        kind, criteria = need(question, dict, 'an object', *where).get('type'), question.get('criteria')
        if kind == 'choice':
            options = list(need(criteria, dict, 'an object of options', *where, 'criteria'))
        elif kind == 'score':
            options = need(criteria, list, 'a list of levels', *where, 'criteria')
        elif kind == 'noul':
            kind, options = 'yes', []
        else:
            raise Refusal(422, f'question {name!r}: a question is a choice, a noul or a score',
                          *where, 'type')
        result.append(find_field(space, name, kind, options, true_value, ordered, where))
    return result


def choice_confidence(p):
    """of a choice's probabilities: 0 where all are alike, 1 for certainty."""
    return max(0.0, (max(p) - 1 / len(p)) / (1 - 1 / len(p))) if len(p) > 1 else 1.0


def score_confidence(p):
    """of a score's probabilities: 1 - mean distance from the likeliest level / that where all are alike."""
    mode, n = p.index(max(p)), len(p)
    alike = sum(abs(i - (n - 1) / 2) for i in range(n)) / n
    return max(0.0, 1 - sum(q * abs(i - mode) for i, q in enumerate(p)) / alike) if n > 1 else 1.0


def expected_score(p):
    return math.fsum(i * q for i, q in enumerate(p))


def say_decisions(questions, rows):
    """the answers of /v1/decisions. rows: {field: probabilities of its values}."""
    answers = []
    for question in questions:
        p, options = question.chances(rows), question.options
        if question.kind == 'yes':
            answers.append({'type': 'predicate', 'name': question.name, 'probability': p[0]})
        elif question.kind == 'choice':
            answers.append({'type': 'choice', 'name': question.name, 'choice': options[p.index(max(p))],
                            'confidence': choice_confidence(p),
                            'probabilities': [{'value': v, 'probability': q} for v, q in zip(options, p)]})
        else:
            answers.append({'type': 'score', 'name': question.name, 'score': expected_score(p),
                            'confidence': score_confidence(p),
                            'probabilities': [{'label': label, 'value': i, 'probability': q}
                                              for i, (label, q) in enumerate(zip(options, p))]})
    return answers


def say_system_one(questions, rows):
    """the answers of /v1/systemone, see say_decisions."""
    answers = {}
    for question in questions:
        p, options = question.chances(rows), question.options
        if question.kind == 'yes':
            answer = {'type': 'noul', 'noul': p[0]}
        elif question.kind == 'choice':
            answer = {'type': 'choice', 'choice': options[p.index(max(p))],
                      'confidence': choice_confidence(p), 'probabilities': dict(zip(options, p))}
        else:
            numbers = list(map(str, range(len(p))))
            answer = {'type': 'score', 'score': expected_score(p), 'confidence': score_confidence(p),
                      'legend': dict(zip(numbers, options)), 'probabilities': dict(zip(numbers, p))}
        answers[question.name] = answer
    return answers
