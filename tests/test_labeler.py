"""A student used from Python: what is no text, iterables that fail, other processes."""
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from distil.checkpoint import CHECKPOINT, save_checkpoint
from distil.kinds import Choice
from distil.space import OutputSpace, tokenizer_hash
from sample import Labeler
from tests.conftest import FIELDS, ROOT, one_line, run, tiny_student
from tools.accuracy import measure


@pytest.fixture(scope='module')
def labeler(project):
    return Labeler(project / 'out/toy', 'cpu')


@pytest.mark.parametrize('odd', [float('nan'), None, 5, ['hello'], {'text': 'hello'}])
def test_what_is_no_text_gets_an_error_in_its_place(labeler, odd):
    first, error, last = labeler(['good food', odd, 'bad film'])
    assert [first, last] == labeler(['good food', 'bad film'])
    assert error == {'error': f'not a text but {type(odd).__name__}'}


def test_bytes_are_utf8_and_one_text_is_not_a_list_of_letters(labeler):
    assert labeler([b'hello my friend', 'caf\xe9'.encode()]) == labeler(['hello my friend', 'caf\xe9'])
    for text in ('hello', b'hello'):
        with pytest.raises(TypeError, match='a list of texts, not one text'):
            labeler(text)
    with pytest.raises(TypeError):
        labeler(5)


@pytest.mark.parametrize('n', [0, 1, 70])
def test_an_iterable_that_fails_gives_its_answers_and_then_its_exception(labeler, n):
    def texts():
        yield from ['hello my friend'] * n
        raise ZeroDivisionError('of the caller')
    records = []
    with pytest.raises(ZeroDivisionError, match='of the caller'):
        for record, _ in labeler.stream(texts()):
            records.append(record)
    assert records == labeler(['hello my friend'] * n)


def save_student(tokenizer, tmp_path, fields):
    """writes a tiny student of these fields to tmp_path."""
    space = OutputSpace(tokenizer, fields, end_id=2)
    student = tiny_student(space)
    task = {'fields': fields, 'indent': None, 'fence': False, 'end_id': 2, 'output_ids': space.output_ids,
            'tokenizer_hash': tokenizer_hash(tokenizer), 'prompt': '{text}', 'max_text': 18}
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    save_checkpoint(tmp_path / 'best.pt', {
        'format': CHECKPOINT, 'student': vars(student.config), 'model': student.state_dict(), 'task': task,
        'per_field': {name: {'temperature': 1.0} for name in fields}})


def test_a_field_called_error_is_not_taken_for_a_problem(tokenizer, tmp_path):
    save_student(tokenizer, tmp_path, {'error': ['none', 'timeout'], 'ok': [True, False]})
    labeler = Labeler(tmp_path, 'cpu', too_long='refuse')
    answered, empty, no_text, long = labeler(['hello', '', None, 'the cat ' * 50])
    assert answered['error'] in ('none', 'timeout') and '_error' not in answered
    assert empty == {'_error': 'empty text'} and no_text == {'_error': 'not a text but NoneType'}
    assert [*long] == ['_error'] and labeler.problem == '_error'
    known = [{'error': 'none'}] * 4
    figures = measure(Choice(('error',), ['none', 'timeout']), [answered, empty, no_text, long], known, [],
                      labeler.problem)
    assert figures['texts'] == 1


def test_values_that_print_alike_keep_a_probability_each(tokenizer, tmp_path):
    save_student(tokenizer, tmp_path, {'answer': [True, 'true', 'no']})
    record, = Labeler(tmp_path, 'cpu', confidence='full')(['hello'])
    probabilities = record['_confidence']['answer']
    assert list(probabilities) == ['true', '"true"', '"no"']
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-3)


def test_an_input_that_cannot_be_read_exits_with_a_message(project):
    # the memory of the process itself: it can be opened, but not read at its beginning
    assert 'cannot read the texts: Input/output error' in one_line(run(project, 'sample.py', '--input=/proc/self/mem'))


def test_a_labeler_can_be_pickled(labeler):
    copy = pickle.loads(pickle.dumps(labeler))
    assert copy(['hello my friend', '']) == labeler(['hello my friend', ''])
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        answers = pool.map(labeler, [['hello my friend'], ['the cat']])
    assert answers == [labeler(['hello my friend']), labeler(['the cat'])]


@pytest.mark.slow
def test_a_forked_process_answers_too(project):
    """torch's threads do not survive a fork: with more than one a large product in the child hangs."""
    program = f'''
import multiprocessing, pickle, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from sample import Labeler
torch.set_num_threads(2)
labeler, texts = Labeler('out/toy', 'cpu'), ['hello my friend', 'the cat']
expected = labeler(texts)
torch.ones(3000, 3000) @ torch.ones(3000, 3000)  # starts the threads

def child(results):
    results.put(labeler(texts))
    results.put((torch.ones(3000, 3000) @ torch.ones(3000, 3000))[0, 0].item())
    results.put(pickle.loads(pickle.dumps(labeler))(texts))  # as a pool does

context = multiprocessing.get_context('fork')
results = context.SimpleQueue()
process = context.Process(target=child, args=(results,))
process.start()
process.join(60)
alive = process.is_alive()
process.kill()
assert not alive and results.get() == expected and results.get() == 3000 and results.get() == expected
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], cwd=project, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '2'})
    assert done.returncode == 0, done.stderr


def test_a_student_of_less_than_an_epoch_answers(project, tmp_path):
    """ckpt.pt of the first epoch has no temperatures yet."""
    folder = shutil.copytree(project / 'out/toy', tmp_path / 'early')
    checkpoint = torch.load(folder / 'ckpt.pt', weights_only=True)
    save_checkpoint(folder / 'ckpt.pt', checkpoint | {'per_field': None})
    record, = Labeler(folder, 'cpu', which='last')(['hello my friend'])
    assert list(record['_confidence']) == list(FIELDS)


def test_to_ask_the_teacher_takes_a_threshold(project):
    with pytest.raises(SystemExit, match='needs a min_confidence'):
        Labeler(project / 'out/toy', 'cpu', ask_teacher=True)
