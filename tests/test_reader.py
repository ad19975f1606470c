"""A pre-trained encoder in front of the student: the same as transformers', and the student that writes after it."""
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import transformers

from data import Shards
from device.run import Student as Runner
from distil.checkpoint import load_checkpoint
from distil.confidence import Begun, value_probabilities
from distil.decode import decode, generate, pad_rows
from distil.encoder import attend_rows
from distil.reader import load_encoder, student_ids
from model import Student, StudentConfig
from sample import Labeler, answer_text
from tests.conftest import FIELDS, clone_task, one_line, run, save_bert, weights
from tools.baselines import stepwise

SETTINGS = '--init_from=scratch', '--reader={}', '--max_epochs=3', '--batch_size=16', '--block_size=60'


@pytest.fixture(scope='session')
def bert(tmp_path_factory, words):
    """folder of a small BERT with random weights."""
    folder = tmp_path_factory.mktemp('bert')
    save_bert(folder, words, '¶•—', layers=3, n_pos=48)
    return folder


@pytest.fixture
def student(bert, space):
    torch.manual_seed(1)
    encoder, V = load_encoder(str(bert)), len(space.output_ids)
    student = Student(StudentConfig(vocab_size=V + 1, output_vocab=V, block_size=96, n_layer=2, n_head=4, n_kv_head=2,
                                    n_embd=16, n_mlp=32, start_id=V, encoder=vars(encoder.config)), encoder)
    for name, p in student.named_parameters():
        p.data *= 1 if name.startswith('encoder.') else 4    # decisions that are not near ties
    return student.eval()


@pytest.fixture
def texts(space, words):
    rng = random.Random(0)
    strings = [' '.join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(9)]
    strings += ['', 'É 日本 😀', 'zzz qqq', 'HELLO,friend!']
    return [space.tokenizer.encode(string, add_special_tokens=False).ids for string in strings]


@pytest.fixture(scope='session')
def mpnet(tmp_path_factory, bert):
    """folder of a small MPNet with random weights, and the tokenizer of `bert`."""
    folder = tmp_path_factory.mktemp('mpnet')
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = transformers.MPNetConfig(vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                      intermediate_size=64, max_position_embeddings=482, initializer_range=0.2)
    transformers.MPNetModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('n_layer', [0, 1, 3])
@pytest.mark.parametrize('family', ['bert', 'mpnet'])
def test_an_encoder_computes_what_transformers_does(request, family, n_layer):
    folder = request.getfixturevalue(family)
    encoder, model = load_encoder(str(folder), n_layer).eval(), transformers.AutoModel.from_pretrained(folder).eval()
    ids = torch.randint(5, 80, (5, 17))
    used = torch.arange(17) < torch.tensor([17, 3, 9, 1, 16])[:, None]
    with torch.no_grad():
        states = model(ids, attention_mask=used.long(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(
            encoder(ids.where(used, -1))[used], states[n_layer or -1][used], atol=1e-5, rtol=1e-4)
        if family == 'mpnet':                                   # distances of all buckets
            ids = torch.randint(5, 80, (2, 400))
            torch.testing.assert_close(
                load_encoder(str(folder)).eval()(ids), model(ids).last_hidden_state, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('family', ['bert', 'mpnet'])
def test_texts_of_any_length_are_read_together_as_alone(request, family):
    """texts of about one length share a group, and each token gets its own state back; gradients, too."""
    encoder = load_encoder(str(request.getfixturevalue(family))).eval()
    lengths = 4, 1, 17, 8, 9, 2, 30, 7                          # of four groups, in no order
    texts = [torch.randint(5, 80, (n,)) for n in lengths]

    def gradient(loss):
        encoder.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for name, p in encoder.named_parameters()
                          if not name.startswith(('wte', 'wpe'))])
    alone = torch.cat([encoder(text[None])[0] for text in texts])
    weight = torch.randn_like(alone)
    expected = gradient((alone * weight).sum())
    rows = pad_rows([text.tolist() for text in texts], 'cpu')
    states = encoder(rows)
    torch.testing.assert_close(states[rows >= 0], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient((states[rows >= 0] * weight).sum()), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('family', ['bert', 'mpnet'])
def test_attention_in_groups_is_that_of_padded_rows(request, family, monkeypatch):
    """as plain products and as the fused kernel; all gradients, too"""
    encoder = load_encoder(str(request.getfixturevalue(family))).eval()
    rows = pad_rows([torch.randint(5, 80, (n,)).tolist() for n in (4, 1, 17, 40, 33, 16)], 'cpu')
    weight, found = torch.randn(*rows.shape, encoder.config.n_embd) * (rows >= 0)[..., None], []
    pos, sees = encoder.place(rows)
    padded = lambda: encoder.run(rows.clamp(min=0), pos, partial(attend_rows, sees=sees))
    for read, most_bytes in ((padded, 0), (lambda: encoder(rows), 0), (lambda: encoder(rows), 10 ** 6)):
        monkeypatch.setattr('distil.encoder.MOST_BYTES', most_bytes)
        encoder.zero_grad()
        states = read()
        (states * weight).sum().backward()
        found.append([states.detach()[rows >= 0], *(p.grad.clone() for p in encoder.parameters())])
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(read()[rows >= 0], found[0][0], atol=0.05, rtol=0.05)
    for other in found[1:]:
        for ours, expected in zip(other, found[0]):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_kept_states_are_those_of_reading_again(bert, monkeypatch):
    encoder = load_encoder(str(bert)).eval()
    draw = lambda *lengths: pad_rows([torch.randint(5, 80, (n,)).tolist() for n in lengths], 'cpu')
    first, other = draw(4, 9, 2), draw(7, 3)
    mixed = pad_rows([[n for n in row if n >= 0] for row in (*other.tolist(), *first.tolist())], 'cpu')
    expected, read, n_read = [encoder(text) for text in (first, mixed)], encoder.read, []
    monkeypatch.setattr(encoder, 'read', lambda text: n_read.append(len(text)) or read(text))
    encoder.keeps = True
    for _ in range(2):
        for text, states in zip((first, mixed), expected):
            torch.testing.assert_close(encoder(text)[text >= 0], states[text >= 0], atol=1e-5, rtol=1e-4)
    assert n_read == [3, 2]                                     # each text once
    monkeypatch.setattr('distil.encoder.MOST_KEPT', 20)         # the oldest goes
    encoder(pad_rows([[7] * 5], 'cpu'))
    encoder(first[1:2])
    assert n_read == [3, 2, 1, 1] and sum(map(len, encoder.kept)) <= 20
    encoder.train(False)                                        # other weights
    assert not encoder.kept


def test_decoding_equals_one_by_one_without_cache(student, space, texts):
    for constrain in (True, False):
        fast = generate(student, space, texts, constrain, batch_size=4)
        assert constrain is False or fast == stepwise(student, space, texts)
        assert constrain is False or fast == [answer_text(student, space, text)[0] for text in texts]
        for text, answer in zip(student_ids(student, space, texts), fast):
            outs, state = [], 0
            while state not in (-1, space.done) and len(outs) < len(answer):
                logits = student(torch.tensor([text]), torch.tensor([[len(space.output_ids), *outs]]))[-1]
                if constrain:
                    logits = logits.masked_fill(space.next_state[state] < 0, -math.inf)
                outs.append(logits.argmax().item())
                state = space.transitions[state].get(outs[-1], -1)
            assert answer == outs


def test_probabilities_of_all_values_sum_to_1(student, space, texts):
    for ids, (outs, decisions) in zip(texts, decode(student, space, texts, 3)):
        for row in value_probabilities(student, space, ids, outs, decisions).values():
            assert sum(row) == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_rows_that_begin_as_an_answer_does_equal_rows_read_alone(student, space, texts):
    """the cache of a text and its answer has tokens of the answer behind those that a row shares with it."""
    read, answers = student_ids(student, space, texts[:4]), generate(student, space, texts[:4])
    V = len(space.output_ids)
    begun, generator = Begun(student, read, [[V, *outs[:-1]] for outs in answers]), random.Random(0)
    rows = [(n, [V, *outs[:cut], *(generator.randrange(V) for _ in range(cut % 3))])
            for n, outs in enumerate(answers) for cut in range(len(outs))]
    for (n, fed), logits in zip(rows, begun.ask(rows, most=7)):
        alone = student(torch.tensor([read[n]]), torch.tensor([fed]))[-1]
        torch.testing.assert_close(torch.from_numpy(logits), alone, atol=1e-4, rtol=1e-4)


def test_a_text_too_long_for_the_student_is_cut(student, space):
    ids = space.tokenizer.encode('hello friend ' * 60, add_special_tokens=False).ids
    cut, = student_ids(student, space, [ids])
    last = student.encoder.tokenizer.token_to_id('[SEP]')
    assert len(cut) <= 48 and cut[-1] == last
    whole = student.encoder.tokenizer.encode('hello friend ' * 60).ids
    assert cut[:-1] == whole[:len(cut) - 1]
    student.encoder.keep_end = True
    end, = student_ids(student, space, [ids])
    assert len(end) == len(cut) and end[0] == whole[0] and end[1:] == whole[1 - len(end):]


@pytest.mark.slow
def test_a_student_with_a_reader_trains_and_its_folders_answer(project, bert, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    settings = [setting.format(bert) for setting in SETTINGS]
    done = run(root, 'train.py', *settings, '--token_dropout=0.1')
    assert done.returncode == 0, done.stderr
    whole = weights(root)
    assert any(name.startswith('encoder.h.2.') for name in whole)
    assert whole['wte.weight'].shape[0] == 65               # the output vocabulary and a start token
    _, student, space = load_checkpoint(root / 'out/toy', 'cpu', 'last')
    shards = Shards('toy', 'toy', root / 'data')
    answers = generate(student, space, [shards.ids(i).tolist() for i in range(20)])
    baseline = run(root, 'tools/evaluate.py', '--baselines=encoder', '--which=last')
    assert baseline.returncode == 0, baseline.stderr
    line = next(line for line in baseline.stdout.splitlines() if line.startswith('encoder '))
    figures = {key: float(value) for key, value in (pair.split('=') for pair in line.split()[1:])}
    assert 0 <= figures['encoder_exact'] <= figures['encoder_field'] <= 1 and figures['minutes'] > 0
    timed = run(root, 'tools/bench.py', '--what=train', '--batch_size=16', '--compile=False')  # and the baseline's step
    assert timed.returncode == 0, timed.stderr
    figures = dict(pair.split('=') for pair in timed.stdout.split()[1:])
    assert 0 < float(figures['mfu']) < 1.5 and float(figures['ratio']) > 0
    exported = run(root, 'device/export.py', '--check_texts=20', '--which=last')
    assert exported.returncode == 0 and 'same_records=1' in exported.stdout, exported.stderr
    (root / 'data').rename(root / 'gone')                   # the folder of the run is enough
    texts = [space.tokenizer.decode(shards.ids(i).tolist()) for i in range(20)]
    records = Labeler(root / 'out/toy', 'cpu', which='last', confidence=False)(texts)
    assert records == [space.to_json(answer) for answer in answers] == Runner(root / 'out/toy/device')(texts)
    assert all(list(record) == list(FIELDS) for record in records)


@pytest.mark.slow
def test_a_stopped_training_resumes_bit_for_bit(project, bert, tmp_path):
    settings = [setting.format(bert) for setting in SETTINGS]
    straight = clone_task(project, tmp_path, 'toy-00')
    assert run(straight, 'train.py', *settings).returncode == 0
    stopped = clone_task(project, tmp_path / 'stopped', 'toy-00')
    log = stopped / 'out/toy/log.txt'
    process = subprocess.Popen([sys.executable, 'train.py', 'config/toy.py', '--log_steps=1', *settings], cwd=stopped,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and 'train step=5 ' in log.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 1 and 0 < torch.load(stopped / 'out/toy/ckpt.pt', weights_only=True)['step'] < 69
    assert run(stopped, 'train.py', *settings).returncode == 0
    a, b = weights(straight), weights(stopped)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def test_what_is_no_reader_ends_with_a_message(project, teachers, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    for name, message in (('nowhere/at/all', 'cannot be loaded: no such directory'),
                          (str(teachers['llama']), 'it must be a BERT')):
        assert message in one_line(run(root, 'train.py', '--init_from=scratch', f'--reader={name}'))
