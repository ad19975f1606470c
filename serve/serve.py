r"""Serve the student in place of an LLM: change the base URL, keep the code.

    python serve/serve.py config/demo.py --port=8000
    curl localhost:8000/v1/label -d '{"texts": ["thank you so much!"]}'
    python serve/serve.py config/demo.py --min_confidence=0.6 --upstream=http://localhost:9000/v1 \
        --upstream_model=x

    POST /v1/chat/completions    as OpenAI's; the last user message is the text, or the prompt around a text
    POST /v1/decisions, /v1/systemone    typed questions, answered with the probabilities of all values
    POST /v1/label               {"texts": [...]} -> {"answers": [...]}, many at once
    GET  /v1/models  /health  /ready  /metrics

Needs only out/<name>/, as sample.py does, and: pip install -r requirements-serve.txt. It answers the
questions that its student was trained on and refuses all others. Texts that the student is unsure of go to
the LLM at `upstream`. More: docs/serve.md
"""
import logging
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, stop
from distil.checkpoint import warn_changed_task
from sample import Labeler

try:
    import httpx
    import uvicorn

    from serve.app import make_app
    from serve.service import Service, Upstream
except ImportError as error:
    sys.exit(f'serve.py needs {error.name}; run: pip install -r requirements-serve.txt')

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use
host = '127.0.0.1'   # this machine only; 0.0.0.0: all network interfaces
port = 8000          # 0..65535; 0: a free one
api_key = ''         # callers must send it (Authorization: Bearer ...); '': SERVE_API_KEY of the environment
max_waiting = 4096   # 1..; texts under way at a time; above that, callers get 503 and try again later
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
too_long = 'cut'     # 'cut' or 'refuse'; what happens to texts longer than the student reads
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of a large student's layers, as in sample.py
# how typed questions are matched to fields
true_value = {}      # {'toxicity': 'toxic'}: the value that means yes, of a field with two values
ordered = []         # names of fields whose values are a scale, lowest first; integers always are
# deferral
min_confidence = 0.0  # 0..1 or 'target'; a record with a field below it goes upstream (see sample.py)
upstream = ''        # base URL of an OpenAI-compatible LLM; its key: the environment's UPSTREAM_API_KEY
upstream_model = ''  # its model name there
upstream_timeout = 20.0  # 0..; seconds
audit = 0.0          # 0..1; share of all texts that upstream answers too, to measure the agreement
audit_min = 0.0      # 0..1; if a field's agreement is below it (95 % interval), everything goes upstream
keep = False         # append upstream's answers to served.jsonl, for extract.py --score; else no text is kept
dataset = ''         # word; that file is data/<dataset>/served.jsonl
# of the config file, to warn if the student was trained with others
fields = {}
prompt = ''          # text or messages
config = configure(globals())


def run_server(app, host, port):
    """serves an ASGI application until SIGTERM or Ctrl-C; requests under way are then finished, for at most
    30 s. Exits with a message if it cannot listen at host:port."""
    listener = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        stop(f'cannot listen at {host}:{port}: {error.strerror}; another --port?')
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning', access_log=False,
                                           timeout_graceful_shutdown=30))
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn replaces these while it runs, and raises the signal again once it has stopped
        signal.signal(number, lambda *_: setattr(server, 'should_exit', True))
    print(f'http://{host}:{listener.getsockname()[1]}/v1', flush=True)
    server.run(sockets=[listener])


if __name__ == '__main__':
    if not name and not run:
        stop('no task; run: python serve/serve.py config/demo.py')
    if (audit or audit_min) and not upstream:
        stop('an audit needs an upstream to compare with')
    if audit_min and not audit:
        stop('audit_min needs an audit: the share of texts that upstream answers too')
    if keep and not (dataset and upstream):
        stop('keep needs an upstream, whose answers are kept, and a dataset, the folder they go to')
    if upstream and not (upstream_model and (min_confidence or audit)):
        stop('upstream needs upstream_model, and min_confidence or audit: otherwise it is never used')
    labeler = Labeler(Path('out', run or name), device, which, sample_batch, True, too_long,
                      min_confidence=min_confidence, dtype=dtype)
    warn_changed_task(labeler.task, fields, prompt)
    student_fields = labeler.space.fields
    for field, value in true_value.items():
        if len(student_fields.get(field, [])) != 2 or value not in student_fields[field]:
            stop(f'true_value: there is no field {field!r} with two values, one of them {value!r}')
    for field in ordered:
        if field not in student_fields:
            stop(f'ordered: there is no field {field!r}; there are: {", ".join(student_fields)}')
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    logging.getLogger('httpx').setLevel(logging.WARNING)
    kept_file = llm = None
    if keep:
        kept_file = Path('data', dataset, 'served.jsonl')
        kept_file.parent.mkdir(parents=True, exist_ok=True)
    if upstream:
        try:
            llm = Upstream(upstream, upstream_model, upstream_timeout, labeler.space, labeler.task['prompt'])
        except (httpx.InvalidURL, ValueError) as error:
            stop(f'upstream: {error}')
    service = Service(labeler, run or name, max_waiting, llm, audit, audit_min, kept_file)
    created = int(Path('out', run or name).stat().st_mtime)
    api_key = api_key or os.environ.get('SERVE_API_KEY', '')
    run_server(make_app(service, created, api_key, true_value, ordered), host, port)
