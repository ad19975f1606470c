"""Text in, answer out. One thread decodes the texts of all requests together. Texts that the student is
unsure of go to the LLM upstream."""
import asyncio
import copy
import json
import logging
import queue
import random
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from distil.confidence import confidence_of, value_probabilities
from distil.decode import decode
from distil.copied import Copied
from distil.labeler import copied_values
from distil.values import MISSING, PRESENT, json_text, said
from serve.metrics import Metrics
from serve.request import Refusal
from serve.upstream import Audit

MAX_AUDITS = 8  # at a time; further ones are left out
log = logging.getLogger('serve')


# -----------------------------------------------------------------------------
# one decoding thread for all requests


@dataclass
class Answer:
    """the answer to a text. by: 'student'; 'upstream'; or 'student-unsure' if the student was unsure and
    there is no upstream, or upstream had no answer."""
    record: dict                # the answer
    confidence: dict            # {path of a leaf: probability of its value}
    probabilities: dict         # {path of a choice: [probability of each value]}, {} unless requested
    ids: list                   # of the text
    outs: list                  # output indices
    decisions: list             # of decode.decode
    by: str = 'student'
    n_cut: int = 0              # tokens of the text that the student did not read
    error: str = ''             # why there is no answer; then all else is empty
    copies: dict = field(default_factory=dict)  # of labeler.copied_values, {} unless requested
    text: str = ''              # as the student has read it, '' unless copies are requested


class Job(NamedTuple):
    """a text to answer. full: with the probabilities of all values; copies: with the likeliest copied values; space:
    the student's OutputSpace, or a copy of it with another reference date."""
    ids: list
    full: bool
    copies: bool
    space: object
    future: object
    loop: object


class Decoder(threading.Thread):
    """decodes the texts of all requests together. A new text starts as soon as another is complete, and a
    single text does not wait for others. A text whose caller has disconnected is left out."""

    def __init__(self, labeler, batch):
        super().__init__(daemon=True, name='decoder')
        self.labeler, self.batch, self.jobs = labeler, batch, queue.SimpleQueue()  # batch: of Metrics

    async def answer(self, texts, full=False, copies=False, space=None):
        """list of Answers to texts (lists of ids), in their order. full, copies, space: see Job."""
        loop, space = asyncio.get_running_loop(), space or self.labeler.space
        jobs = [Job(ids, full, copies, space, loop.create_future(), loop) for ids in texts]
        try:
            for job in jobs:
                self.jobs.put(job)
            return [await job.future for job in jobs]
        finally:
            for job in jobs:
                job.future.cancel()  # if the caller has disconnected; else it is done

    def run(self):
        while True:
            under_way = deque()
            try:
                for outs, decisions in decode(self.labeler.student, self.labeler.space,
                                              self.next_texts(under_way), self.labeler.batch_size):
                    self.batch.observe(min(len(under_way), self.labeler.batch_size))
                    self.finish(under_way[0], outs, decisions)  # decode answers in the texts' order
                    under_way.popleft()
            except Exception as error:  # only the texts under way fail
                log.exception('the decoder failed')
                for job in under_way:
                    job.loop.call_soon_threadsafe(set_future, job.future, None, error)

    def next_texts(self, under_way):
        """yields ids, and None if no text is waiting; blocks only if nothing is under way."""
        while True:
            try:
                job = self.jobs.get(block=not under_way)
            except queue.Empty:
                yield None
                continue
            if job.future.cancelled():
                continue
            if job.space is not self.labeler.space:
                self.answer_alone(job)
                continue
            under_way.append(job)
            yield job.ids

    def answer_alone(self, job):
        """answers a text that is read by a day of its own."""
        try:
            (outs, decisions), = decode(self.labeler.student, job.space, [job.ids])
            self.finish(job, outs, decisions)
        except Exception as error:
            log.exception('the decoder failed')
            job.loop.call_soon_threadsafe(set_future, job.future, None, error)

    def finish(self, job, outs, decisions):
        read = self.labeler.student, job.space, job.ids, outs, decisions, self.labeler.temperature
        answer = Answer(dict(job.space.to_json(outs)),
                        confidence_of(job.space.schema.paths, decisions, self.labeler.temperature),
                        value_probabilities(*read) if job.full else {}, job.ids, outs, decisions)
        if job.copies:
            answer.copies, answer.text = copied_values(*read), job.space.tokenizer.decode(job.ids)
        job.loop.call_soon_threadsafe(set_future, job.future, answer, None)


def values_of(schema, record):
    """yields (path, value as a text) of the leaves of a record: of a list each member, or its length if these are
    objects or copied; of a copied value whether there is one."""
    for leaf in schema.leaves:
        value = leaf.get(record)
        if isinstance(leaf, Copied) and value is not None and value is not MISSING:
            value = PRESENT
        for member in value if leaf.is_list and leaf.values else [len(value) if leaf.is_list else value]:
            yield leaf.path, said(member)


def set_future(future, answer, error):
    """sets the result or the exception of a future, unless it is cancelled; in the thread of its loop."""
    if not future.done():
        future.set_exception(error) if error else future.set_result(answer)


# -----------------------------------------------------------------------------
# student or upstream


class Service:
    """answers texts: by the student, or by the LLM upstream if the student is unsure. Its decoder must be
    started first.

    labeler: a sample.Labeler; the student is unsure if a field is below its min_confidence. name: of the
    model, in replies. upstream: an Upstream or None. audit_share: of all texts; audit_min: see Audit.
    kept_file: path of the file for upstream's answers, or None. metrics: shared by several students."""

    def __init__(self, labeler, name, max_waiting=4096, upstream=None, audit_share=0.0, audit_min=0.0,
                 kept_file=None, metrics=None):
        self.labeler, self.space, self.name = labeler, labeler.space, name
        self.metrics = metrics or Metrics()
        self.decoder = Decoder(labeler, self.metrics.batch.labels(name))
        self.max_waiting, self.n_waiting = max_waiting, 0
        self.upstream, self.audit_share, self.kept_file = upstream, audit_share, kept_file
        self.audit, self.auditing = Audit(self.space.schema, audit_min, self.metrics, name), set()
        self.reads_dates = any(part.kind in ('date', 'date-time') for part in self.space.schema.copied)
        self.space_on = lru_cache(maxsize=32)(self.space_on)
        self.add_waiting(0)

    def space_on(self, reference_date):
        """the OutputSpace that reads the dates of texts written on a day, '' for that of the task. __init__ puts a
        cache around it."""
        if not self.reads_dates or reference_date in ('', self.space.reference_date):
            return self.space
        space = copy.copy(self.space)
        space.reference_date = reference_date
        return space

    def encode(self, texts, where, refuse_long, each):
        """(list of the ids of each text, how many tokens of each the student does not read, why each has no answer
        or ''). where: keys that lead to the texts in the body. A text has none if it is empty, or too long if
        refuse_long: Refusal, unless each is to have its own error."""
        ids_of_texts, cuts, errors = [], [], []
        for n, text in enumerate(texts):
            ids, error, n_cut = self.labeler.encode(text.encode())
            if n_cut and refuse_long:
                error = (f'the text has {n_cut} tokens more than the student reads; if a prompt is around '
                         "it, name it: --template='... {text} ...' (docs/serve.md); --too_long=cut reads its "
                         'beginning')
            if error and not each:
                raise Refusal(400, error if len(texts) == 1 else f'text {n}: {error}', *where,
                              *([n] if len(texts) > 1 else []))
            ids_of_texts.append(ids)
            cuts.append(n_cut)
            errors.append(error)
        return ids_of_texts, cuts, errors

    async def answer(self, texts, full=False, offered=None, where=('texts',), refuse_long=False, each=False,
                     copies=False, reference_date=''):
        """list of Answers to strings. full, copies: see Job. offered: {field: values as JSON} that upstream may
        answer, if not all; where, refuse_long, each: see encode; reference_date: see space_on. Refusal if a text
        cannot be read, or if too many are under way."""
        if len(texts) > self.max_waiting:
            raise Refusal(413, f'the request has {len(texts)} texts; the limit is {self.max_waiting}', *where)
        if self.n_waiting + len(texts) > self.max_waiting:
            raise Refusal(503, f'{self.n_waiting} texts are under way, the limit is {self.max_waiting}; '
                          'try again later')
        texts = [text.encode('utf-8', 'replace').decode() for text in texts]  # replaces lone surrogates
        ids_of_texts, cuts, errors = self.encode(texts, where, refuse_long, each)
        good = [n for n, error in enumerate(errors) if not error]
        answers = [Answer({}, {}, {}, [], [], [], error=error) for error in errors]
        self.add_waiting(len(texts))
        try:
            found = await self.decoder.answer([ids_of_texts[n] for n in good], full, copies,
                                              self.space_on(reference_date))
            found = await asyncio.gather(*(self.choose_answer(texts[n], answer, offered or {})
                                           for n, answer in zip(good, found)))
        finally:
            self.add_waiting(-len(texts))
        for n, answer in zip(good, found):
            answers[n], answer.n_cut = answer, cuts[n]
            self.metrics.cut.labels(self.name).inc(cuts[n] > 0)
            self.metrics.texts.labels(self.name, answer.by).inc()
            for path, value in values_of(self.space.schema, answer.record):
                self.metrics.values.labels(self.name, path, value).inc()
        return answers

    def add_waiting(self, n):
        self.n_waiting += n
        self.metrics.waiting.labels(self.name).set(self.n_waiting)

    async def choose_answer(self, text, answer, offered):
        """returns the student's Answer to a text, or upstream's if the student is unsure and upstream answers
        what is offered, see answer. May start an audit."""
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
        values = {leaf.path: leaf.get(record) for leaf in self.space.schema.leaves}
        if any(json_text(values[path]) not in allowed for path, allowed in offered.items()):
            return replace(answer, by='student-unsure')
        label = self.space.schema.read_label({'answer': record})  # an LLM gives no probabilities
        probabilities = {path: row for path, row in label.items() if any(row)}  # of the choices that it comes to
        return Answer(record, dict.fromkeys(values, 1.0), probabilities, answer.ids,
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
