"""serve.py and what clients ask for by default: schemas in their own words, response formats, tools, responses,
completions. Bodies with a client's name are those that it sent."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distil.values import value_name
from tests.served import (CHAT, FIELDS, MEANING, PROMPT, TEXT, TEXTS, answer_of, chat, give_service, json_schema,
                          labeler, of, root, send, service, truth, url)  # noqa: F401

import httpx
import openai

from serve.request import Refusal
from serve.schemas import read_schema

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
    (of({'tone': {}, 'why': {'anyOf': [{'type': 'string'}, {'type': 'null'}]}}), {'tone': 'tone', 'why': None}),
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
            assert text == space.text(answer_of(truth))
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
@pytest.mark.slow
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
