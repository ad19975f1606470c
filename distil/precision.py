"""The precision in which a student answers: lower_precision(student, 'auto', checkpoint.get('int8'))."""
import torch

from config import next_command, stop
from config.machine import pick_dtype
from distil.int8 import LEAST_EQUAL, is_exact, is_faster, to_int8, weight_bits
from distil.packed import pack


def is_large(student):
    """True if matrix products take most of the decoding time; if not, lower precision would gain nothing."""
    return bool(student.encoder) or sum(p.numel() for p in student.h.parameters()) > 1e7


def lower_precision(student, dtype, int8=None):
    """changes a student, in place, for answering. dtype: as in pick_dtype, 'int8', or None: it stays as it was trained.
    int8: what report.measure_int8 found, or None. The products of a large student's layers are computed in this type;
    'auto' takes 8 bits on a CPU that has instructions for them, if they are faster and lose next to nothing. What it has
    become is student.precision. Norms, a cache's attention, the residual sum and the head stay in float32. Exits with a
    message if there are no 8 bits here."""
    device, student.precision = student.lm_head.weight.device.type, 'float32'
    if dtype is None:
        return
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
    pack(student, torch.bfloat16 if wanted == torch.bfloat16 and is_large(student) else torch.float32)
