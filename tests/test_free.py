"""What a teacher writes before it decides, beside one token and one whole pass after another."""
import random

import pytest
import torch

from distil.calibrate import find_priors, learn_bias
from distil.drafts import Drafts
from distil.engine import Teacher, answer
from distil.free import FreeText, free_names, open_free
from distil.space import OutputSpace
from distil.teacher import encode_prompt
from tests.conftest import FIELDS, PROMPT, clone_task, load_teacher, run

WITH_REASON = {'reason': {'type': 'string'}, 'more': {'type': 'string'}, **FIELDS, 'note': {'type': 'string'}}
LEFT_OUT = ['reason', 'more', 'note']


def test_texts_before_the_first_answer_are_written_and_no_others():
    assert free_names(WITH_REASON, LEFT_OUT) == ['reason', 'more'] and free_names(FIELDS, []) == []
    assert free_names({'type': 'object', 'properties': WITH_REASON}, LEFT_OUT) == ['reason', 'more']
    assert free_names({'score': {'type': 'number'}, **FIELDS}, ['score']) == []


@pytest.mark.parametrize('family, indent', [('gemma', None), pytest.param('qwen', 2, marks=pytest.mark.slow)])
def test_the_engine_writes_and_decides_as_one_pass_after_another(teachers, words, family, indent):
    tokenizer, model = load_teacher(teachers[family])
    before, after, end_id = encode_prompt(tokenizer, PROMPT, chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, WITH_REASON, indent, False, end_id, range(4, 300),
                        left_out=LEFT_OUT)
    free = open_free(space, {'fields': WITH_REASON, 'left_out': LEFT_OUT, 'free_tokens': 7})
    encode = lambda text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    texts = [encode(' '.join(random.Random(i).choices(words, k=i % 5 + 1))) for i in range(6)]
    engine = Teacher(model, before, space.output_ids)
    answers, _ = answer(engine, space, Drafts(space), texts, after, free=free)
    for text, (outs, logits, lse) in zip(texts, answers):
        ids = free.write_slowly(model, [*before, *text, *after])
        written = tokenizer.backend_tokenizer.decode(ids[len(before) + len(text) + len(after):])
        assert '"reason"' in written and '"more"' in written and outs[:len(free.outs)] == free.outs
        with torch.no_grad():
            for n, state in enumerate(space.states_before(outs)):
                if n >= len(free.outs):
                    row = model(torch.tensor([ids])).logits[0, -1]
                    torch.testing.assert_close(torch.tensor(logits[n]), row[space.output_ids], atol=1e-3, rtol=1e-3)
                    legal = list(space.transitions[state])
                    assert outs[n] == legal[row[[space.output_ids[o] for o in legal]].argmax()]
                    ids.append(space.output_ids[outs[n]])
                else:
                    assert logits[n].argmax() == outs[n] and lse[n] == 0
    priors = find_priors(space.schema, {}, [])
    bias, _ = learn_bias(engine, space, texts, after, priors, 2, 1, free=free)
    plain, _ = learn_bias(engine, space, texts, after, priors, 2, 1)
    assert bias and bias != plain                               # it is measured behind what the teacher wrote
    one, _ = learn_bias(engine, space, texts, after, priors, 4, 1, free=free)
    for state, row in bias.items():
        assert row == pytest.approx(one[state], abs=1e-3)       # in batches of any size


@pytest.mark.parametrize('written, kept', [
    ('so 2', None), ('so 2"', 'so 2'), ('a \\" b', None), ('a \\\\"', 'a \\\\'), ('x", "y', 'x'), ('one\ntwo', 'one')])
def test_a_text_ends_at_its_closing_quote(tokenizer, written, kept):
    space = OutputSpace(tokenizer, WITH_REASON, left_out=LEFT_OUT)
    free, ids = FreeText(space, ['reason'], 50), tokenizer.encode(written, add_special_tokens=False).ids
    ends = [free.end_of(ids[:n]) for n in range(1, len(ids) + 1)]
    first = next((end for end in ends if end is not None), None)
    assert (first is None) == (kept is None) and (first is None or tokenizer.decode(first) == kept)
    assert FreeText(space, ['reason'], len(ids)).end_of(ids) is not None  # at the latest


@pytest.mark.slow
def test_what_is_left_out_is_written_verified_and_not_stored(project, tmp_path):
    root = clone_task(project, tmp_path)
    args = [f'--fields={WITH_REASON}', f'--left_out={LEFT_OUT}', '--calibrate=16', '--max_records=24', '--name=free']
    for settings in (['--free_tokens=6'], ['--free_tokens=6', '--verify=6']):
        done = run(root, 'extract.py', *args, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
    assert 'equal=1.0000' in done.stdout
    done = run(root, 'extract.py', *args, '--free_tokens=0')
    assert 'was extracted with another free_tokens' in done.stderr
