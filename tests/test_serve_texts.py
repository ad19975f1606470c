"""serve.py finds the text in what clients send: prompts around it, retries, several messages, learned templates."""
import json

import pytest

from tests.conftest import one_line, run
from tests.served import (CHAT, FIELDS, MEANING, TEXT, TEXTS, answer_of, chat, give_service, labeler, of, root, send,
                          service, truth)  # noqa: F401

from serve.learn import learn_templates, read_prompts
from serve.prompts import Prompts, read_turns
from serve.students import ServedStudent

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
        student = [ServedStudent(service, too_long=too_long, **MEANING)]
        assert send('POST', f'/v1/{path}', body, students=student).status_code == status
        label = send('POST', '/v1/label', {'texts': ['the cat ' * 30, 'hello']}, students=student).json()['answers']
        assert ['tokens more' in answer.get('error', '') for answer in label] == [status == 400, False]
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


@pytest.mark.slow
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
    assert 'no.jsonl cannot be read: No such file' in one_line(
        run(root, 'serve/serve.py', '--learn_templates=no.jsonl'))
    done = run(root, 'serve/serve.py', f'--learn_templates={tmp_path}/log.jsonl')
    assert done.returncode == 0 and '# 60 requests' in done.stdout
    printed = {}
    exec(done.stdout, printed)
    assert sorted(printed['templates']) == sorted(templates)
