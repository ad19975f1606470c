"""Labels that exist already: probabilities and answers in place of a teacher."""
import json
import re

import numpy as np
import pytest
import torch

import data
from data.lines import text_hash
from config import split_paths
from distil.cascade import load_answerer
from distil.checkpoint import TASK
from distil.labels import Labels, open_labels
from distil.shares import record_from_label
from distil.values import value_names
from distil.space import OutputSpace
from distil.schema import Schema
from tests.conftest import FIELDS, PROMPT, SCHEMAS, clone_task, load_teacher, one_line, run


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
        shares, product = space.token_shares({name: probabilities}), 1.0
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
        product *= p[n, out] if space.leaf_at[state] == name else 1.0
        assert p[n, list(space.transitions[state])].sum() == pytest.approx(1, abs=1e-4)
    assert product == pytest.approx(probabilities.max(), rel=1e-3)


def test_labels_of_a_thousand_values_are_read_as_those_of_few(tokenizer):
    """1, true and their names stay apart; 1.0 is 1."""
    values = [*range(-500, 500), True, 1.5, 'true', [1], [True]]
    space = OutputSpace(tokenizer, {'n': values}, auxiliary=range(4, 90))
    for value in (-500, 0, 1, 499, True, 1.5, 'true', [1], [True]):
        outs, logits = record_from_label(space, {'answer': {'n': value}})
        assert json.dumps(space.to_json(outs)) == json.dumps({'n': value})
        assert (np.exp(logits)[range(len(outs)), outs] > 0.999).all()
    for value, same in ((1.0, 1), (-3.0, -3), ([1.0], [1])):
        assert record_from_label(space, {'answer': {'n': value}})[0] == space.from_json({'n': same})
    for value in (1.25, 500, 'TRUE', [2.0], '1', None):
        assert record_from_label(space, {'answer': {'n': value}}) is None


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
    assert "labels.jsonl line 401: tone is \"odd\", not one of" in done.stdout and '  label {' in done.stdout
    assert 'labels=1' in next(line for line in lines if line.startswith('truth name=tone'))
    shards = data.Shards('toy', 'given', root / 'data')
    assert len(shards) == len(texts) and not shards.meta.get('bias')
    p = np.exp(shards.logits(0)) / np.exp(shards.logits(0)).sum(1, keepdims=True)
    assert p.max(1).min() < 0.91                                # the labels' probabilities, not 0 and 1
    again = run(root, 'extract.py', '--labels=labels.jsonl', '--name=given')
    assert again.returncode == 0 and ', 0 are to do' in again.stdout and 'another label' not in again.stdout
    done = run(root, 'train.py', '--name=given')
    assert done.returncode == 0, done.stderr
    best = max(float(line.split('agree=')[1].split()[0]) for line in done.stdout.splitlines()
               if line.startswith('field name=tone'))
    assert best > 0.9
    done = run(root, 'tools/evaluate.py', '--name=given')     # no teacher was timed: no verdict on its cost
    assert done.returncode == 0 and 'keep the teacher' not in done.stdout and 'nan' not in done.stdout
    for shown in ('what a call of the LLM costs is not known', '   labels ', 'agrees with the labels in'):
        assert shown in done.stdout
    refused = run(root, 'sample.py', '--name=given', '--text=a', '--min_confidence=0.9', '--ask_teacher=True')
    assert refused.returncode == 1 and 'no teacher' in refused.stderr


def write_lines(path, lines):
    path.write_text(''.join((line if isinstance(line, str) else json.dumps(line)) + '\n' for line in lines))
    return path


def test_corrected_labels_are_read_again_and_changed_ones_are_counted(project, tmp_path):
    root = clone_task(project, tmp_path)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')][:40]

    def label(tones, *more):
        lines = [{'text': text, 'answer': {'tone': tone, 'spam': True}} for text, tone in zip(texts, tones)]
        write_lines(root / 'labels.jsonl', [*lines, *more])
        return run(root, 'extract.py', '--labels=labels.jsonl', '--calibrate=0', '--prior={}').stdout
    first = label(['neutral'] * 30 + ['Neutral'] * 10, {'text': texts[0], 'answer': {'tone': 'friendly', 'spam': True}})
    assert 'conflicting=1' in first and 'dropped_invalid=10' in first
    assert 'line 31: tone is "Neutral", "neutral" in another case or type' in first and '... and 7 more' in first
    again = label(['neutral'] * 40)                             # the first text's label is no longer a mean
    assert '10 are to do' in again and len(data.Shards('toy', 'toy', root / 'data')) == 40
    assert 'another label now: 1 of the stored texts' in again
    assert 'another label now: 6 of the stored texts' in label(['neutral'] * 35 + ['friendly'] * 5)


def test_the_labels_of_a_text_are_averaged_and_contradictions_counted(tmp_path):
    answer = lambda text, tone: {'text': text, 'answer': {'tone': tone, 'spam': True}}
    soft = {'text': 'a', 'probabilities': {'tone': {'friendly': 1, 'neutral': 3}, 'spam': {'true': 1}}}
    path = write_lines(tmp_path / 'a.jsonl', [
        answer('a', 'odd'), answer('a', 'friendly'), answer('b', 'neutral'), answer(' a ', 'neutral'), soft,
        answer('b', 'neutral'), answer('a', 'friendly')])
    labels = Labels([path], Schema(FIELDS))
    lines = list(labels)
    assert [reason for *_, reason in lines] == ['dropped_invalid', '', '', 'conflicting', 'conflicting', 'duplicate',
                                                'duplicate']
    assert lines[1][0] == 'a' and lines[1][1]['probabilities']['tone'] == pytest.approx(
        {'friendly': 2.25 / 4, 'neutral': 1.75 / 4})
    assert lines[2][1]['probabilities'] == {'tone': {'neutral': 1, 'friendly': 0}, 'spam': {'true': 1, 'false': 0}}


@pytest.mark.parametrize('label, message', [
    ({'answer': {'tone': 'Friendly', 'spam': True}}, 'tone is "Friendly", "friendly" in another case or type'),
    ({'answer': {'tone': 'friendly', 'spam': 'true'}}, 'spam is "true", true in another case or type'),
    ({'answer': {'tone': 'friendly'}}, 'it has no spam'), ({}, 'it has no tone'), ({'answer': 'x'}, 'not an object'),
    ({'answer': {'tone': {'friendly': 1}, 'spam': True}}, 'tone is {"friendly": 1}, not one of'),
    ({'probabilities': {'tone': {'odd': 1}}}, "tone has a probability of 'odd', which is not one of neutral"),
    ({'probabilities': {'tone': {'friendly': -1}}}, "tone: -1 is not the probability of 'friendly'"),
    ({'probabilities': {'tone': {'friendly': 0}}}, 'tone has no probability above 0')])
def test_a_wrong_label_says_what_is_wrong(label, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Schema(FIELDS).read_label(label)


def test_a_missing_key_is_null_only_where_the_field_may_be_null():
    fields = {'tone': ['neutral', 'friendly'], 'escalate': [None, True]}
    assert Schema(fields).read_label({'answer': {'tone': 'neutral'}})['escalate'] == [1, 0]
    assert Schema({'escalate': [None, True]}).read_label({'answer': {}})['escalate'] == [1, 0]
    for label in ({}, {'answer': None}, {'answer': {'escalate': True}}, {'probabilities': {'tone': {'neutral': 1}}}):
        with pytest.raises(ValueError, match='it has no'):
            Schema(fields).read_label(label)


def test_a_path_with_a_comma_is_one_of_several_files(tmp_path):
    (tmp_path / 'a,b').mkdir()
    one, two, three = tmp_path / 'a,b/c.jsonl', tmp_path / 'd,e,f.jsonl', tmp_path / 'g.jsonl'
    for path in (one, two, three):
        write_lines(path, [{'text': path.name, 'answer': {'tone': 'neutral', 'spam': True}}])
    assert split_paths(f'{one},{three},{two}') == [str(one), str(three), str(two)]
    assert split_paths(f'{two}') == [str(two)] and split_paths('x,y') == ['x', 'y'] and split_paths('') == ['']
    config = {'labels': f'{one},{two}', 'template': '', 'prompt': '', 'fields': FIELDS, 'label_fields': [],
              'left_out': []}
    assert [line[0] for line in open_labels(config)] == ['c.jsonl', 'd,e,f.jsonl']


def test_files_that_are_no_labels_end_with_one_line_and_broken_lines_are_named(project, tmp_path):
    root = clone_task(project, tmp_path)
    extract = lambda *args: run(root, 'extract.py', '--name=given', *args)
    (root / 'empty.jsonl').write_text('')
    for args, message in ((['--labels=nowhere.jsonl'], 'nowhere.jsonl does not exist'),
                          (['--labels=empty.jsonl'], 'no text of'), (['--labels=data'], 'is not a file'),
                          (['--labels=empty.jsonl,nowhere.jsonl'], 'nowhere.jsonl does not exist'),
                          (['--labels=empty.jsonl', '--template=x'], 'the template must hold {text} once'),
                          (['--labels=empty.jsonl', '--template=x {*} {text}'], 'words between {*} and {text}'),
                          (['--labels=empty.jsonl', "--fields={'f': [[{'a': 1}], 2]}"], 'has a JSON object in it')):
        assert message in one_line(extract(*args)), args
    write_lines(root / 'some.jsonl', [
        {'text': 'cat', 'answer': {'tone': 'neutral', 'spam': True}}, '{"text": "cut', '[]', '', {'body': 'x'},
        {'text': '😀 été 日本 ' * 400, 'answer': {'tone': 'neutral', 'spam': True}}, {'text': ''},
        {'text': 'half \ud800', 'answer': {}}, {'text': '你好', 'answer': {'tone': 'friendly', 'spam': False}}])
    done = extract('--labels=some.jsonl', '--prompt=')          # nobody is asked: no prompt is needed
    assert done.returncode == 0, done.stderr
    assert 'filter read=8 kept=2 bad_json=3 bad_utf8=1 empty=1 long=1' in done.stdout  # "cat" is not too short
    for line in ('some.jsonl line 2: it is not JSON', 'some.jsonl line 5: it has no text', 'line 8: its text has half'):
        assert line in done.stdout
    short = extract('--labels=some.jsonl', '--name=longer', '--min_text=3')
    assert ' short=1' in short.stdout


@pytest.mark.parametrize('kind', ['labels', 'score'])
def test_no_text_with_an_answer_is_left_out_for_its_links_or_markup(project, tmp_path, kind):
    root = clone_task(project, tmp_path)
    texts = ['see www.cat.org', 'the <b>cat</b> sat', '**a** cat & [mat](http://mat.org)', 'cat']
    unreadable = ['a <eos> cat', 'the cat ' * 200]
    write_lines(root / 'given.jsonl', [{'text': text, 'answer': {'tone': 'neutral', 'spam': True}}
                                       for text in texts + unreadable])
    done = run(root, 'extract.py', f'--{kind}=given.jsonl', '--calibrate=0', '--prior={}', '--max_text=60')
    assert 'filter read=6 kept=4 long=1 special=1\n' in done.stdout, done.stderr
    hashes = data.Shards('toy', 'toy', root / 'data').hashes
    assert {*hashes.tolist()} == {*map(text_hash, texts)}
    write_lines(root / 'data/toy/input.jsonl', [{'text': text} for text in [*texts, 'the cat sat on a mat']])
    done = run(root, 'extract.py', '--name=asked', '--calibrate=0', '--max_text=60')  # without an answer they are
    assert 'filter read=5 kept=1 short=1 tag=1 url=2\n' in done.stdout, done.stderr


@pytest.mark.parametrize('family, prompt', [('plain', ''), *(
    pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ('gemma', ''), ('gemma', '{text} is'), ('plain', '{text} is'), ('gemma', PROMPT), ('plain', PROMPT)))])
def test_given_labels_need_no_begin_token_and_no_prompt(project, teachers, tmp_path, family, prompt):
    root = clone_task(project, tmp_path)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')]
    write_lines(root / 'labels.jsonl', [
        {'text': text, 'answer': {'tone': 'friendly' if 'cat' in text else 'neutral', 'spam': True}} for text in texts])
    done = run(root, 'extract.py', f'--teacher={teachers[family]}', '--labels=labels.jsonl', f'--prompt={prompt}',
               '--name=given', '--chat=True')
    assert done.returncode == 0 and 'extract records=400' in done.stdout, done.stderr
    assert json.loads((root / 'data/toy/given-00/meta.json').read_text())['prompt'] == (prompt or '{text}')
    done = run(root, 'train.py', '--name=given', '--max_epochs=1')
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_teacher_answers_the_fields_that_labels_do_not_have(project, tmp_path):
    """each answer is what one-step-at-a-time decoding gives if the labelled field is written for the teacher; the
    stored logits of that field are the label's."""
    root = clone_task(project, tmp_path)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')][:60]
    tones = ['friendly' if n % 3 else 'neutral' for n in range(60)]
    write_lines(root / 'labels.jsonl', [{'text': text, 'answer': {'tone': tone}} for text, tone in zip(texts, tones)])
    command = root, 'extract.py', '--labels=labels.jsonl', '--label_fields=["tone"]', '--name=part'
    refused = run(*command, '--calibrate=20', '--prior={"tone": {"friendly": 0.4}}')
    assert refused.returncode == 1 and 'tone has labels, which are not calibrated' in one_line(refused)
    command = *command, '--calibrate=40', '--prior={}', '--dtype=float32'
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert 'calibrate field=spam' in done.stdout and 'field=tone' not in done.stdout
    shards = data.Shards('toy', 'part', root / 'data')
    space, (_, model) = shards.space, load_teacher(root / shards.meta['teacher'])
    assert len(shards) == 60
    tone_of = {text_hash(text): tone for text, tone in zip(texts, tones)}
    first = space.from_json({'tone': 'neutral', 'spam': True})
    at = [state for state in space.states_before(first) if space.leaf_at[state] == 'tone'][0]
    for i in range(60):
        tone = tone_of[int(shards.hashes[i])]
        known = space.from_json({'tone': tone, 'spam': True})
        start = [space.leaf_at[state] for state in space.states_before(known)].index('spam')
        outs, ids = known[:start], [*shards.meta['before'], *shards.ids(i).tolist(), *shards.meta['after']]
        while (state := space.state_after(outs)) != space.done:
            with torch.no_grad():
                logits = model(torch.tensor([ids + [space.output_ids[o] for o in outs]])).logits[0, -1]
            legal = list(space.transitions[state])
            calibrated = logits[[space.output_ids[o] for o in legal]] - space.bias[state, legal]
            outs.append(legal[int(calibrated.argmax())])
        assert outs == shards.answer(i).tolist()
        n = space.states_before(outs).index(at)
        p = np.exp(shards.logits(i)[n])
        assert p[outs[n]] / p.sum() == pytest.approx(1, abs=1e-3)
    with pytest.raises(SystemExit, match='learned tone from given labels'):
        load_answerer('', {key: shards.meta.get(key) for key in TASK}, space, 'cpu')
    verified = run(*command, '--verify=30')
    assert verified.returncode == 0 and 'equal=1.0000' in verified.stdout, verified.stdout
    other = [{'text': texts[0], 'answer': {'tone': 'friendly'}}]
    write_lines(root / 'labels.jsonl', other)
    assert 'another label now: 1 of the stored texts' in run(*command).stdout
    (root / 'data/toy/prepare.py').touch()
    for arguments, message in ((['--labels=data/toy/gone.jsonl'], 'does not exist; run: python data/toy/prepare.py'),
                               (['--label_fields=["odd"]'], "there is no field 'odd'; there are: tone, spam"),
                               (['--label_fields=["tone", "spam"]'], 'leaves no field to ask'),
                               (['--labels=', '--label_fields=["tone"]'], 'set labels, too'),
                               (['--teacher=http://localhost:9/v1'], 'needs a teacher that runs here')):
        refused = run(*command, *arguments)
        assert refused.returncode == 1 and message in one_line(refused)
