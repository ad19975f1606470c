"""What /metrics shows."""
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """what /metrics shows (https://prometheus.io/docs/practices/naming). Several students share it."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def new(kind, key, text, labels=(), **more):
            return kind(f'student_{key}', text, labels, registry=self.registry, **more)

        def new_of_model(kind, key, text, labels=(), **more):
            return new(kind, key, text, ['model', *labels], **more)
        self.requests = new(Counter, 'requests', 'requests answered', ['route', 'status'])
        self.seconds = new(Histogram, 'request_seconds', 'from the first byte to the last', ['route'],
                           buckets=[.002, .005, .01, .02, .05, .1, .25, .5, 1, 2.5, 10])
        self.passed_on = new(Counter, 'passed_on',
                             'requests passed on to upstream, as the student refuses them',
                             ['why'])
        self.batch = new_of_model(Histogram, 'batch_texts', 'texts decoded together',
                                  buckets=[2 ** k for k in range(9)])
        self.waiting = new_of_model(Gauge, 'waiting_texts', 'texts under way')
        self.texts = new_of_model(Counter, 'texts', 'texts answered', ['by'])
        self.cut = new_of_model(Counter, 'texts_cut', 'texts of which the student read only the beginning')
        self.values = new_of_model(Counter, 'values', 'answers', ['field', 'value'])
        self.audited = new_of_model(Counter, 'audited_texts', 'texts that student and upstream both answered')
        self.agreement = new_of_model(
            Gauge, 'agreement', 'share of audited texts on which student and upstream agree; low and '
            'high: its 95 % interval', ['field', 'end'])
        self.deferring = new_of_model(
            Gauge, 'deferring', '1 while everything goes upstream, as a field agrees rarely')
