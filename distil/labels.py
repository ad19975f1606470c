"""Records from labels that are there already: from people, a panel, an API that gives probabilities.

    python extract.py config/tweets.py                      # labels = 'data/tweets/input.jsonl' is in there
    python extract.py config/mine.py --labels=mine.jsonl

No teacher is run, only its tokenizer is needed. A line says how likely each value is, or which it is:

    {"text": "...", "probabilities": {"sentiment": {"positive": 0.7, "neutral": 0.2, "negative": 0.1}}}
    {"text": "...", "answer": {"sentiment": "positive"}}

What is stored are the logits a teacher of just these probabilities would have: at each decision a token has
the probabilities of the values it leads to, summed. Only each field's own (marginal) probabilities are known,
so a later field is taken not to depend on the ones before.
"""
import json
import math

import numpy as np

from distil.space import value_name

NEVER = -30.0  # logit of a token that the schema forbids: a probability of 1e-13
LEAST = 1e-6   # probability of a legal token that nobody chose


def read_probabilities(given, values):
    """probabilities of a field's values, in their order, from a JSON object or a constant; ValueError where
    it is neither."""
    names = [value_name(value) for value in values]
    if not isinstance(given, dict):  # an answer
        given = {name: 1 for name, value in zip(names, values) if json.dumps(value) == json.dumps(given)}
    right = all(name in names and type(p) in (int, float) and 0 <= p < math.inf for name, p in given.items())
    if not right or not sum(given.values()):
        raise ValueError
    total = sum(given.values())
    return [given.get(name, 0) / total for name in names]


def record_from_label(space, label):
    """a line as dict -> output indices (n,) of its likeliest answer, and logits (n, V) float32; None where it
    does not say, for each field, how likely the schema's values are."""
    known = {}
    for part in ('answer', 'probabilities'):
        known |= label.get(part) if isinstance(label.get(part), dict) else {}
    try:
        chances = {name: read_probabilities(known[name] if len(values) > 1 else values[0], values)
                   for name, values in space.fields.items()}
    except (KeyError, ValueError):
        return None
    outs = space.from_json({name: values[int(np.argmax(chances[name]))]
                            for name, values in space.fields.items()})
    rows = {state: row for name in space.fields for state, row in space.token_shares(name, chances[name]).items()}
    logits = np.full((len(outs), len(space.output_ids)), NEVER, np.float32)
    for n, (state, out) in enumerate(zip(space.states_before(outs), outs)):
        for token, p in rows.get(state, {out: 1.0}).items():
            logits[n, token] = math.log(max(p, LEAST))
    return outs, logits
