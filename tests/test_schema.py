"""What a field is: leaves, labels, and the written form of an answer."""
import json
import re

import hypothesis
import hypothesis.strategies as st
import pytest

from distil.kinds import Choice
from distil.schema import Schema, write_gaps, write_object, write_value
from distil.values import plain, value_names

FIELDS = {'tone': ['neutral', 'friendly'], 'n': [1, 2.5, None], 'ok': [True, 'true'], 'kind': ['fixed']}
SCHEMA = Schema(FIELDS)
CONSTANTS = st.one_of(st.integers(-99, 99), st.booleans(), st.none(), st.text(max_size=6), st.floats(-9, 9),
                      st.lists(st.integers(0, 9), max_size=2))


def test_leaves_have_a_path_and_names_that_differ():
    assert SCHEMA.paths == ['tone', 'n', 'ok', 'kind'] and [leaf.path for leaf in SCHEMA.decided] == ['tone', 'n', 'ok']
    assert SCHEMA.leaf('n').names == ['1', '2.5', 'null'] and SCHEMA.leaf('ok').names == ['true', '"true"']
    assert value_names(['a', True]) == ['a', 'true'] and SCHEMA.leaf('tone').describe() == 'neutral, friendly'
    with pytest.raises(ValueError, match="no field 'tune'; there are: tone, n, ok, kind"):
        SCHEMA.leaf('tune')
    assert SCHEMA.only(['n']).paths == ['n'] and SCHEMA.only([]) is SCHEMA
    with pytest.raises(ValueError, match='nothing to decide'):
        Schema({'kind': ['fixed']}).check()


@pytest.mark.parametrize('value, n', [(1, 0), (1.0, 0), (2.5, 1), (None, 2)])
def test_a_value_is_found_however_a_number_is_written(value, n):
    leaf = SCHEMA.leaf('n')
    assert leaf.number(value) == n and leaf.read(value) == [float(k == n) for k in range(3)]


@pytest.mark.parametrize('value, message', [
    (True, 'n is true, not one of 1, 2.5, null'), ('1', 'n is "1", 1 in another case or type'),
    ([1], 'n is [1], not one of'), ({'a': 1}, 'n is {"a": 1}, not one of')])
def test_another_value_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SCHEMA.leaf('n').number(value)


def test_an_answer_is_read_in_its_canonical_form():
    answer = {'tone': 'neutral', 'n': 1.0, 'ok': 'true', 'kind': 'fixed'}
    assert json.dumps(SCHEMA.canonical({'more': 1, **answer})) == json.dumps({**answer, 'n': 1})
    assert SCHEMA.numbers(answer) == {'tone': 0, 'n': 0, 'ok': 1, 'kind': 0}
    assert SCHEMA.canonical({key: answer[key] for key in ('kind', 'ok', 'tone')})['n'] is None  # a missing key is null
    assert SCHEMA.is_answer({**answer, 'n': 1}) and not SCHEMA.is_answer(answer) and not SCHEMA.is_answer(None)
    assert not SCHEMA.is_answer({**answer, 'n': 1, 'more': 1})
    for wrong, message in (({}, 'it has no tone'), ([], 'not an object'), (None, 'not an object'),
                           ({**answer, 'tone': 'Friendly'}, '"friendly" in another case')):
        with pytest.raises(ValueError, match=message):
            SCHEMA.canonical(wrong)


def test_a_label_and_its_probabilities_come_back():
    label = {'answer': {'ok': True, 'n': None}, 'probabilities': {'tone': {'friendly': 3, 'neutral': 1}}}
    p = SCHEMA.read_label(label)
    assert p == {'tone': [0.25, 0.75], 'n': [0, 0, 1], 'ok': [1, 0], 'kind': [1.0]}
    assert SCHEMA.read_label(SCHEMA.write_label(p)) == p


def test_a_cell_of_a_table_means_the_usual_value():
    leaf = Choice(('x',), [True, None, 3, 'no'])
    assert [leaf.meant_by(cell) for cell in ('TRUE', 'yes', 'none', '3.0', 'no', 'odd', False)] == [
        True, True, None, 3, 'no', 'odd', False]


@hypothesis.given(st.dictionaries(st.text(max_size=4),
                                  st.lists(CONSTANTS, min_size=1, max_size=4, unique_by=json.dumps),
                                  min_size=1, max_size=4),
                  st.sampled_from([None, 0, 2, 4]), st.booleans(), st.data())
@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
def test_the_texts_of_the_options_that_are_taken_are_the_json_of_the_answer(fields, indent, fence, data):
    schema = Schema(fields)
    number = {leaf.path: data.draw(st.integers(0, len(leaf) - 1)) for leaf in schema.leaves}
    answer = schema.fill(lambda choice: number[choice.path])
    written, fork = schema.place(indent, fence)
    while fork:
        option, = [option for option in fork.options if all(number[path] == n for path, n in option.made)]
        written, fork = written + option.text, option.fork
    expected = json.dumps(answer, indent=indent, ensure_ascii=False,
                          separators=(',', ':' if indent is None else ': '))
    assert written == schema.write(answer, indent, fence) == (f'```json\n{expected}\n```' if fence else expected)
    assert fence or write_object(answer, indent) == expected
    assert schema.is_answer(answer) and schema.numbers(answer) == number


def test_an_object_without_properties_and_nested_lists_are_written():
    assert write_object({}) == '{}' and write_gaps([]) == ['{}']
    assert (write_value([1, [2]], 2) == '[\n    1,\n    [\n      2\n    ]\n  ]'
            and plain([1.0, {'a': 2.0}]) == [1, {'a': 2}])


def test_the_json_schema_allows_the_answers_and_nothing_else():
    validate = pytest.importorskip('jsonschema').Draft202012Validator(SCHEMA.json_schema()).is_valid
    assert validate({'tone': 'neutral', 'n': None, 'ok': True, 'kind': 'fixed'})
    assert not validate({'tone': 'neutral', 'n': None, 'ok': True})
    assert not validate({'tone': 'odd', 'n': None, 'ok': True, 'kind': 'fixed'})
