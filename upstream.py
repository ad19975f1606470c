"""The LLM behind serve.py: it answers what the student is unsure of, and now and then the rest, to compare."""
import asyncio
import json
import logging
import math
import os
import time
from collections import deque

import httpx

log = logging.getLogger('serve')


class Upstream:
    """the LLM that the doubtful records go to. Three failures in a row, and it is left alone for half a minute
    (https://martinfowler.com/bliki/CircuitBreaker.html)."""

    def __init__(self, url, model, timeout, space, prompt):
        key = os.environ.get('UPSTREAM_API_KEY', '')
        headers = {'Authorization': f'Bearer {key}'} if key else {}
        self.client = httpx.AsyncClient(base_url=url.rstrip('/') + '/', headers=headers, timeout=timeout)
        self.model, self.space, self.prompt, self.timeout = model, space, prompt, timeout
        self.failures, self.closed_until = 0, 0.0
        properties = {field: {'enum': of_field} for field, of_field in space.fields.items()}
        schema = {'type': 'object', 'properties': properties, 'required': list(properties),
                  'additionalProperties': False}
        self.form = {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': schema, 'strict': True}}

    async def ask(self, text):
        """its answer to a text as a dict of the schema, or None where it is down, slow or answers nonsense."""
        if time.monotonic() < self.closed_until:
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
            self.failures += 1
            if self.failures >= 3:
                self.closed_until = time.monotonic() + 30
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
