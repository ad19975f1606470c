"""Lists, objects and missing parts: JSON Schema read, answers written, decoded and learned, each beside a slow twin."""
import json
import math
import random
from collections import Counter
from itertools import product

import pytest
import torch

from config import write_fields
from distil.agreement import learn_lists, measure_agreement, measure_members
from distil.answers import label_from_answer
from distil.confidence import confidence_of, value_probabilities
from distil.decode import decode
from distil.drafts import Drafts, Forced
from distil.json_schema import is_json_schema, unwrap
from distil.schema import Schema
from distil.shares import record_from_label
from distil.space import OutputSpace
from distil.values import MISSING
from sample import answer_text
from tests.conftest import clone_task, run, tiny_student

LABELS = {'type': 'array', 'items': {'enum': ['bug', 'ui', 'praise']}}
OF = lambda required=None, **properties: {'type': 'object', 'properties': properties, **(
    {} if required is None else {'required': required})}
NESTED = {
    'team': ['billing', 'other'], 'labels': LABELS,
    'customer': OF(vip={'type': 'boolean'}, mood={'enum': ['calm', 'angry', None]}),
    'findings': {'type': 'array', 'maxItems': 2, 'items': OF(['kind'], kind={'enum': ['a', 'b']}, n={'enum': [1, 11]})}}
ANSWER = {'team': 'other', 'labels': ['bug', 'praise'], 'customer': {'vip': False, 'mood': None},
          'findings': [{'kind': 'b', 'n': 11}, {'kind': 'a'}]}


# -----------------------------------------------------------------------------
# the schema


def test_an_answer_is_read_as_choices_and_built_again():
    schema = Schema(NESTED)
    assert schema.paths == ['team', 'labels', 'customer.vip', 'customer.mood', 'findings', 'findings[].kind',
                            'findings[].n']
    assert schema.numbers(ANSWER) == {
        'team': 1, 'labels.bug': 1, 'labels.ui': 0, 'labels.praise': 1, 'customer.vip': 1, 'customer.mood': 2,
        'findings[+0]': 1, 'findings[0].kind': 1, 'findings[0].n': 1, 'findings[+1]': 1, 'findings[1].kind': 0,
        'findings[1].n': 2}
    messy = {**ANSWER, 'labels': ['praise', 'bug', 'bug'], 'reason': 'dropped'}
    assert json.dumps(schema.canonical(messy)) == json.dumps(ANSWER) and not schema.is_answer(messy)
    assert (schema.leaf('findings[].n').get(ANSWER) == [11, MISSING]
            and schema.leaf('labels').get(ANSWER) == ['bug', 'praise'])
    for wrong, message in (({'labels': 'bug'}, 'labels is "bug", not a list'),
                           ({'labels': ['bag']}, 'labels is "bag", not one'),
                           ({'customer': 3}, 'customer is 3, not an object'),
                           ({'findings': [{}]}, r'it has no findings\[0\].kind'),
                           ({'findings': [{'kind': 'a'}] * 3}, 'findings has 3 items, and may have 0 to 2')):
        with pytest.raises(ValueError, match=message):
            schema.canonical({**ANSWER, **wrong})


def test_a_label_of_a_list_is_the_probability_of_each_of_its_values():
    schema = Schema({'labels': LABELS, 'team': ['billing', 'other']})
    p = schema.read_label({'answer': {'team': 'other'}, 'probabilities': {'labels': {'bug': 0.9, 'ui': 0.2}}})
    assert p == {'labels.bug': [pytest.approx(0.1), 0.9], 'labels.ui': [0.8, 0.2], 'labels.praise': [1, 0],
                 'team': [0, 1]}
    assert schema.read_label(schema.write_label(p)) == p
    with pytest.raises(ValueError, match="labels has a probability of 'bag', which is not one of bug, ui, praise"):
        schema.read_label({'probabilities': {'labels': {'bag': 1}, 'team': {'other': 1}}})


PYDANTIC = {  # what pydantic writes of class Ticket
    '$defs': {'Mood': {'enum': ['calm', 'angry'], 'title': 'Mood', 'type': 'string'},
              'Line': {'properties': {'kind': {'const': 'bug', 'title': 'Kind', 'type': 'string'},
                                      'size': {'maximum': 3, 'minimum': 1, 'title': 'Size', 'type': 'integer'}},
                       'required': ['kind', 'size'], 'title': 'Line', 'type': 'object'}},
    'properties': {'mood': {'anyOf': [{'$ref': '#/$defs/Mood'}, {'type': 'null'}], 'default': None},
                   'lines': {'items': {'$ref': '#/$defs/Line'}, 'maxItems': 2, 'title': 'Lines', 'type': 'array'},
                   'boss': {'allOf': [{'$ref': '#/$defs/Mood'}], 'description': 'of the boss'},
                   'reason': {'title': 'Reason', 'type': 'string'}},
    'required': ['lines', 'boss', 'reason'], 'title': 'Ticket', 'type': 'object'}


def test_the_json_schema_of_pydantic_is_taken_and_its_answers_validate():
    validate = pytest.importorskip('jsonschema').Draft202012Validator(PYDANTIC)
    schema, rng = Schema(PYDANTIC, ['reason']), random.Random(0)
    assert (schema.paths == ['mood', 'lines', 'lines[].kind', 'lines[].size', 'boss']
            and schema.json_schema() is PYDANTIC)
    for _ in range(30):
        answer = schema.fill(lambda choice: rng.randrange(len(choice)))
        assert validate.is_valid({**answer, 'reason': ''}) and schema.canonical(answer) == answer
    assert schema.write_for_prompt().splitlines()[-1] == 'boss: of the boss (calm, angry)'
    assert write_fields({'labels': LABELS}) == 'labels: (some of bug, ui, praise)\n'
    wrapped = {'type': 'json_schema', 'json_schema': {'name': 'ticket', 'schema': PYDANTIC}}
    assert unwrap(wrapped) == unwrap({'type': 'function', 'function': {'parameters': PYDANTIC}}) == PYDANTIC
    assert is_json_schema(PYDANTIC) and not is_json_schema(NESTED) and not is_json_schema({'type': ['a', 'b']})


@pytest.mark.parametrize('part, message', [
    ({'type': 'object', 'additionalProperties': {'type': 'string'}}, 'x is an object whose keys are not known'),
    ({'type': 'object', 'patternProperties': {}}, 'x has patternProperties'),
    ({'anyOf': [{'type': 'string'}, OF(a={'enum': [1, 2]})]}, 'x may be one of 2 kinds of objects, lists or texts'),
    ({'$ref': '#/$defs/Node'}, 'x.inner refers to #/$defs/Node again, in which it stands'),
    ({'$ref': '#/$defs/None'}, 'x refers to #/$defs/None, which is not in the schema'),
    (True, 'x allows any value'), ({}, 'x allows any value'),
    ({'type': 'array', 'items': {'enum': [1, 2]}, 'minItems': 3, 'maxItems': 2},
     'x has minItems = 3 and maxItems = 2')])
def test_what_cannot_be_answered_is_named_with_what_to_do(part, message):
    node = OF(ok={'type': 'boolean'}, inner={'anyOf': [{'$ref': '#/$defs/Node'}, {'type': 'null'}]})
    fields = {**OF(x=part, y={'type': 'boolean'}), '$defs': {'Node': node}}
    with pytest.raises(ValueError) as error:
        Schema(fields)
    assert message in str(error.value)
    assert Schema(fields, ['x']).paths == ['y']


def test_parts_are_read_as_a_validator_reads_them():
    values = lambda part: Schema({'x': part}).leaf('x').values
    assert values({'type': 'integer', 'exclusiveMinimum': 0, 'maximum': 6, 'multipleOf': 2}) == [2, 4, 6]
    assert (values({'type': ['boolean', 'null']}) == [True, False, None]
            and values({'type': 'STRING', 'enum': ['a', 'b']}) == ['a', 'b'])
    assert values({'allOf': [{'enum': ['a', 'b', 'c']}, {'enum': ['b', 'c']}]}) == ['b', 'c']
    assert Schema({'x': {'allOf': [OF(a={'enum': [1, 2]}), OF(b={'enum': [1, 2]})]}}).paths == ['x.a', 'x.b']
    assert Schema({'x': {'type': 'array', 'items': {'type': 'boolean'}}}).canonical({'x': [True, True, False]}) == {
        'x': [True, True, False]}                               # numbers may come twice, and keep their order
    assert Schema({'x': {**LABELS, 'uniqueItems': False}}).canonical({'x': ['ui', 'bug', 'ui']}) == {
        'x': ['ui', 'bug', 'ui']}
    assert Schema({'x': {**LABELS, 'minItems': 1}}).fill(lambda choice: 0) == {'x': ['praise']}
    scores = {'type': 'object', 'propertyNames': {'enum': ['a', 'b']}, 'additionalProperties': {'enum': [1, 2]}}
    assert Schema({'x': scores}).paths == ['x.a', 'x.b']
    optional = Schema(OF([], a={'enum': [1, 2]}, b=OF(c={'type': 'boolean'})))
    assert optional.canonical({}) == {} and optional.canonical({'b': {'c': True}}) == {'b': {'c': True}}


# -----------------------------------------------------------------------------
# the automaton, beside the tokenizer and sums over all answers


def random_part(rng, depth):
    kind = rng.choice(['enum', 'boolean', 'set', 'list', 'object', 'maybe'] if depth < 2 else ['enum', 'set'])
    if kind == 'enum':
        return {'enum': rng.sample(['a', 'calm', None, 1, 11, 'été'], rng.randint(2, 4))}
    if kind == 'boolean':
        return {'type': 'boolean'}
    if kind == 'set':
        return {'type': 'array', 'items': {'enum': rng.sample(['bug', 'ui', 'praise', '日本'], rng.randint(1, 4))},
                'minItems': rng.randint(0, 1)}
    if kind == 'list':
        return {'type': 'array', 'items': random_part(rng, 2), 'maxItems': rng.randint(1, 2), 'uniqueItems': False}
    part = random_object(rng, depth + 1)
    return part if kind == 'object' else {'anyOf': [part, {'type': 'null'}]}


def random_object(rng, depth=0):
    names = rng.sample(['kind', 'vip', 'n', 'tone'], rng.randint(1, 3))
    return OF(rng.sample(names, rng.randint(0, len(names))), **{name: random_part(rng, depth) for name in names})


def random_space(tokenizer, seed):
    """the OutputSpace of a random schema that this tokenizer can write; and the generator."""
    rng = random.Random(seed)
    while True:
        try:
            return OutputSpace(tokenizer, random_object(rng), rng.choice([None, 2]), rng.random() < 0.5,
                               rng.choice([None, 3]), range(4, 60)), rng
        except ValueError:
            continue


@pytest.mark.parametrize('seed', range(5))
def test_the_automaton_of_any_schema_accepts_its_answers_and_knows_what_they_choose(tokenizer, seed):
    space, rng = random_space(tokenizer, seed)
    table = {state: torch.randn(len(space.output_ids), generator=torch.Generator().manual_seed(state + seed))
             for state in range(len(space.transitions))}
    log_p = lambda state, outs, possible: (table[state][list(outs)].logsumexp(0)
                                           - table[state][list(possible)].logsumexp(0)).item()
    for _ in range(10):
        answer = space.schema.fill(lambda choice: rng.randrange(len(choice)))
        outs = space.from_json(answer)
        assert space.to_json(outs) == answer and space.state_after(outs) == space.done
        assert [out for k, _, n in space.walk(answer) for out in space.forks[k][n].tokens] == outs[len(space.start):]
        whole = sum(log_p(state, [out], space.transitions[state])
                    for state, out in zip(space.states_before(outs), outs))
        parts = 0.0
        for k, entry, n in space.walk(answer):                  # the options of a fork are all there is
            of_options = [sum(log_p(*step[:3]) for step in steps) for steps in space.steps(k, entry)]
            assert sum(map(math.exp, of_options)) == pytest.approx(1, abs=1e-4)
            parts += of_options[n]
        assert parts == pytest.approx(whole, abs=1e-3)
        stored, logits = record_from_label(space, {'answer': answer})
        assert stored == outs and logits.argmax(1).tolist() == outs


def test_the_logits_of_a_label_give_each_answer_its_probability(tokenizer):
    space = OutputSpace(tokenizer, {'labels': LABELS, 'n': [1, 11],
                                    'more': {'type': 'array', 'items': {'enum': [1, 11]}, 'maxItems': 1}},
                        auxiliary=range(4, 60))
    label = {'probabilities': {'labels': {'bug': 0.9, 'ui': 0.2, 'praise': 0.4}, 'n': {'1': 0.3, '11': 0.7},
                               'more[+0]': {'present': 0.6, 'missing': 0.4}, 'more[0]': {'1': 0.25, '11': 0.75}}}
    p, total = space.schema.read_label(label), 0.0
    rows = space.token_shares(p)
    for bug, ui, praise, n, more in product((0, 1), (0, 1), (0, 1), (0, 1), ((), (0,), (1,))):
        numbers = {'labels.bug': bug, 'labels.ui': ui, 'labels.praise': praise, 'n': n,
                   'more[+0]': len(more), 'more[0]': sum(more)}
        answer = space.schema.fill(lambda choice: numbers[choice.path])
        outs, expected, found = space.from_json(answer), 1.0, 1.0
        for path, number in numbers.items():
            expected *= p[path][number] if path != 'more[0]' or more else 1.0
        for state, out in zip(space.states_before(outs), outs):
            found *= rows.get(state, {}).get(out, 1.0)
        assert found == pytest.approx(expected)
        total += found
    assert total == pytest.approx(1)


# -----------------------------------------------------------------------------
# decoding


def loud_student(space, seed=0):
    model = tiny_student(space, seed, block_size=21 + space.max_answer)
    for p in model.parameters():
        p.data *= 4                                             # decisions that are not near ties
    return model


@pytest.mark.parametrize('seed', range(2))
def test_any_schema_is_decoded_as_one_token_after_another(tokenizer, seed):
    space, rng = random_space(tokenizer, seed)
    model, texts = loud_student(space, seed), [
        [rng.randrange(4, 400) for _ in range(rng.randint(1, 20))] for _ in range(12)]
    plain, drafts = [answer_text(model, space, text) for text in texts], Drafts(space)
    for constrain in (True, False):
        for helper in (Forced(space), drafts, drafts):          # drafts that know nothing, and those that do
            answers = list(decode(model, space, texts, 5, constrain, helper))
            for (outs, decisions), (plain_outs, plain_decisions) in zip(answers, plain if constrain else answers):
                assert outs == plain_outs and len(decisions) == len(plain_decisions)
                for (leaf, logits, out), (plain_leaf, plain_logits, plain_out) in zip(decisions, plain_decisions):
                    assert (leaf, out) == (plain_leaf, plain_out)
                    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)


def test_the_probability_of_a_choice_is_that_of_all_answers_with_it(tokenizer):
    """beside the sum over every answer, given the answer's own choices before."""
    space = OutputSpace(tokenizer, {'labels': LABELS, 'c': OF([], vip={'type': 'boolean'}, n={'enum': [1, 11]})},
                        auxiliary=range(4, 60))
    model, ids = loud_student(space, 3), [5, 77, 30]
    outs, decisions = answer_text(model, space, ids)
    answers, V = [], model.config.output_vocab
    for members in product((0, 1), repeat=3):
        for vip, n in product(range(3), range(3)):
            numbers = dict(zip((choice.path for choice in space.schema.choices), (*members, vip, n)))
            of_answer = space.from_json(space.schema.fill(lambda choice: numbers[choice.path]))
            logits = model(torch.tensor([ids]), torch.tensor([[V, *of_answer[:-1]]])).float()
            p = 1.0
            for row, state, out in zip(logits, space.states_before(of_answer), of_answer):
                legal = list(space.transitions[state])
                p *= (row[out] - row[legal].logsumexp(0)).exp().item()
            answers.append((numbers, p))
    assert sum(p for _, p in answers) == pytest.approx(1, abs=1e-4)
    found, mine = value_probabilities(model, space, ids, outs, decisions), space.schema.numbers(space.to_json(outs))
    before = {}
    for choice in space.schema.choices:
        alike = [(numbers, p) for numbers, p in answers if before.items() <= numbers.items()]
        for k, q in enumerate(found[choice.path]):
            same = sum(p for numbers, p in alike if numbers[choice.path] == k)
            assert q == pytest.approx(same / sum(p for _, p in alike), abs=1e-4), choice.path
        before[choice.path] = mine[choice.path]
    confidence = confidence_of(space.schema.paths, decisions)
    assert math.prod(confidence.values()) == pytest.approx(
        dict((json.dumps(n), p) for n, p in answers)[json.dumps(mine)], abs=1e-4)


@pytest.mark.parametrize('fields', [
    {f'flag_{n}': [True, False] for n in range(20)},
    {name: {'type': 'array', 'items': {'enum': [f'v{n}' for n in range(8)]}} for name in ('one', 'two', 'three')}])
def test_drafts_make_many_decisions_in_one_pass(tokenizer, fields):
    space = OutputSpace(tokenizer, fields, auxiliary=range(4, 60))
    model, rng = tiny_student(space, 1, block_size=21 + space.max_answer), random.Random(0)
    texts = [[rng.randrange(4, 400) for _ in range(rng.randint(1, 20))] for _ in range(64)]
    before, after = Counter(), Counter()
    plain = list(decode(model, space, texts, 8, drafts=Forced(space), count=before))
    drafted = list(decode(model, space, texts, 8, drafts=Drafts(space), count=after))
    assert [outs for outs, _ in plain] == [outs for outs, _ in drafted]
    assert before['decisions'] == after['decisions'] == before['row_passes']
    assert after['row_passes'] < 0.4 * before['row_passes']


# -----------------------------------------------------------------------------
# labels of a server, figures


def as_tokens(*tokens):
    """the tokens of an answer: (text, {alternative: probability}) or a text that is certain."""
    found = []
    for token in tokens:
        text, p = token if isinstance(token, tuple) else (token, {token: 1.0})
        found.append((text.encode(), math.log(p[text]),
                      [(other.encode(), math.log(q)) for other, q in p.items() if other != text]))
    return found


def test_the_probability_of_a_list_member_is_read_from_the_tokens_of_a_server():
    schema = Schema({'labels': LABELS, 'ok': {'type': 'boolean'}})
    tokens = as_tokens('{"', 'labels', '":', ('["', {'["': 0.8, '[]': 0.2}), ('bug', {'bug': 0.75, 'ui': 0.25}),
                       ('","', {'","': 0.5, '"]': 0.5}), ('praise', {'praise': 0.6, 'ui': 0.4}), '"],', '"ok":',
                       'true', '}')
    label, outside = label_from_answer(schema, ''.join(text.decode() for text, *_ in tokens), tokens)
    p = label['probabilities']['labels']
    assert p['bug'] == pytest.approx(0.8 * 0.75, abs=0.02) and outside < 0.1
    # after bug: 0.5 ends, 0.2 is ui, 0.3 is praise: ui is in the list with 0.2, and praise, if not, with 0.3 of 0.8
    assert p['ui'] == pytest.approx(0.2, abs=0.02) and p['praise'] == pytest.approx(0.3 / 0.8, abs=0.02)
    objects = Schema({'f': {'type': 'array', 'maxItems': 2, 'items': OF(k={'enum': ['a', 'b']})}, 'c': {
        'anyOf': [OF(v={'type': 'boolean'}), {'type': 'null'}]}})
    tokens = as_tokens('{"f":[', ('{"', {'{"': 0.7, ']': 0.3}), 'k', '":"', ('a', {'a': 0.6, 'b': 0.4}), '"}',
                       ('],', {'],': 0.9, ',{': 0.1}), '"c":', (' null', {' null': 0.8, ' {"': 0.2}), '}')
    p = label_from_answer(objects, ''.join(text.decode() for text, *_ in tokens), tokens)[0]['probabilities']
    assert p['f[+0]']['present'] == pytest.approx(0.7, abs=0.02) and p['f[0].k']['a'] == pytest.approx(0.6, abs=0.02)
    assert p['f[+1]']['present'] == pytest.approx(0.1, abs=0.02) and p['c?']['null'] == pytest.approx(0.8, abs=0.02)
    assert label_from_answer(schema, '{"labels": ["praise", "bug"], "ok": true}', [])[0] == {
        'answer': {'labels': ['bug', 'praise'], 'ok': True}}


def test_figures_of_lists_count_their_members():
    ours, theirs = ['["a","b"]', '[]', '["a"]', ''], ['["a"]', '[]', '["b"]', '["b","c"]']
    figures = measure_members(ours, theirs)
    assert figures['micro_f1'] == pytest.approx(2 * 1 / (3 + 4)) and figures['f1'] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert measure_members(['[]'], ['[]']) == {'micro_f1': 1.0, 'f1': 1.0}
    assert measure_agreement(ours, theirs)['agree'] == 0.25
    learn = lambda labels: [labels[0]] * 2
    leaf = Schema({'labels': LABELS}).leaf('labels')
    assert learn_lists(learn, ['["bug", "praise"]', '["ui"]'], 2, leaf) == ['["bug", "praise"]'] * 2


@pytest.mark.slow
def test_a_nested_task_runs_from_texts_to_answers(project, tmp_path, teachers):
    """extract.py with a teacher and with labels, --verify, train.py, sample.py, tools/evaluate.py."""
    root = clone_task(project, tmp_path)
    fields = {'spam': [True, False], 'labels': LABELS, 'c': OF(tone={'enum': ['neutral', 'friendly', None]})}
    texts = [json.loads(line)['text'] for line in (root / 'data/toy/input.jsonl').read_text().splitlines()]
    with open(root / 'labels.jsonl', 'w') as file:
        for text in texts:
            answer = {'spam': 'spam' in text,
                      'labels': [name for name, word in (('bug', 'cat'), ('ui', 'mat')) if word in text],
                      'c': {'tone': 'friendly' if 'hello' in text else None}, 'reason': text}
            file.write(json.dumps({'text': text, 'answer': answer}) + '\n')
    args = [f'--fields={fields}', '--calibrate=0', '--prior={}', '--max_text=20']
    done = run(root, 'extract.py', '--name=asked', *args, '--max_records=40')
    assert done.returncode == 0 and 'in labels:' in done.stdout, done.stderr
    done = run(root, 'extract.py', '--name=asked', *args, '--verify=10')
    assert done.returncode == 0 and 'equal=1.0000' in done.stdout, done.stdout + done.stderr
    done = run(root, 'extract.py', '--name=given', *args, '--labels=labels.jsonl')
    assert done.returncode == 0 and 'records=400' in done.stdout, done.stderr
    done = run(root, 'train.py', '--name=given', '--block_size=90', '--max_epochs=8')
    assert done.returncode == 0, done.stderr
    line, = [line for line in done.stdout.splitlines() if line.startswith('field name=labels')][-1:]
    assert 'micro_f1=' in line and 'linear_micro_f1=' in line
    done = run(root, 'tools/evaluate.py', '--name=given')
    assert done.returncode == 0, done.stderr
    done = run(root, 'sample.py', '--name=given', '--text=the cat said hello', '--confidence=full')
    record = json.loads(done.stdout)
    assert (record['c']['tone'] in ('neutral', 'friendly', None)
            and set(record['_confidence']['labels']) == {'bug', 'ui', 'praise'})
    assert list(record['_confidence']) == ['spam', 'labels', 'c.tone']
