"""Between the probabilities of values and the logits of tokens: labels as records.

    outs, logits = record_from_label(space, {'probabilities': {'tone': {'neutral': 0.3, 'friendly': 0.7}, ...}})

The logits are those of a teacher with exactly these probabilities: at each decision, the probability of a token is
the sum over the values that it leads to. Only each field's own (marginal) probabilities are known, so a field is
assumed to be independent of the fields before it.
"""
import math

import numpy as np
import torch

from distil.places import MOST_PLACES, Source

ILLEGAL_LOGIT = -30.0   # logit of a token that the schema forbids: a probability of 1e-13
MIN_PROBABILITY = 1e-6  # smallest probability of a legal token


def logits_of(shares, V):
    """{output index: probability} -> logits (V,) float32."""
    row = np.full(V, ILLEGAL_LOGIT, np.float32)
    for token, p in shares.items():
        if token < V:                                           # no place
            row[token] = math.log(max(p, MIN_PROBABILITY))
    return row


def find_known(space, labels, meta):
    """for each label {state: logits (V,), a tensor} at the decisions of the fields in meta['label_fields'], for
    engine.answer. None if there are no such fields."""
    if not meta.get('label_fields'):
        return None
    schema, V = space.schema.only(meta['label_fields']), len(space.output_ids)
    shares = (space.token_shares(schema.read_label(label)) for label in labels)
    return [{state: torch.from_numpy(logits_of(row, V)) for state, row in of_label.items()} for of_label in shares]


def best_answer(schema, probabilities, copies=None):
    """the answer of the most probable values. probabilities: {path of a choice: list}; copies: see Schema.fill."""
    return schema.fill(lambda choice: int(np.argmax(probabilities[choice.path])), copies)


def record_from_label(space, label, text=''):
    """a label as dict -> output indices (n,) of its most probable answer, and logits (n, V) float32; with copied values
    also their places in the text and the weights of these, (n, 8) each (data/__init__.py). None if a field is missing
    or has a value that the schema does not have. NotInText if a value cannot be copied from the text."""
    try:
        probabilities = space.schema.read_label(label)
        copies = space.schema.read_copies(label)
        answer = best_answer(space.schema, probabilities, copies)
    except (KeyError, ValueError):                              # KeyError: probabilities and answer disagree
        return None
    (outs, values), entries = space.write_outs(answer), [(k, state) for k, state, _ in space.walk(answer)]
    shares = space.token_shares(probabilities, entries)
    rows = [shares.get(state, {out: 1.0}) for state, out in zip(space.states_before(outs), outs)]
    logits = np.stack([logits_of(row, len(space.output_ids)) for row in rows])
    return (outs, logits, *find_places(space, text, outs, values, rows)) if space.schema.copied else (outs, logits)


class NotInText(Exception):
    """a value that cannot be copied. path, value: of what."""

    def __init__(self, path, value):
        super().__init__(path, value)
        self.path, self.value = path, value


def find_places(space, text, outs, values, shares):
    """(places, weights), (n, 8) each, of the copied values of an answer: all places at which a value stands share its
    probability, and the first that no earlier item of the same list has is the answer's. shares: at each step, {output
    index: probability}. NotInText if there is none."""
    source, used = Source(text, space), set()
    places = np.zeros((len(outs), MOST_PLACES), np.uint16)
    weights = np.full(places.shape, -np.inf, np.float16)
    steps, states = [n for n, out in enumerate(outs) if out >= space.V], space.states_before(outs)
    for first, last, value in zip(steps[::2], steps[1::2], values):
        part = space.copy_at[states[first]]
        spans = [span for span in source.find(part, value) if span[1] < 65536]
        if not spans:
            raise NotInText(part.group, value)
        spans = [span for span in spans if (part.group, span) not in used] or spans
        used.add((part.group, spans[0]))
        starts = [start for start, _ in spans][:MOST_PLACES]
        share = max(shares[first].get(outs[first], 1.0), MIN_PROBABILITY)  # beside null, say
        places[first, :len(starts)], weights[first, :len(starts)] = starts, math.log(share / len(starts))
        places[last, 0], weights[last, 0] = spans[0][1], 0.0
    return places, weights
