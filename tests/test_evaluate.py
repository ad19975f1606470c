"""Agreement, confidence, cost and pictures: cases computed by hand, and the program as a user runs it."""
import importlib.util
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from config import read_data_line
from distil.agreement import (BROKEN, calibration_error, field_texts, fit_temperature, linear_baseline,
                              measure_agreement, read_truth, truth_lines)
from distil.checkpoint import load_checkpoint
from distil.decode import generate
from distil.report import draw_confusion, start_drawing
from distil.kinds import Choice
from distil.space import OutputSpace
from tests.conftest import FIELDS, clone_task, one_line, run
from tools.accuracy import area_under_roc, recall_at_precision
from tools.evaluate import choose_threshold, compute_cost, share_lower_bound, simulate_cascade


def test_agreement_figures_of_a_hand_computed_case():
    figures = measure_agreement(['a', 'a', 'b', 'b'], ['a', 'b', 'b', 'b'])
    assert figures == pytest.approx(dict(agree=0.75, majority=0.75, f1=(2 / 3 + 4 / 5) / 2, kappa=0.5))
    assert measure_agreement(['true', BROKEN], ['1', '1'])['agree'] == 0  # true is not 1


def test_an_answer_that_breaks_the_schema_agrees_in_no_field_even_if_null_is_allowed(tokenizer):
    space = OutputSpace(tokenizer, {'a': [None, 'x'], 'b': [None, True]})
    null, broken = space.from_json({'a': None, 'b': None}), space.from_json({'a': None, 'b': None})[:-3]
    student, teacher = field_texts(space, [null, broken]), field_texts(space, [null, null])
    agree = [measure_agreement(student[field], teacher[field])['agree'] for field in space.schema.paths]
    assert agree == [0.5, 0.5]


def test_teacher_and_student_are_compared_with_the_truth_if_a_text_has_one(project, tmp_path):
    shards = data.Shards('toy', 'toy', project / 'data')
    _, model, space = load_checkpoint(project / 'out/toy', 'cpu')
    rows = shards.split()[1]
    answers = generate(model, space, [shards.ids(i).tolist() for i in rows])
    records, expected = [{'text': 'of another split', 'truth': {'spam': True}}, {'text': 'no truth'},
                         {'text': 'bad', 'truth': 3}], []
    for n, i in enumerate(rows):
        truth = {'spam': n % 3 == 0} | ({'tone': 'friendly'} if n % 2 else {})
        records.append({'text': space.tokenizer.decode(shards.ids(i).tolist()), 'truth': truth})
        expected += [(f, space.to_json(shards.answer(i).tolist())[f] == v, space.to_json(answers[n])[f] == v)
                     for f, v in truth.items()]
    (tmp_path / 'input.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    truth = read_truth(tmp_path / 'input.jsonl', shards, rows)
    both = {'teacher': [shards.answer(rows[n]).tolist() for n in truth],
            'student': [answers[n] for n in truth]}
    lines = {line['name']: line for _, line in truth_lines(space, truth, both)}
    for field in FIELDS:
        pairs = [pair[1:] for pair in expected if pair[0] == field]
        assert [lines[field][k] for k in ('records', 'teacher', 'student')
                ] == pytest.approx([len(pairs), *np.mean(pairs, axis=0)])
    spam = [(n % 3 == 0, *pair[1:]) for n, pair in enumerate(p for p in expected if p[0] == 'spam')]
    balanced = np.mean([np.mean([pair[1:] for pair in spam if pair[0] == value], axis=0)
                        for value in (True, False)], axis=0)
    share = max(np.mean([pair[0] for pair in spam]), np.mean([not pair[0] for pair in spam]))
    expected = pytest.approx([*balanced, share])
    assert [lines['spam'][k] for k in ('balanced', 'student_balanced', 'majority')] == expected
    assert not read_truth(project / 'data/toy/input.jsonl', shards, rows)
    shards.meta['max_text'] = len(shards.ids(rows[2]))  # as if the text had been longer, and cut
    text = space.tokenizer.decode(shards.ids(rows[2]).tolist()) + ' and more'
    (tmp_path / 'input.jsonl').write_text(json.dumps({'text': text, 'truth': {'spam': True}}))
    assert read_truth(tmp_path / 'input.jsonl', shards, rows) == {2: {'spam': True}}


def test_temperature_calibration_error_cascade_and_cost_of_cases_computed_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(4000, 3)
    masked, choice = torch.cat((logits, torch.full((4000, 2), -math.inf)), 1), logits.argmax(-1)
    targets = torch.multinomial((logits / 2).softmax(-1), 1)[:, 0]  # the teacher's logits are half as large
    for scale in (1, 3):
        decisions = [[('f', z * scale, c)] for z, c in zip(masked, choice)]
        assert fit_temperature(decisions, (choice == targets).tolist()) == pytest.approx(2 * scale, rel=0.1)
    two_steps = [[('f', z, c), ('f', z, c)] for z, c in zip(masked, choice)]  # a value of two tokens
    both = (choice == targets) & (choice == torch.multinomial((logits / 2).softmax(-1), 1)[:, 0])
    assert fit_temperature(two_steps, both.tolist()) == pytest.approx(2, rel=0.1) and fit_temperature(
        [[], []], [True, False]) == 1
    assert calibration_error([0.95, 0.95, 0.55, 0.55],
                             [True, False, True, False]) == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    confidence = np.array([[0.9, 0.9], [0.4, 0.9], [0.8, 0.3], [0.7, 0.7]])
    hits = np.array([[1, 1], [0, 1], [1, 0], [1, 0]], bool)
    assert list(simulate_cascade(confidence, hits, (0, 0.5, 1))) == [
        {'deferred': 0, 'min_confidence': 0.3, 'field': 5 / 8, 'exact': 1 / 4, 'kept_field': 5 / 8},
        {'deferred': 0.5, 'min_confidence': 0.7, 'field': 7 / 8, 'exact': 3 / 4, 'kept_field': 3 / 4},
        {'deferred': 1, 'min_confidence': 1.0, 'field': 1, 'exact': 1, 'kept_field': 1.0}]
    work = {'extract_hours': 1.0, 'train_hours': 0.5, 'teacher_rec_s': 10.0}
    cost = compute_cost(work, 1000.0, 3.6, 0.0, 1000)
    assert cost['teacher_million'] == pytest.approx(100) and cost['student_million'] == pytest.approx(1)
    assert cost['spent'] == pytest.approx(5.4) and cost['days'] == pytest.approx(5.4 / 99 * 1e3)
    assert cost['break_even'] == pytest.approx(5.4 / 99 * 1e6)
    cheap = compute_cost(work, 1000.0, 3.6, 0.5, 1000)
    assert cheap['break_even'] == math.inf  # a teacher that costs less than the student


def test_students_are_compared_in_a_table_and_a_picture(project):
    pytest.importorskip('matplotlib')
    done = run(project, 'tools/evaluate.py', '--compare=out/toy,out/toy')
    figures = [
        dict(f.split('=') for f in line.split()[1:]) for line in done.stdout.splitlines()
        if line.startswith('student ')
    ]
    assert [f['run'] for f in figures] == ['toy', 'toy'] and all(
        float(f['rec_s']) > 0 and float(f['latency_ms']) > 0 for f in figures), done.stderr
    assert (project / 'out/compare.png').stat().st_size > 1000
    assert 'does not exist' in one_line(run(project, 'tools/evaluate.py', '--compare=out/toy,out/nobody'))


def test_the_report_shows_teacher_and_student_side_by_side(project):
    picture = project / 'out/toy/report.png'
    picture.unlink(missing_ok=True)
    done = run(project, 'tools/evaluate.py', '--examples=2')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    teacher_lines, student_lines = ([line.split()[1:] for line in lines if line.startswith(f'   {model} ')]
                                    for model in ('teacher', 'student'))
    assert len(teacher_lines) == len(student_lines) == 2
    for teacher, student in zip(teacher_lines, student_lines):
        assert [a != b for a, b in zip(teacher, student)] == [value.endswith('<') for value in student]
    (shown,) = [line for line in lines if line.startswith('val ')]
    assert shown in (project / 'train.py.stdout').read_text().splitlines()
    figures = dict(pair.split('=') for pair in shown.split()[1:])
    field, majority = (f'{100 * float(figures[key]):.0f} of 100' for key in ('field', 'majority'))
    (summary,) = [line for line in lines if line.startswith('the student agrees')]
    assert f'in {field} fields' in summary and f'majority baseline agrees in {majority[:-7]}' in summary
    tags = [line.split()[0] for line in done.stdout.splitlines() if '=' in line]
    assert tags.count('reliability') == tags.count('cost') == 1 and tags.count('cascade') == 6
    if importlib.util.find_spec('matplotlib'):
        assert picture.stat().st_size > 10000 and str(picture.relative_to(project)) in done.stdout



@pytest.mark.slow
def test_names_and_values_may_have_any_character(project, tmp_path):
    root = clone_task(project, tmp_path)
    fields = {'order status': ['on hold', 'a=b'], '=': ['"', "it's"], '😀 mood': ['😀', ''],
              'x\u2028y\n': ['$\\frac', '$']}
    lines = [{'text': json.loads(line)['text'], 'answer': {name: values[n % 2] for name, values in fields.items()}}
             for n, line in enumerate(open(root / 'data/toy/input.jsonl'))]
    (root / 'labels.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    with open(root / 'config/toy.py', 'a', encoding='utf-8') as file:
        file.write(f'fields = {fields!r}\nprompt = "{{text}}"\nlabels = "labels.jsonl"\ncalibrate = 0\nprior = {{}}\n'
                   'max_epochs = 2\nmax_text = 40\nblock_size = 120\n')
    (root / 'data/toy/input.jsonl').write_text('\n'.join(
        json.dumps({'text': line['text'], 'truth': line['answer']}) for line in lines))
    for program, *args in (('extract.py',), ('train.py',), ('tools/evaluate.py',),
                           ('tools/accuracy.py', '--input=labels.jsonl', '--outside=labels.jsonl')):
        done = run(root, program, *args)
        assert done.returncode == 0, (program, done.stderr)
        read = map(read_data_line, done.stdout.splitlines())
        shown = [figures['name'] for tag, figures in read if tag in ('field', 'truth', 'accuracy')]
        assert shown[-4:] == ([] if program == 'extract.py' else list(fields)), program
    read = map(read_data_line, (root / 'out/toy/log.txt').read_text(encoding='utf-8').splitlines())
    assert [figures['name'] for tag, figures in read if tag == 'field'] == 2 * list(fields)


def test_without_held_out_records_the_figures_of_the_training_are_shown(project, tmp_path):
    root = clone_task(project, tmp_path, 'out')
    shutil.rmtree(root / 'data/toy')
    done = run(root, 'tools/evaluate.py', '--which=last')
    assert done.returncode == 0, done.stderr
    assert 'val step=115' in done.stdout and 'no held-out records here' in done.stdout


def test_the_lower_bound_of_a_share_is_that_of_clopper_and_pearson():
    for hits, n in ((9, 10), (95, 100), (0, 5), (5, 5), (700, 1000), (1, 1)):
        p = share_lower_bound(hits, n)
        tail = sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(hits, n + 1))
        assert tail == pytest.approx(1 if hits == 0 else 0.05, rel=1e-3)
        assert p == 0 if hits == 0 else p < hits / n
    assert share_lower_bound(59, 59) == pytest.approx(0.05 ** (1 / 59), abs=1e-6)  # p ** n = 0.05


@pytest.mark.slow
def test_the_lowest_threshold_that_reaches_the_target_is_stored(project, tmp_path):
    confidence = np.linspace(0.3, 1, 400)[:, None].repeat(2, 1)
    hits = np.ones((400, 2), bool)
    hits[:200:2, 1] = False                                     # half of the less confident ones miss a field
    target = choose_threshold(confidence, hits, 0.9)
    kept = confidence[:, 0] >= target['min_confidence']
    assert target['agree'] == pytest.approx(hits[kept].all(1).mean()) and target['at_least'] >= 0.9
    lower = confidence[~kept, 0].max()                          # the next lower threshold is too low
    more = hits[confidence[:, 0] >= lower].all(1)
    assert share_lower_bound(int(more.sum()), len(more)) < 0.9
    assert target['kept'] == pytest.approx(kept.mean())
    assert choose_threshold(confidence, ~hits, 0.5) is None
    root = clone_task(project, tmp_path, 'toy-00', 'out')
    done = run(root, 'tools/evaluate.py', '--target_agreement=0.3')
    line, = [line for line in done.stdout.splitlines() if line.startswith('target ')]
    threshold = float(line.split('min_confidence=')[1].split()[0])
    stored = load_checkpoint(root / 'out/toy', 'cpu')[0]['target']
    assert stored['min_confidence'] == pytest.approx(threshold, rel=1e-3) and stored['agreement'] == 0.3
    content = b'hello my friend\nbuy now\nthe cat sat\n'
    by_name = run(root, 'sample.py', '--min_confidence=target', stdin=content)
    by_value = run(root, 'sample.py', f'--min_confidence={stored["min_confidence"]}', stdin=content)
    assert by_name.stdout == by_value.stdout
    assert by_name.returncode == 0 and len(by_name.stdout.splitlines()) == 3
    assert 'no threshold' in run(root, 'tools/evaluate.py', '--target_agreement=1').stdout
    assert 'no target was set' in one_line(run(root, 'sample.py', '--min_confidence=target', '--text=a'))


@pytest.mark.parametrize('values, truths', [
    (['01', '02'], ['01', '02']), (['0', '1'], ['0', '1']), ([0, 1], ['0.0', ' 1']),
    ([7, -1.5], ['007', '-1.50']), ([True, False], ['TRUE', 'no']), ([False, True], ['0', '1.0']),
    ([None, 'x'], ['None', 'x']),
    (['null', None, 'True', True], ['null', 'NULL', 'True', 'true']), (['1', 1, True], ['1', '1.0', 'TRUE']),
    ([[1, 2], 'y'], ['[1, 2]', 'y']), ([1, '1', True, None], [1, '1', True, None])
])
def test_a_true_text_means_the_value_that_it_is_a_usual_way_to_write(tokenizer, values, truths):
    space = OutputSpace(tokenizer, {'f': values}, indent=2)
    answers = {'teacher': [space.from_json({'f': value}) for value in values]}
    (_, line), = truth_lines(space, {n: {'f': truth} for n, truth in enumerate(truths)}, answers)
    assert line['teacher'] == line['balanced'] == 1 and line['records'] == len(truths)
    wrong = dict(enumerate([{'f': truth} for truth in ('elsewhere', 'nan', 'inf', '', 2, float('nan'))]))
    answers = {'teacher': [space.from_json({'f': values[0]})] * len(wrong)}
    (_, line), = truth_lines(space, wrong, answers)
    assert line['teacher'] == 0 and line['records'] == len(wrong)  # such a truth counts, and no answer is it


def test_recall_at_precision_is_that_of_the_best_threshold():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores, positive = rng.integers(0, 8, 30) / 8, rng.random(30) < 0.4
        found = [(scores >= t) for t in {*scores}]
        best = max([(positive & f).sum() for f in found if positive[f].mean() >= 0.7], default=0)
        assert recall_at_precision(scores, positive, 0.7) == pytest.approx(best / max(1, positive.sum()))


def test_accuracy_counts_right_values_and_parts_texts_outside_by_confidence(project, tmp_path):
    inside, outside = np.array([0.9, 0.7, 0.7, 0.2]), np.array([0.7, 0.1, 0.8])
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    assert area_under_roc(inside, outside) == pytest.approx(np.mean(pairs))
    root = clone_task(project, tmp_path, 'out')
    texts = ['hello my friend', 'buy now', 'the cat sat', 'good day']
    answers = [json.loads(line) for line in run(
        root, 'sample.py', stdin='\n'.join(texts).encode()).stdout.splitlines()]
    field = next(iter(FIELDS))
    other = next(value for value in FIELDS[field] if value != answers[3][field])
    lines = [{'text': text, 'answer': {field: answer[field]}} for text, answer in zip(texts, answers)]
    lines[3] = {'text': texts[3], 'truth': {field: other}}
    write = lambda name, lines: (root / name).write_text('\n'.join(map(json.dumps, lines)) + '\nnot json\n\n')
    write('known.jsonl', [*lines, {'text': 'no answer here'}])
    write('others.jsonl', [{'text': 'zzz'}, {'text': 'qqq'}])
    done = run(root, 'tools/accuracy.py', '--input=known.jsonl', '--outside=others.jsonl')
    assert done.returncode == 0, done.stderr
    line, = [line for line in done.stdout.splitlines() if line.startswith('accuracy ')]
    figures = read_data_line(line)[1]
    assert (figures['name'], figures['texts'], float(figures['right'])) == (field, '4', 0.75)
    assert figures['rare'] in FIELDS[field] and 0 <= float(figures['recall_at_95']) <= 1
    assert figures['outside'] == '2' and 0 <= float(figures['auroc']) <= 1
    assert 'has the answer to one of' in one_line(run(root, 'tools/accuracy.py', '--input=others.jsonl'))
    assert 'gone.jsonl does not exist' in one_line(run(root, 'tools/accuracy.py', '--input=gone.jsonl'))
    assert 'was trained on' not in done.stdout
    root = clone_task(project, tmp_path / 'known', 'toy-00', 'out')
    shards = data.Shards('toy', 'toy', root / 'data')
    rows = [*shards.split()[0][:3], *shards.split()[1][:2]]     # three of the training, two held out
    texts = [shards.space.tokenizer.decode(shards.ids(i).tolist()) for i in rows]
    lines = [{'text': text, 'answer': answers[0]} for text in texts]
    (root / 'known.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    assert 'was trained on 3 of these texts' in run(root, 'tools/accuracy.py', '--input=known.jsonl').stdout


def test_the_linear_baseline_is_the_better_of_words_and_characters_and_stops_no_training(space, monkeypatch, capsys):
    pytest.importorskip('sklearn')
    rng = np.random.default_rng(0)

    def baseline(texts, values):
        encode = lambda text: np.array(space.tokenizer.encode(text, add_special_tokens=False).ids)
        shards = SimpleNamespace(ids=lambda i: encode(texts[i]),
                                 outs=lambda i: space.from_json({'n': 0, 'tone': values[i], 'ok': True}))
        return linear_baseline(shards, space, range(80), range(80, 100))
    tones = ['neutral', 'friendly'] * 50
    letters = ['ab' if tone == 'neutral' else 'yz' for tone in tones]
    # no word comes twice, as in a language without blanks, but groups of letters do
    unique = [f'{"".join(rng.choice([*"cdefgh"], 6))}{part}{n}' for n, part in enumerate(letters)]
    found = baseline(unique, tones)
    assert found['ngrams'] == 'characters' and found['fields']['tone'] == 1.0 and found['field'] == 1.0
    words = baseline([f'{"good" if tone == "friendly" else "bad"} {n}' for n, tone in enumerate(tones)], tones)
    assert words['field'] == 1.0
    nothing = baseline([chr(0x4e00 + n) for n in range(100)], tones)  # in which only the blanks come twice
    assert nothing['fields'] == {'n': 1.0, 'tone': 0.5, 'ok': 1.0}
    assert not capsys.readouterr().out
    monkeypatch.setattr('distil.agreement.LINEAR_COST', 20 * max(map(len, space.schema.leaves)))
    late = ["bad x" if tone == "friendly" or n < 20 else "good x" for n, tone in enumerate(tones)]
    assert baseline(late, tones)['fields']['tone'] == 0.5       # the first 20 records teach it nothing
    assert 'from the first 20 records alone' in capsys.readouterr().out


def test_the_picture_names_values_in_their_own_script():
    pytest.importorskip('matplotlib')
    _, ax = start_drawing().subplots()
    values = ['jó', '好', True]
    draw_confusion(ax, Choice(('hang',), values), *[[*map(json.dumps, values)]] * 2)
    assert [label.get_text() for label in ax.get_yticklabels()] == ['"jó"', '"好"', 'true']
    assert [text.get_text() for text in ax.texts] == ['1', '0', '0', '0', '1', '0', '0', '0', '1']
