r"""Serve the student in place of an LLM: change the base URL, keep the code.

    python serve/serve.py config/demo.py --port=8000
    curl localhost:8000/v1/label -d '{"texts": ["thank you so much!"]}'
    python serve/serve.py config/demo.py --min_confidence=0.6 --upstream=http://localhost:9000/v1 \
        --upstream_model=x
    python serve/serve.py config/demo.py config/router.py     # two students; the caller's `model` is the name
    python serve/serve.py config/demo.py --learn_templates=requests.jsonl

    POST /v1/chat/completions, /v1/responses, /v1/completions    as OpenAI's; the user message is the text, or
                                 one of the templates around a text
    POST /v1/decisions, /v1/systemone    typed questions, answered with the probabilities of all values
    POST /v1/extraction          typed fields, answered with copied values and their places in the text
    POST /v1/label               {"texts": [...]} -> {"answers": [...]}, many at once
    POST /v1/files, /v1/batches  as OpenAI's
    GET  /v1/models  /health  /ready  /metrics

Needs only out/<name>/, as sample.py does, and: pip install -r requirements-serve.txt. It answers the
questions that its student was trained on and refuses all others. With `upstream` these go on to an LLM,
unchanged, and so do texts that the student is unsure of. More: docs/serve.md
"""
import json
import logging
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, read_settings, split_tasks, stop
from config.machine import end_at_once, on_stop
from distil.checkpoint import warn_changed_task
from distil.keys import Formatter, check_key, read_key
from distil.prompts import prompt_text
from distil.labeler import Labeler

try:
    import httpx
    import uvicorn

    from serve.app import make_app
    from serve.learn import print_templates
    from serve.metrics import Metrics
    from serve.prompts import Prompts
    from serve.proxy import Proxy, shorten
    from serve.service import Service
    from serve.students import ServedStudent
    from serve.upstream import Upstream
except ImportError as error:
    sys.exit(f'serve.py needs {error.name}; run: pip install -r requirements-serve.txt')

if __name__ == '__main__':  # each config file that names a task is a student; the first one's settings:
    sys.argv[1:], *others = split_tasks(sys.argv[1:])

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use
host = '127.0.0.1'   # this machine only; 0.0.0.0: all network interfaces
port = 8000          # 0..65535; 0: a free one
api_key = ''         # callers must send it (Authorization: Bearer ...); '': SERVE_API_KEY of the environment
max_waiting = 4096   # 1..; texts under way at a time; above that, callers get 503 and try again later
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
too_long = 'auto'    # 'auto', 'cut' or 'refuse'; what happens to texts longer than the student reads. auto:
                     # refused, but cut at /v1/label and /v1/systemone, which have no prompts
cors = ''            # text; origins of the web pages that may call it, separated by commas, or *; '': none
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; of a large student's layers, as in sample.py
# where the text is
templates = []       # prompts around a text, with {text} in its place (the last one counts); the training
                     # prompt is one already
template = ''        # text; one more; '{text}': whatever a message is, it is a text
turns = 'refuse'     # 'refuse', 'first' or 'last'; which of several user messages without a template counts
learn_templates = ''  # file; prints the templates of logged requests, a JSON body a line, and ends
# how typed questions are matched to fields
true_value = {}      # {'toxicity': 'toxic'}: the value that means yes, of a field with two values
ordered = []         # names of fields whose values are a scale, lowest first; integers always are
# what a caller's schema requires and the student does not answer
fill = {}            # {'reason': ''}: the value of such a property
# deferral
min_confidence = 0.0  # 0..1 or 'target'; a record with a field below it goes upstream (see sample.py)
upstream = ''        # base URL of an OpenAI-compatible LLM, which gets what the student refuses, too;
                     # its key: the environment's UPSTREAM_API_KEY
upstream_model = ''  # its model name there
upstream_timeout = 20.0  # 0..; seconds
audit = 0.0          # 0..1; share of all texts that upstream answers too, to measure the agreement
audit_min = 0.0      # 0..1; if a field's agreement is below it (95 % interval), everything goes upstream
keep = False         # append upstream's answers to served.jsonl, for extract.py --score, and refused requests
                     # with a schema to passed_on/, for data/prepare.py; else no text is kept
dataset = ''         # word; these are in data/<dataset>/
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
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level='warning', access_log=False,
                                           timeout_graceful_shutdown=30))
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn replaces these while it runs, and raises the signal again once it has stopped
        signal.signal(number, lambda *_: setattr(server, 'should_exit', True))
    print(f'http://{host}:{listener.getsockname()[1]}/v1', flush=True)
    server.run(sockets=[listener])


def load_student(task, metrics, among_others):
    """the ServedStudent of a task, ready to answer. task: its settings, a dict; among_others: see ServedStudent. Exits
    with a message if the settings do not fit."""
    folder = Path('out', task['run'] or task['name'])
    labeler = Labeler(folder, task['device'], task['which'], task['sample_batch'], True, 'cut',
                      min_confidence=task['min_confidence'], dtype=task['dtype'])
    warn_changed_task(labeler.task, task['fields'], task['prompt'])
    schema, prompt = labeler.space.schema, labeler.task['prompt']
    pairs = {leaf.path: leaf.values for leaf in schema.leaves if len(leaf) == 2 and not leaf.is_list}
    for path, value in task['true_value'].items():
        if value not in pairs.get(path, []):
            stop(f'true_value: there is no field {path!r} with two values, one of them {value!r}')
    try:
        list(map(schema.leaf, task['ordered']))
    except ValueError as error:
        stop(f'ordered: {error}')
    try:
        json.dumps(task['fill'], allow_nan=False)
    except (TypeError, ValueError) as error:
        stop(f'fill: its values must be JSON: {error}')
    templates = [*task['templates'], *filter(None, [task['template']])]
    for template in templates:
        if not isinstance(template, str) or '{text}' not in template:
            stop(f'templates: {template!r} must be a text with {{text}} in it')
    kept_file = llm = None
    if task['keep']:
        kept_file = Path('data', task['dataset'], 'served.jsonl')
        try:
            kept_file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            stop(f'keep: cannot make {kept_file.parent}: {error.strerror}')
    if task['upstream'] and task['upstream_model']:
        llm = Upstream(task['upstream'], task['upstream_model'], task['upstream_timeout'], labeler.space,
                       prompt)
    service = Service(labeler, folder.name, task['max_waiting'], llm, task['audit'], task['audit_min'],
                      kept_file, metrics)
    prompts = Prompts([prompt_text(prompt), *templates], task['turns'])
    return ServedStudent(service, prompts, task['true_value'], tuple(task['ordered']), task['too_long'],
                         int(folder.stat().st_mtime), among_others, task['fill'])


if __name__ == '__main__':
    if learn_templates:
        sys.exit(print_templates(learn_templates))
    if not name and not run:
        stop('no task; run: python serve/serve.py config/demo.py')
    if (audit or audit_min) and not upstream:
        stop('an audit needs an upstream to compare with')
    if audit_min and not audit:
        stop('audit_min needs an audit: the share of texts that upstream answers too')
    if upstream and (min_confidence or audit) and not upstream_model:
        stop('upstream needs upstream_model, the model that gets the texts of min_confidence and audit')
    tasks = [config, *(read_settings(__file__, args) for args in others)]
    names = [task['run'] or task['name'] for task in tasks]
    if twice := {one for one in names if names.count(one) > 1}:
        stop(f'two students are called {twice.pop()}; a model has one name')
    if upstream and not upstream.startswith(('http://', 'https://')):
        stop(f'upstream = {upstream} is no URL: it starts with http:// or https://')
    if keep and not (upstream and all(task['dataset'] for task in tasks)):
        stop('keep needs an upstream, whose answers are kept, and a dataset, the folder they go to')
    on_stop(end_at_once)                                        # until it listens there is nothing to finish
    logging.basicConfig(level=logging.INFO)
    logging.getLogger().handlers[0].setFormatter(Formatter('%(asctime)s %(message)s'))
    logging.getLogger().handlers[0].addFilter(shorten)
    logging.getLogger('httpx').setLevel(logging.WARNING)
    metrics, proxy = Metrics(), None
    api_key = check_key(api_key, 'api_key') or read_key('SERVE_API_KEY')
    try:
        students = [load_student(task, metrics, bool(upstream)) for task in tasks]
        if upstream:
            kept_folder = Path('data', dataset, 'passed_on') if keep else None
            proxy = Proxy(upstream, upstream_timeout, metrics, api_key, kept_folder, students[0].prompts)
    except (httpx.InvalidURL, ValueError) as error:
        stop(f'upstream: {error}')
    if proxy and proxy.key and not api_key and host not in ('127.0.0.1', 'localhost', '::1'):
        stop('whoever reaches this server could use UPSTREAM_API_KEY; set SERVE_API_KEY')
    origins = [origin.strip() for origin in cors.split(',') if origin.strip()]
    run_server(make_app(students, metrics, api_key, proxy, Path('out', names[0], 'batches'), origins), host,
               port)
