"""The routes of serve.py as an ASGI application: make_app. A request is read into a Plan by the student that
can answer it. A Refusal goes upstream, if there is one, or becomes an error reply."""
import asyncio
import logging
import time
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect

from distil.checkpoint import problem_key
from distil.options import write_options
from serve.batches import MAX_FILE, Batches
from serve.completions import read_chat, read_completion
from serve.extraction import read_extraction
from serve.middleware import Middleware, allow_origins
from serve.questions import is_system_one, read_questions
from serve.replies import answer_headers, error_body, error_response, json_response
from serve.request import Plan, Refusal, parse_body, read_raw, require
from serve.responses import read_response
from serve.students import choose_student

log = logging.getLogger('serve')


# -----------------------------------------------------------------------------
# the routes that take a POST


def read_texts(student, body):
    """the Plan of POST /v1/label. A text that is empty, or null, has an error in place of an answer."""
    texts = require(body.get('texts'), list, 'a list of strings', 'texts', status=400)
    if not texts:
        raise Refusal(400, 'texts is an empty list; it needs at least one text', 'texts')
    texts = ['' if text is None else text for text in texts]
    for n, text in enumerate(texts):
        require(text, str, 'a string', 'texts', n, status=400)
    if (options := body.get('options')) is not None:            # that come with these texts
        try:
            texts = [write_options(text, options) if text else text for text in texts]
        except ValueError as error:
            raise Refusal(400, str(error), 'options') from None

    def reply(answers):
        records = []
        for answer in answers:
            if answer.error:
                records.append({problem_key(student.space.schema): answer.error})
                continue
            confidence = {field: round(p, 4) for field, p in answer.confidence.items()}
            by = {} if answer.by == 'student' else {'_answered_by': answer.by}
            records.append(answer.record | {'_confidence': confidence} | by)
        return {'model': student.name, 'answers': records}
    return Plan(texts, ('texts',), reply, refuse_long=student.refuses_long(False), each=True)


EXTRACTIONS = '/v1/extraction', '/v1/extractions', '/alpha/extractions', '/api/alpha/extractions'
CLOUDFLARE = '/ai/run/{model:path}'  # an extraction
READERS = {  # functions of a ServedStudent and the body, that return a Plan
    '/v1/chat/completions': read_chat, '/v1/completions': read_completion, '/v1/responses': read_response,
    '/v1/decisions': partial(read_questions, path='/v1/decisions'),
    '/v1/systemone': partial(read_questions, path='/v1/systemone'), '/v1/label': read_texts,
    **dict.fromkeys(EXTRACTIONS, read_extraction)}
NEVER_PASSED_ON = '/v1/label', '/v1/systemone', *EXTRACTIONS, CLOUDFLARE  # no LLM has these


# -----------------------------------------------------------------------------
# the application


async def wait_for_disconnect(receive):
    while (await receive())['type'] != 'http.disconnect':
        pass


async def watch(request, work):
    """the result of a coroutine, which is stopped if the client disconnects."""
    work = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((work, disconnect), return_when=asyncio.FIRST_COMPLETED)
        # nobody reads a 499; the metrics count it
        return work.result() if work.done() else Response(status_code=499)
    finally:
        work.cancel()
        disconnect.cancel()


class Handler:
    """answers the requests of POST routes: by the ServedStudent that can, else by upstream, else with an error.
    proxy: a Proxy, or None."""

    def __init__(self, students, proxy):
        self.students, self.proxy = students, proxy

    async def answer(self, path, body):
        """(body of the reply, its headers), see Plan. Refusal if no student can answer."""
        student, plan = choose_student(self.students, READERS[path], body)
        answers = await student.answer(plan)
        return plan.reply(answers), answer_headers(answers, plan.ignored)

    async def answer_batch_line(self, path, body):
        """the body of the reply."""
        return (await self.answer(path, body))[0]

    async def respond(self, path, body):
        """the Response to the body of a request."""
        reply, headers = await self.answer(path, body)
        if isinstance(reply, str):
            return Response(reply, headers=headers, media_type='text/event-stream')
        return json_response(reply, headers=headers)

    async def handle(self, request, path, respond):
        """the Response to a request: that of the coroutine function respond(path, body), or upstream's if it
        raises a Refusal."""
        parts, body, system_one = [], None, path == '/v1/systemone'
        try:
            try:
                await read_raw(request, parts)
                body = parse_body(b''.join(parts), request.headers.get('content-encoding', ''))
                system_one = is_system_one(path, body)
                if request.scope['deployment']:                 # in Azure's paths
                    body.setdefault('model', request.scope['deployment'])
                return await watch(request, respond(path, body))
            except RecursionError:
                raise Refusal(400, 'the body is nested too deeply') from None
            except Refusal as refusal:
                if not self.proxy or refusal.status in (500, 503) or path in NEVER_PASSED_ON:
                    raise
                passing = self.proxy.pass_on(request, parts, refusal, body)
                return await (passing if refusal.status == 413 else watch(request, passing))
        except ClientDisconnect:
            return Response(status_code=499)
        except Refusal as refusal:
            return error_response(refusal, system_one)
        except Exception:
            log.exception('%s failed', path)
            return error_response(Refusal(500, "internal error; the server's log has the details"),
                                  system_one)

    async def refuse(self, request, refusal, parts=()):
        """the Response to a request that has no route here, or names a file or model that is not here. parts:
        what was read of its body."""
        if self.proxy and (refusal.status in (404, 405) or parts and refusal.status != 500):
            try:
                return await self.proxy.pass_on(request, list(parts), refusal)
            except Refusal as failed:
                refusal = failed
        return error_response(refusal, request.url.path == '/v1/systemone')


def make_app(students, metrics, api_key='', proxy=None, batches_folder=None, cors=()):
    """the routes, as an ASGI application. students: list of Students; metrics: theirs; proxy: a Proxy, or
    None; batches_folder: a Path, or None for no batches; cors: the origins of pages that may call it;
    api_key: as the setting."""
    handler = Handler(students, proxy)
    batches = batches_folder and Batches(batches_folder, handler.answer_batch_line, READERS, error_body)

    @asynccontextmanager
    async def lifespan(app):
        for student in students:
            student.service.decoder.start()
            ids, _, _ = student.service.labeler.encode(b'the first pass is slow')
            await student.service.decoder.answer([ids], full=True)  # before the first request comes
        if batches:
            batches.load()
        yield
        if batches:
            batches.stop()
        for student in students:
            for task in student.service.auditing:
                task.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    for path in READERS:
        add_post(app, path, handler, handler.respond)
    add_cloudflare(app, handler)
    add_models(app, students)
    add_health(app, students, metrics)
    if batches:
        add_batches(app, batches, handler)
    app.exception_handler(Refusal)(handler.refuse)

    @app.exception_handler(Exception)
    async def failed(request, error):                           # its traceback is in the log
        return error_response(Refusal(500, "internal error; the server's log has the details"))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request, error):
        return await handler.refuse(request, Refusal(error.status_code,
                                                     f'there is no {request.method} {request.url.path}'))

    def reject(status, message, path):
        return error_response(Refusal(status, message), path == '/v1/systemone')
    with_key = Middleware(app, metrics, api_key, [route.path for route in app.routes], reject)
    return allow_origins(with_key, list(cors)) if cors else with_key


def add_post(app, path, handler, respond):
    """adds a POST route, see Handler.handle."""
    @app.post(path)
    async def route(request: Request):
        return await handler.handle(request, path, respond)


def add_cloudflare(app, handler):
    """adds POST /ai/run/{model}, an extraction in the form of Cloudflare's API."""
    @app.post(CLOUDFLARE)
    async def run(request: Request, model: str):
        async def respond(path, body):
            body.setdefault('model', model.rpartition('/')[2])
            reply, headers = await handler.answer('/v1/extraction', body)
            return json_response({'result': reply, 'success': True, 'errors': [], 'messages': []}, headers=headers)
        return await handler.handle(request, CLOUDFLARE, respond)


def add_models(app, students):
    """adds GET /v1/models and /v1/models/{id}, in the forms of both clients."""
    @app.get('/v1/models')
    async def models():
        listed = []
        for student in students:
            day = time.strftime('%Y-%m-%d', time.gmtime(student.created))
            teacher = student.task.get('server') or student.task['teacher']
            given = student.task['fingerprint'] == 'labels' and not student.task.get('server')
            fields = ', '.join(student.space.schema.tree.properties)
            about = f'answers {fields}, as {"its labels say" if given else f"{teacher} would"}'
            listed.append({'name': student.name, 'description': about, 'release_date': day})
        return json_response({'object': 'list', 'data': [student.describe() for student in students],
                              'models': listed})

    @app.get('/v1/models/{name}')
    async def model(name: str):
        for student in students:
            if student.name == name:
                return json_response(student.describe())
        raise Refusal(404, f'there is no model {name[:80]!r}; there are: '
                      f'{", ".join(student.name for student in students)}', 'model')


def add_health(app, students, metrics):
    """adds GET /health, /ready and /metrics."""
    @app.get('/health')
    async def health():
        alive = all(student.service.decoder.is_alive() for student in students)
        return json_response({'status': 'ok' if alive else 'the decoder has stopped'}, 200 if alive else 500)

    @app.get('/ready')
    async def ready():
        free = all(student.service.n_waiting < student.service.max_waiting for student in students)
        return json_response({'status': 'ready' if free else 'full'}, 200 if free else 503)

    @app.get('/metrics')
    async def show_metrics():
        return Response(generate_latest(metrics.registry), media_type='text/plain; version=0.0.4')


def add_batches(app, batches, handler):
    """adds the routes of files and batches."""
    @app.post('/v1/files')
    async def upload(request: Request):
        parts = []
        try:
            await read_raw(request, parts, MAX_FILE)
            return json_response(batches.upload(b''.join(parts), request.headers.get('content-type', '')))
        except Refusal as refusal:
            return await handler.refuse(request, refusal, parts)

    def read_limit(request):
        limit = request.query_params.get('limit', '')
        return int(limit) if limit.isdecimal() and len(limit) < 6 else 20

    @app.get('/v1/files')
    async def files(request: Request):
        return json_response(batches.list_of('file', read_limit(request)))

    @app.get('/v1/files/{id}')
    async def file(id: str):
        return json_response(batches.find(id, 'file'))

    @app.delete('/v1/files/{id}')
    async def delete(id: str):
        return json_response(batches.delete(id))

    @app.get('/v1/files/{id}/content')
    async def content(id: str):
        return Response(batches.read_content(id), media_type='application/jsonl')

    async def create(path, body):
        return json_response(batches.create(body))
    add_post(app, '/v1/batches', handler, create)

    @app.get('/v1/batches')
    async def listed(request: Request):
        return json_response(batches.list_of('batch', read_limit(request)))

    @app.get('/v1/batches/{id}')
    async def batch(id: str):
        return json_response(batches.find(id, 'batch'))

    @app.post('/v1/batches/{id}/cancel')
    async def cancel(id: str):
        return json_response(batches.cancel(id))
