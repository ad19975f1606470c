"""A tour of the four scripts on a tiny teacher: every fast path next to its slow, obvious twin.

    pytest test_smoke.py

Read this one first; tests/test_<file>.py has the rest. No network.
"""
import json
import math
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
from data.lines import text_hash
from distil.agreement import evaluate
from distil.checkpoint import load_checkpoint
from distil.decode import generate
from distil.drafts import Drafts
from distil.engine import Teacher, answer
from distil.space import OutputSpace, clean
from distil.teacher import encode_prompt
from tests.conftest import FIELDS, SCHEMAS, clone_task, load_teacher, run, tiny_student, weights
from train import distill_loss

from tests.conftest import project, space, teachers, tokenizer, words  # noqa: F401  (fixtures)

# -----------------------------------------------------------------------------
# extract.py: the teacher's answers and logits


def step_by_step(model, space, ids, constrain):
    """the slow twin of engine.answer: whole sequence, full head, no cache, one token at a time."""
    outs, logits, lses, state = [], [], [], 0
    while state != space.done:
        row = model(torch.tensor([ids + [space.output_ids[o] for o in outs]])).logits[0, -1].float()
        kept = row[space.output_ids]
        if constrain:
            calibrated = kept - space.bias[state]
            out = calibrated.masked_fill(space.next_state[state] < 0, -math.inf).argmax().item()
        else:
            out = space.output_index.get(row.argmax().item(), -1)
        if out not in space.transitions[state]:
            return 'vocab' if out < 0 else 'invalid'
        outs.append(out), logits.append(kept), lses.append(row.logsumexp(-1))
        state = space.transitions[state][out]
    return outs, torch.stack(logits), torch.stack(lses)


@pytest.mark.parametrize(
    'family', ['gemma', *(pytest.param(name, marks=pytest.mark.slow) for name in ('llama', 'qwen'))])
@pytest.mark.parametrize('fields, indent, fence', SCHEMAS)
def test_drafting_equals_step_by_step_decoding(teachers, family, fields, indent, fence):
    tokenizer, model = load_teacher(teachers[family])
    before, after, end_id = encode_prompt(tokenizer, 'the cat and the mat were there ' * 3 + '{text}\n',
                                          chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, fields, indent, fence, end_id, auxiliary=range(4, 300))
    engine, drafts = Teacher(model, before, space.output_ids), Drafts(space)
    rng = np.random.default_rng(0)
    for _ in range(2):  # in the second round the drafts have learned
        texts = [rng.integers(4, len(tokenizer), n) for n in (7, 1, 12, 7, 3)]
        answers, computed = answer(engine, space, drafts, texts, after, full_lse=True)
        with torch.no_grad():
            for text, (outs, logits, lse) in zip(texts, answers):
                slow_outs, slow_logits, slow_lse = step_by_step(model, space, before + text.tolist() + after,
                                                                constrain=True)
                assert outs == slow_outs
                torch.testing.assert_close(torch.tensor(logits), slow_logits, atol=2e-4, rtol=1e-4)
                torch.testing.assert_close(torch.tensor(lse), slow_lse, atol=2e-4, rtol=1e-4)
                drafts.add(outs)
        assert computed <= sum(len(t) + len(after) + space.max_answer ** 2 for t in texts)


def test_stored_records_are_what_the_teacher_says(project, teachers):
    """the saved files against a plain forward pass: ids, answers, raw logits, logsumexp."""
    tokenizer, model = load_teacher(teachers['gemma'])
    shards = data.Shards('toy', 'toy', project / 'data')
    meta = shards.meta
    space = OutputSpace.from_task(tokenizer.backend_tokenizer, meta)   # with the bias of the calibration
    texts = {
        text_hash(t): t
        for t in (clean(json.loads(line)['text']) for line in open(project / 'data/toy/input.jsonl'))
    }
    n_lse = 0
    for i in range(0, len(shards), 17):
        ids = shards.ids(i).tolist()
        assert ids == tokenizer.encode(texts[int(shards.hashes[i])], add_special_tokens=False)
        with torch.no_grad():
            outs, logits, lse = step_by_step(model, space, meta['before'] + ids + meta['after'],
                                             constrain=True)
        assert shards.answer(i).tolist() == outs
        top, stored_lse = shards.answer(i, 'stats').T
        np.testing.assert_allclose(
            shards.answer(i, 'logits').astype(np.float32) + top[:, None], logits, atol=0.02, rtol=1e-3)
        if not np.isnan(stored_lse).any():
            np.testing.assert_allclose(stored_lse, lse, rtol=1e-4)
            n_lse += 1
    sizes = {name: (shards.folder / f'{name}.bin').stat().st_size for name in data.kept_files(has_places=False)}
    n_input, n_output = sizes['input'] // 4, sizes['output'] // 2
    assert sizes == {'input': n_input * 4, 'output': n_output * 2, 'logits': n_output * 64 * 2,
                     'stats': n_output * 8, 'index': len(shards) * 24}
    assert n_lse  # at least the first record has its logsumexp

# -----------------------------------------------------------------------------
# train.py: the loss, the learning, the resume


@pytest.mark.parametrize('kl_weight, tau', [(1.0, 1.0), (1.0, 0.1), (0.3, 2.0), (0.0, 1.0)])
def test_the_loss_and_its_gradient_are_those_of_the_formulas(kl_weight, tau):
    """L = w tau^2 KL_tau + (1 - w) CE, whose gradient is w tau (q_tau - p_tau) + (1 - w) (q - y), in
    numpy."""
    rng, softmax = np.random.default_rng(0), lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    z, t, y = rng.normal(size=(5, 7)), rng.normal(size=(5, 7)) * 2, rng.integers(0, 7, 5)
    p, q, one_hot = softmax(t / tau), softmax(z / tau), np.eye(7)[y]
    kl, ce = (p * np.log(p / q)).sum(), -np.log(softmax(z)[np.arange(5), y]).sum()
    logits = torch.tensor(z, requires_grad=True)
    loss, *parts, n = distill_loss(logits, torch.tensor(t), torch.tensor(y), kl_weight, tau)
    loss.backward()
    assert [loss.item(), *map(float, parts), n] == pytest.approx(
        [kl_weight * tau ** 2 * kl + (1 - kl_weight) * ce, kl, ce, 5], rel=1e-5)
    gradient = kl_weight * tau * (q - p) + (1 - kl_weight) * (softmax(z) - one_hot)
    np.testing.assert_allclose(logits.grad, gradient, atol=1e-5)


def test_the_student_learns_what_the_teacher_does(project):
    log = [
        line for line in (project / 'train.py.stdout').read_text().splitlines()
        if line.startswith(('train ', 'val ', 'field ', 'plan ', 'model '))
    ]
    lines = [(line.split()[0], dict(f.split('=') for f in line.split()[1:])) for line in log]
    val = [f for tag, f in lines if tag == 'val']
    assert len(val) == 5 and float(val[-1]['kl']) < float(val[0]['kl']) and float(val[-1]['valid']) > 0.9
    assert float(val[-1]['field']) > float(val[-1]['majority'])
    assert [f['name'] for tag, f in lines if tag == 'field'][:2] == list(FIELDS)
    assert (project / 'out/toy/log.txt').read_text().splitlines() == [
        line for line in log if not line.startswith('model')
    ]


@pytest.mark.parametrize('how', [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_training_resumes_bit_for_bit(project, teachers, tmp_path, how):
    root = clone_task(project, tmp_path, 'toy-00')
    log = root / 'out/toy/log.txt'
    settings, start = ['--dropout=0.1'], []
    if how == signal.SIGKILL:  # and with micro-batches, and the teacher's table
        settings += ['--grad_accum=3', '--learning_rate=1e-3']
        start = ['--init_from=teacher']
    process = subprocess.Popen([sys.executable, 'train.py', 'config/toy.py', '--log_steps=1', *settings, *start],
                               cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    want, saved = 'train step=5', True
    while process.poll() is None and not (log.exists() and want in log.read_text() and saved):
        time.sleep(0.005)
        if how == signal.SIGKILL:  # a kill costs what came after the last epoch: there must be one
            want, saved = 'val step=23', (root / 'out/toy/ckpt.pt').exists()
    process.send_signal(how)
    stderr = process.communicate()[1].decode()
    if how != signal.SIGKILL:
        assert process.returncode == 1 and 'the same command continues' in stderr
    step = torch.load(root / 'out/toy/ckpt.pt', weights_only=True)['step']
    assert 0 < step < 115
    done = run(root, 'train.py', *settings, '--init_from=resume')
    assert done.returncode == 0 and f'from_step={step}' in done.stdout, done.stderr
    straight = clone_task(project, tmp_path / 'straight', 'toy-00')
    assert run(straight, 'train.py', *settings, *start).returncode == 0
    a, b = weights(root), weights(straight)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    assert (a['wte.weight'].dtype == torch.float16) == bool(start)  # the teacher's table is frozen

# -----------------------------------------------------------------------------
# sample.py: text in, JSON out


def test_cached_batched_decoding_equals_one_by_one_without_cache(space):
    rng, model = random.Random(0), tiny_student(space)
    for p in model.parameters():
        p.data *= 4  # decisions that are not near ties
    texts = [[rng.randrange(4, 500) for _ in range(rng.randint(1, 20))] for _ in range(9)]
    for constrain in (True, False):
        for text, fast in zip(texts, generate(model, space, texts, constrain)):
            outs, state = [], 0
            while state not in (-1, space.done) and len(text) + len(outs) < model.config.block_size:
                logits = model(torch.tensor([text]), torch.tensor([[len(space.output_ids), *outs]]))[-1]
                if constrain:
                    logits = logits.masked_fill(space.next_state[state] < 0, -math.inf)
                outs.append(logits.argmax().item())
                state = space.transitions[state].get(outs[-1], -1)
            assert fast == outs

def test_sample_prints_one_json_line_per_text(project):
    """the folder of the run is enough; each line holds every field with one of its values."""
    texts = 'hello my friend\n\n' + 'the cat sat on a mat ' * 400 + '\n😀 été 日本\n'
    done = run(project, 'sample.py', stdin=texts.encode())
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 4 and records[1] == {'error': 'empty text'}
    for record in (records[0], *records[2:]):
        assert list(record) == list(FIELDS) and all(record[f] in values for f, values in FIELDS.items())


# -----------------------------------------------------------------------------
# tools/evaluate.py: agreement


def test_evaluate_matches_a_slow_twin(project):
    shards = data.Shards('toy', 'toy', project / 'data')
    _, student, space = load_checkpoint(project / 'out/toy', 'cpu')
    rows = shards.split()[1]
    figures, per_field, answers, _ = evaluate(student, space, shards, rows, batch_size=7)
    kl = hits = steps = same = exact = valid = fields = 0
    for i, got in zip(rows, answers):
        free, = generate(student, space, [shards.ids(i).tolist()], constrain=False)
        target = shards.answer(i).tolist()
        assert free == got
        text, prefix, targets, teacher_logits = shards.batch([i])
        q, p = student(text, prefix).log_softmax(-1), teacher_logits.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        hits += (q.argmax(-1) == targets[targets >= 0]).sum().item()
        steps += len(target)
        same += sum(a == b for a, b in zip(free, target))
        exact, valid = exact + (free == target), valid + (space.state_after(free) == space.done)
        ours, theirs = space.to_json(free), space.to_json(target)
        fields += np.mean(
            [ours is not None and json.dumps(ours[f]) == json.dumps(v) for f, v in theirs.items()])
    n = len(rows)
    expected = dict(records=n, kl=kl / steps, teacher_forced=hits / steps, student_only=same / steps,
                    exact=exact / n, valid=valid / n, field=fields / n)
    assert {k: figures[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert figures['majority'] == pytest.approx(np.mean([f['majority'] for f in per_field.values()]))
