"""serve.py with a student whose answers are copied from the text: schemas with texts, numbers and dates, and extraction."""
import asyncio
import copy
import importlib.metadata
import json
import random
import shutil

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.served import PROMPT, json_schema, of, post_all

import jsonschema

from distil.candidates import read_locale
from distil.checkpoint import CHECKPOINT
from distil.labeler import Labeler, merge_spans
from distil.reader import load_encoder
from distil.space import OutputSpace, clean, tokenizer_hash
from model import Student, StudentConfig
from serve.service import Service

OR_NULL = {'type': ['string', 'null']}
DATE = {'type': 'string', 'format': 'date'}
FIELDS = {'tone': ['calm', 'angry'], 'name': OR_NULL, 'amount': {'type': ['number', 'null']}, 'word': {'type': 'string'},
          'count': {'type': 'integer'}, 'due': {'anyOf': [DATE, {'type': 'null'}]},
          'at': {'anyOf': [{'type': 'string', 'format': 'time'}, {'type': 'null'}]},
          'meeting': {'anyOf': [{'type': 'string', 'format': 'date-time'}, {'type': 'null'}]},
          'people': {'type': 'array', 'maxItems': 3, 'items': {'type': 'string'}},
          'sums': {'type': 'array', 'maxItems': 2, 'items': {'type': 'number'}},
          'buyer': {'type': 'object', 'properties': {'name': {'type': 'string'}, 'city': OR_NULL},
                    'required': ['name', 'city']},
          'seller': {'anyOf': [of({'name': {'type': 'string'}}), {'type': 'null'}]},
          'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui']}}}
TEXTS = ['Anna sent 3 cups and 12.5 plates to Bob', 'on 2026-03-05 at 14:30 we met Eve', 'no  numbers\n\there, friend 😀',
         'the cat 7', 'Bob and 5 May 2026 9:15 and then 4', '😀 日本 said hello to the cat']


def make_bert(folder, words, n_pos=1400):
    """writes a small BERT with random weights, and its tokenizer, which knows all letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    tokenizer.train_from_iterator([' '.join([*words, *'abcdefghijklmnopqrstuvwxyz0123456789.,:-'])] * 4,
                                  trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
                                     num_attention_heads=4, intermediate_size=64, max_position_embeddings=n_pos,
                                     initializer_range=0.2)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token='[UNK]', pad_token='[PAD]', cls_token='[CLS]', sep_token='[SEP]',
        mask_token='[MASK]').save_pretrained(folder)


def save_student(folder, bert, tokenizer, fields, seed=1, max_text=1200, **more):
    """writes a tiny student of these fields, with random weights, as train.py does."""
    torch.manual_seed(seed)
    space = OutputSpace(tokenizer, fields, end_id=2, auxiliary=range(4, 60), locale=read_locale('en_US'), **more)
    encoder, V = load_encoder(str(bert)), len(space.output_ids)
    student = Student(StudentConfig(vocab_size=V + 1, output_vocab=V, block_size=1400, n_layer=2, n_head=4, n_kv_head=2,
                                    n_embd=16, n_mlp=32, start_id=V, encoder=vars(encoder.config), places=True), encoder)
    for name, p in student.named_parameters():
        p.data *= 1 if name.startswith('encoder.') else 4       # decisions that are not near ties
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    encoder.tokenizer.save(str(folder / 'reader.json'))
    task = {'fields': fields, 'indent': None, 'fence': False, 'end_id': 2, 'output_ids': space.output_ids, 'prompt': PROMPT,
            'tokenizer_hash': tokenizer_hash(tokenizer), 'max_text': max_text, 'teacher': 'a/teacher', 'fingerprint': '',
            'locale': space.locale, 'reference_date': space.reference_date}
    per_field = {field: {'temperature': 0.5 + n / 10} for n, field in enumerate(space.schema.paths)}
    torch.save({'format': CHECKPOINT, 'student': vars(student.config), 'model': student.state_dict(), 'task': task,
                'per_field': per_field}, folder / 'best.pt')


@pytest.fixture(scope='module')
def bert(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp('bert')
    make_bert(folder, words)
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
                p = sure[part.path] * (sure.get(f'{part.path}?', 1) if part.kind == 'text' else 1)
                once = clean(text).count(str(value)) == 1
                name = value if part.kind == 'text' else json.dumps(value).strip('"')
                assert shown[name] == pytest.approx(p, abs=3e-4) if once else shown[name] > p - 3e-4, (text, part.path, shown)
                seen['value'] += 1
    assert min(seen.values()) > 4, seen


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
    of({'word': TEXT, 'name': nullable(TEXT)}), of({'Word': {**TEXT, 'minLength': 30, 'pattern': '^x', 'description': '?'}}),
    of({'word': nullable({**TEXT, 'maxLength': 0}), 'amount': nullable({**NUMBER, 'minimum': 1e6})}), of({'word': {}}),
    of({'count': nullable(NUMBER), 'due': nullable(DATE)}), of({'count': nullable(WHOLE), 'due': nullable(TEXT)}),
    of({'name': TEXT, 'amount': NUMBER, 'tone': {'enum': ['angry', 'calm']}}, ['tone']),
    of({'people': {'type': 'array', 'items': {**TEXT, 'maxLength': 2}}, 'sums': {'type': 'array', 'items': NUMBER}}),
    of({'buyer': of({'name': TEXT, 'city': nullable(TEXT)}), 'seller': nullable(of({'name': {**TEXT, 'format': 'email'}}))}),
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
        left_out = {name for name in schema['properties'] if record.get(name, 0) is None and name not in schema['required']}
        assert {*answer} == {*schema['properties']} - left_out


@pytest.mark.parametrize('schema, why', [
    (of({'word': NUMBER}), "'word' is words of the text in the answers of the student, and the schema asks for number"),
    (of({'word': DATE}), 'asks for a date'), (of({'due': nullable({**TEXT, 'format': 'time'})}), 'asks for a time'),
    (of({'word': {'enum': ['Anna', 'Bob']}}), "'word' is words of the text"), (of({'word': {'const': 'a'}}), 'offers "a"'),
    (of({'amount': nullable(WHOLE)}), "'amount' is a number in the text in the answers of the student, and the schema asks "
     'for integer'), (of({'amount': TEXT}), 'asks for string'), (of({'count': {'type': 'boolean'}}), "'count'"),
    (of({'name': TEXT}), "'name' can be null in the answers of the student, but the schema requires a value"),
    (of({'name': nullable(TEXT), 'title': TEXT}), "'title', which is free text"),
    (of({'word': {'type': 'array', 'items': TEXT}}), "'word' is words of the text"),
    (of({'people': {'type': 'array', 'items': NUMBER}}), "'people[]' is words of the text"),
    (of({'people': {'type': 'array', 'items': TEXT, 'maxItems': 2}}), 'too long'),
    (of({'people': TEXT}), "'people' is a list in the answers"), (of({'buyer': of({'name': NUMBER})}), "'buyer.name' is words"),
    (of({'seller': of({'name': TEXT})}), "'seller' can be null"), (of({'result': TEXT}), "'result', which is free text")])
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
        assert {key: labelled[key] for key in FIELDS} == {key: record[key] for key in FIELDS} and 'empty' in empty['error']
        assert json.loads(whole.json()['choices'][0]['text']) == {key: record[key] for key in FIELDS}
        arguments = called.json()['choices'][0]['message']['tool_calls'][0]['function']['arguments']
        assert json.loads(arguments) == json.loads(response.json()['output'][0]['content'][0]['text']) == {
            'word': record['word']}
        answer, = decided.json()['answers']
        assert answer['choice'] == record['tone'] and metrics.status_code == 400
    shown = [*service.metrics.values.collect()][0].samples
    assert {sample.labels['value'] for sample in shown if sample.labels['field'] == 'word'} == {'present'}
    assert {sample.labels['value'] for sample in shown if sample.labels['field'] == 'name'} <= {'present', 'null'}
