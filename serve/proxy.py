"""Requests that the student refuses, passed on to the LLM upstream byte for byte, and its reply, streamed
back unchanged. Those with a schema can be kept, as texts for the next student."""
import hashlib
import json
import logging
from urllib.parse import urlsplit

import httpx
from starlette.responses import StreamingResponse

from data.calls import read_reply
from data.objects import find_object
from distil.keys import failure_text, hide_in_stream, hide_keys, hide_password, read_key
from serve.prompts import read_turns
from serve.request import Refusal

HOP_BY_HOP = {b'connection', b'keep-alive', b'proxy-authenticate', b'proxy-authorization', b'te', b'trailer',
              b'transfer-encoding', b'upgrade', b'host', b'expect'}  # RFC 9110, 7.6.1: of one connection only
MAX_KEPT = 1 << 20  # bytes of a reply that is kept
log = logging.getLogger('serve')


class CutOff(ConnectionError):
    """upstream ended a reply before it was whole."""


class Proxy:
    """passes requests on to an OpenAI-compatible server.

    url: its base URL. The key of a request goes on with it, but not if it is this server's own (own_key); the
    environment's UPSTREAM_API_KEY goes in its place. kept_folder: path, or None; prompts: the Prompts that
    unwrap the texts that are kept."""

    def __init__(self, url, connect_timeout, metrics, own_key='', kept_folder=None, prompts=None):
        self.base, self.origin = url.rstrip('/'), '{0.scheme}://{0.netloc}'.format(urlsplit(url))
        self.key, self.own_key = read_key('UPSTREAM_API_KEY'), own_key
        hide_password(url)
        self.metrics, self.kept_folder, self.prompts = metrics, kept_folder, prompts
        timeout = httpx.Timeout(600, connect=connect_timeout)   # an LLM may think for minutes
        self.client = httpx.AsyncClient(timeout=timeout, follow_redirects=False)
        self.client.headers.clear()                             # only the caller's

    def headers_for(self, request):
        """the headers of a request as they go on."""
        dropped = HOP_BY_HOP | ({b'authorization', b'api-key'} if self.key or self.own_key else set())
        headers = [(name, value) for name, value in request.headers.raw if name.lower() not in dropped]
        return headers + ([(b'authorization', f'Bearer {self.key}'.encode())] if self.key else [])

    def url_for(self, request):
        """where a request goes: below the base URL, or on the same host if its path is one of Azure's."""
        path = request.scope['original_path']
        start = self.origin if path.startswith('/openai/') else self.base
        return start + path.removeprefix('/v1') + (f'?{request.url.query}' if request.url.query else '')

    async def pass_on(self, request, parts, refusal, body=None):
        """upstream's Response to a starlette Request. parts: what was read of its body, a list of bytes; the
        rest is read from request.state.rest, if there is any. body: the JSON of it, if it was read."""
        why = 'route' if refusal.status in (404, 405) else str(refusal.where[0]) if refusal.where else 'body'
        self.metrics.passed_on.labels(why).inc()
        log.info('passed on: %s', refusal)

        async def content():
            for part in parts:
                yield part
            async for part in getattr(request.state, 'rest', None) or request.stream():
                yield part
        if refusal.status != 413 and hasattr(request.state, 'rest'):
            to_send = b''.join(parts)
        else:                                                   # unread, or only its beginning is read
            to_send = content() if {'content-length', 'transfer-encoding'} & {*request.headers} else None
        try:
            sent = self.client.build_request(request.method, self.url_for(request),
                                             headers=self.headers_for(request), content=to_send)
            reply = await self.client.send(sent, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Refusal(502, f'the student cannot answer ({refusal}), and upstream cannot be reached: '
                          f'{failure_text(error)}', *refusal.where) from None
        schema = find_schema(body) if body and self.kept_folder and reply.status_code == 200 else None

        # an error may repeat the key; packed, it could not be seen there
        unpacked = reply.status_code >= 400 and 'content-encoding' in reply.headers

        async def stream():
            copy = [] if schema else None
            try:
                async for part in hide_in_stream(reply.aiter_bytes() if unpacked else reply.aiter_raw()):
                    if copy is not None and sum(map(len, copy)) < MAX_KEPT:
                        copy.append(part)
                    yield part
                if schema:
                    self.keep(body, schema, read_answer(reply, b''.join(copy)))
            except httpx.HTTPError as error:                    # the caller's reply is cut off, too
                raise CutOff(f'upstream: {failure_text(error)}') from None
            finally:
                await reply.aclose()
        response = StreamingResponse(stream(), reply.status_code)
        left_out = HOP_BY_HOP | ({b'content-encoding', b'content-length'} if unpacked else set())
        response.raw_headers = [(name.lower(), hide_keys(value)) for name, value in reply.headers.raw
                                if name.lower() not in left_out]
        response.raw_headers.append((b'x-answered-by', b'upstream'))
        return response

    def keep(self, body, schema, answer):
        """appends the text of a request, and upstream's answer to it, to a file for its schema that
        data/prepare.py reads."""
        try:
            given = body.get('messages') or body.get('input')
            messages = [{'role': 'user', 'content': given}] if isinstance(given, str) else given
            users = [turn for turn in read_turns(messages, 'messages') if turn.role == 'user']
            text = self.prompts.unwrap(users[-1].text) or users[-1].text
        except (Refusal, LookupError):
            return                                              # images, or no user message
        written = json.dumps(schema, sort_keys=True)
        name = hashlib.blake2b(written.encode('utf-8', 'replace'), digest_size=6).hexdigest()
        try:
            self.kept_folder.mkdir(parents=True, exist_ok=True)
            (self.kept_folder / f'{name}.schema.json').write_text(written + '\n', encoding='utf-8')
            with open(self.kept_folder / f'{name}.jsonl', 'a', encoding='utf-8') as file:
                file.write(json.dumps({'text': text} | ({'answer': answer} if answer else {})) + '\n')
        except OSError as error:
            log.warning('%s: %s', self.kept_folder, error.strerror)


def shorten(record):
    """a filter of log records: that upstream cut off a reply is said in a line, without the server's traceback."""
    error = record.exc_info and record.exc_info[1]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, CutOff):
        record.msg, record.args, record.exc_info = 'a reply was cut off: %s', (error,), None
    return True


def find_schema(body):
    """the JSON Schema that a request asks for, or None: of a response_format, of the format of a response, or
    of its only tool."""
    tools = body.get('tools') or body.get('functions')
    tool = tools[0] if isinstance(tools, list) and len(tools) == 1 else None
    for part, *keys in ((body, 'response_format', 'json_schema', 'schema'),
                        (body, 'text', 'format', 'schema'), (tool, 'function', 'parameters'),
                        (tool, 'parameters')):
        for key in keys:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict):
            return part
    return None


def text_of_events(events):
    """the JSON in the events of a stream, list of dicts: its text, or the arguments of a call."""
    text = ''
    for event in events:
        for choice in event.get('choices') or []:
            called = choice['delta'].get('tool_calls') or [{}]
            function = called[0].get('function') or choice['delta'].get('function_call') or {}
            text += choice['delta'].get('content') or function.get('arguments') or ''
        if event.get('type') in ('response.output_text.delta', 'response.function_call_arguments.delta'):
            text += event['delta']
    return text


def read_answer(reply, raw):
    """the JSON object that an LLM answered, or None. raw: the body of its reply, which may be compressed or
    a stream of events."""
    try:
        text = httpx.Response(200, headers=reply.headers, content=raw).text
        if 'event-stream' in reply.headers.get('content-type', ''):
            lines = [line[5:] for line in text.splitlines() if line.startswith('data: {')]
            content = text_of_events(map(json.loads, lines))
        else:
            content = read_reply(json.loads(text))[0]
        return find_object(content)[0]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
