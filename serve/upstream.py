"""The LLM upstream: texts that the student is unsure of, and audits that measure how often the two agree."""
import asyncio
import logging
import math
import time
from collections import deque
from contextlib import suppress

import httpx

from data.calls import read_reply
from data.objects import find_object
from distil.keys import failure_text, hide_password, read_key
from distil.options import check_options
from distil.prompts import answer_format, offer, prompt_messages
from distil.replies import explain_invalid, judge_reply
from distil.values import json_text

log = logging.getLogger('serve')


class Upstream:
    """client of the LLM that texts are deferred to. After three failures in a row it sends nothing for half a
    minute (https://martinfowler.com/bliki/CircuitBreaker.html)."""

    def __init__(self, url, model, timeout, space, prompt):
        key = read_key('UPSTREAM_API_KEY')
        hide_password(url)
        headers = {'Authorization': f'Bearer {key}'} if key else {}
        self.client = httpx.AsyncClient(base_url=url.rstrip('/') + '/', headers=headers, timeout=timeout)
        self.model, self.space, self.prompt, self.timeout = model, space, prompt, timeout
        self.failures, self.paused_until = 0, 0.0
        self.form = answer_format(space.schema)

    async def answer(self, text):
        """the LLM's answer to a text, {field: value}; None if it is down, slow or breaks the schema."""
        if time.monotonic() < self.paused_until:
            return None
        kind = 'failed'
        try:
            reply = await asyncio.wait_for(self.client.post('chat/completions', json={
                'model': self.model, 'messages': prompt_messages(self.prompt, text), 'temperature': 0,
                'response_format': offer(self.form, text)}), self.timeout)
            kind, value = judge_reply(reply)
            if kind == 'answer':
                content = read_reply(value)[0]
                with suppress(ValueError):                      # it breaks the schema
                    record = self.space.schema.canonical(find_object(content)[0])
                    check_options(self.space.schema, record, text)
                    self.failures = 0
                    return record
                value = explain_invalid(self.space.schema, content, value)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as error:
            value = failure_text(error)
        self.failures += kind not in ('text', 'refused')        # which concern only this text
        if self.failures >= 3:
            self.paused_until = time.monotonic() + 30
        log.warning('upstream: %s', value)
        return None


class Audit:
    """agreement of student and upstream per field, over the last `window` texts that both have answered.
    defer_all is True from when a field's agreement is below minimum with 95 % certainty until no field's
    measured agreement is below it."""

    def __init__(self, schema, minimum, metrics, model, window=300):
        self.minimum, self.metrics, self.model = minimum, metrics, model
        self.leaves, self.equal = schema.leaves, {leaf.path: deque(maxlen=window) for leaf in schema.leaves}
        self.defer_all = False

    def add(self, student_record, upstream_record):
        """adds both answers to a text, {field: value} each."""
        worst = None
        for leaf in self.leaves:
            equal = self.equal[leaf.path]
            equal.append(json_text(leaf.get(student_record)) == json_text(leaf.get(upstream_record)))
            mean, (low, high) = sum(equal) / len(equal), wilson_interval(sum(equal), len(equal))
            for end, p in (('mean', mean), ('low', low), ('high', high)):
                self.metrics.agreement.labels(self.model, leaf.path, end).set(p)
            worst = min(worst or (mean, high, leaf.path), (mean, high, leaf.path))
        self.metrics.audited.labels(self.model).inc()
        mean, high, path = worst
        if high < self.minimum if not self.defer_all else mean >= self.minimum:
            self.defer_all = not self.defer_all
            self.metrics.deferring.labels(self.model).set(self.defer_all)
            log.warning('%s agrees with upstream in %.2f of %d texts, audit_min is %g: %s', path, mean,
                        len(equal), self.minimum,
                        'everything goes upstream' if self.defer_all else 'the student answers again')


def wilson_interval(hits, n, z=1.96):
    """(low, high), the 95 % interval of the share hits / n. Wilson 1927,
    https://doi.org/10.1080/01621459.1927.10502953"""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)
