"""What happens to a request before its route: the forms of its path, its key, its id, the metrics."""
import hmac
import re
import time
import uuid

from starlette.middleware.cors import CORSMiddleware

OPEN = '/health', '/ready'  # without a key


def find_path(path, routes):
    """(the path of a route that a path means, the deployment in it or ''). A trailing slash, a missing or
    doubled /v1 and Azure's paths mean the same routes. routes: {compiled pattern: route}."""
    if path in routes.values():                                 # nearly always
        return path, ''
    deployment, bare = '', re.sub('/+$', '', path) or '/'
    if azure := re.fullmatch(r'/openai/deployments/([^/]+)(/.+)', bare):
        deployment, bare = azure[1], azure[2]
    elif bare.startswith('/openai/'):
        bare = bare.removeprefix('/openai')
    bare = re.sub('^(/v1)+/', '/v1/', bare)
    for candidate in (bare, f'/v1{bare}', bare.removeprefix('/v1')):
        if any(route.fullmatch(candidate) for route in routes):
            return candidate, deployment
    return path, ''


class Middleware:
    """an ASGI application around another: finds the route, checks the key, gives each reply an id, and counts
    it in the metrics. routes: their paths, with {name} for a variable part, {name:path} for several."""

    def __init__(self, app, metrics, api_key, routes, reject):
        self.app, self.metrics, self.key, self.reject = app, metrics, api_key.encode(), reject
        self.names = set(routes)
        self.routes = {re.compile(re.sub(r'\{\w+\}', '[^/]+', re.sub(r'\{\w+:path\}', '.+', path))): path
                       for path in routes}

    def is_authorized(self, headers):
        """True if a request has the key, as OpenAI's clients send it or as Azure's do."""
        scheme, _, key = headers.get(b'authorization', b'').partition(b' ')
        keys = [headers.get(b'api-key', b''), key if scheme.lower() == b'bearer' else b'']
        return not self.key or any([hmac.compare_digest(key, self.key) for key in keys])

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 0
        path, deployment = find_path(scope['path'], self.routes)
        route = path if path in self.names else next(
            (name for known, name in self.routes.items() if known.fullmatch(path)), None)
        original = scope.get('raw_path') or scope['path'].encode()
        inner = scope | {'path': path, 'original_path': original.decode('ascii', 'replace').partition('?')[0],
                         'deployment': deployment}
        if scope['method'] == 'HEAD' and route:
            inner['method'] = 'GET'                             # the server leaves out the body

        async def send_with_id(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
                headers = message['headers'] = [*message.get('headers', [])]
                if b'x-request-id' not in dict(headers):        # upstream's
                    headers.append((b'x-request-id', uuid.uuid4().hex.encode()))
            await send(message)
        app = self.app
        if route not in OPEN and not self.is_authorized(dict(scope['headers'])):
            app = self.reject(401, 'the key is wrong or missing: Authorization: Bearer ..., or api-key: ...',
                              path)
        try:
            await app(inner, receive, send_with_id)
        finally:
            route = route or 'other'                            # or metrics grow without end
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)


def allow_origins(app, origins):
    """the application, with CORS for a list of origins; ['*'] for all."""
    return CORSMiddleware(app, allow_origins=origins, allow_methods=['*'], allow_headers=['*'],
                          expose_headers=['x-request-id', 'x-answered-by', 'x-tokens-cut', 'x-ignored'])
