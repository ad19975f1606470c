"""Decoding, compared with one token per pass; and text in, JSON out, as a user runs it."""
import copy
import json
import math
import queue
import random
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import distil.checkpoint
import data
from distil.checkpoint import load_checkpoint
from distil.precision import lower_precision
from distil.confidence import confidence_of, value_probabilities
from distil.decode import decode, generate
from distil.space import OutputSpace
from sample import Labeler, answer_text
from tests.conftest import FIELDS, ROOT, SCHEMAS, clone_task, one_line, run, tiny_student
from tools.bench import stepwise

many = hypothesis.settings(max_examples=25, deadline=None, derandomize=True,
                           suppress_health_check=list(hypothesis.HealthCheck))


@many
@hypothesis.given(st.data())
def test_any_schema_and_student_give_valid_answers_equal_to_one_token_per_pass(tokenizer, data):
    constants = st.one_of(st.integers(-99, 99), st.booleans(), st.none(), st.text(max_size=6),
                          st.lists(st.integers(0, 9), max_size=2))
    values = st.lists(constants, min_size=1, max_size=5, unique_by=json.dumps)
    fields = data.draw(
        st.dictionaries(st.text('abcdefgh', min_size=1, max_size=5), values, min_size=1, max_size=4))
    try:
        space = OutputSpace(tokenizer, fields, data.draw(st.sampled_from([None, 2])),
                            data.draw(st.booleans()), data.draw(st.sampled_from([None, 2])), range(4, 60))
    except ValueError:
        hypothesis.reject()
    texts = data.draw(st.lists(st.lists(st.integers(4, 499), max_size=20), min_size=1, max_size=7))
    model = tiny_student(space, data.draw(st.integers(0, 9)), block_size=21 + space.max_answer,
                         n_kv_head=data.draw(st.sampled_from([1, 2, 4])))
    for p in model.parameters():
        p.data *= 4                                             # decisions that are not near ties
    batch_size = data.draw(st.integers(1, 4))
    for constrain in (True, False):
        answers = list(decode(model, space, texts, batch_size, constrain))
        assert [outs for outs, _ in answers] == stepwise(model, space, texts, constrain)
        plain = [answer_text(model, space, text) for text in texts] if constrain else []
        for (outs, decisions), (plain_outs, plain_decisions) in zip(answers, plain, strict=constrain):
            assert outs == plain_outs and len(decisions) == len(plain_decisions)
            for (field, logits, out), (plain_field, plain_logits, plain_out) in zip(decisions, plain_decisions):
                assert (field, out) == (plain_field, plain_out)
                torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)
        for outs, decisions in answers:
            confidence = confidence_of(space.schema.paths, decisions)
            assert all(0 < p <= 1 + 1e-6 for p in confidence.values()) and list(confidence) == list(fields)
            if constrain:
                text = space.text(space.to_json(outs)).strip().removeprefix('```json').removesuffix('```')
                assert json.dumps(json.loads(text)) == json.dumps(space.to_json(outs))
                if space.end_id is None:
                    assert space.from_json(space.to_json(outs)) == outs
                else:
                    assert space.state_after(outs) == space.done


def test_in_bfloat16_the_answers_equal_those_of_float32_except_for_rounding(space, monkeypatch):
    model, rng = tiny_student(space, n_table=24), random.Random(0)
    for p in model.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    texts = [[rng.randrange(4, 500) for _ in range(rng.randint(1, 20))] for _ in range(40)]

    def answers():
        decoded = list(decode(model, space, texts, 16))
        all_values = [value_probabilities(model, space, ids, *answer) for ids, answer in zip(texts, decoded)]
        return decoded, [p for of_text in all_values for row in of_text.values() for p in row]
    trained = copy.deepcopy(model)
    lower_precision(model, 'bfloat16')  # without effect: the student is too small to gain
    (before, p_before), products = answers(), model.h[0].attn
    assert products.c_attn.weight.dtype == torch.float32 == before[0][1][0][1].dtype
    monkeypatch.setattr(distil.precision, 'is_large', lambda student: True)
    model = trained
    lower_precision(model, 'bfloat16')
    (after, p_after), products = answers(), model.h[0].attn
    assert products.c_attn.weight.dtype == torch.bfloat16 and after[0][1][0][1].dtype == torch.float32
    first = [torch.stack([decisions[0][1].nan_to_num(neginf=0) for _, decisions in decoded])
             for decoded in (before, after)]                    # (texts, V) of the first decision
    assert 0 < (first[0] - first[1]).norm() < 0.03 * first[0].norm()
    assert np.mean([a[0] == b[0] for a, b in zip(before, after)]) >= 0.9
    assert np.abs(np.subtract(p_before, p_after)).mean() < 0.02
    assert np.mean([a[0] == b for a, b in zip(after, stepwise(model, space, texts))]) >= 0.95


def test_a_record_costs_one_pass_per_decision_and_no_slot_is_idle(space):
    rng, model, calls = random.Random(0), tiny_student(space), []
    texts = [[rng.randrange(4, 500) for _ in range(rng.randint(1, 20))] for _ in range(40)]
    model.register_forward_pre_hook(lambda _, args: calls.append(sum((ids >= 0).sum().item() for ids in args[:2])))
    decisions = [sum(space.forced[s] < 0 for s in space.states_before(outs)).item()
                 for outs in generate(model, space, texts)]
    for constrain in (True, False):
        calls.clear()
        for text, n_decisions in zip(texts, decisions):
            calls.clear()
            outs = generate(model, space, [text], constrain)[0]
            if space.state_after(outs) == space.done:
                assert len(calls) <= n_decisions + (not constrain) and sum(calls) <= len(text) + len(
                    outs)  # nothing is read twice
    calls.clear()
    generate(model, space, texts, batch_size=8)
    assert len(
        calls) <= sum(decisions) / 8 + max(decisions) + 1  # the eight slots are always in use, until the end


def test_confidence_is_the_probability_of_the_value_among_all_allowed_values(space):
    model, text = tiny_student(space), [5, 9, 77, 300]
    for p in model.parameters():
        p.data *= 3
    for temperature in (1.0, 2.5):
        (outs, decisions), = decode(model, space, [text])
        confidence = confidence_of(space.schema.paths, decisions, dict.fromkeys(space.schema.paths, temperature))
        chosen = space.to_json(outs)
        for field, values in space.schema.fields.items():
            posterior = []
            for value in values:  # the whole path of each value, after the fields that were chosen
                path = space.from_json({**chosen, field: value})
                logits = model(torch.tensor([text]), torch.tensor([[len(space.output_ids), *path[:-1]]]))
                states = space.states_before(path)
                log_p = (logits.masked_fill(space.next_state[states] < 0, -math.inf) /
                         temperature).log_softmax(-1)
                posterior.append(
                    sum(log_p[i, o].item() for i, (s, o) in enumerate(zip(states, path))
                        if space.leaf_at[s] == field))
            posterior = np.exp(posterior)
            assert posterior.sum() == pytest.approx(1, rel=1e-4)
            assert confidence[field] == pytest.approx(
                posterior[[json.dumps(v) for v in values].index(json.dumps(chosen[field]))], rel=1e-3)


def test_constrained_answers_are_always_valid(space):
    rng = random.Random(0)
    for seed in range(5):
        texts = [[rng.randrange(4, 500) for _ in range(rng.randint(0, 30))] for _ in range(20)]
        for outs in generate(tiny_student(space, seed), space, texts):
            answer = space.to_json(outs)
            assert list(answer) == space.schema.paths and space.schema.is_answer(answer)


def test_each_input_line_gives_one_json_line_in_order(project, tmp_path):
    texts = ['hello my friend', '', 'the cat ' * 2000, '😀 été 日本', 'buy \0 now', 'مرحبا', 'hello my friend']
    content = '\n'.join(texts).encode() + b'\n\xff\xfe bad bytes'
    (tmp_path / 'texts.txt').write_bytes(content)
    from_pipe, from_file = run(project, 'sample.py', '--sample_batch=3',
                               stdin=content), run(project, 'sample.py', f'--input={tmp_path}/texts.txt')
    answers = [json.loads(line) for line in from_pipe.stdout.splitlines()]
    assert from_pipe.stdout == from_file.stdout and len(answers) == 8
    assert answers[0] == answers[6] and answers[1] == {'error': 'empty text'}
    assert all(list(a) == list(FIELDS) for a in answers[:1] + answers[2:])
    assert '1 texts were longer' in from_pipe.stderr
    lines = ['{"text": "hello my friend", "answer": 1}', '{"answer": 1}', '', '{"text": 3}', '"hello"',
             '{"text": "h\\u00e9llo"}']
    (tmp_path / 'texts.JSONL').write_text('\n'.join(lines))
    done = run(project, 'sample.py', f'--input={tmp_path}/texts.JSONL')
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records[0] == answers[0] and list(records[5]) == list(FIELDS)
    assert [r.get('error') for r in records[1:5]] == ['empty text', 'empty text', 'not a text but int', 'empty text']
    (tmp_path / 'texts.csv').write_text('hello\n')              # commas, quotes and a header would be read as text
    said = one_line(run(project, 'sample.py', f'--input={tmp_path}/texts.csv'))
    assert 'texts.csv is not one text per line; python data/prepare.py NAME' in said


def test_too_long_texts_can_be_refused_and_confidence_is_added(project):
    content = ('hello my friend\n' + 'the cat ' * 50 + '\nbuy now\n').encode()
    done = run(project, 'sample.py', '--too_long=refuse', '--confidence=True', stdin=content)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert second['error'].startswith('text has 1') and len(second) == 1
    assert list(first['_confidence']) == list(FIELDS) and all(0 < p <= 1
                                                              for p in third['_confidence'].values())
    assert "must be 'cut' or 'refuse'" in one_line(run(project, 'sample.py', '--too_long=drop'))


def test_records_below_min_confidence_are_marked_or_answered_by_the_teacher(project, teachers):
    shards = data.Shards('toy', 'toy', project / 'data')
    checkpoint, model, space = load_checkpoint(project / 'out/toy', 'cpu')
    rows = shards.split()[1]
    content = '\n'.join(space.tokenizer.decode(shards.ids(i).tolist()) for i in rows).encode()
    confidence = [
        json.loads(line)['_confidence']
        for line in run(project, 'sample.py', '--confidence=True', stdin=content).stdout.splitlines()
    ]
    lowest = np.unique([min(c.values()) for c in confidence])
    gap = np.diff(lowest).argmax()
    limit = float(lowest[gap:gap + 2].mean())
    marked = [
        json.loads(line)
        for line in run(project, 'sample.py', f'--min_confidence={limit}', stdin=content).stdout.splitlines()
    ]
    assert [m.get('_defer', False)
            for m in marked] == [min(c.values()) < limit
                                 for c in confidence] and 0 < sum('_defer' in m for m in marked) < len(rows)
    done = run(project, 'sample.py', f'--min_confidence={limit}', '--ask_teacher=True', '--sample_batch=7',
               stdin=content)
    assert done.returncode == 0, done.stderr  # the teacher of the config file
    for i, before, after in zip(rows, marked, map(json.loads, done.stdout.splitlines()), strict=True):
        expected = space.to_json(shards.answer(i).tolist()) | {'_teacher': True
                                                               } if '_defer' in before else before
        assert after == expected
    other = f'--teacher={teachers["llama"]}'
    refused = run(project, 'sample.py', '--min_confidence=1', '--ask_teacher=True', other, stdin=content)
    assert refused.returncode == 1 and 'is not the teacher this student learned from' in refused.stderr
    assert run(project, 'sample.py', other,
               '--text=hello my friend').returncode == 0  # it is not used, so it may be any
    assert 'needs a min_confidence' in one_line(run(project, 'sample.py', '--ask_teacher=True', '--text=hi'))


def test_a_line_of_a_slow_pipe_is_answered_at_once(project):
    with subprocess.Popen([sys.executable, 'sample.py', 'config/toy.py'], cwd=project, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for line in (b'hello my friend\n', b'\n', b'buy now\n'):
            process.stdin.write(line)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())  # before the next line is written
        process.stdin.close()
        assert process.wait(60) == 0 and process.stdout.read() == b''


def test_a_reader_that_closes_the_pipe_ends_the_program_quietly(project):
    done = subprocess.run(
        f'yes hello my friend | head -5000 | {sys.executable} sample.py config/toy.py 2>err.txt | head -1',
        shell=True, cwd=project, capture_output=True, timeout=100)
    assert json.loads(done.stdout) and 'Error' not in (project / 'err.txt').read_text()


@pytest.mark.slow
def test_sampling_needs_only_the_folder_of_the_run(project, tmp_path):
    root = clone_task(project, tmp_path, 'out')
    shutil.rmtree(root / 'data/toy')
    done = run(root, 'sample.py', '--text=hello my friend')
    assert list(json.loads(done.stdout)) == list(FIELDS) and done.stdout.count('\n') == 1
    copy = tmp_path / 'elsewhere'
    parts = ('values', 'written', 'copied', 'kinds', 'json_schema', 'schema', 'automaton', 'cutter', 'space',
             'candidates', 'packed', 'int8', 'precision', 'options', 'places', 'drafts', 'encoder', 'reader', 'decode',
             'confidence', 'checkpoint', 'labeler')             # as docs/device.md lists them
    for path in ('sample.py', 'model.py', *(f'distil/{part}.py' for part in parts), 'config/__init__.py',
                 'config/machine.py', 'config/toy.py', 'out/toy/best.pt', 'out/toy/tokenizer.json'):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, copy / path)
    alone = subprocess.run(
        [sys.executable, 'sample.py', '--name=toy', '--device=cpu', '--text=hello my friend'], cwd=copy,
        capture_output=True)
    assert alone.stdout.decode() == done.stdout, alone.stderr.decode()
    with_config = subprocess.run([sys.executable, 'sample.py', 'config/toy.py', '--text=hello my friend'], cwd=copy,
                                 capture_output=True)
    assert with_config.stdout == alone.stdout, with_config.stderr.decode()
    missing = subprocess.run([sys.executable, 'sample.py', '--name=other', '--text=hi'], cwd=copy,
                             capture_output=True, text=True)
    assert missing.returncode == 1 and 'does not exist' in missing.stderr
    assert 'Traceback' not in missing.stderr
    assert 'does not exist; run: python train.py' in one_line(
        run(root, 'sample.py', '--name=other', '--text=hi'))


def test_without_a_text_and_without_a_terminal_the_message_names_what_is_missing(project):
    assert 'no text; give one: python sample.py config/toy.py' in one_line(
        run(project, 'sample.py'))


def test_a_checkpoint_of_another_version_is_refused_by_its_number(project, tmp_path):
    root = clone_task(project, tmp_path, 'out')
    state = torch.load(root / 'out/toy/best.pt', weights_only=True)
    torch.save(state | {'format': 3}, root / 'out/toy/best.pt')
    assert 'has format 3, this version reads 5; train again' in one_line(run(root, 'sample.py', '--text=hi'))


def test_the_last_answers_before_a_pause_do_not_wait_for_more_texts(project):
    """with a teacher, results are collected; but if no text is being decoded, they must not wait for the next
    line."""
    labeler = Labeler(project / 'out/toy', 'cpu', batch_size=2, confidence=False, min_confidence=2.0)
    teacher_outs = labeler.space.from_json({'tone': 'neutral', 'spam': True})
    labeler.ask = lambda texts: [teacher_outs for _ in texts]
    lines = queue.Queue()
    for text in (b'hello my friend', b'buy now', b'the cat sat'):
        lines.put(text)
    records = labeler.stream(iter(lines.get, None))
    assert [next(records)[0] for _ in range(3)] == [{'tone': 'neutral', 'spam': True, '_teacher': True}] * 3
    lines.put(None)
    assert list(records) == []


def test_the_decoder_continues_while_no_next_text_is_available(space):
    student, texts = tiny_student(space), [[5, 9, 77], [300, 8], [4, 4, 4, 9]]

    def slowly():
        for ids in texts:
            yield from (None, None, ids, None)
    assert [outs for outs, _ in decode(student, space, slowly())] == generate(student, space, texts)


def test_an_empty_text_is_a_text_and_standard_input_is_not_read(project):
    done = run(project, 'sample.py', '--text=', stdin=b'the next line of a loop\n')
    assert done.stdout == '{"error": "empty text"}\n' and done.returncode == 0
    assert list(json.loads(run(project, 'sample.py', '--text=None').stdout)) == list(FIELDS)


def test_a_checkpoint_with_damaged_bytes_is_refused(project, tmp_path):
    root = clone_task(project, tmp_path, 'out')
    path = root / 'out/toy/best.pt'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert 'best.pt is damaged' in one_line(run(root, 'sample.py', '--text=hi'))


def test_a_config_that_changed_since_the_training_is_reported(project):
    for args, note in (([], ''), (["--fields={'tone': ['a', 'b']}"], 'note: fields changed'),
                       (['--prompt=say {text}'], 'note: prompt changed')):
        done = run(project, 'sample.py', '--text=hello my friend', *args)
        assert list(json.loads(
            done.stdout)) == list(FIELDS) and note in done.stderr and ('note:' in done.stderr) == bool(note)


@pytest.mark.slow
def test_a_full_device_and_a_closed_input_end_with_a_message(project):
    done = subprocess.run(f'{sys.executable} sample.py config/toy.py --text=hi > /dev/full', shell=True,
                          cwd=project, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        'cannot write the answers'), done.stderr
    done = subprocess.run(f'{sys.executable} sample.py config/toy.py <&-', shell=True, cwd=project,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('no text'), done.stderr


def test_input_may_be_a_pipe_but_not_set_together_with_text(project, tmp_path):
    piped = f'{sys.executable} sample.py config/toy.py --input=<(echo hello my friend)'
    done = subprocess.run(['bash', '-c', piped], cwd=project, capture_output=True, text=True)
    assert list(json.loads(done.stdout)) == list(FIELDS), done.stderr
    assert 'not both' in one_line(run(project, 'sample.py', '--text=hi', '--input=config/toy.py'))
    assert 'is a directory' in one_line(run(project, 'sample.py', '--input=config'))


@pytest.mark.parametrize('fields, indent, fence', SCHEMAS)
def test_the_probabilities_of_all_values_equal_those_of_a_slow_computation(tokenizer, fields, indent, fence):
    """the slow one: token by token, without a cache, every value in full."""
    space = OutputSpace(tokenizer, fields, indent, fence, auxiliary=range(4, 90))
    student = tiny_student(space, vocab_size=600, block_size=120)
    temperature = {name: 0.5 + n for n, name in enumerate(fields)}
    texts = [[5, 9, 77], [300, 8], [4, 4, 4, 9]]
    for ids, (outs, decisions) in zip(texts, decode(student, space, texts)):
        answer = space.to_json(outs)
        result = value_probabilities(student, space, ids, outs, decisions, temperature)
        for name, of_field in fields.items():
            expected = []
            for value in of_field:
                written, log_p = space.from_json({**answer, name: value}), 0.0
                for n, state in enumerate(space.states_before(written)):
                    if space.leaf_at[state] == name and len(space.transitions[state]) > 1:
                        prefix = [len(space.output_ids), *written[:n]]
                        with torch.no_grad():
                            logits = student(torch.tensor([ids]), torch.tensor([prefix]))[-1]
                        legal = list(space.transitions[state])
                        p = (logits[legal] / temperature[name]).log_softmax(0)
                        log_p += p[legal.index(written[n])].item()
                expected.append(math.exp(log_p))
            assert result[name] == pytest.approx(expected, abs=1e-5)
            assert sum(result[name]) == pytest.approx(1, abs=1e-5)
            chosen = [json.dumps(value) for value in of_field].index(json.dumps(answer[name]))
            confidence = confidence_of(space.schema.paths, decisions, temperature)[name]
            assert result[name][chosen] == pytest.approx(confidence, abs=1e-5)


def test_from_python_the_answers_equal_those_of_the_program(project):
    texts = ['hello my friend', '', 'buy  the\ncat now', 'x\ud800y', 'the cat ' * 60]
    done = run(project, 'sample.py', '--confidence=True', stdin='\n'.join(
        ' '.join(text.split()) for text in texts).encode('utf-8', 'replace') + b'\n')
    records = Labeler(project / 'out/toy', 'cpu')(texts)
    assert records == [json.loads(line) for line in done.stdout.splitlines()]
    assert records[1] == {'error': 'empty text'}
    assert set(records[0]['_confidence']) == set(FIELDS)
    full, = Labeler(project / 'out/toy', 'cpu', confidence='full')(texts[:1])
    for name, of_field in FIELDS.items():
        shares = full['_confidence'][name]
        assert list(shares) == [v if isinstance(v, str) else json.dumps(v) for v in of_field]
        chosen = full[name] if isinstance(full[name], str) else json.dumps(full[name])
        assert shares[chosen] == records[0]['_confidence'][name] == max(shares.values())
    done = run(project, 'sample.py', '--confidence=full', '--text=hello my friend')
    assert json.loads(done.stdout) == full
    refused = run(project, 'sample.py', '--min_confidence=target', '--text=a')
    assert 'no target was set; run' in one_line(refused)


def test_an_answer_that_breaks_the_schema_is_deferred(project):
    labeler = Labeler(project / 'out/toy', 'cpu', constrain=False, min_confidence=0.1)
    ids, broken = labeler.encode(b'hello my friend')[0], [0, 0]
    (record, _), = labeler.finish([(ids, '', 0, broken, [])])
    assert record['error'] == 'answer breaks the schema' and record['_defer'] is True
    valid = {'tone': 'neutral', 'spam': True}
    labeler.ask = lambda texts: [labeler.space.from_json(valid) for _ in texts]
    assert labeler.finish([(ids, '', 0, broken, [])]) == [(valid | {'_teacher': True}, 0)]


def test_answering_a_text_never_loads_torch_dynamo(project):
    """loading it takes most of a second, and nothing here uses it."""
    program = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); from sample import Labeler; '
               f'print(Labeler({str(project / "out/toy")!r}, "cpu")(["hello"])); '
               'sys.exit("torch._dynamo" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0 and "'tone'" in done.stdout, done.stderr
