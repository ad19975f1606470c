"""One call to an LLM, in the forms in which logs keep it: what was asked, what was answered. Only the standard library.

    request, response = split_call(record)     # of a line's JSON value, as bodies; None: it is no call
    before, message = read_prompt(request)     # the last user message, and what comes before it
    for content, tokens in read_replies(response): ...

data/logs.py shows the forms. Those of gateways differ in where the bodies are, and in whether they are JSON or a text
with JSON in it.
"""
import json
import math

if __package__:
    from data.objects import find_object
else:  # of data/prepare.py, whose files lie beside it
    from objects import find_object

THOUGHTS = 'thinking', 'redacted_thinking', 'reasoning'  # parts of a content that are not the answer
REQUESTS = 'request', 'request_body', 'proxy_server_request', 'body'  # where a body may be: of Helicone, of LiteLLM
RESPONSES = 'response', 'response_body'
ASKED = 'response_format', 'tools', 'tool_choice', 'functions', 'function_call'  # which answer a request asks for
PAIRS = ('input', 'output'), ('prompt', 'completion'), ('prompt', 'response')  # Langfuse, and files for fine-tuning


# -----------------------------------------------------------------------------
# where the bodies are


def read_json(part):
    """a dict, a list, or what a string holds of these as JSON; None if it is nothing of that."""
    if isinstance(part, str):
        try:
            part = json.loads(part)
        except (ValueError, RecursionError):
            return None
    return part if isinstance(part, (dict, list)) else None


def find_body(part):
    """the dict of a request, which may lie under "body" or be JSON in a text; {} if there is none."""
    part = read_json(part)
    if isinstance(part, dict) and isinstance(part.get('body'), (dict, str)):
        return find_body(part['body'])
    return part if isinstance(part, dict) else {}


def find_messages(part):
    """the list of messages that a part is, or has under "messages", also as JSON in a text; None if there is none."""
    part = read_json(part)
    part = read_json(part.get('messages')) if isinstance(part, dict) and 'messages' in part else part
    part = [part] if isinstance(part, dict) and 'role' in part else part
    return part if isinstance(part, list) and all(isinstance(m, dict) and 'role' in m for m in part) else None


def answer_with(content):
    """the body of a response with this content."""
    return {'choices': [{'message': {'role': 'assistant', 'content': content}}]}


def find_response(part, bare=False):
    """the body of a response in any of its forms, {} if there is none. bare: an object may be the answer itself."""
    if isinstance(part, str) and part.strip():
        if part.lstrip().startswith(('data:', 'event:')):       # of a stream, as it was sent
            lines = (line[5:] for line in part.splitlines() if line.startswith('data:'))
            return join_chunks([chunk for chunk in map(read_json, lines) if chunk])
        return find_response(read_json(part)) or answer_with(part)
    if isinstance(part, list) and part and all(isinstance(item, dict) for item in part):
        if is_chunk(part[0]):
            return join_chunks(part)
        return find_response(part[-1]) if 'role' in part[-1] else answer_with(part)  # messages, or parts of one
    if not isinstance(part, dict):
        return {}
    if found := find_response(part.get('body')):
        return found
    if part.get('error') is not None or any(isinstance(part.get(key), list) for key in ('choices', 'output')):
        return part
    if 'role' in part:                                          # a message, as Anthropic's responses are
        return {'choices': [{'message': part}]}
    status = part.get('status_code')
    if isinstance(status, int) and status >= 400:
        return {'error': f'status {status}'}
    return answer_with(json.dumps(part)) if bare and part else {}


def split_call(record):
    """(body of the request, body of the response) of a line's JSON value, {} for each that it lacks. None if
    it is not a line of a log."""
    if not isinstance(record, dict):
        return None
    response = next(filter(None, (find_response(record.get(key)) for key in RESPONSES)), {})
    if not response and record.get('error') is not None:        # beside an empty response, as in batches
        response = {'error': record['error']}
    bodies = [find_body(record.get(key)) for key in REQUESTS] + [record]
    for body in bodies:
        messages = body.get('messages') if body is not record else find_messages(body.get('messages'))
        if isinstance(messages, list) and (messages or body is not record) or body is not record and 'input' in body:
            last = messages[-1] if messages else None
            if not response and isinstance(last, dict) and last.get('role') == 'assistant':
                return {**body, 'messages': messages[:-1]}, {'choices': [{'message': last}]}  # a fine-tuning file
            return {**body, 'messages': messages} if messages else body, response
    for asked, answered in PAIRS if 'text' not in record else ():
        if answered not in record or not record.get(asked):
            continue
        messages, answer = find_messages(record[asked]), find_response(record[answered], bare=True) or response
        if not messages and isinstance(record[asked], str):     # two texts: many files have an input and an output
            if asked == 'prompt' or record.get('type') == 'GENERATION' or has_object(answer):
                messages = [{'role': 'user', 'content': record[asked]}]
        if messages:
            body = find_body(record[asked])
            return {'messages': messages} | {key: body[key] for key in ASKED if key in body}, answer
    if is_chunk(record):                                        # which data/logs.py names
        return {}, {}
    if 'custom_id' in record and 'response' in record:
        return {}, response or {'error': None}                  # the output of a batch
    is_body = any(find_body(record.get(key)).keys() & {'choices', 'output'} for key in RESPONSES)
    return ({}, response) if is_body else None                  # a response without its request


def has_object(response):
    """True if an answer in the body of a response holds a JSON object."""
    try:
        return any(find_object(content)[0] is not None for content, _ in read_replies(response))
    except ValueError:
        return False


# -----------------------------------------------------------------------------
# streams


def is_chunk(part):
    """True if it is a chunk of a streamed answer, of chat completions or of responses."""
    if not isinstance(part, dict):
        return False
    choices = part['choices'] if isinstance(part.get('choices'), list) else []
    return (part.get('object') == 'chat.completion.chunk' or str(part.get('type')).startswith('response.')
            or any(isinstance(choice, dict) and 'delta' in choice for choice in choices))


def join_chunks(chunks):
    """the body of the response that was streamed in these chunks, dicts in their order."""
    messages = {}                                               # {index of a choice: (pieces, log probabilities)}
    for chunk in chunks:
        if chunk.get('type') == 'response.completed':
            return find_response(chunk.get('response'))
        if chunk.get('type') in ('response.output_text.delta', 'response.function_call_arguments.delta'):
            messages.setdefault(0, ([], []))[0].append(chunk.get('delta') or '')
        for choice in chunk.get('choices') or ():
            delta, logprobs = choice.get('delta') or {}, choice.get('logprobs') or {}
            pieces, listed = messages.setdefault(choice.get('index', 0), ([], []))
            called = delta.get('tool_calls') or [{'function': delta.get('function_call')}]
            function = called[0].get('function') or {}
            pieces.append(join_parts(delta.get('content')) or function.get('arguments') or '')
            listed += logprobs.get('content') or []
    return {'choices': [{'message': {'content': ''.join(pieces)}, 'logprobs': {'content': listed}}
                        for _, (pieces, listed) in sorted(messages.items())]}


# -----------------------------------------------------------------------------
# the bodies


def is_thought(part):
    """True if a part of a content is what the model thought, not what it said."""
    return isinstance(part, dict) and (part.get('type') in THOUGHTS or part.get('thought') is True)


def read_content(content):
    """the text of a message's content: a string, or a list of parts. ValueError if a part is no text."""
    parts = content if isinstance(content, list) else [{'text': content}]
    texts = [part.get('text') if isinstance(part, dict) else None for part in parts if not is_thought(part)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('a message is not a text')
    return '\n'.join(texts)


def read_prompt(request):
    """(what comes before, the last user message) of a request's body. ValueError if it has no message."""
    messages = request.get('messages', request.get('input'))
    if isinstance(messages, str):
        messages = [{'role': 'user', 'content': messages}]
    if first := request.get('instructions') or request.get('system'):  # the latter: Anthropic's
        messages = [{'role': 'system', 'content': first}, *(messages or [])]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError('the request has no messages')
    last = max((n for n, m in enumerate(messages) if m.get('role') == 'user'), default=len(messages) - 1)
    contents = [read_content(message.get('content') or '') for message in messages[:last + 1]]
    return '\n\n'.join(contents[:-1]), contents[-1]


def join_parts(content):
    """the text of an answer's content: a string, or a list of parts, of which those that are text count. A call of a
    tool is a part too (Anthropic's)."""
    if isinstance(content, str) or content is None:
        return content or ''
    said = [part for part in content if isinstance(part, dict) and not is_thought(part)]
    called = [json.dumps(part['input']) for part in said if part.get('type') == 'tool_use']
    return ''.join(part['text'] for part in said if isinstance(part.get('text'), str)) or ''.join(called[:1])


def read_arguments(call):
    """the arguments of a tool call as a text; a few servers give the object itself."""
    arguments = (call or {}).get('arguments') or ''
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def read_token(token):
    """(bytes, log probability) of a token in a list of log probabilities; None if it lacks one of them."""
    try:
        written = bytes(token.get('bytes') or token['token'].encode('utf-8', 'replace'))
        logprob = float(token['logprob'])
    except (LookupError, TypeError, AttributeError, ValueError):
        return None
    return None if math.isnan(logprob) else (written, min(logprob, 0.0))


def read_tokens(listed):
    """the tokens of read_replies, of a list of log probabilities. [] if a token of the answer has none; alternatives
    without one are left out."""
    tokens = []
    for token in listed if isinstance(listed, list) else ():
        others = token.get('top_logprobs') if isinstance(token, dict) else None
        others = [other for other in map(read_token, others or ()) if other]
        written = read_token({**token, 'logprob': 0}) if isinstance(token, dict) else None
        own = written and (read_token(token) or next((other for other in others if other[0] == written[0]), None))
        if not own:
            return []
        tokens.append((*own, others))
    return tokens


def read_choices(reply):
    """yields (content, list of log probabilities) for each answer in the body of a response."""
    if isinstance(reply.get('output'), list):                   # /v1/responses
        said = [part for item in reply['output'] if item.get('type') == 'message' for part in item['content'] or []]
        calls = [item for item in reply['output'] if item.get('type') == 'function_call']
        content = join_parts(said) or read_arguments(calls[0] if calls else None)
        yield content, [token for part in said for token in part.get('logprobs') or []]
        return
    for choice in reply['choices']:
        message = choice.get('message') or {'content': choice['text']}  # the latter: /v1/completions
        calls = message.get('tool_calls') or [{'function': message.get('function_call')}]
        content = join_parts(message.get('content')) or read_arguments(calls[0].get('function'))
        logprobs = choice.get('logprobs')
        yield content, logprobs.get('content') if isinstance(logprobs, dict) else None


def read_replies(reply):
    """[(content, tokens)] of the body of a response: one for each of its n answers. content: the text, or the arguments
    of a tool call. tokens: list of (bytes, log probability, [(bytes, log probability) of each alternative]), [] if it
    has none. ValueError if there is no answer in it."""
    try:
        found = [(content, read_tokens(listed)) for content, listed in read_choices(reply)]
        if found:
            return found
    except (LookupError, TypeError, AttributeError, ValueError):
        pass                                                    # the reason is in the reply, if it has one
    error = reply.get('error') if isinstance(reply, dict) else None
    code, said = (error.get('code'), error.get('message')) if isinstance(error, dict) else (None, error)
    parts = [str(part) for part in (code, said) if part and not (part == code and str(code) in str(said))]
    raise ValueError(': '.join(['no answer', *parts])[:200])


def read_reply(reply):
    """the first of read_replies."""
    return read_replies(reply)[0]
