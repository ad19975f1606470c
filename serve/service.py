"""Text in, answer out. One thread decodes the texts of all requests together. Texts that the student is
unsure of go to the LLM upstream. Audits measure how often the two agree."""
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
from serve.request import Refusal

MAX_AUDITS = 8  # at a time; further ones are left out
log = logging.getLogger('serve')


class Metrics:
    """what /metrics shows (https://prometheus.io/docs/practices/naming)."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def new(kind, key, text, labels=(), **more):
            return kind(f'student_{key}', text, labels, registry=self.registry, **more)
        self.requests = new(Counter, 'requests', 'requests answered', ['route', 'status'])
        self.seconds = new(Histogram, 'request_seconds', 'from the first byte to the last', ['route'],
                           buckets=[.002, .005, .01, .02, .05, .1, .25, .5, 1, 2.5, 10])
        self.batch = new(Histogram, 'batch_texts', 'texts decoded together',
                         buckets=[2 ** k for k in range(9)])
        self.waiting = new(Gauge, 'waiting_texts', 'texts under way')
        self.texts = new(Counter, 'texts', 'texts answered', ['by'])
        self.cut = new(Counter, 'texts_cut', 'texts of which the student read only the beginning')
        self.values = new(Counter, 'values', 'answers', ['field', 'value'])
        self.audited = new(Counter, 'audited_texts', 'texts that student and upstream both answered')
        self.agreement = new(Gauge, 'agreement', 'share of audited texts on which student and upstream '
                             'agree; low and high: its 95 % interval', ['field', 'end'])
        self.deferring = new(Gauge, 'deferring', '1 while everything goes upstream, as a field agrees rarely')


# -----------------------------------------------------------------------------
# one decoding thread for all requests


@dataclass
class Answer:
    """the answer to a text. by: 'student'; 'upstream'; or 'student-unsure' if the student was unsure and
    there is no upstream, or upstream had no answer."""
    record: dict                # {field: value}
    confidence: dict            # {field: probability of that value}
    probabilities: dict         # {field: [probability of each value]}, {} unless requested
    ids: list                   # of the text
    outs: list                  # output indices
    decisions: list             # of decode.decode
    by: str = 'student'
    n_cut: int = 0              # tokens of the text that the student did not read


class Decoder(threading.Thread):
    """decodes the texts of all requests together. A new text starts as soon as another is complete, and a
    single text does not wait for others. A text whose caller has disconnected is left out."""

    def __init__(self, labeler, metrics):
        super().__init__(daemon=True, name='decoder')
        self.labeler, self.metrics, self.jobs = labeler, metrics, queue.SimpleQueue()

    async def answer(self, texts, full=False):
        """list of Answers to texts (lists of ids), in their order. full: with the probabilities of all
        values."""
        loop = asyncio.get_running_loop()
        jobs = [(ids, full, loop.create_future(), loop) for ids in texts]
        try:
            for job in jobs:
                self.jobs.put(job)
            return [await future for _, _, future, _ in jobs]
        finally:
            for _, _, future, _ in jobs:
                future.cancel()  # if the caller has disconnected; else it is done

    def run(self):
        while True:
            under_way = deque()
            try:
                for outs, decisions in decode(self.labeler.student, self.labeler.space,
                                              self.next_texts(under_way), self.labeler.batch_size):
                    self.metrics.batch.observe(min(len(under_way), self.labeler.batch_size))
                    self.finish(under_way[0], outs, decisions)  # decode answers in the texts' order
                    under_way.popleft()
            except Exception as error:  # only the texts under way fail
                log.exception('the decoder failed')
                for _, _, future, loop in under_way:
                    loop.call_soon_threadsafe(set_future, future, None, error)

    def next_texts(self, under_way):
        """yields ids, and None if no text is waiting; blocks only if nothing is under way."""
        while True:
            try:
                job = self.jobs.get(block=not under_way)
            except queue.Empty:
                yield None
                continue
            if not job[2].cancelled():
                under_way.append(job)
                yield job[0]

    def finish(self, job, outs, decisions):
        ids, full, future, loop = job
        student, space, temperature = self.labeler.student, self.labeler.space, self.labeler.temperature
        confidence = confidence_of(space.fields, decisions, temperature)
        probabilities = value_probabilities(student, space, ids, outs, decisions, temperature) if full else {}
        answer = Answer(dict(space.to_json(outs)), confidence, probabilities, ids, outs, decisions)
        loop.call_soon_threadsafe(set_future, future, answer, None)


def set_future(future, answer, error):
    """sets the result or the exception of a future, unless it is cancelled; in the thread of its loop."""
    if not future.done():
        future.set_exception(error) if error else future.set_result(answer)


# -----------------------------------------------------------------------------
# the LLM upstream


class Upstream:
    """client of the LLM that texts are deferred to. After three failures in a row it sends nothing for half a
    minute (https://martinfowler.com/bliki/CircuitBreaker.html)."""

    def __init__(self, url, model, timeout, space, prompt):
        key = os.environ.get('UPSTREAM_API_KEY', '')
        headers = {'Authorization': f'Bearer {key}'} if key else {}
        self.client = httpx.AsyncClient(base_url=url.rstrip('/') + '/', headers=headers, timeout=timeout)
        self.model, self.space, self.prompt, self.timeout = model, space, prompt, timeout
        self.failures, self.paused_until = 0, 0.0
        properties = {field: {'enum': of_field} for field, of_field in space.fields.items()}
        schema = {'type': 'object', 'properties': properties, 'required': list(properties),
                  'additionalProperties': False}
        self.form = {'type': 'json_schema',
                     'json_schema': {'name': 'answer', 'schema': schema, 'strict': True}}

    async def answer(self, text):
        """the LLM's answer to a text, {field: value}; None if it is down, slow or breaks the schema."""
        if time.monotonic() < self.paused_until:
            return None
        message = {'role': 'user', 'content': self.prompt.replace('{text}', text)}
        try:
            reply = await asyncio.wait_for(self.client.post('chat/completions', json={
                'model': self.model, 'messages': [message], 'temperature': 0, 'response_format': self.form}),
                self.timeout)
            reply.raise_for_status()
            content = reply.json()['choices'][0]['message']['content'].strip()
            record = json.loads(content.removeprefix('```json').removesuffix('```'))
            if self.space.from_json(record) is None:
                raise ValueError(f'{content[:80]!r} is not an answer of the schema')
        except (httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
            self.failures += status not in (400, 413, 422)  # which concern only this text
            if self.failures >= 3:
                self.paused_until = time.monotonic() + 30
            log.warning('upstream: %s', str(error) or type(error).__name__)
            return None
        self.failures = 0
        return {field: record[field] for field in self.space.fields}


class Audit:
    """agreement of student and upstream per field, over the last `window` texts that both have answered.
    defer_all is True from when a field's agreement is below minimum with 95 % certainty until no field's
    measured agreement is below it."""

    def __init__(self, fields, minimum, metrics, window=300):
        self.minimum, self.metrics = minimum, metrics
        self.equal = {field: deque(maxlen=window) for field in fields}
        self.defer_all = False

    def add(self, student_record, upstream_record):
        """adds both answers to a text, {field: value} each."""
        worst = None
        for field, equal in self.equal.items():
            equal.append(json.dumps(student_record[field]) == json.dumps(upstream_record[field]))
            mean, (low, high) = sum(equal) / len(equal), wilson_interval(sum(equal), len(equal))
            for end, p in (('mean', mean), ('low', low), ('high', high)):
                self.metrics.agreement.labels(field, end).set(p)
            worst = min(worst or (mean, high, field), (mean, high, field))
        self.metrics.audited.inc()
        mean, high, field = worst
        if high < self.minimum if not self.defer_all else mean >= self.minimum:
            self.defer_all = not self.defer_all
            self.metrics.deferring.set(self.defer_all)
            log.warning('%s agrees with upstream in %.2f of %d texts, audit_min is %g: %s', field, mean,
                        len(self.equal[field]), self.minimum,
                        'everything goes upstream' if self.defer_all else 'the student answers again')


def wilson_interval(hits, n, z=1.96):
    """(low, high), the 95 % interval of the share hits / n. Wilson 1927,
    https://doi.org/10.1080/01621459.1927.10502953"""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


# -----------------------------------------------------------------------------
# student or upstream


class Service:
    """answers texts: by the student, or by the LLM upstream if the student is unsure. Its decoder must be
    started first.

    labeler: a sample.Labeler; the student is unsure if a field is below its min_confidence. name: of the
    model, in replies. upstream: an Upstream or None. audit_share: of all texts; audit_min: see Audit.
    kept_file: path of the file for upstream's answers, or None."""

    def __init__(self, labeler, name, max_waiting=4096, upstream=None, audit_share=0.0, audit_min=0.0,
                 kept_file=None):
        self.labeler, self.space, self.name = labeler, labeler.space, name
        self.metrics = Metrics()
        self.decoder = Decoder(labeler, self.metrics)
        self.max_waiting, self.n_waiting = max_waiting, 0
        self.upstream, self.audit_share, self.kept_file = upstream, audit_share, kept_file
        self.audit, self.auditing = Audit(self.space.fields, audit_min, self.metrics), set()

    async def answer(self, texts, full=False):
        """list of Answers to strings. full: with the probabilities of all values. Refusal if a text cannot be
        read, or if too many are under way."""
        if len(texts) > self.max_waiting:
            raise Refusal(413, f'the request has {len(texts)} texts; the limit is {self.max_waiting}')
        if self.n_waiting + len(texts) > self.max_waiting:
            raise Refusal(503, f'{self.n_waiting} texts are under way, the limit is {self.max_waiting}; '
                          'try again later')
        texts = [text.encode('utf-8', 'replace').decode() for text in texts]  # replaces lone surrogates
        ids_of_texts, cuts = [], []
        for n, text in enumerate(texts):
            ids, error, n_cut = self.labeler.encode(text.encode())
            if error:
                raise Refusal(400, error if len(texts) == 1 else f'text {n}: {error}', 'texts', n)
            ids_of_texts.append(ids)
            cuts.append(n_cut)
        self.add_waiting(len(texts))
        try:
            answers = await self.decoder.answer(ids_of_texts, full)
            answers = await asyncio.gather(*map(self.choose_answer, texts, answers))
        finally:
            self.add_waiting(-len(texts))
        for answer, n_cut in zip(answers, cuts):
            answer.n_cut = n_cut
            self.metrics.cut.inc(n_cut > 0)
            self.metrics.texts.labels(answer.by).inc()
            for field, value in answer.record.items():
                self.metrics.values.labels(field, json.dumps(value)).inc()
        return answers

    def add_waiting(self, n):
        self.n_waiting += n
        self.metrics.waiting.set(self.n_waiting)

    async def choose_answer(self, text, answer):
        """returns the student's Answer to a text, or upstream's if the student is unsure. May start an
        audit."""
        unsure = self.audit.defer_all or min(answer.confidence.values()) < self.labeler.min_confidence
        audited = self.upstream and random.random() < self.audit_share
        if audited and not unsure and len(self.auditing) < MAX_AUDITS:
            task = asyncio.create_task(self.audit_answer(text, answer))  # the caller does not wait for it
            self.auditing.add(task)
            task.add_done_callback(self.auditing.discard)
        if not unsure:
            return answer
        record = await self.upstream.answer(text) if self.upstream else None
        if record is None:
            return replace(answer, by='student-unsure')
        if audited:
            self.audit.add(answer.record, record)
        self.keep_answer(text, record)
        probabilities = {field: [float(json.dumps(value) == json.dumps(record[field])) for value in of_field]
                         for field, of_field in self.space.fields.items()}  # an LLM gives no probabilities
        return Answer(record, dict.fromkeys(record, 1.0), probabilities, answer.ids,
                      self.space.from_json(record), [], 'upstream')

    async def audit_answer(self, text, answer):
        record = await self.upstream.answer(text)
        if record is not None:
            self.audit.add(answer.record, record)
            self.keep_answer(text, record)

    def keep_answer(self, text, record):
        """appends a line that extract.py --score reads."""
        if not self.kept_file:
            return
        try:
            with open(self.kept_file, 'a', encoding='utf-8') as file:
                file.write(json.dumps({'text': text, 'answer': record}) + '\n')
        except OSError as error:
            log.warning('%s: %s', self.kept_file, error.strerror)
