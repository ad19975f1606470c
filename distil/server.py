"""A teacher behind a URL: asks an OpenAI-compatible server about many texts at once.

    server = Server(['http://localhost:8000/v1'], 'qwen', schema, prompt)
    for group in server.answered(groups, decode):    # [(hash, ids, label)], as the answers come
        ...

The labels are those of distil/labels.py: probabilities if the server tells log probabilities, else the
shares of some samples, or one bare answer. The key is read from the environment, TEACHER_API_KEY, and
never written anywhere.

What a server refuses may be the text, or an option of the request. An option is given up only if the message names
it, or if a harmless text (PROBE) is refused too; else the text has no answer, and the others are not touched.
"""
import asyncio
import json
import queue
import random
import threading
import time
from collections import Counter
from itertools import count

from config import data_line, stop
from config.machine import WORLD
from data.calls import read_reply
from distil.answers import label_from_answer, label_from_samples
from distil.keys import failure_text, hide_keys, hide_password, read_key
from distil.prompts import answer_format, offer, prompt_messages
from distil.replies import explain_invalid, find_refusal, judge_reply
from distil.schema import Schema

try:
    import httpx
except ImportError:                                         # extract.py says so
    httpx = None

URL = 'http://', 'https://'
WAITING = 4096  # answers that wait to be stored, before no more texts are asked about
PROBE = 'hello'  # a text that nobody refuses
IN_A_ROW = 20   # so many texts without an answer, one after the other, are no longer the fault of the texts
TRIES = 8       # so often a text may fail while others are answered
QUIET = 5       # seconds without an answer, after which a line says what is waited for
NAMES = {'response_format': ('response_format', 'response format', 'schema', 'json', 'grammar'),
         'logprobs': ('logprob',), 'temperature': ('temperature',)}  # of the options, in a server's message


class Stopped(Exception):
    """the run cannot or shall not go on; the message says why."""


def read_answer(reply):
    """(content, tokens) of a reply, as read_reply; ('', []) of nonsense, which breaks the schema."""
    try:
        return read_reply(reply)
    except (TypeError, AttributeError, ValueError):
        return '', []


class Server:
    """urls: base URLs, such as http://host:8000/v1, that share the work. model: its name there. schema: a Schema.
    prompt: a text or messages, with {text} in it. in_flight: requests at a time. samples: answers per text, if the
    server tells no log probabilities, drawn at sample_temperature. patience:
    seconds without any answer after which the run ends. prices are per million tokens; max_cost: the run
    ends before it costs more, 0: never. show: function of a line, what becomes of it.
    """

    def __init__(self, urls, model, schema, prompt, in_flight=16, samples=1, sample_temperature=1.0,
                 timeout=120, patience=300, price_in=0.0, price_out=0.0, max_cost=0.0, show=print):
        self.urls, self.model, self.schema, self.prompt = [url.rstrip('/') for url in urls], model, schema, prompt
        self.has_options = any(part.is_option for part in schema.copied)
        self.in_flight, self.samples, self.sample_temperature = in_flight, samples, sample_temperature
        self.timeout, self.patience, self.max_cost = timeout, patience, max_cost
        self.prices = price_in, price_out
        self.busy, self.resting = Counter(), {}             # per URL: requests under way, not before this time
        # what makes answers better and a server may refuse: the alternatives in order, at last to do without
        self.options = {'response_format': [answer_format(schema), {'type': 'json_object'}, None],
                        'logprobs': [True, None], 'temperature': [0, None]}
        self.key, self.show = read_key('TEACHER_API_KEY') if urls else '', show
        for url in urls:
            hide_password(url)
        self.used, self.n_answered, self.n_invalid, self.outside = Counter(), 0, 0, 0.0
        self.problem, self.under_way = 'it never answered', 0
        self.last_answer, self.n_replies, self.is_quiet = time.monotonic(), 0, False
        self.accepted = ''                                  # the options of a request that was answered, as JSON
        self.n_refused, self.dropped, self.shown = 0, Counter(), set()  # n_refused: since the last answer
        self.stopping, self.adapting = threading.Event(), None  # adapting: an asyncio.Lock
        self.identity = model                               # of the task: a URL may change

    # one request

    def body(self, text, sampled):
        """the JSON of a request."""
        body = {'model': self.model, 'messages': prompt_messages(self.prompt, text)}
        body |= {option: left[0] for option, left in self.options.items() if left[0] is not None}
        if sampled:
            body.pop('logprobs', None)
            body['temperature'] = self.sample_temperature
        if self.has_options and 'response_format' in body:
            body['response_format'] = offer(body['response_format'], text)
        return body | ({'top_logprobs': 20} if 'logprobs' in body else {})

    def do_without(self, message, named_only=False):
        """gives up the option that a server's message names, else, unless named_only, the first that is left. False if
        there is none."""
        able = [option for option, left in self.options.items() if left[0] is not None]
        named = [option for option in able if any(word in message.lower() for word in NAMES[option])]
        chosen = (named or able * (not named_only))[:1]
        for option in chosen:
            given_up = self.options[option].pop(0)
            name = given_up['type'] if isinstance(given_up, dict) else option
            self.show(f'the server refuses {name}, which is left out ({message})')
        return bool(chosen)

    async def post(self, client, body):
        """(kind, value) of the reply to a request, see judge_reply: 'answer', 'text', 'refused' or 'denied'. The
        request is repeated until a server has read it; 'failed' if that does not help this one, while others are
        answered. Stopped if no server can be used."""
        n_failed, n_replies = 0, self.n_replies
        for tries in count():
            now = time.monotonic()
            if now - self.last_answer > self.patience:
                raise Stopped(f'no answer for {self.patience:g} seconds: {self.problem}')
            wait_for = lambda url: max(0.0, self.resting.get(url, 0.0) - now)
            url = min(self.urls, key=lambda url: (wait_for(url), self.busy[url]))
            await asyncio.sleep(wait_for(url))
            wait, asked = min(60, 0.5 * 2 ** min(tries, 7)) * random.uniform(0.5, 1), ''
            self.busy[url] += 1
            try:
                reply = await client.post(f'{url}/chat/completions', json=body)
                kind, value = judge_reply(reply)
                asked = reply.headers.get('retry-after', '')
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
                kind, value = 'stop', failure_text(error)   # no other try is better
            except (httpx.HTTPError, ValueError) as error:  # cut, slow, gone; or not JSON
                kind, value = 'failed', failure_text(error)
            finally:
                self.busy[url] -= 1
            if kind == 'answer':
                self.last_answer, self.is_quiet = time.monotonic(), False
                self.n_replies += 1
            if kind not in ('busy', 'failed', 'stop'):
                return kind, value
            self.problem = hide_keys(f'{url} {value}')
            if kind == 'stop':
                raise Stopped(self.problem)
            n_failed += kind == 'failed'
            if n_failed >= TRIES and self.n_replies - n_replies >= TRIES:
                return 'failed', self.problem
            self.tell_quiet()
            wait = max(wait, min(600, int(asked)) if asked.isdigit() else 0)
            self.resting[url] = time.monotonic() + wait

    def tell_quiet(self):
        """prints what the server says, if it has not answered for some seconds; once, until it does."""
        quiet = time.monotonic() - self.last_answer
        if quiet > QUIET and not self.is_quiet:
            self.is_quiet = True
            self.show(f'no answer for {quiet:.0f} seconds, the run ends after {self.patience:g}; it asks again: '
                      f'{self.problem}')

    async def complete(self, client, text, sampled=False):
        """the JSON of the reply to a text, a dict; or (reason, message) if it has no answer."""
        while True:
            options = json.dumps(self.options)
            kind, reply = await self.post(client, self.body(text, sampled))
            if kind == 'answer':
                self.count_tokens(reply)
                self.n_refused = 0
                self.accepted = self.accepted if sampled else options
                return reply
            self.n_refused += 1
            async with self.adapting:                       # one at a time finds out whose fault it is
                known = options == self.accepted and kind != 'denied' and self.n_refused < IN_A_ROW
                if not known and await self.adapt(client, options, kind, reply):
                    continue
            return 'failed' if kind == 'failed' else 'refused', reply

    async def adapt(self, client, options, kind, message):
        """after a refusal: True if the options are others by now, so that the text is worth another try. False if the
        text is the reason. Stopped if the server refuses every request. options: of the request, as JSON; kind,
        message: of the refusal, see post."""
        if options != json.dumps(self.options):
            return True
        if kind == 'refused' and options != self.accepted and self.do_without(message, named_only=True):
            return True
        was_accepted = options == self.accepted
        while True:
            kind, reply = await self.post(client, self.body(PROBE, False))
            if kind == 'answer':
                self.count_tokens(reply)
                self.accepted, self.n_refused = json.dumps(self.options), 0
                return options != self.accepted
            if kind == 'failed':
                return False
            changed = was_accepted or kind == 'denied'      # it is no option of the request
            if changed or not self.do_without(reply, named_only=kind == 'text'):
                raise Stopped(f'the server refuses every request: {reply}')

    def count_tokens(self, reply):
        """adds the tokens of a reply to those that are paid for."""
        usage = reply.get('usage') if isinstance(reply, dict) else None
        for key in ('prompt_tokens', 'completion_tokens'):
            n = usage.get(key) if isinstance(usage, dict) else 0
            self.used[key] += n if isinstance(n, int) else 0

    async def label(self, client, text):
        """the label of a text, or the reason why it has none."""
        for _ in range(2):                                  # an answer that breaks the schema is asked for once more
            reply = await self.complete(client, text)
            if isinstance(reply, tuple):
                return self.drop(*reply)
            content, tokens = read_answer(reply)
            label, outside = label_from_answer(self.schema, content, tokens)
            if label and 'answer' in label and self.samples > 1:  # no log probabilities
                more = [await self.complete(client, text, True) for _ in range(self.samples)]
                contents = [read_answer(reply)[0] for reply in more if not isinstance(reply, tuple)]
                label = label_from_samples(self.schema, contents) or label
            if label:
                self.n_answered += 1
                self.outside += outside
                return label
        self.n_invalid += 1
        why = explain_invalid(self.schema, content, reply)
        if self.n_invalid == IN_A_ROW and not self.n_answered:
            raise Stopped(f'of {IN_A_ROW} texts none has an answer that fits the schema; the last one: {why}')
        return self.drop('refused' if find_refusal(reply) else 'invalid', why)

    def drop(self, reason, message):
        """counts a text without an answer. Prints the message, if it is a new one of the reason. Returns the reason."""
        self.dropped[reason] += 1
        new = reason, ''.join(char for char in message if not char.isdigit())[:60]
        if new not in self.shown and len(self.shown) < 8:
            self.shown.add(new)
            self.show(f'a text without an answer ({reason}): {message}')
        return reason

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
            'outside': self.outside / max(1, self.n_answered)}) + (
                f'\n{self.dropped.total()} texts have no answer; --ask_again=True asks about them again'
                if self.dropped else '')

    async def work(self, texts, results):
        """asks about all texts, in_flight at a time, and puts (hash, ids, label) into results."""
        headers = {'Authorization': f'Bearer {self.key}'} if self.key else {}
        self.adapting = asyncio.Lock()                      # of this event loop
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


def check_budget(budget):
    """exits with a message if a max_cost is set and no price."""
    if budget.get('max_cost') and not (budget['price_in'] or budget['price_out']):
        stop('max_cost needs price_in and price_out, per million tokens')


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
    check_budget(config)
    schema = Schema(config['fields'], config['left_out'])
    return Server(config['teacher'].split(','), config['teacher_model'], schema, config['prompt'],
                  **{name: config[name] for name in names})
