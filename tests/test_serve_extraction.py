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
    for text, record in truth.items():
        full, sure = record['_confidence'], plain([text])[0]['_confidence']
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
                assert shown[name] == pytest.approx(p, abs=3e-4) if once else shown[name] > p - 3e-4
                seen['value'] += 1
    assert min(seen.values()) > 4, seen


def test_a_value_that_stands_twice_has_the_probability_of_both_places(labeler):
    spans = [(0, 4, 'Anna', 0.3), (9, 13, 'Anna', 0.25), (5, 8, 'Bob', 0.4), (20, 21, 1, 0.05)]
    assert merge_spans(spans) == [(0, 4, 'Anna', 0.55), (5, 8, 'Bob', 0.4), (20, 21, 1, 0.05)]
    assert merge_spans(spans, (9, 13, 'Anna'))[0][:2] == (9, 13) and merge_spans(spans, (5, 8, 'Bob'))[0][:2] == (0, 4)
    one, = labeler(['friend'])
    assert {*one['_confidence']['word']} == {'friend'} and one['_confidence']['word']['friend'] == 1
