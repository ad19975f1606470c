"""The student where the LLM call was: change the base URL, keep the code.

    python serve/serve.py config/demo.py --port=8000
    curl localhost:8000/v1/label -d '{"texts": ["thank you so much!"]}'
    python serve/serve.py config/demo.py --min_confidence=0.6 --upstream=http://localhost:9000/v1 --upstream_model=x

    POST /v1/chat/completions    as OpenAI's; the last user message is the text, or the prompt around one
    POST /v1/decisions, /v1/systemone    typed questions, answered with the probabilities of all values
    POST /v1/label               {"texts": [...]} -> {"answers": [...]}, many at once
    GET  /v1/models  /health  /ready  /metrics

Needs out/<name>/ alone, as sample.py does, and: pip install -r requirements-serve.txt. It answers the
questions its student was trained on and refuses all others. What the student is unsure of goes to the LLM at
`upstream`.
"""
import asyncio
import hmac
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, stop
from distil.checkpoint import warn_changed_task
from sample import Labeler

try:
    import httpx
    import uvicorn
    import zstandard
    from fastapi import FastAPI, Request
    from fastapi.responses import Response
    from prometheus_client import generate_latest
    from starlette.requests import ClientDisconnect

    from serve.questions import (Refusal, fields_of_format, logprobs_of, need, pieces_of, read_decisions,
                           read_system_one, say_chunks, say_completion, say_decisions, say_system_one,
                           text_of_messages, text_of_state, view)
    from serve.service import Service, Upstream
except ImportError as error:
    sys.exit(f'serve.py needs {error.name}; run: pip install -r requirements-serve.txt')

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use
host = '127.0.0.1'   # this machine alone; 0.0.0.0: whoever reaches it
port = 8000          # 0..65535; 0: a free one
api_key = ''         # callers must send it (Authorization: Bearer ...); '': SERVE_API_KEY of the environment
max_waiting = 4096   # 1..; texts under way at a time; more are told to come again
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
too_long = 'cut'     # 'cut' or 'refuse'; what becomes of texts longer than the student reads
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of a large student's layers, as in sample.py
# what the questions of decision clients mean
true_value = {}      # {'toxicity': 'toxic'}: the value that a yes stands for, of a field with two
ordered = []         # names of fields whose values are a scale, lowest first; integers always are
# what the student is unsure of
min_confidence = 0.0  # 0..1 or 'target'; a record with a field below goes upstream (see sample.py)
upstream = ''        # base URL of an OpenAI-compatible LLM; its key: the environment's UPSTREAM_API_KEY
upstream_model = ''  # its name there
upstream_timeout = 20.0  # 0..; seconds
audit = 0.0          # 0..1; share of all texts that are also asked upstream, to watch the agreement
audit_min = 0.0      # 0..1; where a field agrees less often than this for sure, everything goes upstream
keep = False         # append what upstream answered to served.jsonl, for extract.py --score; else no text is
dataset = ''         # word; that file is data/<dataset>/served.jsonl
# of the config file, to say so where the student was trained with others
fields = {}
prompt = ''
config = configure(globals())

MAX_BODY = 1 << 20   # bytes
log = logging.getLogger('serve')


# -----------------------------------------------------------------------------
# routes


async def read_body(request):
    """the JSON object of a request; Refusal where there is none."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise Refusal(413, f'the body is longer than {MAX_BODY} bytes')
        parts.append(part)
    body = b''.join(parts)
    packing = request.headers.get('content-encoding', 'identity').lower()
    if packing not in ('identity', 'zstd'):
        raise Refusal(415, f'content-encoding {packing!r} is not known, only zstd')
    try:
        if packing == 'zstd':
            with zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(body) as reader:
                body = reader.read(MAX_BODY + 1)
            if len(body) > MAX_BODY:
                raise Refusal(413, f'the unpacked body is longer than {MAX_BODY} bytes')
        body = json.loads(body.decode(), parse_constant=no_constant)
    except (ValueError, RecursionError, zstandard.ZstdError) as error:
        raise Refusal(400, f'the body is not JSON in UTF-8: {str(error)[:200]}') from None
    return need(body, dict, 'a JSON object', 'body', status=400)


def no_constant(name):
    raise ValueError(f'{name} is no JSON')


def say(body, status=200, headers=None):
    return Response(json.dumps(body), status, headers, media_type='application/json')


KINDS = {401: 'authentication_error', 404: 'not_found_error', 500: 'server_error', 503: 'overloaded_error'}


def say_refusal(status, message, where=(), system_one=False):
    """the error that the clients of a route expect."""
    if system_one and status == 422:
        body = {'detail': [{'loc': ['body', *where], 'msg': message, 'type': 'value_error'}]}
    elif system_one:
        body = {'detail': {'error_type': KINDS.get(status, 'invalid_request_error'), 'message': message}}
    else:
        body = {'error': {'message': message, 'type': KINDS.get(status, 'invalid_request_error'),
                          'param': '.'.join(map(str, where)) or None, 'code': None}}
    return say(body, status, {'retry-after': '1'} if status == 503 else None)


def answered_by(answers):
    """the header that says who answered, the one name or all, and the one that says how much was cut off."""
    n_cut = sum(answer.n_cut for answer in answers)
    cut = {'x-tokens-cut': str(n_cut)} if n_cut else {}
    return {'x-answered-by': ','.join(sorted({answer.by for answer in answers}))} | cut


def usage_of(answers):
    """tokens read, tokens written."""
    return sum(len(a.ids) + 1 for a in answers), sum(len(a.outs) for a in answers)


async def chat(service, body):
    """POST /v1/chat/completions"""
    space = service.space
    for key in ('tools', 'functions', 'audio'):
        if body.get(key):
            raise Refusal(400, f'{key}: the student answers its own questions alone', key)
    if body.get('n') not in (None, 1):
        raise Refusal(400, 'n: there is one answer to a text', 'n')
    form, top = body.get('response_format'), body.get('top_logprobs') or 0
    stream, logprobs, options = body.get('stream'), body.get('logprobs'), body.get('stream_options') or {}
    if not all(flag in (None, True, False) for flag in (stream, logprobs)) or not isinstance(options, dict):
        raise Refusal(400, 'stream and logprobs are true or false, stream_options is an object', 'stream')
    if type(top) is not int or not 0 <= top <= 20:
        raise Refusal(400, 'top_logprobs is 0 to 20', 'top_logprobs')
    names = tuple(space.fields) if form is None else fields_of_format(form, space)
    fence = space.fence and (form is None or form.get('type') == 'text')
    text = text_of_messages(body.get('messages'), service.labeler.task['prompt'], 'messages')
    answer, = await service.answer([text])
    seen = space if names == tuple(space.fields) and fence == space.fence else view(space, names, fence)
    head = {'id': f'chatcmpl-{uuid.uuid4().hex}', 'created': int(time.time()), 'model': service.name}
    n_in, n_out = usage_of([answer])
    usage = {'prompt_tokens': n_in, 'completion_tokens': n_out, 'total_tokens': n_in + n_out}
    pieces = []
    if stream or logprobs:
        pieces = pieces_of(answer.answer, answer.decisions, seen, space, service.labeler.temperature)
    if stream:
        events = say_chunks(pieces, top if logprobs else None, head,
                            usage if options.get('include_usage') else None)
        return Response(events, headers=answered_by([answer]), media_type='text/event-stream')
    content = seen.text(answer.answer[name] for name in names).strip()
    return say(say_completion(content, logprobs_of(pieces, top) if logprobs else None, head, usage),
               headers=answered_by([answer]))


def is_system_one(path, body):
    """some gateways take it for a decision, and the other way round: the shape of the questions decides."""
    questions = body.get('questions')
    return isinstance(questions, dict) or path == '/v1/systemone' and not isinstance(questions, list)


async def decisions(service, body, path, true_value, ordered):
    """POST /v1/decisions and /v1/systemone"""
    system_one = is_system_one(path, body)
    read = read_system_one if system_one else read_decisions
    questions = read(body, service.space, true_value, ordered)
    if system_one:
        if body.get('state') is None:
            raise Refusal(422, 'state is missing', 'state')
        text = text_of_state(body['state'])
    elif isinstance(body.get('input'), str):
        text = body['input']
    elif not isinstance(body.get('input'), list):
        raise Refusal(422, 'input must be a text or a list of messages', 'input')
    else:
        text = text_of_messages(body.get('input'), service.labeler.task['prompt'], 'input')
    answer, = await service.answer([text], full=True)
    n_in, n_out = usage_of([answer])
    usage = {'input_tokens': n_in, 'output_tokens': n_out}
    if not system_one:
        usage |= {'input_tokens_details': {'cache_write_tokens': 0, 'cached_tokens': 0},
                  'output_tokens_details': {'reasoning_tokens': 0}, 'total_tokens': n_in + n_out}
    answers = (say_system_one if system_one else say_decisions)(questions, answer.chances)
    return say({'model': service.name, 'answers': answers, 'usage': usage}, headers=answered_by([answer]))


async def label(service, body):
    """POST /v1/label"""
    texts = need(body.get('texts') or None, list, 'a list of texts', 'texts', status=400)
    for n, text in enumerate(texts):
        need(text, str, 'a text', 'texts', n, status=400)
    answers = await service.answer(texts)
    said = [answer.answer | {'_confidence': {field: round(p, 4) for field, p in answer.sure.items()}} |
            ({} if answer.by == 'student' else {'_answered_by': answer.by}) for answer in answers]
    return say({'model': service.name, 'answers': said}, headers=answered_by(answers))


async def hung_up(receive):
    while (await receive())['type'] != 'http.disconnect':
        pass


def make_app(service, created=0, api_key='', true_value=None, ordered=()):
    """the routes, as an ASGI application. created: when the student was, in seconds; the rest: as the
    settings."""
    @asynccontextmanager
    async def lifespan(app):
        service.decoder.start()
        ids, _, _ = service.labeler.encode(b'the first pass is slow')
        await service.decoder.ask([ids], full=True)  # before anybody waits for it
        yield
        for task in service.auditing:
            task.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    def post(path, handler):
        @app.post(path)
        async def route(request: Request):
            system_one = path == '/v1/systemone'
            try:
                body = await read_body(request)
                system_one = is_system_one(path, body)
                work = asyncio.ensure_future(handler(service, body))
                gone = asyncio.ensure_future(hung_up(request.receive))
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():  # nobody is there to read it
                    work.cancel()
                    return Response(status_code=499)
                gone.cancel()
                return work.result()
            except ClientDisconnect:
                return Response(status_code=499)
            except RecursionError:
                return say_refusal(400, 'the body is nested too deeply', (), system_one)
            except Refusal as refusal:
                return say_refusal(refusal.status, str(refusal), refusal.where, system_one)
            except Exception:
                log.exception('%s failed', path)
                return say_refusal(500, 'the server made a mistake; its log says which', (), system_one)

    post('/v1/chat/completions', chat)
    post('/v1/label', label)
    for path in ('/v1/decisions', '/v1/systemone'):
        post(path, partial(decisions, path=path, true_value=true_value or {}, ordered=ordered))

    @app.get('/v1/models')
    async def models():
        day = time.strftime('%Y-%m-%d', time.gmtime(created))
        about = f'answers {", ".join(service.space.fields)}, as {service.labeler.task["teacher"]} would'
        return say({'object': 'list', 'data': [{'id': service.name, 'object': 'model', 'created': created,
                                                'owned_by': 'you'}],
                    'models': [{'name': service.name, 'description': about, 'release_date': day}]})

    @app.get('/health')
    async def health():
        alive = service.decoder.is_alive()
        return say({'status': 'ok' if alive else 'the decoder is gone'}, 200 if alive else 500)

    @app.get('/ready')
    async def ready():
        room = service.n_waiting < service.max_waiting
        return say({'status': 'ready' if room else 'full'}, 200 if room else 503)

    @app.get('/metrics')
    async def metrics():
        return Response(generate_latest(service.metrics.registry), media_type='text/plain; version=0.0.4')

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request, error):
        return say_refusal(error.status_code, f'there is no {request.method} {request.url.path}', (),
                           request.url.path == '/v1/systemone')
    return Front(app, service.metrics, api_key, {route.path for route in app.routes})


class Front:
    """around the application: the key is checked, each reply gets an id, and the metrics count it."""

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
                number = uuid.uuid4().hex.encode()
                message['headers'] = [*message.get('headers', []), (b'x-request-id', number)]
            await send(message)
        app, (way, _, key) = self.app, dict(scope['headers']).get(b'authorization', b'').partition(b' ')
        known = way.lower() == b'bearer' and hmac.compare_digest(key, self.key)
        if self.key and path not in ('/health', '/ready') and not known:
            app = say_refusal(401, 'the key is wrong or missing: Authorization: Bearer ...', (),
                              path == '/v1/systemone')
        try:
            await app(scope, receive, send_with_id)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)


def serve(app, host, port):
    """answers until SIGTERM or Ctrl-C, which let what is under way finish."""
    listening = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        stop(f'cannot listen at {host}:{port}: {error.strerror}; another --port?')
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning', access_log=False,
                                           timeout_graceful_shutdown=30))
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn has its own while it runs, but for the first moment; it then raises the signal once more
        signal.signal(number, lambda *_: setattr(server, 'should_exit', True))
    print(f'http://{host}:{listening.getsockname()[1]}/v1', flush=True)
    server.run(sockets=[listening])


if __name__ == '__main__':
    if not name and not run:
        stop('no task; run: python serve/serve.py config/demo.py')
    if (audit or audit_min) and not upstream:
        stop('an audit needs an upstream to compare with')
    if audit_min and not audit:
        stop('audit_min needs an audit: a share of the texts that upstream is asked about too')
    if keep and not (dataset and upstream):
        stop('keep needs an upstream, whose answers are kept, and a dataset, where they go')
    if upstream and not (upstream_model and (min_confidence or audit)):
        stop('upstream needs upstream_model, and min_confidence or audit: else it is never asked')
    labeler = Labeler(Path('out', run or name), device, which, sample_batch, True, too_long,
                      min_confidence=min_confidence, dtype=dtype)
    warn_changed_task(labeler.task, fields, prompt)
    own = labeler.space.fields
    for field, yes in true_value.items():
        if len(own.get(field, [])) != 2 or yes not in own[field]:
            stop(f'true_value: there is no field {field!r} with two values, one of them {yes!r}')
    for field in ordered:
        if field not in own:
            stop(f'ordered: there is no field {field!r}; there are: {", ".join(own)}')
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    logging.getLogger('httpx').setLevel(logging.WARNING)
    kept = None
    if keep:
        kept = Path('data', dataset, 'served.jsonl')
        kept.parent.mkdir(parents=True, exist_ok=True)
    behind = None
    if upstream:
        try:
            behind = Upstream(upstream, upstream_model, upstream_timeout, labeler.space,
                              labeler.task['prompt'])
        except (httpx.InvalidURL, ValueError) as error:
            stop(f'upstream: {error}')
    service = Service(labeler, run or name, max_waiting, behind, audit, audit_min, kept)
    created = int(Path('out', run or name).stat().st_mtime)
    api_key = api_key or os.environ.get('SERVE_API_KEY', '')
    app = make_app(service, created, api_key, true_value, ordered)
    serve(app, host, port)
