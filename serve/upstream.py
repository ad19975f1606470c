"""The LLM upstream: texts that the student is unsure of, and audits that measure how often the two agree."""
import asyncio
import json
import logging
import math
import os
import time
from collections import deque

import httpx

from data.objects import find_object
from distil.prompts import answer_format, prompt_messages

log = logging.getLogger('serve')


class Upstream:
    """client of the LLM that texts are deferred to. After three failures in a row it sends nothing for half a
    minute (https://martinfowler.com/bliki/CircuitBreaker.html)."""

    def __init__(self, url, model, timeout, space, prompt):
        key = os.environ.get('UPSTREAM_API_KEY', '')
        headers = {'Authorization': f'Bearer {key}'} if key else {}
        self.client = httpx.AsyncClient(base_url=url.rstrip('/') + '/', headers=headers, timeout=timeout)
        self.model, self.space, self.prompt, self.timeout = model, space, prompt, timeout
        self.failures, self.paused_until = 0, 0.0
        self.form = answer_format(space.fields)

    async def answer(self, text):
        """the LLM's answer to a text, {field: value}; None if it is down, slow or breaks the schema."""
        if time.monotonic() < self.paused_until:
            return None
        try:
            reply = await asyncio.wait_for(self.client.post('chat/completions', json={
                'model': self.model, 'messages': prompt_messages(self.prompt, text), 'temperature': 0,
                'response_format': self.form}), self.timeout)
            reply.raise_for_status()
            content = reply.json()['choices'][0]['message']['content']
            record = find_object(content)[0]
            if record is None or self.space.from_json(record) is None:
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

    def __init__(self, fields, minimum, metrics, model, window=300):
        self.minimum, self.metrics, self.model = minimum, metrics, model
        self.equal = {field: deque(maxlen=window) for field in fields}
        self.defer_all = False

    def add(self, student_record, upstream_record):
        """adds both answers to a text, {field: value} each."""
        worst = None
        for field, equal in self.equal.items():
            equal.append(json.dumps(student_record[field]) == json.dumps(upstream_record[field]))
            mean, (low, high) = sum(equal) / len(equal), wilson_interval(sum(equal), len(equal))
            for end, p in (('mean', mean), ('low', low), ('high', high)):
                self.metrics.agreement.labels(self.model, field, end).set(p)
            worst = min(worst or (mean, high, field), (mean, high, field))
        self.metrics.audited.labels(self.model).inc()
        mean, high, field = worst
        if high < self.minimum if not self.defer_all else mean >= self.minimum:
            self.defer_all = not self.defer_all
            self.metrics.deferring.labels(self.model).set(self.defer_all)
            log.warning('%s agrees with upstream in %.2f of %d texts, audit_min is %g: %s', field, mean,
                        len(self.equal[field]), self.minimum,
                        'everything goes upstream' if self.defer_all else 'the student answers again')


def wilson_interval(hits, n, z=1.96):
    """(low, high), the 95 % interval of the share hits / n. Wilson 1927,
    https://doi.org/10.1080/01621459.1927.10502953"""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)
