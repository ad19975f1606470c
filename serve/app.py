"""The routes of serve.py as an ASGI application: make_app. A handler takes a Service and the JSON object of a
request, and returns a Response. A Refusal that it raises becomes an error reply."""
import asyncio
import hmac
import json
import logging
import time
import uuid
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect

from serve.completions import (completion_body, completion_events, logprobs_body, read_response_format,
                               restrict_space, split_answer)
from serve.questions import decisions_answers, read_decisions, read_system_one, system_one_answers
from serve.request import Refusal, read_body, read_messages, read_state, require

log = logging.getLogger('serve')


# -----------------------------------------------------------------------------
# replies

ERROR_TYPES = {401: 'authentication_error', 404: 'not_found_error', 500: 'server_error',
               503: 'overloaded_error'}


def json_response(body, status=200, headers=None):
    return Response(json.dumps(body), status, headers, media_type='application/json')


def error_response(status, message, where=(), system_one=False):
    """an error in the form that the route's clients expect. where: keys that lead to the part of the body at
    fault."""
    kind = ERROR_TYPES.get(status, 'invalid_request_error')
    if system_one and status == 422:
        body = {'detail': [{'loc': ['body', *where], 'msg': message, 'type': 'value_error'}]}
    elif system_one:
        body = {'detail': {'error_type': kind, 'message': message}}
    else:
        body = {'error': {'message': message, 'type': kind, 'param': '.'.join(map(str, where)) or None,
                          'code': None}}
    return json_response(body, status, {'retry-after': '1'} if status == 503 else None)


def answer_headers(answers):
    """x-answered-by: who answered, the different names separated by commas; x-tokens-cut: how many tokens of
    the texts the student did not read, if any."""
    n_cut = sum(answer.n_cut for answer in answers)
    cut = {'x-tokens-cut': str(n_cut)} if n_cut else {}
    return {'x-answered-by': ','.join(sorted({answer.by for answer in answers}))} | cut


def count_tokens(answer):
    """(number of tokens read, number of tokens written)"""
    return len(answer.ids) + 1, len(answer.outs)


# -----------------------------------------------------------------------------
# handlers


async def complete_chat(service, body):
    """POST /v1/chat/completions"""
    space = service.space
    for key in ('tools', 'functions', 'audio'):
        if body.get(key):
            raise Refusal(400, f'{key}: not supported; the student only answers what it was trained on', key)
    if body.get('n') not in (None, 1):
        raise Refusal(400, 'n: must be 1; the student has one answer to a text', 'n')
    form, top = body.get('response_format'), body.get('top_logprobs') or 0
    stream, logprobs, options = body.get('stream'), body.get('logprobs'), body.get('stream_options') or {}
    if not all(flag in (None, True, False) for flag in (stream, logprobs)) or not isinstance(options, dict):
        raise Refusal(400, 'stream and logprobs must be true or false, stream_options an object', 'stream')
    if type(top) is not int or not 0 <= top <= 20:
        raise Refusal(400, 'top_logprobs must be 0 to 20', 'top_logprobs')
    names = tuple(space.fields) if form is None else read_response_format(form, space)
    fence = space.fence and (form is None or form.get('type') == 'text')
    text = read_messages(body.get('messages'), service.labeler.task['prompt'], 'messages')
    answer, = await service.answer([text])
    as_trained = names == tuple(space.fields) and fence == space.fence
    reply_space = space if as_trained else restrict_space(space, names, fence)
    head = {'id': f'chatcmpl-{uuid.uuid4().hex}', 'created': int(time.time()), 'model': service.name}
    n_in, n_out = count_tokens(answer)
    usage = {'prompt_tokens': n_in, 'completion_tokens': n_out, 'total_tokens': n_in + n_out}
    pieces = []
    if stream or logprobs:
        pieces = split_answer(answer.record, answer.decisions, reply_space, space,
                              service.labeler.temperature)
    if stream:
        events = completion_events(pieces, top if logprobs else None, head,
                                   usage if options.get('include_usage') else None)
        return Response(events, headers=answer_headers([answer]), media_type='text/event-stream')
    content = reply_space.text(answer.record[name] for name in names).strip()
    reply = completion_body(content, logprobs_body(pieces, top) if logprobs else None, head, usage)
    return json_response(reply, headers=answer_headers([answer]))


def is_system_one(path, body):
    """True if the questions have System One's form. Some gateways send it to /v1/decisions, or the other way
    round, so the form counts before the path."""
    questions = body.get('questions')
    return isinstance(questions, dict) or path == '/v1/systemone' and not isinstance(questions, list)


async def answer_questions(service, body, path, true_value, ordered):
    """POST /v1/decisions and /v1/systemone"""
    system_one = is_system_one(path, body)
    read = read_system_one if system_one else read_decisions
    questions = read(body, service.space, true_value, ordered)
    if system_one:
        if body.get('state') is None:
            raise Refusal(422, 'state is missing', 'state')
        text = read_state(body['state'])
    elif isinstance(body.get('input'), str):
        text = body['input']
    elif not isinstance(body.get('input'), list):
        raise Refusal(422, 'input must be a string or a list of messages', 'input')
    else:
        text = read_messages(body.get('input'), service.labeler.task['prompt'], 'input')
    answer, = await service.answer([text], full=True)
    n_in, n_out = count_tokens(answer)
    usage = {'input_tokens': n_in, 'output_tokens': n_out}
    if not system_one:
        usage |= {'input_tokens_details': {'cache_write_tokens': 0, 'cached_tokens': 0},
                  'output_tokens_details': {'reasoning_tokens': 0}, 'total_tokens': n_in + n_out}
    answers = (system_one_answers if system_one else decisions_answers)(questions, answer.probabilities)
    return json_response({'model': service.name, 'answers': answers, 'usage': usage},
                         headers=answer_headers([answer]))


async def label_texts(service, body):
    """POST /v1/label"""
    texts = require(body.get('texts') or None, list, 'a list of strings', 'texts', status=400)
    for n, text in enumerate(texts):
        require(text, str, 'a string', 'texts', n, status=400)
    answers = await service.answer(texts)
    records = []
    for answer in answers:
        confidence = {field: round(p, 4) for field, p in answer.confidence.items()}
        by = {} if answer.by == 'student' else {'_answered_by': answer.by}
        records.append(answer.record | {'_confidence': confidence} | by)
    return json_response({'model': service.name, 'answers': records}, headers=answer_headers(answers))


# -----------------------------------------------------------------------------
# the application


async def wait_for_disconnect(receive):
    while (await receive())['type'] != 'http.disconnect':
        pass


def add_post(app, path, handler, service):
    """adds a POST route. It stops the handler if the client disconnects, and turns exceptions into error
    replies."""
    @app.post(path)
    async def route(request: Request):
        system_one = path == '/v1/systemone'
        try:
            body = await read_body(request)
            system_one = is_system_one(path, body)
            work = asyncio.ensure_future(handler(service, body))
            disconnect = asyncio.ensure_future(wait_for_disconnect(request.receive))
            await asyncio.wait((work, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                return Response(status_code=499)  # nobody reads it; the metrics count it
            disconnect.cancel()
            return work.result()
        except ClientDisconnect:
            return Response(status_code=499)
        except RecursionError:
            return error_response(400, 'the body is nested too deeply', (), system_one)
        except Refusal as refusal:
            return error_response(refusal.status, str(refusal), refusal.where, system_one)
        except Exception:
            log.exception('%s failed', path)
            return error_response(500, "internal error; the server's log has the details", (), system_one)


def make_app(service, created=0, api_key='', true_value=None, ordered=()):
    """the routes, as an ASGI application. created: the student's time in seconds since 1970; the rest: as the
    settings."""
    @asynccontextmanager
    async def lifespan(app):
        service.decoder.start()
        ids, _, _ = service.labeler.encode(b'the first pass is slow')
        await service.decoder.answer([ids], full=True)  # before the first request comes
        yield
        for task in service.auditing:
            task.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    add_post(app, '/v1/chat/completions', complete_chat, service)
    add_post(app, '/v1/label', label_texts, service)
    for path in ('/v1/decisions', '/v1/systemone'):
        handler = partial(answer_questions, path=path, true_value=true_value or {}, ordered=ordered)
        add_post(app, path, handler, service)

    @app.get('/v1/models')
    async def models():
        day = time.strftime('%Y-%m-%d', time.gmtime(created))
        about = f'answers {", ".join(service.space.fields)}, as {service.labeler.task["teacher"]} would'
        return json_response({'object': 'list', 'data': [{'id': service.name, 'object': 'model',
                                                          'created': created, 'owned_by': 'you'}],
                              'models': [{'name': service.name, 'description': about, 'release_date': day}]})

    @app.get('/health')
    async def health():
        alive = service.decoder.is_alive()
        return json_response({'status': 'ok' if alive else 'the decoder has stopped'}, 200 if alive else 500)

    @app.get('/ready')
    async def ready():
        free = service.n_waiting < service.max_waiting
        return json_response({'status': 'ready' if free else 'full'}, 200 if free else 503)

    @app.get('/metrics')
    async def metrics():
        return Response(generate_latest(service.metrics.registry), media_type='text/plain; version=0.0.4')

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request, error):
        return error_response(error.status_code, f'there is no {request.method} {request.url.path}', (),
                              request.url.path == '/v1/systemone')
    return Middleware(app, service.metrics, api_key, {route.path for route in app.routes})


class Middleware:
    """an ASGI application around another: checks the key, gives each reply an id, and counts it in the
    metrics."""

    def __init__(self, app, metrics, api_key, paths):
        self.app, self.metrics, self.paths = app, metrics, paths
        self.key = api_key.encode()

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 0
        path = scope['path'] if scope['path'] in self.paths else 'other'  # or metrics grow without end

        async def send_with_id(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
                request_id = uuid.uuid4().hex.encode()
                message['headers'] = [*message.get('headers', []), (b'x-request-id', request_id)]
            await send(message)
        app, (scheme, _, key) = self.app, dict(scope['headers']).get(b'authorization', b'').partition(b' ')
        authorized = scheme.lower() == b'bearer' and hmac.compare_digest(key, self.key)
        if self.key and path not in ('/health', '/ready') and not authorized:
            app = error_response(401, 'the key is wrong or missing: Authorization: Bearer ...', (),
                                 path == '/v1/systemone')
        try:
            await app(scope, receive, send_with_id)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)
