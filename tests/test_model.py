"""The network, and a student that starts from its teacher."""
from functools import partial

import pytest
import torch

from distil.decode import Cache
from distil.start import student_from_teacher
from model import Student, StudentConfig
from tests.conftest import load_teacher, tiny_student


def test_the_reference_student_has_537_million_parameters():
    with torch.device('meta'):
        counts = Student(StudentConfig()).count_params()
    assert {k: round(n / 1e6, 1)
            for k, n in counts.items()} == dict(total=537.4, embedding=268.4, attention=67.1, mlp=201.3,
                                                head=0.5)


def test_every_parameter_is_initialised_and_optimised_once(space):
    model = tiny_student(space)
    groups = [p for group in model.param_groups(0.1) for p in group['params']]
    assert len(groups) == len({id(p) for p in groups}) == len(list(model.parameters()))
    assert {id(p)
            for p in model.param_groups(0.1)[0]['params']
            } == {id(p)
                  for n, p in model.named_parameters() if p.dim() == 2 and n != 'wte.weight'}
    for name, p in model.named_parameters():
        expected = 1.0 if p.dim() == 1 else 0.02 / 2 if name.endswith('c_proj.weight') else 0.02
        assert abs((p.mean() if p.dim() == 1 else p.std()).item() / expected - 1) < 0.15, name


def test_no_token_sees_the_future_or_the_padding(space):
    model, idx = tiny_student(space), torch.randint(4, 500, (2, 12))
    out, idx[:, 8:] = model(idx), 0
    torch.testing.assert_close(model(idx)[:, :8], out[:, :8])
    targets = torch.where(torch.arange(12) % 3 == 0, 1, -1).expand(2, -1)
    torch.testing.assert_close(model(idx, targets), model(idx)[targets >= 0])


@pytest.mark.parametrize('family', ['gemma', 'llama', 'qwen'])
def test_a_student_with_all_layers_equals_the_teacher(teachers, family):
    _, model = load_teacher(teachers[family])
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn_like(p) if 'norm' in name else 0.0  # norm weights that differ
    output_ids, idx = list(range(5, 50)), torch.randint(4, 300, (3, 22))  # within the sliding window
    sizes = dict(vocab_size=model.config.vocab_size, output_vocab=45, block_size=64, n_layer=3)
    student = student_from_teacher(model, sizes, output_ids).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(idx), model(idx).logits[..., output_ids], atol=1e-5, rtol=1e-5)
        cache, parts = Cache(student), []
        for start, stop in ((0, 9), (9, 10), (10, 22)):
            pos, keep = cache.place_tokens([0, 1, 2], [start] * 3, [stop - start] * 3, [stop - start] * 3)
            parts.append(
                student(idx[:, start:stop].reshape(1, -1), cache=cache, pos=pos,
                        keep=keep).view(3, stop - start, -1))
        torch.testing.assert_close(torch.cat(parts, 1), student(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('family', ['gemma', 'llama', 'qwen'])
def test_a_student_with_all_layers_that_keeps_the_prompt_equals_the_teacher_after_it(teachers, family):
    _, model = load_teacher(teachers[family])
    before, after, output_ids = [1, 7, 40, 9, 33], (12, 30), list(range(5, 50))
    idx = torch.cat((torch.randint(4, 300, (3, 8)), torch.tensor(after).expand(3, -1),
                     torch.randint(4, 300, (3, 5))), 1)         # (B, T) text, ids after it, answer
    sizes = dict(vocab_size=model.config.vocab_size, output_vocab=45, block_size=17, n_layer=3)
    student = student_from_teacher(model, sizes, output_ids, 'first', before, after)
    whole = torch.cat((torch.tensor(before).expand(3, -1), idx), 1)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    teacher_logits = model(whole).logits[:, len(before):, output_ids]
    assert student.config.start == [*after]
    close(student(idx), teacher_logits)
    student(idx).sum().backward()
    assert (student.prompt.grad.flatten(1).abs().sum(1) > 0).all()  # every layer gets a gradient
    with torch.no_grad():
        cache, parts = Cache(student), []
        for start, stop in ((0, 9), (9, 10), (10, 15)):
            pos, keep = cache.place_tokens([0, 1, 2], [5 + start] * 3, [stop - start] * 3, [stop - start] * 3)
            logits = student(idx[:, start:stop].reshape(1, -1), cache=cache, pos=pos, keep=keep)
            parts.append(logits.view(3, stop - start, -1))
        close(torch.cat(parts, 1), teacher_logits)
        keep = torch.tensor([3, 29, 44])
        close(student(idx, keep=keep), teacher_logits.flatten(0, 1)[keep])
    if family == 'gemma':
        with pytest.raises(ValueError, match='see 24 tokens'):
            student_from_teacher(model, {**sizes, 'block_size': 64}, output_ids, 'first', before, after)


def test_in_bfloat16_the_gradient_equals_that_of_float32_except_for_rounding(space):
    model, idx = tiny_student(space, n_table=24).train(), torch.randint(4, 500, (4, 12))
    targets = torch.where(torch.arange(12) > 7, 1, -1).expand(4, -1)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            logits = model(idx, targets)
        assert logits.dtype == torch.float32                    # the head must distinguish near ties
        torch.nn.functional.cross_entropy(logits, targets[targets >= 0]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()
