"""Chat completions and the older completions: a request becomes a Plan, its Answers a body or events."""
import json
import time
import uuid

from serve.forms import read_form
from serve.prompts import Turn, read_turns
from serve.request import Plan, Refusal, require

MAX_CHOICES = 16


# -----------------------------------------------------------------------------
# requests


def read_flag(body, key):
    """True or False of a parameter that may be missing."""
    if type(body.get(key)) not in (bool, type(None)):
        raise Refusal(400, f'{key} must be true or false', key)
    return bool(body.get(key))


def read_number(body, key, low, high, default):
    """the integer of a parameter that may be missing."""
    number = default if body.get(key) is None else body[key]
    if type(number) is not int or not low <= number <= high:
        raise Refusal(400, f'{key} must be a whole number from {low} to {high}', key)
    return number


def read_usage_flag(body):
    """True if a stream ends with its usage."""
    options = body.get('stream_options')
    if options is None:
        return False
    return bool(require(options, dict, 'an object', 'stream_options', status=400).get('include_usage'))


def count_tokens(answer):
    """(number of tokens read, number of tokens written)"""
    return len(answer.ids) + 1, len(answer.outs)


def usage_of(answers):
    """the usage of a completion."""
    n_in, n_out = map(sum, zip(*map(count_tokens, answers)))
    return {'prompt_tokens': n_in, 'completion_tokens': n_out, 'total_tokens': n_in + n_out}


def read_chat(student, body):
    """the Plan of POST /v1/chat/completions."""
    n, top = read_number(body, 'n', 1, MAX_CHOICES, 1), read_number(body, 'top_logprobs', 0, 20, 0)
    stream, logprobs, with_usage = read_flag(body, 'stream'), read_flag(body,
                                                                        'logprobs'), read_usage_flag(body)
    turns = read_turns(body.get('messages'), 'messages')
    form = read_form(body, student, turns)
    text, ignored, known = student.prompts.find_text(turns, 'messages', form.forced)
    student.check_meant(body, known or not form.whole)

    def reply(answers):
        answer, = answers
        head = {'id': f'chatcmpl-{uuid.uuid4().hex}', 'created': int(time.time()), 'model': student.name}
        message, pieces = make_message(form, answer, student.space)
        choice = {'message': message, 'logprobs': None if not logprobs else logprobs_body(pieces, top)}
        choice['finish_reason'] = finish_reason(form)
        if stream:
            return chat_events(choice, pieces, top if logprobs else None, n, head,
                               usage_of(answers) if with_usage else None)
        choices = [{'index': k, **choice} for k in range(n)]    # a student has one answer to a text
        return head | {'object': 'chat.completion', 'choices': choices, 'usage': usage_of(answers)}
    offered = form.shape.offered(student.space)
    return Plan([form.shape.with_options(text)], ('messages',), reply, logprobs or bool(offered), offered, ignored,
                student.refuses_long(True))


def read_completion(student, body):
    """the Plan of POST /v1/completions: each prompt is a text, or a prompt around a text."""
    n, top = read_number(body, 'n', 1, MAX_CHOICES, 1), read_number(body, 'logprobs', 0, 20, 0)
    stream, with_usage = read_flag(body, 'stream'), read_usage_flag(body)
    if (best_of := read_number(body, 'best_of', 1, 1 << 30, n)) > n:
        raise Refusal(400, f'best_of is {best_of}; the student has one answer to a text', 'best_of')
    form, prompts = read_form(body, student, []), body.get('prompt')
    if form.kind != 'text':
        raise Refusal(400, 'tools: completions have no tools; use /v1/chat/completions', 'tools')
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refusal(400, 'prompt must be a string or a list of strings', 'prompt')
    found = [student.prompts.find_text([Turn('user', prompt, ('prompt',))], 'prompt') for prompt in prompts]
    student.check_meant(body, all(known for _, _, known in found) or not form.whole)
    with_logprobs = body.get('logprobs') is not None

    def reply(answers):
        head = {'id': f'cmpl-{uuid.uuid4().hex}', 'object': 'text_completion', 'created': int(time.time()),
                'model': student.name}
        choices = []
        for answer in answers:
            pieces = form.pieces(answer, student.space)
            choices += [{'index': 0, 'text': ''.join(text for text, _, _ in pieces), 'finish_reason': 'stop',
                         'logprobs': old_logprobs_body(pieces, top) if with_logprobs else None}] * n
        choices = [choice | {'index': k} for k, choice in enumerate(choices)]
        if not stream:
            return head | {'choices': choices, 'usage': usage_of(answers)}
        chunks = [{'choices': [choice]} for choice in choices]
        return write_events(head, chunks, usage_of(answers) if with_usage else None)
    offered = form.shape.offered(student.space)
    texts = [form.shape.with_options(text) for text, _, _ in found]
    return Plan(texts, ('prompt',), reply, with_logprobs or bool(offered), offered,
                refuse_long=student.refuses_long(True))


# -----------------------------------------------------------------------------
# replies


def finish_reason(form):
    """OpenAI's: a function that the caller named is no decision to call one."""
    return 'stop' if form.kind == 'text' or form.named else f'{form.kind}_call{"s" * (form.kind == "tool")}'


def make_message(form, answer, space):
    """(the assistant's message, pieces of its JSON)"""
    if form.kind == 'text':
        pieces = form.pieces(answer, space)
        return {'role': 'assistant', 'content': ''.join(text for text, _, _ in pieces),
                'refusal': None}, pieces
    name, pieces = form.call(answer, space)
    function = {'name': name, 'arguments': ''.join(text for text, _, _ in pieces)}
    called = {'function_call': function} if form.kind == 'function' else {
        'tool_calls': [{'id': f'call_{uuid.uuid4().hex[:24]}', 'type': 'function', 'function': function}]}
    return {'role': 'assistant', 'content': None, 'refusal': None, **called}, pieces


def logprobs_list(pieces, top):
    """a list with a token for each of the pieces of Form.pieces. top: number of likeliest values to list."""
    def token_body(text, log_p):
        return {'token': text, 'logprob': log_p, 'bytes': list(text.encode('utf-8', 'replace'))}
    content = []
    for text, log_p, others in pieces:
        ranked = sorted(others.items(), key=lambda item: -item[1]) or [(text, log_p)]
        top_logprobs = [token_body(*item) for item in ranked[:top]]
        content.append(token_body(text, log_p) | {'top_logprobs': top_logprobs})
    return content


def logprobs_body(pieces, top):
    """the logprobs of a choice, see logprobs_list."""
    return {'content': logprobs_list(pieces, top), 'refusal': None}


def old_logprobs_body(pieces, top):
    """the logprobs of a choice of the older completions."""
    offsets = [sum(len(text) for text, _, _ in pieces[:n]) for n in range(len(pieces))]
    ranked = [dict(sorted(others.items(), key=lambda item: -item[1])[:top] or [(text, log_p)])
              for text, log_p, others in pieces]
    return {'tokens': [text for text, _, _ in pieces], 'token_logprobs': [p for _, p, _ in pieces],
            'top_logprobs': ranked if top else None, 'text_offset': offsets}


def write_events(head, chunks, usage):
    """server-sent events of chunks; the last one has the usage, if it is not None."""
    if usage is not None:
        chunks = [*(chunk | {'usage': None} for chunk in chunks), {'choices': [], 'usage': usage}]
    return ''.join(f'data: {json.dumps(head | chunk)}\n\n' for chunk in chunks) + 'data: [DONE]\n\n'


def chat_events(choice, pieces, top, n, head, usage):
    """the server-sent events of n equal choices. top: see logprobs_list, None for no logprobs."""
    message, deltas = choice['message'], []
    start = {'role': 'assistant', 'content': '' if message['content'] is not None else None}
    if calls := message.get('tool_calls'):
        call = {'index': 0, **calls[0]}
        start['tool_calls'] = [call | {'function': call['function'] | {'arguments': ''}}]
    elif function := message.get('function_call'):
        start['function_call'] = function | {'arguments': ''}
    for piece in pieces:
        delta = ({'tool_calls': [{'index': 0, 'function': {'arguments': piece[0]}}]} if calls else
                 {'content': piece[0]} if message['content'] is not None else
                 {'function_call': {'arguments': piece[0]}})
        deltas.append((delta, None if top is None else logprobs_body([piece], top), None))
    deltas = [(start, None, None), *deltas, ({}, None, choice['finish_reason'])]
    chunks = [{'choices': [{'index': k, 'delta': delta, 'logprobs': logprobs, 'finish_reason': reason}]}
              for k in range(n) for delta, logprobs, reason in deltas]
    return write_events(head | {'object': 'chat.completion.chunk'}, chunks, usage)
