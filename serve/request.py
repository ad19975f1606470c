"""Reading a request: its body, checks of its parts, and the text in it. Refusal if that is impossible."""
import json

import zstandard

from distil.space import clean

MAX_BODY = 1 << 20   # bytes


class Refusal(Exception):
    """why a request is refused: HTTP status, message, and the keys that lead to the part of the body at
    fault."""

    def __init__(self, status, message, *where):
        super().__init__(message)
        self.status, self.where = status, where


def require(part, kind, what, *where, status=422):
    """returns part if it is of type kind, else raises a Refusal. what: the expected part, in words."""
    if not isinstance(part, kind) or isinstance(part, bool) and kind is not bool:
        raise Refusal(status, f'{".".join(map(str, where))} must be {what}', *where)
    return part


# -----------------------------------------------------------------------------
# the body


async def read_body(request):
    """the JSON object of a starlette Request, as a dict."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise Refusal(413, f'the body is longer than {MAX_BODY} bytes')
        parts.append(part)
    body = b''.join(parts)
    encoding = request.headers.get('content-encoding', 'identity').lower()
    if encoding not in ('identity', 'zstd'):
        raise Refusal(415, f'content-encoding {encoding!r} is not supported, only zstd')
    try:
        if encoding == 'zstd':
            with zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(body) as reader:
                body = reader.read(MAX_BODY + 1)
            if len(body) > MAX_BODY:
                raise Refusal(413, f'the unpacked body is longer than {MAX_BODY} bytes')
        body = json.loads(body.decode(), parse_constant=reject_constant)
    except (ValueError, RecursionError, zstandard.ZstdError) as error:
        raise Refusal(400, f'the body is not JSON in UTF-8: {str(error)[:200]}') from None
    return require(body, dict, 'a JSON object', 'body', status=400)


def reject_constant(name):
    """ValueError for NaN and Infinity, which Python's json reads."""
    raise ValueError(f'{name} is not valid JSON')


# -----------------------------------------------------------------------------
# the text


def read_content(content, where):
    """the text of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = []
    for n, part in enumerate(require(content, list, 'a string or a list of parts', *where, status=400)):
        kind = part.get('type') if isinstance(part, dict) else None
        if kind in ('text', 'input_text') and isinstance(part.get('text'), str):
            parts.append(part['text'])
        elif kind == 'input_json' and 'data' in part:
            parts.append(read_state(part['data']))
        else:
            raise Refusal(400, f'the student reads text, not {kind!r}', *where, n)
    return '\n'.join(parts)


def read_messages(messages, prompt, where):
    """the text to label. If the last user message, alone or after the first system message, is the prompt
    with a text in place of {text}, it is that text; else the whole last user message."""
    contents = []                                               # [(role, text)]
    for n, message in enumerate(require(messages, list, 'a list of messages', where, status=400)):
        require(message, dict, 'an object with role and content', where, n, status=400)
        if message.get('role') in ('user', 'system', 'developer'):
            contents.append((message['role'], read_content(message.get('content'), (where, n, 'content'))))
    user = next((text for role, text in reversed(contents) if role == 'user'), None)
    if user is None:
        raise Refusal(400, 'there is no message with the role user', where)
    system = next((text for role, text in contents if role != 'user'), None)
    before, _, after = map(clean, prompt.partition('{text}'))  # whitespace may differ
    for whole in map(clean, [user] if system is None else [user, f'{system} {user}']):
        if whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after):
            return whole[len(before):len(whole) - len(after)].strip()
    return user


def read_state(state):
    """the text of a state: the only string in it if it has no other value, else its JSON."""
    def leaves_of(part):
        if isinstance(part, (dict, list)):
            children = part.values() if isinstance(part, dict) else part
            return [leaf for child in children for leaf in leaves_of(child)]
        return [part]

    leaves = leaves_of(state)
    if len(leaves) == 1 and isinstance(leaves[0], str):
        return leaves[0]
    return json.dumps(state, ensure_ascii=False)
