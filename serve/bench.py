"""How fast is the student over HTTP? Beside its decoder without HTTP, and a server of its teacher.

    python serve/bench.py config/demo.py        # with 1, 8 and 64 clients, 1 and 32 texts per request

Needs the records that extract.py made for the task, and its student. Timings are medians of alternating
rounds. The clients run on the same machine.
"""
import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before torch, see config/machine.py
from config import configure, data_line, stop
from config.machine import pick_device, pick_dtype

import numpy as np
from transformers.utils import logging

from distil.checkpoint import load_checkpoint
from distil.decode import decode, generate
from distil.reader import text_room
from distil.records import open_shards
from distil.teacher import load_model
from tools.baselines import generate_constrained

name = ''            # word; data/<dataset>/<name>-* has the texts
dataset = ''         # word
run = ''             # word; out/<run> is the student; '': out/<name>
teacher = ''         # file; loaded as extract.py does; '': the one the student learned from
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; as in the other programs
config = configure(globals())


async def run_client(host, port, path, bodies, replies):
    """posts over one connection: takes (number, body) from the iterator bodies until it is empty, and stores
    (status, body, seconds) under that number in the dict replies."""
    reader, writer = await asyncio.open_connection(host, port)
    for n, body in bodies:
        began = time.perf_counter()
        writer.write(b'POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s' % (
            path.encode(), host.encode(), len(body), body))
        head = await reader.readuntil(b'\r\n\r\n')
        length = int(head.lower().partition(b'content-length:')[2].split(b'\r\n')[0])
        reply = await reader.readexactly(length)
        replies[n] = int(head.split()[1]), reply, time.perf_counter() - began
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def post_many(url, path, bodies, n_clients):
    """posts bodies (bytes) from n_clients at a time, each of which waits for its reply -> [(status, body,
    seconds)] in their order, and the seconds for all of them."""
    async def go():
        todo, replies = iter(enumerate(bodies)), {}
        address = urlsplit(url)
        async with asyncio.TaskGroup() as group:
            for _ in range(n_clients):
                group.create_task(run_client(address.hostname, address.port, path, todo, replies))
        return [replies[n] for n in range(len(replies))]
    began = time.perf_counter()
    replies = asyncio.run(go())
    return replies, time.perf_counter() - began


@contextlib.contextmanager
def start_server(*args):
    """context: the URL of a serve.py with these arguments, which runs until the context ends."""
    command = [sys.executable, 'serve/serve.py', *args, '--port=0']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith('http'):
                yield line.strip().removesuffix('/v1')
                break
        else:
            raise SystemExit('serve.py did not start')
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def start_teacher_server(answer):
    """context: the URL of the simplest server of the teacher: one request at a time, one generate for each.
    answer: function of a text."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            texts = json.loads(self.rfile.read(int(self.headers['content-length'])))['texts']
            reply = json.dumps({'answers': [answer(text) for text in texts]}).encode()
            self.send_response(200)
            self.send_header('content-length', str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    Handler.protocol_version = 'HTTP/1.1'
    httpd = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


def summarize(replies, seconds, per_request):
    """{answers_s, p50_ms, p99_ms} of replies with per_request texts each; AssertionError if one failed."""
    assert all(status == 200 for status, _, _ in replies), next(r for r in replies if r[0] != 200)
    ms = np.array([latency for _, _, latency in replies]) * 1e3
    return {'answers_s': len(replies) * per_request / seconds, 'p50_ms': float(np.median(ms)),
            'p99_ms': float(np.quantile(ms, 0.99))}


def bench_serve(args, student, space, texts, teacher_answer, n_requests=1500, rounds=3):
    """prints a line for the decoder, for each number of clients and texts per request, and for the teacher:
    medians of alternating rounds. args: of serve.py. texts: strings. teacher_answer: function of a text, or
    None."""
    room = text_room(student, space)
    ids = [space.tokenizer.encode(text, add_special_tokens=False).ids[:room] for text in texts]

    def time_single_texts():
        for text_ids in ids[:100]:
            began = time.perf_counter()
            list(decode(student, space, [text_ids]))
            yield (time.perf_counter() - began) * 1e3
    many, loads = (ids * (1024 // len(ids) + 1))[:1024], [(n, per) for per in (1, 32) for n in (1, 8, 64)]
    serve_rows, decoder_rows = {load: [] for load in loads}, []
    with start_server(*args) as url:
        for _ in range(rounds + 1):  # the first warms up
            began = time.perf_counter()
            generate(student, space, many)
            rate = len(many) / (time.perf_counter() - began)
            decoder_rows.append((rate, *np.quantile(list(time_single_texts()), (0.5, 0.99))))
            for n_clients, per in loads:
                n = max(n_clients * 4, n_requests // (8 if per > 1 else 1) // (5 if n_clients == 1 else 1))
                requests = [[texts[(k * per + j) % len(texts)] for j in range(per)] for k in range(n)]
                bodies = [json.dumps({'texts': of_request}).encode() for of_request in requests]
                replies, seconds = post_many(url, '/v1/label', bodies, n_clients)
                serve_rows[n_clients, per].append(summarize(replies, seconds, per))
    rate, p50, p99 = np.median(decoder_rows[1:], axis=0).tolist()
    print(data_line('bench', {'what': 'decoder', 'answers_s': rate, 'p50_ms': p50, 'p99_ms': p99}))
    for (n_clients, per), rows in serve_rows.items():
        medians = {key: float(np.median([row[key] for row in rows[1:]])) for key in rows[0]}
        print(data_line('bench', {'what': 'serve', 'clients': n_clients, 'texts': per, **medians}))
    if teacher_answer:
        with start_teacher_server(teacher_answer) as url:
            bodies = [json.dumps({'texts': [text]}).encode() for text in texts[:24]]
            post_many(url, '/', bodies[:2], 1)                  # warms up
            print(data_line('bench', {'what': 'generate', 'clients': 1, 'texts': 1,
                                      **summarize(*post_many(url, '/', bodies, 1), 1)}))


if __name__ == '__main__':
    logging.set_verbosity_error()
    if not name or not dataset:
        stop('no task; run: python serve/bench.py config/demo.py')
    shards = open_shards(dataset, name)
    device = pick_device(device)
    checkpoint, student, space = load_checkpoint(Path('out', run or name), device, dtype=dtype)
    task = checkpoint['task']
    model = load_model(teacher or task['teacher'], pick_dtype(dtype, device), device)
    texts = [space.tokenizer.decode(shards.ids(i).tolist()) for i in shards.split()[1][:256]]

    def answer_by_teacher(text):
        ids = space.tokenizer.encode(text, add_special_tokens=False).ids
        return space.to_json(generate_constrained(model, space, task, [ids])[0])
    arguments = [f'--name={name}', f'--run={run}', f'--device={device}', f'--dtype={dtype}']
    bench_serve(arguments, student, space, texts, answer_by_teacher)
