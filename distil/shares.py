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


def label_shares(space, label, schema=None):
    """({path: probabilities of its values}, {state: {output index: probability}} at the decisions of these leaves)
    of a label, a dict. schema: of the leaves that it has; None: all. ValueError as for Schema.read_label."""
    probabilities, shares = (schema or space.schema).read_label(label), {}
    for path in probabilities:
        shares |= space.token_shares(path, probabilities[path])
    return probabilities, shares


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
    shares = (label_shares(space, label, schema)[1] for label in labels)
    return [{state: torch.from_numpy(logits_of(row, V)) for state, row in of_label.items()} for of_label in shares]


def record_from_label(space, label):
    """a label as dict -> output indices (n,) of its most probable answer, and logits (n, V) float32. None if a
    field is missing or has a value that the schema does not have."""
    try:
        probabilities, shares = label_shares(space, label)
    except ValueError:
        return None
    outs = space.from_json(space.schema.build([int(np.argmax(p)) for p in probabilities.values()]))
    rows = [shares.get(state, {out: 1.0}) for state, out in zip(space.states_before(outs), outs)]
    return outs, np.stack([logits_of(row, len(space.output_ids)) for row in rows])
