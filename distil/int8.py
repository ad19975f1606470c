"""8-bit products in a student's encoder, on a CPU: reading a text is one large product after another, and processors
multiply whole numbers of 8 bits several times faster than floats.

    peaks = find_peaks(student, answer)      # what answer() did is where the layers' inputs were measured
    if is_exact():
        to_int8(student, peaks)              # in place

A product of tokens x (M, K) with a weight (N, K) becomes one of whole numbers. A weight has a scale for each of its
rows, a token a middle and a scale, found anew at each product; a few channels far larger than all others stay floats
(https://arxiv.org/abs/2208.07339), and the others are evened out between tokens and weight (SmoothQuant, equation 4,
https://arxiv.org/abs/2211.10438). Norms, attention, residual sums and the layers behind the encoder stay as they are.
"""
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from config.machine import best_seconds
from distil.packed import PackedLinear, is_packed_faster

LEAST_EQUAL = 0.995  # share of a student's fields that must stay equal before dtype = 'auto' takes 8 bits
ROUND = 1.5 * 2 ** 23  # a float32 of this size has no digits behind the point
IN_FLOATS = 8        # channels of a layer's input that are far larger than all others


@cache
def weight_bits():
    """8, or 7 where the processor lacks VNNI or AMX: it then adds two products in 16 bits, where 2 * 255 * 127 does not
    fit and 2 * 255 * 63 does."""
    cpu = torch.cpu.get_capabilities()
    return 8 if any(cpu.get(name) for name in ('avx512_vnni', 'avx_vnni', 'amx_int8')) else 7


class Int8Linear(nn.Module):
    """the layer `linear` in 8 bits. peak: (K,) the largest size of each channel of its input; bits: of its weights, see
    weight_bits; kernel: compute with oneDNN's product, else in floats, which gives the same numbers on any device."""

    def __init__(self, linear, peak, bits, kernel=True):
        super().__init__()
        weight, peak = linear.weight.detach().float(), peak.clamp(min=1e-5).to(linear.weight.device)
        self.apart = peak.topk(IN_FLOATS).indices            # channels
        evened = (weight.abs().amax(0).clamp(min=1e-5) / peak).sqrt()  # (K,) input times this, weight by it
        self.factor = evened.index_fill(0, self.apart, 0.0)  # what stays in floats is zero among the codes
        even = (weight / evened).index_fill(1, self.apart, 0.0)  # (N, K)
        self.scale = even.abs().amax(1).clamp(min=1e-9) / (2 ** (bits - 1) - 1)  # (N,)
        codes = (even / self.scale[:, None]).round()         # (N, K)
        # (2 + IN_FLOATS, N): the bias, what a token's middle is multiplied by, and the channels in floats are
        bias = torch.zeros_like(self.scale) if linear.bias is None else linear.bias.detach().float()
        self.beside = torch.cat((bias[None], (codes.sum(1) * self.scale)[None], weight[:, self.apart].T))
        self.zero = torch.zeros(len(codes), dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8), None) if kernel else codes
        self.multiply = self.multiply_bytes if kernel else self.multiply_floats

    def multiply_bytes(self, codes):
        return torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0,
                                                  torch.float32, 'none', [], '')

    def multiply_floats(self, codes):
        return F.linear(codes.float() - 128, self.weight) * self.scale

    def forward(self, x):
        """x (..., K) -> (..., N) in float32"""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.flatten(0, -2).float()                  # (M, K)
            apart, even = rows[:, self.apart], rows * self.factor
            high, low = even.amax(1, keepdim=True), even.amin(1, keepdim=True)  # (M, 1); aminmax is ten times slower
            step = (high - low).clamp_(min=1e-9) / 254
            middle = ((high + low) / (2 * step)).round_()    # in steps; 0 lies between low and high
            # even / step - middle + 128, rounded, 1..255: floats near ROUND have no fraction, their lowest byte is it
            codes = even.mul_(1 / step).add_(ROUND + 128 - middle).view(torch.int32).to(torch.uint8)  # (M, K)
            beside = torch.cat((torch.ones_like(step), middle * step, apart), 1) @ self.beside  # (M, N)
            return self.multiply(codes).mul_(step).add_(beside).view(*x.shape[:-1], -1)


@cache
def is_exact():
    """True if oneDNN's product gives here what whole numbers give, also the largest ones."""
    try:
        linear = nn.Linear(256, 32)
        linear.weight.data = torch.randint(-1, 2, (32, 256)).float()
        x = torch.randint(-1, 2, (33, 256)).float()          # as whole numbers -127, 0 or 127
        fast, slow = (Int8Linear(linear, torch.ones(256), weight_bits(), kernel)(x) for kernel in (True, False))
        return torch.allclose(fast, slow, atol=1e-3)
    except (RuntimeError, AttributeError):                   # a build of torch without it
        return False


def linears(student):
    """{name: (the block's module that has it, its attribute, the layer)} of the encoder's products."""
    return {f'{n}.{name}': (block, name, module) for n, block in enumerate(student.encoder.h)
            for name, module in block.named_children() if isinstance(module, nn.Linear)}


def find_peaks(student, answer):
    """calls answer() -> {name of a layer: (K,) the largest size of each channel of what it was given}."""
    peaks = {}

    def look(name, module, inputs):
        peak = inputs[0].detach().flatten(0, -2).abs().amax(0).float().cpu()
        peaks[name] = torch.maximum(peaks.get(name, peak), peak)
    hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, (_, _, layer) in linears(student).items()]
    answer()
    for hook in hooks:
        hook.remove()
    return peaks


def to_int8(student, peaks, bits=None, kernel=True):
    """changes a student with an encoder in place. peaks: of find_peaks; bits, kernel: see Int8Linear."""
    for name, (block, attribute, layer) in linears(student).items():
        setattr(block, attribute, Int8Linear(layer, peaks[name], bits or weight_bits(), kernel))


@torch.no_grad()
def is_faster(student, peaks, dtype, rounds=10):
    """True if the encoder's widest product is clearly faster in 8 bits than in dtype, with the tokens of a short text
    and with those of many."""
    name, (_, _, layer) = max(linears(student).items(), key=lambda item: item[1][2].weight.numel())
    plain = nn.Linear(layer.in_features, layer.out_features, dtype=dtype)
    plain = PackedLinear(plain) if is_packed_faster(dtype) else plain
    whole = Int8Linear(layer, peaks[name], weight_bits())
    for n_tokens in (16, 512):
        x = torch.ones(n_tokens, layer.in_features)
        in_8_bits, in_dtype = best_seconds([partial(whole, x), partial(plain, x.to(dtype))], rounds)
        if 1.3 * in_8_bits > in_dtype:
            return False
    return True
