"""The teacher behind a URL, with a real one: llama.cpp's server (xllamacpp) and our own engine read the same .gguf.
.ci/run installs the server and runs this."""
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from tokenizers import Tokenizer

from data import Shards
from distil.space import OutputSpace
from tests.conftest import ROOT, free_port

pytestmark = pytest.mark.slow
pytest.importorskip('xllamacpp')  # pip install --no-deps xllamacpp
TEACHER, TEXTS = ROOT / 'data/teachers/qwen2.5-coder-0.5b.gguf', ROOT / 'data/chitchat/input.jsonl'
SERVER = '''
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = sys.argv[1], int(sys.argv[2]), 4, 8192
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
'''
N = 16  # texts


@pytest.fixture(scope='module')
def url():
    port = free_port()
    server = subprocess.Popen([sys.executable, '-c', SERVER, str(TEACHER), str(port)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    for _ in range(120):
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/v1/models', timeout=5).read()
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.5)
    yield f'http://127.0.0.1:{port}/v1'
    server.kill()


def extract(name, *settings):
    """(Shards, OutputSpace) of a new run on the first N of the demo's texts that pass its filter."""
    shutil.rmtree(ROOT / f'data/chitchat/{name}-00', ignore_errors=True)
    done = subprocess.run([sys.executable, 'extract.py', 'config/demo.py', f'--name={name}', f'--max_records={N}',
                           '--calibrate=0', '--examples=0', *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shards = Shards('chitchat', name, ROOT / 'data')
    return shards, OutputSpace.from_task(Tokenizer.from_file(str(shards.folder / 'tokenizer.json')), shards.meta)


def decisions(shards, space, i):
    """[(output ids that the schema allows, log probability of each)] at the decisions of record i."""
    outs, found = shards.answer(i).tolist(), []
    for state, logits in zip(space.states_before(outs), shards.logits(i)):
        if len(legal := sorted(space.transitions[state], key=space.output_ids.__getitem__)) > 1:
            found.append(([space.output_ids[o] for o in legal], logits[legal] - np.logaddexp.reduce(logits[legal])))
    return found


@pytest.mark.skipif(not (TEACHER.exists() and TEXTS.exists()), reason='the demo\'s teacher or texts are not here')
def test_llama_cpp_gives_the_answers_and_probabilities_of_our_engine(url):
    theirs, their_space = extract('llama_cpp', f'--teacher={url}', '--teacher_model=qwen', '--in_flight=4')
    ours, space = extract('llama_own', '--dtype=float32')
    assert len(theirs) == len(ours) == N
    equal, clear, divergences = [], [], []
    for i, n in enumerate(ours.hashes.tolist().index(hash_) for hash_ in theirs.hashes.tolist()):
        equal.append(their_space.to_json(theirs.answer(i).tolist()) == space.to_json(ours.answer(n).tolist()))
        q, p = decisions(theirs, their_space, i), decisions(ours, space, n)
        clear.append(min(np.diff(np.sort(row)[-2:])[0] for _, row in p) > 0.5)
        for (their_ids, q), (ids, p) in zip(q, p):
            if ids != their_ids:                                # they have chosen different values before
                break
            divergences.append(float((np.exp(p) * (p - q)).sum()))
    print(f'equal {np.mean(equal):.3f}, of {sum(clear)} clear ones {np.mean(np.array(equal)[clear]):.3f}, '
          f'kl {np.mean(divergences):.4f}')
    assert np.mean(equal) >= 0.8 and np.mean(divergences) < 0.03
    assert sum(clear) > N / 8 and np.mean(np.array(equal)[clear]) >= 0.95
