"""tools/teach.py: a larger student's answers, and the records it learned from, as labels for a smaller one."""
import json
import shutil

import numpy as np
import pytest

import data
from config import read_data_line
from data.lines import read_texts, text_hash
from tests.conftest import clone_task, one_line, run


def counts_of(done):
    assert done.returncode == 0, done.stderr
    return {key: int(value) for key, value in read_data_line(done.stdout.splitlines()[-1])[1].items()}


@pytest.mark.slow
def test_a_student_teaches_another_one_what_it_knows_and_what_it_has_learned(project, tmp_path, words):
    root = clone_task(project, tmp_path, 'toy-00', 'out')
    own = [text for text, *_ in read_texts(root / 'data/toy/input.jsonl')]
    others = [f'{a} {b} to the {c}' for a in words[:6] for b in words[6:12] for c in words[12:16]]
    lines = [json.dumps({'text': text}) for text in [own[0], '', *others, others[0]]]
    (root / 'texts.jsonl').write_text('\n'.join(lines))
    command = 'tools/teach.py', '--input=texts.jsonl', '--out=taught.jsonl'
    done = run(root, *command)
    counts = counts_of(done)
    assert 'python extract.py config/toy.py --name=taught --labels=taught.jsonl --max_records=0\n' in done.stdout
    stored = data.Shards('toy', 'toy', root / 'data')
    n_held = sum(text_hash(text) % 10 == 0 for text in others)
    assert counts == {'records': len(stored), 'texts': len(others), 'labels': len(others) - n_held, 'cut': 0,
                      'unsure': 0, 'held_out': n_held, 'errors': 0} and n_held
    lines = [json.loads(line) for line in open(root / 'taught.jsonl')]
    assert [line['text'] for line in lines[:len(stored)]] == own[:len(stored)]
    answers = run(root, 'sample.py', '--input=texts.jsonl', '--confidence=full').stdout.splitlines()
    asked = [text for text, *_ in read_texts(root / 'texts.jsonl')]
    answers = {text: json.loads(answer).get('_confidence') for text, answer in zip(asked, answers, strict=True)}
    for line in lines[len(stored):]:
        assert line['probabilities'] == answers[line['text']]

    done = run(root, 'extract.py', '--name=few', '--labels=taught.jsonl', '--max_records=90')
    assert done.returncode == 0 and 'max_records = 90: labels after these texts are not read' in done.stdout
    done = run(root, 'train.py', '--name=few', '--max_records=60', '--max_epochs=1')
    n_left = sum(text_hash(text) % 10 > 0 for text in own[60:90])
    assert f'max_records = 60: {n_left} records after the first 60 are not trained on' in done.stdout, done.stderr
    done = run(root, 'extract.py', '--name=taught', '--labels=taught.jsonl', '--max_records=0')
    assert done.returncode == 0 and 'conflicting=0' not in done.stdout, done.stderr
    taught = data.Shards('toy', 'taught', root / 'data')
    space, names = stored.open_space(), taught.open_space()
    found = {int(hash_): i for i, hash_ in enumerate(taught.hashes)}
    for i, hash_ in enumerate(map(int, stored.hashes)):         # the teacher's answers, and its probabilities
        outs, again = stored.outs(i), taught.outs(found[hash_])
        rows = []
        for state, one, other in zip(space.states_before(outs), stored.logits(i), taught.logits(found[hash_])):
            legal = [*space.transitions[state]]
            ids = [names.output_index[space.output_ids[out]] for out in legal]
            rows.append([np.exp(row) / np.exp(row).sum() for row in (one[legal], other[ids])])
        if all(np.ptp(np.sort(one)[-2:]) > 0.01 for one, _ in rows if len(one) > 1):  # no tie
            assert names.to_json(again) == space.to_json(outs)
            for one, other in rows:
                np.testing.assert_allclose(other, one, atol=0.01)
    assert {*taught.hashes[taught.split()[1]].tolist()} == {*stored.hashes[stored.split()[1]].tolist()}

    sure = [min(max(row.values()) for row in line['probabilities'].values()) for line in lines[len(stored):]]
    counts = counts_of(run(root, *command, f'--min_confidence={np.median(sure)}'))
    assert counts['labels'] == sum(p >= np.median(sure) for p in sure) == len(sure) - counts['unsure'] < len(sure)
    assert counts_of(run(root, *command, '--max_texts=50'))['texts'] == 48
    assert 'does not exist' in one_line(run(root, command[0], '--input=none.jsonl', '--out=taught.jsonl'))
    shutil.rmtree(root / 'data/toy/toy-00')
    assert 'does not have the records of toy, from' in one_line(run(root, *command))
