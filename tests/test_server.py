"""A teacher behind a URL: its answers as probabilities, and a server that behaves well, differently and badly."""
import asyncio
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import numpy as np
import pytest
from tokenizers import Tokenizer

import data
from distil.values import follow
from distil.answers import find_object, label_from_answer, label_from_samples, probabilities_from_tokens
from distil.calibrate import calibrate_label, calibrated_answers, learn_value_bias
from distil.prompts import prompt_text
from distil.cascade import ask_server
from distil.keys import check_key, hide_in_stream, hide_keys, read_key
from distil.server import IN_A_ROW, Server, Stopped
from distil.space import OutputSpace
from distil.schema import Schema
from tests.conftest import FIELDS, clone_task, free_port, one_line, run

KEY = 'sk-a-secret-that-nobody-may-read'
pytest.importorskip('httpx')  # optional: requirements-serve.txt


def as_tokens(*pieces):
    """tokens of an answer. A piece: text, or (text, {text: probability of each alternative, itself included})."""
    tokens = []
    for piece in pieces:
        text, p = piece if isinstance(piece, tuple) else (piece, {piece: 1.0})
        tokens.append((text.encode(), math.log(p[text]), [(other.encode(), math.log(q)) for other, q in p.items()]))
    return tokens


# -----------------------------------------------------------------------------
# reading an answer


@pytest.mark.parametrize('text, answer', [
    ('{"a": 1}', {'a': 1}), ('```json\n{\n  "a": "x{"\n}\n```', {'a': 'x{'}), ('no {object', None), ('', None),
    ('<think>{"a": 1} or {"a": 2}?</think>{"a": 3}', {'a': 3}), ('{"a": 1} no: {"a": [1, {"b": 2}], "c": null}', {
        'a': [1, {'b': 2}], 'c': None}), ('{"a": 1, "a" 2} {} {"b": tru', {}), ('{' * 5000, None),
    ('{"a": "\\u00e9日"}', {'a': 'é日'})])
def test_the_last_object_of_an_answer_counts(text, answer):
    found, spans = find_object(text)
    assert found == answer
    for keys, (start, end) in spans.items():
        assert json.loads(text[start:end]) == follow(answer, keys)


def test_where_values_part_an_alternative_counts_for_those_it_begins():
    values = ['neutral', 'negative', 'positive']
    tokens = as_tokens('{"', 'tone', '":', (' "', {' "': 0.9, '"': 0.1}), ('ne', {'ne': 0.6, 'pos': 0.3, 'x': 0.1}),
                       ('utral', {'utral': 0.7, 'gative': 0.3}), '"}')
    p, outside = probabilities_from_tokens(values, tokens, 9, 18)
    assert p == pytest.approx([0.42 / 0.9, 0.18 / 0.9, 0.3 / 0.9]) and outside == pytest.approx(0.1 * 0.9)
    label, worst = label_from_answer(Schema({'tone': values}), '{"tone": "neutral"}', tokens)
    assert list(label['probabilities']['tone'].values()) == pytest.approx(p.tolist()) and worst == outside


def test_values_that_are_prefixes_of_others_and_numbers_end_where_something_follows():
    tokens = as_tokens('{"n":', ('1', {'1': 0.8, '2': 0.1, '11': 0.1}), ('1', {'1': 0.5, '}': 0.5}), '}')
    p, _ = probabilities_from_tokens([1, 2, 11, 12], tokens, 5, 7)
    assert p == pytest.approx([0.4, 0.1, 0.5, 0])
    tokens = as_tokens('{"n":', ('1', {'1': 0.8, '2': 0.2}), ('}', {'1': 0.25, '}': 0.75}))
    assert probabilities_from_tokens([1, 2, 11], tokens, 5, 6)[0] == pytest.approx([0.6, 0.2, 0.2])
    tokens = as_tokens('{"s":"', ('a', {'a': 0.9, '"': 0.1}), ('"', {'"': 0.5, 'b"': 0.5}), '}')
    assert probabilities_from_tokens(['a', 'ab', ''], tokens, 5, 8)[0] == pytest.approx([0.45, 0.45, 0.1])
    constants = [True, False, None], (('true', {'true': 0.5, 'false': 0.3, 'nu': 0.2}),)
    lists = [[1, 2], [1], 'x'], (('[', {'[': 0.8, '"x"': 0.2}), '1', (',', {',': 0.625, ']': 0.375}), '2]')
    for values, pieces in (constants, lists):
        text = ''.join(piece if isinstance(piece, str) else piece[0] for piece in pieces)
        p, _ = probabilities_from_tokens(values, as_tokens('{"v": ', *pieces, '\n}'), 6, 6 + len(text))
        assert p == pytest.approx([0.5, 0.3, 0.2])


def test_what_is_beyond_the_listed_tokens_is_bounded_and_spread():
    tokens = as_tokens('{"v":"', ('a', {'a': 0.6, 'b': 0.1}), '"}')
    p, outside = probabilities_from_tokens(['a', 'b', 'c', 'd'], tokens, 5, 8)
    assert p == pytest.approx(np.array([0.6, 0.1, 0.1, 0.1]) / 0.9) and outside == pytest.approx(0.1)


def test_characters_cut_into_bytes_by_the_servers_tokens():
    e, day = 'é'.encode(), '日'.encode()
    tokens = [*as_tokens('{"v":"'), (e[:1], math.log(0.7), [(e[:1], math.log(0.7)), (day[:2], math.log(0.3))]),
              (e[1:], 0.0, []), *as_tokens('"}')]
    for values in (['é', '日'], ['日', 'é']):
        p, _ = probabilities_from_tokens(values, tokens, 5, 9)
        assert p[values.index('é')] == pytest.approx(0.7)
    label, _ = label_from_answer(Schema({'v': ['é', '日']}), '{"v":"é"}', tokens)
    assert label['probabilities']['v']['é'] == pytest.approx(0.7)


def test_a_value_in_an_unusual_spelling_or_without_any_probability_is_a_bare_label():
    fields = {'tone': ['neutral', 'friendly']}
    tokens = as_tokens('{"tone": "', '\\u006e', 'eutral', '"}')
    label, outside = label_from_answer(Schema(fields), ''.join(token.decode() for token, *_ in tokens), tokens)
    assert label == {'probabilities': {'tone': {'neutral': 1, 'friendly': 0}}} and outside == 0
    tokens = [*as_tokens('{"tone": "'), (b'neutral', -9999.0, []), *as_tokens('"}')]
    assert label_from_answer(Schema(fields), '{"tone": "neutral"}', tokens)[0] == label


def test_an_answer_without_log_probabilities_is_a_bare_label_and_samples_are_shares():
    fields = {'a': ['x', 'y'], 'b': [True, False]}
    assert label_from_answer(Schema(fields), 'so: {"b": true, "a": "x"}', []) == (
        {'answer': {'a': 'x', 'b': True}}, 0.0)
    for wrong in ('{"a": "x"}', '{"a": "z", "b": true}', '{"a": "x", "b": 1}', '[]', ''):
        assert label_from_answer(Schema(fields), wrong, []) == (None, 0.0)
    label = label_from_samples(
        Schema(fields), ['{"a":"x","b":true}', '{"a":"x","b":false}', 'hm', '{"a":"y","b":true}'])
    assert label['probabilities'] == {'a': {'x': pytest.approx(2.5 / 4), 'y': pytest.approx(1.5 / 4)},
                                      'b': {'true': pytest.approx(2.5 / 4), 'false': pytest.approx(1.5 / 4)}}
    assert label_from_samples(Schema(fields), ['hm']) is None


# -----------------------------------------------------------------------------
# calibration of values


PRIORS = {'tone': [0.5, 0.3, 0.2]}
TONES = ['neutral', 'friendly', 'rude']


def labelled(n, seed=0):
    """n texts as (hash, ids, label): a teacher that likes the third tone too much."""
    p = np.random.default_rng(seed).dirichlet([1, 1, 4], n)
    return [(i, [i, 7], {'probabilities': {'tone': dict(zip(TONES, row.tolist())), 'spam': {'true': 1.0}}})
            for i, row in enumerate(p)]


def test_the_bias_of_values_is_the_log_of_mean_and_prior():
    labels = [label for _, _, label in labelled(400)]
    bias = learn_value_bias(labels, Schema({'tone': TONES}), PRIORS)
    p = np.array([[*label['probabilities']['tone'].values()] for label in labels])
    mean = (p.sum(0) + PRIORS['tone']) / 401
    assert [*bias['tone'].values()] == pytest.approx(np.log(mean / PRIORS['tone']).tolist())
    changed = [calibrate_label(label, bias) for label in labels]
    q = np.array([[*label['probabilities']['tone'].values()] for label in changed])
    q /= q.sum(1, keepdims=True)
    assert np.abs(q.mean(0) - PRIORS['tone']).max() < np.abs(p.mean(0) - PRIORS['tone']).max() / 2
    assert q[0] == pytest.approx(p[0] / mean * PRIORS['tone'] / (p[0] / mean * PRIORS['tone']).sum())
    assert all(label['probabilities']['spam'] == {'true': 1.0} for label in changed)
    assert calibrate_label({'answer': {'tone': 'rude'}}, bias) == {'answer': {'tone': 'rude'}}
    never = learn_value_bias(labels[:1], Schema({'tone': TONES}), {'tone': [0.999998, 1e-6, 1e-6]})
    assert all(map(math.isfinite, never['tone'].values()))


def test_a_run_killed_before_the_bias_is_known_pays_for_no_answer_twice(tmp_path, capsys):
    texts, asked = labelled(100), Counter()

    def answers(groups):
        for group in groups:
            asked.update(hash_ for hash_, *_ in group)
            yield [texts[hash_] for hash_, *_ in group]

    def calibrated(folder, meta, todo):
        folder.mkdir(exist_ok=True)
        groups = ([(i, None, None) for i in todo[k:k + 7]] for k in range(0, len(todo), 7))
        return calibrated_answers(answers, groups, folder, meta, PRIORS)
    task = {'fields': {'tone': TONES, 'spam': [True]}, 'calibrate': {'texts': 40}}
    whole = {h: label for group in calibrated(tmp_path / 'a', dict(task), range(100)) for h, _, label in group}
    assert len(whole) == 100 and 'calibrate field=tone texts=42' in capsys.readouterr().out
    expected = learn_value_bias([label for _, _, label in texts[:42]], Schema(task['fields']), PRIORS)
    assert whole == {h: calibrate_label(label, expected) for h, _, label in texts}

    asked.clear()
    folder, meta = tmp_path / 'b', dict(task)
    folder.mkdir()
    (folder / 'calibrate.jsonl').write_text('\n'.join(json.dumps(text) for text in texts[:15]) + '\n[15, [15')
    asked.update(range(15))
    first = calibrated(folder, meta, range(100))
    stored = {h: label for h, _, label in next(first)}
    first.close()                                           # killed again, after the bias is known
    meta = json.loads((folder / 'meta.json').read_text())
    left = [i for i in range(100) if i not in {*list(stored)[:5]}]  # of these only five were stored
    again = {h: label for group in calibrated(folder, meta, left) for h, _, label in group}
    assert {*again} == {*left} and len(again) == 95
    assert {**stored, **again} == {h: calibrate_label(label, meta['value_bias']) for h, _, label in texts}
    assert max(asked[i] for i in range(15)) == 1


def test_a_server_without_probabilities_is_not_calibrated(tmp_path, capsys):
    bare = [[(i, [1], {'answer': {'tone': 'rude', 'spam': True}})] for i in range(9)]
    meta = {'fields': {'tone': TONES}, 'calibrate': {'texts': 4}}
    assert sum(calibrated_answers(lambda groups: bare, [], tmp_path, meta, PRIORS), []) == sum(bare, [])
    assert 'nothing to calibrate' in capsys.readouterr().out and meta['value_bias'] == {}


# -----------------------------------------------------------------------------
# a server


class Fake(ThreadingHTTPServer):
    """behaves like an OpenAI-compatible server. behave(n, body) -> None, or what the n-th request gets instead:
    a status, (status, message, headers), 'cut', 'hang', a content, bytes (an HTML page), or a dict: the whole reply."""
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave=lambda n, body: None):
        super().__init__(('127.0.0.1', free_port()), Handler)
        self.behave, self.bodies, self.texts, self.keys, self.lock = behave, [], Counter(), set(), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server_address[1]}/v1'

    def handle_error(self, *_):
        """a client that was killed is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True                          # headers and body are two packets

    def log_message(self, *_):
        """silent"""

    def do_POST(self):
        body, fake = json.loads(self.rfile.read(int(self.headers['content-length']))), self.server
        with fake.lock:
            fake.bodies.append(body)
            fake.keys.add(self.headers.get('authorization'))
            n = len(fake.bodies)
        odd = fake.behave(n, body)
        if odd == 'hang':
            time.sleep(3)
        if odd == 'cut':
            self.send_response(200)
            self.send_header('content-length', '100')
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
            return
        if isinstance(odd, (int, tuple)):
            status, message, headers = odd if isinstance(odd, tuple) else (odd, 'no', {})
            return self.reply(status, message if isinstance(message, (dict, bytes)) else {
                'error': {'message': message}}, headers)
        if isinstance(odd, (dict, bytes)):
            return self.reply(200, odd, {})
        text = body['messages'][-1]['content'].removeprefix('label: ')
        fake.texts[text] += 1
        tone, spam = ('friendly', 'neutral')[len(text) % 2], 'true' if 'buy' in text else 'false'
        content, usage = f'{{"tone": "{tone}", "spam": {spam}}}', {'prompt_tokens': 100, 'completion_tokens': 10}
        other = {'friendly': 'neutral', 'neutral': 'friendly'}[tone]
        tokens = as_tokens('{"', 'tone', '": "', (tone, {tone: 0.75, other: 0.25}), '", "spam": ', (
            spam, {spam: 0.9, 'true' if spam == 'false' else 'false': 0.1}), '}')
        said = odd if isinstance(odd, str) and odd != 'hang' else content
        choice = {'message': {'role': 'assistant', 'content': said}}
        if body.get('logprobs'):
            entry = lambda token, p: {'token': token.decode(), 'logprob': p, 'bytes': list(token)}
            choice['logprobs'] = {'content': [
                {**entry(token, p), 'top_logprobs': [entry(*other) for other in others]}
                for token, p, others in tokens]}
        self.reply(200, {'choices': [choice], 'usage': usage}, {})

    def reply(self, status, content, headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'content-length': len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)


def ask(fakes, texts, **settings):
    """[(number of a text, its label or reason)] in order, of a Server in front of fakes."""
    server = Server([fake.url for fake in fakes], 'm', Schema(FIELDS), 'label: {text}', **{'in_flight': 4, **settings})
    groups = [[(n, np.array([n]), None)] for n in range(len(texts))]
    found = [row for group in server.answered(groups, lambda ids: texts[ids[0]]) for row in group]
    return server, [label for _, _, label in sorted(found, key=lambda row: row[0])]


def test_a_server_that_behaves_is_asked_once_a_text_for_what_the_schema_says():
    fake, texts = Fake(), [f'text {n} buy' if n % 3 else f'text {n}' for n in range(40)]
    server, labels = ask([fake], texts, price_in=1.0, price_out=2.0)
    assert len(fake.bodies) == 40 and set(fake.texts.values()) == {1}
    body = fake.bodies[0]
    assert body['temperature'] == 0 and body['top_logprobs'] == 20 and body['model'] == 'm'
    assert body['response_format']['json_schema']['schema']['properties']['spam'] == {'enum': [True, False]}
    for text, label in zip(texts, labels):
        assert label['probabilities']['spam']['true'] == pytest.approx(0.9 if 'buy' in text else 0.1)
        assert max(label['probabilities']['tone'].values()) == pytest.approx(0.75)
    assert server.used == {'prompt_tokens': 4000, 'completion_tokens': 400}
    assert server.cost() == pytest.approx(0.0048)


@pytest.mark.parametrize('refused, kept', [
    (['json_schema'], {'json_object', 'logprobs', 'temperature'}),
    (['json_schema', 'json_object'], {'logprobs', 'temperature'}),
    (['logprobs'], {'json_schema', 'temperature'}), (['temperature', 'logprobs'], {'json_schema'})])
def test_what_a_server_refuses_is_left_out_by_name_and_said_once(refused, kept, capsys):
    def behave(n, body):
        for name in refused:
            if name in json.dumps(body):
                return 400, f'Unsupported parameter: {"response_format type " if "json" in name else ""}{name}', {}
    fake = Fake(behave)
    _, labels = ask([fake], [f'text {n}' for n in range(20)])
    assert all(isinstance(label, dict) for label in labels)
    assert all(('probabilities' in label) == ('logprobs' not in refused) for label in labels)
    last = fake.bodies[-1]
    assert {*last, last.get('response_format', {}).get('type')} & {
        'json_schema', 'json_object', 'logprobs', 'temperature'} == kept
    assert capsys.readouterr().out.count('the server refuses') == len(refused)


def test_trouble_is_waited_out_and_no_text_is_lost():
    def behave(n, body):
        return {2: (429, 'slow down', {'retry-after': '1'}), 3: 500, 5: 'cut', 7: 503, 9: 'hang', 11: 408}.get(n)
    fake = Fake(behave)
    server, labels = ask([fake], [f'text {n}' for n in range(30)], timeout=1)
    assert all(isinstance(label, dict) for label in labels) and len(labels) == 30


def test_an_answer_that_breaks_the_schema_is_asked_for_once_more_and_a_refused_text_is_dropped():
    fake = Fake(lambda n, body: 'I cannot.' if '"text 3"' in json.dumps(body).replace('label: ', '') else
                (400, 'content filter', {}) if 'text 25' in json.dumps(body) else
                '<think>{"tone": "?"}</think>{"tone":"friendly","spam":true}' if 'text 4' in json.dumps(body) else None)
    _, labels = ask([fake], [f'text {n}' for n in range(30)])
    assert labels[3] == 'invalid' and fake.texts['text 3'] == 2 and labels[25] == 'refused'
    assert labels[4] == {'answer': {'tone': 'friendly', 'spam': True}}  # the tokens are not those of this text
    assert sum(isinstance(label, str) for label in labels) == 2


def test_without_log_probabilities_samples_are_drawn():
    draws = iter(['{"tone":"friendly","spam":true}', '{"tone":"neutral","spam":true}'] * 50)
    fake = Fake(lambda n, body: (400, 'logprobs are not supported', {}) if 'logprobs' in body else
                next(draws) if body['temperature'] == 0.7 else None)
    _, labels = ask([fake], ['a', 'b', 'c'], samples=4, sample_temperature=0.7, in_flight=1)
    assert labels[0]['probabilities']['tone']['friendly'] == pytest.approx(2.5 / 5)
    assert labels[0]['probabilities']['spam']['true'] == pytest.approx(4.5 / 5)


def test_a_prompt_of_messages_is_sent_as_they_are():
    fake = Fake()
    prompt = [{'role': 'system', 'content': 'label it'}, {'role': 'user', 'content': 'label: {text}'}]
    server = Server([fake.url], 'm', Schema(FIELDS), prompt)
    assert [label for group in server.answered([[(0, [0], None)]], lambda ids: 'say {text}') for _, _, label in group]
    assert fake.bodies[0]['messages'] == [prompt[0], {'role': 'user', 'content': 'label: say {text}'}]
    assert prompt_text(prompt) == 'label it\nlabel: {text}' and prompt_text('a {text}') == 'a {text}'


def test_a_cascade_asks_the_server_that_the_student_learned_from(tokenizer, words, capsys):
    space = OutputSpace(tokenizer, FIELDS)
    fake = Fake(lambda n, body: (401, 'no key', {}) if n > 6 else None)
    task = {'server': 'm', 'fields': FIELDS, 'prompt': 'label: {text}', 'value_bias': {
        'tone': {'neutral': 5.0, 'friendly': 0.0}}}         # so strong that neutral is never the answer
    answer = ask_server(fake.url, task, space)
    ids = [space.tokenizer.encode(text, add_special_tokens=False).ids for text in (words[0], words[1], words[2])]
    assert [space.to_json(outs)['tone'] for outs in answer(ids)] == ['friendly'] * 3
    assert len(answer(ids)) == 3 and len(fake.bodies) == 6  # it can be asked again
    assert answer(ids) == [None] * 3 and 'no key' in capsys.readouterr().err  # it refuses: the student's stay
    with pytest.raises(SystemExit, match='--teacher=URL'):
        ask_server('', task, space)
    budget, fake = {'price_in': 1e4, 'price_out': 0.0, 'max_cost': 5.0}, Fake()  # an answer costs 1.0
    answer = ask_server(fake.url, task, space, budget)
    assert [outs is not None for outs in answer(ids) + answer(ids) + answer(ids)] == [True] * 5 + [False] * 4
    assert capsys.readouterr().err.count('would exceed max_cost = 5') == 1  # not at each batch of a long run
    with pytest.raises(SystemExit, match='max_cost needs price_in'):
        ask_server(fake.url, task, space, {**budget, 'price_in': 0.0})


def test_of_two_servers_one_may_die(monkeypatch):
    monkeypatch.setenv('TEACHER_API_KEY', KEY)
    good, dying = Fake(), Fake(lambda n, body: 502 if n > 5 else None)
    _, labels = ask([dying, good], [f'text {n}' for n in range(60)])
    assert len(labels) == 60 and all(isinstance(label, dict) for label in labels)
    assert sum(good.texts.values()) + sum(dying.texts.values()) == 60 and sum(good.texts.values()) > 30
    assert good.keys == {f'Bearer {KEY}'}


def asked_text(body):
    """the text that a request is about."""
    return body['messages'][-1]['content'].removeprefix('label: ')


def numbered(n):
    return [f'text {i}' for i in range(n)]


@pytest.mark.parametrize('message', [
    'The prompt was filtered by the content management policy', "This model's maximum context length is 4096 tokens",
    'no', 'json is not allowed here: flagged by moderation'])
@pytest.mark.parametrize('in_flight, delay', [(16, 0.1), (16, 0), (1, 0)])
def test_one_refused_text_costs_no_other_its_schema_nor_ends_the_work(message, in_flight, delay, capsys):
    def behave(n, body):
        if asked_text(body) in ('text 2', 'text 30'):
            return 400, message, {}
        time.sleep(delay)
    fake = Fake(behave)
    server, labels = ask([fake], numbered(60), in_flight=in_flight)
    assert [n for n, label in enumerate(labels) if isinstance(label, str)] == [2, 30]
    assert labels[2] == labels[30] == 'refused' and server.dropped == {'refused': 2}
    assert all(body['response_format']['type'] == 'json_schema' and body['logprobs'] and body['temperature'] == 0
               for body in fake.bodies)
    printed = capsys.readouterr().out
    assert printed.count(f'a text without an answer (refused): {message}') == 1 and 'the server refuses' not in printed
    assert len(fake.bodies) <= 61                           # PROBE, once


def test_an_option_that_no_message_names_is_found_by_a_harmless_text(capsys):
    fake = Fake(lambda n, body: (400, 'bad request', {}) if 'response_format' in body else None)
    server, labels = ask([fake], numbered(30), in_flight=16)
    assert all('probabilities' in label for label in labels) and not server.dropped
    assert all(body['logprobs'] for body in fake.bodies)
    assert capsys.readouterr().out.count('the server refuses') == 2  # json_schema, json_object


def test_when_all_texts_are_refused_that_were_answered_before_the_work_ends():
    fake = Fake(lambda n, body: (400, 'your account is closed', {}) if n > 30 else None)
    with pytest.raises(Stopped, match='refuses every request: your account is closed'):
        ask([fake], numbered(200), in_flight=4)
    assert len(fake.bodies) < 30 + 2 * IN_A_ROW
    fake = Fake(lambda n, body: (403, 'flagged by moderation', {}) if asked_text(body) == 'text 5' else None)
    assert ask([fake], numbered(20))[1][5] == 'refused'
    with pytest.raises(Stopped, match='says 403'):
        ask([Fake(lambda n, body: 403 if n > 5 else None)], numbered(20))


def odd_choice(content=None, finish='stop', **message):
    return {'choices': [{'message': {'role': 'assistant', 'content': content, **message}, 'finish_reason': finish}]}


@pytest.mark.slow
@pytest.mark.parametrize('error', [
    {'error': {'code': 429, 'message': 'slow down'}}, {'error': {'code': 429}}, {'error': 'overloaded'},
    {'error': {'message': 'upstream', 'code': 'server_error'}, 'choices': []}, odd_choice('', 'error'),
    {'choices': [{'error': {'code': 502, 'message': 'gone'}, 'finish_reason': 'error', 'message': {'content': ''}}]}])
def test_an_error_in_a_reply_with_status_200_is_no_answer(error):
    fake = Fake(lambda n, body: error if n in (3, 5, 8) else None)
    server, labels = ask([fake], numbered(20))
    assert all(isinstance(label, dict) for label in labels) and not server.dropped
    with pytest.raises(Stopped, match='no answer for 1 seconds: .*says'):
        ask([Fake(lambda n, body: error)], numbered(5), patience=1)


def test_the_code_of_an_error_in_a_reply_counts():
    flagged = {'error': {'code': 400, 'message': 'content_filter'}}
    assert ask([Fake(lambda n, body: flagged if asked_text(body) == 'text 3' else None)],
               numbered(9))[1][3] == 'refused'
    with pytest.raises(Stopped, match='says 401 .*no key'):
        ask([Fake(lambda n, body: {'error': {'code': 401, 'message': 'no key'}})], numbered(9))


@pytest.mark.slow
def test_a_text_that_fails_for_ever_does_not_hold_up_the_others(monkeypatch, capsys):
    monkeypatch.setattr('distil.server.random.uniform', lambda low, high: 0.01)
    fake = Fake(lambda n, body: 500 if asked_text(body) == 'text 3' else time.sleep(0.02))
    server, labels = ask([fake], numbered(200))
    assert labels[3] == 'failed' and sum(isinstance(label, str) for label in labels) == 1
    assert fake.texts['text 3'] == 0 and 'a text without an answer (failed): ' in capsys.readouterr().out


@pytest.mark.parametrize('reply, named', [
    ((402, 'buy credits', {}), 'says 402 buy credits'),
    ((308, 'moved', {'location': 'https://x/v1'}), 'says 308 and points to https://x/v1'),
    ((429, {'error': {'message': 'You exceeded it', 'code': 'insufficient_quota'}}, {}), 'says 429 You exceeded it'),
    (b'<!DOCTYPE html><html>Sign in', 'a page for people, status 200'),
    ((404, b'<html>nginx', {'content-type': 'text/html'}), 'a page for people, status 404'),
    ((418, 'teapot', {}), 'says 418 teapot')])
def test_what_does_not_pass_is_named_at_once(reply, named):
    fake = Fake(lambda n, body: reply)
    with pytest.raises(Stopped) as stopped:
        ask([fake], numbered(5))
    assert named in str(stopped.value) and len(fake.bodies) <= 5  # none is sent again


def test_a_page_with_status_502_passes_and_what_is_waited_for_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr('distil.server.QUIET', 0.4)
    fake = Fake(lambda n, body: (502, b'<html>bad gateway', {'content-type': 'text/html'}) if n < 4 else None)
    assert all(isinstance(label, dict) for label in ask([fake], numbered(5), in_flight=1)[1])
    printed = capsys.readouterr().out
    assert printed.count('asks again') == 1 and 'says 502 <html>bad gateway' in printed


@pytest.mark.parametrize('reply, why', [
    (odd_choice('{"tone": "fri', 'length'), "'{\"tone\": \"fri' (finish_reason: length, it was cut off"),
    (odd_choice(None, refusal='I cannot help'), "the model refuses: 'I cannot help'"),
    (odd_choice(None, 'length', reasoning_content='let me think'), 'only thought (reasoning_content, 12 characters)'),
    (odd_choice('{"tone": "Friendly", "spam": true}'), 'tone is "Friendly", "friendly" in another case or type'),
    (odd_choice('{"tone": "friendly", "spam": "True"}'), 'spam is "True", true in another case or type'),
    (odd_choice('{"tone": "rude", "spam": true}'), 'tone is "rude", not one of "neutral", "friendly"'),
    (odd_choice('{"spam": true}'), 'it has no tone'), (odd_choice('{}', 'content_filter'), 'content_filter'),
    ({'choices': []}, 'it has no JSON object'), ({'usage': {'prompt_tokens': 'x'}}, 'it has no JSON object')])
def test_an_answer_that_is_none_is_explained(reply, why, capsys):
    fake = Fake(lambda n, body: reply)
    with pytest.raises(Stopped) as stopped:
        ask([fake], numbered(30), in_flight=2)
    assert why in str(stopped.value) and why in capsys.readouterr().out


# -----------------------------------------------------------------------------
# keys


@pytest.mark.parametrize('value, key', [('sk-a-live-77\n', 'sk-a-live-77'), (' sk-a-live-77\r\n', 'sk-a-live-77'),
                                        ('', ''), ('a b', 'a b')])
def test_a_key_is_read_without_the_white_space_around_it(monkeypatch, value, key):
    monkeypatch.setenv('TEACHER_API_KEY', value)
    assert read_key('TEACHER_API_KEY') == key
    fake = Fake()
    ask([fake], ['a'])
    assert fake.keys == {f'Bearer {key}' if key else None}


@pytest.mark.parametrize('value, named', [
    ('sk-\u201cquoted-77', 'character 4 is U+201C'), ('sk-\nlive-secret', 'character 4 is U+000A'),
    ('\ufeffsk-77', 'U+FEFF'), ('  \n', 'only white space'), ('sk-caf\xe9', 'U+00E9'), ('\udcff-live', 'U+DCFF')])
def test_a_key_that_no_header_takes_is_refused_by_the_name_of_its_variable(monkeypatch, value, named):
    monkeypatch.setenv('TEACHER_API_KEY', value)
    with pytest.raises(SystemExit) as stopped:
        Server(['http://x/v1'], 'm', Schema(FIELDS), '{text}')
    message = str(stopped.value)
    assert message.startswith('TEACHER_API_KEY') and named in message and 'live' not in message and '77' not in message


def test_keys_are_hidden_in_whatever_way_they_are_written():
    key = check_key('sk/a+"77\\x=', 'KEY')
    for text in (key, f'Illegal {key.encode()!r}', json.dumps({'a': key}), quote(key), quote(key, safe=''),
                 f'é{key}\n'):
        assert '77' not in hide_keys(text) and len(hide_keys(text)) == len(text), text
        assert b'77' not in hide_keys(text.encode())

    async def parts(size, body=b'head ' + key.encode() * 2 + b' sk/ tail sk'):
        for n in range(0, len(body), size):
            yield body[n:n + size]

    async def collect(size):
        return b''.join([part async for part in hide_in_stream(parts(size))])
    for size in range(1, 30):
        assert asyncio.run(collect(size)) == b'head ' + b'*' * 2 * len(key) + b' sk/ tail sk'


@pytest.mark.slow
def test_no_failure_shows_the_key(monkeypatch, capsys):
    monkeypatch.setenv('TEACHER_API_KEY', KEY)
    echo = f'wrong key: Bearer {KEY}'
    free = f'http://127.0.0.1:{free_port()}/v1'
    fakes = [Fake(lambda n, body, odd=odd: odd) for odd in (
        (401, echo, {}), (400, echo, {}), (500, echo, {}), (429, echo, {}), (403, echo, {}), (402, echo, {}),
        (308, echo, {'location': f'https://x/v1?key={KEY}'}), {'error': {'message': echo}}, {'error': echo}, echo,
        (500, echo.encode(), {}), echo.encode(), odd_choice(echo), odd_choice(None, refusal=echo), 'hang', 'cut',
        (200, {}, {f'x {KEY}': 'an illegal header'}))]
    for url in [fake.url for fake in fakes] + [free, fakes[0].url.replace('http:', 'https:'),
                                               'http://nowhere.invalid/v1', 'http://[::1', 'http://',
                                               f'http://u:{KEY}@127.0.0.1:9/v1']:
        server = Server([url], 'm', Schema(FIELDS), '{text}', in_flight=1, patience=0.3, timeout=0.5)
        with pytest.raises(Stopped) as stopped:
            [*server.answered([[(n, [n], None)] for n in range(25)], lambda ids: f'text {ids[0]}')]
        printed = capsys.readouterr()
        assert KEY not in str(stopped.value) + printed.out + printed.err + server.problem, url


@pytest.mark.parametrize('behave, settings, message', [
    (lambda n, body: 401 if n > 3 else None, {}, 'says 401'),
    (lambda n, body: 500, {'patience': 1}, 'no answer for 1 seconds'),
    (lambda n, body: 404, {}, 'says 404'), (lambda n, body: 400, {}, 'refuses every request'),
    (lambda n, body: 'Sorry!', {}, "none has an answer that fits the schema; the last one: 'Sorry!'"),
    (lambda n, body: None, {'price_in': 1e4, 'max_cost': 5.0}, 'would exceed max_cost = 5')])
def test_a_server_that_cannot_be_used_ends_the_work_with_a_sentence(behave, settings, message):
    with pytest.raises(Stopped, match=message):
        ask([Fake(behave)], [f'text {n}' for n in range(30)], in_flight=2, **settings)


# -----------------------------------------------------------------------------
# extract.py


def stored_answers(root):
    """{text: answer} of what extract.py has stored, without the texts that have none."""
    shards = data.Shards('toy', 'toy', root / 'data')
    space = shards_space(shards)
    return {space.tokenizer.decode(shards.ids(i).tolist()): space.to_json(shards.answer(i).tolist())
            for i in range(len(shards))}


def shards_space(shards):
    return OutputSpace.from_task(Tokenizer.from_file(str(shards.folder / 'tokenizer.json')), shards.meta)


def arguments(fake, teachers, *more):
    return [f'--teacher={fake.url}', '--teacher_model=m', f'--tokenizer={teachers["gemma"]}', '--prompt=label: {text}',
            '--calibrate=0', *more]


@pytest.mark.slow
def test_extract_asks_a_server_trains_and_pays_no_text_twice(project, teachers, tmp_path, monkeypatch):
    monkeypatch.setenv('TEACHER_API_KEY', KEY)
    root, fake = clone_task(project, tmp_path), Fake()
    first = run(root, 'extract.py', *arguments(fake, teachers, '--price_in=10', '--price_out=10', '--max_cost=0.06'))
    assert 'would exceed max_cost = 0.06' in one_line(first) and 'plan ' in first.stdout + first.stderr
    n_first = sum(fake.texts.values())
    assert 50 <= n_first <= 54                              # 0.0011 each
    done = run(root, 'extract.py', *arguments(fake, teachers))
    assert done.returncode == 0, done.stderr
    assert f'holds {n_first} texts' in done.stdout and set(fake.texts.values()) == {1}
    figures = dict(pair.split('=') for pair in next(
        line for line in done.stdout.splitlines() if line.startswith('server ')).split()[1:])
    assert int(figures['answered']) + n_first == len(fake.texts) and float(figures['outside']) < 0.01
    answers = stored_answers(root)
    assert answers and {*answers} == {*fake.texts}
    for text, answer in answers.items():
        assert answer == {'tone': ('friendly', 'neutral')[len(text) % 2], 'spam': 'buy' in text}
    shards = data.Shards('toy', 'toy', root / 'data')
    space, probability = shards_space(shards), []
    for i in range(20):
        outs, logits = shards.answer(i).tolist(), shards.logits(i)
        for state, out, row in zip(space.states_before(outs), outs, logits):
            legal = [*space.transitions[state]]
            if len(legal) > 1:
                probability.append(float(np.exp(row[out]) / np.exp(row[legal]).sum()))
    assert {round(p, 2) for p in probability} == {0.75, 0.9}
    assert run(root, 'train.py', '--max_epochs=1').returncode == 0
    asked = run(root, 'sample.py', '--min_confidence=1', '--ask_teacher=True', f'--teacher={fake.url}',
                '--text=buy it now')
    assert json.loads(asked.stdout) == {'tone': 'friendly', 'spam': True, '_teacher': True}
    calibrated = run(root, 'extract.py', *arguments(Fake(), teachers), '--name=calibrated', '--calibrate=60',
                     '--prior={"spam": {True: 0.5}}')
    assert calibrated.returncode == 0 and 'calibrate field=tone texts=' in calibrated.stdout, calibrated.stderr
    assert 'spam' in data.Shards('toy', 'calibrated', root / 'data').meta['value_bias']
    assert all(KEY not in path.read_bytes().decode('latin-1') for path in root.rglob('*') if path.is_file())
    assert KEY not in first.stdout + first.stderr + done.stdout + done.stderr
    for args, message in (([*arguments(fake, teachers)[:1]], 'teacher_model is missing'),
                          (arguments(fake, teachers, '--max_cost=1'), 'max_cost needs price_in')):
        assert message in one_line(run(root, 'extract.py', *args, '--name=other'))


@pytest.mark.slow
def test_a_killed_run_loses_at_most_what_is_in_flight(project, teachers, tmp_path):
    root = clone_task(project, tmp_path)
    fake = Fake(lambda n, body: time.sleep(0.05))
    command = [sys.executable, 'extract.py', 'config/toy.py', *arguments(fake, teachers, '--in_flight=8')]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and sum(fake.texts.values()) < 40:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    asked = sum(fake.texts.values())
    assert 40 <= asked < 200
    kept = {*fake.texts} - {text for text, n in fake.texts.items() if n > 1}
    done = run(root, 'extract.py', *arguments(fake, teachers))
    assert done.returncode == 0, done.stderr
    twice = [text for text, n in fake.texts.items() if n > 1]   # under way, or come while others were being written
    assert len(twice) <= 8 + 8 and set(fake.texts.values()) <= {1, 2} and kept
    assert {*stored_answers(root)} == {*fake.texts}


@pytest.mark.slow
def test_a_server_that_is_gone_ends_the_run_and_the_records_stay(project, teachers, tmp_path):
    root, dead = clone_task(project, tmp_path), Fake(lambda n, body: 503 if n > 30 else None)
    done = run(root, 'extract.py', *arguments(dead, teachers, '--patience=1'))
    assert done.returncode == 1 and 'no answer for 1 seconds' in one_line(done) and 'are safe' in done.stderr
    assert len(stored_answers(root)) == 30
    gone = run(root, 'extract.py', *arguments(dead, teachers, '--patience=1', '--teacher=http://127.0.0.1:9/v1'))
    assert gone.returncode == 1 and '30 records are safe' in one_line(gone)


@pytest.mark.slow
def test_answers_that_were_dropped_are_counted_apart_and_asked_for_again(project, teachers, tmp_path):
    root, mood = clone_task(project, tmp_path), {'content': '{"tone": "Friendly", "spam": true}'}
    fake = Fake(lambda n, body: mood['content'])
    broken = one_line(run(root, 'extract.py', *arguments(fake, teachers)))
    assert 'tone is "Friendly", "friendly" in another case' in broken and '0 records are safe, and ' in broken
    n_dropped = int(broken.partition('safe, and ')[2].split()[0])
    assert 0 < n_dropped < 200 and '--ask_again=True' in broken  # of 400; how many are under way depends on the machine
    mood['content'] = None                                  # repaired
    plain = run(root, 'extract.py', *arguments(fake, teachers))
    n_answered = len(stored_answers(root))
    assert plain.returncode == 0 and f'holds {n_dropped} texts' in plain.stdout
    mood['content'] = 'Sorry!'
    again = run(root, 'extract.py', *arguments(fake, teachers), '--ask_again=True')
    assert f'holds {n_answered} texts, {n_dropped} are to do' in again.stdout
    assert f'{n_answered} records are safe, and {n_dropped} texts' in again.stderr or again.returncode == 0
    assert len(stored_answers(root)) == n_answered
    mood['content'] = None
    again = run(root, 'extract.py', *arguments(fake, teachers), '--ask_again=True')
    assert again.returncode == 0, again.stderr
    answers = stored_answers(root)
    assert (len(answers) == n_answered + n_dropped
            and 'dropped' not in again.stdout.partition('extract ')[2].partition('\n')[0])
    last = run(root, 'extract.py', *arguments(fake, teachers), '--ask_again=True')
    assert f'holds {len(answers)} texts, 0 are to do' in last.stdout and stored_answers(root) == answers
    meta = json.loads((root / 'data/toy/toy-00/meta.json').read_text())
    assert meta['dropped'] == {} and run(root, 'train.py', '--max_epochs=1').returncode == 0
