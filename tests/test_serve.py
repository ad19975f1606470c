"""serve.py: every kind of request compared with the student's own answers, callers' mistakes, and load."""
import asyncio
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil.values import value_name
from distil.space import OutputSpace
from distil.schema import Schema
from sample import Labeler
from tests.conftest import one_line, run
from tests.served import FIELDS, MEANING, PROMPT, TEXTS, labeler, post_all, root, serving, truth, url  # noqa

import httpx
import openai
import typesafe_sdk
import zstandard
from jevcompat import validate
from jevcompat.client import Response, parse_json

from data.lines import read_texts
from serve.app import make_app
from serve.bench import bench_serve, post_many
from serve.prompts import Prompts, read_turns
from serve.questions import choice_confidence, match_question, score_confidence
from serve.request import Refusal, read_state
from serve.schemas import read_schema
from serve.service import MAX_AUDITS, Service
from serve.students import ServedStudent
from serve.upstream import Upstream, wilson_interval


# -----------------------------------------------------------------------------
# the real clients


def test_the_openai_client_gets_the_students_answers(url, truth):
    client = openai.OpenAI(base_url=url, api_key='any')
    for text, expected in truth.items():
        answer = {name: expected[name] for name in FIELDS}
        for content in (text, PROMPT.replace('{text}', text), [{'type': 'text', 'text': text}]):
            messages = [{'role': 'user', 'content': content}]
            reply = client.chat.completions.create(model='gpt', messages=messages)
            choice, = reply.choices
            assert json.loads(choice.message.content) == answer and choice.finish_reason == 'stop'
            assert choice.message.content == json.dumps(answer, separators=(',', ':'))  # the task's style
            assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 0
    system, user = PROMPT.split('\n', 1)
    reply = client.chat.completions.create(model='gpt', messages=[
        {'role': 'system', 'content': system}, {'role': 'user', 'content': user.replace('{text}', TEXTS[0])}])
    assert json.loads(reply.choices[0].message.content) == {name: truth[TEXTS[0]][name] for name in FIELDS}
    assert {model.id for model in client.models.list()} == {'toy'}


def test_a_schema_of_some_fields_gets_these_and_an_unknown_field_is_refused_by_name(url, truth):
    client = openai.OpenAI(base_url=url, api_key='any')

    def call(properties, **more):
        schema = {'type': 'object', 'properties': properties, 'required': list(properties),
                  'additionalProperties': False, **more}
        form = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema, 'strict': True}}
        reply = client.chat.completions.create(model='x', response_format=form,
                                               messages=[{'role': 'user', 'content': TEXTS[1]}])
        return json.loads(reply.choices[0].message.content)
    stars, spam = {'type': 'integer', 'enum': [1, 2, 3, 4]}, {'type': 'boolean'}
    assert call({'stars': stars, 'spam': spam}) == {name: truth[TEXTS[1]][name] for name in ('spam', 'stars')}
    for properties, named in (({'nice': spam}, "'nice'"), ({'stars': {'enum': [1, 7]}}, "'stars'"),
                              ({'tone': {'type': 'integer'}}, "'tone'"),
                              ({'tone': {'$ref': 'http://x/y'}}, 'schema')):
        with pytest.raises(openai.BadRequestError, match=named):
            call(properties)
    with pytest.raises(openai.BadRequestError, match='schema'):
        call({'tone': {'type': 'nonsense'}})
    reply = client.chat.completions.create(model='x', response_format={'type': 'json_object'},
                                           messages=[{'role': 'user', 'content': TEXTS[1]}])
    assert json.loads(reply.choices[0].message.content) == {name: truth[TEXTS[1]][name] for name in FIELDS}


def test_logprobs_are_the_confidence_at_decisions_and_0_elsewhere(url, truth, labeler):
    client, schema = openai.OpenAI(base_url=url, api_key='any'), {'properties': {'tone': {}, 'stars': {}}}
    for text in TEXTS:
        for form, names in (({'type': 'json_object'}, list(FIELDS)), (
                {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema}}, ['tone', 'stars'])):
            call = dict(model='x', messages=[{'role': 'user', 'content': text}], response_format=form)
            reply = client.chat.completions.create(**call, logprobs=True, top_logprobs=3)
            choice, = reply.choices
            tokens = choice.logprobs.content
            assert ''.join(token.token for token in tokens) == choice.message.content
            assert all(bytes(token.bytes).decode() == token.token for token in tokens)
            assert 0 in {token.logprob for token in tokens}
            p = math.prod(truth[text]['_confidence'][name][value_name(truth[text][name])] for name in names)
            assert math.exp(sum(token.logprob for token in tokens)) == pytest.approx(p, rel=2e-3)
            decided = [token for token in tokens if token.logprob < 0]
            for token in decided:
                assert 1 < len(token.top_logprobs) <= 3 and token.top_logprobs[0].logprob >= token.logprob
            chunks = list(client.chat.completions.create(**call, logprobs=True, top_logprobs=3, stream=True,
                                                         stream_options={'include_usage': True}))
            assert chunks[-1].usage == reply.usage and not chunks[-1].choices
            deltas = [chunk.choices[0] for chunk in chunks[:-1]]
            assert ''.join(d.delta.content or '' for d in deltas) == choice.message.content
            assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ['stop']
            assert [t for d in deltas if d.logprobs for t in d.logprobs.content] == tokens


def test_decisions_have_the_probabilities_of_all_values(url, truth):
    client = openai.OpenAI(base_url=url, api_key='any')
    questions = [
        {'type': 'score', 'name': 'stars', 'instructions': '',
         'levels': [{'label': n} for n in ('bad', 'so', 'top')]},
        {'type': 'choice', 'instructions': 'how?',
         'choices': [{'value': v} for v in ('friend', 'neutral', 'friendly')]},
        *({'type': 'choice', 'name': 'spam', 'instructions': '', 'choices': [{'value': v} for v in values]}
          for values in ((False, True), ('Yes', 'No'))),
        {'type': 'predicate', 'name': 'spam', 'instructions': ''},
        {'type': 'predicate', 'name': 'toxic', 'instructions': ''},
        {'type': 'score', 'instructions': '', 'levels': [{'label': n} for n in FIELDS['mood']]}]
    for text, expected in truth.items():
        for given_as in (text, [{'role': 'user', 'content': [{'type': 'input_text', 'text': text}]}],
                         [{'role': 'user', 'content': [{'type': 'input_json', 'data': {'body': text}}]}]):
            answers = client.decisions.create(model='x', input=given_as, questions=questions).answers
            p_of = expected['_confidence']
            assert [a.name for a in answers] == [q.get('name') for q in questions]
            stars, tone, spam, yes, predicate, toxic, mood = answers
            assert [p.probability for p in stars.probabilities] == pytest.approx(
                [p_of['stars'][n] for n in '123'], abs=1e-4)
            assert stars.score == pytest.approx(p_of['stars']['2'] + 2 * p_of['stars']['3'], abs=2e-4)
            p_tone = {p.value: p.probability for p in tone.probabilities}
            assert p_tone == pytest.approx(p_of['tone'], abs=1e-4)
            assert tone.choice == max(p_of['tone'], key=p_of['tone'].get)
            assert [p.value for p in spam.probabilities] == [False, True] and type(spam.choice) is bool
            assert [p.probability for p in spam.probabilities] == pytest.approx(
                [p_of['spam']['false'], p_of['spam']['true']], abs=1e-4)
            assert [p.probability for p in yes.probabilities[::-1]] == [p.probability
                                                                        for p in spam.probabilities]
            assert predicate.probability == yes.probabilities[0].probability
            assert toxic.probability == pytest.approx(p_of['kind']['toxic'], abs=1e-4)
            assert [p.label for p in mood.probabilities] == FIELDS['mood']
            for answer in (stars, tone, spam, yes, mood):
                assert sum(p.probability for p in answer.probabilities) == pytest.approx(1, abs=1e-6)
    alone = client.decisions.create(model='x', input=TEXTS[0], questions=questions[1:2]).answers
    assert alone[0].probabilities == client.decisions.create(  # answers do not depend on the other questions
        model='x', input=TEXTS[0], questions=questions).answers[1].probabilities
    with pytest.raises(openai.UnprocessableEntityError, match='weather'):
        client.decisions.create(model='x', input='a', questions=[
            {'type': 'predicate', 'name': 'weather', 'instructions': 'is it nice?'}])


def to_jevcompat(reply):
    """a reply in the form that jevcompat checks."""
    return Response(reply.status_code, dict(reply.headers), reply.content, 0.0, *parse_json(reply.content))


SYSTEM_ONE = {
    'q1': {'type': 'choice', 'instructions': 'x',
           'criteria': {'friendly': 'kind', 'friend': None, 'neutral': None}},
    'spam': {'type': 'noul', 'instructions': 'is it?'}, 'kind': {'type': 'noul', 'instructions': ''},
    'stars': {'type': 'score', 'criteria': ['low', 'mid', 'high']},
    'mood': {'type': 'score', 'criteria': ['gloomy', 'so so', 'fine']}}


def test_the_typesafe_client_and_the_validator_accept_every_kind_of_answer(url, truth):
    client = typesafe_sdk.TypeSafeClient(api_key='x', base_url=url.removesuffix('/v1'))
    for text, expected in truth.items():
        for state in (text, {'message': text}, [text]):
            answers = client.system_one(model='toy', state=state, questions=SYSTEM_ONE).answers
            assert answers['q1'].probabilities == pytest.approx(expected['_confidence']['tone'], abs=1e-4)
            assert answers['kind'].noul == pytest.approx(expected['_confidence']['kind']['toxic'], abs=1e-4)
            assert answers['stars'].legend == {0: 'low', 1: 'mid', 2: 'high'}
        for path in ('systemone', 'decisions'):  # some gateways confuse the two
            body = {'model': 'toy', 'state': text, 'questions': SYSTEM_ONE}
            reply = httpx.post(f'{url}/{path}', json=body)
            assert validate.validate_success(body, to_jevcompat(reply)) == []
    packed = zstandard.compress(json.dumps({'model': 'toy', 'state': TEXTS[0] + ' ' * 3000,
                                            'questions': SYSTEM_ONE}).encode())
    reply = httpx.post(f'{url}/systemone', content=packed, headers={'content-encoding': 'zstd'})
    assert reply.json()['answers']['kind']['noul'] == pytest.approx(
        truth[TEXTS[0]]['_confidence']['kind']['toxic'], abs=1e-4)
    reply = httpx.post(f'{url}/systemone', json={'state': 'x', 'questions': {'sky': {'type': 'noul'}}})
    assert validate.validate_validation_error(to_jevcompat(reply)) == [] and 'sky' in reply.text
    assert httpx.get(f'{url}/models').json()['models'][0]['name'] == 'toy'


def test_curl_gets_answers_health_and_metrics(url, truth):
    if not shutil.which('curl'):
        pytest.skip('curl is not installed')
    base = url.removesuffix('/v1')

    def curl(*args):
        return subprocess.run(['curl', '-s', *args], capture_output=True, text=True, check=True).stdout
    answers = json.loads(curl(f'{url}/label', '-d', json.dumps({'texts': TEXTS})))['answers']
    for text, answer in zip(TEXTS, answers):
        assert {name: answer[name] for name in FIELDS} == {name: truth[text][name] for name in FIELDS}
        assert answer['_confidence'] == pytest.approx(
            {name: truth[text]['_confidence'][name][value_name(answer[name])] for name in FIELDS}, abs=2e-4)
    assert json.loads(curl(f'{base}/health')) == {'status': 'ok'} and 'ready' in curl(f'{base}/ready')
    metrics = curl(f'{base}/metrics')
    for line in ('student_requests_total{route="/v1/label",status="200"}',
                 'student_texts_total{by="student",model="toy"}', 'student_waiting_texts{model="toy"} 0.0',
                 'student_values_total{field="spam",model="toy",value="true"}', 'student_batch_texts'):
        assert line in metrics
    assert 'x-tokens-cut: ' in curl('-i', f'{url}/label', '-d', json.dumps({'texts': ['the cat ' * 500]}))
    head = curl('-i', f'{url}/label', '-d', '{"texts": ["a"]}').lower()
    assert 'x-tokens-cut' not in head
    assert 'x-request-id: ' in head and 'x-answered-by: student\n' in head.replace('\r', '')


# -----------------------------------------------------------------------------
# load, limits, and callers' mistakes


@pytest.mark.slow
def test_under_load_every_client_gets_the_answer_to_its_own_text(url, root, words):
    rng = random.Random(5)
    texts = [f'{" ".join(rng.choices(words, k=rng.randint(1, 5)))} {n}' for n in range(10_000)]
    expected = Labeler(root / 'out/toy', 'cpu', confidence=False)(texts)
    assert len({*map(str, expected)}) > 20
    at, bodies = 0, []
    while at < len(texts):
        n = rng.choice((1, 1, 2, 7, 30))
        bodies.append(texts[at:at + n])
        at += n
    bodies = [json.dumps({'texts': of_request}).encode() for of_request in bodies]
    replies, _ = post_many(url, '/v1/label', bodies, 64)
    answers = []
    for status, body, _ in replies:
        assert status == 200, body
        answers += [{name: answer[name] for name in FIELDS} for answer in json.loads(body)['answers']]
    assert answers == expected


CHAT = b'{"messages": [{"role": "user", "content": "a"}], %s}'


@pytest.mark.parametrize('path, body, status, named', [
    ('label', b'{"texts": ["', 400, 'JSON'), ('label', b'\xff\xfe', 400, 'JSON'), ('label', b'', 400, 'JSON'),
    ('label', b'{"texts": ["a\x00b"]}', 400, 'JSON'), ('label', b'[' * 100_000, 400, 'JSON'),
    ('label', b'{"texts": NaN}', 400, 'JSON'), ('label', b'[]', 400, 'object'),
    ('label', b'{}', 400, 'texts'), ('label', b'{"texts": []}', 400, 'texts'),
    ('label', b'{"texts": "a"}', 400, 'texts'), ('label', b'{"texts": ["a", 1]}', 400, 'texts.1'),
    ('label', b'{"texts": ["a", [" "]]}', 400, 'texts.1'),
    ('label', b'{"x":"' + b'a' * (1 << 20) + b'"}', 413, 'long'),
    ('label', json.dumps({'texts': ['a'] * 4097}).encode(), 413, '4096'),
    ('decisions', b'{}', 422, 'a list of'), ('decisions', b'{"input": 1, "questions": []}', 422, 'questions'),
    ('chat/completions', b'{}', 400, 'messages'), ('chat/completions', b'{"messages": []}', 400, 'user'),
    ('chat/completions', b'{"messages": [{"role": "user", "content": ""}]}', 400, 'empty'),
    ('chat/completions', b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400,
     'image'),
    ('chat/completions', CHAT % b'"n": 17', 400, 'n must'),
    ('chat/completions', CHAT % b'"tools": [{}]', 400, 'tools'),
    ('chat/completions', CHAT % b'"top_logprobs": 99', 400, 'top_logprobs'),
    ('chat/completions', CHAT % b'"response_format": 1', 400, 'response_format'),
    ('decisions', b'{"input": "a"}', 422, 'questions'),
    ('decisions', b'{"input": "a", "questions": []}', 422, '1 to 400'),
    ('decisions', b'{"input": "a", "questions": [{"type": "choice", "choices": 3}]}', 422, 'choices'),
    ('decisions', b'{"input": "a", "questions": [{"type": "poem"}]}', 422, 'predicate'),
    ('systemone', b'{"questions": {"spam": {"type": "noul"}}}', 422, 'state'),
    ('systemone', b'{"state": "a", "questions": {}}', 422, 'questions'),
    ('systemone', b'{"state": "a", "questions": {"tone": {"type": "choice", "criteria": {"x": 0}}}}', 422,
     'tone'),
    ('nothing', b'{}', 404, 'nothing')])
def test_a_wrong_request_gets_an_error_that_names_the_reason(url, path, body, status, named):
    reply = httpx.post(f'{url}/{path}', content=body)
    assert reply.status_code == status and named in reply.text and reply.headers['x-request-id']
    error = reply.json()
    if path == 'systemone':
        assert error['detail'][0]['loc'][0] == 'body' and error['detail'][0]['msg']
    else:
        assert set(error['error']) == {'message', 'type', 'param', 'code'}
    assert httpx.get(url.replace('/v1', '/health')).status_code == 200


def test_a_text_without_an_answer_has_an_error_of_its_own(url, truth, labeler):
    texts = ['', *TEXTS, ' \n', None, 'the cat ' * 50]
    reply = httpx.post(f'{url}/label', json={'texts': texts})
    answers = reply.json()['answers']
    assert reply.status_code == 200 and reply.headers['x-answered-by'] == 'student'
    assert [answers[n] for n in (0, 6, 7)] == [{'error': 'empty text'}] * 3 and 'tone' in answers[8]
    for text, answer in zip(TEXTS, answers[1:]):
        assert {name: answer[name] for name in FIELDS} == {name: truth[text][name] for name in FIELDS}
    assert httpx.post(f'{url}/label', json={'texts': [' ']}).json()['answers'] == [{'error': 'empty text'}]
    service = Service(labeler, 'toy')
    found = post_all(service, ('/v1/label', {'texts': ['a', 'the cat ' * 50, '']}), too_long='refuse')
    first, long, empty = found[0].json()['answers']
    assert ('tone' in first and 'tokens more than the student reads' in long['error']
            and empty == {'error': 'empty text'})
    service.space = type('Space', (), {'schema': Schema(FIELDS | {'error': [True]})})()  # a field of that name
    reply = post_all(service, ('/v1/label', {'texts': ['']}))
    assert reply[0].json()['answers'] == [{'_error': 'empty text'}]


def test_deep_json_is_refused(url):
    for depth in (100, 300, 450, 600, 800, 950, 3000):
        deep = '[' * depth + '"a"' + ']' * depth
        for path, body in (('systemone', '{"state": %s, "questions": {"spam": {"type": "noul"}}}'),
                           ('label', '{"texts": [%s]}'), ('decisions', '{"input": "a", "questions": %s}'),
                           ('chat/completions', '{"messages": [{"role": "user", "content": "a"}], '
                            '"response_format": {"type": "json_schema", '
                            '"json_schema": {"schema": {"allOf": %s}}}}')):
            reply = httpx.post(f'{url}/{path}', content=(body % deep).encode())
            assert reply.status_code < 500, (path, depth)


WORDS = st.sampled_from(['user', 'choice', 'score', 'predicate', 'noul', 'tone', 'spam', 'true', 'text',
                         'input_text', 'json_schema'])
KEYS = st.text(max_size=5) | st.sampled_from([
    'role', 'content', 'type', 'text', 'name', 'choices', 'value', 'levels', 'label', 'criteria', 'schema',
    'json_schema', 'properties', 'required', 'enum', 'tone', 'data', '$ref', 'stream'])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
BODY = st.fixed_dictionaries({}, optional={key: JSON for key in (
    'messages', 'response_format', 'stream', 'logprobs', 'top_logprobs', 'n', 'tools', 'stream_options',
    'input', 'questions', 'state', 'texts', 'model')}) | st.fixed_dictionaries({
        'messages': st.just([{'role': 'user', 'content': 'a'}]),
        'response_format': st.fixed_dictionaries({'type': st.just('json_schema'),
                                                  'json_schema': st.fixed_dictionaries({'schema': JSON})}),
        'input': st.text() | JSON, 'state': JSON, 'texts': st.lists(st.text()),
        'questions': st.lists(st.dictionaries(st.sampled_from(['type', 'name', 'choices', 'levels']), JSON))
        | st.dictionaries(st.text(), st.dictionaries(st.sampled_from(['type', 'criteria']), JSON))})


@pytest.mark.parametrize('path', ['chat/completions', 'decisions', 'systemone', 'label'])
@pytest.mark.slow
def test_no_json_makes_the_server_fail(url, path):
    with httpx.Client() as client:
        @settings(max_examples=150, deadline=None, database=None)
        @given(BODY | JSON)
        def throw(body):
            reply = client.post(f'{url}/{path}', content=json.dumps(body).encode())
            assert reply.status_code < 500, reply.text
            assert reply.json() if reply.headers['content-type'] == 'application/json' else reply.text
        throw()


def test_a_wrong_or_missing_key_is_refused(labeler):
    service = Service(labeler, 'toy')

    async def go():
        transport = httpx.ASGITransport(make_app([ServedStudent(service)], service.metrics, 'secret'))
        async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
            codes = []
            for key in (None, 'Bearer wrong', 'bearer secret', 'secret', 'Bearer sécret'.encode()):
                headers = {'authorization': key} if key else {}
                reply = await client.post('/v1/label', json={'texts': ['a']}, headers=headers)
                codes.append(reply.status_code)
            codes.append((await client.get('/metrics')).status_code)
            codes.append((await client.get('/health')).status_code)
            return codes
    service.decoder.start()
    assert asyncio.run(go()) == [401, 401, 200, 401, 401, 401, 200]


def test_texts_of_a_disconnected_caller_are_left_out_and_too_many_are_refused(labeler):
    service = Service(labeler, 'toy', max_waiting=10)

    async def go():
        first = asyncio.create_task(service.answer(['a'] * 6))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match='6 texts are under way'):
            await service.answer(['b'] * 5)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert service.n_waiting == 0
        second = asyncio.create_task(service.answer(['hello my friend'] * 4))
        await asyncio.sleep(0)
        service.decoder.start()  # only now
        return await second
    answers = asyncio.run(go())
    assert len(answers) == 4
    assert not any(bucket.get() for bucket in service.decoder.batch._buckets[3:])  # the six were not decoded


def test_if_the_decoder_fails_only_the_texts_under_way_fail(labeler, monkeypatch):
    service = Service(labeler, 'toy')
    monkeypatch.setattr(service.decoder, 'finish', lambda *args: 1 / 0)
    replies = post_all(service, ('/v1/label', {'texts': ['a']}))
    monkeypatch.undo()
    replies += post_all(service, ('/v1/label', {'texts': ['a']}))
    assert [reply.status_code for reply in replies] == [500, 200] and 'internal error' in replies[0].text


def test_a_disconnected_client_leaves_no_work_and_sigterm_finishes_requests(root):
    with serving(root) as (process, url):
        host, port = url.removeprefix('http://').removesuffix('/v1').split(':')
        body = json.dumps({'texts': [f'{n} hello' for n in range(1000)]}).encode()
        request = b'POST /v1/label HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n' % len(body) + body
        for sent in (request[:40], request[:-100], request):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent)
                time.sleep(0.05)
        for _ in range(100):
            metrics = httpx.get(url.replace('/v1', '/metrics')).text
            if 'student_waiting_texts{model="toy"} 0.0' in metrics:
                break
            time.sleep(0.05)
        assert 'status="499"' in metrics and 'student_waiting_texts{model="toy"} 0.0' in metrics
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request.replace(b'HTTP/1.1\r\n', b'HTTP/1.1\r\nConnection: close\r\n'))
            time.sleep(0.1)
            os.kill(process.pid, signal.SIGTERM)
            reply = b''
            while part := connection.recv(1 << 20):
                reply += part
        assert reply.startswith(b'HTTP/1.1 200')
        assert len(json.loads(reply.partition(b'\r\n\r\n')[2])['answers']) == 1000
        process.join(30)
        assert process.exitcode == 0


@pytest.mark.parametrize('args, why', [
    (['--name=nix'], 'out/nix/ckpt.pt does not exist'), (['--audit=0.1'], 'an audit needs an upstream'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
    (['--upstream=http://x', '--audit_min=0.5'], 'audit_min needs an audit'), (['--keep=True'], 'keep needs'),
    (['--true_value={"tone": "friend"}'], "true_value: there is no field 'tone' with two values"),
    (['--ordered=["size"]'], "ordered: there is no field 'size'"), (['--host=256.0.0.1'], 'cannot listen'),
    (['--min_confidence=target'], 'no target was set'), (['--port=70000'], 'port'),
    (['--upstream=http://x', '--audit=0.1'], 'upstream needs upstream_model'),
    (['--upstream=localhost:9000/v1'], 'is no URL: it starts with http:// or https://'),
    (['--template=x'], 'must be a text with {text}'),
    (['--upstream=http://[::1', '--upstream_model=x', '--audit=0.1'], 'upstream: ')])])
def test_a_wrong_setting_exits_with_a_message(root, args, why):
    assert why in one_line(run(root, 'serve/serve.py', *args))


# -----------------------------------------------------------------------------
# upstream: another student, as an OpenAI-compatible server


def test_unsure_texts_go_upstream_and_get_the_students_answer_if_upstream_is_down(root, truth):
    confidence = {text: min(record['_confidence'][name][value_name(record[name])] for name in FIELDS)
                  for text, record in truth.items()}
    threshold = sum(sorted(confidence.values())[1:3]) / 2
    labeler = Labeler(root / 'out/toy', 'cpu', min_confidence=threshold)
    upstream_labeler = Labeler(root / 'out/other', 'cpu')
    unsure = {text: p < threshold for text, p in confidence.items()}
    messages = [{'messages': [{'role': 'user', 'content': text}], 'logprobs': True} for text in TEXTS]
    calls = [('/v1/chat/completions', body) for body in messages]
    assert {*unsure.values()} == {True, False}
    with serving(root, '--run=other') as (process, url):
        service = Service(labeler, 'toy', upstream=Upstream(url, 'other', 5.0, labeler.space, PROMPT))
        replies = post_all(service, *calls, ('/v1/systemone', {'state': TEXTS[0], 'questions': SYSTEM_ONE}),
                      ('/v1/label', {'texts': ['\ud800'] * 3}))
        assert replies.pop().status_code == 200 and not service.upstream.failures  # a lone surrogate
        system_one = replies.pop()
        for text, reply, record in zip(TEXTS, replies, upstream_labeler(TEXTS)):
            expected = record if unsure[text] else truth[text]
            assert reply.headers['x-answered-by'] == ('upstream' if unsure[text] else 'student')
            choice, = reply.json()['choices']
            assert json.loads(choice['message']['content']) == {name: expected[name] for name in FIELDS}
            assert ''.join(t['token'] for t in choice['logprobs']['content']) == choice['message']['content']
        assert system_one.json()['answers']['kind']['noul'] in (0, 1) or not unsure[TEXTS[0]]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        service = Service(labeler, 'toy', upstream=Upstream(url, 'other', 5.0, labeler.space, PROMPT))
        for text, reply in zip(TEXTS, post_all(service, *calls)):
            assert reply.headers['x-answered-by'] == ('student-unsure' if unsure[text] else 'student')
            answer = json.loads(reply.json()['choices'][0]['message']['content'])
            assert answer == {name: truth[text][name] for name in FIELDS}


@pytest.mark.parametrize('reply', [
    b'HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n', b'HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n',
    b'nonsense', b'', None,
    *(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body) for body in (
        b'', b'[]', b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": "{\\"tone\\": \\"rude\\"}"}}]}', b'[' * 99999))])
def test_an_upstream_that_fails_three_times_gets_no_requests_for_a_while(labeler, reply):
    async def go():
        n_requests = 0

        async def handle(reader, writer):
            nonlocal n_requests
            n_requests += 1
            await reader.readuntil(b'\r\n\r\n')
            if reply is None:
                await asyncio.sleep(5)
            writer.write(reply or b'')
            await writer.drain()
            writer.close()
        server = await asyncio.start_server(handle, '127.0.0.1', 0)
        host, port = server.sockets[0].getsockname()
        upstream = Upstream(f'http://{host}:{port}/v1', 'x', 0.2, labeler.space, PROMPT)
        answers = [await upstream.answer('hello') for _ in range(5)]
        server.close()
        return answers, n_requests
    answers, n_requests = asyncio.run(go())
    assert answers == [None] * 5
    assert n_requests == (5 if b'400' in (reply or b'') else 3)  # 400: the fault of the text


@pytest.mark.parametrize('message, says', [
    ({'content': '%s'}, ''), ({'content': [{'type': 'thinking', 'thinking': [{'type': 'text', 'text': 'hm {'}]},
                                           {'type': 'text', 'text': '%s'}]}, ''),
    ({'content': [{'type': 'text', 'text': 'so: '}, {'type': 'text', 'text': '%s'}]}, ''),
    ({'content': None, 'tool_calls': [{'function': {'name': 'x', 'arguments': '%s'}}]}, ''),
    ({'content': '{"tone": "Friendly"}'}, 'tone is "Friendly", "friendly" in another case'),
    ({'content': None, 'refusal': 'I cannot'}, 'the model refuses'),
    ({'content': None, 'reasoning_content': 'hm'}, 'the model only thought'),
    (None, 'upstream: says 429 (in a reply with status 200) slow'),
    (b'<html>', 'with a page for people')])
def test_what_upstream_answers_is_read_in_each_form_or_named(labeler, caplog, message, says):
    record = {name: values[0] for name, values in FIELDS.items()}

    def reply(request):
        if isinstance(message, bytes):
            return httpx.Response(200, content=message)
        body = {'error': {'code': 429, 'message': 'slow'}} if message is None else {
            'choices': [{'message': json.loads(
                json.dumps(message).replace('%s', json.dumps(json.dumps(record))[1:-1]))}]}
        return httpx.Response(200, json=body)
    upstream = Upstream('http://up/v1', 'x', 5.0, labeler.space, PROMPT)
    upstream.client._transport = httpx.MockTransport(reply)
    assert asyncio.run(upstream.answer('hello')) == (None if says else record), caplog.text
    assert says in caplog.text and upstream.failures == bool(says)


class FakeUpstream:
    """an upstream whose answers come from a function of the text."""

    def __init__(self, function):
        self.function = function

    async def answer(self, text):
        return self.function(text)


def test_an_audit_measures_agreement_keeps_answers_and_defers_everything_below_its_minimum(root, tmp_path):
    labeler = Labeler(root / 'out/toy', 'cpu')
    student_records = {text: {name: value for name, value in record.items() if name in FIELDS}
                       for text, record in zip(TEXTS, labeler(TEXTS))}
    wrong = set()

    def answer(text):
        record = student_records[text]
        return record | ({'spam': not record['spam']} if text in wrong else {})
    upstream = FakeUpstream(answer)
    kept_file = tmp_path / 'served.jsonl'
    service = Service(labeler, 'toy', upstream=upstream, audit_share=1.0, audit_min=0.8, kept_file=kept_file)
    service.decoder.start()

    async def go(texts):
        sources = []
        for text in texts:
            answer, = await service.answer([text])
            sources.append(answer.by)
            await asyncio.gather(*service.auditing)
        return sources
    assert asyncio.run(go(TEXTS * 4)) == ['student'] * 20 and not service.audit.defer_all
    wrong.update(TEXTS[1:])
    sources = asyncio.run(go(TEXTS * 4))
    equal = list(service.audit.equal['spam'])
    expected = [[text not in (set() if n < 4 else {*TEXTS[1:]}) for text in TEXTS] for n in range(8)]
    assert equal == sum(expected, [])
    assert sources[0] == 'student' and sources[-1] == 'upstream' and service.audit.defer_all
    low, high = wilson_interval(sum(equal), 40)
    values = service.metrics.agreement
    assert [values.labels('toy', 'spam', end)._value.get() for end in ('mean', 'low', 'high')] == [
        sum(equal) / 40, low, high]
    assert values.labels('toy', 'tone', 'mean')._value.get() == 1.0
    wrong.clear()
    assert asyncio.run(go(TEXTS * 30))[-1] == 'student'  # agreement is high again
    lines = list(read_texts(kept_file))
    assert len(lines) == 5 * 38 and all(set(answer) == set(FIELDS) for _, answer, _ in lines)


def test_background_audits_are_bounded(labeler):
    async def go():
        started = []

        async def never(text):
            started.append(text)
            await asyncio.sleep(60)
        upstream = FakeUpstream(None)
        upstream.answer = never
        service = Service(labeler, 'toy', upstream=upstream, audit_share=1.0)
        service.decoder.start()
        await service.answer(['a'] * 50)
        await asyncio.sleep(0)
        for task in service.auditing:
            task.cancel()
        return started
    assert len(asyncio.run(go())) == MAX_AUDITS


def test_the_interval_is_wilsons():
    # R. G. Newcombe, Two-sided confidence intervals for the single proportion, Stat. Med. 17 (1998), table I
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
                               (1, 29, 0.0061, 0.1718)):
        assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)


# -----------------------------------------------------------------------------
# questions


def test_the_text_in_the_teachers_prompt_is_found():
    def find(*messages):
        turns = read_turns([{'role': role, 'content': text} for role, text in messages], 'messages')
        return Prompts([PROMPT]).find_text(turns, 'messages')[0]
    assert find(('user', PROMPT.replace('{text}', 'a b'))) == 'a b'
    assert find(('user', PROMPT.replace('{text}', 'a b').strip().replace('\n', '\r\n') + ' \n')) == 'a b'
    for end in (len('Label the text.'), len('Label the text.\nText:')):  # the space may be left out
        assert find(('system', PROMPT[:end]), ('user', PROMPT[end:].strip().replace('{text}', 'x'))) == 'x'
    assert find(('user', 'Label text. a')) == 'Label text. a'
    assert find(('user', PROMPT.replace('{text}', ''))) == ''
    assert read_state({'a': [{'b': 'x'}]}) == 'x' and read_state('y') == 'y'
    assert json.loads(read_state({'a': 'x', 'b': 1})) == {'a': 'x', 'b': 1}


@pytest.mark.parametrize('name, kind, options, field, numbers', [
    (None, 'choice', ['friend', 'friendly', 'neutral'], 'tone', [2, 1, 0]),
    ('q7', 'choice', ['toxic', 'respectful'], 'kind', [1, 0]),
    ('spam', 'choice', ['no', 'yes'], 'spam', [1, 0]), ('kind', 'choice', ['yes', 'no'], 'kind', [1, 0]),
    ('spam', 'yes-or-no', [], 'spam', [0]), ('toxic', 'yes-or-no', [], 'kind', [1]),
    ('stars', 'score', list('xyz'), 'stars', [1, 0, 2]), (None, 'score', list('123'), 'stars', [1, 0, 2]),
    (None, 'choice', list('123'), 'stars', [1, 0, 2]), ('mood', 'score', list('xyz'), 'mood', [0, 1, 2]),
    ('stars', 'score', list('321'), 'stars', [2, 0, 1]),
    ('q', 'score', ['high', 'mid', 'low'], 'mood', [2, 1, 0])])
def test_questions_are_matched_to_their_field(labeler, name, kind, options, field, numbers):
    question = match_question(labeler.space, name, kind, options, MEANING['true_value'], MEANING['ordered'],
                              ('q',))
    assert (question.field, question.numbers) == (field, numbers)


@pytest.mark.parametrize('name, kind, options', [
    ('tone', 'choice', ['toxic', 'respectful']), (None, 'yes-or-no', []), ('mood', 'yes-or-no', []),
    ('tone', 'score', list('abc')), ('stars', 'score', ['a', 'b']), (None, 'score', list('abc')),
    ('mood', 'score', ['low', 'b', 'c']),
    ('q', 'choice', ['friend', 'friend', 'neutral']),
    ('tone', 'choice', []), ('q', 'choice', ['yes', 'no']), (None, 'choice', [True, False, 'x'])])
def test_questions_without_a_field_are_refused(labeler, name, kind, options):
    with pytest.raises(Refusal) as refusal:
        match_question(labeler.space, name, kind, options, MEANING['true_value'], MEANING['ordered'],
                   ('questions', 3))
    assert refusal.value.status == 422 and refusal.value.where == ('questions', 3)


def test_confidence_is_0_if_all_options_are_equally_likely_and_1_if_one_is_certain():
    for confidence in (choice_confidence, score_confidence):
        for n in range(2, 7):
            assert confidence([0.0] * (n - 1) + [1.0]) == 1
    assert choice_confidence([0.25] * 4) == 0 and score_confidence([0.2] * 5) == 0
    assert choice_confidence([0.5, 0.25, 0.25]) == pytest.approx(0.25)
    assert score_confidence([0.8, 0.2, 0.0]) == pytest.approx(1 - 0.2 / (2 / 3))


def test_impossible_schemas_are_refused(labeler):
    doubling = {f'a{n}': {'allOf': [{'$ref': f'#/$defs/a{n + 1}'}] * 2} for n in range(40)} | {'a40': {}}
    for schema in ({'$ref': '#'}, {'properties': 5}, {'allOf': [{'$ref': '#/x'}]}, {'required': 1},
                   {'$defs': doubling, '$ref': '#/$defs/a0'},
                   {'$defs': {'a': {'$ref': '#/$defs/a'}}, '$ref': '#/$defs/a'},
                   {'allOf': [{}] * 2000}, {'$defs': 3}, {'items': {'$id': 'http://x'}},
                   {'not': {'properties': {'kind': {'const': 'toxic'}, 'mood': {'const': 'mid'}}}}):
        with pytest.raises(Refusal) as refusal:
            read_schema(schema, labeler.space, {}, 'response_format')
        assert refusal.value.status == 400 and refusal.value.where == ('response_format',)


@pytest.mark.slow
def test_the_bench_prints_a_line_for_each_load(root, labeler, monkeypatch, capsys):
    monkeypatch.chdir(root)
    bench_serve(['--name=toy'], labeler.student, labeler.space, TEXTS, labeler.space.to_json, 8, 1)
    stdout = capsys.readouterr().out
    lines = [dict(part.split('=') for part in line.split()[1:]) for line in stdout.splitlines()]
    loads = [(line['clients'], line['texts']) for line in lines if line['what'] == 'serve']
    assert loads == [('1', '1'), ('8', '1'), ('64', '1'), ('1', '32'), ('8', '32'), ('64', '32')]
    assert [line['what'] for line in lines if line['what'] != 'serve'] == ['decoder', 'generate']
    for line in lines:
        assert 0 < float(line['p50_ms']) <= float(line['p99_ms']) and float(line['answers_s']) > 0


@pytest.mark.parametrize('options, numbers', [
    ([True, 'true', 'no'], [0, 1, 2]), (['no', True, 'true'], [2, 0, 1]), (['true', '"true"', '"no"'], [0, 1, 2])])
def test_values_that_print_alike_are_different_options(tokenizer, options, numbers):
    space = OutputSpace(tokenizer, {'answer': [True, 'true', 'no']})
    assert match_question(space, 'answer', 'choice', options, {}, [], ('questions', 0)).numbers == numbers
