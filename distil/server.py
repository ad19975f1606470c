"""A teacher behind a URL: asks an OpenAI-compatible server about many texts at once.

    server = Server(['http://localhost:8000/v1'], 'qwen', fields, prompt)
    for group in server.answered(groups, decode):    # [(hash, ids, label)], as the answers come
        ...

The labels are those of distil/labels.py: probabilities if the server tells log probabilities, else the
shares of some samples, or one bare answer. The key is read from the environment, TEACHER_API_KEY, and
never written anywhere.
"""
import asyncio
import json
import os
import queue
import random
import threading
import time
from collections import Counter

from config import data_line, stop
from config.machine import WORLD
from data.logs import read_reply
from distil.answers import label_from_answer, label_from_samples
from distil.prompts import answer_format, prompt_messages

try:
    import httpx
except ImportError:                                         # extract.py says so
    httpx = None

URL = 'http://', 'https://'
WAITING = 4096  # answers that wait to be stored, before no more texts are asked about


class Stopped(Exception):
    """the run cannot or shall not go on; the message says why."""


class Server:
    """urls: base URLs, such as http://host:8000/v1, that share the work. model: its name there. fields:
    the schema. prompt: a text or messages, with {text} in it. in_flight: requests at a time. samples:
    answers per text, if the server tells no log probabilities, drawn at sample_temperature. patience:
    seconds without any answer after which the run ends. prices are per million tokens; max_cost: the run
    ends before it costs more, 0: never.
    """

    def __init__(self, urls, model, fields, prompt, in_flight=16, samples=1, sample_temperature=1.0,
                 timeout=120, patience=300, price_in=0.0, price_out=0.0, max_cost=0.0):
        self.urls, self.model, self.fields, self.prompt = [url.rstrip('/') for url in urls], model, fields, prompt
        self.in_flight, self.samples, self.sample_temperature = in_flight, samples, sample_temperature
        self.timeout, self.patience, self.max_cost = timeout, patience, max_cost
        self.prices = price_in, price_out
        self.busy, self.resting = Counter(), {}             # per URL: requests under way, not before this time
        # what makes answers better and a server may refuse: the alternatives in order, at last to do without
        self.options = {'response_format': [answer_format(fields), {'type': 'json_object'}, None],
                        'logprobs': [True, None], 'temperature': [0, None]}
        self.used, self.n_answered, self.n_invalid, self.outside = Counter(), 0, 0, 0.0
        self.problem, self.under_way = 'it never answered', 0
        self.last_answer = time.monotonic()
        self.stopping = threading.Event()
        self.identity = model                               # of the task: a URL may change

    # one request

    def body(self, text, sampled):
        """the JSON of a request."""
        body = {'model': self.model, 'messages': prompt_messages(self.prompt, text)}
        body |= {option: left[0] for option, left in self.options.items() if left[0] is not None}
        if sampled:
            body.pop('logprobs', None)
            body['temperature'] = self.sample_temperature
        return body | ({'top_logprobs': 20} if 'logprobs' in body else {})

    def do_without(self, message):
        """after a refusal: gives up the option that the server's message names, else the first that is
        left. False if there is none."""
        words = {'response_format': ('format', 'schema', 'json', 'grammar'), 'logprobs': ('logprob',),
                 'temperature': ('temperature',)}
        able = [option for option, left in self.options.items() if left[0] is not None]
        named = [option for option in able if any(word in message.lower() for word in words[option])]
        for option in (named or able)[:1]:
            given_up = self.options[option].pop(0)
            print(f'the server refuses {given_up["type"] if isinstance(given_up, dict) else option}, which is left out '
                  f'({message})')
        return bool(able)

    async def post(self, client, body):
        """(status, the server's reply as a dict, or its message) of a request, which is repeated until a
        server has read it. Stopped if none can be used."""
        for tries in range(10 ** 9):
            now = time.monotonic()
            if now - self.last_answer > self.patience:
                raise Stopped(f'no answer for {self.patience:g} seconds: {self.problem}')
            wait_for = lambda url: max(0.0, self.resting.get(url, 0.0) - now)
            url = min(self.urls, key=lambda url: (wait_for(url), self.busy[url]))
            await asyncio.sleep(wait_for(url))
            wait = min(60, 0.5 * 2 ** min(tries, 7)) * random.uniform(0.5, 1)
            self.busy[url] += 1
            try:
                reply = await client.post(f'{url}/chat/completions', json=body)
                if reply.status_code == 200:
                    content = reply.json()
                    self.last_answer = time.monotonic()
                    return 200, content
                message = error_message(reply)
                if reply.status_code in (400, 413, 422):
                    return reply.status_code, message
                self.problem = f'{url} says {reply.status_code} {message}'
                if reply.status_code in (401, 403, 404, 405):
                    raise Stopped(self.problem)
                asked = reply.headers.get('retry-after', '')
                wait = max(wait, min(600, int(asked)) if asked.isdigit() else 0)
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # cut, slow, gone; or not JSON
                self.problem = f'{url}: {error or type(error).__name__}'
            finally:
                self.busy[url] -= 1
            self.resting[url] = time.monotonic() + wait

    async def complete(self, client, text, sampled=False):
        """(content, tokens as in value_probabilities) of an answer to a text, or None if the server
        refuses it."""
        while True:
            options = json.dumps(self.options)
            status, reply = await self.post(client, self.body(text, sampled))
            if status == 200:
                break
            if self.n_answered:
                return None                                 # it has answered others: this text is the reason
            if options == json.dumps(self.options) and not self.do_without(reply):
                raise Stopped(f'the server refuses every request: {reply}')
        try:
            usage = reply.get('usage') or {}
            self.used.update({key: int(usage.get(key) or 0) for key in ('prompt_tokens', 'completion_tokens')})
            return read_reply(reply)
        except (TypeError, AttributeError, ValueError):
            return '', []                                   # nonsense, which breaks the schema

    async def label(self, client, text):
        """the label of a text, or the reason why it has none."""
        for _ in range(2):                                  # an answer that breaks the schema is asked for once more
            if not (answer := await self.complete(client, text)):
                return 'refused'
            label, outside = label_from_answer(self.fields, *answer)
            if label and 'answer' in label and self.samples > 1:  # no log probabilities
                more = [await self.complete(client, text, True) for _ in range(self.samples)]
                label = label_from_samples(self.fields, [content for content, _ in filter(None, more)]) or label
            if label:
                self.n_answered += 1
                self.outside += outside
                return label
        self.n_invalid += 1
        if self.n_invalid == 20 and not self.n_answered:
            raise Stopped(f'of 20 texts none has an answer that fits the schema; the last one: {answer[0][:200]!r}')
        return 'invalid'

    # -----------------------------------------------------------------------------
    # many requests

    def cost(self):
        """what the tokens so far cost."""
        return sum(price * self.used[key] / 1e6
                   for price, key in zip(self.prices, ('prompt_tokens', 'completion_tokens')))

    def cost_of(self, n_texts):
        """what so many texts will cost, by those answered so far."""
        return self.cost() / max(1, self.n_answered) * n_texts

    def summary(self):
        """the line at the end. outside: the mean, over answers, of the share of probability that no value
        has, in the field where it is largest."""
        return data_line('server', {
            'answered': self.n_answered, 'tokens_in': self.used['prompt_tokens'],
            'tokens_out': self.used['completion_tokens'], 'cost': float(self.cost()),
            'outside': self.outside / max(1, self.n_answered)})

    async def work(self, texts, results):
        """asks about all texts, in_flight at a time, and puts (hash, ids, label) into results."""
        key = os.environ.get('TEACHER_API_KEY', '')
        headers = {'Authorization': f'Bearer {key}'} if key else {}
        certificates = httpx.create_ssl_context()           # slow to make, so shared

        async def worker():
            # a client of its own, for one connection: a request through one with 16 connections costs 2.6
            # times as much computing (httpx 0.28)
            async with httpx.AsyncClient(headers=headers, timeout=self.timeout, verify=certificates) as client:
                for hash_, ids, text in texts:              # shared: each worker takes the next one
                    while results.qsize() > WAITING and not self.stopping.is_set():  # the disk is slower
                        await asyncio.sleep(0.05)
                    if self.stopping.is_set():
                        return
                    if self.max_cost and self.cost_of(self.n_answered + self.under_way + 1) > self.max_cost:
                        raise Stopped(f'one more text would exceed max_cost = {self.max_cost:g}')
                    self.under_way += 1
                    results.put((hash_, ids, await self.label(client, text)))
                    self.under_way -= 1
        tasks = [asyncio.create_task(worker()) for _ in range(self.in_flight)]
        done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if left:                                            # what is under way has been paid for
            self.stopping.set()
            done |= (await asyncio.wait(left, timeout=self.timeout))[0]
        for task in left:
            task.cancel()
        if errors := [task.exception() for task in done if task.exception()]:
            raise errors[0]

    def answered(self, groups, decode, most=128):
        """yields lists of (hash, ids, label or reason) as answers come. groups: of data.texts.read_groups;
        decode: ids -> text. What stops the work is raised after the answers before it."""
        texts = ((hash_, ids, decode(list(map(int, ids)))) for group in groups for hash_, ids, _ in group)
        results, end = queue.Queue(), []
        self.stopping.clear()
        self.last_answer = time.monotonic()

        def run():
            try:
                asyncio.run(self.work(texts, results))
            except BaseException as error:
                end.append(error)
            results.put(None)
        threading.Thread(target=run, daemon=True).start()
        try:
            group = []
            while (result := results.get()) is not None:
                group.append(result)
                if results.empty() or len(group) == most:
                    yield group
                    group = []
            if group:
                yield group
        finally:
            self.stopping.set()
        if end:
            raise end[0]


def check_httpx():
    """exits with a message if httpx is missing."""
    if httpx is None:
        stop('a teacher behind a URL needs one more package; run: pip install httpx')


def open_server(config):
    """the Server of extract.py's settings. Exits with a message if they do not fit together."""
    check_httpx()
    if not config['teacher_model']:
        stop('teacher_model is missing: the name of the model on that server')
    for name in ('score', 'labels'):
        if config[name]:
            stop(f'{name} needs a teacher that runs here, not a URL; set --{name}=')
    if WORLD > 1:
        stop('a server is asked by one process; raise in_flight instead')
    names = ('in_flight', 'samples', 'sample_temperature', 'patience', 'price_in', 'price_out', 'max_cost')
    if config['max_cost'] and not (config['price_in'] or config['price_out']):
        stop('max_cost needs price_in and price_out, per million tokens')
    return Server(config['teacher'].split(','), config['teacher_model'], config['fields'], config['prompt'],
                  **{name: config[name] for name in names})


def error_message(reply):
    """the message in the reply of a server that refuses, in one line."""
    try:
        error = reply.json()['error']
        message = error['message'] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        message = reply.text
    return ' '.join(str(message).split())[:200]
