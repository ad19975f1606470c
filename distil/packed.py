"""Products on a CPU whose weights lie as its kernel reads them:

    pack(student, torch.float32)     # in place; for answering only, there are no gradients

torch reorders a weight in bfloat16 anew at each product, and computes float32 with MKL, which leaves the AVX-512 of
AMD's processors unused. oneDNN does neither if it is given the weight in its own order: the numbers are those of a
Linear but for rounding.
"""
from functools import cache, partial

import torch
import torch.nn as nn

from config.machine import best_seconds, has_bfloat16


class PackedLinear(nn.Module):
    """the layer `linear` in the type of its weight, for inputs (..., K) of any type -> (..., N). NotImplementedError,
    RuntimeError or AttributeError if this build of torch cannot."""

    def __init__(self, linear):
        super().__init__()
        self.dtype, bias = linear.weight.dtype, linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, 'none', [], '')


@cache
def is_packed_faster(dtype, rounds=7):
    """True if products in this type are faster packed, with the tokens of a short text and with those of many,
    and the same."""
    if dtype == torch.bfloat16 and not has_bfloat16():
        return False
    plain = nn.Linear(512, 1024, dtype=dtype, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        plain.weight.copy_(torch.arange(plain.weight.numel()).view_as(plain.weight) % 251 / 251 - 0.5)
        plain.bias.fill_(1.0)
        try:
            packed = PackedLinear(plain)
            for n_tokens in (16, 512):
                x = (torch.arange(n_tokens * 512).view(n_tokens, 512) % 17 / 17 - 0.5).to(dtype)
                if (packed(x) - plain(x)).abs().max() > (1e-3 if dtype == torch.float32 else 0.1):
                    return False
                in_packed, in_plain = best_seconds([partial(packed, x), partial(plain, x)], rounds)
                if in_packed > in_plain:
                    return False
        except (NotImplementedError, RuntimeError, AttributeError):
            return False
    return True


def pack(student, dtype):
    """changes the Linears of a student, in place: their weights are in dtype, and packed where that is faster. The head
    and what points to places stay as they are."""
    layers = [(module, name, layer) for module in student.modules() for name, layer in module.named_children()
              if isinstance(layer, nn.Linear) and not name.startswith(('lm_head', 'point_'))]
    packed = student.lm_head.weight.device.type == 'cpu' and is_packed_faster(dtype)
    while layers:                                               # one after the other, or all would be there twice
        module, name, layer = layers.pop()
        setattr(module, name, PackedLinear(layer.to(dtype)) if packed else layer.to(dtype))
