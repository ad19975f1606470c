"""Loss, schedule and the run: the steps are the same when they are split, stopped or shared."""
import fcntl
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from data.lines import text_hash
import distil.resume
import train
from distil.checkpoint import load_checkpoint, save_checkpoint
from distil.encoder import Encoder, EncoderConfig
from distil.records import note_rare_values
from distil.resume import Training
from distil.start import SeenRows
from model import Student, StudentConfig
from tests.conftest import (FIELDS, clone_task, make_shards, one_line, random_records, run, tiny_student,
                            torchrun, weights)


def test_loss_of_a_hand_computed_case():
    p, q = (torch.tensor([[a, 1 - a]], dtype=torch.float64).log() for a in (0.1, 0.9))
    for a, b in ((p, q), (q, p)):
        loss, kl, ce, n = train.distill_loss(b, a, torch.tensor([1]), 0.75)
        assert kl.item() == pytest.approx(0.8 * math.log(9), rel=1e-5) and n == 1
        assert ce.item() == pytest.approx(-b[0, 1].item(), rel=1e-5) and loss.item() == pytest.approx(
            0.75 * kl.item() + 0.25 * ce.item(), rel=1e-5)


def test_a_perfect_student_has_no_kl_and_no_gradient():
    logits = torch.randn(5, 7, requires_grad=True)
    loss, kl, _, _ = train.distill_loss(logits, logits.detach() + 3, torch.tensor([0, 1, 2, -1, 3]), 1.0)
    loss.backward()
    assert abs(kl.item()) < 1e-6 and logits.grad.abs().max() < 1e-6


def test_kl_of_a_hand_computed_case():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    log_q, log_p = torch.tensor(q).log()[None], torch.tensor(p).log()[None]
    kl = train.distill_loss(log_q, log_p, torch.tensor([0]), 1.0)[1]
    assert kl.item() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def test_kl_equals_that_of_the_whole_vocabulary_if_the_other_tokens_have_no_probability():
    kept, teacher, student = [3, 17, 40], torch.full((4, 64), -math.inf), torch.randn(4, 64)
    teacher[:, kept] = torch.randn(4, 3)
    student[:, [i for i in range(64) if i not in kept]] = -math.inf
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    whole = torch.where(p > 0, p * (p.clamp(min=1e-30).log() - log_q), torch.zeros(())).sum()
    kl = train.distill_loss(student[:, kept], teacher[:, kept], torch.zeros(4, dtype=torch.long), 1.0)[1]
    torch.testing.assert_close(kl, whole)


def test_both_terms_have_gradients_of_comparable_size():
    torch.manual_seed(0)
    teacher, norms = torch.randn(64, 30) * 2, []
    for kl_weight in (1.0, 0.0):
        logits = torch.zeros(64, 30, requires_grad=True)
        train.distill_loss(logits, teacher, teacher.argmax(-1), kl_weight)[0].backward()
        norms.append(logits.grad.norm().item())
    assert 0.2 < norms[0] / norms[1] < 1


def test_ignored_positions_have_no_gradient_and_temperature_scales_by_its_square():
    logits, teacher, targets = torch.randn(2, 3, 7) * 1e-2, torch.randn(2, 3, 7) * 1e-2, torch.tensor(
        [[-1, 2, 0], [-1, -1, 4]])
    results = []
    for tau in (1.0, 5.0):
        x = logits.clone().requires_grad_()
        loss, kl, ce, n = train.distill_loss(x, teacher, targets, 1.0, tau)
        loss.backward()
        assert n == 3 and (x.grad[targets < 0] == 0).all() and (x.grad[targets >= 0] != 0).all()
        results.append((loss.item(), kl.item(), x.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.05) and results[1][1] * 25 == pytest.approx(
        results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0.1, atol=1e-5)


def test_both_terms_are_always_in_the_gradient_and_the_schedule_reaches_its_ends():
    settings = dict(learning_rate=1.0, min_lr=0.1, warmup=0.1, kl_start=0.9, kl_end=0.1, kd_temperature=1.0,
                    kd_anneal=False)
    at = lambda step: train.schedule(step, 100, settings)
    assert at(0) == (pytest.approx(0.1), pytest.approx(0.9), 1) and at(99) == (pytest.approx(0.1),
                                                                               pytest.approx(0.1), 1)
    assert at(9)[0] == pytest.approx(1.0) and at(10)[0] == pytest.approx(1.0)
    assert all(0.1 <= at(s)[1] <= 0.9
               for s in range(100)) and all(at(s)[0] >= at(s + 1)[0] for s in range(10, 99))
    tau = lambda step, anneal: train.schedule(step, 101, settings | dict(kd_temperature=0.1, kd_anneal=anneal))[2]
    assert [tau(step, True) for step in (0, 50, 100)] == pytest.approx(
        [0.1, 0.55, 1.0]) and tau(0, False) == tau(100, False) == 0.1


def test_a_low_temperature_gives_near_ties_a_larger_share_of_the_gradient():
    def share(tau):
        """share of a near tie in the gradient; the rest is of a clear decision with a wrong confidence."""
        logits = torch.tensor([[0.0, 0.0], [2.0, -2.0]], requires_grad=True)
        train.distill_loss(logits, torch.tensor([[0.1, -0.1], [1.5, -1.5]]), torch.tensor([0, 0]), 1.0,
                           tau)[0].backward()
        tie, clear = logits.grad.norm(dim=1)
        return (tie / (tie + clear)).item()
    # by hand, for two classes and tau = 1: sigmoid(student's difference) - sigmoid(teacher's difference)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    tie, clear = abs(sigmoid(0) - sigmoid(0.2)), abs(sigmoid(4) - sigmoid(3))
    assert share(1.0) == pytest.approx(tie / (tie + clear), rel=1e-4) and share(0.1) > 0.99 > share(1.0)


def test_micro_batches_give_the_gradient_of_the_whole_batch(space, tmp_path):
    records = [(h, i % 500, o, l, e) for h, i, o, l, e in random_records(8, len(space.output_ids))]
    shards, model, grads = make_shards(tmp_path, records, len(space.output_ids)), tiny_student(space), []
    n_tokens = sum(len(r[2]) for r in records)
    for n_parts in (1, 3):
        model.zero_grad()
        for part in np.array_split(np.arange(8), n_parts):
            text, answer, targets, teacher_logits = shards.batch(part)
            loss, *_ = train.distill_loss(model(text, answer), teacher_logits, targets[targets >= 0], 0.5)
            (loss / n_tokens).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('reads', [False, True])
def test_training_only_the_rows_seen_equals_dense_adamw(space, reads):
    text, answer, targets = torch.randint(4, 60, (6, 8)), torch.randint(0, 20, (6, 4)), torch.randint(0, 20, (6, 4))
    text[2:, 5:] = -1
    results, states = [], []
    for cut in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(EncoderConfig(90, n_layer=1, n_head=4, n_embd=32, n_mlp=64, n_pos=50))
        V, sizes = len(space.output_ids), dict(block_size=96, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, n_mlp=64)
        reader = StudentConfig(V + 1, V, start_id=V, encoder=vars(encoder.config), **sizes)
        model = Student(reader, encoder) if reads else tiny_student(space)
        owner = model.encoder or model
        seen = SeenRows(owner, torch.cat((text[text >= 0], model.answer_row * (not reads)))) if cut else None
        optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-2)
        for part in (slice(0, 2), slice(2, 6)) * 3:  # rows without a gradient in a step still move by momentum
            F.cross_entropy(model(text[part], answer[part]), targets[part].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(optimizer.state_dict())
        with seen.whole() if cut else nullcontext():
            assert owner.wte is seen.table if cut else True
            results.append({key: value.clone() for key, value in model.state_dict().items()})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key
    optimizer.load_state_dict(states[0])                        # saved when all rows were trained
    seen.cut_state(optimizer)
    for of_whole, of_part in zip(optimizer.state_dict()['state'].values(), states[1]['state'].values()):
        assert all(torch.equal(of_whole[key], of_part[key]) for key in of_part)
    unseen = torch.full((1, 1), next(i for i in range(4, len(seen.table.weight)) if i not in seen.part.ids))
    with pytest.raises(IndexError):                             # another word is no row that was taken for it
        model(unseen, answer[:1])


@pytest.mark.slow
def test_a_student_that_starts_from_the_teacher_trains_and_samples(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    for frozen in (False, True):
        args = ('--init_from=teacher', f'--freeze_table={frozen}', '--n_layer=2', '--max_epochs=1',
                '--learning_rate=1e-3', '--overwrite=True')
        done = run(root, 'train.py', *args)
        assert done.returncode == 0, done.stderr
        state = torch.load(root / 'out/toy/best.pt', weights_only=True)
        assert (state['model']['wte.weight'].dtype == torch.float16) == frozen
        assert list(json.loads(run(root, 'sample.py', '--text=hello my friend').stdout)) == list(FIELDS)
        assert 'trained already' in run(root, 'train.py', *args[:-1]).stdout


@pytest.mark.slow
def test_two_processes_train_the_same_student(project, tmp_path):
    root, single = (clone_task(project, tmp_path / name, 'toy-00') for name in 'ab')
    launch, args = [*torchrun(2), 'train.py', 'config/toy.py'], ['--max_epochs=2', '--save_steps=5']
    assert run(single, 'train.py', *args).returncode == 0
    said, log = tmp_path / 'stderr', root / 'out/toy/log.txt'
    with open(said, 'w') as file:
        process = subprocess.Popen([*launch, *args, '--log_steps=1'], cwd=root, stdout=file, stderr=file)
    while process.poll() is None and not (log.exists() and 'train step=7 ' in log.read_text()):
        time.sleep(0.01)
    assert process.poll() is None, said.read_text()
    process.send_signal(signal.SIGTERM)                         # torchrun forwards it
    process.wait()
    # the next run continues from here
    assert 0 < torch.load(root / 'out/toy/ckpt.pt', weights_only=True)['step'] < 46
    done = subprocess.run([*launch, *args], cwd=root, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    a, b = weights(root), weights(single)
    for key in b:
        torch.testing.assert_close(a[key], b[key], atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_the_best_epoch_is_kept_and_patience_ends_a_run(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'train.py', '--max_epochs=40', '--patience=2', '--best_by=kl', '--learning_rate=3e-2',
               '--kd_temperature=1')
    assert done.returncode == 0 and 'stopping early' in done.stdout, done.stdout
    kl = [
        float(line.split(' kl=')[1].split()[0]) for line in done.stdout.splitlines()
        if line.startswith('val ')
    ]
    best, last = (torch.load(root / f'out/toy/{f}.pt', weights_only=True) for f in ('best', 'ckpt'))
    assert best['best']['step'] == best['step'] < last['step'] and best['figures']['kl'] == pytest.approx(
        min(kl), rel=1e-3) and last['figures']['kl'] == pytest.approx(kl[-1], rel=1e-3)
    assert kl.index(min(kl)) == len(kl) - 3 and len(kl) < 40 and last['finished']
    shown = run(root, 'tools/evaluate.py').stdout, run(root, 'tools/evaluate.py', '--which=last').stdout
    assert f'val step={best["step"]} ' in shown[0] and f'val step={last["step"]} ' in shown[1]
    assert 'trained already' in run(root, 'train.py', '--max_epochs=40', '--patience=2', '--best_by=kl',
                                    '--learning_rate=3e-2', '--kd_temperature=1').stdout


def test_files_that_do_not_belong_together_are_detected_at_the_start(project, teachers, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    path = root / 'data/toy/toy-00/logits.bin'
    np.fromfile(path, '<f2').reshape(-1, 64)[::-1].tofile(path)
    assert 'do not belong together' in one_line(run(root, 'train.py'))
    for wrong in ('--init_from=nowhere', '--best_by=luck'):
        assert 'must be one of' in one_line(run(root, 'train.py', wrong))
    assert 'a student with a reader has none' in one_line(run(root, 'train.py', '--init_from=teacher', '--reader=x'))
    assert 'set reader, too' in one_line(run(root, 'train.py', '--reader_layers=2'))
    assert 'set reader, too' in one_line(run(root, 'train.py', '--reader_tokens=99'))


def test_hidden_text_tokens_are_text_tokens_only():
    text = torch.randint(4, 500, (64, 20))
    text[:, 12:] = -1                                           # padding
    hidden = text.clone()
    train.hide_text(hidden, 0.25, hidden_id=1)
    changed = hidden != text
    assert (hidden[changed] == 1).all() and not changed[:, 12:].any()
    assert changed[:, :12].float().mean().item() == pytest.approx(0.25, abs=0.07)
    train.hide_text(hidden, 1.0, hidden_id=1)
    assert (hidden[:, :12] == 1).all() and (hidden[:, 12:] == -1).all()


@pytest.mark.slow
def test_a_student_that_never_sees_the_text_agrees_less(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    field = []
    for args in (['--token_dropout=1.0'], ['--overwrite=True']):
        done = run(root, 'train.py', '--max_epochs=3', *args)
        assert done.returncode == 0, done.stderr
        field.append(torch.load(root / 'out/toy/ckpt.pt', weights_only=True)['figures']['field'])
    assert field[0] < field[1]


@pytest.mark.slow
def test_a_run_shorter_than_its_log_steps_ends_without_error(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'train.py', '--max_epochs=1', '--log_steps=1000')
    assert done.returncode == 0, done.stderr
    assert 'trained; best field' in done.stdout and 'train step' not in done.stdout
    if importlib.util.find_spec('matplotlib'):
        assert (root / 'out/toy/report.png').stat().st_size > 1000


@pytest.mark.slow
def test_hints_name_the_task_and_the_run_of_the_command(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'train.py', '--max_epochs=1', '--run=other', '--name=toy')
    assert 'python tools/evaluate.py config/toy.py --run=other --name=toy' in done.stdout
    assert 'python sample.py config/toy.py --run=other --name=toy' in done.stdout
    assert 'run: python extract.py config/toy.py --name=nobody' in one_line(
        run(root, 'train.py', '--name=nobody', '--run=x'))
    assert 'run: python train.py config/toy.py --name=nobody' in one_line(
        run(root, 'tools/evaluate.py', '--name=nobody'))


@pytest.mark.slow
def test_a_curriculum_at_a_low_temperature_is_reported(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    shown = [
        run(root, 'train.py', '--max_epochs=1', '--overwrite=True', *args).stdout
        for args in (['--kl_start=.9', '--kl_end=.1'], ['--kl_start=.9', '--kl_end=.1', '--kd_temperature=1'],
                     [])
    ]
    assert ['for the curriculum set --kd_temperature=1' in text for text in shown] == [True, False, False]


def test_at_a_low_temperature_the_cross_entropy_dominates_the_gradient_of_a_clear_decision():
    """the reason for the note above: the gradient of tau^2 KL_tau is tau (q - p)."""
    teacher_logits, norms = torch.tensor([[6.0, 0.0, 0.0]]), []
    for tau in (1.0, 0.1):
        logits = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
        train.distill_loss(logits, teacher_logits, torch.tensor([0]), 1.0, tau)[0].backward()
        norms.append(logits.grad.norm().item())
    p, q = (torch.tensor([x, 0, 0]).softmax(-1) for x in (6.0, 1.0))
    assert norms[0] == pytest.approx((q - p).norm().item(), rel=1e-4) and norms[1] < 0.1 * norms[0]


def test_the_check_line_has_the_cross_entropy_of_the_teacher(project):
    shown = next(line for line in (project / 'train.py.stdout').read_text().splitlines()
                 if line.startswith('check '))
    shards = data.Shards('toy', 'toy', project / 'data')
    nats = []
    for i in shards.split()[0]:
        state, biases = 0, []
        for out in shards.answer(i).tolist():  # the bias at the state before each token
            row = shards.meta['bias'].get(str(state), {})
            biases.append([row.get(str(v), 0.0) for v in range(64)])
            state = shards.space.transitions[state][out]
        logits = shards.answer(i, 'logits').astype(np.float64) - np.array(biases)
        nats += (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), shards.answer(i)]).tolist()
    figures = dict(pair.split('=') for pair in shown.split()[1:])
    assert float(figures['teacher_ce']) == pytest.approx(np.mean(nats),
                                                         rel=1e-3) and figures['stored_tokens'] == '1'


@pytest.mark.slow
def test_train_lines_have_the_share_of_correct_tokens(project, tmp_path):
    """compared with a slow computation. The learning rate is nearly 0, so the student hardly changes in the
    run."""
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'train.py', '--max_epochs=1', '--log_steps=23', '--learning_rate=1e-12',
               '--min_lr=1e-12')
    line = next(line for line in done.stdout.splitlines() if line.startswith('train '))
    _, student, _ = load_checkpoint(root / 'out/toy', 'cpu', 'last')
    shards, hits = data.Shards('toy', 'toy', root / 'data'), []
    for i in shards.split()[0]:
        text, answer, targets, _ = shards.batch([i])
        hits += (student(text, answer).argmax(-1) == targets[0]).tolist()
    assert float(line.split(' teacher_forced=')[1].split()[0]) == pytest.approx(np.mean(hits), abs=1e-3)


def test_a_finished_or_foreign_checkpoint_is_not_overwritten(project, tmp_path):
    assert 'trained already' in run(project, 'train.py').stdout
    before = (project / 'out/toy/ckpt.pt').read_bytes()
    assert 'n_layer 2 there, 3 here' in one_line(run(project, 'train.py', '--n_layer=3'))
    shards = data.Shards('toy', 'toy', project / 'data')
    needed = shards.meta['max_text'] + shards.meta['max_answer']  # the limit of a text, not the longest one
    assert f'set block_size = {needed} or more' in one_line(
        run(project, 'train.py', f'--block_size={needed - 1}', '--run=small'))
    assert (project / 'out/toy/ckpt.pt').read_bytes() == before
    root = clone_task(project, tmp_path, 'toy-00', 'out')
    for content in (before[:1000], b'', b'\x80\x04\x95cos\nsystem\n(S"touch hacked"\ntR.'):
        (root / 'out/toy/ckpt.pt').write_bytes(content)
        assert 'not a whole checkpoint' in one_line(run(root, 'sample.py', '--text=hi', '--which=last'))
    assert not (root / 'hacked').exists()


@pytest.mark.slow
def test_data_lines_also_go_to_a_tracker(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    (root / 'trackio' / '__init__.py').parent.mkdir()
    (root / 'trackio' / '__init__.py').write_text(
        'init = lambda **k: print("init", k["name"])\nlog = lambda f: print("logged", *f)\n'
        'finish = lambda: print("finished")\n')
    done = subprocess.run(
        [sys.executable, 'train.py', 'config/toy.py', '--tracker=trackio', '--max_epochs=1'], cwd=root,
        capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)}, timeout=100)
    for line in ('init toy', 'logged train/step', 'logged val/step', 'finished'):
        assert line in done.stdout
    assert 'pip install wandb' in one_line(run(root, 'train.py', '--tracker=wandb'))


def test_a_second_training_in_one_folder_exits_with_a_message(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00', 'out')
    before = (root / 'out/toy/ckpt.pt').read_bytes()
    with open(root / 'out/toy/lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for args in ([], ['--overwrite=True']):
            assert 'another training is writing to out/toy' in one_line(run(root, 'train.py', *args))
    assert (root / 'out/toy/ckpt.pt').read_bytes() == before
    assert 'trained already' in run(root, 'train.py').stdout  # a lock file that nobody holds does no harm


def test_a_loss_that_is_not_finite_exits_with_a_message_and_keeps_the_last_checkpoint(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    line = one_line(
        run(root, 'train.py', '--learning_rate=1e30', '--min_lr=1e30', '--grad_clip=0', '--save_steps=1',
            '--warmup=0'))
    assert 'is nan or infinite: try a lower learning_rate' in line
    state = torch.load(root / 'out/toy/ckpt.pt', weights_only=True)
    assert all(p.isfinite().all() for p in state['model'].values())


@pytest.mark.parametrize('best_by, records, values, best, enough', [
    ('field', 10**9, [0.9, 0.9, 0.89, 0.8], 2, [False, False, True]),
    ('field', 100, [0.9, 0.88, 0.86, 0.94, 0.92, 0.91], 5, [False, False, True]),  # 0.9 +- 0.03, 0.94 +- 0.024
    ('field', 100, [0.9, 0.91, 0.5, 0.92, 0.5, 0.5], 4, [False, False, False, False, False, True]),
    ('kl', 100, [0.5, 0.3, 0.4, 0.2], 4, [False] * 4), ('kl', 100, [0.5, 0.3, 0.3001, 0.31], 2, [False] * 3 + [True])])
def test_the_last_of_the_epochs_within_a_standard_error_is_kept(tmp_path, monkeypatch, best_by, records, values, best,
                                                                enough):
    results, kept = iter(values), []

    def fake_evaluate(*args):
        return {'field': 0.5, 'kl': 1.0, 'records': records, best_by: next(results)}, {}, [], []
    training = Training(tmp_path, {}, None, None, linear={})
    monkeypatch.setattr(train, 'evaluate', fake_evaluate)
    monkeypatch.setattr(Training, 'save', lambda self, file, **_: file == 'best.pt' and kept.append(self.best['epoch']))
    settings = {'batch_size': 1, 'best_by': best_by, 'patience': 2}
    end = lambda epoch: train.end_epoch(training, epoch, None, [], settings, False)
    assert [end(epoch + 1) for epoch in range(len(values))][:len(enough)] == enough
    assert training.best['epoch'] == kept[-1] == best
    assert abs(training.best['top']) == (min if best_by == 'kl' else max)(values)


def test_a_large_student_is_evaluated_in_the_type_it_is_decoded_in(space, tmp_path, monkeypatch):
    training = Training(tmp_path, {}, tiny_student(space), space)
    plain = training.set_precision('float32', 'False', 'cpu', 1000)
    assert plain is not training.precision and not training.compiled
    autocast = training.set_precision('bfloat16', 'False', 'cpu', 1000)
    assert autocast.fast_dtype == torch.bfloat16
    assert training.precision is not autocast  # the student is too small to gain from it
    monkeypatch.setattr(distil.resume, 'is_large', lambda student: True)
    assert training.set_precision('bfloat16', 'False', 'cpu', 1000) is training.precision


def test_on_a_full_disk_the_previous_checkpoint_is_intact(tmp_path):
    for file in ('best.pt', 'ckpt.pt'):
        path, tmp = tmp_path / file, tmp_path / file.replace('.pt', '.tmp')
        save_checkpoint(path, {'step': 1})
        tmp.symlink_to('/dev/full')
        with pytest.raises(SystemExit, match=f'{file}: No space left on device; '):
            save_checkpoint(path, {'step': 2, 'model': torch.zeros(10000)})
        assert torch.load(path, weights_only=True) == {'step': 1} and not os.path.lexists(tmp)


@pytest.mark.slow
def test_near_duplicates_across_the_split_are_pointed_out(project, tmp_path):
    root = clone_task(project, tmp_path)
    rng, words = random.Random(0), 'cat sat on a mat hello my friend was there early today'.split()
    texts = [' '.join(rng.choices(words, k=6)) for _ in range(150)]
    lines = [{'text': variant, 'answer': {'tone': 'neutral', 'spam': n % 2 == 0}}
             for n, text in enumerate(texts) for variant in (text, text + ' !')]
    (root / 'labels.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert run(root, 'extract.py', '--labels=labels.jsonl', '--calibrate=0', '--prior={}').returncode == 0
    done = run(root, 'train.py', '--max_epochs=1')
    assert 'of the held-out texts are also trained on, but for case' in done.stdout, done.stderr
    check = next(line for line in done.stdout.splitlines() if line.startswith('check '))
    assert 0.5 < float(check.partition('near_overlap=')[2])
    for n, line in enumerate(lines):                            # the other answer after a "!": no text gives it away
        line['answer'] = {'tone': 'neutral' if n % 2 else 'friendly', 'spam': n % 2 == 0}
    (root / 'labels.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    done = run(root, 'extract.py', '--labels=labels.jsonl', '--calibrate=0', '--prior={}', '--name=other')
    assert done.returncode == 0
    done = run(root, 'train.py', '--max_epochs=1', '--name=other')
    assert ' near_overlap=0\n' in done.stdout and 'but for case' not in done.stdout, done.stderr


def test_what_few_records_of_many_values_mean_is_said(space, capsys):
    outs = lambda i: space.from_json({'n': i, 'tone': 'friend', 'ok': True})
    note_rare_values(SimpleNamespace(outs=outs), space, range(50), range(3), 4)  # n has 25 values, tone three
    few = ('note: each of the {} values of {} is seen about {} times in 4 epochs, which is few: --max_epochs={}, '
           'or label more')
    none = 'note: {} of {} values of {} have no held-out record; the figures say nothing of them'
    assert capsys.readouterr().out.splitlines() == [
        few.format(25, 'n', 8, 100), none.format(22, 25, 'n'), few.format(3, 'tone', 67, 12), none.format(2, 3, 'tone'),
        none.format(1, 2, 'ok')]


def test_train_on_right_trains_only_on_what_is_known_to_be_right(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    path, shards = root / 'data/toy/input.jsonl', data.Shards('toy', 'toy', root / 'data')
    space = shards.open_space()
    answer_of = {int(h): space.to_json(shards.answer(i).tolist()) for i, h in enumerate(shards.hashes)}
    texts, lines = [json.loads(line)['text'] for line in open(path)], []
    refused = run(root, 'train.py', '--train_on=right', '--run=r')
    assert refused.returncode == 1 and 'train_on = right needs texts with "truth"' in one_line(refused)
    for n, text in enumerate(texts):                            # wrong in one of three, unknown in one of ten
        answer = dict(answer_of.get(text_hash(text), {}))
        if answer and n % 3 == 0:
            answer['spam'] = not answer['spam']
        if answer and n % 3 == 1:
            answer = {'spam': str(answer['spam']).upper(), 'note': 'x'}  # a table's way to write it, and one field
        lines.append({'text': text} | ({'truth': answer} if answer and n % 10 else {}))
    path.write_text('\n'.join(map(json.dumps, lines)))
    known = {text_hash(text): n % 3 > 0 and n % 10 > 0 for n, text in enumerate(texts)}
    train_rows, val_rows = shards.split()
    expected = sum(known[int(shards.hashes[i])] for i in train_rows)
    done = run(root, 'train.py', '--train_on=right', '--run=r')
    assert done.returncode == 0, done.stderr
    assert f'train_on = right: {expected} of {len(train_rows)} records; all held-out' in done.stdout
    assert f'records train={expected} held_out={len(val_rows)} ' in done.stdout
