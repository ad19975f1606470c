"""serve.py with a student whose answers are copied from the text: schemas with texts, numbers, dates; extraction."""
import asyncio
import copy
import importlib.metadata
import json
import os
import random

import pytest
import torch

from tests.conftest import ROOT, save_bert
from tests.served import PROMPT, json_schema, of, post_all, serving

import httpx

from distil.candidates import read_locale
from distil.checkpoint import CHECKPOINT
from distil.labeler import Labeler, merge_spans
from distil.reader import keep_options_apart, load_encoder
from distil.space import OutputSpace, clean, tokenizer_hash
from model import Student, StudentConfig
from serve.app import Handler, make_app
from serve.extraction import align, map_places
from serve.service import Service
from serve.students import ServedStudent

OR_NULL = {'type': ['string', 'null']}
DATE = {'type': 'string', 'format': 'date'}
FIELDS = {'tone': ['calm', 'angry'], 'name': OR_NULL, 'amount': {'type': ['number', 'null']},
          'word': {'type': 'string'}, 'count': {'type': 'integer'}, 'due': {'anyOf': [DATE, {'type': 'null'}]},
          'at': {'anyOf': [{'type': 'string', 'format': 'time'}, {'type': 'null'}]},
          'meeting': {'anyOf': [{'type': 'string', 'format': 'date-time'}, {'type': 'null'}]},
          'people': {'type': 'array', 'maxItems': 3, 'items': {'type': 'string'}},
          'sums': {'type': 'array', 'maxItems': 2, 'items': {'type': 'number'}},
          'buyer': {'type': 'object', 'properties': {'name': {'type': 'string'}, 'city': OR_NULL},
                    'required': ['name', 'city']},
          'seller': {'anyOf': [of({'name': {'type': 'string'}}), {'type': 'null'}]},
          'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui']}}}
TEXTS = ['Anna sent 3 cups and 12.5 plates to Bob', 'on 2026-03-05 at 14:30 we met Eve',
         'no  numbers\n\there, friend 😀', 'the cat 7', 'Bob and 5 May 2026 9:15 and then 4',
         '😀 日本 said hello to the cat']


def save_student(folder, bert, tokenizer, fields, seed=1, max_text=1200, **more):
    """writes a tiny student of these fields, with random weights, as train.py does."""
    torch.manual_seed(seed)
    space = OutputSpace(tokenizer, fields, end_id=2, auxiliary=range(4, 60), locale=read_locale('en_US'), **more)
    encoder, V = load_encoder(str(bert)), len(space.output_ids)
    if space.has_options:
        keep_options_apart(encoder)
    config = StudentConfig(vocab_size=V + 3, output_vocab=V, block_size=1400, n_layer=2, n_head=4, n_kv_head=2,
                           n_embd=16, n_mlp=32, start_id=V, encoder=vars(encoder.config), places=True)
    student = Student(config, encoder)
    for name, p in student.named_parameters():
        p.data *= 1 if name.startswith('encoder.') else 4       # decisions that are not near ties
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    encoder.tokenizer.save(str(folder / 'reader.json'))
    task = {'fields': fields, 'indent': None, 'fence': False, 'end_id': 2, 'output_ids': space.output_ids,
            'prompt': PROMPT, 'tokenizer_hash': tokenizer_hash(tokenizer), 'max_text': max_text,
            'teacher': 'a/teacher', 'fingerprint': '', 'locale': space.locale, 'reference_date': space.reference_date}
    per_field = {field: {'temperature': 0.5 + n / 10} for n, field in enumerate(space.schema.paths)}
    torch.save({'format': CHECKPOINT, 'student': vars(student.config), 'model': student.state_dict(), 'task': task,
                'per_field': per_field}, folder / 'best.pt')


@pytest.fixture(scope='module')
def bert(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp('bert')
    save_bert(folder, words, 'abcdefghijklmnopqrstuvwxyz0123456789.,:-¶•—', layers=2, n_pos=1400)
    return folder


@pytest.fixture(scope='module')
def labeler(tmp_path_factory, bert, tokenizer):
    folder = tmp_path_factory.mktemp('copying') / 'orders'
    save_student(folder, bert, tokenizer, FIELDS)
    return Labeler(folder, 'cpu', confidence='full')


@pytest.fixture(scope='module')
def service(labeler):
    return Service(labeler, 'orders')


@pytest.fixture(scope='module')
def truth(labeler):
    """{text: the student's answer}, from sample.py."""
    return dict(zip(TEXTS, labeler(TEXTS)))


# -----------------------------------------------------------------------------
# sample.py


def test_confidence_full_has_the_likeliest_values_and_null(labeler, truth):
    plain, seen = copy.copy(labeler), {'null': 0, 'value': 0}
    plain.confidence = True
    for (text, record), other in zip(truth.items(), plain(TEXTS)):
        full, sure = record['_confidence'], other['_confidence']
        for part in labeler.space.schema.copied:
            maybe = labeler.space.schema.by_choice.get(f'{part.path}?')
            if part.path not in full:                           # of a list that is shorter, an object that is null
                continue
            shown, value = full[part.path], part.get(record)
            assert 0 < sum(shown.values()) < 1.002 and [*shown.values()] == sorted(shown.values(), reverse=True)
            assert ('null' in shown) == bool(maybe) and len(shown) <= 5 + bool(maybe)
            if value is None:                                   # a required number, and there is none
                assert maybe or '"count": null' in json.dumps(record)
                seen['null'] += len(shown) > 1
            elif part.path == part.group:
                p = sure[part.path] * (1 if part.is_number else sure.get(f'{part.path}?', 1))
                once = clean(text).count(str(value)) == 1
                name = value if part.kind == 'text' else json.dumps(value).strip('"')
                assert shown[name] == pytest.approx(p, abs=3e-4) if once else shown[name] > p - 3e-4, (
                    text, part.path, shown, p)
                seen['value'] += 1
    assert seen['value'] > 3 and seen['null'], seen


def test_a_value_that_stands_twice_has_the_probability_of_both_places(labeler):
    spans = [(0, 4, 'Anna', 0.3), (9, 13, 'Anna', 0.25), (5, 8, 'Bob', 0.4), (20, 21, 1, 0.05)]
    assert merge_spans(spans) == [(0, 4, 'Anna', 0.55), (5, 8, 'Bob', 0.4), (20, 21, 1, 0.05)]
    assert merge_spans(spans, (9, 13, 'Anna'))[0][:2] == (9, 13) and merge_spans(spans, (5, 8, 'Bob'))[0][:2] == (0, 4)
    one, = labeler(['friend'])
    assert {*one['_confidence']['word']} == {'friend'} and one['_confidence']['word']['friend'] == 1


# -----------------------------------------------------------------------------
# schemas


def chat(service, text, schema=None, **more):
    form = {'response_format': json_schema(schema)} if schema else {}
    body = {'messages': [{'role': 'user', 'content': text}], **form, **more}
    reply, = post_all(service, ('/v1/chat/completions', body))
    if reply.status_code != 200:
        return reply.status_code, reply.json()['error']['message']
    return reply.json()['choices'][0]


def nullable(part):
    return {'anyOf': [part, {'type': 'null'}]}


TEXT, NUMBER, WHOLE = {'type': 'string'}, {'type': 'number'}, {'type': 'integer'}


@pytest.mark.parametrize('schema', [
    of({'word': TEXT, 'name': nullable(TEXT)}),
    of({'Word': {**TEXT, 'minLength': 30, 'pattern': '^x', 'description': '?'}}),
    of({'word': nullable({**TEXT, 'maxLength': 0}), 'amount': nullable({**NUMBER, 'minimum': 1e6})}), of({'word': {}}),
    of({'count': nullable(NUMBER), 'due': nullable(DATE)}), of({'count': nullable(WHOLE), 'due': nullable(TEXT)}),
    of({'name': TEXT, 'amount': NUMBER, 'tone': {'enum': ['angry', 'calm']}}, ['tone']),
    of({'people': {'type': 'array', 'items': {**TEXT, 'maxLength': 2}}, 'sums': {'type': 'array', 'items': NUMBER}}),
    of({'buyer': of({'name': TEXT, 'city': nullable(TEXT)}),
        'seller': nullable(of({'name': {**TEXT, 'format': 'email'}}))}),
    of({'buyer.name': TEXT, 'meeting': nullable({**TEXT, 'format': 'date-time'}), 'confidence': NUMBER})])
def test_a_schema_with_texts_numbers_and_dates_gets_the_students(service, truth, schema):
    for text, record in truth.items():
        choice = chat(service, text, schema, logprobs=True)
        answer = json.loads(choice['message']['content'])
        assert ''.join(token['token'] for token in choice['logprobs']['content']) == choice['message']['content']
        for name, value in answer.items():
            if name != 'confidence':
                known = record['buyer']['name'] if name == 'buyer.name' else record[name.lower()]
                assert json.dumps(value) == json.dumps(known)
        left_out = {name for name, value in record.items() if value is None and name not in schema['required']}
        assert {*answer} == {*schema['properties']} - left_out


@pytest.mark.parametrize('schema, why', [
    (of({'word': NUMBER}), "'word' is words of the text in the answers of the student, and the schema asks for number"),
    (of({'word': DATE}), 'asks for a date'), (of({'due': nullable({**TEXT, 'format': 'time'})}), 'asks for a time'),
    (of({'word': {'enum': ['Anna', 'Bob']}}), "'word' is words of the text"),
    (of({'word': {'const': 'a'}}), 'offers "a"'),
    (of({'amount': nullable(WHOLE)}), "'amount' is a number in the text in the answers of the student, and the schema "
     'asks for integer'), (of({'amount': TEXT}), 'asks for string'), (of({'count': {'type': 'boolean'}}), "'count'"),
    (of({'name': TEXT}), "'name' can be null in the answers of the student, but the schema requires a value"),
    (of({'name': nullable(TEXT), 'title': TEXT}), "'title', which is free text"),
    (of({'word': {'type': 'array', 'items': TEXT}}), "'word' is words of the text"),
    (of({'people': {'type': 'array', 'items': NUMBER}}), "'people[]' is words of the text"),
    (of({'people': {'type': 'array', 'items': TEXT, 'maxItems': 2}}), 'too long'),
    (of({'people': TEXT}), "'people' is a list in the answers"),
    (of({'buyer': of({'name': NUMBER})}), "'buyer.name' is words"),
    (of({'seller': of({'name': TEXT})}), "'seller' can be null"),
    (of({'result': TEXT}), "'result', which is free text")])
def test_what_the_student_does_not_copy_is_refused_by_name(service, schema, why):
    status, message = chat(service, TEXTS[0], schema)
    assert status == 400 and why in message, message


def test_a_text_without_a_number_that_the_schema_requires_is_refused(service, truth):
    schema = of({'count': WHOLE, 'word': TEXT})
    assert json.loads(chat(service, TEXTS[0], schema)['message']['content'])['count'] == 3
    status, message = chat(service, TEXTS[2], schema)
    assert status == 422 and message == "the text has nothing to copy for 'count', which is an integer in the text"
    assert json.loads(chat(service, TEXTS[2])['message']['content'])['count'] is None  # no schema


def test_other_routes_answer_with_copied_values(service, truth):
    tool = {'type': 'function', 'function': {'name': 'save', 'parameters': of({'word': TEXT})}}
    form = {'type': 'json_schema', 'name': 'x', 'schema': of({'word': TEXT})}
    question = {'type': 'choice', 'name': 'tone', 'choices': [{'value': 'calm'}, {'value': 'angry'}]}
    for text, record in truth.items():
        label, whole, called, response, decided, metrics = post_all(
            service, ('/v1/label', {'texts': [text, '']}), ('/v1/completions', {'prompt': text}),
            ('/v1/chat/completions', {'messages': [{'role': 'user', 'content': text}], 'tools': [tool]}),
            ('/v1/responses', {'input': text, 'text': {'format': form}}),
            ('/v1/decisions', {'input': text, 'questions': [question]}), ('/v1/label', {}))
        labelled, empty = label.json()['answers']
        assert {key: labelled[key] for key in FIELDS} == {key: record[key] for key in FIELDS}
        assert 'empty' in empty['error']
        assert json.loads(whole.json()['choices'][0]['text']) == {key: record[key] for key in FIELDS}
        arguments = called.json()['choices'][0]['message']['tool_calls'][0]['function']['arguments']
        assert json.loads(arguments) == json.loads(response.json()['output'][0]['content'][0]['text']) == {
            'word': record['word']}
        answer, = decided.json()['answers']
        assert answer['choice'] == record['tone'] and metrics.status_code == 400
    shown = [*service.metrics.values.collect()][0].samples
    assert {sample.labels['value'] for sample in shown if sample.labels['field'] == 'word'} == {'present'}
    assert {sample.labels['value'] for sample in shown if sample.labels['field'] == 'name'} <= {'present', 'null'}


# -----------------------------------------------------------------------------
# extraction

ASKED = {'name': {'type': 'text', 'instructions': 'who?'}, 'amount': {'type': 'number'}, 'word': {'type': 'text'},
         'count': {'type': 'number', 'integer': True}, 'due': {'type': 'date'}, 'at': {'type': 'time'},
         'meeting': {'type': 'datetime'}, 'people': {'type': 'list', 'items': 'text'},
         'sums': {'type': 'list', 'items': 'number'}, 'buyer.name': {'type': 'text'}, 'buyer.city': {'type': 'text'},
         'seller.name': {'type': 'text'}}


def extract(service, state, fields=None, path='/v1/extraction', **more):
    """the reply to an extraction, or (status, error) of it."""
    fields = {name: ASKED[name] for name in fields} if isinstance(fields, (list, tuple)) else fields or ASKED
    reply, = post_all(service, (path, {'model': 'x', 'state': state, 'fields': fields, **more}))
    return reply.json() if reply.status_code == 200 else (reply.status_code, reply.json()['error'])


def value_in(record, name):
    for key in name.split('.'):
        record = record and record[key]
    return record


def check_places(state, answers):
    """asserts that the text at each span is the value."""
    for answer in answers.values():
        spans = [answer['span']] if 'span' in answer else answer.get('spans', [])
        values = answer['value'] if answer['type'] == 'list' else [answer['value']]
        assert answer['value'] is None or len(spans) == len(values)
        for (start, end), value in zip(spans, values):
            said = ' '.join(state[start:end].split())
            if answer['type'] == 'text' or answer.get('items') == 'text':
                assert said == value
            elif answer['type'] == 'number':
                assert float(said.replace(',', '')) == value
            else:
                assert any(char.isdigit() for char in said) or isinstance(value, str)


def test_an_extraction_has_the_students_values_and_where_they_stand(service, truth):
    seen = {'null': 0, 'value': 0}
    for text, record in truth.items():
        for state in (text, text.replace(' ', ' \n\t '), f'  \u3000{text}\r\n', text.replace(' ', '\xa0 ')):
            reply = extract(service, state, options={'return_state_text': True, 'include_quantiles': True})
            answers = reply['answers']
            assert [*reply] == ['model', 'answers', 'truncated', 'state_text', 'usage'] and reply['state_text'] == state
            assert reply['model'] == 'orders' and reply['truncated'] is False and [*answers] == [*ASKED]
            assert reply['usage']['input_tokens'] > 1 and reply['usage']['output_tokens'] > 9
            check_places(state, answers)
            for name, answer in answers.items():
                assert answer['value'] == value_in(record, name) and answer['type'] == ASKED[name]['type']
                assert 0 <= answer['p_null'] <= 1 and 0 <= answer['confidence'] <= 1
                null = answer['value'] is None
                seen['null' if null else 'value'] += 1
                assert null or answer['guess'] == answer['value']
                full = record['_confidence'].get(name)
                if full and 'null' in full:
                    assert answer['p_null'] == pytest.approx(full['null'], abs=2e-2)
                    others = [known for known in full if known != 'null']
                    if null and others and full[others[0]] > 0.05:
                        assert str(answer['guess']) == others[0] and answer['confidence'] == answer['p_null']
                elif name in ('word', 'buyer.name'):
                    assert answer['p_null'] == 0 and answer['confidence'] == pytest.approx(
                        full[answer['value']], abs=2e-2)
    assert min(seen.values()) > 20
    assert 'guess' in extract(service, TEXTS[1], ['due'])['answers']['due']  # one date, whatever the student says


def round_numbers(answer):
    """an answer with its numbers to five places: what is read together is equal up to the rounding of a sum."""
    return json.loads(json.dumps(answer), parse_float=lambda text: round(float(text), 5))


def test_an_answer_does_not_depend_on_the_other_fields(service):
    every = extract(service, TEXTS[1])['answers']
    for name in ASKED:
        alone = extract(service, TEXTS[1], [name])['answers'][name]
        assert json.dumps(round_numbers(alone)) == json.dumps(round_numbers(every[name]))


@pytest.mark.parametrize('path', ['/v1/extractions', '/extraction', '/alpha/extractions', '/api/alpha/extractions',
                                  '/v1/alpha/extractions'])
def test_an_extraction_has_several_paths(service, path):
    assert extract(service, TEXTS[0], path=path) == extract(service, TEXTS[0])


@pytest.mark.parametrize('path', ['/ai/run/orders', '/ai/run/@cf/cloudflare/orders', '/v1/ai/run/@cf/x/y'])
def test_cloudflares_path_wraps_the_reply(service, path):
    reply = extract(service, TEXTS[0], path=path)
    assert reply == {'result': extract(service, TEXTS[0]), 'success': True, 'errors': [], 'messages': []}
    status, error = extract(service, TEXTS[0], {'nothing': {'type': 'text'}}, path)
    assert status == 422 and error['param'] == 'fields.nothing'


def test_a_long_text_is_read_whole_and_a_longer_one_is_cut(service, labeler, words):
    rng = random.Random(3)
    text = ''
    while len(text) < 4000:
        text += rng.choice(['  ', ' ', '\n']) + rng.choice([*words, 'Anna', '😀', '12.50', '2026-03-05', 'é'])
    text = text[:4000]
    reply = extract(service, text)
    n_read = len(labeler.encode(text)[0])
    assert reply['truncated'] == (labeler.encode(text)[2] > 0) and reply['usage']['input_tokens'] == n_read + 1
    check_places(text, reply['answers'])
    assert max(answer['span'][1] for answer in reply['answers'].values() if 'span' in answer) > 100
    longer = extract(service, text * 3)
    assert longer['truncated'] is True
    check_places(text * 3, longer['answers'])
    status, error = extract(service, '  \n ')
    assert status == 400 and (error['message'], error['param']) == ('empty text', 'state')


def test_places_survive_what_a_tokenizer_cannot_write():
    state = ' ab\n\n cd😀  ef gh '
    place = map_places('ab cd😀 ef gh', state)
    assert [state[slice(*place(n, n + 2))] for n in (0, 3, 7)] == ['ab', 'cd', 'ef'] and place(5, 6) == [8, 9]
    assert state[slice(*map_places('ab cd😀 e', state)(3, 6))] == 'cd😀'
    assert state[slice(*map_places('d😀 ef gh', state, from_end=True)(3, 8))] == 'ef gh'
    for read, at in (('ab cd\ufffd\ufffd ef gh', 8), ('ab cd ef gh', 6), ('ab cd<unknown> ef gh', 15),
                     ('xab cd😀 ef gh', 8)):
        place = map_places(read, state)
        assert state[slice(*place(at, at + 2))] == 'ef', read
    assert len(align('x' * 5000, 'y' * 5000)) == 5000 and map_places('a', 'a')(0, 1) == [0, 1]


@pytest.mark.slow
def test_null_threshold_decides_between_null_and_the_guess(service):
    for text in TEXTS:
        reply = extract(service, text, ['name', 'amount', 'due', 'buyer.city', 'seller.name'])
        for pick in (lambda p: 0.0, lambda p: p * 0.9, lambda p: min(1.0, p * 1.1 + 0.01), lambda p: 1):
            fields = {name: {**ASKED[name], 'null_threshold': pick(answer['p_null'])}
                      for name, answer in reply['answers'].items()}
            for name, other in extract(service, text, fields)['answers'].items():
                p, guess = reply['answers'][name]['p_null'], reply['answers'][name].get('guess')
                assert other['p_null'] == pytest.approx(p, abs=1e-3) and other.get('guess') == guess
                assert other['value'] == (None if p > fields[name]['null_threshold'] else guess)
                assert ('span' in other) == (other['value'] is not None)
                if other['value'] is not None:
                    check_places(text, {name: other})
                    assert other['confidence'] <= 1 - p + 1e-3


def test_numbers_are_rounded_and_whole_if_asked(service, truth):
    text = TEXTS[0]                                             # 3 and 12.5
    own = truth[text]['amount']
    spec = {'type': 'number', 'null_threshold': 1}
    for decimals in (0, 1, 2.0):
        answer = extract(service, text, {'amount': {**spec, 'decimals': decimals, 'unit': 'EUR'}})['answers']['amount']
        assert answer['value'] == round(own or answer['guess'], int(decimals)) and 'unit' not in answer
    answer = extract(service, text, {'amount': {**spec, 'integer': True}})['answers']['amount']
    assert answer.get('guess', 3) == 3 and answer['value'] in ((3, None) if own in (3, None) else (None,))
    answer = extract(service, 'he paid 4.25', {'amount': {**spec, 'integer': True}})['answers']['amount']
    assert answer['value'] is None and 'guess' not in answer and answer['confidence'] in (answer['p_null'], 1)
    reply, = post_all(service, ('/v1/extraction', {'state': text, 'fields': {'amount': {**spec, 'unit': 'EUR'}}}))
    assert reply.headers['x-ignored'] == 'fields.amount.unit' and reply.headers['x-answered-by'] == 'student'
    fields = {'sums': {'type': 'list', 'items': 'number', 'decimals': 1}}
    assert {*extract(service, 'x 1.25 y 2.5', fields)['answers']['sums']['value']} <= {1.2, 2.5}


def test_a_request_has_its_own_reference_date(service, labeler):
    spec = {'due': {'type': 'date', 'null_threshold': 1}}
    for day, value in (('2026-05-01', '2026-05-03'), ('2024-12-31', '2025-05-03'), ('2026-05-02', '2026-05-03')):
        reply = extract(service, 'see you on  May 3', spec, reference_date=day)
        assert reply['answers']['due']['value'] == value and reply['answers']['due']['span'] == [12, 17]
        reply = extract(service, 'we went home tomorrow', spec, reference_date=day)
        assert reply['answers']['due']['value'][:4] in (day[:4], '2025')
    none = extract(service, 'see you on May 3', spec)['answers']['due']
    assert none['value'] is None and none['p_null'] == none['confidence'] == 1 and labeler.space.reference_date is None
    assert service.space_on('') is service.space_on(None or '') is labeler.space
    assert service.space_on('2026-05-01').reference_date == '2026-05-01'


@pytest.mark.parametrize('fields, status, why, param', [
    ({'title': {'type': 'text'}}, 422, "the student does not copy 'title'; it copies: name (text), amount (number), "
     'word (text), count (number), due (date), at (time), meeting (datetime), people (list of text), sums (list of '
     'number), buyer.name (text), buyer.city (text), seller.name (text)', 'fields.title'),
    ({'tone': {'type': 'text'}}, 422, "'tone' is a choice of the student (calm, angry), not copied from the text: use "
     '/v1/decisions', 'fields.tone'),
    ({'labels': {'type': 'list', 'items': 'text'}}, 422, "'labels' is a choice of the student (some of bug, ui)",
     'fields.labels'),
    ({'amount': {'type': 'text'}}, 422, "the field 'amount' of the student is a number in the text, not text",
     'fields.amount.type'),
    ({'name': {'type': 'date'}}, 422, 'is words of the text, not date', 'fields.name.type'),
    ({'people': {'type': 'text'}}, 422, 'is a list, each item words of the text, not text', 'fields.people.type'),
    ({'people': {'type': 'list', 'items': 'number'}}, 422, 'not a list of number', 'fields.people.type'),
    ({'people': {'type': 'list'}}, 422, 'fields.people.items must be text, number or date', 'fields.people.items'),
    ({'people': {'type': 'list', 'items': 'time'}}, 422, 'must be text, number or date', 'fields.people.items'),
    ({'name': {'type': 'list', 'items': 'text'}}, 422, 'is words of the text, not a list of text', 'fields.name.type'),
    ({'buyer': {'type': 'text'}}, 422, "does not copy 'buyer'", 'fields.buyer'),
    ({'eta': {'type': 'duration'}}, 400, "'eta' is a duration: the student copies what", 'fields.eta.type'),
    ({'cost': {'type': 'estimate', 'min': 0, 'max': 9}}, 400, "'cost' is an estimate", 'fields.cost.type'),
    ({'cost': {'type': 'forecast'}}, 400, "'cost' is a forecast", 'fields.cost.type'),
    ({'name': {'type': 'string'}}, 422, 'must be one of text, number, date, time, datetime, list', 'fields.name.type'),
    ({'name': {}}, 422, "the type of the field 'name'", 'fields.name.type'),
    ({'name': 'text'}, 422, 'object', 'fields.name'),
    ({'name': {'type': ['text']}}, 422, "the type of the field 'name'", 'fields.name.type'),
    ({'name': {'type': 'text', 'decimals': 2}}, 422, "no option 'decimals'", 'fields.name.decimals'),
    ({'name': {'type': 'text', 'enum': ['a']}}, 422, "no option 'enum'", 'fields.name.enum'),
    ({'name': {'type': 'text', 'instructions': 5}}, 422, 'instructions must be a string', 'fields.name.instructions'),
    ({'amount': {'type': 'number', 'decimals': 7}}, 422, 'decimals must be a whole number', 'fields.amount.decimals'),
    ({'amount': {'type': 'number', 'integer': 1}}, 422, 'integer must be true or false', 'fields.amount.integer'),
    ({'name': {'type': 'text', 'null_threshold': 2}}, 422, 'from 0 to 1', 'fields.name.null_threshold'),
    ({'name': {'type': 'text', 'null_threshold': True}}, 422, 'from 0 to 1', 'fields.name.null_threshold'),
    ({'1name': {'type': 'text'}}, 422, "'1name' is no name of a field", 'fields.1name'),
    ({'n' * 65: {'type': 'text'}}, 422, 'is no name of a field', f'fields.{"n" * 65}'),
    ({f'f{n}': {'type': 'text'} for n in range(101)}, 422, 'there are 101 fields; 1 to 100 are allowed', 'fields')])
def test_a_field_without_an_answer_is_refused_by_name(service, fields, status, why, param):
    found, error = extract(service, TEXTS[0], fields)
    assert (found, error['param']) == (status, param) and why in error['message'], error


@pytest.mark.parametrize('more, status, param', [
    ({'images': ['data:image/png;base64,x']}, 400, 'images'), ({'assets': {'a': 1}}, 400, 'assets'),
    ({'state': 5}, 422, 'state'), ({'state': None}, 422, 'state'), ({'fields': []}, 422, 'fields'),
    ({'fields': {}}, 422, 'fields'), ({'fields': None}, 422, 'fields'),
    ({'reference_date': 'May 3'}, 422, 'reference_date'), ({'reference_date': 5}, 422, 'reference_date'),
    ({'options': []}, 200, ''), ({'options': 5}, 422, 'options'), ({'stream': True}, 400, 'stream'),
    ({'options': {'return_state_text': 'x'}}, 400, 'return_state_text'),
    ({'images': [], 'options': None, 'user': 'me', 'reference_date': None}, 200, '')])
def test_a_wrong_extraction_is_refused_with_its_parameter(service, more, status, param):
    body = {'state': TEXTS[0], 'fields': {'name': {'type': 'text', 'null_threshold': None}}, **more}
    reply, = post_all(service, ('/v1/extraction', body))
    assert reply.status_code == status, reply.text
    assert status == 200 or reply.json()['error']['param'] == param


def test_a_student_that_copies_nothing_refuses_extractions(tmp_path, teachers, tokenizer):
    from tests.served import save_student as save_plain
    space = OutputSpace(tokenizer, {'tone': ['calm', 'angry']}, end_id=2)
    save_plain(tmp_path / 'plain', teachers, space, {'fields': {'tone': ['calm', 'angry']}})
    status, error = extract(Service(Labeler(tmp_path / 'plain', 'cpu'), 'plain'), 'hello', {'tone': {'type': 'text'}})
    assert status == 400 and error['param'] == 'fields'
    assert 'plain copies nothing from a text; its fields are choices: tone (calm, angry)' in error['message']


@pytest.mark.slow
def test_many_requests_at_once_have_the_answers_of_each_alone(service):
    texts, days = (*TEXTS, 'by May 3', 'tomorrow at 14:30'), (None, '2026-05-01', '2024-12-31')
    bodies = [{'state': text, 'fields': ASKED, 'reference_date': day} for text in texts for day in days]
    alone = [reply.json() for reply in post_all(service, *(('/v1/extraction', body) for body in bodies))]

    async def go():
        transport = httpx.ASGITransport(make_app([ServedStudent(service)], service.metrics))
        async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
            replies = await asyncio.gather(*(client.post('/v1/extraction', json=body) for body in bodies))
            return [reply.json() for reply in replies]
    for reply, other in zip(asyncio.run(go()), alone):
        for name, answer in reply['answers'].items():
            known = other['answers'][name]
            assert answer['value'] == known['value'] and answer.get('span') == known.get('span')
            assert answer['p_null'] == pytest.approx(known['p_null'], abs=1e-2)


class Upstream:
    """an LLM that answers the same to every text; one of its names is not in the text."""

    async def answer(self, text):
        return {'tone': 'calm', 'name': None, 'amount': 12.5, 'word': 'plates', 'count': 3, 'due': None, 'at': None,
                'meeting': None, 'people': ['Bob', 'Anna'], 'sums': [3], 'buyer': {'name': 'Zoe', 'city': None},
                'seller': None, 'labels': []}


def test_what_upstream_answers_has_the_places_of_its_values(labeler):
    unsure = copy.copy(labeler)
    unsure.min_confidence = 2.0
    deferring, state = Service(unsure, 'orders', upstream=Upstream()), TEXTS[0].replace(' ', '  ')
    reply, = post_all(deferring, ('/v1/extraction', {'state': state, 'fields': ASKED}))
    answers, record = reply.json()['answers'], asyncio.run(Upstream().answer(''))
    assert reply.headers['x-answered-by'] == 'upstream'
    for name, answer in answers.items():
        null = value_in(record, name) is None
        assert answer['value'] == value_in(record, name) and answer['p_null'] == null and answer['confidence'] == 1
    check_places(state, {name: answer for name, answer in answers.items() if name != 'buyer.name'})
    assert 'span' not in answers['buyer.name'] and state[slice(*answers['people']['spans'][1])] == 'Anna'
    alone = extract(Service(unsure, 'orders'), state)           # nobody is there to ask
    assert alone['answers']['word']['value'] == labeler([state])[0]['word']


def test_a_batch_may_have_extractions(service):
    body = {'state': TEXTS[0], 'fields': ASKED}
    line = Handler([ServedStudent(service)], None).answer_batch_line('/v1/extraction', body)
    assert asyncio.run(line) == extract(service, TEXTS[0])


@pytest.fixture(scope='module')
def address(tmp_path_factory, bert, tokenizer):
    """where serve.py serves the student, as a user starts it: http://host:port"""
    root = tmp_path_factory.mktemp('served_orders')
    for path in ('config/__init__.py', 'data/__init__.py', 'serve/serve.py'):
        (root / path).parent.mkdir(exist_ok=True)
        os.symlink(ROOT / path, root / path)
    (root / 'config/toy.py').write_text(f'name = "orders"\nfields = {FIELDS!r}\nprompt = {PROMPT!r}\n')
    save_student(root / 'out/orders', bert, tokenizer, FIELDS)
    with serving(root) as (_, url):
        yield url.removesuffix('/v1')


def test_the_server_answers_from_its_files(address, service):
    body = {'state': 'Bob  met us on May 3, 2026 at 14:30', 'fields': ASKED, 'reference_date': '2026-05-01'}
    reply = httpx.post(f'{address}/v1/extraction', json=body).json()
    check_places(body['state'], reply['answers'])
    assert [*reply['answers']] == [*ASKED] and reply['answers']['due']['guess'] == '2026-05-03'
    assert httpx.get(f'{address}/v1/models').json()['models'][0]['description'].startswith('answers tone, name, amount')


def test_litellms_client_reads_an_extraction(address, monkeypatch):
    monkeypatch.setenv('LITELLM_LOCAL_MODEL_COST_MAP', 'True')  # it would fetch one
    litellm = pytest.importorskip('litellm')
    if tuple(map(int, importlib.metadata.version('litellm').split('.')[:2])) < (1, 110):
        pytest.skip('litellm is older than 1.110')
    state, call = TEXTS[0].replace(' ', '  '), {'api_key': 'any', 'api_base': address}
    for model in ('cloudflare/orders', 'cloudflare/@cf/cloudflare/orders'):
        reply = litellm.extraction(model=model, state=state, fields=ASKED, reference_date='2026-05-01',
                                   options={'return_state_text': True}, **call)
        assert reply.state_text == state and reply.truncated is False and reply.usage.input_tokens > 1
        answers = {name: answer.model_dump(exclude_none=True) | {'value': answer.value}
                   for name, answer in reply.answers.items()}
        assert [*answers] == [*ASKED]
        check_places(state, answers)
    call |= {'model': 'cloudflare/orders', 'state': state}
    later = asyncio.run(litellm.aextraction(fields={'word': {'type': 'text'}}, **call))
    assert later.answers['word'].value == reply.answers['word'].value
    with pytest.raises(litellm.BadRequestError, match="does not copy 'title'"):
        litellm.extraction(fields={'title': {'type': 'text'}}, **call)
    with pytest.raises(litellm.BadRequestError, match='is an estimate'):
        litellm.extraction(fields={'x': {'type': 'estimate', 'min': 0, 'max': 2}}, **call)
