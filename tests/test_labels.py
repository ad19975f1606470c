"""Labels that exist already: probabilities and answers in place of a teacher."""
import json

import numpy as np
import pytest

import data
from distil.labels import record_from_label
from distil.space import OutputSpace, value_names
from tests.conftest import FIELDS, SCHEMAS, clone_task, run


@pytest.mark.parametrize('fields, indent, fence', SCHEMAS)
def test_stored_logits_give_each_value_its_probability(tokenizer, fields, indent, fence):
    """the product of the softmax of the logits along the path of a value must be its probability."""
    space = OutputSpace(tokenizer, fields, indent, fence, auxiliary=range(4, 90))
    rng, name = np.random.default_rng(0), next(f for f, values in fields.items() if len(values) > 1)
    values = fields[name]
    probabilities = rng.dirichlet(np.ones(len(values)))
    label = {'answer': {f: v[-1] for f, v in fields.items() if f != name},
             'probabilities': {name: dict(zip(value_names(values), (3 * probabilities).tolist()))}}  # any scale
    for value, p in zip(values, probabilities):
        shares, product = space.token_shares(name, probabilities), 1.0
        outs = space.from_json({**{f: v[0] for f, v in fields.items()}, name: value})
        for state, out in zip(space.states_before(outs), outs):
            product *= shares.get(state, {}).get(out, 1.0)
        assert product == pytest.approx(p)
    outs, logits = record_from_label(space, label)
    answer = space.to_json(outs)
    assert json.dumps(answer[name]) == json.dumps(values[int(probabilities.argmax())])
    assert all(json.dumps(answer[f]) == json.dumps(v[-1]) for f, v in fields.items() if f != name)
    p = np.exp(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    product, states = 1.0, space.states_before(outs)
    for n, (state, out) in enumerate(zip(states, outs)):
        product *= p[n, out] if space.field[state] == name else 1.0
        assert p[n, list(space.transitions[state])].sum() == pytest.approx(1, abs=1e-4)
    assert product == pytest.approx(probabilities.max(), rel=1e-3)


@pytest.mark.parametrize('label', [
    {}, {'answer': {'tone': 'friendly'}}, {'answer': {'tone': 'friendly', 'spam': 'true'}}, {'answer': 'x'},
    {'probabilities': {'tone': {'friendly': 1}, 'spam': {'maybe': 1}}},
    {'probabilities': {'tone': {'friendly': -1}, 'spam': {'true': 1}}},
    {'probabilities': {'tone': {'friendly': 0}, 'spam': {'true': 1}}},
    {'probabilities': {'tone': {'friendly': 'x'}, 'spam': {'true': 1}}}])
def test_incomplete_or_invalid_labels_give_none(space, tokenizer, label):
    assert record_from_label(OutputSpace(tokenizer, FIELDS), label) is None


def test_a_student_learns_from_given_labels_without_a_teacher(project, tmp_path):
    root = clone_task(project, tmp_path)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')]
    with open(root / 'labels.jsonl', 'w') as file:
        for n, text in enumerate(texts):
            p = 0.9 if 'cat' in text else 0.2
            label = {'probabilities': {'tone': {'friendly': p, 'neutral': 1 - p}},
                     'answer': {'spam': n % 2 == 0},
                     'truth': {'tone': 'friendly' if 'cat' in text else 'neutral'}}
            file.write(json.dumps({'text': text, **label}) + '\n')
        file.write(json.dumps({'text': 'the cat sat there', 'answer': {'tone': 'odd'}}) + '\n')
    done = run(root, 'extract.py', '--labels=labels.jsonl', '--name=given')
    assert done.returncode == 0, done.stderr
    assert 'dropped_invalid=1' in done.stdout and 'loading the tok' in done.stdout
    lines = done.stdout.splitlines()
    assert 'teacher=1' in next(line for line in lines if line.startswith('truth name=tone'))
    shards = data.Shards('toy', 'given', root / 'data')
    assert len(shards) == len(texts) and not shards.meta.get('bias')
    p = np.exp(shards.logits(0)) / np.exp(shards.logits(0)).sum(1, keepdims=True)
    assert p.max(1).min() < 0.91                                # the labels' probabilities, not 0 and 1
    again = run(root, 'extract.py', '--labels=labels.jsonl', '--name=given')
    assert again.returncode == 0 and ', 1 are to do' in again.stdout  # the invalid one: it may be corrected
    done = run(root, 'train.py', '--name=given')
    assert done.returncode == 0, done.stderr
    best = max(float(line.split('agree=')[1].split()[0]) for line in done.stdout.splitlines()
               if line.startswith('field name=tone'))
    assert best > 0.9
    done = run(root, 'tools/evaluate.py', '--name=given')     # no teacher was timed: no verdict on its cost
    assert done.returncode == 0 and 'keep the teacher' not in done.stdout and 'break_even=nan' in done.stdout
    refused = run(root, 'sample.py', '--name=given', '--text=a', '--min_confidence=0.9', '--ask_teacher=True')
    assert refused.returncode == 1 and 'no teacher' in refused.stderr


def test_corrected_labels_are_read_again_and_a_second_answer_is_counted(project, tmp_path):
    root = clone_task(project, tmp_path)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')][:40]

    def label(tones, *more):
        lines = [{'text': text, 'answer': {'tone': tone, 'spam': True}} for text, tone in zip(texts, tones)]
        (root / 'labels.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in [*lines, *more]))
        return run(root, 'extract.py', '--labels=labels.jsonl', '--calibrate=0', '--prior={}').stdout
    first = label(['neutral'] * 30 + ['Neutral'] * 10, {'text': texts[0], 'answer': {'tone': 'friendly', 'spam': True}})
    assert 'other_answer=1' in first and 'dropped_invalid=10' in first
    assert '10 are to do' in label(['neutral'] * 40) and len(data.Shards('toy', 'toy', root / 'data')) == 40
