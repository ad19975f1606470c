"""The texts that people hold out: with a "split", or in a file; a tenth of all where nobody says anything."""
import json
import shutil

import numpy as np
import pytest
import torch

import data
from data.lines import text_hash
from data.logs import read_lines
from distil.split import count_near, hash_texts, read_parts, split_of
from tests.conftest import clone_task, make_shards, one_line, random_records, run

TRAIN = 'train.py', '--max_epochs=1', '--overwrite=True'


def write_lines(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


@pytest.fixture
def task(project, tmp_path):
    """(a project with texts and no records, its texts)"""
    root = clone_task(project, tmp_path)
    return root, [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')]


def label(text, **more):
    return {'text': text, 'answer': {'tone': 'friendly' if 'cat' in text else 'neutral', 'spam': True}, **more}


def extract(root, lines, *args):
    """extracts labels with these lines. Returns what was printed."""
    write_lines(root / 'labels.jsonl', lines)
    done = run(root, 'extract.py', '--labels=labels.jsonl', '--calibrate=0', '--prior={}', *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def held_out_texts(root, texts):
    """those of the texts that are held out of the records"""
    shards = data.Shards('toy', 'toy', root / 'data')
    held = {*shards.hashes[shards.split()[1]].tolist()}
    return [text for text in texts if text_hash(text) in held]


def test_what_a_line_says_decides_which_part_its_text_is_in(tmp_path, capsys):
    words = ['train', 'Test', ' val ', 'validation', 'valid', 'dev', 'eval', 'held_out', 'held-out', None, '']
    lines = [{'text': str(n), 'split': word} for n, word in enumerate(words)] + [{'text': 'x'}, {}, 'y', {'text': ''}]
    path = write_lines(tmp_path / 'a.jsonl', lines)
    parts = [part for _, part in read_parts(read_lines(path))]
    assert parts == ['train', *['test'] * 8, 'train', 'train', 'train']
    write_lines(path, [{'text': 'a', 'split': 'test'}, {'text': 'b', 'split': 'tset'}])
    with pytest.raises(SystemExit, match="a.jsonl line 2: its split is 'tset', neither train nor one of test, val"):
        list(read_parts(read_lines(path)))


def test_a_text_is_found_whole_and_cut(tokenizer):
    text = 'the cat sat on a mat and said hello'
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    cut = tokenizer.decode(ids[:4]).strip()
    hashes = hash_texts([text, 'a cat', text], tokenizer, {'max_text': 4})
    assert sorted(hashes.tolist()) == hashes.tolist() and {*hashes.tolist()} == {
        text_hash(of) for of in (text, cut, 'a cat')}
    assert len(hash_texts([], tokenizer, {'max_text': 4})) == 0


@pytest.mark.slow
def test_own_texts_are_held_out_and_all_others_trained_on(task):
    root, texts = task
    tests = texts[5:400:4]                                      # among the records they are all odd ones
    lines = [label(text, split='test' if text in tests else 'train') for text in texts]
    shown = extract(root, [*lines, label(texts[5], split='train'), label(texts[6], split='dev')])
    assert 'split train=300 held_out=100 both=2' in shown and 'both: 2 lines of the training part' in shown
    expected = {*tests, texts[6]}
    assert {*held_out_texts(root, texts)} == expected
    done = run(root, *TRAIN)
    assert f'records train={400 - len(expected)} held_out={len(expected)} ' in done.stdout, done.stderr
    assert 'chosen on the held-out records, which flatters a little' in done.stdout
    state = torch.load(root / 'out/toy/best.pt', weights_only=True)
    assert {*split_of(state).tolist()} >= {*map(text_hash, expected)}
    # confidence: fitted on one half of them and tested on the other
    shown = run(root, 'tools/evaluate.py').stdout
    n_odd = int(next(line for line in shown.splitlines() if line.startswith('reliability ')).split()[1][8:])
    assert 30 < n_odd < 70 and f'val step={state["step"]} records={len(expected)} ' in shown
    assert 'trained already' in run(root, 'train.py', '--max_epochs=1').stdout
    # the records get another split: the student is measured on its own one, and no run goes on with the other
    assert 'split' not in extract(root, [label(text) for text in texts])
    assert held_out_texts(root, texts) == [text for text in texts if data.held_out(text_hash(text))]
    assert run(root, 'tools/evaluate.py').stdout.splitlines()[0] == shown.splitlines()[0]
    refused = one_line(run(root, 'train.py', '--max_epochs=1'))
    assert 'out/toy holds another run (n_train 300 there' in refused and "split '100 hashes" in refused
    assert "there, 'a tenth' here" in refused
    extract(root, lines[:50] + [label(text, split='test') for text in texts[50:51]])
    assert len(held_out_texts(root, texts)) == len([text for text in texts[:50] if text in tests]) + 1


def test_a_split_without_one_of_its_parts_ends_with_one_line(task):
    root, texts = task
    extract(root, [label(text, split='test' if n > 299 else 'train') for n, text in enumerate(texts)],
            '--max_records=100')
    assert '100 records, none of them held out' in one_line(run(root, *TRAIN))
    extract(root, [label(text, split='test') for text in texts])  # and more records
    assert 'all 400 records are held out' in one_line(run(root, *TRAIN))
    write_lines(root / 'labels.jsonl', [label('a cat'), label('a mat', split='3')])
    wrong = one_line(run(root, 'extract.py', '--labels=labels.jsonl', '--calibrate=0', '--prior={}'))
    assert "labels.jsonl line 2: its split is '3', neither train nor one of test" in wrong


@pytest.mark.slow
def test_the_teacher_s_texts_and_given_answers_have_a_split_too(task):
    root, texts = task
    write_lines(root / 'data/toy/input.jsonl', [{'text': text, 'split': 'test'} if n < 30 else {'text': text}
                                                for n, text in enumerate(texts)])
    args = '--calibrate=0', '--prior={}', '--max_records=60'
    done = run(root, 'extract.py', *args)
    assert 'split train=370 held_out=30 both=0' in done.stdout, done.stderr
    assert held_out_texts(root, texts) == texts[:30]
    # answers of a batch have no split: the texts have it
    write_lines(root / 'scored.jsonl', [label(text) for text in texts])
    for kind in ('score', 'labels'):
        shutil.rmtree(root / 'data/toy/toy-00')
        done = run(root, 'extract.py', f'--{kind}=scored.jsonl', *args)
        assert 'split train=370 held_out=30' in done.stdout and held_out_texts(root, texts) == texts[:30], done.stderr


@pytest.mark.slow
def test_the_texts_of_a_file_are_held_out(project, task):
    root, texts = task
    shutil.copytree(project / 'data/toy/toy-00', root / 'data/toy/toy-00')
    forms = {'a.txt': '\ufeff' + '\r\n'.join([*texts[:40], 'of no record', '']),
             'a.jsonl': ''.join(json.dumps({'text': text, 'split': 'any'}) + '\n' for text in texts[:40]),
             'log.jsonl': ''.join(json.dumps({'messages': [
                 {'role': 'user', 'content': f'label this: {text}'},
                 {'role': 'assistant', 'content': '{}'}]}) + '\n' for text in texts[:40])}
    for file, content in forms.items():
        (root / file).write_text(content)
        done = run(root, *TRAIN, f'--held_out={file}')
        assert f'held out: 40 records have one of the {40 + (file == "a.txt")} texts of ' in done.stdout, done.stderr
        assert 'records train=360 held_out=40 ' in done.stdout
    shown = run(root, 'tools/evaluate.py').stdout               # knows them from the student
    assert ' records=40 ' in shown.splitlines()[0] and 'trained already' in run(
        root, 'train.py', '--max_epochs=1', '--held_out=log.jsonl').stdout
    (root / 'log.jsonl').write_text(forms['log.jsonl'] + json.dumps({'text': texts[40]}) + '\n')
    assert 'n_train 360 there, 359 here' in one_line(run(root, 'train.py', '--max_epochs=1', '--held_out=log.jsonl'))
    (root / 'none.txt').write_text('of no record\n')
    assert 'none of its 1 texts is among the 400 records' in one_line(run(root, *TRAIN, '--held_out=none.txt'))
    assert 'gone.txt cannot be read' in one_line(run(root, *TRAIN, '--held_out=gone.txt'))


def test_near_duplicates_are_equal_but_for_case_punctuation_and_numbers_that_decide_nothing():
    orders = [(f'Order {n}: where is it?', 'shipping') for n in (17, 2, 3.5, '1,200', '12:30')]
    assert count_near(orders[:1], orders[1:]) == 4
    assert count_near([('ORDER 2 - where is it', 'shipping')], orders) == 5
    assert count_near([('Order: where is it?', 'shipping')], orders) == 0  # no number is not another one
    assert count_near(orders, [('order 17, where is it', 'billing')]) == 0
    sums = [(f'{n} + 1', str(n + 1)) for n in range(9)]         # the number decides
    assert count_near(sums, [('3 + 2', '5'), ('3 + 1 ', '4'), ('9 + 3', '12')]) == 1
    assert count_near([], orders) == count_near(orders, []) == 0


def test_all_shards_share_the_split_and_half_of_it_tests_the_confidence(tmp_path):
    shards = make_shards(tmp_path, list(random_records(60, 4)), 4, ('t-00', 't-01'))
    rows = shards.split()[1]
    assert shards.own_split is None and shards.is_odd(rows).tolist() == [bool(i % 2) for i in rows]
    assert shards.is_odd([2, 4]).all() and shards.is_odd([3]).all()  # a half that is empty tests nothing
    np.sort(shards.hashes[1::2]).tofile(tmp_path / 'd/t-00/held_out.bin')
    own = data.Shards('d', 't', tmp_path)
    assert own.split()[1].tolist() == [*range(1, 60, 2)] and own.split()[0].tolist() == [*range(0, 60, 2)]
    assert 5 < own.is_odd(own.split()[1]).sum() < 25
