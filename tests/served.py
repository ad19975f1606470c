"""What the tests of serve/ share: two tiny students with fields of every kind, served as users do."""
import asyncio
import json
import os
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import torch

from distil.checkpoint import CHECKPOINT
from distil.space import OutputSpace, tokenizer_hash
from sample import Labeler
from tests.conftest import CHILDREN, ROOT, run_script, tiny_student

for package in ('fastapi', 'uvicorn', 'httpx', 'openai', 'typesafe_sdk', 'jevcompat'):
    pytest.importorskip(package)  # optional: requirements-serve.txt and the clients that it is tested with
import httpx

from serve.app import make_app
from serve.prompts import Prompts
from serve.service import Service
from serve.students import ServedStudent

FIELDS = {'tone': ['neutral', 'friendly', 'friend'], 'spam': [True, False], 'stars': [2, 1, 3],
          'mood': ['low', 'mid', 'high'], 'kind': ['respectful', 'toxic']}
MEANING = {'true_value': {'kind': 'toxic'}, 'ordered': ['mood']}
PROMPT = 'Label the text.\nText: {text}\nAnswer:'
TEXTS = ['hello my friend', 'the cat sat on a mat', 'buy now', 'it rained 😀 all day', 'nobody was there']


def save_student(folder, teachers, space, task, seed=0):
    """writes a tiny student of a task to a folder, as train.py does."""
    student = tiny_student(space, seed, block_size=space.max_answer + 20)
    for weight in student.parameters():  # larger, so that answers depend on the text
        weight.data *= 8 if weight.dim() == 2 else 1
    folder.mkdir(parents=True)
    shutil.copy(teachers['gemma'] / 'tokenizer.json', folder)
    task = {'indent': None, 'fence': False, 'end_id': 2, 'output_ids': space.output_ids,
            'tokenizer_hash': tokenizer_hash(space.tokenizer), 'prompt': PROMPT, 'max_text': 18, 'teacher': 'a/teacher',
            'fingerprint': '', **task}
    per_field = {field: {'temperature': 0.5 + n / 3} for n, field in enumerate(space.schema.paths)}
    torch.save({'format': CHECKPOINT, 'student': vars(student.config), 'model': student.state_dict(),
                'task': task, 'per_field': per_field}, folder / 'best.pt')


@pytest.fixture(scope='session')
def root(tmp_path_factory, teachers, tokenizer):
    """a folder with the programs and two students that have fields of every kind."""
    root = tmp_path_factory.mktemp('served')
    for path in ('config/__init__.py', 'data/__init__.py', 'serve/serve.py'):
        (root / path).parent.mkdir(exist_ok=True)
        os.symlink(ROOT / path, root / path)
    config = dict(name='toy', dataset='toy', fields=FIELDS, prompt=PROMPT, **MEANING)
    (root / 'config/toy.py').write_text(''.join(f'{k} = {v!r}\n' for k, v in config.items()))
    space = OutputSpace(tokenizer, FIELDS, end_id=2, auxiliary=range(4, 60))
    for seed, name in enumerate(('toy', 'other')):
        save_student(root / 'out' / name, teachers, space, {'fields': FIELDS}, seed)
    return root


@contextmanager
def serving(root, *args):
    """context: process and URL of a serve.py that is started as a user does."""
    files = [os.devnull, root / f'{len(os.listdir(root))}.out', root / f'{len(os.listdir(root))}.err']
    arguments = root, 'serve/serve.py', ('--port=0', *args), files, 0
    process = CHILDREN.Process(target=run_script, args=arguments)
    process.start()
    try:
        for _ in range(600):
            stdout = files[1].read_text() if files[1].exists() else ''
            lines = [line for line in stdout.splitlines() if line.startswith('http')]
            if lines or process.exitcode is not None:
                break
            time.sleep(0.05)
        assert lines, files[2].read_text()
        yield process, lines[0]
    finally:
        process.terminate()
        process.join(30)
        assert process.exitcode == 0 or process.exitcode == -signal.SIGKILL, files[2].read_text()


@pytest.fixture(scope='session')
def url(root):
    with serving(root) as (_, url):
        yield url


@pytest.fixture(scope='session')
def labeler(root):
    return Labeler(root / 'out/toy', 'cpu', confidence='full')


@pytest.fixture(scope='session')
def truth(labeler):
    """{text: the student's answer with the probabilities of all values}, from sample.py."""
    return dict(zip(TEXTS, labeler(TEXTS)))


def post_all(service, *calls, too_long='auto', fill=None, **settings):
    """responses to calls (path, body) from an application in this process."""
    async def go():
        student = ServedStudent(service, too_long=too_long, fill=fill or {}, **MEANING)
        transport = httpx.ASGITransport(make_app([student], service.metrics, **settings))
        async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
            return [await client.post(path, content=json.dumps(body)) for path, body in calls]
    if not service.decoder.is_alive():
        service.decoder.start()
    return asyncio.run(go())


# -----------------------------------------------------------------------------
# requests to an application in this process

TEXT = TEXTS[0]
CHAT = [{'role': 'user', 'content': TEXT}]


@pytest.fixture(scope='module')
def service(labeler):
    service = Service(labeler, 'toy')
    service.decoder.start()
    return service


@pytest.fixture
def send(service):
    """send(method, path, body, headers, ...) -> a response from an application in this process."""
    def send(method, path, body=None, headers=None, students=None, **arguments):
        students = students or [ServedStudent(service, **MEANING)]

        async def go():
            transport = httpx.ASGITransport(make_app(students, service.metrics, **arguments))
            async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
                content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
                return await client.request(method, path, content=content, headers=headers)
        return asyncio.run(go())
    return send


@pytest.fixture
def chat(send):
    """chat(**body) -> (the message of a chat completion, its finish_reason); the error's text if it fails."""
    def chat(templates=(), turns='refuse', **body):
        student = None
        if templates or turns != 'refuse':
            student = [ServedStudent(chat.service, Prompts([PROMPT, *templates], turns), **MEANING)]
        reply = send('POST', '/v1/chat/completions', {'messages': CHAT, **body}, students=student)
        chat.headers = reply.headers
        if reply.status_code != 200:
            return reply.json()['error']['message'], reply.json()['error']['param']
        choice = reply.json()['choices'][0]
        return choice['message'], choice['finish_reason']
    return chat


@pytest.fixture(autouse=True)
def give_service(request, service):
    if 'chat' in request.fixturenames:
        request.getfixturevalue('chat').service = service


def answer_of(truth, text=TEXT, names=tuple(FIELDS)):
    return {name: truth[text][name] for name in names}


def json_schema(schema):
    return {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema, 'strict': True}}


def of(properties, required=None):
    return {'type': 'object', 'properties': properties, 'additionalProperties': False,
            'required': list(properties) if required is None else required}
