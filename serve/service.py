"""What becomes of a text that serve.py gets: one thread decodes the texts of all requests together, and what
the student is unsure of goes to the LLM behind it.
"""
import asyncio
import json
import logging
import math
import os
import queue
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from distil.decode import confidence_of, decode, value_probabilities
from serve.questions import Refusal

AUDITS = 8  # at a time; what would be more is not audited
log = logging.getLogger('serve')


class Metrics:
    """what /metrics tells (https://prometheus.io/docs/practices/naming)."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def new(kind, key, text, labels=(), **more):
            return kind(f'student_{key}', text, labels, registry=self.registry, **more)
        self.requests = new(Counter, 'requests', 'requests answered', ['route', 'status'])
        self.seconds = new(Histogram, 'request_seconds', 'from the first byte to the last', ['route'],
                           buckets=[.002, .005, .01, .02, .05, .1, .25, .5, 1, 2.5, 10])
        self.batch = new(Histogram, 'batch_texts', 'texts decoded together with one',
                         buckets=[2 ** k for k in range(9)])
        self.waiting = new(Gauge, 'waiting_texts', 'texts under way')
        self.texts = new(Counter, 'texts', 'texts answered', ['by'])
        self.cut = new(Counter, 'texts_cut', 'texts of which the student read the beginning alone')
        self.values = new(Counter, 'values', 'answers', ['field', 'value'])
        self.audited = new(Counter, 'audited_texts', 'texts that upstream was asked about to compare')
        self.agreement = new(Gauge, 'agreement', 'share of audited texts on which upstream says the same; '
                             'low and high: its 95 % interval', ['field', 'end'])
        self.deferring = new(Gauge, 'deferring', '1 while all goes upstream: a field agrees too rarely')


# -----------------------------------------------------------------------------
# one decoding thread for all requests


@dataclass
class Answer:
    """what became of a text. by: 'student'; 'upstream'; or 'student-unsure', where the student was not sure
    and there is no upstream, or it has no answer."""
    answer: dict                # {field: value}
    sure: dict                  # {field: probability of that value}
    chances: dict               # {field: probabilities of its values}, where asked for
    ids: list
    outs: list                  # output indices
    decisions: list             # of decode.decode
    by: str = 'student'
    n_cut: int = 0              # tokens of the text that the student did not read


class Decoder(threading.Thread):
    """answers the texts of all requests together: a new one takes its place wherever an answer is complete,
    and one that is alone waits for nothing. A text whose caller is gone is left out."""

    def __init__(self, labeler, metrics):
        super().__init__(daemon=True, name='decoder')
        self.labeler, self.metrics, self.coming = labeler, metrics, queue.SimpleQueue()

    async def ask(self, texts, full=False):
        """list of Answers to lists of ids, in their order. full: with the probabilities of all values."""
        loop = asyncio.get_running_loop()
        jobs = [(ids, full, loop.create_future(), loop) for ids in texts]
        try:
            for job in jobs:
                self.coming.put(job)
            return [await future for _, _, future, _ in jobs]
        finally:
            for _, _, future, _ in jobs:
                future.cancel()  # where the caller hung up; else it is done

    def run(self):
        while True:
            under_way = deque()
            try:
                for outs, decisions in decode(self.labeler.student, self.labeler.space, self.texts(under_way),
                                              self.labeler.batch_size):
                    self.metrics.batch.observe(min(len(under_way), self.labeler.batch_size))
                    self.finish(under_way[0], outs, decisions)  # decode answers in the texts' order
                    under_way.popleft()
            except Exception as error:  # what is under way fails, the next text is answered
                log.exception('the decoder failed')
                for _, _, future, loop in under_way:
                    loop.call_soon_threadsafe(tell, future, None, error)

    def texts(self, under_way):
        """yields ids, and None where no text is waiting; blocks only where nothing is under way."""
        while True:
            try:
                job = self.coming.get(block=not under_way)
            except queue.Empty:
                yield None
                continue
            if not job[2].cancelled():
                under_way.append(job)
                yield job[0]

    def finish(self, job, outs, decisions):
        ids, full, future, loop = job
        student, space, temperature = self.labeler.student, self.labeler.space, self.labeler.temperature
        sure = confidence_of(space.fields, decisions, temperature)
        chances = value_probabilities(student, space, ids, outs, decisions, temperature) if full else {}
        answer = Answer(dict(space.to_json(outs)), sure, chances, ids, outs, decisions)
        loop.call_soon_threadsafe(tell, future, answer, None)


def tell(future, answer, error):
    """sets what a coroutine waits for; in its own thread."""
    if not future.done():
        future.set_exception(error) if error else future.set_result(answer)


# -----------------------------------------------------------------------------
# the LLM behind


class Upstream:
    """the LLM that the doubtful records go to. Three failures in a row, and it is left alone for half a
    minute (https://martinfowler.com/bliki/CircuitBreaker.html)."""

    def __init__(self, url, model, timeout, space, prompt):
        key = os.environ.get('UPSTREAM_API_KEY', '')
        headers = {'Authorization': f'Bearer {key}'} if key else {}
        self.client = httpx.AsyncClient(base_url=url.rstrip('/') + '/', headers=headers, timeout=timeout)
        self.model, self.space, self.prompt, self.timeout = model, space, prompt, timeout
        self.failures, self.left_alone_until = 0, 0.0
        properties = {field: {'enum': of_field} for field, of_field in space.fields.items()}
        schema = {'type': 'object', 'properties': properties, 'required': list(properties),
                  'additionalProperties': False}
        self.form = {'type': 'json_schema',
                     'json_schema': {'name': 'answer', 'schema': schema, 'strict': True}}

    async def ask(self, text):
        """its answer to a text, a dict of the schema; None where it is down, slow or answers nonsense."""
        if time.monotonic() < self.left_alone_until:
            return None
        message = {'role': 'user', 'content': self.prompt.replace('{text}', text)}
        try:
            reply = await asyncio.wait_for(self.client.post('chat/completions', json={
                'model': self.model, 'messages': [message], 'temperature': 0, 'response_format': self.form}),
                self.timeout)
            reply.raise_for_status()
            said = reply.json()['choices'][0]['message']['content'].strip()
            answer = json.loads(said.removeprefix('```json').removesuffix('```'))
            if self.space.from_json(answer) is None:
                raise ValueError(f'{said[:80]!r} is no answer of the schema')
        except (httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
            self.failures += status not in (400, 413, 422)  # which are about this text alone
            if self.failures >= 3:
                self.left_alone_until = time.monotonic() + 30
            log.warning('upstream: %s', str(error) or type(error).__name__)
            return None
        self.failures = 0
        return {field: answer[field] for field in self.space.fields}


class Audit:
    """how often student and upstream say the same, over the last so many texts that both have answered."""

    def __init__(self, fields, least, metrics, window=300):
        self.least, self.metrics = least, metrics
        self.equal = {field: deque(maxlen=window) for field in fields}
        self.defer_all = False

    def add(self, ours, theirs):
        """takes both answers to a text."""
        worst = None
        for field, equal in self.equal.items():
            equal.append(json.dumps(ours[field]) == json.dumps(theirs[field]))
            share, (low, high) = sum(equal) / len(equal), wilson(sum(equal), len(equal))
            for end, p in (('mean', share), ('low', low), ('high', high)):
                self.metrics.agreement.labels(field, end).set(p)
            worst = min(worst or (share, high, field), (share, high, field))
        self.metrics.audited.inc()
        share, high, field = worst
        if high < self.least if not self.defer_all else share >= self.least:
            self.defer_all = not self.defer_all
            self.metrics.deferring.set(self.defer_all)
            log.warning('%s agrees with upstream in %.2f of %d texts, audit_min is %g: %s', field, share,
                        len(self.equal[field]), self.least,
                        'everything goes upstream' if self.defer_all else 'the student answers again')


def wilson(hits, n, z=1.96):
    """ends of the 95 % interval of a share. Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953"""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


# -----------------------------------------------------------------------------
# student or LLM


class Service:
    """text in, Answer out: by the student, or where it is unsure by the LLM behind it.

    labeler: a sample.Labeler, whose min_confidence says where it is unsure. name: of the model, to callers.
    upstream: an Upstream or None. share, least: of the texts, to audit, see Audit. kept: path of the file for
    what upstream answered, or None. Start its decoder first."""

    def __init__(self, labeler, name, max_waiting=4096, upstream=None, share=0.0, least=0.0, kept=None):
        self.labeler, self.space, self.name = labeler, labeler.space, name
        self.metrics = Metrics()
        self.decoder = Decoder(labeler, self.metrics)
        self.max_waiting, self.n_waiting = max_waiting, 0
        self.upstream, self.share, self.kept = upstream, share, kept
        self.audit, self.auditing = Audit(self.space.fields, least, self.metrics), set()

    async def answer(self, texts, full=False):
        """list of Answers. full: with the probabilities of all values. Refusal for a text that cannot be
        read, and where too many are under way."""
        if len(texts) > self.max_waiting:
            raise Refusal(413, f'{len(texts)} texts are too many for a request; {self.max_waiting} can be')
        if self.n_waiting + len(texts) > self.max_waiting:
            raise Refusal(503, f'{self.n_waiting} texts are under way, {self.max_waiting} can be; come again')
        texts = [text.encode('utf-8', 'replace').decode() for text in texts]  # no half characters
        read, cuts = [], []
        for n, text in enumerate(texts):
            ids, error, n_cut = self.labeler.encode(text.encode())
            if error:
                raise Refusal(400, error if len(texts) == 1 else f'text {n}: {error}', 'texts', n)
            read.append(ids)
            cuts.append(n_cut)
        self.count(len(texts))
        try:
            answers = await self.decoder.ask(read, full)
            answers = await asyncio.gather(*map(self.settle, texts, answers))
        finally:
            self.count(-len(texts))
        for answer, answer.n_cut in zip(answers, cuts):
            self.metrics.cut.inc(answer.n_cut > 0)
            self.metrics.texts.labels(answer.by).inc()
            for field, value in answer.answer.items():
                self.metrics.values.labels(field, json.dumps(value)).inc()
        return answers

    def count(self, n):
        self.n_waiting += n
        self.metrics.waiting.set(self.n_waiting)

    async def settle(self, text, ours):
        """the student's Answer to a text, or upstream's where the student is unsure."""
        unsure = self.audit.defer_all or min(ours.sure.values()) < self.labeler.min_confidence
        audited = self.upstream and random.random() < self.share
        if audited and not unsure and len(self.auditing) < AUDITS:
            task = asyncio.create_task(self.compare(text, ours))  # in the background
            self.auditing.add(task)
            task.add_done_callback(self.auditing.discard)
        if not unsure:
            return ours
        theirs = await self.upstream.ask(text) if self.upstream else None
        if theirs is None:
            return replace(ours, by='student-unsure')
        if audited:
            self.audit.add(ours.answer, theirs)
        self.keep(text, theirs)
        chances = {field: [float(json.dumps(value) == json.dumps(theirs[field])) for value in of_field]
                   for field, of_field in self.space.fields.items()}  # an LLM gives no probabilities
        return Answer(theirs, dict.fromkeys(theirs, 1.0), chances, ours.ids, self.space.from_json(theirs), [],
                      'upstream')

    async def compare(self, text, ours):
        theirs = await self.upstream.ask(text)
        if theirs is not None:
            self.audit.add(ours.answer, theirs)
            self.keep(text, theirs)

    def keep(self, text, answer):
        """appends a line that extract.py --score reads."""
        if not self.kept:
            return
        try:
            with open(self.kept, 'a', encoding='utf-8') as file:
                file.write(json.dumps({'text': text, 'answer': answer}) + '\n')
        except OSError as error:
            log.warning('%s: %s', self.kept, error.strerror)
