"""serve.py with a student whose options come with each request: schemas, tools, questions of any wording."""
import json

import pytest

from tests.served import json_schema, of, post_all
from tests.test_serve_extraction import bert, save_student  # noqa: F401
from tests.test_serve import to_jevcompat
from jevcompat import validate

from distil.labeler import Labeler
from distil.options import write_options
from serve.service import Service

OPTION = {'type': 'string', 'x-options': True}
FIELDS = {'tone': ['calm', 'angry'], 'folder': OPTION}
TEXT = 'hello my friend'
FOLDERS = ['Cats & dogs', 'old • mail', 'news']


@pytest.fixture(scope='module')
def labeler(tmp_path_factory, bert, tokenizer):
    folder = tmp_path_factory.mktemp('options') / 'files'
    save_student(folder, bert, tokenizer, FIELDS)
    return Labeler(folder, 'cpu', confidence='full')


@pytest.fixture(scope='module')
def service(labeler):
    return Service(labeler, 'files')


def chat(schema=None, **more):
    form = {'response_format': json_schema(schema)} if schema else {}
    return '/v1/chat/completions', {'messages': [{'role': 'user', 'content': TEXT}], **form, **more}


def test_an_enum_becomes_the_options(labeler, service):
    own = [{'const': name, 'description': f'about {name}'} for name in FOLDERS]
    named = of({'folder': {'enum': FOLDERS}, 'tone': {'enum': ['angry', 'calm']}})
    other = of({'where': {'oneOf': own}})
    plain, described, none, single = [reply.json() for reply in post_all(
        service, chat(named), chat(other), chat(of({'folder': {'type': 'string'}})), chat({'enum': FOLDERS}))]
    answer = json.loads(plain['choices'][0]['message']['content'])
    record, = labeler([write_options(TEXT, {'folder': FOLDERS})])
    assert (answer['folder'] in FOLDERS                         # in the caller's words
            and answer['folder'].replace('•', '·') == record['folder'])
    assert answer['tone'] == record['tone']
    about = {'folder': [{'value': name, 'description': f'about {name}'} for name in FOLDERS]}
    record, = labeler([write_options(TEXT, about)])
    found = json.loads(described['choices'][0]['message']['content'])
    assert found['where'].replace('•', '·') == record['folder']
    assert 'one of the options for folder' in none['error']['message'] and 'offers none' in none['error']['message']
    assert json.loads(single['choices'][0]['message']['content']) in FOLDERS


def test_the_tools_of_a_call_are_the_options(service):
    tools = [{'type': 'function', 'function': {'name': name, 'description': about}}
             for name, about in (('open_file', 'opens a file'), ('send_mail', 'writes to a friend'))]
    for choice in ('required', 'auto'):
        reply, = post_all(service, chat(tools=tools, tool_choice=choice))
        if choice == 'required':
            assert reply.json()['choices'][0]['message']['tool_calls'][0]['function']['name'] in (
                'open_file', 'send_mail')
        else:
            assert reply.status_code == 400                     # it cannot write the message that none of them needs


def test_label_takes_options_of_its_own(service, labeler):
    body = {'texts': [TEXT, ''], 'options': {'folder': FOLDERS}}
    good, lacking, wrong = post_all(service, ('/v1/label', body), ('/v1/label', {'texts': [TEXT]}),
                                    ('/v1/label', body | {'options': {'folder': 'x'}}))
    record, = labeler([write_options(TEXT, body['options'])])
    assert good.json()['answers'][0]['folder'] == record['folder'] and 'error' in good.json()['answers'][1]
    assert 'without options for folder' in lacking.json()['answers'][0]['error'] and wrong.status_code == 400


def test_questions_of_any_wording_are_answered(service, labeler):
    questions = {'tone': {'type': 'choice', 'criteria': {'angry': None, 'calm': None}},
                 'pet': {'type': 'choice', 'criteria': {'cat': 'it purrs', 'dog': None, 'friend': None}},
                 'kind': {'type': 'noul', 'instructions': 'is it kind?'},
                 'size': {'type': 'score', 'criteria': ['small', 'large', 'huge']}}
    body = {'model': 'files', 'state': TEXT, 'questions': questions}
    whole, alone = post_all(service, ('/v1/systemone', body),
                            ('/v1/systemone', body | {'questions': {'pet': questions['pet']}}))
    assert validate.validate_success(body, to_jevcompat(whole)) == []
    answers = whole.json()['answers']
    by_itself = alone.json()['answers']['pet']                  # whatever else is asked, to rounding
    assert answers['pet']['choice'] == by_itself['choice']
    assert answers['pet']['probabilities'] == pytest.approx(by_itself['probabilities'], abs=1e-6)
    text = write_options(TEXT, {'folder': [{'value': 'cat', 'description': 'it purrs'}, 'dog', 'friend']})
    ids, *_ = labeler.encode(text)
    record, = labeler([text])
    assert max(answers['pet']['probabilities'], key=answers['pet']['probabilities'].get) == record['folder']
    assert answers['pet']['probabilities'][record['folder']] == pytest.approx(
        record['_confidence']['folder'][record['folder']], abs=1e-3)
    assert (answers['pet']['choice'] == record['folder']
            and sum(answers['pet']['probabilities'].values()) == pytest.approx(1))
    decisions = {'model': 'files', 'input': TEXT, 'questions': [
        {'type': 'predicate', 'name': 'kind', 'instructions': 'is it kind?'},
        {'type': 'choice', 'name': 'pet', 'choices': [{'value': 'cat', 'description': 'it purrs'}, {'value': 'dog'},
                                                      {'value': 'friend'}]}]}
    reply, twice = post_all(service, ('/v1/decisions', decisions), ('/v1/decisions', decisions | {'questions': [
        {'type': 'choice', 'choices': [{'value': 'a b'}, {'value': 'a  b'}]}]}))
    kind, pet = reply.json()['answers']
    assert kind['probability'] == pytest.approx(answers['kind']['noul'], abs=1e-3)
    assert {one['value']: one['probability'] for one in pet['probabilities']} == pytest.approx(
        answers['pet']['probabilities'], abs=1e-3)
    assert twice.status_code == 422 and 'different texts' in twice.text
    wrong = [{'type': 'choice', 'criteria': {}}, {'type': 'score', 'criteria': ['a', None]}]
    structured = {'x': {'type': 'score', 'criteria': [{'level': 1}, ['two']]}}
    assert post_all(service, ('/v1/systemone', body | {'questions': structured}))[0].status_code == 200
    for reply in post_all(service, *(('/v1/systemone', body | {'questions': {'x': question}}) for question in wrong)):
        assert reply.status_code == 422, reply.text
