"""Reading a request: its body, checks of its parts, and the text in them. Refusal if that is impossible. What
was read becomes a Plan."""
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import zstandard

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


@dataclass
class Plan:
    """how a student answers a request: the texts that it labels, and what becomes of the Answers."""
    texts: list                 # strings
    where: tuple                # keys that lead to the texts in the body
    reply: Callable             # list of Answers -> body of the reply: a dict, or events as a string
    full: bool = False          # the reply needs the probabilities of all values
    offered: dict = field(default_factory=dict)  # {field: values as JSON}, if the caller allows only these
    ignored: list = field(default_factory=list)  # parts of the request that were not read, for x-ignored
    refuse_long: bool = True    # a text that is longer than the student reads; False: it is cut
    copies: bool = False        # the reply needs the likeliest copied values
    reference_date: str = ''    # the day on which the texts were written; '': that of the student's task
    each: bool = False          # a text without an answer has an error of its own; False: the request is refused


# -----------------------------------------------------------------------------
# the body


async def read_raw(request, parts, limit=MAX_BODY):
    """appends the body of a starlette Request to the list parts, as bytes. Refusal if it is too long; the
    rest of it can then be read from request.state.rest."""
    stream, size = request.stream(), 0
    request.state.rest = stream
    async for part in stream:
        parts.append(part)
        size += len(part)
        if size > limit:
            raise Refusal(413, f'the body is longer than {limit} bytes')


def unpack(body, encoding):
    """the body without its content-encoding; at most MAX_BODY + 1 bytes of it."""
    if encoding in ('gzip', 'x-gzip', 'deflate'):
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)      # 32: the header tells which of the two it is
        unpacked = unpacker.decompress(body, MAX_BODY + 1)
        if not unpacker.eof and len(unpacked) <= MAX_BODY:
            raise ValueError('the compressed body ends too early')
        return unpacked
    if encoding == 'zstd':
        with zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(body) as reader:
            return reader.read(MAX_BODY + 1)
    if encoding not in ('', 'identity'):
        raise Refusal(415, f'content-encoding {encoding!r} is not supported, only gzip, deflate and zstd')
    return body


def parse_body(body, encoding=''):
    """the JSON object in a body, as a dict. body: bytes; encoding: its content-encoding."""
    try:
        body = unpack(body, encoding.strip().lower())
        if len(body) > MAX_BODY:
            raise Refusal(413, f'the unpacked body is longer than {MAX_BODY} bytes')
        body = json.loads(body.decode('utf-8-sig'), parse_constant=reject_constant)
    except (ValueError, RecursionError, zlib.error, zstandard.ZstdError) as error:
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
        if kind in ('text', 'input_text', 'output_text') and isinstance(part.get('text'), str):
            parts.append(part['text'])
        elif kind == 'input_json' and 'data' in part:
            parts.append(read_state(part['data']))
        else:
            raise Refusal(400, f'the student reads text, not {kind!r}', *where, n)
    return '\n'.join(parts)


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
