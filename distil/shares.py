"""Between the probabilities of values and the logits of tokens: labels as records.

    outs, logits = record_from_label(space, {'probabilities': {'tone': {'neutral': 0.3, 'friendly': 0.7}, ...}})

The logits are those of a teacher with exactly these probabilities: at each decision, the probability of a token is
the sum over the values that it leads to. Only each field's own (marginal) probabilities are known, so a field is
assumed to be independent of the fields before it.
"""
import math

import numpy as np
import torch

ILLEGAL_LOGIT = -30.0   # logit of a token that the schema forbids: a probability of 1e-13
MIN_PROBABILITY = 1e-6  # smallest probability of a legal token


def logits_of(shares, V):
    """{output index: probability} -> logits (V,) float32."""
    row = np.full(V, ILLEGAL_LOGIT, np.float32)
    for token, p in shares.items():
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


def best_answer(schema, probabilities):
    """the answer of the most probable values. probabilities: {path of a choice: list}."""
    return schema.fill(lambda choice: int(np.argmax(probabilities[choice.path])))


def record_from_label(space, label):
    """a label as dict -> output indices (n,) of its most probable answer, and logits (n, V) float32. None if a
    field is missing or has a value that the schema does not have."""
    try:
        probabilities = space.schema.read_label(label)
    except ValueError:
        return None
    answer = best_answer(space.schema, probabilities)
    outs, entries = space.from_json(answer), [(k, state) for k, state, _ in space.walk(answer)]
    shares = space.token_shares(probabilities, entries)
    rows = [shares.get(state, {out: 1.0}) for state, out in zip(space.states_before(outs), outs)]
    return outs, np.stack([logits_of(row, len(space.output_ids)) for row in rows])
