"""The output space: the automaton accepts the answers of the schema and no others."""
import json
import math
import random
import runpy
from itertools import product
from types import SimpleNamespace

import pytest

from distil.schema import Schema
from distil.drafts import accepted_prefix
from distil.space import OutputSpace
from tests.conftest import CONFIGS, FIELDS, SCHEMAS


@pytest.mark.parametrize('fields, indent, fence', SCHEMAS)
@pytest.mark.parametrize('end_id', [None, 3])
def test_the_automaton_accepts_exactly_the_valid_answers(tokenizer, fields, indent, fence, end_id):
    space = OutputSpace(tokenizer, fields, indent, fence, end_id, auxiliary=range(4, 60))
    rng = random.Random(0)
    for values in product(*fields.values()):
        answer = dict(zip(fields, values))
        outs = [space.output_index[i] for i in space.encode(answer)]
        assert space.state_after(outs) == space.done
        assert len(outs) <= space.max_answer and max(outs) < space.n_required
        assert json.dumps(space.to_json(outs)) == json.dumps(answer)  # 1, '1' and True stay different
        wrong = list(outs)
        wrong[rng.randrange(len(outs))] = rng.randrange(len(space.output_ids))
        if space.state_after(wrong) == space.done:  # then it is another valid answer
            assert space.encode(space.to_json(wrong)) == [space.output_ids[o] for o in wrong]
        assert space.to_json(outs[:-1]) is None


def test_examples_in_the_prompt_with_another_form_than_the_answer_are_reported(tokenizer):
    space = OutputSpace(tokenizer, FIELDS)
    good = space.text({'tone': 'neutral', 'spam': True})
    no_answers = 'say {text} or {x: y}\n{"tone": "neutral" | "friendly"}\n'
    assert not list(space.prompt_mismatches(good + no_answers))
    wrong = [good.replace(',', ', '), good.replace('neutral', 'angry'), '{"spam":true,"tone":"neutral"}',
             '{"tone":"neutral"}']
    messages = [message.split('} ')[1][:15] for message in space.prompt_mismatches(' '.join(wrong))]
    assert messages == ['must be written', 'is not an answe', 'must be written', 'is not an answe']
    for path in CONFIGS:
        task = runpy.run_path(str(path))
        style = SimpleNamespace(schema=Schema(task['fields'], task.get('left_out')), indent=task.get('indent'),
                                fence=task.get('fence'), end_id=1)
        style.text = lambda answer: OutputSpace.text(style, answer)
        assert not list(OutputSpace.prompt_mismatches(style, task.get('prompt', ''))), path


def test_output_vocabulary_is_required_then_auxiliary(tokenizer):
    space = OutputSpace(tokenizer, FIELDS, auxiliary=[50, 51, 50])
    assert space.output_ids[-2:] == [50, 51]
    assert len(set(space.output_ids)) == len(space.output_ids) == space.n_required + 2
    used = {i for values in product(*FIELDS.values()) for i in space.encode(dict(zip(FIELDS, values)))}
    assert set(space.output_ids[:space.n_required]) == used
    again = OutputSpace(tokenizer, FIELDS, auxiliary=space.output_ids)  # as sample.py rebuilds it
    assert again.output_ids == space.output_ids and again.transitions == space.transitions
    assert all((space.forced[s] >= 0) == (len(m) == 1) for s, m in enumerate(space.transitions))


def test_a_draft_is_accepted_up_to_the_first_other_choice():
    assert accepted_prefix([1, 2, 3], [1, 2, 3, 4]) == [1, 2, 3, 4]  # all of it, and the choice after it
    assert accepted_prefix([1, 2, 3], [1, 2, 3]) == [1, 2, 3]
    assert accepted_prefix([1, 2, 3], [1, 5, 3, 4]) == [1, 5]
    assert accepted_prefix([1, 2], [7, 2, 3]) == [7] and accepted_prefix([], [4]) == [4]


def test_the_cache_of_to_json_is_bounded(tokenizer):
    space = OutputSpace(tokenizer, {'a': list(range(105)), 'b': list(range(105))})
    for a, b in product(range(105), repeat=2):
        assert space.to_json([space.output_index[i] for i in space.encode({'a': a, 'b': b})]) == {'a': a, 'b': b}
    assert space.parse.cache_info().currsize == 10000 < 105 ** 2


def test_invalid_schemas_are_refused(tokenizer):
    for fields in ({}, {'a': []}, {'a': [1, 1]}, {'a': True, 'b': [1, 2]}, {'a': 'yes'}):
        with pytest.raises(ValueError):
            OutputSpace(tokenizer, fields)
    for value in ({'a': 1}, [[{}]]):                            # an answer of {"a": 1} could be probabilities
        with pytest.raises(ValueError, match="'f': .* has a JSON object in it; values are strings, numbers"):
            OutputSpace(tokenizer, {'f': [value, 1]})


def test_constants_that_are_not_json_or_have_special_tokens_are_refused(tokenizer):
    for value, why in (('<eos>', 'special token'), ('a <turn> b', 'special token'), (math.nan, 'JSON'),
                       (math.inf, 'JSON'), ([1, -math.inf], 'JSON'), ('\ud800', 'JSON'), (b'bytes', 'JSON'),
                       (lambda: 1, 'JSON'), ({1, 2}, 'JSON')):
        with pytest.raises(ValueError, match=f"'tone'.*{why}"):
            OutputSpace(tokenizer, {'tone': ['neutral', value]})
    for name in (3, None, ('a',)):
        with pytest.raises(ValueError, match='field names must be strings'):
            OutputSpace(tokenizer, {name: ['neutral', 'friendly']})
    with pytest.raises(ValueError, match='special token'):
        OutputSpace(tokenizer, {'<eos>': ['neutral', 'friendly']})
