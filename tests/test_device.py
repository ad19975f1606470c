"""device/: the exported folder answers like sample.py, in Python without torch, in Node and in Chromium."""
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, trainers

for package in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(package)  # optional: requirements-device.txt
import onnx
import onnxruntime

from data import held_out, write_json
from data.lines import read_texts, text_hash
from device.export import copy_runners, describe_values, read_corpus, write_onnx
from device.run import Student as Runner
from device.shrink import (Int8, choose_tokens, fold_table, list_pieces, round_to_int8, trim_student,
                           trim_tokenizer)
from device.task import make_task
from device.web import PACKAGES, Handler, fetch_packages
from distil.checkpoint import CHECKPOINT
from distil.schema import Schema
from distil.space import OutputSpace, tokenizer_hash
from distil.values import plain, value_name
from sample import Labeler
from tests.conftest import FIELDS, PROMPT, ROOT, SCHEMAS, make_once, one_line, run, tiny_student

HOSTILE = ['', '  ', '\t\x1c\x85\xa0', 'hello ' * 20_000, 'x' * 100_000, 'a\0b \x01', '\ud800 half',
           'é日本 😀👩‍👩‍👧', 'שלום مرحبا',
           '<eos> <turn>', '\ufeffhello', '{"tone":"spam"}', "I'M it’s “so”…", '\u200b', '1234567890 ½']
ALIKE = [f'hello my friend {n} was not there' for n in range(70)]  # more than a batch
NESTED = {
    'labels': {'type': 'array', 'uniqueItems': True, 'items': {'enum': ['bug', 'ui', 'é "x"', 1]}},
    'customer': {'type': 'object', 'required': ['mood', 'ok'], 'properties': {
        'mood': {'enum': ['good', 'bad', None]}, 'plan': {'enum': [1, '1', 11, True]}, 'ok': {'const': 1.0}}},
    'findings': {'type': 'array', 'maxItems': 2, 'items': {'type': 'object', 'properties': {
        'kind': {'enum': ['a', 'ab']}, 'tags': {'type': 'array', 'items': {'enum': ['x', 'y']}, 'minItems': 1}}}},
    'order': {'anyOf': [{'type': 'null'}, {'type': 'object', 'required': ['days'], 'properties': {
        'days': {'enum': [1, 11]}, 'late': {'type': 'boolean'}}}]},
    'left': {'type': 'string'}}
TASKS = [*SCHEMAS, (NESTED, None, False, ['left'])]
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


def as_lines(texts):
    return b'\n'.join(text.encode('utf-8', 'replace') for text in texts) + b'\n'


def same_records(first, second):
    """True if two records are equal; their probabilities may differ by less than 2e-4."""
    first, second = dict(first), dict(second)
    a, b = first.pop('_confidence', {}), second.pop('_confidence', {})
    flat = lambda confidence: {(field, value): p for field, of_field in confidence.items()
                               for value, p in (of_field.items() if isinstance(of_field, dict)
                                                else [('', of_field)])}
    a, b = flat(a), flat(b)
    return json.dumps(first) == json.dumps(second) and a.keys() == b.keys() and all(
        abs(a[key] - b[key]) < 2e-4 for key in a)


def make_student(folder, tokenizer, fields, indent=None, fence=False, left_out=(), seed=0, **sizes):
    """writes a random student of these fields as train.py does, and its export. Returns the folder."""
    space = OutputSpace(tokenizer, fields, indent, fence, end_id=2, auxiliary=range(4, 60), left_out=left_out)
    student = tiny_student(space, seed, block_size=space.max_answer + 20, **sizes)
    for weight in student.parameters():  # so that answers depend on the text
        weight.data *= 8 if weight.dim() == 2 else 1
    task = {'fields': fields, 'indent': indent, 'fence': fence, 'end_id': 2, 'output_ids': space.output_ids,
            'tokenizer_hash': tokenizer_hash(tokenizer), 'prompt': PROMPT, 'max_text': 18,
            'teacher': 'a/teacher', 'fingerprint': '', 'keep_end': seed == 1, 'left_out': left_out}
    per_field = {path: {'temperature': 0.7 + n / 3} for n, path in enumerate(space.schema.paths)}
    checkpoint = {'format': CHECKPOINT, 'student': vars(student.config), 'model': student.state_dict(),
                  'task': task, 'per_field': per_field}
    folder.mkdir()
    tokenizer.save(str(folder / 'tokenizer.json'))
    torch.save(checkpoint, folder / 'best.pt')
    device = folder / 'device'
    device.mkdir()
    kept = choose_tokens(tokenizer, 0, Counter(), set())
    small, small_space = trim_student(student, space, kept, trim_tokenizer(tokenizer, kept))
    graphs = write_onnx(small, device / 'student.onnx')
    small_space.tokenizer.save(str(device / 'tokenizer.json'))
    sizes = {file: (device / file).stat().st_size for file in (*graphs, 'tokenizer.json')}
    task = make_task('toy', checkpoint, small_space, small)
    write_json(device / 'task.json', task | {'bytes': sizes})
    copy_runners(device)
    return folder


class Students(dict):
    """{n: folder of the student of TASKS[n]}, made when it is asked for. make(folder, n) writes it."""

    def __init__(self, tmp_path_factory, name, make):
        self.once = lambda n: make_once(tmp_path_factory, f'{name}_{n}', lambda folder: make(folder, n))

    def __missing__(self, n):
        self[n] = self.once(n)
        return self[n]


@pytest.fixture(scope='module')
def students(tmp_path_factory, tokenizer):
    return Students(tmp_path_factory, 'student', lambda folder, n: make_student(folder, tokenizer, *TASKS[n], seed=n))


NUMBERS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(TASKS)))]


@pytest.fixture(scope='module')
def npm(tmp_path_factory):
    """the folder npm/ with the packages that a browser needs, fetched as web.py does; axe.js is beside it."""
    if not shutil.which('npm') or not shutil.which('node'):
        pytest.skip('Node.js is not installed')
    folder = tmp_path_factory.mktemp('npm') / 'npm'
    fetch_packages(folder)
    packed = subprocess.run(['npm', 'pack', '--silent', 'axe-core@4.14.1'], cwd=folder.parent,
                            capture_output=True, text=True)
    with tarfile.open(folder.parent / packed.stdout.split()[-1]) as parts:
        (folder.parent / 'axe.js').write_bytes(parts.extractfile('package/axe.min.js').read())
    return folder


# -----------------------------------------------------------------------------
# fewer tokens, fewer bits

parts = st.sampled_from(['hello', ' friend', ' the cat', '"tone"', ' rained'])
texts = st.lists(st.one_of(st.text(max_size=30), parts), max_size=6).map(''.join)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.integers(265, 400), st.lists(st.integers(0, 999), max_size=200), texts)
def test_a_trimmed_tokenizer_cuts_known_tokens_as_before_and_encodes_any_text(tokenizer, n, seen, text):
    seen = Counter(i % tokenizer.get_vocab_size() for i in seen)
    kept = choose_tokens(tokenizer, n, seen, {1, 2})
    small = trim_tokenizer(tokenizer, kept)
    assert len(kept) <= n and small.get_vocab_size() == len(kept)
    before = tokenizer.encode(text, add_special_tokens=False).ids
    after = [kept[i] for i in small.encode(text, add_special_tokens=False).ids]
    if {*before} <= {*kept}:
        assert after == before
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    assert decode(after) == decode(before)


def test_seen_tokens_are_kept_first_with_the_pieces_they_are_built_from(tokenizer):
    vocab = tokenizer.get_vocab()
    seen = tokenizer.encode(' friendly', add_special_tokens=False).ids
    kept = choose_tokens(tokenizer, 290, Counter(seen), {2})
    ranks = {tuple(pair): n for n, pair in enumerate(json.loads(tokenizer.to_str())['model']['merges'])}
    for i in seen:
        pieces = list_pieces(tokenizer.id_to_token(i), ranks)
        assert pieces[-1] == tokenizer.id_to_token(i) and {vocab[piece] for piece in pieces} <= {*kept}
    assert choose_tokens(tokenizer, 0, Counter(), set()) == sorted(vocab.values())
    with pytest.raises(ValueError, match='keep_tokens is 9'):
        choose_tokens(tokenizer, 9, Counter(), set())
    words = Tokenizer(models.WordLevel({'a': 0, 'b': 1, '?': 2}, unk_token='?'))  # not BPE: no pieces
    with pytest.raises(ValueError, match='set keep_tokens=0'):
        choose_tokens(words, 2, Counter(), set())
    kept = choose_tokens(words, 0, Counter(), set())
    assert trim_tokenizer(words, kept).encode('b').ids == words.encode('b').ids


def test_the_commonest_tokens_of_the_vocabulary_are_kept_even_if_they_were_not_seen():
    rng, common = random.Random(0), Tokenizer(models.BPE())
    common.train_from_iterator((''.join(rng.choices(letters, k=9)) for letters in ['abcd', 'WXYZ'] * 300),
                               trainers.BpeTrainer(vocab_size=800, show_progress=False))
    seen = Counter(i for token, i in common.get_vocab().items() if token.islower())
    kept = choose_tokens(common, 200, seen, set())
    assert {*range(200 // 8)} <= {*kept} and len(kept) == 200 < len(seen)


def test_int8_rounds_by_half_a_step_at_most_and_computes_with_the_rounded_weights(space):
    weight = torch.randn(20, 32) * torch.logspace(-3, 2, 20)[:, None]
    whole = Int8(torch.cat((weight, torch.zeros(1, 32))))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((whole.weight[:20] - weight).abs() <= step * 0.5001).all() and not whole.weight[20].any()
    grouped = Int8(weight, group=16)                            # a scale of its own for each half of a row
    steps = weight.unflatten(1, (2, 16)).abs().amax(2).repeat_interleave(16, 1) / 127
    assert ((grouped.weight - weight).abs() <= (steps * 0.57).clamp(min=1e-5)).all()  # the scale has 16 bits
    assert (grouped.weight - weight).pow(2).sum() < (whole.weight[:20] - weight).pow(2).sum()
    student = fold_table(tiny_student(space, n_table=48))
    rounded, twin = round_to_int8(student), fold_table(student)
    for name, p in twin.named_parameters():
        if p.dim() == 2 and name != 'lm_head.weight':
            p.data = rounded.get_submodule(name.removesuffix('.weight')).weight
    rows = torch.randint(0, 500, (3, 11)), torch.randint(0, 60, (3, 5))
    assert torch.allclose(rounded(*rows), twin(*rows), atol=1e-6) and not torch.equal(rounded(*rows), student(*rows))


def test_a_folded_table_gives_the_same_logits(space):
    student = tiny_student(space, n_table=48)
    folded, rows = fold_table(student), (torch.randint(0, 500, (3, 11)), torch.randint(0, 60, (3, 5)))
    assert folded.wte.weight.shape == (600, 32) and torch.allclose(folded(*rows), student(*rows), atol=1e-5)
    assert fold_table(tiny_student(space, n_table=16)).wte.weight.shape == (600, 16)  # folding would widen it


# -----------------------------------------------------------------------------
# the graph


@pytest.mark.slow
@pytest.mark.parametrize('int8, shape', [
    (False, dict()), (True, dict(n_kv_head=4, n_table=48)), (True, dict(n_head=2, n_kv_head=1, n_layer=1))])
def test_the_graph_computes_the_students_logits(space, tmp_path, int8, shape):
    student = fold_table(tiny_student(space, **shape))
    student = round_to_int8(student) if int8 else student
    write_onnx(student, tmp_path / 'student.onnx')
    session, rng = onnxruntime.InferenceSession(tmp_path / 'student.onnx'), np.random.default_rng(0)
    for B, T, A in ((1, 2, 2), (3, 7, 5), (1, 48, 48), (9, 20, 2)):
        text, answer = rng.integers(0, 600, (B, T)), rng.integers(0, len(space.output_ids) + 1, (B, A))
        n_text, n_answer = rng.integers(1, T + 1, B), rng.integers(1, A + 1, B)
        text[np.arange(T) >= n_text[:, None]] = answer[np.arange(A) >= n_answer[:, None]] = -1
        with torch.no_grad():
            whole = student(torch.tensor(text), torch.tensor(answer))[n_answer.cumsum() - 1]
            last = student(torch.tensor(text), torch.tensor(answer), only_last=True)
        logits, = session.run(None, {'text': text, 'answer': answer})
        assert (last - whole).abs().max() < 1e-5 and np.abs(logits - whole.numpy()).max() < 1e-5
    graph = onnx.load(tmp_path / 'student.onnx').graph
    assert {node.domain for node in graph.node} == {''}
    table, = (init for init in graph.initializer if init.dims[:1] == [600] and init.dims[1] > 1)
    assert table.data_type == (onnx.TensorProto.INT8 if int8 else onnx.TensorProto.FLOAT)
    assert str(ROOT).encode() not in (tmp_path / 'student.onnx').read_bytes()  # no path of this machine


# -----------------------------------------------------------------------------
# the runners


@pytest.mark.parametrize('n', NUMBERS)
def test_run_py_gives_the_answers_of_sample_py(students, n):
    texts = [*ALIKE, *HOSTILE]
    for confidence in (False, True, 'full'):
        expected = Labeler(students[n], 'cpu', confidence=confidence, min_confidence=0.6)(texts)
        records = Runner(students[n] / 'device', confidence, 0.6)(texts)
        assert all(map(same_records, records, expected)) and len(records) == len(texts)
    assert len({json.dumps(record) for record in expected}) > 3  # they are not all equal
    assert {'_defer' in record for record in expected} == {True, False}


def test_run_py_answers_without_torch(students, tmp_path):
    for package in ('numpy', 'numpy.libs', 'onnxruntime', 'tokenizers', 'huggingface_hub', 'flatbuffers',
                    'google', 'packaging', 'ml_dtypes'):
        installed = Path(np.__file__).parent.parent / package
        if installed.exists():
            os.symlink(installed, tmp_path / package)
    folder, texts = students[0] / 'device', [*HOSTILE, *ALIKE]
    python = [sys.executable, '-S']  # of this environment's packages only those linked
    start = dict(env={'PYTHONPATH': str(tmp_path), 'PATH': os.environ['PATH']}, capture_output=True)
    assert subprocess.run([*python, '-c', 'import torch'], **start).returncode == 1
    done = subprocess.run([*python, folder / 'run.py', '--confidence'], input=as_lines(texts), **start)
    assert done.returncode == 0, done.stderr.decode()
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(map(same_records, records, Labeler(students[0], 'cpu')(texts)))
    assert b'longer than the 18 tokens' in done.stderr
    (tmp_path / 't.txt').write_bytes(as_lines(texts) + b'\xff\xfe\xed\xa0\x80 no newline')
    done = subprocess.run([*python, folder / 'run.py', tmp_path / 't.txt'], **start)
    assert len(done.stdout.splitlines()) == len(texts) + 1 and b'_confidence' not in done.stdout
    done = subprocess.run([*python, folder / 'run.py', '--text=hello', '--confidence=full'], **start)
    assert list(json.loads(done.stdout)['_confidence']['spam']) == ['true', 'false']


def test_run_py_exits_with_a_message_if_the_folder_is_damaged_or_of_another_format(students, tmp_path):
    start = dict(capture_output=True, text=True)
    damages = {'student.onnx': lambda b: b[:len(b) // 2], 'task.json': lambda b: b[:-9],
               'tokenizer.json': lambda b: b'{}'}
    for file, damage in damages.items():
        folder = shutil.copytree(students[0] / 'device', tmp_path / file)
        (folder / file).write_bytes(damage((folder / file).read_bytes()))
        done = subprocess.run([sys.executable, folder / 'run.py', '--text=hello'], **start)
        assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'export it again' in done.stderr
    folder = shutil.copytree(students[0] / 'device', tmp_path / 'format')
    task = json.loads((folder / 'task.json').read_text()) | {'format': 2}
    (folder / 'task.json').write_text(json.dumps(task))
    done = subprocess.run([sys.executable, folder / 'run.py', '--text=hello'], **start)
    assert done.stderr == f'{folder} has format 2, this run.py reads 5; export it again\n'
    with pytest.raises(SystemExit, match='does not hold a complete student'):
        Runner(tmp_path)


@pytest.mark.slow
def test_wrong_arguments_and_another_exports_files_exit_with_a_message(students, npm, tmp_path):
    device = students[1] / 'device'
    shutil.copytree(npm, device / 'npm', dirs_exist_ok=True)
    os.symlink(device, tmp_path / 'link')
    start = dict(capture_output=True, text=True, input='hello\r\n')
    for args, message in ((['nothing.txt'], 'nothing.txt cannot be read: No such file'),
                          ([str(tmp_path)], 'Is a directory'), (['--min_confidence=7'], 'from 0 to 1'),
                          (['--min_confidence=target'], 'no target')):
        done = subprocess.run([sys.executable, device / 'run.py', *args], **start)
        assert done.returncode == 1 and message in done.stderr
        assert done.stderr.count('\n') == 1 and not done.stdout
    for args in (['texts.txt'], ['--confidence=typo']):
        done = subprocess.run(['node', device / 'student.js', *args], **start)
        assert done.returncode == 1 and 'run: node student.js' in done.stderr and done.stderr.count('\n') == 1
    piped = subprocess.run([sys.executable, device / 'run.py', '-'], **start).stdout
    by_link = subprocess.run(['node', tmp_path / 'link/student.js'], **start).stdout
    assert json.loads(piped) == json.loads(by_link) == Runner(device)(['hello'])[0]
    elsewhere = f'''import {{ Student }} from '{tmp_path}/link/student.js';
        console.log(JSON.stringify(await (await Student.load()).label(['hello'])))'''
    done = subprocess.run(['node', '--input-type=module', '-e', elsewhere], **start)
    assert json.loads(done.stdout) == [json.loads(piped)]
    mixed = shutil.copytree(device, tmp_path / 'mixed')
    with open(mixed / 'tokenizer.json', 'ab') as file:
        file.write(b' ')  # another size, as if from another export
    for program in ([sys.executable, mixed / 'run.py'], ['node', mixed / 'student.js']):
        assert 'tokenizer.json is not from this export' in subprocess.run(program, **start).stderr


@pytest.mark.parametrize('n', NUMBERS)
def test_node_gives_the_answers_of_sample_py(students, npm, n):
    device, texts = students[n] / 'device', [*ALIKE, *HOSTILE]
    shutil.copytree(npm, device / 'npm', dirs_exist_ok=True)
    expected = Labeler(students[n], 'cpu', confidence='full')(texts)
    done = subprocess.run(['node', device / 'student.js', '--confidence=full'], input=as_lines(texts),
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    records = [json.loads(line) for line in done.stdout.splitlines()]
    # JavaScript puts keys that are numbers first, and has no 1.0
    order = lambda record: plain(dict(sorted(record.items())))
    assert all(same_records(order(a), order(b)) for a, b in zip(records, expected, strict=True))


def test_node_exits_with_a_message_if_the_folder_is_damaged(students, npm, tmp_path):
    for file in ('student.onnx', 'task.json'):
        folder = shutil.copytree(students[0] / 'device', tmp_path / file)
        shutil.copytree(npm, folder / 'npm', dirs_exist_ok=True)
        (folder / file).write_bytes((folder / file).read_bytes()[:-500])
        done = subprocess.run(['node', folder / 'student.js'], input=b'hello\n', capture_output=True)
        assert done.returncode == 1 and b'export it again' in done.stderr and b' at ' not in done.stderr


# -----------------------------------------------------------------------------
# the page


@pytest.fixture
def page(request, students, npm):
    """(the page of a student, the first unless a test says which, opened in the system's Chromium; its server)."""
    api = pytest.importorskip('playwright.sync_api')
    if not CHROMIUM:
        pytest.skip('Chromium is not installed')
    device = students[getattr(request, 'param', 0)] / 'device'
    shutil.copytree(npm, device / 'npm', dirs_exist_ok=True)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=str(device)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
             '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={'width': 390, 'height': 844})
        page.errors, page.requests = [], []
        page.on('pageerror', lambda error: page.errors.append(str(error)))
        page.on('console', lambda line: line.type == 'error' and page.errors.append(line.text))
        page.on('request', lambda request: page.requests.append(request.url))
        page.goto(f'http://127.0.0.1:{server.server_port}/')
        page.wait_for_selector('#text:enabled')
        yield page, server
        assert not page.errors
        assert {url.split('/')[2] for url in page.requests if not url.startswith(('blob:', 'data:'))} == {
            f'127.0.0.1:{server.server_port}'}  # no other host
        browser.close()
    server.shutdown()


def read_answers(page):
    """[({field: {value: probability}}, [values in bold])] of the answers that the page shows."""
    return page.evaluate('''() => [...document.querySelectorAll("#answers > li")].map((card) => [
        Object.fromEntries([...card.querySelectorAll("section")].map((part) => [
            part.querySelector("h2").textContent,
            Object.fromEntries([...part.querySelectorAll("li")].map((row) => [row.children[1].textContent,
                Number(row.querySelector(".number").textContent)]))])),
        [...card.querySelectorAll(".chosen")].map((row) => row.children[1].textContent)])''')


def test_the_page_shows_the_answers_of_sample_py_and_works_offline(page, students, tmp_path):
    page, server = page
    expect = pytest.importorskip('playwright.sync_api').expect
    label = Labeler(students[0], 'cpu', confidence='full')
    texts = ['hello my friend', 'the cat sat on a mat', 'buy now 😀']
    page.fill('#text', '\n'.join(texts))
    expect(page.locator('#answers > li')).to_have_count(3)
    for (shown, chosen), record in zip(read_answers(page), label(texts), strict=True):
        assert chosen == [record['tone'], json.dumps(record['spam'])]
        for field, probabilities in record['_confidence'].items():
            assert shown[field].keys() == probabilities.keys()
            assert all(abs(shown[field][value] - p) < 0.006 for value, p in probabilities.items())
    assert page.evaluate('document.documentElement.scrollWidth') <= 390  # it fits a phone

    page.fill('#text', 'hello there!\nשלום עולם!')              # a line from left to right, one from right to left
    expect(page.locator('#answers > li')).to_have_count(2)
    assert page.evaluate('''() => [...document.querySelectorAll("#answers p")].map((p) => {
        const left = (n) => { const range = document.createRange(); range.setStart(p.firstChild, n);
            range.setEnd(p.firstChild, n + 1); return range.getBoundingClientRect().left; };
        return left(0) < left(p.textContent.length - 1); })''') == [True, False]

    (tmp_path / 'lines.txt').write_bytes(as_lines([*ALIKE * 5, '', 'é日']))
    page.set_input_files('#file', tmp_path / 'lines.txt')
    with page.expect_download() as download:
        page.click('#done a')
    records = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    expected = Labeler(students[0], 'cpu')([*ALIKE * 5, '', 'é日'])
    assert all(map(same_records, records, expected)) and len(records) == len(expected)

    expect(page.locator('#status')).to_contain_text('without a network')
    server.shutdown()
    server.server_close()
    page.reload()
    page.wait_for_selector('#text:enabled')
    page.fill('#text', '\n'.join(texts[:2]))
    expect(page.locator('#answers > li')).to_have_count(2)
    assert read_answers(page)[1][1][0] == label(texts)[1]['tone']
    # the worker tries the network first
    page.errors = [line for line in page.errors if 'ERR_CONNECTION_REFUSED' not in line]


@pytest.mark.slow
@pytest.mark.parametrize('page', [len(SCHEMAS)], indirect=True)
def test_the_page_shows_lists_and_objects(page, students):
    page, _ = page
    expect = pytest.importorskip('playwright.sync_api').expect
    for text, record in zip(ALIKE[:3], Labeler(students[len(SCHEMAS)], 'cpu', confidence='full')(ALIKE)):
        page.fill('#text', text)
        confidence = record.pop('_confidence')
        write = partial(json.dumps, ensure_ascii=False, separators=(',', ':'))
        expect(page.locator('pre')).to_have_text('\n'.join(f'{k}: {write(v)}' for k, v in plain(record).items()))
        (shown, chosen), = read_answers(page)
        assert shown.keys() == confidence.keys() - {'customer.ok'}  # a constant below the top level
        labels, mood = list(map(value_name, record['labels'])), value_name(record['customer']['mood'])
        assert f'labels: {" and ".join(labels) or "none"}, customer.mood: {mood}, ' in page.inner_text('#said')
        assert sorted(chosen[:len(labels)]) == sorted(labels) and chosen[len(labels)] == mood


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_can_be_used_by_keyboard_and_screen_reader(page, npm, scheme):
    page, _ = page
    expect = pytest.importorskip('playwright.sync_api').expect
    page.emulate_media(color_scheme=scheme)
    page.keyboard.press('Tab')
    page.keyboard.press('Control+A')
    page.keyboard.type('buy now')
    expect(page.locator('#said')).to_contain_text('tone: ')
    assert page.input_value('#text') == 'buy now'
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'file'
    page.add_script_tag(path=npm.parent / 'axe.js')
    violations = page.evaluate('axe.run()')['violations']
    assert not [(rule['id'], rule['nodes'][0]['html']) for rule in violations], violations


# -----------------------------------------------------------------------------
# the programs


@pytest.fixture(scope='module')
def exported(project, tmp_path_factory):
    """(a copy of the project, the finished process of device/export.py in it)."""
    root = shutil.copytree(project, tmp_path_factory.mktemp('exported') / 'p', symlinks=True)
    return root, run(root, 'device/export.py', '--keep_tokens=380')


@pytest.mark.slow
def test_export_prints_what_it_loses_and_makes_a_folder_that_answers(exported):
    root, done = exported
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: dict(pair.split('=') for pair in line.split()[1:])
             for line in done.stdout.splitlines() if '=' in line.split()[1]}
    shrink = {key: float(value) for key, value in lines['shrink'].items()}
    assert shrink['tokens'] <= 380 < shrink['of']
    assert shrink['fields_same'] > 0.8 and shrink['ids_changed'] < 0.5
    assert abs(shrink['kl_int8'] - shrink['kl_float32']) < 0.002 and lines['onnx']['same_records'] == '1'
    folder = root / 'out/toy/device'
    assert sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) == int(lines['device']['bytes'])
    assert not (root / 'out/toy/device.tmp').exists()
    card = (folder / 'README.md').read_text()
    assert '`tone` | "neutral", "friendly"' in card and 'hello there' in card
    assert '{' not in card.split('The prompt')[0]
    source = f'measured on {lines["shrink"]["texts"]} held-out texts of data/toy/input.jsonl'
    assert source in done.stdout and source in ' '.join(card.split())
    record, = Runner(folder)(['hello my friend'])
    assert [record] == Labeler(root / 'out/toy', 'cpu', confidence=False)(['hello my friend'])
    assert set(record) == {*FIELDS}
    again = run(root, 'device/export.py', '--keep_tokens=0', '--int8=False')
    assert again.returncode == 0 and 'fields_same=1\n' in again.stdout and 'onnx texts=' in again.stdout


def test_the_texts_to_check_are_those_that_the_student_was_trained_without(tmp_path):
    texts = [f'text {n}' for n in range(50)]
    (tmp_path / 'input.jsonl').write_text('{}\n' + ''.join(json.dumps({'text': text}) + '\n' for text in texts))
    hashes = np.array([text_hash(text) for text in texts[3:6]], np.uint64)
    assert read_corpus(tmp_path / 'input.jsonl', 40, hashes) == (texts[:3] + texts[6:40], texts[3:6])
    counted, checked = read_corpus(tmp_path / 'input.jsonl', 40)
    assert sorted(counted + checked) == sorted(texts[:40]) and all(held_out(text_hash(text)) for text in checked)


@pytest.mark.slow
def test_check_measures_on_the_texts_of_a_file_and_names_it(exported, tmp_path):
    root, _ = exported
    counted = next(text for text, *_ in read_texts(root / 'data/toy/input.jsonl')
                   if not held_out(text_hash(text)))
    texts = ['un\u2019usual: “wörds”', 'buy  now', counted, '', 'hello']  # neither counted nor empty: three
    (tmp_path / 'mine.txt').write_text('\r\n'.join(texts), encoding='utf-8')
    (root / 'data/other.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    shares = []
    for file, shown in ((tmp_path / 'mine.txt', 'mine.txt'), ('data/other.jsonl', 'data/other.jsonl')):
        done = run(root, 'device/export.py', '--keep_tokens=380', f'--check={file}')
        source = f'measured on 3 texts of {shown}'  # no folder of this machine in what may be published
        card = (root / 'out/toy/device/README.md').read_text()
        assert done.returncode == 0 and 'onnx texts=3 same_records=1' in done.stdout
        assert f'\n{source};' in done.stdout and f'{source}:' in ' '.join(card.split())
        shares.append([pair for pair in done.stdout.split() if pair.startswith(('ids_', 'fields_'))])
    assert shares[0] == shares[1] and len(shares[0]) == 4
    (tmp_path / 'empty.txt').write_text(f'\n{counted}\n')
    for file, message in (('no.txt', 'No such file'), (tmp_path, 'Is a directory'),
                          (tmp_path / 'empty.txt', 'has no text to check that was not counted')):
        assert message in one_line(run(root, 'device/export.py', f'--check={file}'))


def test_the_card_says_what_a_list_is_made_of():
    shown = {leaf.path: describe_values(leaf) for leaf in Schema(NESTED, ['left']).leaves}
    assert shown['labels'] == r'a list of "bug", "ui", "é \"x\"", 1' and shown['findings'] == 'a list of up to 2 items'
    assert shown['customer.mood'] == '"good", "bad", null' and shown['findings[].kind'] == 'a list of "a", "ab"'
    assert shown['order?'] == 'present, null'


@pytest.mark.slow
def test_wrong_settings_exit_with_a_message(exported):
    root, _ = exported
    assert 'no task' in one_line(run(root, 'device/export.py', '--name='))
    assert "did you mean 'keep_tokens'" in one_line(run(root, 'device/export.py', '--keep_token=9'))
    assert 'keep_tokens is 9' in one_line(run(root, 'device/export.py', '--keep_tokens=9'))
    missing = one_line(run(root, 'device/export.py', '--run=nowhere'))
    assert 'does not exist; run: python train.py config/toy.py --run=nowhere' in missing
    missing = one_line(run(root, 'device/export.py', '--dataset=nowhere'))
    assert 'data/nowhere/input.jsonl does not exist' in missing
    assert 'holds no student; run: python device/export.py' in one_line(run(root, 'device/web.py', '--run=x'))
    assert all(kept for files in PACKAGES.values() for kept in files.values())


def test_a_second_export_of_a_student_is_refused(project):
    with open(project / 'out/toy/export.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert 'another export is writing' in one_line(run(project, 'device/export.py'))
