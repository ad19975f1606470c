"""Products with packed weights: the same numbers as those of a Linear, and when they are taken."""
import random

import pytest
import torch
import torch.nn as nn

import distil.packed
from distil.decode import decode
from distil.packed import PackedLinear, is_packed_faster, pack
from distil.precision import lower_precision
from tests.conftest import tiny_student
from tests.test_reader import bert, mpnet, student, texts  # noqa: F401


def can_pack():
    try:
        return bool(PackedLinear(nn.Linear(8, 8)))
    except (NotImplementedError, RuntimeError, AttributeError):
        return False


needs_packing = pytest.mark.skipif(not can_pack(), reason='this torch has no packed weights')


@needs_packing
@pytest.mark.parametrize('dtype, allowed', [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize('shape, N, bias', [((1, 24), 40, True), ((0, 24), 40, True), ((2, 9, 384), 96, False),
                                            ((700, 384), 1152, True)])
def test_a_packed_layer_is_the_layer_in_its_type(shape, N, bias, dtype, allowed):
    torch.manual_seed(0)
    layer, x = nn.Linear(shape[-1], N, bias=bias), torch.randn(shape)
    exact = layer.double()(x.double())
    layer.to(dtype)
    y = PackedLinear(layer)(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], N) and not y.requires_grad
    torch.testing.assert_close(y.double(), exact, atol=allowed, rtol=allowed)
    torch.testing.assert_close(y, layer(x.to(dtype)).detach(), atol=allowed / 10, rtol=allowed / 2)


@needs_packing
def test_a_packed_student_answers_as_before(student, space, texts, monkeypatch):  # noqa: F811
    monkeypatch.setattr(distil.packed, 'is_packed_faster', lambda dtype: True)
    rng = random.Random(0)
    ids = [[rng.randrange(4, 500) for _ in range(rng.randint(1, 20))] for _ in range(30)]
    for of in (student, tiny_student(space, n_table=24)):
        n_params, before = of.count_params(), list(decode(of, space, ids, 8))
        pack(of, torch.float32)
        kinds = {name.split('.')[-1]: type(module) for name, module in of.named_modules()}
        assert kinds['lm_head'] is nn.Linear and kinds['c_attn'] is PackedLinear
        assert kinds['wte_proj' if of.encoder is None else 'encoder_proj'] is PackedLinear
        after = list(decode(of, space, ids, 8))
        assert of.count_params() == n_params and [outs for outs, _ in before] == [outs for outs, _ in after]
        for (_, of_before), (_, of_after) in zip(before, after):
            for (_, plain, _), (_, packed, _) in zip(of_before, of_after):
                torch.testing.assert_close(plain, packed, atol=1e-4, rtol=1e-4)
        pack(of, torch.float32)                                 # what is packed stays so
        assert [outs for outs, _ in decode(of, space, ids, 8)] == [outs for outs, _ in before]


def test_weights_are_packed_where_that_is_faster_and_right(space, monkeypatch):
    def kind(dtype='float32'):
        of = tiny_student(space)
        lower_precision(of, dtype)
        return type(of.h[0].attn.c_attn)

    def asked(*_):
        raise NotImplementedError
    for value in (True, False):
        monkeypatch.setattr(distil.packed, 'is_packed_faster', lambda dtype: value)
        assert kind() is (PackedLinear if value and can_pack() else nn.Linear) and kind(None) is nn.Linear
    monkeypatch.undo()
    is_packed_faster.cache_clear()
    for better, wrong in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(distil.packed, 'best_seconds', lambda calls, rounds: [1.0, 2.0 if better else 0.5])
        with monkeypatch.context() as changed:
            if wrong:
                changed.setattr(PackedLinear, 'forward', lambda self, x: nn.Linear.forward(self, x) + 1)
                changed.setattr(PackedLinear, '__init__', lambda self, linear: vars(self).update(vars(linear)))
            assert is_packed_faster(torch.float32) == (better and not wrong and can_pack())
        is_packed_faster.cache_clear()
    monkeypatch.setattr(PackedLinear, '__init__', asked)        # a build of torch without it
    assert not is_packed_faster(torch.float32)
    is_packed_faster.cache_clear()
