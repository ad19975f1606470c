"""8 bits in the encoder's products: the fast one against the slow one, what is measured, and when it is chosen."""
import copy
import json
import platform
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from tokenizers import Tokenizer

import config.machine
import distil.int8
from data import Shards
from distil.agreement import field_texts
from distil.decode import decode, generate
from distil.int8 import IN_FLOATS, Int8Linear, find_peaks, is_exact, is_faster, linears, to_int8, weight_bits
from distil.precision import lower_precision
from distil.report import measure_int8, unlabelled
from tests.conftest import clone_task, tiny_student
from tests.test_reader import bert, mpnet, student, texts  # noqa: F401
from tools.baselines import stepwise

needs_kernel = pytest.mark.skipif(not is_exact(), reason='this torch has no exact product of 8 bits')


def random_layer(K, N, M, bias=True):
    """a Linear, tokens (M, K) of which a few channels are much larger than the others, and their peaks"""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=bias)
    x = torch.randn(M, K)
    x[:, 3] = 30 + x[:, 3]
    x[:, 5] *= 9
    return linear, x, x.abs().amax(0)


def formula(linear, x, peak, bits):
    """what an Int8Linear computes, from whole numbers that are turned into floats first; in 64 bits"""
    weight, x, peak = (part.detach().double().numpy() for part in (linear.weight, x, peak))
    apart = np.argsort(-peak)[:IN_FLOATS]
    rest = [k for k in range(len(peak)) if k not in apart]
    evened = np.sqrt(abs(weight).max(0) / peak)[rest]
    y = x[:, apart] @ weight[:, apart].T
    of_weight = weight[:, rest] / evened
    scale = abs(of_weight).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    of_weight = np.round(of_weight / scale) * scale
    for m, token in enumerate(x[:, rest] * evened):
        low, high = min(token.min(), 0), max(token.max(), 0)
        step = (high - low) / 254
        middle = np.round((low + high) / 2 / step)
        y[m] += (np.round(token / step - middle) + middle) * step @ of_weight.T
    return y + (0 if linear.bias is None else linear.bias.detach().numpy())


@pytest.mark.parametrize('bits', [7, 8])
@pytest.mark.parametrize('K, N, M, bias', [(32, 24, 1, True), (384, 96, 40, False), (100, 7, 9, True)])
def test_a_layer_in_8_bits_is_what_the_formula_says_and_near_the_layer(K, N, M, bias, bits):
    linear, x, peak = random_layer(K, N, M, bias)
    y, exact = Int8Linear(linear, peak, bits, kernel=False)(x), linear(x).detach()
    expected = torch.tensor(formula(linear, x, peak, bits))
    # a number half way between two whole ones may be rounded either way in 32 bits
    assert (y - expected).norm() < 2e-3 * expected.norm() and (y - expected).abs().median() < 1e-4
    assert (y - exact).norm() < (0.02 if bits == 8 else 0.04) * exact.norm()
    assert torch.allclose(
        Int8Linear(linear, peak, bits, False)(x[None, :, None]), y[None, :, None], atol=1e-5)  # any shape
    plain = Int8Linear(linear, torch.ones(K), bits, kernel=False)  # whose large channels are not known
    assert (plain(x) - exact).norm() > 2 * (y - exact).norm()


@needs_kernel
@pytest.mark.parametrize('K, N, M', [(32, 24, 1), (384, 96, 40), (1536, 384, 300)])
def test_the_fast_product_gives_the_numbers_of_the_slow_one(K, N, M):
    linear, x, peak = random_layer(K, N, M)
    fast, slow = (Int8Linear(linear, peak, weight_bits(), kernel)(x) for kernel in (True, False))
    assert torch.allclose(fast, slow, atol=1e-4)
    ends = torch.where(x > 0, 1.0, -1.0)                        # the largest whole numbers alone
    linear.weight.data = torch.where(linear.weight > 0, 1.0, -1.0)
    fast, slow = (Int8Linear(linear, torch.ones(K), weight_bits(), kernel)(ends) for kernel in (True, False))
    assert torch.allclose(fast, slow, atol=1e-3) and torch.allclose(slow, linear(ends), atol=1e-3)


def test_a_product_that_does_not_fit_is_noticed(monkeypatch):
    monkeypatch.setattr(distil.int8.Int8Linear, 'multiply_bytes',
                        lambda self, codes: self.multiply_floats(codes).clamp(-40, 40))
    monkeypatch.setattr(torch.ops.onednn, 'qlinear_prepack', lambda codes, shape: codes.float(), raising=False)
    assert not is_exact.__wrapped__()
    monkeypatch.undo()
    if weight_bits() == 7 and platform.machine() == 'x86_64':   # where 16 bits are too few for 8
        monkeypatch.setattr(distil.int8, 'weight_bits', lambda: 8)
        assert not is_exact.__wrapped__()


def strings(encoder_student, space, all_texts):
    """the texts of test_reader.py, longer ones, and the peaks that a student finds in them"""
    all_texts = [*all_texts, *(2 * ids for ids in all_texts if ids)]
    return all_texts, find_peaks(encoder_student, lambda: generate(encoder_student, space, all_texts))


@pytest.mark.parametrize('kernel', [False, pytest.param(True, marks=needs_kernel)])
def test_a_student_in_8_bits_decodes_as_one_by_one(student, space, texts, kernel):  # noqa: F811
    all_texts, peaks = strings(student, space, texts)
    assert {name: len(peak) for name, peak in peaks.items()} == {
        f'{n}.{name}': width for n in range(3)
        for name, width in (('c_attn', 32), ('c_proj', 32), ('c_up', 32), ('c_down', 64))}
    before = [decisions[0][1] for _, decisions in decode(student, space, all_texts)]
    to_int8(student, peaks, kernel=kernel)
    assert not linears(student) and isinstance(student.h[0].attn.c_attn, nn.Linear)
    found = [*decode(student, space, all_texts)]
    assert [outs for outs, _ in found] == stepwise(student, space, all_texts)
    assert [outs for outs, _ in found] == [generate(student, space, [ids])[0] for ids in all_texts]  # alone, too
    after = torch.stack([decisions[0][1] for _, decisions in found]).nan_to_num(neginf=0)
    before = torch.stack(before).nan_to_num(neginf=0)
    assert 0 < (before - after).norm() < 0.05 * before.norm()


def test_what_8_bits_cost_is_measured_and_the_student_stays_as_it_was(student, space, texts):  # noqa: F811
    all_texts, _ = strings(student, space, texts)
    before = field_texts(space, generate(student, space, all_texts))
    modules = [(name, id(module)) for name, module in student.named_modules()]
    found = measure_int8(student, space, all_texts)
    assert [(name, id(module)) for name, module in student.named_modules()] == modules
    assert field_texts(space, generate(student, space, all_texts)) == before and found['texts'] == len(all_texts)
    assert not any(module._forward_pre_hooks for module in student.modules())
    for bits in (7, 8):
        changed = copy.deepcopy(student)
        to_int8(changed, found['peaks'], bits, kernel=False)
        after = field_texts(space, generate(changed, space, all_texts))
        same = [a == b for field in before for a, b in zip(before[field], after[field])]
        assert found[f'equal_{bits}'] == pytest.approx(sum(same) / len(same)) and sum(same) > 0.8 * len(same)
    assert measure_int8(tiny_student(space), space, all_texts) is None


def test_8_bits_are_chosen_where_they_are_faster_and_lose_nothing(student, space, texts, monkeypatch):  # noqa: F811
    monkeypatch.setattr('distil.precision.weight_bits', lambda: 8)
    monkeypatch.setattr('distil.precision.is_faster', lambda *_: True)
    monkeypatch.setattr('distil.precision.is_exact', lambda: True)
    monkeypatch.setattr('distil.precision.to_int8', lambda student, peaks: chosen.append(student))
    good, chosen = {'equal_8': 0.995, 'equal_7': 0.5, 'peaks': {}}, []

    def choose(dtype, int8, of=student):
        chosen.clear()
        lower_precision(of, dtype, int8)
        assert bool(chosen) == (of.precision == 'int8')
        return of.precision
    assert choose('auto', good) == choose('int8', good) == choose('int8', {**good, 'equal_8': 0.9}) == 'int8'
    monkeypatch.setattr('distil.precision.pick_dtype', lambda *_: torch.float32)
    for wrong in (None, {**good, 'equal_8': 0.9949}):
        assert choose('auto', wrong) == 'float32'
    assert choose('float32', good) == choose('bfloat16', good) == 'float32' == choose('auto', None, tiny_student(space))
    for name, value in (('is_faster', lambda *_: False), ('is_exact', lambda: False), ('weight_bits', lambda: 7)):
        with monkeypatch.context() as changed:
            changed.setattr(f'distil.precision.{name}', value)
            assert choose('auto', good) == 'float32'
    for of, int8, message in ((student, None, 'measured in 8 bits'), (tiny_student(space), good, 'with a reader')):
        with pytest.raises(SystemExit, match=message):
            choose('int8', int8, of)


@needs_kernel
def test_the_faster_way_is_found_by_timing_both(student, space, texts, monkeypatch):  # noqa: F811
    monkeypatch.setattr('distil.int8.is_packed_faster', lambda dtype: False)
    _, peaks = strings(student, space, texts)
    clock, seconds = SimpleNamespace(now=0.0), {Int8Linear: 1.0, nn.Linear: 1.31}
    monkeypatch.setattr(config.machine.time, 'perf_counter', lambda: clock.now)
    for kind in (Int8Linear, nn.Linear):
        def forward(self, x, kind=kind):
            clock.now += seconds[kind]
        monkeypatch.setattr(kind, 'forward', forward)
    assert is_faster(student, peaks, torch.float32)
    seconds[nn.Linear] = 1.29
    assert not is_faster(student, peaks, torch.float32)


def test_texts_without_labels_are_those_that_no_record_has(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    shards, path = Shards('toy', 'toy', root / 'data'), root / 'data/toy/input.jsonl'
    assert list(unlabelled(path, shards)) == list(unlabelled(path.parent / 'gone.jsonl', shards)) == []
    with open(path, 'a') as file:
        file.write('{"text": "a new one "}\n{"text": ""}\nno JSON\n' + json.dumps({'text': 'the cat ' * 500}) + '\n')
    new, long = unlabelled(path, shards)
    tokenizer = Tokenizer.from_file(str(shards.folder / 'tokenizer.json'))
    assert tokenizer.decode(new) == 'a new one' and len(long) == shards.meta['max_text']
