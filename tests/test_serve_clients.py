"""serve.py and what clients send by default: prompts around a text, schemas in their own words, tools,
responses, batches, odd paths and bodies; and the requests that go upstream. Bodies with a client's name are
those that it sent."""
import asyncio
import gzip
import json
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import read_texts
from distil.space import value_name
from tests.conftest import ROOT, one_line, run
from tests.served import FIELDS, MEANING, PROMPT, TEXTS, labeler, root, serving, truth, url  # noqa: F401

import httpx
import openai

from serve.app import make_app
from serve.learn import learn_templates, read_prompts
from serve.middleware import find_path
from serve.prompts import Prompts, read_turns
from serve.proxy import Proxy
from serve.request import MAX_BODY, Refusal
from serve.schemas import read_schema
from serve.service import Service
from serve.students import Student

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
        students = students or [Student(service, **MEANING)]

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
            student = [Student(chat.service, Prompts([PROMPT, *templates], turns), **MEANING)]
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


# -----------------------------------------------------------------------------
# the text in a conversation

LANGCHAIN = 'You are an expert.\nClassify the comment.\n\nComment: {text}\n\nAnswer with one word.'


@pytest.mark.parametrize('messages', [
    [('user', LANGCHAIN)], [('system', LANGCHAIN.split('\n\n')[0]), ('user', LANGCHAIN.split('\n\n', 1)[1])],
    [('developer', 'You are an expert.'), ('user', LANGCHAIN.split('\n', 1)[1])],
    [('system', 'other instructions'), ('user', LANGCHAIN)],
    [('user', LANGCHAIN.split('Comment:')[0]), ('user', 'Comment:' + LANGCHAIN.split('Comment:')[1])]])
def test_a_template_is_found_around_a_text_in_any_messages(chat, truth, messages):
    messages = [{'role': role, 'content': text.replace('{text}', TEXT)} for role, text in messages]
    message, _ = chat(templates=[LANGCHAIN], messages=messages)
    assert json.loads(message['content']) == answer_of(truth)
    ignored = chat.headers.get('x-ignored', '')
    assert ignored == ('messages.0' if 'other' in messages[0]['content'] else '')
    error, param = chat(messages=messages)
    assert '--template=' in error and param.startswith('messages')


def test_the_last_template_counts_and_the_longest():
    def find(*users, templates=('Text: {text}', 'Text: {text} Label:')):
        turns = read_turns([{'role': 'user', 'content': user} for user in users], 'messages')
        return Prompts(templates).find_text(turns, 'messages')[0]
    assert find('Text: a', 'Text: b') == 'b' and find('Text: a', 'that was wrong') == 'a'
    assert find('as {text} b', templates=['as {text} {text}']) == 'b'  # dspy's prompt has one of its own
    assert find('Text: a Label:') == 'a' and find('Text: a b') == 'a b'


@pytest.mark.parametrize('path, body', [
    ('chat/completions', {'messages': [{'role': 'user', 'content': 'the cat ' * 30}]}),
    ('responses', {'input': 'the cat ' * 30}), ('completions', {'prompt': 'the cat ' * 30}),
    ('decisions', {'input': 'the cat ' * 30, 'questions': [{'type': 'predicate', 'name': 'spam'}]})])
def test_a_text_that_does_not_fit_is_refused_where_prompts_are_sent(send, service, path, body):
    reply = send('POST', f'/v1/{path}', body)
    error = reply.json()['error']
    assert reply.status_code == 400
    assert '--template=' in error['message'] and 'tokens more' in error['message']
    assert error['param'] in body
    for too_long, status in (('cut', 200), ('refuse', 400)):
        student = [Student(service, too_long=too_long, **MEANING)]
        assert send('POST', f'/v1/{path}', body, students=student).status_code == status
        assert send('POST', '/v1/label', {'texts': ['the cat ' * 30]}, students=student).status_code == status
    assert 'x-tokens-cut' in send('POST', '/v1/label', {'texts': ['the cat ' * 30]}).headers


@pytest.mark.parametrize('content', [
    'Classify this message: hello', 'Please label the following text\nhello',
                                     'You are a sentiment classifier. hello',
    'hello\nRespond with JSON only.', 'hello. The output should be formatted as a JSON instance',
                                     'hello\nAnswer with '
    'one of: a, b',
    'hello\nReturn the correct JSON response within a ```json codeblock. not the JSON_SCHEMA'])
def test_a_message_that_looks_like_a_prompt_is_refused_unless_any_message_is_a_text(chat, content):
    messages = [{'role': 'user', 'content': content}]
    error, param = chat(messages=messages)
    assert 'looks like a prompt' in error and param == 'messages.0'
    assert 'looks like' not in str(chat(messages=messages, templates=['{text}'])[0])


@pytest.mark.parametrize('content', ['my dog read this: wow', 'I classify as tired', 'json is a format',
                                     'you are nice'])
def test_plain_texts_do_not_look_like_prompts(chat, content):
    assert chat(messages=[{'role': 'user', 'content': content}])[1] == 'stop'


CALL = {'id': 'c', 'type': 'function', 'function': {'name': 'R', 'arguments': '{}'}}
RETRIES = {  # the turns after the text
    'instructor, tools': [
        {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
        {'role': 'tool', 'tool_call_id': 'c', 'name': 'R',
         'content': 'Validation Error found:\n1 validation error for '
         'R\nsentiment\n  Value error, not this one\nRecall the function correctly, fix the errors'}],
    'instructor, JSON': [
        {'role': 'assistant', 'content': '{"tone":"friend"}'},
        {'role': 'user', 'content': 'Correct your JSON ONLY RESPONSE, based on the following errors:\n1 '
         'validation error for R\ntone\n  Value error, not this one [type=value_error]'}],
    'pydantic-ai, native': [
        {'role': 'assistant', 'content': '{"tone":"friend"}'},
        {'role': 'system', 'content': 'When a user message or a tool result contains text that ...'},
        {'role': 'user', 'content': "Your previous response failed the application's validation (this is "
         'automated feedback, not a message from the user):\n<pyai:retry_feedback>\nnot this one\n'
         '</pyai:retry_feedback>'}],
    'LangChain, tool strategy': [
        {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
        {'role': 'tool', 'tool_call_id': 'c',
         'content': "Error: Failed to parse structured output for tool 'R': 1 "
         'validation error for R\n Please fix your mistakes.'}]}


@pytest.mark.parametrize('client', RETRIES)
def test_a_clients_retry_is_about_the_same_text(chat, truth, client):
    for content, templates in ((TEXT, ()), (LANGCHAIN.replace('{text}', TEXT), [LANGCHAIN])):
        messages = [{'role': 'user', 'content': content}, *RETRIES[client]]
        message, _ = chat(messages=messages, templates=templates)
        assert json.loads(message['content']) == answer_of(truth)
        assert chat.headers['x-ignored'].endswith(f'messages.{len(messages) - 1}')


def test_a_tools_result_is_about_the_same_text_only_if_that_tool_must_be_called_again(chat, truth):
    messages = [*CHAT, {'role': 'assistant', 'tool_calls': [CALL]},
                {'role': 'tool', 'tool_call_id': 'c', 'content': '{"error":"not this one"}'}]  # pydantic-ai's
    tools = [{'type': 'function', 'function': {'name': 'R',
                                               'parameters': of({'tone': {'enum': FIELDS['tone']}})}}]
    message, _ = chat(messages=messages, tools=tools, tool_choice='required')
    assert json.loads(message['tool_calls'][0]['function']['arguments']) == answer_of(truth, names=['tone'])
    for more in ({}, {'tools': tools}, {'tools': tools, 'tool_choice': 'auto'}):
        error, param = chat(messages=messages, **more)
        assert 'result of a tool' in error and param == 'messages.2'
    assert chat(messages=messages, turns='first')[1] == 'stop'


def test_several_texts_are_refused_unless_turns_says_which_counts(chat, truth):
    messages = [{'role': 'user', 'content': TEXTS[0]}, {'role': 'assistant', 'content': '{}'},
                {'role': 'user', 'content': TEXTS[1]}]
    error, param = chat(messages=messages)
    assert '--turns=' in error and param == 'messages'
    for turns, text in (('first', TEXTS[0]), ('last', TEXTS[1])):
        assert json.loads(chat(messages=messages, turns=turns)[0]['content']) == answer_of(truth, text)


def test_system_messages_beside_a_text_are_named_as_not_read(chat, truth):
    messages = [{'role': 'system', 'content': 'be nice'}, *CHAT]
    assert json.loads(chat(messages=messages)[0]['content']) == answer_of(truth)
    assert chat.headers['x-ignored'] == 'messages.0'
    chat()
    assert 'x-ignored' not in chat.headers


def test_templates_are_learned_from_logged_requests(root, words, tmp_path):
    texts = [' '.join(words[n % 20:n % 20 + 1 + n % 5]) + f' {n}' for n in range(60)]
    templates = ['Rate this: {text}', 'Rate that: {text} Answer in JSON.', 'A tone. What is it? {text}']
    logged = [{'messages': [{'role': 'user',
                             'content': templates[n % 2].replace('{text}', text)}]} if n % 3 else
              {'body': {'instructions': 'A tone.', 'input': f'What  is it?\n{text}'}} for n,
              text in enumerate(texts)]
    found = learn_templates(filter(None, read_prompts([*map(json.dumps, logged), 'nonsense', '[]',
                                                       '{"input": 3}'])))
    assert {template: count for template, count, _ in found} == dict(zip(templates, (20, 20, 20)))
    prompts = Prompts([template for template, _, _ in found])
    for n, text in enumerate(texts):
        assert prompts.unwrap(templates[n % 2].replace('{text}', text)) == text
    assert learn_templates(texts) == []
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, logged)))
    done = run(root, 'serve/serve.py', f'--learn_templates={tmp_path}/log.jsonl')
    assert done.returncode == 0 and '# 60 requests' in done.stdout
    printed = {}
    exec(done.stdout, printed)
    assert sorted(printed['templates']) == sorted(templates)


# -----------------------------------------------------------------------------
# schemas in the caller's words


@pytest.mark.parametrize('schema, expected', [
    (of({'result': {'enum': ['friend', 'neutral', 'friendly']}}), {'result': 'tone'}),
    (of({'response': {'$ref': '#/$defs/T'}}) | {'$defs': {'T': {'enum': FIELDS['tone']}}},
     {'response': 'tone'}),
    ({'$ref': '#/definitions/A', 'definitions': {'A': of({'mood': {'$ref': '#/definitions/M'}}),
                                                 'M': {'enum': FIELDS['mood']}}, '$schema': 'x'},
     {'mood': 'mood'}),
    (of({'mood': {'enum': FIELDS['mood']}}) | {'$id': 'http://a/b'}, {'mood': 'mood'}),
    (of({'Tone': {'enum': FIELDS['tone']}, 'S_p-a m': {'type': 'boolean'}}),
     {'Tone': 'tone', 'S_p-a m': 'spam'}),
    (of({'mood': {'allOf': [{'enum': FIELDS['mood']}]}}), {'mood': 'mood'}),
    (of({'mood': {'anyOf': [{'const': mood} for mood in FIELDS['mood']]}}), {'mood': 'mood'}),
    (of({'mood': {'anyOf': [{'enum': FIELDS['mood']}, {'type': 'null'}]}}), {'mood': 'mood'}),
    (of({'stars': {'enum': ['1', '2', '3']}}), {'stars': 'stars'}),
    (of({'spam': {'enum': ['no', 'yes']}}), {'spam': {True: 'yes', False: 'no'}}),
    (of({'toxic': {'type': 'boolean'}}), {'toxic': ('kind', {'toxic': True, 'respectful': False})}),
    (of({'kind': {'type': 'boolean'}}), {'kind': ('kind', {'toxic': True, 'respectful': False})}),
    (of({'tone': {'enum': ['FRIEND', 'Neutral', 'friend-ly']}}),
     {'tone': {'friend': 'FRIEND', 'neutral': 'Neutral', 'friendly': 'friend-ly'}}),
    (of({'tone': {}, 'why': {'type': 'string'}}, ['tone']), {'tone': 'tone'}),
    (of({'tone': {}, 'why': {'type': ['string', 'null']}}), {'tone': 'tone', 'why': None}),
    (of({'type': {'const': 'label'}, 'tone': {}}), {'type': 'label', 'tone': 'tone'})])
def test_a_schema_is_answered_in_the_callers_words(chat, truth, schema, expected):
    for text in TEXTS:
        message, _ = chat(messages=[{'role': 'user', 'content': text}], response_format=json_schema(schema))
        answer = json.loads(message['content'])
        assert list(answer) == list(expected)
        for name, meant in expected.items():
            field, words = meant if isinstance(meant, tuple) else (name, meant) if isinstance(meant,
                                                                                              dict) else (
                meant, {})
            value = truth[text].get(field.lower() if field else None, meant) if field else None
            value = words.get(value, value)
            assert str(answer[name]).lower() == str(value).lower()


def test_of_the_values_that_a_schema_offers_the_likeliest_is_answered(chat, truth):
    seen = set()
    for text in TEXTS:
        for offered in (['friend', 'neutral'], ['neutral', 'friendly'], ['friend', 'friendly']):
            p = truth[text]['_confidence']['tone']
            form = json_schema(of({'tone': {'enum': offered}}))
            message, _ = chat(messages=[{'role': 'user', 'content': text}], response_format=form)
            answer = json.loads(message['content'])['tone']
            assert answer == max(offered, key=p.get)
            seen.add(answer != truth[text]['tone'])
    assert seen == {True, False}


def test_a_number_called_confidence_gets_it(chat, truth):
    number, bounded = {'type': 'number'}, {'type': 'number', 'minimum': 0, 'maximum': 1}
    p_of = {name: truth[TEXT]['_confidence'][name][value_name(truth[TEXT][name])] for name in FIELDS}
    schema = of({'tone': {}, 'confidence': number, 'mood_probability': bounded, 'score': bounded})
    answer = json.loads(chat(response_format=json_schema(schema))[0]['content'])
    assert answer['mood_probability'] == pytest.approx(p_of['mood'], abs=2e-4)
    assert answer['confidence'] == answer['score'] == pytest.approx(p_of['tone'], abs=2e-4)
    answer = json.loads(chat(response_format=json_schema(of({'tone': {}, 'kind': {},
                                                             'confidence': number})))[0]['content'])
    assert answer['confidence'] == pytest.approx(min(p_of['tone'], p_of['kind']), abs=2e-4)
    for part in ({'score': number}, {'confidence': number | {'maximum': 100}},
                 {'confidence': {'type': 'integer'}}):
        error, _ = chat(response_format=json_schema(of({'tone': {}, **part})))
        assert repr([*part][0]) in error


@pytest.mark.parametrize('schema, named', [
    (of({'tone': {}, 'reason': {'type': 'string'}}), "'reason', which is free text"),
    (of({'tones': {'type': 'array', 'items': {'enum': FIELDS['tone']}}}), "'tones', which is a list"),
    (of({'items': {'type': 'array', 'items': of({'tone': {}})}}), "'items', which is a list"),
    (of({'result': {'enum': ['friend', 'neutral']}}), "'result' (friend, neutral)"),
    (of({'tone': {'enum': ['rude', 'friend']}}), "'tone' offers none or one"),
    (of({'ok': {'type': 'boolean'}}), "'ok'"), (of({'data': of({'tone': {}})}), "'data', which is an object"),
    ({'type': 'array', 'items': of({'tone': {}})}, 'asks for array'), ({'type': 'string'}, 'asks for string'),
    (of({'why': {'type': 'string'}}, []), "'why'"), ({'$ref': '#'}, 'schema'),
    (of({'type': {'const': 'label'}}), 'nothing to decide|does not answer')])
def test_a_schema_without_an_answer_is_refused_by_name(chat, schema, named):
    error, param = chat(response_format=json_schema(schema))
    assert any(part in error for part in named.split('|')) and param == 'response_format', error


VALUE = st.none() | st.booleans() | st.integers(-2, 4) | st.sampled_from(
    ['friend', 'Friendly', 'neutral', 'low', 'yes', 'no', 'x', '', 'TOXIC', 'respect-ful'])
PART = st.recursive(
    st.fixed_dictionaries({}, optional={
        'enum': st.lists(VALUE, max_size=5), 'const': VALUE, 'type': st.sampled_from(
            ['string', 'boolean', 'null', 'number', 'integer', 'array', ['string', 'null']]),
        '$ref': st.sampled_from(['#/$defs/a', '#/definitions/a', '#']), 'minimum': st.integers(0, 1)}),
    lambda inner: st.fixed_dictionaries({'anyOf': st.lists(inner, max_size=3)}), max_leaves=4)
NAME = st.sampled_from(['tone', 'TONE', 'spam', 'stars', 'mood', 'kind', 'toxic', 'result', 'confidence',
                        'x'])
SCHEMA = st.fixed_dictionaries({'properties': st.dictionaries(NAME, PART, max_size=4)}, optional={
    'required': st.lists(NAME, max_size=3), '$defs': st.dictionaries(st.just('a'), PART),
    'definitions': st.dictionaries(st.just('a'), PART), 'type': st.just('object')})


def test_whatever_schema_is_answered_allows_every_answer(labeler, truth):
    import jsonschema
    counts = {True: 0, False: 0}

    @settings(max_examples=250, deadline=None, database=None)
    @given(SCHEMA)
    def check(schema):
        try:
            shape = read_schema(schema, labeler.space, MEANING['true_value'], 'x')
        except Refusal as refusal:
            counts[False] += 1
            assert refusal.status == 400 and str(refusal)
            return
        counts[True] += 1
        for record in truth.values():
            answer = type('Answer', (), {'record': {name: record[name] for name in FIELDS}, 'confidence': {
                name: 0.5 for name in FIELDS}, 'probabilities': {
                    name: [record['_confidence'][name][value_name(value)] for value in FIELDS[name]]
                    for name in FIELDS}})
            values = {name: value for name, value, _, _ in shape.values(answer, labeler.space)}
            jsonschema.validate(values, schema)
    check()
    assert min(counts.values()) > 10


# -----------------------------------------------------------------------------
# formats of other servers, tools


@pytest.mark.parametrize('more, expected', [
    ({'guided_json': of({'tone': {}})}, {'tone': 'tone'}),
                                            ({'guided_json': json.dumps(of({'tone': {}}))}, {'tone': 'tone'}),
    ({'format': of({'spam': {}})}, {'spam': 'spam'}), ({'format': 'json'}, {name: name for name in FIELDS}),
    ({'structured_outputs': {'json': of({'tone': {}})}}, {'tone': 'tone'}),
    ({'response_format': {'type': 'json_object', 'schema': of({'tone': {}})}}, {'tone': 'tone'}),
    ({'response_format': {'type': 'json_schema', 'schema': of({'tone': {}})}}, {'tone': 'tone'}),
    ({'json_schema': of({'tone': {}})}, {'tone': 'tone'})])
def test_the_formats_of_other_servers_are_honoured(chat, truth, more, expected):
    message, _ = chat(**more)
    assert json.loads(message['content']) == {name: truth[TEXT][field] for name, field in expected.items()}


def test_a_choice_is_answered_with_the_bare_word(chat, truth):
    for more in ({'guided_choice': ['Friend', 'neutral', 'friendly']},
                 {'structured_outputs': {'choice': ['Friend', 'neutral', 'friendly']}}):
        assert chat(**more)[0]['content'].lower() == truth[TEXT]['tone']


@pytest.mark.parametrize('more, param', [
    ({'guided_choice': ['a', 'b']}, 'guided_choice'), ({'guided_choice': []}, 'guided_choice'),
    ({'guided_regex': 'a+'}, 'guided_regex'), ({'guided_grammar': 'x'}, 'guided_grammar'),
                                         ({'grammar': 'x'}, 'grammar'),
    ({'regex': 'x'}, 'regex'), ({'guided_json': 'x'}, 'guided_json'),
                                         ({'guided_json': of({'x': {}})}, 'guided_json'),
    ({'structured_outputs': {'regex': 'x'}}, 'structured_outputs'),
                                         ({'structured_outputs': {}}, 'structured_outputs'),
    ({'format': 'yaml'}, 'format'), ({'format': of({'x': {'type': 'string'}})}, 'format'),
    ({'format': 'json', 'guided_json': of({'tone': {}})}, 'format'), ({'continue_final_message': True},
                                                                     'continue_final_message'),
    ({'response_format': {'type': 'json_object', 'schema': of({'x': {}})}}, 'response_format'),
    ({'response_format': {'type': 'xml'}}, 'response_format'), ({'stream': 1}, 'stream'),
                                         ({'logprobs': 'x'}, 'logprobs'),
    ({'stream_options': 1}, 'stream_options'), ({'n': 17}, 'n'), ({'top_logprobs': 21}, 'top_logprobs'),
    ({'logit_bias': {'1': 2}}, 'logit_bias'),
                                         ({'messages': [{'role': 'king', 'content': 'a'}]}, 'messages.0'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages.0.content.0'),
    ({'tools': [{'type': 'web_search'}]}, 'tools.0.type'), ({'tools': 1}, 'tools'),
                                         ({'tools': [1]}, 'tools.0'),
    ({'tools': [{'type': 'function', 'function': {'name': 'f',
                                                  'parameters': of({'x': {'type': 'string'}})}}]},
     'tools.0.function.parameters'),
    ({'tools': [{'type': 'function', 'function': {'name': 'f'}}], 'tool_choice': {
        'type': 'function', 'function': {'name': 'g'}}}, 'tool_choice'),
    ({'tools': [{'type': 'function', 'function': {'name': 'f'}}], 'tool_choice': {'type': 'allowed_tools'}},
     'tool_choice'),
    ({'tools': [{'type': 'function', 'function': {'name': 'f'}}], 'response_format': {'type': 'json_object'}},
     'response_format')])
def test_what_cannot_be_honoured_is_refused_with_its_parameter(chat, more, param):
    error, named = chat(**more)
    assert named == param and error, error


def test_a_json_schema_in_a_system_message_is_the_schema_of_json_mode(chat, truth):
    schema = json.dumps(of({'result': {'enum': FIELDS['tone']}}))
    system = f'For {{"properties": {{"foo": {{}}}}}} x. Match this:\n{schema} ok'
    messages = [{'role': 'system', 'content': system}, *CHAT]
    for more in ({}, {'response_format': {'type': 'json_object'}}):
        assert json.loads(chat(messages=messages, **more)[0]['content']) == {'result': truth[TEXT]['tone']}
    messages[0]['content'] = json.dumps(of({'reason': {'type': 'string'}}))
    assert "'reason'" in chat(messages=messages)[0]


TOOL = {'type': 'function', 'function': {'name': 'label',
                                         'parameters': of({'tone': {'enum': FIELDS['tone']}})}}
NAMED = {'type': 'function', 'function': {'name': 'label'}}


@pytest.mark.parametrize('more, reason', [
    ({}, 'tool_calls'), ({'tool_choice': 'auto'}, 'tool_calls'), ({'tool_choice': 'required'}, 'tool_calls'),
    ({'tool_choice': NAMED}, 'stop')])
def test_one_function_is_called_with_the_answer(chat, send, truth, more, reason):
    for text in TEXTS:
        body = {'messages': [{'role': 'user', 'content': text}], 'tools': [TOOL], **more}
        message, finish = chat(**body)
        call, = message['tool_calls']
        assert message['content'] is None and finish == reason and call['id'].startswith('call_')
        assert call['type'] == 'function' and call['function']['name'] == 'label'
        assert json.loads(call['function']['arguments']) == answer_of(truth, text, ['tone'])
        lines = send('POST', '/v1/chat/completions', body | {'stream': True}).text.split('\n\n')
        choices = [json.loads(line[6:])['choices'][0] for line in lines[:-2]]
        deltas = [choice['delta']['tool_calls'][0] for choice in choices if 'tool_calls' in choice['delta']]
        assert ''.join(delta['function']['arguments'] for delta in deltas) == call['function']['arguments']
        assert deltas[0]['id'] and deltas[0]['function']['name'] == 'label' and {d['index']
                                                                                 for d in deltas} == {0}
        assert choices[-1]['finish_reason'] == reason and lines[-2] == 'data: [DONE]'
    assert chat(tools=[TOOL], tool_choice='none')[0]['content']


def test_older_functions_are_called(chat, truth):
    for more, reason in (({}, 'function_call'), ({'function_call': {'name': 'label'}}, 'stop')):
        message, finish = chat(functions=[TOOL['function']], **more)
        assert json.loads(message['function_call']['arguments']) == answer_of(truth, names=['tone'])
        assert message['function_call']['name'] == 'label' and finish == reason


def test_of_several_tools_the_one_that_a_field_names_is_called(chat, truth):
    def tools(*names, **parameters):
        return [{'type': 'function', 'function': {'name': name, 'parameters': parameters}} for name in names]
    for text in TEXTS:
        message, _ = chat(messages=[{'role': 'user', 'content': text}], tools=tools('Low', 'mid', 'HIGH'))
        call, = message['tool_calls']
        assert call['function']['name'].lower() == truth[text]['mood']
        assert call['function']['arguments'] == '{}'
        p = truth[text]['_confidence']['tone']
        message, _ = chat(messages=[{'role': 'user', 'content': text}], tools=tools('friend', 'neutral'),
                          tool_choice='required')
        assert message['tool_calls'][0]['function']['name'] == max(('friend', 'neutral'), key=p.get)
    assert 'tool_choice must be required' in chat(tools=tools('friend', 'neutral'))[0]
    assert 'required parameters' in chat(tools=tools('low', 'mid', 'high',
                                                     **of({'city': {'type': 'string'}})))[0]
    assert 'no single field has' in chat(tools=tools('low', 'weather'))[0]


def test_n_choices_are_the_same_answer(send, truth):
    body = {'messages': CHAT, 'n': 16}
    choices = send('POST', '/v1/chat/completions', body).json()['choices']
    assert [choice['index'] for choice in choices] == list(range(16))
    assert all(json.loads(choice['message']['content']) == answer_of(truth) for choice in choices)
    events = send('POST', '/v1/chat/completions', body | {'n': 2, 'stream': True}).text
    assert events.count('"finish_reason": "stop"') == 2


def test_a_fence_and_an_indent_are_written_as_the_task_has_them(labeler, service, truth, send):
    for indent, fence in ((2, True), (None, True), (4, False)):
        space = labeler.space
        old = space.indent, space.fence
        space.indent, space.fence = indent, fence
        try:
            content = send('POST', '/v1/chat/completions',
                           {'messages': CHAT, 'logprobs': True}).json()['choices'][0]
            text = content['message']['content']
            assert text == space.text(answer_of(truth).values())
            assert ''.join(token['token'] for token in content['logprobs']['content']) == text
            form = {'response_format': {'type': 'json_object'}, 'messages': CHAT}
            plain = send('POST', '/v1/chat/completions', form).json()['choices'][0]['message']['content']
            assert json.loads(plain) == answer_of(truth)
        finally:
            space.indent, space.fence = old


# -----------------------------------------------------------------------------
# responses, completions


def test_the_openai_client_reads_responses_and_their_events(url, truth):
    client = openai.OpenAI(base_url=url, api_key='any')
    form = {'format': {'type': 'json_schema', 'name': 'x', 'schema': of({'tone': {}, 'spam': {}}),
                       'strict': True}}
    tool = {'type': 'function', 'strict': True, **TOOL['function']}
    for text in TEXTS:
        for given_as in (text, [{'role': 'user', 'content': text}], [
                {'type': 'message', 'role': 'user', 'content': [{'type': 'input_text', 'text': text}]}]):
            reply = client.responses.create(model='x', input=given_as, text=form, instructions='be nice',
                                            store=True)
            assert json.loads(reply.output_text) == answer_of(truth, text, ['tone', 'spam'])
            assert reply.status == 'completed' and reply.usage.total_tokens > reply.usage.output_tokens > 0
        assert json.loads(client.responses.create(model='x', input=text).output_text) == answer_of(truth,
                                                                                                   text)
        call, = client.responses.create(model='x', input=text, tools=[tool], tool_choice='required').output
        assert call.type == 'function_call' and call.name == 'label' and call.call_id
        assert json.loads(call.arguments) == answer_of(truth, text, ['tone'])
        with client.responses.stream(model='x', input=text, text=form, top_logprobs=2,
                                     include=['message.output_text.logprobs']) as stream:
            events = list(stream)
        assert [event.type.removeprefix('response.') for event in events] == [
            'created', 'in_progress', 'output_item.added', 'content_part.added', 'output_text.delta',
            'output_text.done', 'content_part.done', 'output_item.done', 'completed']
        assert [event.sequence_number for event in events] == list(range(9))
        assert json.loads(events[-1].response.output_text) == answer_of(truth, text, ['tone', 'spam'])
        logprobs = events[-1].response.output[0].content[0].logprobs
        assert ''.join(token.token for token in logprobs) == events[-1].response.output_text
        with client.responses.stream(model='x', input=text, tools=[tool]) as stream:
            events = list(stream)
        assert [event.type.removeprefix('response.') for event in events] == [
            'created', 'in_progress', 'output_item.added', 'function_call_arguments.delta',
            'function_call_arguments.done', 'output_item.done', 'completed']
        assert json.loads(events[-1].response.output[0].arguments) == answer_of(truth, text, ['tone'])


@pytest.mark.parametrize('body, param', [
    ({}, 'input'), ({'input': 5}, 'input'), ({'input': 'a', 'previous_response_id': 'x'},
                                             'previous_response_id'),
    ({'input': 'a', 'background': True}, 'background'), ({'input': 'a', 'text': 5}, 'text'),
    ({'input': 'a', 'text': {'format': {'type': 'json_schema', 'schema': of({'x': {}})}}}, 'text.format'),
    ({'input': 'a', 'tools': [{'type': 'web_search'}]}, 'tools.0.type'),
                                         ({'input': 'a', 'instructions': 5}, 'instructions'),
    ({'input': 'a', 'tools': [{'type': 'function', 'name': 'f',
                               'parameters': of({'x': {'type': 'string'}})}]},
     'tools.0.parameters'),
    ({'input': [{'type': 'item_reference', 'id': 'x'}]}, 'input.0'),
    ({'input': [{'role': 'user', 'content': [{'type': 'input_image'}]}]}, 'input.0.content.0'),
    ({'input': 'Classify this: a', 'instructions': 'x'}, 'input.0')])
def test_a_wrong_response_request_is_refused_with_its_parameter(send, body, param):
    reply = send('POST', '/v1/responses', body)
    assert reply.status_code == 400 and reply.json()['error']['param'] == param, reply.text


def test_older_completions_answer_every_prompt(url, truth):
    client = openai.OpenAI(base_url=url, api_key='any')
    reply = client.completions.create(model='x', prompt=[TEXTS[0], PROMPT.replace('{text}', TEXTS[1])], n=2,
                                      logprobs=3)
    assert [json.loads(choice.text) for choice in reply.choices] == [
        answer_of(truth, text) for text in (TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1])]
    first = reply.choices[0]
    assert ''.join(first.logprobs.tokens) == first.text and first.logprobs.text_offset[0] == 0
    assert [json.loads(chunk.choices[0].text) for chunk in client.completions.create(
        model='x', prompt=TEXT, stream=True)] == [answer_of(truth)]
    for body, param in (({'prompt': [1, 2]}, 'prompt'), ({'prompt': []}, 'prompt'),
                        ({'prompt': 'a', 'echo': True}, 'echo'),
                        ({'prompt': 'a', 'best_of': 2}, 'best_of'),
                        ({'prompt': 'a', 'suffix': 'x'}, 'suffix')):
        reply = httpx.post(f'{url}/completions', json=body)
        assert reply.status_code == 400 and reply.json()['error']['param'] == param


ITEM = st.fixed_dictionaries({}, optional={
    'role': st.sampled_from(['user', 'system', 'assistant', 'tool', 5]), 'type': st.sampled_from(
        ['message', 'function_call', 'function_call_output', 'x']), 'output': st.text() | st.integers(),
    'content': st.text() | st.none() | st.lists(st.fixed_dictionaries({'type': st.just('text'),
                                                                       'text': st.text()}))})
SENT = st.fixed_dictionaries({}, optional={
    'messages': st.lists(ITEM, max_size=4), 'input': st.text() | st.lists(ITEM, max_size=4),
                                           'prompt': st.text() | VALUE,
    'instructions': st.text() | VALUE, 'tools': st.lists(st.fixed_dictionaries({'type': st.just('function')},
                                                                               optional={
        'name': NAME, 'parameters': SCHEMA, 'function': st.fixed_dictionaries({'name': NAME,
                                                                               'parameters': SCHEMA})}),
        max_size=3),
    'tool_choice': st.sampled_from(['auto', 'required', 'none', NAMED, 5]),
                                           'functions': st.lists(VALUE, max_size=2),
    'response_format': st.fixed_dictionaries({'type': st.just('json_object'), 'schema': SCHEMA}) | VALUE,
    'text': st.fixed_dictionaries({'format': st.fixed_dictionaries({'type': st.just('json_schema'),
                                                                    'schema': SCHEMA})}),
    'stream': st.booleans(), 'logprobs': st.booleans() | st.integers(0, 3), 'n': st.integers(1, 3),
    'guided_choice': st.lists(VALUE, max_size=4), 'structured_outputs': st.dictionaries(
        st.sampled_from(['json', 'choice', 'regex']), SCHEMA | st.lists(VALUE)),
                                           'include': VALUE | st.lists(VALUE)})


@pytest.mark.parametrize('path, tries', [('chat/completions', 120), ('responses', 120), ('completions', 60),
                                         ('batches', 20), ('files', 20)])
def test_no_request_makes_the_new_routes_fail(url, path, tries):
    with httpx.Client() as client:
        @settings(max_examples=tries, deadline=None, database=None)
        @given(SENT, st.booleans())
        def throw(body, valid):
            body |= {'messages': CHAT, 'input': TEXT, 'prompt': TEXT} if valid else {}
            reply = client.post(f'{url}/{path}', content=json.dumps(body).encode())
            assert reply.status_code < 500, reply.text
            assert reply.json() if 'json' in reply.headers['content-type'] else reply.text
        throw()


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
    students = [Student(service, among_others=True, **MEANING)]
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
    students = [Student(service, Prompts([PROMPT, '{text}']), among_others=True, **MEANING)]
    reply = pass_on(Recorder(b'{}'), 'POST', '/v1/chat/completions', {'messages': CHAT}, students=students)
    assert reply.headers['x-answered-by'] == 'student'


def test_the_servers_own_key_is_not_passed_on(pass_on):
    upstream, mine = Recorder(b'{}'), {'authorization': 'Bearer secret'}
    for key, own, expected in (('', 'secret', None), ('up', 'secret', b'Bearer up'), ('up', '', b'Bearer up'),
                               ('', '', b'Bearer secret')):
        pass_on(upstream, 'POST', '/v1/x', {}, mine, key=key, api_key=own)
        assert upstream.requests[-1][2].get(b'authorization') == expected


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
    (root / 'config/cut.py').write_text("too_long = 'cut'\n")
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
        metrics = httpx.get(url.replace('/v1', '/metrics')).text
        assert 'student_texts_total{by="student",model="toy"}' in metrics and 'model="other"' in metrics
    assert 'two students are called x' in one_line(run(root, 'serve/serve.py', 'config/other.py', '--name=x'))


def test_of_several_students_the_one_whose_fields_answer_is_asked(labeler, service, send, tokenizer):
    class Half:
        """the same student with fewer fields, as far as requests are read."""
    half = Student(service, **MEANING)
    half.name, half.space = 'half', type('Space', (), {'fields': {'weather': ['rain', 'sun']}, 'indent': None,
                                                       'fence': False})()
    students = [Student(service, **MEANING), half]
    form = json_schema(of({'tone': {}}))
    reply = send('POST', '/v1/chat/completions', {'messages': CHAT, 'response_format': form},
                 students=students)
    assert reply.status_code == 200 and reply.json()['model'] == 'toy'
    form = json_schema(of({'why': {'type': 'string'}}))
    error = send('POST', '/v1/chat/completions', {'messages': CHAT, 'response_format': form},
                 students=students).json()['error']['message']
    assert 'toy: ' in error and 'half: ' in error and 'weather' in error
