"""serve.py and odd paths and bodies, batches, requests that go upstream, several students."""
import asyncio
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from data.lines import read_texts
from distil.schema import Schema
from tests.conftest import ROOT, one_line, run
from tests.served import (CHAT, FIELDS, MEANING, PROMPT, TEXT, TEXTS, answer_of, chat, give_service, json_schema,
                          labeler, of, root, send, service, serving, truth, url)  # noqa: F401

import httpx
import openai

from serve.batches import Batches
from serve.middleware import find_path
from serve.prompts import Prompts
from serve.proxy import Proxy
from serve.replies import error_body
from serve.request import MAX_BODY
from serve.students import ServedStudent

# -----------------------------------------------------------------------------
# paths, headers, bodies


@pytest.mark.parametrize('path', [
    '/v1/chat/completions', '/v1/chat/completions/', '/chat/completions', '/v1/v1/chat/completions',
    '/openai/deployments/toy/chat/completions?api-version=2024-10-21', '/openai/v1/chat/completions'])
def test_every_form_of_a_path_is_answered(send, truth, path):
    reply = send('POST', path, {'messages': CHAT})
    assert json.loads(reply.json()['choices'][0]['message']['content']) == answer_of(truth)


def test_unknown_paths_stay_as_they_are():
    import re
    routes = {re.compile('/v1/models'): '/v1/models', re.compile('/v1/models/[^/]+'): '/v1/models/{name}'}
    for path, found in (('/models', '/v1/models'), ('/models/x', '/v1/models/x'), ('/x/', '/x/'), ('/', '/'),
                        ('/v1/models//', '/v1/models'), ('/openai/x', '/openai/x')):
        assert find_path(path, routes) == (found, '')


def test_bodies_may_be_packed_or_have_a_byte_order_mark(send):
    body = json.dumps({'texts': [TEXT]}).encode()
    for content, encoding in ((gzip.compress(body), 'gzip'), (gzip.compress(b'\xef\xbb\xbf' + body), 'GZIP'),
                              (b'\xef\xbb\xbf' + body, 'identity')):
        assert send('POST', '/v1/label', content, {'content-encoding': encoding}).status_code == 200
    for content, encoding, status in (
            (gzip.compress(b'"' + b'a' * MAX_BODY + b'"'), 'gzip', 413),
                                      (gzip.compress(body)[:-9], 'gzip', 400),
            (body, 'gzip', 400), (body, 'br', 415)):
        assert send('POST', '/v1/label', content, {'content-encoding': encoding}).status_code == status


def test_a_key_may_come_as_azures(send):
    for headers, status in (({'api-key': 'secret'}, 200), ({'api-key': 'x'}, 401),
                            ({'authorization': 'Bearer secret'}, 200)):
        reply = send('POST', '/v1/chat/completions', {'messages': CHAT}, headers, api_key='secret')
        assert reply.status_code == status


def test_head_models_and_an_unknown_model(url):
    client = openai.OpenAI(base_url=url, api_key='any')
    assert client.models.retrieve('toy').id == 'toy'
    with pytest.raises(openai.NotFoundError, match='there is no model'):
        client.models.retrieve('gpt')
    for path in ('/v1/models', '/health', '/v1/models/'):
        reply = httpx.head(url.removesuffix('/v1') + path)
        assert reply.status_code == 200 and reply.content == b''


def test_pages_of_the_named_origins_may_call(send):
    asked = {'origin': 'http://a', 'access-control-request-method': 'POST',
             'access-control-request-headers': 'authorization,content-type,x-stainless-os'}
    assert send('OPTIONS', '/v1/label', None, asked).status_code == 405
    reply = send('OPTIONS', '/v1/label', None, asked, cors=['http://a'], api_key='secret')
    assert reply.status_code == 200 and reply.headers['access-control-allow-origin'] == 'http://a'
    assert send('OPTIONS', '/v1/label', None, asked, cors=['http://b']).status_code == 400
    reply = send('POST', '/v1/label', {'texts': ['a']}, {'origin': 'http://a'}, cors=['*'])
    assert reply.headers['access-control-allow-origin'] == '*'
    assert 'x-answered-by' in reply.headers['access-control-expose-headers'].lower()


def test_an_empty_list_of_texts_is_called_empty(send):
    assert 'empty' in send('POST', '/v1/label', {'texts': []}).json()['error']['message']
    assert 'list' in send('POST', '/v1/label', {}).json()['error']['message']


# -----------------------------------------------------------------------------
# batches


def test_the_openai_client_runs_a_batch_and_a_new_server_still_has_it(root, truth):
    def line(n, url='/v1/chat/completions', **body):
        return json.dumps({'custom_id': f'{n}', 'method': 'POST', 'url': url, 'body': body})
    lines = [line(n, messages=[{'role': 'user', 'content': text}], model='x') for n,
             text in enumerate(TEXTS * 30)]
    lines += [line('other', '/v1/responses', input='a'), line('stream', messages=CHAT, stream=True),
              'nonsense',
              line('free', messages=CHAT, response_format=json_schema(of({'why': {'type': 'string'}})))]
    with serving(root) as (_, url):
        client = openai.OpenAI(base_url=url, api_key='any')
        file = client.files.create(file=('in.jsonl', '\n'.join(lines).encode()), purpose='batch')
        assert client.files.retrieve(file.id).bytes == len('\n'.join(lines))
        assert len(client.files.list().data) == 1
        batch = client.batches.create(input_file_id=file.id, endpoint='/v1/chat/completions',
                                      completion_window='24h',
                                      metadata={'a': 'b'})
        for _ in range(200):
            batch = client.batches.retrieve(batch.id)
            if batch.status == 'completed':
                break
            time.sleep(0.05)
        assert (batch.request_counts.total, batch.request_counts.completed,
                batch.request_counts.failed) == (154, 150, 4)
        rows = [json.loads(row) for row in client.files.content(batch.output_file_id).text.splitlines()]
        assert [row['custom_id'] for row in rows] == [str(n) for n in range(150)]
        for row, text in zip(rows, TEXTS * 30):
            content = row['response']['body']['choices'][0]['message']['content']
            assert row['response']['status_code'] == 200 and json.loads(content) == answer_of(truth, text)
        errors = [json.loads(row) for row in client.files.content(batch.error_file_id).text.splitlines()]
        assert [row['custom_id'] for row in errors] == ['other', 'stream', None, 'free']
        assert all(row['response']['status_code'] == 400 and row['response']['body']['error']['message']
                   for row in errors)
        for wrong in (dict(file=('a', b'x'), purpose='fine-tune'), dict(file=('a', b'x'), purpose='')):
            with pytest.raises(openai.BadRequestError, match='purpose'):
                client.files.create(**wrong)
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve('batch_x')
        with pytest.raises(openai.BadRequestError, match='endpoint'):
            client.batches.create(input_file_id=file.id, endpoint='/v1/embeddings', completion_window='24h')
    stored = root / f'out/toy/batches/{batch.id}.json'  # as if the server had been killed
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {'status': 'in_progress',
                                                                   'output_file_id': None}))
    with serving(root) as (_, url):
        client = openai.OpenAI(base_url=url, api_key='any')
        for _ in range(200):
            batch = client.batches.retrieve(batch.id)
            if batch.status == 'completed':
                break
            time.sleep(0.05)
        assert len(client.files.content(batch.output_file_id).text.splitlines()) == 150
        assert client.batches.list().data[0].id == batch.id
        assert client.files.delete(file.id).deleted


def make_batch(tmp_path, answer, n=100):
    """(Batches in tmp_path, its batch of n lines), to be used in an event loop."""
    batches = Batches(tmp_path / 'batches', answer, ['/v1/x'], error_body)
    lines = ''.join(json.dumps({'custom_id': f'{k}', 'url': '/v1/x', 'body': {'k': k}}) + '\n' for k in range(n))
    file = batches.add_file('in.jsonl', lines.encode(), 'batch')
    return batches, batches.create({'endpoint': '/v1/x', 'input_file_id': file['id']})


def rows_of(batches, batch, key):
    return [json.loads(line) for line in batches.read_content(batch[key]).splitlines()] if batch[key] else []


async def ended(batches, batch):
    while batch['id'] in batches.tasks:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    return batches.find(batch['id'], 'batch')


def test_lines_of_a_batch_that_was_cancelled_or_failed_keep_their_answers_and_reasons(tmp_path, monkeypatch):
    async def answer(path, body):
        if body['k'] >= 50:
            await asyncio.sleep(9)
        return {'n': body['k']}

    async def cancel(at_once):
        batches, batch = make_batch(tmp_path, answer)
        await asyncio.sleep(0 if at_once else 0.2)
        assert batches.cancel(batch['id'])['status'] in ('cancelling', 'cancelled')
        batch = await ended(batches, batch)
        return batch, rows_of(batches, batch, 'output_file_id'), rows_of(batches, batch, 'error_file_id')
    batch, rows, errors = asyncio.run(cancel(False))
    assert batch['status'] == 'cancelled' and batch['cancelling_at'] and batch['cancelled_at']
    assert [row['custom_id'] for row in rows] == [str(k) for k in range(50)]
    assert [row['custom_id'] for row in errors] == [str(k) for k in range(50, 100)]
    assert all(row['response'] is None and row['error'] == {'code': 'batch_cancelled', 'message':
                                                            'the batch was cancelled'} for row in errors)
    assert asyncio.run(cancel(True))[0]['status'] == 'cancelled'

    async def fail(broken):
        batches, batch = make_batch(tmp_path, answer, 40)
        broken(batches, batch)
        return batches, await ended(batches, batch)
    gone = lambda batches, batch: batches.content_path(batch['input_file_id']).unlink()
    _, batch = asyncio.run(fail(gone))
    assert batch['status'] == 'failed' and 'No such file' in batch['errors']['data'][0]['message']

    def odd_line(batches, batch):
        whole = batches.answer_line

        async def answer_line(n, line, endpoint):
            if n == 30:
                raise ZeroDivisionError('oh')
            return await whole(n, line, endpoint)
        batches.answer_line = answer_line
    batches, batch = asyncio.run(fail(odd_line))
    rows, errors = rows_of(batches, batch, 'output_file_id'), rows_of(batches, batch, 'error_file_id')
    assert batch['errors']['data'][0]['message'] == 'internal error (ZeroDivisionError)' and len(rows + errors) == 40
    assert rows and errors and errors[0]['error']['message'] == 'internal error (ZeroDivisionError)'


def test_a_disk_that_cannot_be_written_is_an_error_in_the_contracts_form(send, service, tmp_path):
    (tmp_path / 'file').write_text('')                      # no folder can be made below it
    form = (b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}\r\n--x--\r\n')
    for proxy in (None, Proxy('http://127.0.0.1:9/v1', 1.0, service.metrics)):
        reply = send('POST', '/v1/files', form, {'content-type': 'multipart/form-data; boundary=x'},
                     batches_folder=tmp_path / 'file/batches', proxy=proxy)
        error = reply.json()['error']
        assert reply.status_code == 500 and {*error} == {'message', 'type', 'param', 'code'}
        assert error['message'] == 'the server cannot store or read its files: Not a directory'
        assert error['type'] == 'server_error' and str(tmp_path) not in reply.text


# -----------------------------------------------------------------------------
# upstream


class Recorder:
    """an ASGI application that stores what it gets, and replies with what it is given."""

    def __init__(self, *parts, status=200, headers=()):
        self.parts, self.status, self.headers, self.requests = parts, status, headers, []

    async def __call__(self, scope, receive, send):
        body, more = b'', True
        while more:
            message = await receive()
            body, more = body + message.get('body', b''), message.get('more_body')
        path = scope['raw_path'].partition(b'?')[0] + (b'?' + scope['query_string']
                                                       if scope['query_string'] else b'')
        self.requests.append((scope['method'], path.decode(), dict(scope['headers']), body))
        await send({'type': 'http.response.start', 'status': self.status, 'headers': self.headers})
        for part in self.parts:
            await send({'type': 'http.response.body', 'body': part, 'more_body': True})
        await send({'type': 'http.response.body'})


@pytest.fixture
def pass_on(send, service, monkeypatch):
    """pass_on(recorder, method, path, body, headers) -> the reply of a server whose upstream is the
    recorder."""
    def pass_on(recorder, method, path, body=None, headers=None, kept_folder=None, key='', **more):
        monkeypatch.setenv('UPSTREAM_API_KEY', key)
        proxy = Proxy('http://up/api/v1', 5.0, service.metrics, more.get('api_key', ''), kept_folder,
                      Prompts([PROMPT]))
        proxy.client._transport = httpx.ASGITransport(recorder)
        return send(method, path, body, headers, proxy=proxy, **more)
    return pass_on


EVENTS = b'data: {"a":  1}\n\n', b': ping\n\n', b'data: [DONE]\n\n'


@pytest.mark.parametrize('path, body', [
    ('chat/completions', {'messages': CHAT, 'response_format': json_schema(of({'why': {'type': 'string'}}))}),
    ('chat/completions', {'messages': [{'role': 'user',
                                        'content': [{'type': 'image_url', 'image_url': {}}]}]}),
    ('chat/completions', {'messages': CHAT, 'tools': [{'type': 'function', 'function': {'name': 'a'}}] * 2}),
    ('chat/completions', {'messages': [{'role': 'user', 'content': 'the cat ' * 50}]}),
    ('responses', {'input': 'a', 'tools': [{'type': 'web_search'}]}), ('embeddings', {'input': 'a'}),
    ('decisions', {'input': 'a', 'questions': [{'type': 'predicate', 'name': 'x'}]}),
    ('completions', b'{"prompt": [1]  }\n'), ('chat/completions', b'{"x": "' + b'a' * 3 * MAX_BODY + b'"}'),
    ('chat/completions', b'no json')])
def test_what_the_student_refuses_goes_upstream_byte_for_byte(pass_on, service, path, body):
    upstream = Recorder(*EVENTS, status=207,
                        headers=[(b'content-type', b'text/event-stream'), (b'x-a', b'b')])
    body = body if isinstance(body, bytes) else json.dumps(body, indent=1).encode()
    reply = pass_on(upstream, 'POST', f'/v1/{path}?a=b%20c', body,
                    {'x-mine': 'y', 'authorization': 'Bearer k'})
    assert reply.content == b''.join(EVENTS) and reply.status_code == 207
    assert reply.headers['x-a'] == 'b' and reply.headers['x-answered-by'] == 'upstream'
    (method, sent_path, headers, sent), = upstream.requests
    assert (method, sent_path, sent) == ('POST', f'/api/v1/{path}?a=b%20c', body)
    assert [headers[name] for name in (b'x-mine', b'authorization', b'host')] == [b'y', b'Bearer k', b'up']
    assert 'student_passed_on_total{why="' in pass_on(upstream, 'GET', '/metrics').text


def test_other_methods_and_unknown_things_go_upstream_too(pass_on):
    upstream = Recorder(b'{}')
    for method, path, sent in (
            ('GET', '/v1/files/file-x', '/api/v1/files/file-x'),
                               ('GET', '/v1/models/gpt', '/api/v1/models/gpt'),
            ('DELETE', '/v1/assistants/a', '/api/v1/assistants/a'),
                               ('GET', '/assistants', '/api/v1/assistants'),
            ('GET', '/openai/deployments/x/y', '/openai/deployments/x/y')):
        assert pass_on(upstream, method, path).headers['x-answered-by'] == 'upstream'
        assert upstream.requests[-1][:2] == (method,
                                             sent) and b'transfer-encoding' not in upstream.requests[-1][2]
    count = len(upstream.requests)
    assert pass_on(upstream, 'POST', '/v1/label', {'texts': []}).status_code == 400
    assert pass_on(upstream, 'POST', '/v1/chat/completions',
                   {'messages': CHAT}).headers['x-answered-by'] == 'student'
    assert pass_on(upstream, 'POST', '/v1/x', {}, api_key='secret').status_code == 401
    assert len(upstream.requests) == count


def test_a_message_without_schema_template_or_name_goes_upstream(pass_on, service):
    students = [ServedStudent(service, among_others=True, **MEANING)]
    schema = json_schema(of({'tone': {}}))
    prompt = [{'role': 'user', 'content': PROMPT.replace('{text}', TEXT)}]
    for body, by in (({}, 'upstream'), ({'response_format': {'type': 'json_object'}}, 'upstream'),
                     ({'model': 'gpt'}, 'upstream'), ({'model': 'toy'}, 'student'),
                     ({'messages': prompt}, 'student'),
                     ({'response_format': schema}, 'student')):
        reply = pass_on(Recorder(b'{}'), 'POST', '/v1/chat/completions', {'messages': CHAT, **body},
                        students=students)
        assert reply.headers['x-answered-by'] == by, body
        if 'response_format' not in body:
            given = {'input': body['messages']} if 'messages' in body else {'input': TEXT}
            reply = pass_on(Recorder(b'{}'), 'POST', '/v1/responses', given | body, students=students)
            assert reply.headers['x-answered-by'] == by, body
            given = {'prompt': body['messages'][0]['content'] if 'messages' in body else TEXT}
            reply = pass_on(Recorder(b'{}'), 'POST', '/v1/completions', given | body, students=students)
            assert reply.headers['x-answered-by'] == by, body
    students = [ServedStudent(service, Prompts([PROMPT, '{text}']), among_others=True, **MEANING)]
    reply = pass_on(Recorder(b'{}'), 'POST', '/v1/chat/completions', {'messages': CHAT}, students=students)
    assert reply.headers['x-answered-by'] == 'student'


def test_the_servers_own_key_is_not_passed_on(pass_on):
    upstream, mine = Recorder(b'{}'), {'authorization': 'Bearer secret'}
    for key, own, expected in (('', 'secret', None), ('up', 'secret', b'Bearer up'), ('up', '', b'Bearer up'),
                               ('', '', b'Bearer secret')):
        pass_on(upstream, 'POST', '/v1/x', {}, mine, key=key, api_key=own)
        assert upstream.requests[-1][2].get(b'authorization') == expected


@pytest.mark.parametrize('packed', [False, True])
def test_an_upstream_that_repeats_its_key_does_not_give_it_to_the_caller(pass_on, packed):
    key, error = 'sk-up-live-77', json.dumps({'error': {'message': 'wrong key: Bearer sk-up-live-77'}}).encode()
    parts = [gzip.compress(error)] if packed else [error[:40], error[40:]]
    headers = [(b'x-echo', key.encode()), (b'content-encoding', b'gzip' if packed else b'identity'),
               (b'content-length', str(sum(map(len, parts))).encode())]
    reply = pass_on(Recorder(*parts, status=401, headers=headers), 'POST', '/v1/x', {}, key=f' {key}\r\n')
    assert reply.status_code == 401 and key not in reply.text + str(reply.headers)
    assert reply.json() == {'error': {'message': f'wrong key: Bearer {"*" * len(key)}'}}
    whole = pass_on(Recorder(b'data: sk-up-', b'live-77', b' sk', b'-x'), 'POST', '/v1/x', {}, key=key)
    assert whole.content == b'data: ' + b'*' * len(key) + b' sk-x'


UP_KEY, ECHO = 'sk-live-of-upstream-77', b'Authorization: Bearer sk-live-of-upstream-77'
FAILURES = {  # path: what an upstream sends, which repeats the key wherever it can
    'nonsense': ECHO, 'nothing': b'',
    'moved': b'HTTP/1.1 308 Moved\r\nconnection: close\r\ncontent-length: 0\r\nlocation: /?' + ECHO + b'\r\n\r\n',
    'header': b'HTTP/1.1 200 OK\r\n' + ECHO + b'\0 x\r\n\r\n',
    'cut': b'HTTP/1.1 500 No\r\ncontent-length: 999\r\n\r\n' + ECHO,
    'key': b'HTTP/1.1 401 No\r\nconnection: close\r\ncontent-length: 70\r\n\r\n{"error": {"message": "%s"}}' % ECHO,
    'chat': b'HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 70\r\n\r\n{"error": {"message": "%s"}}' % ECHO}


def start_failing():
    """the base URL of an upstream that fails in the way that the path says."""
    listener = socket.create_server(('127.0.0.1', 0))

    def answer():
        while True:
            connection, _ = listener.accept()
            connection.settimeout(0.1)
            sent = connection.recv(1 << 16)
            with suppress(TimeoutError):                    # what is not read would reset the connection
                while connection.recv(1 << 16):
                    pass
            asked = sent.partition(b' HTTP')[0].decode('latin-1').split('/')
            connection.sendall(FAILURES.get(asked[2] if len(asked) > 2 else '', b''))
            time.sleep(0.05)
            connection.close()
    threading.Thread(target=answer, daemon=True).start()
    return 'http://127.0.0.1:{1}/v1'.format(*listener.getsockname())


def start_serve(root, *args, **environ):
    """a process of serve.py with these variables in its environment, which the tests' other processes lack."""
    return subprocess.Popen([sys.executable, 'serve/serve.py', 'config/toy.py', '--port=0', *args], cwd=root, text=True,
                            env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_no_failure_of_upstream_shows_the_key_to_callers_or_in_the_log(root):
    process = start_serve(root, f'--upstream={start_failing()}', '--upstream_model=x', '--audit=1',
                          UPSTREAM_API_KEY=f'{UP_KEY}\r\n', SERVE_API_KEY=' a-key-of-callers\n')
    url, headers, codes = process.stdout.readline().strip(), {'authorization': 'Bearer a-key-of-callers'}, {}
    for path in FAILURES:
        with suppress(httpx.RemoteProtocolError):           # a reply that was cut off is passed on as one
            reply = httpx.post(f'{url}/{path}', json={}, headers=headers, timeout=30)
            codes[path] = reply.status_code
            assert UP_KEY not in reply.text + str(reply.headers)
    assert httpx.post(f'{url}/label', json={'texts': ['a']}, headers=headers).status_code == 200
    time.sleep(0.3)                                         # of the audit, which nobody waits for
    process.terminate()
    _, log = process.communicate(timeout=30)
    assert codes == {'nonsense': 502, 'nothing': 502, 'moved': 308, 'header': 502, 'key': 401, 'chat': 200}
    assert 'a reply was cut off: upstream: ' in log and 'Traceback' not in log, log
    assert UP_KEY not in log and 'upstream: says 500 (in a reply with status 200) Authorization: Bearer ***' in log, log


def test_no_way_to_miss_upstream_shows_the_key_to_callers(send, service, monkeypatch, caplog):
    monkeypatch.setenv('UPSTREAM_API_KEY', f'{UP_KEY}\n')
    for url in ('http://127.0.0.1:9/v1', 'http://nowhere.invalid/v1', f'http://u:{UP_KEY}@127.0.0.1:9/v1',
                start_failing().replace('http:', 'https:')):
        reply = send('POST', '/v1/embeddings', {}, proxy=Proxy(url, 1.0, service.metrics))
        assert reply.status_code == 502 and 'upstream cannot be reached: ' in reply.text and UP_KEY not in reply.text
    proxy = Proxy(start_failing(), 1.0, service.metrics)
    odd = send('POST', '/v1/embeddings', {}, {b'x-a': b'caller-secret\n'}, proxy=proxy)
    assert odd.status_code == 502 and 'a header that HTTP does not allow' in odd.text and 'secret' not in odd.text
    assert UP_KEY not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize('name, value, message', [
    ('UPSTREAM_API_KEY', 'sk-\u201clive\u201d', 'UPSTREAM_API_KEY: character 4 is U+201C'),
    ('SERVE_API_KEY', '\n', 'SERVE_API_KEY is set, but there is only white space in it')])
def test_a_key_that_cannot_be_one_ends_the_start_by_the_name_of_its_variable(root, name, value, message):
    process = start_serve(root, '--upstream=http://127.0.0.1:9/v1', **{name: value})
    process.stdout, (_, process.stderr) = None, process.communicate(timeout=60)
    said = one_line(process)
    assert said.startswith(message) and 'live' not in said


def test_an_upstream_that_is_down_is_named(send, service):
    proxy = Proxy('http://127.0.0.1:9/v1', 1.0, service.metrics)
    reply = send('POST', '/v1/embeddings', {}, proxy=proxy)
    assert reply.status_code == 502
    assert 'upstream cannot be reached' in reply.text and '/v1/embeddings' in reply.text


def test_a_stream_from_upstream_is_not_collected_first(root):
    async def go():
        seen = asyncio.Event()

        async def handle(reader, writer):
            await reader.readuntil(b'\r\n\r\n')
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n'
                         b'transfer-encoding: chunked\r\n\r\n3\r\none\r\n')
            await writer.drain()
            await asyncio.wait_for(seen.wait(),
                                   20)             # the rest only when the first part has arrived
            writer.write(b'3\r\ntwo\r\n0\r\n\r\n')
            writer.close()
        server = await asyncio.start_server(handle, '127.0.0.1', 0)
        upstream = 'http://{}:{}/v1'.format(*server.sockets[0].getsockname())
        serve = serving(root, f'--upstream={upstream}')
        _, url = await asyncio.to_thread(serve.__enter__)
        parts = []
        async with httpx.AsyncClient(timeout=30) as client, client.stream('POST', f'{url}/embeddings',
                                                                          json={}) as reply:
            async for part in reply.aiter_raw():
                parts.append(part)
                seen.set()
        server.close()
        await asyncio.to_thread(serve.__exit__, None, None, None)
        return parts
    assert asyncio.run(go()) == [b'one', b'two']


def test_passed_on_requests_with_a_schema_are_kept_for_prepare(pass_on, tmp_path):
    why = json_schema(of({'why': {'type': 'string'}}))
    content = json.dumps({'why': 'because'})
    whole = json.dumps({'choices': [{'message': {'content': content}}]}).encode()
    events = b''.join(b'data: %s\n\n' % json.dumps({'choices': [{'delta': {'content': part}}]}).encode()
                      for part in (content[:5], content[5:])) + b'data: [DONE]\n\n'
    stream = [(b'content-type', b'text/event-stream')]
    for n, (parts, headers) in enumerate((([whole], []), ([events[:30], events[30:]], stream),
                                          ([gzip.compress(whole)],
                                          [(b'content-encoding', b'gzip')]), ([b'x'], []))):
        messages = [{'role': 'user', 'content': PROMPT.replace('{text}', f'text {n}')}]
        pass_on(Recorder(*parts, headers=headers), 'POST', '/v1/chat/completions',
                {'messages': messages, 'response_format': why}, kept_folder=tmp_path / 'data/toy/passed_on')
    tool = {'type': 'function', 'name': 'f', 'parameters': of({'city': {'type': 'string'}})}
    call = {'output': [{'type': 'function_call', 'arguments': '{"city": "Rome"}'}]}
    pass_on(Recorder(json.dumps(call).encode()), 'POST', '/v1/responses',
            {'input': 'to Rome', 'tools': [tool]},
            kept_folder=tmp_path / 'data/toy/passed_on')
    pass_on(Recorder(b'{}'), 'POST', '/v1/embeddings', {'input': 'a'},
            kept_folder=tmp_path / 'data/toy/passed_on')
    files = sorted(tmp_path.glob('data/toy/passed_on/*.jsonl'))
    schemas = [json.loads(path.with_suffix('.schema.json').read_text()) for path in files]
    kept = {[*schema['properties']][0]: list(read_texts(path)) for schema, path in zip(schemas, files)}
    assert [text for text, _, _ in kept['why']] == [f'text {n}' for n in range(4)]
    assert [answer for _, answer, _ in kept['why']] == [{'why': 'because'}] * 3 + [None]
    assert [(text, answer) for text, answer, _ in kept['city']] == [('to Rome', {'city': 'Rome'})]
    for script in (ROOT / 'data').glob('*.py'):
        shutil.copy(script, tmp_path / 'data')
    file = next(path for path in files if 'why' in path.with_suffix('.schema.json').read_text())
    done = subprocess.run([sys.executable, 'data/prepare.py', 'new', file], cwd=tmp_path, capture_output=True,
                          text=True)
    assert 'kept=4' in done.stdout, done.stderr
    assert [row[1] for row in read_texts(tmp_path / 'data/new/input.jsonl')][0] == {'why': 'because'}


# -----------------------------------------------------------------------------
# several students


def test_several_students_are_chosen_by_model_or_schema(root, truth):
    (root / 'config/other.py').write_text((root / 'config/toy.py').read_text().replace("name = 'toy'",
                                                                                       "name = 'other'"))
    (root / 'config/cut.py').write_text("too_long = 'cut'\nfill = {'why': 'a student'}\n")
    with serving(root, 'config/cut.py', 'config/other.py') as (_, url):
        assert [model['id'] for model in httpx.get(f'{url}/models').json()['data']] == ['toy', 'other']
        from sample import Labeler
        for name in ('toy', 'other'):
            expected = Labeler(root / 'out' / name, 'cpu', confidence=False)(TEXTS)
            answers = httpx.post(f'{url}/label', json={'texts': TEXTS, 'model': name}).json()
            assert answers['model'] == name
            assert [{field: a[field] for field in FIELDS} for a in answers['answers']] == expected
        reply = httpx.post(f'{url}/label', json={'texts': ['a'], 'model': 'gpt'})
        assert reply.json()['error']['param'] == 'model' and 'toy, other' in reply.text
        long = {'model': 'toy', 'messages': [{'role': 'user', 'content': 'the cat ' * 50}]}
        assert httpx.post(f'{url}/chat/completions',
                          json=long).status_code == 200  # cut.py belongs to the first
        assert httpx.post(f'{url}/chat/completions', json=long | {'model': 'other'}).status_code == 400
        why = {'messages': CHAT, 'response_format': json_schema(of({'tone': {}, 'why': {'type': 'string'}}))}
        reply = httpx.post(f'{url}/chat/completions', json=why | {'model': 'toy'}).json()
        assert json.loads(reply['choices'][0]['message']['content'])['why'] == 'a student'
        assert "fill = {'why': ''}" in httpx.post(f'{url}/chat/completions', json=why | {'model': 'other'}).text
        metrics = httpx.get(url.replace('/v1', '/metrics')).text
        assert 'student_texts_total{by="student",model="toy"}' in metrics and 'model="other"' in metrics
    assert 'two students are called x' in one_line(run(root, 'serve/serve.py', 'config/other.py', '--name=x'))


def test_of_several_students_the_one_whose_fields_answer_is_asked(labeler, service, send, tokenizer):
    class Half:
        """the same student with fewer fields, as far as requests are read."""
    half = ServedStudent(service, **MEANING)
    half.name, half.space = 'half', type('Space', (), {'schema': Schema({'weather': ['rain', 'sun']}), 'indent': None,
                                                       'fence': False})()
    students = [ServedStudent(service, **MEANING), half]
    form = json_schema(of({'tone': {}}))
    reply = send('POST', '/v1/chat/completions', {'messages': CHAT, 'response_format': form},
                 students=students)
    assert reply.status_code == 200 and reply.json()['model'] == 'toy'
    form = json_schema(of({'why': {'type': 'string'}}))
    error = send('POST', '/v1/chat/completions', {'messages': CHAT, 'response_format': form},
                 students=students).json()['error']['message']
    assert 'toy: ' in error and 'half: ' in error and 'weather' in error
