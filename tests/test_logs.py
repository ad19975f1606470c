"""Logs of an LLM: which text was in a prompt, what was answered, and how a student learns from it."""
import asyncio
import gzip
import json
import math
import random
import re
import runpy

import numpy as np
import pytest
import torch

import data
from data.lines import text_hash
from data.calls import read_reply
from data.logs import is_log
from data.schemas import asked_schema
from distil.answers import label_from_answer
from distil.labels import Labels
from distil.server import Server
from distil.schema import Schema
from serve.prompts import Prompts, read_turns
from tests.conftest import FIELDS, ROOT, clone_task, one_line, run
from tests.test_labels import write_lines
from tests.test_prepare import run_prepare

TEMPLATE = 'Is this friendly? Is it spam? Answer in JSON.\nMessage: "{text}"\nAnswer:'


def request(text, template=TEMPLATE, system='You label messages.'):
    messages = [{'role': 'system', 'content': system}] * bool(system)
    return {'model': 'm', 'messages': [*messages, {'role': 'user', 'content': template.replace('{text}', text)}]}


def response(content, tokens=()):
    """tokens: (text, {text: probability of each alternative}) each."""
    as_json = lambda text, p: {'token': text, 'logprob': math.log(p), 'bytes': list(text.encode())}
    listed = [{**as_json(text, p[text]), 'top_logprobs': [as_json(*other) for other in p.items()]}
              for text, p in tokens]
    return {'choices': [{'message': {'role': 'assistant', 'content': content},
                         'logprobs': {'content': listed} if listed else None}], 'usage': {'prompt_tokens': 5}}


def soft_response(p, spam='true'):
    """friendly with probability p."""
    tone = 'friendly' if p >= 0.5 else 'neutral'
    pieces = [('{"tone":"', {'{"tone":"': 1.0}), (tone, {'friendly': p, 'neutral': 1 - p}),
              (rest := f'","spam":{spam}}}', {rest: 1.0})]
    return response(''.join(text for text, _ in pieces), pieces)


def response_of_the_new_kind(content):
    return {'output': [{'type': 'reasoning', 'summary': []},
                       {'type': 'message', 'content': [{'type': 'output_text', 'text': content}]}]}


# -----------------------------------------------------------------------------
# one line


ANSWER = '{"tone": "friendly", "spam": true}'
KINDS = {
    'fine-tuning': {'messages': [*request('a b')['messages'], {'role': 'assistant', 'content': ANSWER}]},
    'a pair': {'request': request('a b'), 'response': response(ANSWER)},
    'bodies': {'time': 3, 'body': request('a b'), 'response': {'status_code': 200, 'body': response(ANSWER)}},
    'pair of bodies': {'request': {'body': request('a b')}, 'response': {'body': response(ANSWER)}},
    'JSON in texts': {'request': json.dumps(request('a b')), 'response': json.dumps(response(ANSWER))},
    'thoughts and a fence': {'request': request('a b'), 'response': response(
        f'<think>{{"tone": "neutral"}}</think>\n```json\n{ANSWER}\n```')},
    'parts': {'request': {'messages': [{'role': 'user', 'content': [
        {'type': 'text', 'text': TEMPLATE.replace('{text}', 'a b')}]}]}, 'response': response(ANSWER)},
    'a tool call': {'request': request('a b'), 'response': {'choices': [{'message': {
        'content': None, 'tool_calls': [{'function': {'name': 'f', 'arguments': ANSWER}}]}}]}},
    'responses': {'request': {'model': 'm', 'instructions': 'x', 'input': TEMPLATE.replace('{text}', 'a b')},
                  'response': response_of_the_new_kind(ANSWER)},
    'a second turn': {'request': {'messages': [
        *request('c d')['messages'], {'role': 'assistant', 'content': '{}'}, *request('a b', system='')['messages']]},
        'response': response(ANSWER)},
    'the answer alone': {'request': request('a b'), 'response': ANSWER},
    'more keys': {'request': request('a b'), 'response': response('{"why": "so", "spam": true, "tone": "friendly"}')},
    'served.jsonl': {'text': 'a b', 'answer': {'tone': 'friendly', 'spam': True}},
}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_line_gives_its_text_and_its_label(tmp_path, kind):
    path = write_lines(tmp_path / 'a.jsonl', [KINDS[kind]])
    (text, label, reason), = Labels([path], Schema(FIELDS), TEMPLATE)
    assert (text, reason) == ('a b', '')
    assert label['probabilities'] == {'tone': {'neutral': 0, 'friendly': 1}, 'spam': {'true': 1, 'false': 0}}
    assert is_log(path) == (kind != 'served.jsonl')
    assert is_log(write_lines(tmp_path / 'cut.jsonl', ['{"cut', KINDS[kind]])) == (kind != 'served.jsonl')
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(path.read_bytes()))
    assert list(Labels([tmp_path / 'a.jsonl.gz'], Schema(FIELDS), TEMPLATE)) == [(text, label, '')]


@pytest.mark.parametrize('line', [
    {'text': 'x', 'response': 'y'}, {'body': 'a text', 'id': 3}, {'input': 'x', 'output': 'y'}, 'x', 3, [], None,
    {'request': {'text': 'x'}}, {'messages': 'x'}, {'custom_id': '1', 'text': 'x'}])
def test_other_lines_are_no_log(tmp_path, line):
    assert not is_log(write_lines(tmp_path / 'a.jsonl', [json.dumps(line)]))


@pytest.mark.parametrize('line, message', [
    ({'request': request('a'), 'response': None}, 'no answer'),
    ({'request': request('a'), 'response': {'error': {'message': 'rate limit'}}}, 'no answer: rate limit'),
    ({'request': request('a'), 'response': response('I cannot')}, "its answer has no JSON object: 'I cannot'"),
    ({'request': request('a'), 'response': response('{"tone": "odd", "spam": true}')}, 'tone is "odd", not one of'),
    ({'request': request('a'), 'response': response('{"tone": "neutral"}')}, 'it has no spam'),
    ({'request': request('a', 'Other: {text}'), 'response': response(ANSWER)}, 'does not fit the template'),
    ({'response': response(ANSWER)}, 'it has no request'),
    ({'custom_id': '7', 'response': {'body': response(ANSWER)}}, "no request has its custom_id, '7'"),
    ({'request': {'messages': []}, 'response': response(ANSWER)}, 'the request has no messages'),
    ({'request': {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'response': {}},
     'is not a text'),
    ({'request': request('a \ud800'), 'response': response(ANSWER)}, 'half a character'),
    ({'request': request(' '), 'response': response(ANSWER)}, 'its text is empty'),
    ('{"request": {', 'it is not JSON')])
def test_a_line_that_cannot_be_used_is_named_with_the_reason(tmp_path, line, message):
    labels = Labels([write_lines(tmp_path / 'a.jsonl', [KINDS['a pair'], line])], Schema(FIELDS), TEMPLATE)
    (_, _, first), (_, _, reason) = labels
    assert not first and message in labels.problems[reason][0] and 'a.jsonl line 2: ' in labels.problems[reason][0]


def test_log_probabilities_become_the_labels_that_a_server_would_give(tmp_path):
    rng, lines = random.Random(0), []
    for n in range(30):
        lines.append({'request': request(f'{n} text {n}'), 'response': soft_response(rng.uniform(0.01, 0.99))})
    labels = Labels([write_lines(tmp_path / 'a.jsonl', lines)], Schema(FIELDS))
    server = Server(['http://nowhere'], 'm', Schema(FIELDS), TEMPLATE)

    async def reply(client, body):
        return 'answer', next(
            line['response'] for line in lines if line['request']['messages'][1] == body['messages'][0])
    server.post = reply
    for n, (text, label, _) in enumerate(labels):
        slow = label_from_answer(Schema(FIELDS), *read_reply(asyncio.run(server.complete(None, text))))[0]
        assert text == f'{n} text {n}' and min(slow['probabilities']['tone'].values()) > 0
        for name in FIELDS:
            assert label['probabilities'][name] == pytest.approx(slow['probabilities'][name], abs=1e-6)
    assert server.used['prompt_tokens'] == 150


def test_the_output_of_a_batch_is_joined_with_its_input_in_any_order(tmp_path):
    inputs = [{'custom_id': str(n), 'method': 'POST', 'url': '/v1/chat/completions', 'body': request(f'text {n}')}
              for n in range(5)]
    outputs = [{'id': 'b', 'custom_id': str(n), 'response': {'status_code': 200, 'body': soft_response(n / 5 + 0.1)}}
               for n in (3, 1, 0)]
    outputs.append({'custom_id': '2', 'response': {'status_code': 500, 'body': {'error': {'message': 'oh'}}}})
    files = [write_lines(tmp_path / 'out.jsonl', outputs), write_lines(tmp_path / 'in.jsonl', inputs)]
    for paths in (files, files[::-1]):
        labels = Labels(paths, Schema(FIELDS))
        assert [line[0] for line in labels] == ['text 3', 'text 1', 'text 0', '']
        assert labels.problems == {'unusable': [f'{files[0]} line 4: no answer: oh']}
        assert labels.log.n_unanswered == 1
    write_lines(tmp_path / 'in.jsonl', [*inputs, {'custom_id': '3', 'body': request('another')}])
    labels = Labels(files, Schema(FIELDS))
    assert 'two requests have its custom_id' in labels.problems['unusable'][0]


@pytest.mark.parametrize('order', ['out1 in1 out2 in2', 'in1 out1 in2 out2', 'out1 out2 in1 in2', 'in1 in2 out1 out2',
                                   'out1 err1 in1 out2 in2', 'in1 out1 err1 in2 out2', 'both1 both2'])
def test_two_batches_with_the_same_ids_are_joined_each_with_its_own(tmp_path, order):
    ask = lambda batch, n: {'custom_id': str(n), 'body': request(f'text {batch} {n}')}
    answer = lambda batch, n: {'custom_id': str(n), 'response': {'body': soft_response(0.9 if batch == 1 else 0.2)}}
    for batch in (1, 2):
        inputs, outputs = [ask(batch, n) for n in range(4)], [answer(batch, n) for n in range(3)]
        for name, lines in (('in', inputs), ('out', outputs), ('both', inputs + outputs),
                            ('err', [{'custom_id': '3', 'response': None, 'error': {'code': 'batch_expired'}}])):
            write_lines(tmp_path / f'{name}{batch}', lines)
    labels = Labels([tmp_path / name for name in order.split()], Schema(FIELDS))
    found = {text: label['probabilities']['tone']['friendly'] for text, label, reason in labels if not reason}
    assert found == pytest.approx({f'text {batch} {n}': p for batch, p in ((1, 0.9), (2, 0.2)) for n in range(3)})
    assert labels.log.n_unanswered == 2 - order.count('err')
    if 'both' not in order:
        write_lines(tmp_path / 'in1', [*map(ask, [1] * 9, range(9))])  # only this one has all ids of the longer output
        write_lines(tmp_path / 'out1', [*map(answer, [1] * 9, range(9))])
        labels = Labels([tmp_path / name for name in ('in2', 'in1', 'out1')], Schema(FIELDS))
        assert [line[0] for line in labels] == [f'text 1 {n}' for n in range(9)]


def test_batches_that_cannot_be_told_apart_say_what_to_do(tmp_path):
    for name in ('a', 'b'):
        write_lines(tmp_path / name, [{'custom_id': '1', 'body': request(f'text {name}')}])
    write_lines(tmp_path / 'out', [{'custom_id': '1', 'response': {'body': response(ANSWER)}}])
    labels = Labels([tmp_path / name for name in ('a', 'b', 'out', 'a')], Schema(FIELDS))
    assert "two requests have its custom_id, '1'; of several batches name the input right after its outputs" in \
        labels.problems['unusable'][0]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-be'])
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_no_line_is_lost_to_the_encoding(tmp_path, encoding, pack):
    lines = [{'request': request(f'été {n}'), 'response': response(ANSWER)} for n in range(3)]
    lines = ''.join(json.dumps(line, ensure_ascii=False) + '\r\n' for line in lines)
    mark = b'\xfe\xff' if encoding == 'utf-16-be' else b''
    (tmp_path / 'a.jsonl').write_bytes(pack(mark + lines.encode(encoding)))
    assert is_log(tmp_path / 'a.jsonl')
    assert [line[0] for line in Labels([tmp_path / 'a.jsonl'], Schema(FIELDS))] == ['été 0', 'été 1', 'été 2']
    _, records = run_prepare(tmp_path, 'a.jsonl')
    assert [record['text'] for record in records] == ['été 0', 'été 1', 'été 2']


# -----------------------------------------------------------------------------
# from a log to a student


def test_from_a_log_to_a_student(project, tmp_path):
    root = clone_task(project, tmp_path)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')]
    friendly = lambda text: 0.9 if 'cat' in text else 0.2
    on_day = lambda n: f'Current time: 2026-0{1 + n // 100}-1{n % 9} 10:{10 + n % 50}\n{TEMPLATE}'  # not read
    lines = [{'request': request(text, on_day(n)), 'response': soft_response(friendly(text), ('false', 'true')[n % 2])}
             for n, text in enumerate(texts)]
    write_lines(root / 'log.jsonl', [*lines, '{"cut', {'request': request('cat', on_day(7)), 'response': None}])
    done, records = run_prepare(root, 'log.jsonl', '--config=config/mine.py')
    assert done.returncode == 0, done.stderr
    assert [record['text'] for record in records] == [*texts, 'cat'] and 'bad_json=1' in done.stdout.decode()
    assert ('template: Current time: {*}\\nIs this friendly?' in done.stdout.decode()
            and 'log.jsonl line 401' in done.stdout.decode())
    config = runpy.run_path(str(root / 'config/mine.py'))
    assert {name: {*values} for name, values in config['fields'].items()} == {'tone': {'neutral', 'friendly'},
                                                                             'spam': {True, False}}
    assert (config['prompt'] == f'You label messages.\n\nCurrent time: {{*}}\n{TEMPLATE}'
            and config['labels'] == 'log.jsonl')
    again, _ = run_prepare(root, 'log.jsonl', '--config=config/mine.py')
    assert again.returncode == 1 and b'config/mine.py exists' in again.stderr
    teacher = runpy.run_path(str(root / 'config/toy.py'))['teacher']
    done = run(root, 'extract.py', 'config/mine.py', f'--teacher={teacher}')
    assert done.returncode == 0, done.stderr
    assert 'filter read=402 kept=400 bad_json=1 unusable=1' in done.stdout
    shards = data.Shards('mine', 'mine', root / 'data')
    p = np.exp(shards.logits(0)) / np.exp(shards.logits(0)).sum(1, keepdims=True)
    assert p.max(1).min() == pytest.approx(max(friendly(texts[0]), 1 - friendly(texts[0])), abs=0.01)
    done = run(root, 'train.py', '--name=mine', '--dataset=mine', '--max_epochs=1', '--block_size=100')
    assert done.returncode == 0 and (root / 'out/mine/best.pt').exists(), done.stderr
    task = torch.load(root / 'out/mine/best.pt', weights_only=True)['task']
    turns = read_turns(lines[0]['request']['messages'], 'messages')
    assert Prompts([task['prompt']]).find_text(turns, 'messages')[0] == texts[0]  # as serve.py finds it


def test_the_config_of_a_log_names_its_values_and_leaves_out_free_text(tmp_path):
    answers = [{'tone': ['neutral', 'friendly', None][n % 3], 'why': f'because {n}', 'p': n / 64, 'at': {'x': 1},
                'stars': n % 5, 'ok': n % 7 == 0} for n in range(60)]
    lines = [{'messages': [{'role': 'user', 'content': f"it's '''{n}'''"}, {'role': 'assistant', 'content':
              json.dumps(answer)}]} for n, answer in enumerate(answers)]
    write_lines(tmp_path / 'a.jsonl', [*lines, {'messages': [{'role': 'user', 'content': "it's '''x'''"}]}])
    done, records = run_prepare(tmp_path, 'a.jsonl')
    stub = done.stdout.decode().partition('such as this one:\n')[2]
    (tmp_path / 'stub.py').write_text(stub)
    config = runpy.run_path(str(tmp_path / 'stub.py'))
    assert config['fields'] == {'tone': ['neutral', 'friendly', None], 'stars': [0, 1, 2, 3, 4], 'ok': [False, True],
                                'at': {'type': 'object', 'properties': {'x': {'enum': [1]}}, 'required': ['x']}}
    assert [*config['fields']] == ['tone', 'at', 'stars', 'ok'] and config['left_out'] == ['why', 'p']
    for line in ("'why' is left out: 60 different texts in 60 answers\n",
                 "'p' is left out: 60 different numbers in 60 answers\n"):
        assert f'# {line}' in stub and f'\n{line}' in done.stdout.decode().partition('such as this one:')[0]
    assert '# "neutral" 20, "friendly" 20, null 20' in stub
    assert config['prompt'] == "it's '''{text}'''" and len(records) == 61 and config['max_epochs'] == 40
    known = re.findall(r'^(\w+) =', ''.join((ROOT / script).read_text() for script in ('extract.py', 'train.py')), re.M)
    assert {name for name in config if not name.startswith('__')} <= {*known}
    write_lines(tmp_path / 'a.jsonl', [{'messages': [{'role': 'user', 'content': 'x'}, {'role': 'assistant',
                                                                                       'content': 'yes'}]}])
    assert b'no JSON objects' in run_prepare(tmp_path, 'a.jsonl')[0].stdout


def log_of_answers(path, answers):
    return write_lines(path, [{'request': request(f'text {n}'), 'response': response(json.dumps(answer))}
                              for n, answer in enumerate(answers)])


def fields_of(folder, *args):
    """(the fields of the config that prepare.py makes, its text)."""
    stub = run_prepare(folder, *args)[0].stdout.decode().partition('such as this one:\n')[2]
    (folder / 'stub.py').write_text(stub)
    return runpy.run_path(str(folder / 'stub.py')).get('fields'), stub


def test_an_optional_key_is_null_where_it_is_missing(tmp_path):
    answers = [{'tone': ['neutral', 'friendly'][n % 2]} | ({'escalate': True} if n % 20 == 7 else {})
               for n in range(240)]
    path = log_of_answers(tmp_path / 'a.jsonl', answers)
    fields, stub = fields_of(tmp_path, 'a.jsonl')
    assert fields == {'tone': ['neutral', 'friendly'], 'escalate': [None, True]} and '# null 228, true 12' in stub
    labels = Labels([path], Schema(fields), TEMPLATE)
    shares = [label['probabilities']['escalate'] for _, label, reason in labels if not reason]
    assert len(shares) == 240 and [share['true'] for share in shares] == [n % 20 == 7 for n in range(240)]
    labels = Labels([path], Schema({'tone': ['neutral', 'friendly'], 'escalate': [True, False]}), TEMPLATE)
    assert 'it has no escalate' in labels.problems['dropped_invalid'][0]  # null is not a value of the field
    assert len(labels.problems['dropped_invalid']) == 228


def test_an_optional_key_is_null_beside_log_probabilities(tmp_path):
    fields = {**FIELDS, 'escalate': [None, True]}
    path = write_lines(tmp_path / 'a.jsonl', [{'request': request('a b'), 'response': soft_response(0.7)}])
    (_, label, _), = Labels([path], Schema(fields), TEMPLATE)
    assert label['probabilities']['tone']['friendly'] == pytest.approx(0.7)
    assert label['probabilities']['escalate'] == {'null': 1, 'true': 0}


def test_answers_of_another_kind_add_no_null_and_no_field(tmp_path):
    answers = [{'tone': 'neutral'}, {'tone': 'friendly', 'spam': True}, {}] * 20 + [{'error': 'overloaded'}] * 3
    log_of_answers(tmp_path / 'a.jsonl', answers)
    fields, stub = fields_of(tmp_path, 'a.jsonl')
    assert fields == {'tone': ['neutral', 'friendly', None], 'spam': [None, True]}
    assert "# 'error' is left out: only answers without the usual keys have it" in stub
    labels = Labels([tmp_path / 'a.jsonl'], Schema(fields), TEMPLATE)
    assert 'dropped_invalid' not in labels.problems or 'null' in str(labels.problems)
    either = [{'kind': 'refund', 'amount': n % 3} if n % 2 else {'kind': 'ship', 'to': 'home'} for n in range(40)]
    log_of_answers(tmp_path / 'a.jsonl', either)                # no answer has all keys
    fields, _ = fields_of(tmp_path, 'a.jsonl')
    assert {name: {*values} for name, values in fields.items()} == {
        'kind': {'refund', 'ship'}, 'amount': {None, 0, 1, 2}, 'to': {None, 'home'}}


def config_of(folder, *args):
    """(the settings of the config that prepare.py makes, what it prints before it)."""
    done, _ = run_prepare(folder, *args)
    assert done.returncode == 0, done.stderr
    lines, _, stub = done.stdout.decode().partition('such as this one:\n')
    (folder / 'stub.py').write_text(stub)
    return runpy.run_path(str(folder / 'stub.py')), lines


def ticket(n):
    """an answer with lists and objects, and with what nobody needs."""
    findings = [{'kind': ['bug', 'ui', 'docs'][(n + k) % 3], 'evidence': f'it says {n} {k}'} |
                ({'urgent': [True, None][k]} if n % 2 else {}) for k in range(n % 3)]
    return {'reason': f'because of {n}', 'tone': ['neutral', 'friendly'][n % 2], 'confidence': n / 100, 'id': f'{n}',
            'labels': [['bug'], ['bug', 'ui'], ['ui', 'docs'], []][n % 4], 'steps': ['ask', 'look', 'ask'][:n % 4],
            'customer': None if n % 5 == 1 else {'mood': ['calm', 'angry'][n % 3 > 0], 'note': f'note {n}'},
            'findings': findings, 'words': [f'a{n}', f'b{n}'], 'meta': {'at': {'ms': n + 500}}}


TICKET_FIELDS = {
    'tone': ['neutral', 'friendly'],
    'id': {'type': 'string'},
    'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui', 'docs']}},
    'steps': {'type': 'array', 'items': {'enum': ['ask', 'look']}, 'uniqueItems': False, 'maxItems': 4},
    'customer': {'anyOf': [{'type': 'object', 'properties': {'mood': {'enum': ['angry', 'calm']}},
                            'required': ['mood']}, {'type': 'null'}]},
    'findings': {'type': 'array', 'items': {'type': 'object', 'properties': {
        'kind': {'enum': ['ui', 'docs', 'bug']}, 'urgent': {'enum': [True, None]}}, 'required': ['kind']},
        'maxItems': 3}}


def test_a_log_of_nested_answers_becomes_a_task(tmp_path):
    answers = [ticket(n) for n in range(60)]
    log_of_answers(tmp_path / 'a.jsonl', answers)
    config, printed = config_of(tmp_path, 'a.jsonl')
    assert config['fields'] == TICKET_FIELDS
    assert config['left_out'] == ['reason', 'confidence', 'customer.note', 'findings[].evidence', 'words', 'meta']
    for line in ("'reason' is left out: 60 different texts in 60 answers",
                 "'confidence' is left out: 60 different numbers in 60 answers",
                 "'findings[].evidence' is left out: 60 different texts in 60 items",
                 "'words' is left out: a list of 120 different texts in 120 items",
                 "'meta' is left out: 'meta.at': 'meta.at.ms': 60 different numbers in 60 answers"):
        assert f'\n{line}\n' in printed and f'\n# {line}\n' in (tmp_path / 'stub.py').read_text()
    stub = (tmp_path / 'stub.py').read_text()
    assert """    # 'labels[]': "bug" 30, "ui" 30, "docs" 15\n    # 'labels': 0 to 2 in a list\n""" in stub
    assert "    # 'findings[].urgent': missing 30\n" in stub and "    # 'customer': null 12\n" in stub
    assert max(map(len, stub.partition('fields = ')[2].partition('\n}\n')[0].splitlines())) <= 110
    schema = Schema(config['fields'], config['left_out']).check()
    assert all(schema.read_label({'answer': answer}) for answer in answers)
    assert schema.canonical(answers[7]) == {
        'tone': 'friendly', 'id': '7', 'labels': [], 'steps': ['ask', 'look', 'ask'], 'customer': {'mood': 'angry'},
        'findings': [{'kind': 'ui', 'urgent': True}]}
    assert ("    # 'id': copied from the text: 60 different texts in 60 answers\n" in stub
            or '60 different texts' in stub)


def test_from_a_log_with_reasons_to_records(project, tmp_path):
    root = clone_task(project, tmp_path)
    log_of_answers(root / 'log.jsonl', [{key: ticket(n)[key] for key in ('reason', 'tone', 'confidence', 'labels')}
                                        for n in range(40)])
    run_prepare(root, 'log.jsonl', '--config=config/mine.py')
    teacher = runpy.run_path(str(root / 'config/toy.py'))['teacher']
    done = run(root, 'extract.py', 'config/mine.py', f'--teacher={teacher}')
    assert done.returncode == 0 and 'filter read=40 kept=40' in done.stdout, done.stderr
    shards = data.Shards('mine', 'mine', root / 'data')
    assert shards.meta['left_out'] == ['reason', 'confidence']
    config = runpy.run_path(str(root / 'config/mine.py'))
    assert shards.meta['max_text'] + shards.meta['max_answer'] <= config['block_size']


def test_lists_are_in_the_order_of_most_lists_and_odd_answers_are_told(tmp_path):
    answers = [{'order': [['c', 'd'], ['a', 'b'], ['b', 'c'], ['d', 'c']][n % 4 if n % 8 != 7 else 0], 'none': [],
                'deep': [[['x'], ['x', 'y']][n % 2]] * (n % 3), 'long': ['x', 'y'] * (n % 10),
                'mixed': ['x', ['x'], {'a': 1}][n % 3], 'keys': {f'k{n}': 1, 'same': 2}} for n in range(60)]
    answers.append({**answers[0], 'order': 'a'})                # one in sixty is of another kind
    log_of_answers(tmp_path / 'a.jsonl', answers)
    config, printed = config_of(tmp_path, 'a.jsonl')
    assert config['fields'] == {
        'order': {'type': 'array', 'items': {'enum': ['a', 'b', 'c', 'd']}}, 'none': [[]],
        'deep': {'type': 'array', 'items': {'type': 'array', 'items': {'enum': ['x', 'y']}}, 'maxItems': 3}}
    assert "# 'order': not used, as they are no lists: 1\n" in (tmp_path / 'stub.py').read_text()
    assert "'long' is left out: lists of up to 18 items; 16 can be learned" in printed
    assert "'mixed' is left out: its values are 21 constants, 20 objects, 20 lists" in printed
    assert "'keys' is left out: 61 different keys in 61 objects" in printed
    log_of_answers(tmp_path / 'a.jsonl', [{'properties': {'a': n % 2}, 'b': 1} for n in range(9)])
    config, _ = config_of(tmp_path, 'a.jsonl')                  # else these were a JSON Schema themselves
    assert Schema(config['fields']).canonical({'properties': {'a': 1}, 'b': 1}) == {'properties': {'a': 1}, 'b': 1}
    assert Schema(config['fields']).paths == ['properties.a', 'b']


# -----------------------------------------------------------------------------
# the JSON Schema that the requests ask for

TICKET = {
    'type': 'object', 'title': 'Ticket', 'description': 'What a customer wants, and how it was said. ' * 4,
    'properties': {
        'reason': {'type': 'string'}, 'labels': {'type': 'array', 'items': {'$ref': '#/$defs/Label'}},
        'tone': {'enum': ['rude', 'neutral', 'friendly'], 'description': 'how it is said'},
        'customer': {'anyOf': [{'$ref': '#/$defs/Customer'}, {'type': 'null'}]},
        'findings': {'type': 'array', 'items': {'$ref': '#/$defs/Finding'}, 'maxItems': 4},
        'confidence': {'type': 'number', 'minimum': 0, 'maximum': 1}, 'id': {'type': 'string', 'pattern': '^t'},
        'words': {'type': 'array', 'items': {'type': 'string'}}, 'meta': {'type': 'object'}, 'again': {'$ref': '#'},
        'stars': {'type': 'integer', 'minimum': 1, 'maximum': 5}, 'day': {'type': 'string', 'format': 'date'}},
    'required': ['reason', 'labels', 'tone', 'customer', 'findings'],
    '$defs': {'Label': {'enum': ['bug', 'ui', 'docs', 'api'], 'type': 'string'},
              'Customer': {'type': 'object', 'properties': {'mood': {'type': 'string'}, 'note': {'type': 'string'}}},
              'Finding': {'type': 'object', 'properties': {
                  'kind': {'$ref': '#/$defs/Label'}, 'evidence': {'type': 'string'},
                  'urgent': {'anyOf': [{'type': 'boolean'}, {'type': 'null'}]}}, 'required': ['kind', 'evidence']}}}
AS_FORMAT = {'type': 'json_schema', 'json_schema': {'name': 'ticket', 'strict': True, 'schema': TICKET}}
TICKET_TOOL = {'type': 'function', 'function': {'name': 'file', 'parameters': TICKET}}
OTHER_TOOL = {'type': 'function', 'function': {'name': 'wait', 'parameters': {'type': 'object', 'properties': {}}}}
FILE = {'name': 'file', 'arguments': '{}'}


@pytest.mark.parametrize('request_, response_, is_asked', [
    ({'response_format': AS_FORMAT}, response('{}'), True),
    ({'text': {'format': {'type': 'json_schema', 'name': 'ticket', 'schema': TICKET}}}, {}, True),
    ({'tools': [OTHER_TOOL, TICKET_TOOL]},
     {'choices': [{'message': {'content': None, 'tool_calls': [{'function': FILE}]}}]}, True),
    ({'tools': [OTHER_TOOL, {'type': 'function', 'name': 'file', 'parameters': TICKET}]},
     {'output': [{'type': 'function_call', **FILE}]}, True),
    ({'functions': [{'name': 'file', 'parameters': TICKET}]},
     {'choices': [{'message': {'function_call': FILE}}]}, True),
    ({'tools': [{'name': 'wait', 'input_schema': {}}, {'name': 'file', 'input_schema': TICKET}]},
     {'choices': [{'message': {'content': [{'type': 'tool_use', 'name': 'file', 'input': {}}]}}]}, True),
    ({'tools': [{'name': 'file', 'input_schema': TICKET}], 'tool_choice': {'type': 'tool', 'name': 'file'}}, {}, True),
    ({'tools': [{'name': 'file', 'input_schema': TICKET}]}, {}, True),
    ({'tools': [OTHER_TOOL, TICKET_TOOL]}, response('x'), False), ({}, {}, False),
    ({'response_format': {'type': 'json_object'}}, response('{}'), False), ({'tools': 3}, {'choices': 5}, False)])
def test_the_schema_of_a_request_is_found(request_, response_, is_asked):
    assert asked_schema(request_, response_) == (TICKET if is_asked else None)


def test_the_schema_of_the_requests_becomes_the_fields(tmp_path):
    answers = [ticket(n) for n in range(60)]
    other = json.loads(json.dumps(AS_FORMAT))
    other['json_schema']['schema']['properties']['tone']['enum'] += ['new']
    lines = [{'request': {**request(f'text {n}'), 'response_format': AS_FORMAT if n % 9 else other},
              'response': response(json.dumps(answer))} for n, answer in enumerate(answers)]
    write_lines(tmp_path / 'a.jsonl', lines)
    config, printed = config_of(tmp_path, 'a.jsonl')
    expected = json.loads(json.dumps(TICKET))                   # as it is, but for a text with few values
    expected['$defs']['Customer']['properties']['mood']['enum'] = ['angry', 'calm']
    assert json.dumps(config['fields']) == json.dumps(expected)
    assert config['left_out'] == [
        'reason', 'customer.note', 'findings[].evidence', 'confidence', 'words', 'meta', 'again']
    for line in ("the requests have 2 schemas, which differ in 'tone'; the most frequent is taken, of 53 of 60",
                 "'customer.mood' may be any text in the schema; it has the 2 values of the log: are these all?",
                 "'reason' is left out: free text (60 different texts in 60 answers)",
                 "'confidence' is left out: any number (60 different numbers in 60 answers)",
                 "'meta' is left out: an object whose keys are not known",
                 "'again' is left out: it refers to #, in which it is, without end"):
        assert f'\n{line}\n' in printed, line
    del config['fields']['properties']['stars']                 # which these answers do not have
    schema = Schema(config['fields'], config['left_out']).check()
    assert all(schema.read_label({'answer': answer}) for answer in answers)
    assert schema.by_path['tone'].values == ['rude', 'neutral', 'friendly']

    (tmp_path / 'ticket.json').write_text(json.dumps(TICKET_TOOL))
    (tmp_path / 'none.json').write_text('{"type": "string"}')
    (tmp_path / 'cut.json').write_text('{')
    log_of_answers(tmp_path / 'a.jsonl', answers)
    assert config_of(tmp_path, 'a.jsonl', '--schema=ticket.json')[0]['fields'] == expected
    for file, message in (('none.json', 'is no JSON Schema of an object'), ('cut.json', 'is not JSON'),
                          ('nowhere.json', 'cannot be read')):
        line, = run_prepare(tmp_path, 'a.jsonl', f'--schema={file}')[0].stderr.decode().splitlines()
        assert f'--schema={file} {message}' in line


def test_a_batch_and_an_export_have_the_schema_in_their_requests(tmp_path):
    schema = {'type': 'object', 'properties': {'tone': {'enum': ['neutral', 'friendly', 'odd']},
                                               'why': {'type': 'string'}}}
    tools, answer = [{'name': 'f', 'input_schema': schema}], lambda n: {'tone': 'neutral', 'why': f'so {n}'}
    batch = [line for n in range(3) for line in (
        {'custom_id': str(n), 'body': {**request(f'text {n}'), 'tools': tools}},
        {'custom_id': str(n), 'response': {'body': response(json.dumps(answer(n)))}})]
    spans = [{'type': 'GENERATION', 'input': {**request(f'text {n}'), 'tools': tools, 'tool_choice': {'name': 'f'}},
              'output': answer(n)} for n in range(3)]
    for lines in (batch, spans):
        write_lines(tmp_path / 'a.jsonl', lines)
        config, _ = config_of(tmp_path, 'a.jsonl')
        assert (config['fields'], config['left_out']) == (schema, ['why'])
    schema['properties'] = {'why': {'type': 'string'}}           # then the answers tell what the fields are
    write_lines(tmp_path / 'a.jsonl', [*batch, *spans, {**spans[0], 'output': {'tone': 'friendly', 'why': 'so'}}])
    config, printed = config_of(tmp_path, 'a.jsonl')
    assert config['fields']['tone'] == ['neutral', 'friendly'] and 'left_out' not in config


def test_an_odd_log_ends_in_one_line(tmp_path):
    write_lines(tmp_path / 'none.jsonl', [{'custom_id': '1', 'response': {'body': response(ANSWER)}}])
    write_lines(tmp_path / 'text.jsonl', [{'text': 'a'}])
    write_lines(tmp_path / 'good.jsonl', [KINDS['a pair']])
    (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'good.jsonl').read_bytes() * 999)[:-9])
    for args, message in ((['none.jsonl'], 'no text found'), (['none.jsonl'], 'name the input of the batch too'),
                          (['text.jsonl', '--template={text}'], 'no file is the log of an LLM'),
                          (['good.jsonl', '--template=x'], 'must hold {text} once'), (['cut.jsonl.gz'], 'cut.jsonl.gz'),
                          (['good.jsonl', '--template=Other {text}'], 'does not fit the template')):
        done, records = run_prepare(tmp_path, *args)
        line, = done.stderr.decode().splitlines()
        assert done.returncode == 1 and message in line and not records, line


# -----------------------------------------------------------------------------
# a batch


def test_a_batch_asks_what_a_server_is_asked_and_its_output_becomes_records(project, tmp_path):
    root = clone_task(project, tmp_path)
    batch = lambda *args: run(root, 'tools/batch.py', '--teacher_model=gpt', '--out=requests.jsonl', *args)
    done = batch('--price_in=2', '--price_out=10', '--name=batch')
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(root / 'requests.jsonl')]
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')]
    prompt = runpy.run_path(str(root / 'config/toy.py'))['prompt']
    server = Server([], 'gpt', Schema(FIELDS), prompt)
    assert [line['body'] for line in lines] == [server.body(text, False) for text in texts]
    assert len({line['custom_id'] for line in lines}) == len(texts)
    body = lines[0]['body']
    assert (body['temperature'], body['logprobs'], body['top_logprobs']) == (0, True, 20)
    assert body['response_format']['json_schema']['strict'] and lines[0]['url'] == '/v1/chat/completions'
    figures = dict(f.split('=') for f in next(
        line for line in done.stdout.splitlines() if line.startswith('batch requests')).split()[1:])
    n_in, n_out = int(figures['tokens_in']), int(figures['tokens_out'])
    assert int(figures['requests']) == 400 and n_in > 400 * 20 and n_out > 400 * 5
    assert float(figures['cost']) == pytest.approx((2 * n_in + 10 * n_out) / 2e6, rel=1e-3)

    write_lines(root / 'output.jsonl', [{'custom_id': line['custom_id'], 'response': {
        'status_code': 200, 'body': soft_response(0.7)}} for line in lines[100:]])
    done = run(root, 'extract.py', '--name=batch', '--labels=output.jsonl,requests.jsonl')
    assert done.returncode == 0 and '100 requests of the batch have no output' in done.stdout, done.stderr
    shards = data.Shards('toy', 'batch', root / 'data')
    assert {int(hash_) for hash_ in shards.hashes} == {text_hash(text) for text in texts[100:]}
    done = batch('--name=batch', '--logprobs=False', '--max_records=60')
    lines = [json.loads(line) for line in open(root / 'requests.jsonl')]
    assert [line['custom_id'] for line in lines] == [f'{text_hash(text):016x}' for text in texts[:60]]
    assert not {'logprobs', 'top_logprobs', 'temperature'} & {*lines[0]['body']}


def test_a_batch_of_nothing_ends_in_one_line(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    for args, message in ((['--out='], 'no task or no file'),
                          (['--out=a', '--teacher_model='], 'teacher_model is missing'),
                          (['--out=a'], 'has an answer already'), (['--out=data/toy/input.jsonl'], 'holds the texts'),
                          (['--out=no/where/a'], 'cannot write no/where/a'),
                          (['--out=a', '--dataset=other'], 'does not exist'),
                          (['--out=a', "--fields={'a': 'x'}"], 'needs a list'),
                          (['--out=a', '--prompt=x'], 'must hold')):
        line = one_line(run(root, 'tools/batch.py', '--teacher_model=gpt', *args))
        assert message in line, (args, line)
    assert not list(root.glob('a*'))
