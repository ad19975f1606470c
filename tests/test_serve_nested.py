"""serve.py with a student whose answers have lists, objects, and parts that are null, missing or left out."""
import asyncio
import copy
import json
import math
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.served import json_schema, of, post_all, save_student

import httpx

from distil.labeler import Labeler
from distil.space import OutputSpace
from serve.app import Handler, make_app
from serve.questions import match_question
from serve.request import Refusal
from serve.schemas import read_schema
from serve.service import Answer, Service
from serve.students import ServedStudent

FINDING = of({'kind': {'enum': ['typo', 'style']}, 'sure': {'type': 'boolean'}, 'note': {'type': 'string'}})
TICKET = {
    '$defs': {'Finding': FINDING, 'Mood': {'enum': ['calm', 'angry'], 'title': 'Mood', 'type': 'string'},
              'Customer': of({'mood': {'$ref': '#/$defs/Mood'}, 'plan': {'enum': ['free', 'pro']}}, ['mood'])},
    **of({'reason': {'type': 'string'}, 'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui', 'docs']}},
          'customer': {'$ref': '#/$defs/Customer'},
          'team': {'anyOf': [of({'name': {'enum': ['web', 'app']}, 'size': {'enum': [1, 2]}}), {'type': 'null'}]},
          'findings': {'type': 'array', 'items': {'$ref': '#/$defs/Finding'}, 'maxItems': 3},
          'tone': {'enum': ['neutral', 'friendly']}, 'confidence': {'type': 'number', 'minimum': 0, 'maximum': 1}})}
LEFT_OUT = ['reason', 'confidence', 'findings[].note']
FILL = {'reason': '', 'note': 'none'}


LABELS = {'enum': ['bug', 'ui', 'docs']}


@pytest.fixture(scope='module')
def labeler(tmp_path_factory, teachers, tokenizer):
    """a tiny student of tickets"""
    folder = tmp_path_factory.mktemp('nested') / 'ticket'
    space = OutputSpace(tokenizer, TICKET, end_id=2, auxiliary=range(4, 60), left_out=LEFT_OUT)
    save_student(folder, teachers, space, {'fields': TICKET, 'left_out': LEFT_OUT}, seed=6)
    return Labeler(folder, 'cpu')


@pytest.fixture(scope='module')
def service(labeler):
    service = Service(labeler, 'ticket')
    service.decoder.start()
    return service


@pytest.fixture(scope='module')
def truth(labeler, words):
    """{text: (the student's answer, {path of a leaf: its confidence})}"""
    rng = random.Random(5)
    texts = [' '.join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(50)]
    truth = {text: (record, record.pop('_confidence')) for text, record in zip(texts, labeler(texts))}
    assert len({json.dumps(record) for record, _ in truth.values()}) > 5
    return truth


def chat_body(text, schema=None, **more):
    form = {'response_format': json_schema(schema)} if schema else {}
    return {'messages': [{'role': 'user', 'content': text}], **form, **more}


@pytest.fixture
def ask(service, truth):
    """ask(schema) -> the answers to some texts, with the student's; the error's text if the schema is refused."""
    def ask(schema, fill=None, n=8):
        texts = [*truth][:n]
        calls = [('/v1/chat/completions', chat_body(text, schema)) for text in texts]
        replies = [reply.json() for reply in post_all(service, *calls, fill=fill)]
        if 'error' in replies[0]:
            return replies[0]['error']['message']
        answers = [json.loads(reply['choices'][0]['message']['content']) for reply in replies]
        for answer in answers:
            jsonschema.validate(answer, schema)
        return [(answer, truth[text][0]) for answer, text in zip(answers, texts)]
    return ask


def list_of(items, **more):
    return {'type': 'array', 'items': items, **more}


def or_null(schema):
    return {'anyOf': [schema, {'type': 'null'}]}


def check_filled(content, record, confidence):
    """asserts that a reply is the student's answer as TICKET has it."""
    answer = json.loads(content)
    assert list(answer) == [*TICKET['properties']]
    assert answer.pop('confidence') == pytest.approx(min(confidence.values()), abs=2e-4)
    assert answer == {'reason': '', **record, 'findings': [{**one, 'note': 'none'} for one in record['findings']]}


# -----------------------------------------------------------------------------
# the schema that the student was trained with


def test_the_same_schema_is_answered_with_what_is_left_out_filled_in(service, truth):
    calls = [('/v1/chat/completions', chat_body(text, TICKET, logprobs=True)) for text in truth]
    for reply, (record, confidence) in zip(post_all(service, *calls, fill=FILL), truth.values()):
        choice, = reply.json()['choices']
        jsonschema.validate(json.loads(choice['message']['content']), TICKET)
        check_filled(choice['message']['content'], record, confidence)
        tokens = choice['logprobs']['content']
        assert ''.join(token['token'] for token in tokens) == choice['message']['content']
        total = math.exp(sum(token['logprob'] for token in tokens))
        assert total == pytest.approx(math.prod(confidence.values()), rel=0.05, abs=1e-4)


def test_tools_responses_streams_and_batches_have_the_same_answer(service, truth):
    text, (record, confidence) = next(iter(truth.items()))
    tool = {'type': 'function', 'function': {'name': 'label', 'parameters': TICKET}}
    chat, called, response, streamed = post_all(
        service, ('/v1/chat/completions', chat_body(text, TICKET)),
        ('/v1/chat/completions', chat_body(text, tools=[tool], tool_choice='required')),
        ('/v1/responses', {'input': text, 'text': {'format': {'type': 'json_schema', 'name': 'x', 'schema': TICKET}}}),
        ('/v1/chat/completions', chat_body(text, TICKET, stream=True)), fill=FILL)
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith('data: {')]
    student = ServedStudent(service, fill=FILL)
    batch = asyncio.run(Handler([student], None).answer_batch_line('/v1/chat/completions', chat_body(text, TICKET)))
    for content in (chat.json()['choices'][0]['message']['content'], batch['choices'][0]['message']['content'],
                    called.json()['choices'][0]['message']['tool_calls'][0]['function']['arguments'],
                    response.json()['output'][0]['content'][0]['text'],
                    ''.join(event['choices'][0]['delta'].get('content') or '' for event in events)):
        check_filled(content, record, confidence)


def test_without_a_schema_the_answer_is_written_as_the_student_was_trained(service, labeler, truth):
    space, text = labeler.space, next(iter(truth))
    for indent, fence in ((None, False), (2, True)):
        old = space.indent, space.fence
        space.indent, space.fence = indent, fence
        try:
            reply, = post_all(service, ('/v1/chat/completions', chat_body(text, logprobs=True)))
            choice, = reply.json()['choices']
            assert choice['message']['content'] == space.text(truth[text][0])
            assert ''.join(token['token'] for token in choice['logprobs']['content']) == choice['message']['content']
        finally:
            space.indent, space.fence = old


# -----------------------------------------------------------------------------
# other schemas


@pytest.mark.parametrize('schema, meant', [
    (of({'tone': {}, 'Labels': list_of({'enum': ['DOCS', 'Bug', 'UI']})}),
     lambda record: {'tone': record['tone'], 'Labels': [
         {'docs': 'DOCS', 'bug': 'Bug', 'ui': 'UI'}[label] for label in record['labels']]}),
    (of({'result': list_of({'$ref': '#/$defs/L'})}) | {'$defs': {'L': LABELS}},
     lambda record: {'result': record['labels']}),
    (of({'labels': or_null(list_of({'type': 'string'}, maxItems=3))}), lambda record: {'labels': record['labels']}),
    (of({'mood': {'enum': ['angry', 'calm']}}), lambda record: {'mood': record['customer']['mood']}),
    (of({'customer': {'type': 'object'}}), lambda record: {'customer': record['customer']}),
    (of({'customer': of({'plan': or_null({'enum': ['free', 'pro']}), 'mood': {'type': 'string'}})}),
     lambda record: {'customer': {'plan': record['customer'].get('plan'), 'mood': record['customer']['mood']}}),
    (of({'team': of({'size': {'type': 'integer'}})}, []),
     lambda record: {'team': {'size': record['team']['size']}} if record['team'] else {}),
    (of({'team': or_null(of({'type': {'const': 'team'}, 'name': {}})), 'why': {'type': 'string'}}, ['team']),
     lambda record: {'team': record['team'] and {'type': 'team', 'name': record['team']['name']}}),
    (of({'findings': list_of(of({'sure': {'enum': ['yes', 'no']}}))}),
     lambda record: {'findings': [{'sure': 'yes' if finding['sure'] else 'no'} for finding in record['findings']]})])
def test_a_schema_that_allows_every_answer_gets_it_in_its_own_words(ask, schema, meant):
    for answer, record in ask(schema):
        assert json.dumps(answer) == json.dumps(meant(record))


@pytest.mark.parametrize('schema, why', [
    (of({'labels': list_of({'enum': ['bug', 'ui']})}), '\'labels\' does not offer "docs"'),
    (of({'labels': list_of(LABELS, maxItems=2)}), "(field 'labels'): ['bug', 'ui', 'docs'] is too long"),
    (of({'labels': list_of(LABELS, minItems=1)}), "(field 'labels'): [] should be non-empty"),
    (of({'labels': LABELS}), "'labels' is a list in the answers of the student, and the schema does not allow one"),
    (of({'team': of({'name': {}})}), "'team' can be null in the answers of the student, but the schema requires"),
    (of({'customer': of({'mood': {}, 'plan': {'enum': ['free', 'pro']}})}), "'customer.plan' can be missing"),
    (of({'customer': of({'plan': {'type': 'integer'}}, [])}), "(field 'customer.plan'): 'free' is not of type"),
    (of({'customer': of({'id': {'type': 'integer'}}, [])}), "'customer' has none of the properties"),
    (of({'findings': list_of(LABELS)}), "'findings[]' is an object in the answers of the student"),
    (of({'findings': list_of(of({'kind': {'const': 'typo'}}))}), '\'findings[].kind\' does not offer "style"'),
    (of({'findings': list_of({'anyOf': [of({'kind': {}}), of({'sure': {}})]})}), 'allows several kinds of them'),
    (of({'findings': list_of(of({'kind': {}, 'note': {'type': 'string'}}))}),
     "fill = {'findings[].note': ''} would answer it so"),
    (of({'tone': {}, 'tags': list_of({'type': 'string'})}), "'tags', which is a list; its fields are: labels (some of"),
    (TICKET, "'reason', which is free text; its fields are: labels (some of bug, ui, docs); customer.mood")])
def test_a_schema_that_forbids_an_answer_is_refused_by_the_name_of_the_property(ask, schema, why):
    assert why in ask(schema)


def test_fill_answers_required_properties_alone_and_must_be_allowed(ask):
    text = {'type': 'string'}
    for answer, record in ask(of({'tone': {}, 'reason': text}), {'reason': 'x'}):
        assert answer == {'tone': record['tone'], 'reason': 'x'}
    assert all([*answer] == ['tone'] for answer, _ in ask(of({'tone': {}, 'reason': text}, ['tone']), {'reason': 'x'}))
    for answer, record in ask(of({'customer': of({'id': text, 'mood': {}})}), {'customer.id': '?', 'id': '!'}):
        assert answer['customer'] == {'id': '?', 'mood': record['customer']['mood']}
    assert "(field 'reason'): 5 is not of type 'string'" in ask(of({'tone': {}, 'reason': text}), {'reason': 5})


def test_a_number_called_confidence_inside_of_an_object_is_that_of_the_object(service, truth):
    schema = of({'customer': of({'mood': {}, 'confidence': {'type': 'number'}})})
    for text, (_, confidence) in [*truth.items()][:5]:
        reply, = post_all(service, ('/v1/chat/completions', chat_body(text, schema)))
        answer = json.loads(reply.json()['choices'][0]['message']['content'])
        least = min(confidence['customer.mood'], confidence['customer.plan'])
        assert answer['customer']['confidence'] == pytest.approx(least, abs=2e-4)


CHANGES = st.lists(st.tuples(st.sampled_from(['drop', 'free', 'optional', 'null', 'short', 'long', 'case', 'one']),
                             st.integers(0, 30)), max_size=4)


def change(schema, changes):
    """a schema with some of its parts changed."""
    schema = copy.deepcopy(schema)
    for kind, n in changes:
        parts = []
        def collect(part):
            for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
                parts.extend([inner] * isinstance(inner, dict))
                collect(inner)
        collect(schema)
        part = parts[n % len(parts)]
        if kind == 'drop' and part.get('properties'):
            part['properties'].pop(next(iter(part['properties'])))
        elif kind == 'free':
            part.clear()
        elif kind == 'optional' and 'required' in part:
            part['required'] = part['required'][1:]
        elif kind == 'null' and 'type' in part and isinstance(part['type'], str):
            part['type'] = [part['type'], 'null']
        elif kind in ('short', 'long') and 'items' in part:
            part |= {'maxItems': 2} if kind == 'short' else {'minItems': 1}
        elif kind in ('case', 'one') and isinstance(part.get('enum'), list):
            part['enum'] = [str(value).upper() for value in part['enum']] if kind == 'case' else part['enum'][:1]
    return schema


def test_whatever_changed_schema_is_answered_allows_every_answer(labeler):
    schema_of, rng, counts = labeler.space.schema, random.Random(0), {True: 0, False: 0}
    answers = [schema_of.fill(lambda choice: rng.randrange(len(choice))) for _ in range(30)]

    @settings(max_examples=50, deadline=None, database=None, derandomize=True)
    @given(CHANGES)
    def check(changes):
        schema = change(TICKET, changes)
        try:
            shape = read_schema(schema, labeler.space, {}, 'x', fill=FILL)
        except Refusal as refusal:
            counts[False] += 1
            assert refusal.status == 400 and str(refusal)
            return
        counts[True] += 1
        validator = jsonschema.Draft202012Validator(schema)
        for record in answers:
            answer = Answer(record, dict.fromkeys(schema_of.paths, 0.5), {}, [], [], [])
            validator.validate({name: value for name, value, _, _ in shape.values(answer, labeler.space)})
    check()
    assert min(counts.values()) > 5, counts


# -----------------------------------------------------------------------------
# questions, records, upstream


def test_questions_ask_for_values_of_a_list_and_parts_of_an_object(service, labeler, truth):
    moods = {'type': 'choice', 'choices': [{'value': 'angry'}, {'value': 'calm'}]}
    questions = [{'type': 'predicate', 'name': 'labels.bug'}, {'type': 'predicate', 'name': 'ui'},
                 {'type': 'choice', 'name': 'docs', 'choices': [{'value': 'no'}, {'value': 'yes'}]},
                 moods | {'name': 'customer.mood'}, moods | {'name': 'mood'}, moods]
    system_one = {'labels.bug': {'type': 'noul'}, 'mood': {'type': 'choice', 'criteria': {'angry': None, 'calm': None}}}
    full = Labeler(labeler.arguments[0], 'cpu', confidence='full')
    for text, record in zip(truth, full([*truth][:8])):
        p = record['_confidence']
        replies = post_all(service, ('/v1/decisions', {'input': text, 'questions': questions}),
                           ('/v1/systemone', {'state': text, 'questions': system_one}))
        bug, ui, docs, *by_path = replies[0].json()['answers']
        assert bug['probability'] == pytest.approx(p['labels']['bug'], abs=1e-4)
        assert ui['probability'] == pytest.approx(p['labels']['ui'], abs=1e-4)
        assert docs['choice'] == ('yes' if 'docs' in record['labels'] else 'no')
        assert {answer['choice'] for answer in by_path} == {record['customer']['mood']}
        answers = replies[1].json()['answers']
        assert answers['labels.bug']['noul'] == bug['probability']
        assert answers['mood']['probabilities']['calm'] == pytest.approx(p['customer.mood']['calm'], abs=1e-4)


def test_a_question_about_what_may_be_missing_or_has_an_unclear_name_is_refused(labeler, tokenizer):
    space = OutputSpace(tokenizer, {'a': list_of(LABELS), 'b': list_of({'enum': ['bug', 'x']})})
    assert match_question(space, 'x', 'yes-or-no', [], {}, (), ('q',)).field == 'b.x'
    for at, name, kind, options, why in (
            (space, 'bug', 'yes-or-no', [], 'several fields match; name the question after one of them: a.bug, b.bug'),
            (labeler.space, 'team.name', 'choice', ['web', 'app'], 'cannot answer the choice question'),
            (labeler.space, 'present', 'yes-or-no', [], 'cannot answer the yes-or-no question'),
            (labeler.space, 'labels', 'choice', ['bug', 'ui', 'docs'], 'labels (some of bug, ui, docs)')):
        with pytest.raises(Refusal) as refusal:
            match_question(at, name, kind, options, {}, (), ('q',))
        assert why in str(refusal.value)


def test_the_probability_of_a_value_that_no_longer_fits_into_a_list_is_certain(tokenizer, teachers, tmp_path):
    fields = {'labels': list_of(LABELS, minItems=1, maxItems=1)}
    space = OutputSpace(tokenizer, fields, end_id=2, auxiliary=range(4, 60))
    save_student(tmp_path / 'one', teachers, space, {'fields': fields})
    questions = [{'type': 'predicate', 'name': name} for name in LABELS['enum']]
    reply, = post_all(Service(Labeler(tmp_path / 'one', 'cpu'), 'one'),
                      ('/v1/decisions', {'input': 'hello', 'questions': questions}))
    p = [answer['probability'] for answer in reply.json()['answers']]
    assert all(0 <= q <= 1 for q in p) and max(p) > 0.3 and len(p) == 3


def test_records_models_and_metrics_have_nested_fields(service, truth):
    text, (record, confidence) = next(iter(truth.items()))
    reply, = post_all(service, ('/v1/label', {'texts': [text]}))
    answer, = reply.json()['answers']
    assert answer == record | {'_confidence': pytest.approx(confidence, abs=2e-4)}

    async def get(*paths):
        app = make_app([ServedStudent(service)], service.metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url='http://test') as client:
            return [(await client.get(path)).text for path in paths]
    models, metrics = asyncio.run(get('/v1/models', '/metrics'))
    assert 'answers labels, customer, team, findings, tone, as' in models
    for label in record['labels']:
        assert f'student_values_total{{field="labels",model="ticket",value="\\"{label}\\""}}' in metrics
    assert f'field="findings",model="ticket",value="{len(record["findings"])}"' in metrics


def test_an_unsure_text_gets_the_nested_answer_of_upstream(labeler, truth):
    answer = {'labels': ['bug', 'docs'], 'customer': {'mood': 'calm'}, 'team': None, 'findings': [], 'tone': 'neutral'}

    class Upstream:
        async def answer(self, text):
            return answer
    unsure = Labeler(labeler.arguments[0], 'cpu', min_confidence=0.99999)
    service, text = Service(unsure, 'ticket', upstream=Upstream(), audit_share=1.0), next(iter(truth))
    questions = [{'type': 'predicate', 'name': name} for name in LABELS['enum']]
    chat, decisions = post_all(service, ('/v1/chat/completions', chat_body(text, TICKET, logprobs=True)),
                               ('/v1/decisions', {'input': text, 'questions': questions}), fill=FILL)
    assert chat.headers['x-answered-by'] == 'upstream'
    content = json.loads(chat.json()['choices'][0]['message']['content'])
    assert content == {'reason': '', **answer, 'confidence': 1.0}
    assert [one['probability'] for one in decisions.json()['answers']] == [1.0, 0.0, 1.0]
