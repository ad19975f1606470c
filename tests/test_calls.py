"""One call of a log, in the forms of APIs, gateways and exports: its text, its answers, their log probabilities."""
import asyncio
import json
import math

import numpy as np
import pytest

from data.calls import read_replies, read_reply, split_call
from data.logs import is_log
from distil.answers import label_from_answer, probabilities_from_tokens
from distil.labels import Labels
from distil.schema import Schema
from distil.server import Server
from distil.space import OutputSpace
from serve.upstream import Upstream
from tests.conftest import FIELDS
from tests.test_labels import write_lines
from tests.test_logs import ANSWER, TEMPLATE, request, response, soft_response
from tests.test_prepare import run_prepare

PROMPT = TEMPLATE.replace('{text}', 'a b')
MESSAGES = request('a b')['messages']


def chunks(*pieces, **more):
    return [{'object': 'chat.completion.chunk', 'choices': [{'index': 0, 'delta': {'content': piece}, **more}]}
            for piece in pieces] + [{'object': 'chat.completion.chunk', 'choices': [], 'usage': {}}]


def message(content, **more):
    return {'choices': [{'message': {'role': 'assistant', 'content': content, **more}}]}


SENT = ''.join(f'data: {json.dumps(chunk)}\n\n' for chunk in chunks(ANSWER[:9], ANSWER[9:])) + 'data: [DONE]\n'
FORMS = {
    'LiteLLM, messages as a text': {
        'request_id': 'x', 'spend': 0.1, 'messages': json.dumps(MESSAGES), 'response': json.dumps(response(ANSWER)),
        'proxy_server_request': '{}', 'metadata': '{}'},
    'LiteLLM, the request of the proxy': {
        'messages': '{}', 'response': response(ANSWER), 'proxy_server_request': json.dumps(request('a b'))},
    'LiteLLM, with its headers': {
        'messages': [], 'response': json.dumps(response(ANSWER)),
        'proxy_server_request': {'url': '/v1', 'body': request('a b')}},
    'Langfuse, values': {
        'type': 'GENERATION', 'input': MESSAGES, 'output': {'role': 'assistant', 'content': ANSWER}, 'trace_id': 't'},
    'Langfuse, texts': {'input': json.dumps({'messages': MESSAGES}), 'output': json.dumps(response(ANSWER))},
    'Langfuse, an object': {'input': MESSAGES, 'output': json.loads(ANSWER)},
    'Langfuse, a prompt': {'type': 'GENERATION', 'input': PROMPT, 'output': ANSWER},
    'Helicone': {'request_body': request('a b'), 'response_body': response(ANSWER), 'response_status': 200},
    'Helicone, texts': {'request_body': json.dumps(request('a b')), 'response_body': json.dumps(response(ANSWER))},
    'a pair of texts': {'prompt': PROMPT, 'completion': ' ' + ANSWER},
    'prompt and response': {'prompt': MESSAGES, 'response': message(ANSWER)},
    'Anthropic': {'request': {'system': 'x', 'messages': MESSAGES[1:]}, 'response': {
        'role': 'assistant', 'content': [{'type': 'thinking', 'thinking': '{"tone": "odd"}'},
                                         {'type': 'text', 'text': ANSWER}]}},
    'a tool of Anthropic': {'request': request('a b'), 'response': {
        'role': 'assistant', 'content': [{'type': 'tool_use', 'name': 'f', 'input': json.loads(ANSWER)}]}},
    'parts of Mistral': {'request': request('a b'), 'response': message(
        [{'type': 'thinking', 'thinking': [{'type': 'text', 'text': '{'}]}, {'type': 'text', 'text': ANSWER}])},
    'parts of OpenAI': {'request': request('a b'), 'response': message(
        [{'type': 'reasoning', 'text': '{"spam": 1}'}, {'type': 'text', 'text': ANSWER[:9]},
         {'type': 'text', 'text': ANSWER[9:]}])},
    'parts of a fine-tuning file': {'messages': [*MESSAGES, {'role': 'assistant', 'content': [
        {'type': 'text', 'text': ANSWER}]}]},
    'thoughts before': {'request': {'messages': [
        *request('c d')['messages'], {'role': 'assistant', 'content': [
            {'type': 'thinking', 'thinking': 'x'}, {'type': 'text', 'text': '{}'}]},
        *MESSAGES[1:]]}, 'response': response(ANSWER)},
    'arguments as an object': {'request': request('a b'), 'response': message(
        None, tool_calls=[{'function': {'name': 'f', 'arguments': json.loads(ANSWER)}}])},
    'chunks': {'request': request('a b'), 'response': chunks(ANSWER[:9], None, ANSWER[9:])},
    'chunks as they were sent': {'request': request('a b'), 'response': SENT},
    'chunks in a body': {'request': request('a b'), 'response': {'status_code': 200, 'body': SENT}},
    'events of responses': {'request': request('a b'), 'response': [
        {'type': 'response.created', 'response': {}},
        *({'type': 'response.output_text.delta', 'delta': piece} for piece in (ANSWER[:9], ANSWER[9:]))]},
    'the last event of responses': {'request': request('a b'), 'response': [
        {'type': 'response.created'}, {'type': 'response.completed', 'response': {'output': [
            {'type': 'message', 'content': [{'type': 'output_text', 'text': ANSWER}]}]}}]},
}


@pytest.mark.parametrize('form', FORMS)
def test_every_form_gives_its_text_and_its_label(tmp_path, form):
    event = {'event': 'started', 'time': 3, 'input': 'x', 'output': None}
    path = write_lines(tmp_path / 'a.jsonl', [event, {'meta': {}}, FORMS[form]])
    labels = Labels([path], Schema(FIELDS), TEMPLATE)
    assert is_log(path) and [line[2] for line in labels] == ['bad_json', 'bad_json', ''], labels.problems
    text, label, _ = [*labels][2]
    assert text == 'a b'
    assert label['probabilities'] == {'tone': {'neutral': 0, 'friendly': 1}, 'spam': {'true': 1, 'false': 0}}
    write_lines(tmp_path / 'b.jsonl', [event] + [
        json.loads(json.dumps(FORMS[form]).replace('a b', f'text {n}')) for n in range(30)])
    done, records = run_prepare(tmp_path, 'b.jsonl', f'--template={TEMPLATE}')
    assert [record['text'] for record in records] == [f'text {n}' for n in range(30)], done.stderr


@pytest.mark.parametrize('line', [
    {'input': 'x', 'output': 'y'}, {'type': 'SPAN', 'input': {'x': 1}, 'output': {'y': 2}}, {'prompt': 'x'},
    {'text': 'x', 'prompt': 'y', 'completion': 'z'}, {'request_body': {}, 'response_body': {}}, {'response': ANSWER},
    {'messages': '[]', 'proxy_server_request': '{}', 'response': '{}'}, {'choices': 3}, {'prompt': 3, 'completion': 4}])
def test_what_looks_like_a_form_is_no_call(line):
    assert split_call(line) is None


@pytest.mark.parametrize('error, reason', [
    ({'code': 'batch_expired', 'message': 'This request was not executed'},
     'no answer: batch_expired: This request was not executed'),
    ({'message': 'rate_limit_exceeded: wait', 'code': 'rate_limit_exceeded'},
     'no answer: rate_limit_exceeded: wait'), ('gone', 'no answer: gone'), (None, 'no answer')])
def test_a_failed_line_of_a_batch_keeps_its_reason(tmp_path, error, reason):
    inputs = write_lines(tmp_path / 'in.jsonl', [{'custom_id': str(n), 'body': request(f'text {n}')} for n in range(4)])
    failed = write_lines(tmp_path / 'errors.jsonl', [
        {'id': 'b', 'custom_id': '0', 'response': None, 'error': error},
        {'id': 'b', 'custom_id': '1', 'response': {'status_code': 400, 'body': {'error': error}}, 'error': None}])
    good = write_lines(tmp_path / 'out.jsonl', [{'custom_id': '2', 'response': {'body': response(ANSWER)}}])
    labels = Labels([good, failed, inputs], Schema(FIELDS))
    assert labels.problems['unusable'][0] == f'{failed} line 1: {reason}'
    assert len(labels.problems['unusable']) == 2 and labels.log.n_unanswered == 1
    assert error is None or labels.problems['unusable'][1] == f'{failed} line 2: {reason}'


@pytest.mark.parametrize('form', ['parts of Mistral', 'parts of OpenAI', 'arguments as an object'])
def test_a_teacher_behind_a_url_and_the_llm_upstream_may_answer_in_parts(tokenizer, form):
    httpx, reply = pytest.importorskip('httpx'), FORMS[form]['response']
    server = Server(['http://nowhere'], 'm', Schema(FIELDS), TEMPLATE)
    upstream = Upstream('http://nowhere', 'm', 9, OutputSpace(tokenizer, FIELDS), TEMPLATE)

    async def ask():
        transport = httpx.MockTransport(lambda _: httpx.Response(200, json=reply))
        upstream.client = httpx.AsyncClient(transport=transport, base_url='http://nowhere')
        return await server.label(upstream.client, 'a b'), await upstream.answer('a b')
    label, answer = asyncio.run(ask())
    assert label['answer'] == answer == json.loads(ANSWER)


def test_a_chunk_that_stands_alone_is_named(tmp_path):
    path = write_lines(tmp_path / 'a.jsonl', chunks('{"tone"', ': 3}'))
    labels = Labels([path], Schema(FIELDS))
    assert is_log(path) and 'line 1: it is one chunk of a streamed answer; join' in labels.problems['unusable'][0]


def test_parts_of_a_request_that_are_no_text_are_refused_and_thoughts_are_not(tmp_path):
    image = [{'type': 'text', 'text': 'a'}, {'type': 'image_url', 'image_url': {'url': 'x'}}]
    path = write_lines(tmp_path / 'a.jsonl', [{'request': {'messages': [{'role': 'user', 'content': image}]},
                                               'response': response(ANSWER)}])
    assert 'a message is not a text' in Labels([path], Schema(FIELDS)).problems['unusable'][0]


# -----------------------------------------------------------------------------
# several answers, and their log probabilities


def test_all_answers_to_one_request_are_averaged(tmp_path):
    choice = lambda tone: message(json.dumps({'tone': tone, 'spam': True}))['choices'][0]
    path = write_lines(tmp_path / 'a.jsonl', [
        {'request': request('a b'), 'response': {'choices': [choice('neutral'), *3 * [choice('friendly')]]}},
        {'request': request('a b'), 'response': {'choices': [choice('friendly')]}},
        {'request': request('c d'), 'response': {'choices': [choice('odd'), choice('friendly')]}},
        {'request': request('e f'), 'response': {'choices': [choice('odd'), choice('odd')]}}])
    labels = Labels([path], Schema(FIELDS), TEMPLATE)
    first, second, third, fourth = labels
    assert first[1]['probabilities']['tone'] == pytest.approx({'neutral': 0.2, 'friendly': 0.8})
    assert (second[2], third[0], fourth[2]) == ('conflicting', 'c d', 'dropped_invalid')
    assert '1 of 2 answers are left out: tone is "odd"' in labels.problems['dropped_invalid'][0]
    done, _ = run_prepare(tmp_path, 'a.jsonl')
    assert b'# "friendly" 5, "odd" 3, "neutral" 1' in done.stdout


@pytest.mark.parametrize('bad', [
    {'token': 'x', 'logprob': None}, {'token': 'x', 'logprob': math.nan}, {'token': 'x', 'logprob': 'low'},
    {'token': 'x'}, {'logprob': -1.0}, {'token': None, 'bytes': None, 'logprob': -1}, None, 3, 'x',
    {'token': 'x', 'bytes': [999], 'logprob': -1}, {'token': 'x', 'logprob': -math.inf}])
def test_an_alternative_without_a_log_probability_is_skipped(bad):
    reply, plain = soft_response(0.7), soft_response(0.7)
    for token in reply['choices'][0]['logprobs']['content']:
        token['top_logprobs'].insert(0, bad)
    label, expected = (label_from_answer(Schema(FIELDS), *read_reply(one)) for one in (reply, plain))
    for name in FIELDS:
        assert label[0]['probabilities'][name] == pytest.approx(expected[0]['probabilities'][name])
    assert label[0]['probabilities']['tone']['friendly'] == pytest.approx(0.7)


def test_a_token_of_the_answer_without_a_log_probability():
    """that of the same alternative is its own; else the answer is used without any."""
    reply = soft_response(0.7)
    for token in reply['choices'][0]['logprobs']['content']:
        token['logprob'] = None
    assert label_from_answer(
        Schema(FIELDS), *read_reply(reply))[0]['probabilities']['tone']['friendly'] == pytest.approx(0.7)
    reply['choices'][0]['logprobs']['content'][0]['top_logprobs'] = [None]
    assert label_from_answer(Schema(FIELDS), *read_reply(reply))[0] == {'answer': {'tone': 'friendly', 'spam': True}}
    for logprobs in (None, 3, {'content': 3}, {'content': None}, {'tokens': ['a']}):
        reply['choices'][0]['logprobs'] = logprobs
        assert read_reply(reply)[1] == []


def test_the_log_probabilities_of_chunks_are_joined():
    whole = soft_response(0.7)['choices'][0]
    parts = [chunks(bytes(token['bytes']).decode(), logprobs={'content': [token]})[0]
             for token in whole['logprobs']['content']]
    (content, tokens), = read_replies(split_call({'request': request('a'), 'response': parts})[1])
    assert (content, tokens) == read_reply({'choices': [whole]})


# -----------------------------------------------------------------------------
# values


@pytest.mark.parametrize('written, values, expected', [
    ('1.0', [0, 1], 1), ('1', [0.0, 1.0], 1.0), ('[1.0]', [[1], [2]], [1]), ('1', [True, 1], 1),
    ('true', [1, True], True), ('1', [1.0, 1], 1), ('1.0', [1, 1.0], 1.0), ('1e0', [0, 1], 1),
    ('0.5', [0.5, 1], 0.5), ('1.0', [True, False], None),
    ('true', [0, 1], None), ('"1"', [0, 1], None), ('1.5', [1, 2], None)])
def test_whole_numbers_are_one_value_however_they_are_written(written, values, expected):
    label = label_from_answer(Schema({'n': values}), f'{{"n": {written}}}', [])[0]
    assert json.dumps(label and label['answer']['n']) == json.dumps(expected)


def test_the_probability_of_a_number_counts_for_both_spellings():
    token = lambda text, p, *others: (text.encode(), math.log(p), [(o.encode(), math.log(q)) for o, q in others])
    tokens = [token('{"n":', 1.0), token('1', 0.6, ('1', 0.6), ('2', 0.4)), token('.', 1.0), token('0', 1.0),
              token('}', 1.0)]
    assert probabilities_from_tokens([1, 2, 3], tokens, 5, 8)[0] == pytest.approx(np.array([0.6, 0.4, 0]), abs=1e-6)


def test_the_config_of_a_log_merges_the_spellings_of_a_number(tmp_path):
    values = [*['1'] * 9, *['1.0'] * 3, *['0.0'] * 8, *['true'] * 3, *['0.5'] * 4, *['null'] * 2]
    write_lines(tmp_path / 'a.jsonl', [{'prompt': f'Rate: {n} x', 'completion': f'{{"n": {value}}}'}
                                       for n, value in enumerate(values)])
    done, _ = run_prepare(tmp_path, 'a.jsonl')
    assert b"# 1 12, 0.0 8, 0.5 4, true 3, null 2\n    'n': [1, 0.0, 0.5, True, None]," in done.stdout
    labels = Labels([tmp_path / 'a.jsonl'], Schema({'n': [1, 0.0, 0.5, True, None]}))
    assert not labels.problems and len([*labels]) == len(values)
