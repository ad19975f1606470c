"""The benchmarks time programs that give the same answers."""
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distil.encoder import Encoder, EncoderConfig
from distil.space import OutputSpace
from model import Student, StudentConfig
from tests.conftest import FIELDS, one_line, run
from tools.bench import count_flops, is_same_answer


def figures_of(done):
    """a dict for each bench line of a run."""
    assert done.returncode == 0, done.stderr
    return [dict(pair.split('=') for pair in line.split()[1:]) for line in done.stdout.splitlines()
            if line.startswith('bench ')]


@pytest.mark.slow
def test_extraction_is_compared_with_generate_on_the_same_answers(project):
    figures, = figures_of(run(project, 'tools/bench.py', '--what=extract', '--extract_batch=24',
                              '--compile=False'))
    assert figures['identical'] == '1' and 1 <= float(figures['passes']) < 2 and float(figures['ratio']) > 1
    assert figures['dtype'] == 'float32'


@pytest.mark.slow
@pytest.mark.skipif(not any(map(torch.cpu.get_capabilities().get, ('amx_bf16', 'avx512_bf16'))),
                    reason='this processor multiplies bfloat16 hundreds of times slower than float32')
def test_extraction_in_bfloat16_counts_near_ties_as_equal_and_nothing_else(project):
    figures, = figures_of(run(project, 'tools/bench.py', '--what=extract', '--extract_batch=24',
                              '--compile=False', '--dtype=bfloat16'))
    assert figures['identical'] == '1' and figures['dtype'] == 'bfloat16'


def test_answers_that_differ_at_a_near_tie_count_as_equal(tokenizer):
    space = OutputSpace(tokenizer, FIELDS)
    outs = space.from_json({'tone': 'neutral', 'spam': True})
    other = space.from_json({'tone': 'friendly', 'spam': True})
    first = next(n for n, (a, b) in enumerate(zip(outs, other)) if a != b)  # the first token that differs
    logits = np.zeros((len(outs), len(space.output_ids)), np.float32)
    logits[np.arange(len(outs)), outs] = 9
    logits[first, other[first]] = 9 - 0.5
    is_same = lambda generated, atol: is_same_answer((outs, logits, None), generated, space, atol)
    assert is_same(outs, 0.0) and is_same(other, 0.75) and not is_same(other, 0.4) and not is_same(other, 0.0)
    assert not is_same([*outs[:first], -1], 99.0)  # a token outside the output vocabulary has no logit
    assert is_same_answer('invalid', [*outs[:first], -1, -1], space, 0.0)
    assert not is_same_answer('invalid', outs, space, 0.0)


@pytest.mark.slow
def test_all_ways_of_decoding_give_identical_answers(project):
    lines = figures_of(run(project, 'tools/bench.py', '--what=decode'))
    assert [line['what'] for line in lines] == ['decode'] * 4 + ['latency', 'teacher']
    for line in lines[:4]:
        assert line['identical'] == '1' and float(line['passes']) <= len(FIELDS) + 1
    assert float(lines[4]['p99_ms']) >= float(lines[4]['median_ms']) > 0 and float(lines[5]['of_engine']) > 0


def test_a_training_step_is_compared_with_a_plain_one(project):
    before = (project / 'out/toy/best.pt').read_bytes()
    figures, = figures_of(run(project, 'tools/bench.py', '--what=train', '--batch_size=16',
                              '--compile=False'))
    assert float(figures['ratio']) > 1 and 0 < float(figures['mfu']) < 1.5
    assert (project / 'out/toy/best.pt').read_bytes() == before


def test_operations_are_those_that_torch_counts():
    encoder = Encoder(EncoderConfig(vocab_size=99, n_layer=3, n_head=4, n_embd=64, n_mlp=256, n_pos=64))
    for reads in (encoder, None):
        student = Student(StudentConfig(
            vocab_size=51 if reads else 99, output_vocab=50, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, n_mlp=256,
            start_id=50, encoder=reads and vars(encoder.config)), reads)
        with FlopCounterMode(display=False) as counter:
            student(torch.randint(0, 99, (8, 30)), torch.randint(0, 50, (8, 10))).sum().backward()
        n_text = np.full(8, 30)
        assert count_flops(student, n_text + 10, n_text) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_benchmark_of_a_missing_task_or_student_exits_with_a_message(project):
    assert 'must be one of' in one_line(run(project, 'tools/bench.py', '--what=luck'))
    assert 'run: python extract.py config/toy.py --name=other' in one_line(
        run(project, 'tools/bench.py', '--name=other'))
    assert 'run: python train.py config/toy.py --run=other' in one_line(
        run(project, 'tools/bench.py', '--what=decode', '--run=other'))
