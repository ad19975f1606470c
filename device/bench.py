"""Measures the tables of docs/device.md: what trimming costs, and how fast the exported student is.

    python device/bench.py config/demo.py --what=tokens    # agreement and bytes by the number of tokens kept
    python device/bench.py config/demo.py --check=FILE     # the same on texts from elsewhere
    python device/bench.py config/demo.py --what=speed     # torch, ONNX in Python, Node, Chromium, in one run

The last command needs out/<name>/device with its npm/ (device/export.py, device/web.py --serve=False). It
skips Node and Chromium if they are not installed. Figures are medians over rounds in which the runners take
turns.
"""
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, stop

import numpy as np

from device.export import read_check, read_corpus, shrink_student, write_onnx
from device.run import Student
from device.web import Handler
from distil.checkpoint import load_checkpoint
from distil.records import load_records
from distil.split import split_of
from distil.labeler import Labeler

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
dataset = ''         # word; data/<dataset> has the texts
what = 'tokens'      # 'tokens' or 'speed'; see above
texts = 1000         # 1..; held-out texts per round of 'speed'
rounds = 5           # 1..; of sample.py and run.py
check = ''           # file; texts to measure 'tokens' on, one per line or a .jsonl; empty: held-out ones
config = configure(globals())

SIZES = 16384, 32768, 40960, 65536, 98304, 0
IN_JAVASCRIPT = '''async (url, texts) => {
    const { Student } = await import(url + 'student.js');
    const began = performance.now();
    const student = await Student.load(url);
    const load_ms = performance.now() - began;
    await student.label(texts.slice(0, 200), {});
    const clock = async (work) => {
        const began = performance.now();
        await work();
        return performance.now() - began;
    };
    const median = (x) => x.sort((a, b) => a - b)[Math.floor(x.length / 2)];
    const all = [], one = [];
    for (let n = 0; n < 3; n++) all.push(await clock(() => student.label(texts, {})));
    for (const text of texts.slice(0, 200)) {
        one.push(await clock(() => student.label([text], { confidence: 'full' })));
    }
    return { rec_s: texts.length / median(all) * 1000, one_ms: median(one), load_ms };
}'''


def clock(work):
    """seconds that work() takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bench_python(runners, texts, rounds):
    """runners {name: function of texts}, which take turns -> {name: (texts per second, milliseconds for one
    text)}."""
    many, one = {runner: [] for runner in runners}, {runner: [] for runner in runners}
    for label in runners.values():
        label(texts[:200])
    for n in range(rounds):
        for runner, label in runners.items():
            many[runner].append(clock(lambda: label(texts)))
            one[runner] += [clock(lambda: label([text])) for text in texts[n::max(1, len(texts) // 40)]]
    return {runner: (len(texts) / np.median(many[runner]), 1e3 * np.median(one[runner]))
            for runner in runners}


def bench_node(folder, texts):
    """{figure: value} in Node; None if Node is not installed."""
    if not shutil.which('node'):
        return None
    arguments = f'{json.dumps(folder.as_uri() + "/")}, {json.dumps(texts)}'
    done = subprocess.run(['node', '--input-type=module'], capture_output=True, text=True, check=True,
                          input=f'console.log(JSON.stringify(await ({IN_JAVASCRIPT})({arguments})))')
    return json.loads(done.stdout)


def bench_chromium(folder, texts):
    """{figure: value} in Chromium, also usable_s: seconds until the page can be used; None if Chromium or
    playwright is not installed."""
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium or importlib.util.find_spec('playwright') is None:
        return None
    from playwright.sync_api import sync_playwright
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/'
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu'])
        usable_s = []
        for _ in range(3):  # each with an empty cache
            page = browser.new_context().new_page()
            began = time.perf_counter()
            page.goto(url)
            page.wait_for_selector('#text:enabled')
            usable_s.append(time.perf_counter() - began)
        figures = page.evaluate(f'([url, texts]) => ({IN_JAVASCRIPT})(url, texts)', [url, texts])
        browser.close()
    server.shutdown()
    return figures | {'usable_s': float(np.median(usable_s))}


if __name__ == '__main__':
    if not name and not run:
        stop('no task; run: python device/bench.py config/demo.py --what=tokens')
    out = Path('out', run or name).resolve()
    checkpoint, student, space = load_checkpoint(out, 'cpu')
    max_text = checkpoint['task']['max_text']
    seen, checked = read_corpus(Path('data', dataset, 'input.jsonl'), 200_000, split_of(checkpoint))
    if what == 'tokens':
        checked = read_check(check, seen, 2000) if check else checked[:2000]
        shards = load_records(dataset, name, checkpoint)
        for n in SIZES:
            if 0 < n >= student.config.vocab_size:
                continue
            small, small_space, figures = shrink_student(
                student, space, seen, checked, slice(max_text), n, True, shards)
            with tempfile.TemporaryDirectory() as folder:
                write_onnx(small, Path(folder, 'student.onnx'))
                small_space.tokenizer.save(f'{folder}/tokenizer.json', pretty=False)
                size = sum(file.stat().st_size for file in Path(folder).iterdir())
            figures = {'tokens': small.config.vocab_size, **figures, 'bytes': size}
            print(data_line('size', figures), flush=True)
    else:
        folder, checked = out / 'device', checked[:texts]
        if not (folder / 'npm').is_dir():
            stop(f'{folder}/npm does not exist; run device/export.py and device/web.py --serve=False first')
        with tempfile.TemporaryDirectory() as float32:
            shutil.copy(folder / 'tokenizer.json', float32)
            n = len(json.loads((folder / 'tokenizer.json').read_text(encoding='utf-8'))['model']['vocab'])
            small, _, _ = shrink_student(student, space, seen, [], slice(max_text), n, False)
            graphs = write_onnx(small, Path(float32, 'student.onnx'))
            sizes = {file: Path(float32, file).stat().st_size for file in graphs}
            task = json.loads((folder / 'task.json').read_text(encoding='utf-8')) | {'bytes': sizes}
            Path(float32, 'task.json').write_text(json.dumps(task))
            runners = {'sample.py': Labeler(out, 'cpu', confidence=False), 'run.py_int8': Student(folder),
                       'run.py_float32': Student(float32)}
            for runner, (rec_s, ms) in bench_python(runners, checked, rounds).items():
                print(data_line('speed', {'who': runner, 'rec_s': rec_s, 'one_ms': ms}), flush=True)
        for runner, bench in (('node', bench_node), ('chromium', bench_chromium)):
            if figures := bench(folder, checked):
                print(data_line('speed', {'who': runner, **figures}), flush=True)
