"""The precision in which a student answers: lower_precision(student, 'auto', checkpoint.get('int8'))."""
import torch

from config import next_command, stop
from config.machine import pick_dtype
from distil.int8 import LEAST_EQUAL, is_exact, is_faster, to_int8, weight_bits


def is_large(student):
    """True if matrix products take most of the decoding time; if not, lower precision would gain nothing."""
    return bool(student.encoder) or sum(p.numel() for p in student.h.parameters()) > 1e7


def lower_precision(student, dtype, int8=None):
    """changes a large student, in place, to compute the products of its layers in another type. dtype: as in
    pick_dtype, or 'int8'; int8: what report.measure_int8 found, or None. 'auto' takes 8 bits on a CPU that has
    instructions for them, if they are faster and lose next to nothing. What it has become is student.precision. Norms,
    a cache's attention, the residual sum and the head stay in float32. Exits with a message if there are no 8 bits
    here."""
    device, student.precision = student.lm_head.weight.device.type, 'float32'
    if dtype == 'int8':
        if not (int8 and student.encoder):
            stop('dtype = int8 needs a student whose best epoch was measured in 8 bits; where its held-out records '
                 f'are, run: {next_command("tools/evaluate.py")} --dtype=int8' if student.encoder else
                 'dtype = int8 is for a student with a reader')
        if device != 'cpu' or not is_exact():
            stop('dtype = int8 needs a CPU and a torch with oneDNN')
    wanted = pick_dtype('auto' if dtype == 'int8' else dtype, device)
    able = dtype == 'auto' and device == 'cpu' and int8 and weight_bits() == 8 and int8['equal_8'] >= LEAST_EQUAL
    if wanted == torch.bfloat16 and is_large(student):
        student.precision = 'bfloat16'
        student.forward = torch.autocast(device, torch.bfloat16)(student.forward)
    if dtype == 'int8' or able and is_exact() and is_faster(student, int8['peaks'], wanted):
        to_int8(student, int8['peaks'])
        student.precision = 'int8'
    if wanted == torch.bfloat16 and is_large(student):          # what is not in 8 bits
        for blocks in (student.h, student.encoder.h if student.encoder else ()):
            for module in (module for block in blocks for module in block.modules()):
                if isinstance(module, torch.nn.Linear):
                    module.to(torch.bfloat16)
