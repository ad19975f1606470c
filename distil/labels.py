"""Records from labels that exist already: from people, from a panel, from an API that returns probabilities.

    python extract.py config/tweets.py                      # it sets labels = 'data/tweets/input.jsonl'
    python extract.py config/mine.py --labels=mine.jsonl

No teacher is run, only its tokenizer is needed. A line has the probability of each value, or the answer:

    {"text": "...", "probabilities": {"sentiment": {"positive": 0.7, "neutral": 0.2, "negative": 0.1}}}
    {"text": "...", "answer": {"sentiment": "positive"}}

The stored logits are those of a teacher with exactly these probabilities: at each decision, the probability
of a token is the sum over the values that it leads to. Only each field's own (marginal) probabilities are
known, so a field is assumed to be independent of the fields before it.
"""
import json
import math

import numpy as np

from distil.space import value_names

ILLEGAL_LOGIT = -30.0   # logit of a token that the schema forbids: a probability of 1e-13
MIN_PROBABILITY = 1e-6  # smallest probability of a legal token


def read_probabilities(given, values):
    """probabilities of a field's values, in their order: a list with sum 1. given: {value: weight >= 0}, or
    one of the values. ValueError if it is neither."""
    names = value_names(values)
    if not isinstance(given, dict):  # one of the values
        given = {name: 1 for name, value in zip(names, values) if json.dumps(value) == json.dumps(given)}
    valid = all(name in names and type(p) in (int, float) and 0 <= p < math.inf for name, p in given.items())
    if not valid or not sum(given.values()):
        raise ValueError
    total = sum(given.values())
    return [given.get(name, 0) / total for name in names]


def record_from_label(space, label):
    """a line as dict -> output indices (n,) of its most probable answer, and logits (n, V) float32. None if a
    field is missing or has a value that the schema does not have. If a field is in "probabilities" and in
    "answer", its probabilities are used."""
    known = {}
    for part in ('answer', 'probabilities'):
        known |= label.get(part) if isinstance(label.get(part), dict) else {}
    try:
        probabilities = {name: read_probabilities(known[name] if len(values) > 1 else values[0], values)
                         for name, values in space.fields.items()}
    except (KeyError, ValueError):
        return None
    outs = space.from_json({name: values[int(np.argmax(probabilities[name]))]
                            for name, values in space.fields.items()})
    rows = {}                                                   # {state: {output index: probability}}
    for name in space.fields:
        rows |= space.token_shares(name, probabilities[name])
    logits = np.full((len(outs), len(space.output_ids)), ILLEGAL_LOGIT, np.float32)
    for n, (state, out) in enumerate(zip(space.states_before(outs), outs)):
        for token, p in rows.get(state, {out: 1.0}).items():
            logits[n, token] = math.log(max(p, MIN_PROBABILITY))
    return outs, logits
