"""Replies: JSON, errors in the form of each API, and the headers that say who answered what."""
import json

from fastapi.responses import Response

ERROR_TYPES = {401: 'authentication_error', 404: 'not_found_error', 500: 'server_error', 502: 'server_error',
               503: 'overloaded_error'}


def json_response(body, status=200, headers=None):
    """a Response with a body of JSON."""
    return Response(json.dumps(body), status, headers, media_type='application/json')


def error_body(refusal, system_one=False):
    """a Refusal in the form that the route's clients expect."""
    message, kind = str(refusal), ERROR_TYPES.get(refusal.status, 'invalid_request_error')
    if system_one and refusal.status == 422:
        return {'detail': [{'loc': ['body', *refusal.where], 'msg': message, 'type': 'value_error'}]}
    if system_one:
        return {'detail': {'error_type': kind, 'message': message}}
    return {'error': {'message': message, 'type': kind, 'param': '.'.join(map(str, refusal.where)) or None,
                      'code': None}}


def error_response(refusal, system_one=False):
    """the Response of a Refusal."""
    return json_response(error_body(refusal, system_one), refusal.status,
                         {'retry-after': '1'} if refusal.status == 503 else None)


def answer_headers(answers, ignored):
    """x-answered-by: who answered, the different names separated by commas; x-tokens-cut: how many tokens of
    the texts the student did not read, if any; x-ignored: the parts of the request that it did not read."""
    n_cut = sum(answer.n_cut for answer in answers)
    by = sorted({answer.by for answer in answers if not answer.error})
    headers = {'x-answered-by': ','.join(by)} if by else {}
    headers |= {'x-tokens-cut': str(n_cut)} if n_cut else {}
    return headers | ({'x-ignored': ','.join(ignored)[:1000]} if ignored else {})
