"""Calibration: the bias beside a slow twin, and every later step that must apply it."""
import json
import math

import numpy as np
import pytest
import torch

import data
from distil.calibrate import find_priors, learn_bias
from distil.checkpoint import load_checkpoint
from distil.drafts import Drafts
from distil.engine import Teacher, answer
from distil.space import OutputSpace
from distil.teacher import encode_prompt
from distil.labeler import load_teacher_to_ask
from distil.schema import Schema
from tests.conftest import FIELDS, SCHEMAS, clone_task, load_teacher, one_line, run
from test_smoke import step_by_step


def learn_bias_text_by_text(model, space, prompts, priors, min_texts):
    """the slow twin of learn_bias: no cache, one text at a time, full sequences. -> {state: {out: bias}}"""
    prior_at = space.token_shares(priors)
    answers, bias, n_left = [[] for _ in prompts], {}, space.n_left
    while True:
        states = [space.state_after(outs) for outs in answers]
        state = max(states, key=n_left.__getitem__)
        if state == space.done:
            return bias
        waiting = [i for i, s in enumerate(states) if s == state]
        legal = sorted(space.transitions[state])
        kept, rows = [space.output_ids[o] for o in legal], []
        for i in waiting:
            ids = prompts[i] + [space.output_ids[o] for o in answers[i]]
            rows.append(model(torch.tensor([ids])).logits[0, -1].double()[kept])
        if len(legal) > 1 and state in prior_at and len(waiting) >= min_texts:
            p = [row.softmax(-1) for row in rows]
            bias[state] = {out: math.log(sum(x[k] for x in p) / len(p) / prior_at[state][out])
                           for k, out in enumerate(legal)}
        for i, row in zip(waiting, rows):
            row = row - torch.tensor([bias.get(state, {}).get(out, 0.0) for out in legal])
            answers[i].append(legal[row.argmax()])


@pytest.mark.parametrize('fields, indent, fence', [*SCHEMAS[:2], *(pytest.param(*style, marks=pytest.mark.slow)
                                                                  for style in SCHEMAS[2:])])
@pytest.mark.parametrize('only, prior, min_texts', [
    ([], {}, 1), (['spam', 'n', 'a', 'v'], {'spam': {True: 0.2}}, 3)])
def test_the_bias_equals_that_of_the_slow_twin(teachers, fields, indent, fence, only, prior, min_texts):
    tokenizer, model = load_teacher(teachers['gemma'])
    before, after, end_id = encode_prompt(tokenizer, 'the cat and the mat were there {text}\n', chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, fields, indent, fence, end_id, auxiliary=range(4, 300))
    prior = {field: p for field, p in prior.items() if field in fields}
    priors = find_priors(Schema(fields), prior, [field for field in only if field in fields])
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, len(tokenizer), n).tolist() for n in (7, 1, 12, 7, 3, 5, 2, 9, 4)]
    engine = Teacher(model, before, space.output_ids)
    bias, report = learn_bias(engine, space, texts, after, priors, 4, min_texts)
    with torch.no_grad():
        prompts = [before + text + after for text in texts]
        slow = learn_bias_text_by_text(model, space, prompts, priors, min_texts)
    assert bias.keys() == slow.keys()
    for state, row in slow.items():
        assert bias[state] == pytest.approx(row, abs=1e-3)
    assert all(sum(share) == pytest.approx(1) for _, _, *both in report for share in map(dict.values, both))
    meta = {'fields': fields, 'indent': indent, 'fence': fence, 'end_id': end_id, 'bias': bias,
            'output_ids': space.output_ids}
    again = OutputSpace.from_task(tokenizer.backend_tokenizer, json.loads(json.dumps(meta)))
    torch.testing.assert_close(again.bias, space.bias)          # as read from meta.json
    drafts, answers = Drafts(space), []
    for _ in range(2):                                          # the second time with learned drafts
        answers, _ = answer(engine, space, drafts, texts, after)
        for outs, *_ in answers:
            drafts.add(outs)
    with torch.no_grad():
        for text, (outs, logits, _) in zip(texts, answers):
            slow_outs, slow_logits, _ = step_by_step(model, space, before + text + after, constrain=True)
            assert outs == slow_outs
            torch.testing.assert_close(torch.tensor(logits), slow_logits, atol=2e-4, rtol=1e-4)  # raw


def test_calibration_brings_the_mean_near_the_prior(teachers):
    tokenizer, model = load_teacher(teachers['gemma'])
    before, after, end_id = encode_prompt(tokenizer, 'the cat {text}\n', chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, FIELDS, auxiliary=range(4, 300))
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, 300, 5).tolist() for _ in range(40)]
    priors = find_priors(Schema(FIELDS), {'tone': {'friendly': 0.1}}, ['tone'])
    bias, report = learn_bias(Teacher(model, before, space.output_ids), space, texts, after, priors)
    (state, row), = bias.items()
    assert [r[0] for r in report] == [state] and space.leaf_at[state] == 'tone'
    forced, means = space.forced_runs[0][0], []
    friendly = list(row).index(space.from_json({'tone': 'friendly', 'spam': True})[len(forced)])
    kept, start = [space.output_ids[o] for o in row], [space.output_ids[o] for o in forced]
    prompts = [torch.tensor([before + text + after + start]) for text in texts]
    raw = torch.stack([model(prompt).logits[0, -1].double()[kept].detach() for prompt in prompts])
    for shift in (0, torch.tensor([*row.values()])):
        means.append(float((raw - shift).softmax(-1).mean(0)[friendly]))
    assert abs(means[1] - 0.1) < abs(means[0] - 0.1) / 2, means


@pytest.mark.parametrize('prior, only, why', [
    ({'tune': {}}, [], "no field 'tune'"), ({}, ['tune'], "no field 'tune'"),
    ({'tone': {'nice': 0.5}}, [], 'no value "nice"'), ({'tone': {'friendly': 0}}, [], 'share above 0'),
    ({'tone': {'friendly': 1.2}}, [], 'share above 0'), ({'tone': {'friendly': 1.0}}, [], 'must be 1'),
    ({'tone': {'friendly': 0.6, 'neutral': 0.6}}, [], 'must be 1'), ({'tone': 0.5}, [], 'share above 0')])
def test_invalid_priors_are_refused_with_a_reason(prior, only, why):
    with pytest.raises(ValueError, match=why):
        find_priors(Schema(FIELDS), prior, only)


def test_values_without_a_prior_share_the_rest():
    fields = {'a': ['x', 'y', 'z'], 'b': [True, False, 1]}
    assert find_priors(Schema(fields), {'b': {True: 0.5, False: 0.25}}, []) == {
        'a': [pytest.approx(1 / 3)] * 3, 'b': [0.5, 0.25, pytest.approx(0.25)]}
    rest = pytest.approx(0.4)
    assert find_priors(Schema(fields), {'a': {'x': 0.2}}, ['a']) == {'a': [0.2, rest, rest]}


def test_training_and_the_cascade_use_the_calibrated_teacher(project, teachers):
    shards = data.Shards('toy', 'toy', project / 'data')
    tokenizer, model = load_teacher(teachers['gemma'])
    meta, space = shards.meta, OutputSpace.from_task(tokenizer.backend_tokenizer, shards.meta)
    assert meta['bias'] and space.bias.abs().max() > 0.05
    changed = 0
    for i in range(len(shards)):
        outs = shards.answer(i).tolist()
        raw, states = shards.answer(i, 'logits').astype(np.float32), space.states_before(outs)
        np.testing.assert_allclose(shards.logits(i), raw - space.bias[states].numpy(), atol=1e-6)
        illegal = space.next_state[states] < 0
        best = torch.from_numpy(shards.logits(i)).masked_fill(illegal, -math.inf).argmax(-1)
        changed += torch.from_numpy(raw).masked_fill(illegal, -math.inf).argmax(-1).tolist() != outs
        assert best.tolist() == outs
    *_, logits = shards.batch([3, 5])
    np.testing.assert_array_equal(logits, np.concatenate([shards.logits(3), shards.logits(5)]))
    assert changed                                              # calibration matters here
    checkpoint, _, student_space = load_checkpoint(project / 'out/toy', 'cpu')
    assert checkpoint['task']['bias'] == meta['bias'] and torch.equal(student_space.bias, space.bias)
    rows = list(range(0, len(shards), 9))
    answer_texts = load_teacher_to_ask('', checkpoint['task'], student_space, 'cpu')
    assert answer_texts([shards.ids(i) for i in rows]) == [shards.answer(i).tolist() for i in rows]


def test_extract_prints_the_calibration_and_refuses_another(project, tmp_path):
    lines = (project / 'extract.py.stdout').read_text().splitlines()
    read_lines = lambda tag: [dict(f.split('=') for f in line.split()[1:]) for line in lines
                              if line.startswith(tag)]
    printed = read_lines('calibrate ')
    assert [line['field'] for line in printed] == list(FIELDS)
    assert {line['texts'] for line in printed} == {'64'}
    for line in printed:
        for part in ('before', 'after'):
            shares = [float(pair.split(':')[1]) for pair in line[part].split(',')]
            assert len(shares) == 2 and sum(shares) == pytest.approx(1, abs=0.011)
    ties, = read_lines('near_ties ')
    assert 0 <= float(ties['share']) < 1 and float(ties['below']) == 0.01
    root = clone_task(project, tmp_path, 'toy-00')
    for args in (['--calibrate=32'], ['--calibrate=0'], ['--calibrate_fields=["spam"]']):
        assert 'was extracted with another calibrate' in one_line(run(root, 'extract.py', *args))
    assert one_line(run(root, 'extract.py', '--constrain=False')).startswith('calibrate needs constrain')
    assert "no value \"bad\"" in one_line(run(root, 'extract.py', '--prior={"tone": {"bad": 0.1}}'))
