"""Extraction as a user runs it: killed, on a full disk, in several processes, on any text."""
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data.lines import cut_text, read_texts, text_hash
from data.texts import prefetch, read_groups
from distil.extraction import print_filter
from distil.space import OutputSpace, clean
from tests.conftest import (CHILDREN, FIELDS, clone_task, free_port, load_teacher, one_line, run, run_script,
                            torchrun)


def test_any_texts_are_filtered_and_counted(tokenizer, tmp_path):
    good = ['the cat sat on a mat', 'hello \0 there \x1b[0m', '😀 😀 été 日本', 'a  cat\n sat on']
    lines = [
        json.dumps({'text': t}).encode() for t in good + [
            good[0] + ' ', 'cat', 'see www.cat.org now', 'the <b>cat</b> sat', 'a <eos> b c', 'x' *
            4000, '', ' '
        ]
    ]
    lines += [
        b'', b'not json', b'{"text": 3}', b'[]', b'{"text": "\xff\xfe"}', b'{"text": "\\ud800 a b"}',
        b'[' * 100000
    ]
    (tmp_path / 'input.jsonl').write_bytes(b'\n'.join(lines))
    counts = Counter()
    read = lambda size, **limits: list(
        read_groups(read_texts(tmp_path / 'input.jsonl'), tokenizer, size, 3, 60, **limits))
    groups = read(3, counts=counts)
    assert counts == dict(kept=4, duplicate=1, short=1, url=1, tag=2, long=1, empty=3, bad_json=4,
                          bad_utf8=2) and [len(g) for g in groups] == [3, 1]
    assert [tokenizer.decode(ids.tolist()) for group in groups
            for _, ids, _ in group] == [clean(t)
                                        for t in good] and groups[0][0][0] == text_hash(good[0])
    assert [len(g) for g in read(9, limit=2)] == [2] and [len(g) for g in read(2, limit=4)] == [2, 2]
    special = [('<turn>' 'cat sat', None, '')]
    assert list(read_groups(special, tokenizer, 4, 1, 60)) == []
    assert list(prefetch(iter(range(5)))) == list(range(5))


def test_long_texts_are_cut_as_the_student_will_cut_them(tokenizer):
    long = [
        'the cat sat on a mat', 'the cat sat on a mat and said hello to my friend', 'the cat sat on a dog',
        'été 日本 😀 été 日本 😀', 'a cat ' * 3000
    ]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    for max_text in range(1, 12):
        (group, ) = read_groups([(text, None, '') for text in long], tokenizer, 9, 1, max_text, cut='first',
                                counts=(counts := Counter()))
        assert [ids.tolist() for _, ids, _ in group] == list(
            map(list, dict.fromkeys(tuple(encode(text)[:max_text]) for text in long))) and not counts['long']
        (group, ) = read_groups([(text, None, '') for text in long], tokenizer, 9, 1, max_text, cut='last')
        parts = {of: cut_text(of, tokenizer, {'max_text': max_text, 'keep_end': True}) for of in long}
        for of, (ids, text) in parts.items():
            assert ids == encode(of)[-max_text:] and of.strip().endswith(text) and text == ' '.join(text.split())
        assert {tuple(ids.tolist()) for _, ids, _ in group} == {tuple(ids) for ids, _ in parts.values()}
    assert counts['kept'] + counts['equal_once_cut'] == len(long)
    text = 'the cat sat'
    ((hash_, ids, _), ), = read_groups([(f'{text} on www.cat.org', None, '')], tokenizer, 9, 1,
                                       len(encode(text)), cut='first')
    assert hash_ == text_hash(text) and ids.tolist() == encode(text)  # the part cut off is not filtered


def test_texts_that_are_equal_only_because_of_the_cut_are_told_apart(tokenizer, capsys):
    note, answers = 'the cat sat on a mat ' * 9, ({'a': 1}, {'a': 2})
    rows = [(note + 'hello', answers[0], ''), (note + 'good', answers[1], ''), (note + 'good', answers[1], ''),
            (note + 'hello', answers[0], ''), (note + 'hello', answers[1], ''), ('the cat', answers[0], '')]
    for cut, expected in (('first', dict(kept=2, equal_once_cut=1, duplicate=1, conflicting=2)),
                          ('last', dict(kept=3, duplicate=2, conflicting=1)), ('', dict(kept=1, long=5))):
        list(read_groups(rows, tokenizer, 9, 1, 12, cut=cut, counts=(counts := Counter())))
        assert counts == expected
        print_filter(counts, {'max_text': 12, 'keep_end': cut == 'last'})
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith('filter read=6 kept=')
        assert [line[:25] for line in lines[1:]] == ['equal_once_cut: 1 texts a'] * (cut == 'first')
    # a short text that equals the beginning of a long one
    start = tokenizer.decode(tokenizer.encode(note, add_special_tokens=False).ids[:4])
    for texts in ((note, start), (start, note)):
        list(read_groups([(text, None, '') for text in texts], tokenizer, 9, 1, 4, cut='first',
                         counts=(counts := Counter())))
        assert counts == dict(kept=1, equal_once_cut=1)


def test_the_data_lines_of_extract_can_be_parsed(project):
    lines = {
        line.split()[0]: dict(f.split('=') for f in line.split()[1:])
        for line in (project / 'extract.py.stdout').read_text().splitlines()
        if line.split()[0] in ('filter', 'vocab', 'plan', 'extract', 'coverage')
    }
    assert int(lines['vocab']['required']) + int(lines['vocab']['auxiliary']) == int(
        lines['vocab']['total']) == 64
    assert int(lines['filter']['kept']) == int(lines['plan']['records']) == int(lines['extract']['records'])
    assert 0 < float(lines['coverage']['mass']) <= 1.0001


@pytest.mark.slow
@pytest.mark.parametrize('moment', ['records', 'anywhere'])
def test_a_killed_extraction_continues_to_identical_files(project, tmp_path, moment):
    """ten SIGKILLs after some more records, or five at any moment of a run."""
    root, kills, rng = clone_task(project, tmp_path), 0, random.Random(moment)
    folder, whole = root / 'data/toy/toy-00', project / 'data/toy/toy-00'
    records, n_whole = lambda: (folder / 'index.bin').stat().st_size // 24 if (folder / 'index.bin').exists(
    ) else 0, (whole / 'index.bin').stat().st_size // 24
    while kills < (10 if moment == 'records' else 5):
        process = CHILDREN.Process(target=run_script, args=(root, 'extract.py', (), [os.devnull] * 3, 0))
        process.start()
        stop, at = records() + rng.randint(1, 30), time.time() + rng.uniform(0.2, 1.2)
        while process.is_alive() and (records() < stop if moment == 'records' else time.time() < at):
            time.sleep(0.0005)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if records() == n_whole:
            shutil.rmtree(folder)  # complete: start again
    if folder.exists():
        (folder / 'logits.bin').open('ab').write(b'torn')  # and a write that was cut short
    assert run(root, 'extract.py').returncode == 0
    for name in data.kept_files(has_places=False):
        assert (folder / f'{name}.bin').read_bytes() == (whole / f'{name}.bin').read_bytes(), name
    assert data.read_meta(folder)['bias'] == data.read_meta(whole)['bias']  # calibration was killed too
    again = run(root, 'extract.py')
    assert again.returncode == 0 and ', 0 are to do' in again.stdout and 'loading' not in again.stdout


def test_a_full_disk_exits_with_a_message_and_loses_nothing(project, tmp_path):
    root = clone_task(project, tmp_path)
    assert 'records are safe' in one_line(run(root, 'extract.py', file_limit=300000))
    kept, whole = (data.Shards('toy', 'toy', r / 'data') for r in (root, project))
    assert 0 < len(kept) < len(whole) and kept.meta['missing']  # kept too, for the advice on coverage
    writer = data.Writer(root / 'data/toy/toy-00', 64)  # as at the start of the next run
    writer.close()
    for name in data.kept_files(has_places=False):
        content = (root / f'data/toy/toy-00/{name}.bin').read_bytes()
        assert content and (project / f'data/toy/toy-00/{name}.bin').read_bytes().startswith(content)


@pytest.mark.slow
def test_two_ranks_killed_then_three_then_one_extract_every_text_once(project, tmp_path):
    root = clone_task(project, tmp_path)
    ranks = lambda n: [*torchrun(n), 'extract.py', 'config/toy.py', '--extract_batch=8']
    stored = lambda: [
        len(data.read_index(folder, 64)) for folder in data.shard_folders('toy', 'toy', root / 'data')
    ]
    env = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='localhost',
               MASTER_PORT=str(free_port()))  # a kill of torchrun would not reach them
    pair = [
        subprocess.Popen([sys.executable, 'extract.py', 'config/toy.py', '--extract_batch=1'], cwd=root,
                         env={**env, 'RANK': str(r)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for r in range(2)
    ]
    while pair[0].poll() is None and not (len(stored()) == 2 and min(stored()) > 16):
        time.sleep(0.001)
    for process in pair:
        process.kill()
        process.wait()
    before, whole = stored(), data.Shards('toy', 'toy', project / 'data')
    assert len(before) == 2 and 0 < sum(before) < len(whole), before
    done = subprocess.run(ranks(3), cwd=root, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    assert f'holds {sum(before)} texts, {len(whole) - sum(before)} are to do' in done.stdout.decode()
    shards = data.Shards('toy', 'toy', root / 'data')
    assert len(stored()) == 3 and sorted(shards.hashes) == sorted(
        whole.hashes)  # none is missing or stored twice
    assert ', 0 are to do' in run(root, 'extract.py').stdout
    order = {int(h): i for i, h in enumerate(whole.hashes)}
    for i in range(0, len(shards), 7):
        j = order[int(shards.hashes[i])]
        assert shards.ids(i).tolist() == whole.ids(j).tolist() and shards.answer(i).tolist() == whole.answer(
            j).tolist()
        np.testing.assert_allclose(
            shards.answer(i, 'logits').astype(np.float32), whole.answer(j, 'logits'), atol=0.05)


def test_verify_passes_good_records_and_fails_changed_ones(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'extract.py', '--verify=40')
    figures = dict(f.split('=') for f in done.stdout.splitlines()[-1].split()[1:])
    assert done.returncode == 0 and figures['equal'] == '1.0000' and float(figures['max_diff']) < 0.05
    for name, kind in (('logits', '<f2'), ('output', '<u2')):
        content = np.fromfile(root / f'data/toy/toy-00/{name}.bin', kind)
        changed = content.copy()
        changed[3::7 if name == 'logits' else 5] = changed[3] + 1 if name == 'logits' else content[0]
        changed.tofile(root / f'data/toy/toy-00/{name}.bin')
        done = run(root, 'extract.py', '--verify=40')
        assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith('verify '), done.stderr
        content.tofile(root / f'data/toy/toy-00/{name}.bin')
    assert run(root, 'extract.py', '--verify=40').returncode == 0


def test_given_answers_are_scored_and_stored_in_the_same_format(project, tmp_path, teachers):
    root, rng = clone_task(project, tmp_path), random.Random(0)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')][:50]
    given = {
        text_hash(clean(t)): dict(tone=rng.choice(FIELDS['tone']), spam=rng.choice(FIELDS['spam']))
        for t in texts
    }
    lines = [{'text': t, 'answer': given[text_hash(clean(t))]} for t in texts]
    lines += [{'text': 'the cat sat there', 'answer': a}
              for a in (None, )] + [{'text': 'the dog sat there', 'answer': {'tone': 'rude', 'spam': 1}}]
    (root / 'scored.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    done = run(root, 'extract.py', '--score=scored.jsonl')
    assert done.returncode == 0 and 'dropped_invalid=2' in done.stdout, done.stderr
    shards = data.Shards('toy', 'toy', root / 'data')
    tokenizer, model = load_teacher(teachers['gemma'])
    meta = shards.meta
    space = OutputSpace(tokenizer.backend_tokenizer, meta['fields'], meta['indent'], meta['fence'],
                        meta['end_id'], meta['output_ids'])
    assert len(shards) == len(given)
    for i in range(len(shards)):
        outs = shards.answer(i).tolist()
        assert space.to_json(outs) == given[int(shards.hashes[i])]
        with torch.no_grad():
            logits = model(
                torch.tensor([
                    meta['before'] + shards.ids(i).tolist() + meta['after'] +
                    [space.output_ids[o] for o in outs[:-1]]
                ])).logits
        kept = logits[0, -len(outs):][:, space.output_ids]
        np.testing.assert_allclose(
            shards.answer(i, 'logits').astype(np.float32) + shards.answer(i, 'stats')[:, :1], kept, atol=0.02,
            rtol=1e-3)
    assert run(root, 'extract.py', '--score=scored.jsonl', '--verify=9').returncode == 0
    assert 'another score' in one_line(run(root, 'extract.py'))  # own and given answers must not be mixed
    assert ', 0 are to do' in run(root, 'extract.py', '--score=scored.jsonl').stdout


def test_free_running_answers_that_break_the_schema_are_dropped_counted_and_not_repeated(project, tmp_path):
    root = clone_task(project, tmp_path)
    args = ("--fields={'tone': ['neutral', 'bad'], 'spam': [True]}", '--constrain=False', '--calibrate=0')
    done = run(root, 'extract.py', *args)
    figures = {
        line.split()[0]: dict(f.split('=') for f in line.split()[1:])
        for line in done.stdout.splitlines() if line.startswith(('extract ', 'coverage '))
    }
    shards, n = data.Shards('toy', 'toy', root / 'data'), int(figures['extract']['records'])
    dropped = int(figures['coverage']['dropped_invalid']) + int(figures['coverage']['dropped_vocab'])
    assert 0 < dropped == n - len(shards) < n
    again = run(root, 'extract.py', *args)
    expected = f'dropped_invalid={figures["coverage"]["dropped_invalid"]} '
    assert ', 0 are to do' in again.stdout and expected in again.stdout


def test_a_vocabulary_that_misses_likely_tokens_is_reported_and_can_be_extended(project, tmp_path):
    root = clone_task(project, tmp_path)
    # the teacher has learned the values true and false, friendly and neutral
    fields = "--fields={'tone': ['neutral', 'friendly'], 'spam': [1, None]}"
    done = run(root, 'extract.py', fields, '--output_vocab=24', '--min_coverage=0.9')
    advice = [line for line in done.stdout.splitlines() if 'extra_vocab = ' in line]
    assert done.returncode == 0 and advice, done.stdout
    extra = advice[0].split('extra_vocab = ')[1].split(' and choose another name')[0]
    mass = lambda text: float(text.split('coverage mass=')[1].split()[0])
    wide = run(root, 'extract.py', fields, '--output_vocab=64', '--name=wide', f'--extra_vocab={extra}')
    assert mass(wide.stdout) > mass(done.stdout) + 0.05


def test_another_task_or_a_second_run_does_not_touch_a_folder(project):
    before = (project / 'data/toy/toy-00/index.bin').read_bytes()
    assert 'another prompt, fields' in one_line(
        run(project, 'extract.py', '--prompt=other {text}', "--fields={'a': [1, 2]}", '--prior={}'))
    with open(project / 'data/toy/toy-00/index.bin', 'ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert 'another run is writing' in one_line(run(project, 'extract.py'))
    assert 'prepare.py' in one_line(run(project, 'extract.py', '--dataset=nowhere'))
    assert 'hold {text} once' in one_line(run(project, 'extract.py', '--prompt=say', '--name=other'))
    assert 'no records extracted' in one_line(run(project, 'extract.py', '--verify=3', '--name=other'))
    assert (project / 'data/toy/toy-00/index.bin').read_bytes() == before


def test_every_program_reports_a_damaged_meta_json(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    path = root / 'data/toy/toy-00/meta.json'
    path.write_text(path.read_text()[:200])
    for program in ('extract.py', 'train.py', 'tools/bench.py'):
        assert 'meta.json is damaged' in one_line(
            run(root, program, '--run=x') if program != 'extract.py' else run(root, program))


@pytest.mark.slow
@pytest.mark.parametrize('program', ['extract.py', 'train.py'])
def test_a_closed_terminal_ends_a_run_as_kill_does(project, tmp_path, program):
    root = clone_task(project, tmp_path, *([] if program == 'extract.py' else ['toy-00']))
    written = root / ('data/toy/toy-00/index.bin' if program == 'extract.py' else 'out/toy/log.txt')
    args = ['--extract_batch=1'] if program == 'extract.py' else ['--log_steps=1', '--max_epochs=50']
    reset_hangup = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # if the tests run under nohup
    process = subprocess.Popen([sys.executable, program, 'config/toy.py', *args], cwd=root,
                               preexec_fn=reset_hangup, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (written.exists() and written.stat().st_size > 100):
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    stdout, stderr = process.communicate()
    assert b'the same command continues' in stdout + stderr and b'Traceback' not in stderr


def test_a_run_does_not_continue_with_another_max_text(project, tmp_path):
    """longer texts than meta.json promises would not fit the student."""
    root = clone_task(project, tmp_path, 'toy-00')
    message = one_line(run(root, 'extract.py', '--max_text=40'))
    assert 'was extracted with another max_text' in message
