"""An ensemble of students: it is decoded like one student, with the answers of a slow computation; and what
the program writes is what a student that learns from it is trained on."""
import random
import shutil

import numpy as np
import pytest
import torch

import distil.checkpoint
import data
from distil.checkpoint import load_checkpoint
from distil.decode import decode, generate, value_probabilities
from tests.conftest import clone_task, one_line, run, tiny_student, write_texts
from tools.ensemble import Ensemble, answer_texts, load_ensemble


def make_students(space, n, **sizes):
    students = [tiny_student(space, seed, **sizes) for seed in range(n)]
    for student in students:
        for name, p in student.named_parameters():
            p.data = torch.randn_like(p) if name == 'prompt' else 4 * p.data  # no near ties
    return students


@torch.no_grad()
def decode_slowly(students, space, text):
    """output indices of the answer, without a cache, a draft or a batch."""
    outs = []
    while space.state_after(outs) != space.done:
        row = torch.tensor([text + students[0].config.start + [space.output_ids[o] for o in outs]])
        mean = sum(student(row)[0, -1].log_softmax(-1) for student in students) / len(students)
        illegal = space.next_state[space.state_after(outs)] < 0
        outs.append(mean.masked_fill(illegal, -torch.inf).argmax().item())
    return outs


@pytest.mark.parametrize('prompt_sizes', [{}, {'n_prompt': 3, 'after': (7, 9)}])
def test_an_ensemble_is_the_mean_of_its_students_in_every_way_of_decoding(space, prompt_sizes, monkeypatch):
    students, rng = make_students(space, 3, **prompt_sizes), random.Random(0)
    start = students[0].config.start
    model, texts = Ensemble(students), [[rng.randrange(4, 500) for _ in range(rng.randint(1, 20))]
                                        for _ in range(30)]
    answers = list(decode(model, space, texts, 8))
    assert [outs for outs, _ in answers] == [decode_slowly(students, space, text) for text in texts]
    assert any(outs != alone for (outs, _), alone in zip(answers, generate(students[0], space, texts)))
    monkeypatch.setattr(space, 'bias', torch.randn(space.next_state.shape))
    stored = answer_texts(model, space, texts)
    for text, (outs, decisions), (again, logits) in zip(texts, answers, stored):
        row = torch.tensor([text + start + [space.output_ids[o] for o in outs[:-1]]])
        with torch.no_grad():
            mean = sum(student(row).log_softmax(-1) for student in students)[0, -len(outs):] / 3
        assert again == outs
        expected = mean + space.bias[space.states_before(outs)]
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
        states = enumerate(space.states_before(outs))
        choices = [n for n, state in states if len(space.transitions[state]) > 1]
        for n, (_, masked, _) in zip(choices, decisions, strict=True):
            legal = masked > -torch.inf
            torch.testing.assert_close(masked[legal], mean[n][legal], rtol=0, atol=1e-4)
        assert all(sum(of_field) == pytest.approx(1)
                   for of_field in value_probabilities(model, space, text, outs, decisions).values())
    assert generate(Ensemble(students[:1]), space, texts) == generate(students[0], space, texts)


@pytest.fixture(scope='module')
def pool(project, tmp_path_factory, words):
    """the project with a second student, and with texts that the teacher has not answered."""
    root = clone_task(project, tmp_path_factory.mktemp('pool'), 'out', 'toy-00')
    assert run(root, 'train.py', '--run=two', '--seed=2', '--max_epochs=2').returncode == 0
    texts, rng = [text for text, *_ in data.read_texts(root / 'data/toy/input.jsonl')], random.Random(9)
    texts += [' '.join(rng.choices(words, k=rng.randint(10, 14))) for _ in range(90)]
    write_texts(root / 'data/toy', texts)
    return root


STUDENTS = '--students=out/toy,out/two'


def test_answers_of_students_are_trained_on_and_never_measured_on(pool, tmp_path):
    root = clone_task(pool, tmp_path, 'out', 'toy-00')
    done = run(root, 'tools/ensemble.py', STUDENTS)
    assert done.returncode == 0 and '--more=toy_more --run=toy_all' in done.stdout, done.stderr
    before, both = (data.Shards('toy', 'toy', root / 'data', more) for more in ('', 'toy_more'))
    assert len(before) == before.n_teacher == both.n_teacher and 60 < len(both) - len(before) <= 90
    assert np.array_equal(before.split()[1], both.split()[1])  # the held-out split is unchanged
    assert len(np.unique(both.hashes)) == len(both)
    model = Ensemble([load_checkpoint(root / f'out/{name}', 'cpu')[1] for name in ('toy', 'two')])
    for i in range(len(before), len(both)):
        idx, targets, logits = both.batch([i], model.config.start)
        with torch.no_grad():
            expected = model(idx, targets)
        torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), rtol=2e-3,
                                   atol=0.02)  # precision of fp16

    done = run(root, 'train.py', '--more=toy_more', '--run=all', '--max_epochs=1', '--max_records=100')
    assert done.returncode == 0, done.stderr
    first = (before.split()[0] < 100).sum()
    expected = f'records train={first + len(both) - len(before)} held_out={len(before.split()[1])} '
    assert expected in done.stdout
    work = {name: load_checkpoint(root / f'out/{name}', 'cpu', 'last')[0]['work']
            for name in ('toy', 'two', 'all')}
    timed = data.read_meta(root / 'data/toy/toy_more-00')['timed']
    assert timed['records'] == len(both) - len(before)
    assert work['all']['students_hours'] == pytest.approx(
        work['toy']['train_hours'] + work['two']['train_hours'] + timed['seconds'] / 3600)
    assert 'students_hours' not in work['toy']
    assert all(work['all'][key] == work['toy'][key] for key in ('extract_hours', 'teacher_rec_s'))
    done = run(root, 'tools/evaluate.py', '--run=all')
    cost = dict(pair.split('=') for pair in done.stdout.split('\ncost ')[1].splitlines()[0].split())
    assert float(cost['spent']) == pytest.approx(sum(
        float(cost[key]) for key in ('extract_hours', 'students_hours', 'train_hours')), rel=1e-3)
    args = '--run=all', '--max_epochs=1', '--max_records=100'
    assert "more 'toy_more' there, '' here" in one_line(run(root, 'train.py', *args))
    shutil.rmtree(root / 'data/toy/toy_more-00')  # the same texts, answered by another ensemble
    assert run(root, 'tools/ensemble.py', '--students=out/two').returncode == 0
    assert 'out/all holds another run (students' in one_line(run(root, 'train.py', *args, '--more=toy_more'))


def test_if_the_teacher_answers_a_text_later_its_answer_replaces_the_students(pool, tmp_path):
    root = clone_task(pool, tmp_path, 'out', 'toy-00')
    assert run(root, 'tools/ensemble.py', STUDENTS, '--max_more=40').returncode == 0
    both = data.Shards('toy', 'toy', root / 'data', 'toy_more')
    assert len(both) == both.n_teacher + 40
    assert run(root, 'extract.py').returncode == 0
    after = data.Shards('toy', 'toy', root / 'data', 'toy_more')
    assert len(after) == after.n_teacher > len(both) and len(np.unique(after.hashes)) == len(after)
    message = one_line(run(root, 'tools/ensemble.py', STUDENTS, '--more=late'))
    assert 'no text of data/toy/input.jsonl is left to answer' in message
    message = one_line(run(root, 'train.py', '--more=late', '--run=x'))
    hint = "no answers of students in 'late'; run: python tools/ensemble.py config/toy.py --more=late"
    assert hint in message


def test_large_students_answer_in_bfloat16(pool, monkeypatch):
    monkeypatch.setattr(distil.checkpoint, 'is_large', lambda student: True)
    shards = data.Shards('toy', 'toy', pool / 'data')
    texts, answers = [shards.ids(i).tolist() for i in range(60)], []
    for dtype in ('float32', 'bfloat16'):
        model, space, members = load_ensemble([pool / 'out/toy', pool / 'out/two'], shards.meta, 'cpu', dtype)
        assert model.h[-1].attn.c_attn.weight.dtype == getattr(torch, dtype)
        assert [member['run'] for member in members] == ['toy', 'two']
        answers.append(answer_texts(model, space, texts))
    equal = [n for n, (exact, rounded) in enumerate(zip(*answers)) if exact[0] == rounded[0]]
    assert len(equal) >= 54
    for n in equal:
        np.testing.assert_allclose(answers[0][n][1], answers[1][n][1], rtol=0.05, atol=0.2)
    assert not np.array_equal(answers[0][0][1], answers[1][0][1])


def test_an_interrupted_ensemble_continues_and_answers_each_text_once(pool, tmp_path):
    root = clone_task(pool, tmp_path, 'out', 'toy-00')
    answer = lambda *args, **limit: run(root, 'tools/ensemble.py', STUDENTS + '/', '--sample_batch=4', *args,
                                        **limit)
    assert answer('--more=whole').returncode == 0
    assert answer('--more=part', '--max_more=21').returncode == 0
    part = data.Shards('toy', 'toy', root / 'data', 'part')
    assert len(part) - part.n_teacher == 21
    assert 'answers are safe' in one_line(answer('--more=part', file_limit=40000))
    assert answer('--more=part').returncode == 0
    for file in ('input.bin', 'output.bin', 'index.bin'):
        parts = [(root / f'data/toy/{name}-00' / file).read_bytes() for name in ('part', 'whole')]
        assert parts[0] == parts[1]


def test_students_that_do_not_belong_together_are_refused_with_a_message(pool, tmp_path):
    root = clone_task(pool, tmp_path, 'out', 'toy-00')
    message_of = lambda *args: one_line(run(root, 'tools/ensemble.py', *args))
    assert 'no task or no students; run: python tools/ensemble.py' in message_of()
    assert 'out/three/ckpt.pt does not exist' in message_of('--students=out/toy,out/three')
    files = {path: path.read_bytes() for path in (root / 'data/toy/toy-00').iterdir()}
    message = message_of(STUDENTS, '--more=toy')
    assert 'toy-00 has answers that are not of these students; choose another --more=' in message
    assert all(path.read_bytes() == content for path, content in files.items())
    message = message_of('--students=out/toy,out/two,out/toy')
    assert 'out/toy is the same student as one before it' in message
    assert 'toy-00 has no answers of students; choose another --more=' in one_line(
        run(root, 'train.py', '--more=toy', '--run=x'))
    assert run(root, 'tools/ensemble.py', STUDENTS, '--max_more=5').returncode == 0
    assert 'not of these students' in message_of('--students=out/toy', '--max_more=9')
    (root / 'data/toy/toy_more-00/meta.json').rename(tmp_path / 'meta.json')
    assert 'toy_more-00 has records and no meta.json' in message_of(STUDENTS)
    (tmp_path / 'meta.json').rename(root / 'data/toy/toy_more-00/meta.json')
    assert 'toy_more-00 has the answers of students' in one_line(
        run(root, 'extract.py', '--name=toy_more'))
    assert 'toy_more-00 has the answers of students; use it with --more=' in one_line(
        run(root, 'train.py', '--name=toy_more', '--run=x'))
    assert run(root, 'train.py', '--run=small', '--n_layer=1', '--max_epochs=1').returncode == 0
    assert 'out/small has another n_layer than out/toy' in message_of('--students=out/toy,out/small')
    assert "data/toy has no answers of students in 'nothing'; run: python tools/ensemble.py" in one_line(
        run(root, 'train.py', '--more=nothing', '--run=x'))
    state = torch.load(root / 'out/two/best.pt', weights_only=True)
    torch.save(state | {'task': state['task'] | {'prompt': 'another {text}'}}, root / 'out/two/best.pt')
    assert 'out/two learned from another prompt; train it on these records' in message_of(STUDENTS)
    (root / 'data/toy/input.jsonl').unlink()
    assert 'data/toy/input.jsonl does not exist; restore it' in message_of('--students=out/toy')
