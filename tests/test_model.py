"""The network, and a student that starts from its teacher."""
import numpy as np
import pytest
import torch

from distil.decode import Cache, pad_rows
from distil.start import student_from_table
from distil.teacher import load_table
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


def random_rows(space, seed=0):
    """texts of 1 to 9 tokens and answers of 1 to 6, padded with -1; an answer begins with the start token."""
    rng, V = np.random.default_rng(seed), len(space.output_ids)
    texts = [rng.integers(4, 500, n) for n in (3, 9, 1, 5)]
    answers = [[V, *rng.integers(0, V, n)] for n in (5, 2, 0, 3)]
    return pad_rows(texts, 'cpu'), pad_rows(answers, 'cpu')


def test_rows_are_text_and_answer_without_padding_between_them(space):
    """compared with the plain network on one row at a time, its tokens in one list of table rows."""
    model, (text, answer) = tiny_student(space), random_rows(space)
    expected = []
    for t, a in zip(text, answer):
        t, a = t[t >= 0], a[a >= 0]
        x, n = model.wte(torch.cat((t, model.answer_row[a])))[None], len(t) + len(a)
        angle = torch.arange(n)[:, None] * model.rope_freq
        angle = torch.cat((angle, angle), -1)[None, None]
        for block in model.h:
            x = block(x, angle.cos(), angle.sin())
        expected.append(model.lm_head(model.norm_f(x))[0, len(t):])
    torch.testing.assert_close(model(text, answer), torch.cat(expected))
    torch.testing.assert_close(model(text, answer, only_last=True), torch.stack([rows[-1] for rows in expected]))


def test_no_token_sees_the_future(space):
    model, (text, answer) = tiny_student(space), random_rows(space)
    n = (answer >= 0).sum(1)
    other = answer.clone()
    other[torch.arange(4), n - 1] = (answer[torch.arange(4), n - 1] + 1) % len(space.output_ids)  # the last token
    before, after = (model(text, a).split(n.tolist()) for a in (answer, other))
    for a, b, k in zip(before, after, n):
        torch.testing.assert_close(a[:k - 1], b[:k - 1])
        assert not torch.allclose(a[k - 1], b[k - 1])


def test_with_a_cache_the_logits_are_those_without_one(space):
    """whatever is read at a time, and in whatever slots."""
    model, (text, answer) = tiny_student(space), random_rows(space)
    with torch.no_grad():
        whole, cache, parts = model(text, answer), Cache(model), []
        n_text, n_answer = (text >= 0).sum(1).tolist(), (answer >= 0).sum(1).tolist()
        cache.begin_pass([4, 0, 2, 1], [0] * 4)
        first = model(text, answer[:, :1], cache)               # the start tokens
        rest = [b for b in range(4) if n_answer[b] > 1]
        cache.begin_pass([[4, 0, 2, 1][b] for b in rest], [n_text[b] + 1 for b in rest])
        more = model(text[:0], answer[rest, 1:], cache).split([n_answer[b] - 1 for b in rest])
        for b in range(4):
            parts += [first[b:b + 1], *([more[rest.index(b)]] if b in rest else [])]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('family', ['gemma', 'llama', 'qwen'])
@pytest.mark.parametrize('freeze', [False, True])
def test_a_student_gets_the_table_of_its_teacher(teachers, family, freeze):
    _, teacher = load_teacher(teachers[family])
    sizes = dict(vocab_size=teacher.config.vocab_size - 2, output_vocab=45, output_ids=range(5, 50), block_size=64,
                 n_layer=1, n_embd=16, n_head=2, n_kv_head=2, n_mlp=8)
    student = student_from_table(load_table(str(teachers[family])), sizes, freeze)
    idx = torch.tensor([4, 9, 77])
    expected = teacher.get_input_embeddings()(idx)              # with its scale
    torch.testing.assert_close(student.wte(idx).float(), expected, atol=1e-3 if freeze else 1e-6, rtol=1e-3)
    assert student.wte.weight.requires_grad is not freeze and student.wte_proj.weight.requires_grad
    text, answer = torch.tensor([[4, 9, 77]]), torch.tensor([[45, 3]])
    student(text, answer).sum().backward()
    assert (student.wte.weight.grad is None) == freeze and student.wte_proj.weight.grad.any()


def test_in_bfloat16_the_gradient_equals_that_of_float32_except_for_rounding(space):
    model, (text, answer), grads = tiny_student(space, n_table=24).train(), random_rows(space), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            logits = model(text, answer)
        assert logits.dtype == torch.float32                    # the head must distinguish near ties
        torch.nn.functional.cross_entropy(logits, torch.ones(len(logits), dtype=torch.long)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()
