"""The benches time what gives the same answers."""
import numpy as np

from distil.space import OutputSpace
from tests.conftest import FIELDS, one_line, run
from tools.bench import same_answer


def figures_of(done):
    """the bench lines of a run."""
    assert done.returncode == 0, done.stderr
    return [dict(pair.split('=') for pair in line.split()[1:]) for line in done.stdout.splitlines()
            if line.startswith('bench ')]


def test_extraction_is_compared_with_generate_on_the_same_answers(project):
    figures, = figures_of(run(project, 'tools/bench.py', '--what=extract', '--extract_batch=24', '--compile=False'))
    assert figures['identical'] == '1' and 1 <= float(figures['passes']) < 2 and float(figures['ratio']) > 1
    assert figures['dtype'] == 'float32'


def test_extraction_in_bfloat16_counts_a_tie_as_a_tie_and_nothing_else(project):
    figures, = figures_of(run(project, 'tools/bench.py', '--what=extract', '--extract_batch=24', '--compile=False',
                              '--dtype=bfloat16'))
    assert figures['identical'] == '1' and figures['dtype'] == 'bfloat16'


def test_answers_that_part_at_a_tie_are_the_same_answer(tokenizer):
    space = OutputSpace(tokenizer, FIELDS)
    ours, other = space.from_json({'tone': 'neutral',
                                   'spam': True}), space.from_json({'tone': 'friendly', 'spam': True})
    part = next(n for n, (a, b) in enumerate(zip(ours, other)) if a != b)
    logits = np.zeros((len(ours), len(space.output_ids)), np.float32)
    logits[np.arange(len(ours)), ours] = 9
    logits[part, other[part]] = 9 - 0.5
    same = lambda theirs, atol: same_answer((ours, logits, None), theirs, space, atol)
    assert same(ours, 0.0) and same(other, 0.75) and not same(other, 0.4) and not same(other, 0.0)
    assert not same([*ours[:part], -1], 99.0)  # a token that is not kept has no logit to be near to
    assert same_answer('invalid', [*ours[:part], -1, -1], space,
                       0.0) and not same_answer('invalid', ours, space, 0.0)


def test_the_bench_of_decoding_finds_its_twins_identical(project):
    lines = figures_of(run(project, 'tools/bench.py', '--what=decode'))
    assert [line['what'] for line in lines] == ['decode'] * 4 + ['latency', 'teacher']
    for line in lines[:4]:
        assert line['identical'] == '1' and float(line['passes']) <= len(FIELDS) + 1
    assert float(lines[4]['p99_ms']) >= float(lines[4]['median_ms']) > 0 and float(lines[5]['of_engine']) > 0


def test_a_training_step_is_compared_with_a_plain_one(project):
    before = (project / 'out/toy/best.pt').read_bytes()
    figures, = figures_of(run(project, 'tools/bench.py', '--what=train', '--batch_size=16', '--compile=False'))
    assert float(figures['ratio']) > 1 and 0 < float(figures['mfu']) < 1.5
    assert (project / 'out/toy/best.pt').read_bytes() == before


def test_a_bench_of_what_is_not_there_ends_in_one_line(project):
    assert 'must be one of' in one_line(run(project, 'tools/bench.py', '--what=luck'))
    assert 'run: python extract.py config/toy.py --name=other' in one_line(
        run(project, 'tools/bench.py', '--name=other'))
    assert 'run: python train.py config/toy.py --run=other' in one_line(
        run(project, 'tools/bench.py', '--what=decode', '--run=other'))
