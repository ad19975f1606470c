"""The teacher's habit: what it likes to say whatever the text, measured and taken off. (Batch calibration,
Zhou et al. 2023, https://arxiv.org/abs/2309.17249.)

A language model that labels has favourites: the words of the last example, the commoner word. At each
decision of the answer's automaton (space.py) the mean probability of every legal token over a few hundred
texts is that habit. If the values' true shares are the prior's, then

    bias = log(mean / prior)        logits - bias

has the habit taken off, and what is left depends on the text. extract.py does this once, before anything is
stored; the bias goes to meta.json and into space.bias, the stored logits stay as they were.

It is one step, as in the paper, and the mean comes nearer to the prior without reaching it. (Repeated until
the mean is the prior it was no better, docs/results.md, and hung more on which texts were asked.)
"""
import json

import numpy as np
import torch


def find_priors(fields, prior, only):
    """{field: probabilities of its values, in their order} of the fields to calibrate: uniform, or as prior
    says; values it leaves out share the rest. prior: {field: {value: probability}}; only: names of fields, []
    is all. ValueError where one of them is not in the schema, or a prior cannot be."""
    for name in [*prior, *only]:
        if name not in fields:
            raise ValueError(f'there is no field {name!r}; there are: {", ".join(fields)}')
    priors = {}
    for name in only or fields:
        values, known = fields[name], prior.get(name, {})
        text = [json.dumps(value) for value in values]
        given = {json.dumps(value): p for value, p in known.items()} if isinstance(known, dict) else None
        if given is None or not all(type(p) in (int, float) and 0 < p <= 1 for p in given.values()):
            raise ValueError(f'{name!r} needs {{value: share above 0}}, not {known!r}')
        if unknown := [value for value in given if value not in text]:
            raise ValueError(f'{name!r} has no value {unknown[0]}')
        rest, n = 1 - sum(given.values()), len(values) - len(given)
        if rest < -1e-6 or (rest > 1e-6) != (n > 0):
            raise ValueError(f'{name!r}: shares sum to {1 - rest:g}; all together, named or not, must be 1')
        priors[name] = [given.get(value, rest / max(1, n)) for value in text]
    return priors


def longest(space):
    """for each state the number of tokens of the longest way to the end of the answer."""
    left = {space.done: 0}

    def find(state):
        if state not in left:
            left[state] = 1 + max(map(find, space.transitions[state].values()))
        return left[state]
    return [find(state) for state in range(len(space.transitions))]


@torch.inference_mode()
def learn_bias(teacher, space, texts, after, priors, batch_size=64, few=16):
    """Asks the texts, decision by decision: a later one is asked after the calibrated answers before it.

    teacher: a Teacher. texts: list of id arrays; after: ids between text and answer. priors: from
    find_priors. Sets space.bias, and returns it as {state: {output index: bias}} and, for each state that
    belongs to a calibrated field, (state, number of texts that came there, {output index: share of them} by
    its own choice, and by the calibrated one).

    All texts that reach a state are asked there before any goes on; among the states where some wait, none
    with the longest way to go can be reached from another. A state that fewer than `few` reach is left as it
    is. The cost is that of answering these texts.
    """
    due = {state: row for name, p in priors.items() for state, row in space.token_shares(name, p).items()}
    left, bias, report = longest(space), {}, []
    run, first = space.forced_runs[0]
    where, at = [first] * len(texts), [0] * len(texts)          # the decision before each text; tokens read
    feed = [[*map(int, text), *after, *(space.output_ids[o] for o in run)] for text in texts]
    teacher.start(len(texts), max(map(len, feed)) + space.max_answer)
    while (state := max(where, key=left.__getitem__)) != space.done:
        here, outs, parts = [i for i, w in enumerate(where) if w == state], list(space.transitions[state]), []
        for some in (here[k:k + batch_size] for k in range(0, len(here), batch_size)):
            hidden = teacher.read(some, [feed[i] for i in some], [at[i] for i in some])
            last = np.cumsum([len(feed[i]) for i in some]) - 1
            parts.append(teacher.logits(hidden[last], teacher.kept_head[outs]).cpu())
        logits = torch.cat(parts).double()                      # (n, legal)
        shift = torch.zeros(len(outs), dtype=torch.float64)
        if state in due and len(here) >= few:
            prior = torch.tensor([due[state][o] for o in outs], dtype=torch.float64)
            shift = (logits.softmax(-1).mean(0) / prior).log()
            bias[state] = dict(zip(outs, shift.tolist()))
            counts = [np.bincount(x.argmax(-1), minlength=len(outs)) for x in (logits, logits - shift)]
            report.append((state, len(here), *(dict(zip(outs, c / len(here))) for c in counts)))
        for i, k in zip(here, (logits - shift).argmax(-1).tolist()):
            run, where[i] = space.forced_runs[space.transitions[state][outs[k]]]
            at[i] += len(feed[i])
            feed[i] = [space.output_ids[o] for o in (outs[k], *run)]
    space.set_bias(bias)
    return bias, report


def print_bias(report, space):
    """prints for each calibrated field how often each value was the teacher's own choice, and is now. report:
    of learn_bias."""
    first, seen = {name: values[0] for name, values in space.fields.items()}, set()
    for state, n, before, after in report:
        field = space.field[state]
        if field in seen:  # a later decision of the same value
            continue
        seen.add(field)
        names = {}
        for value in space.fields[field]:
            outs = space.from_json({**first, field: value})
            names.setdefault(outs[space.states_before(outs).index(state)], []).append(json.dumps(value).strip('"'))
        top = sorted(names, key=lambda out: -before[out] - after[out])[:8]
        said = [','.join(f'{"|".join(names[out][:2])}:{share[out]:.2f}' for out in top).replace(' ', '_')
                for share in (before, after)]
        print(f'calibrate field={field} texts={n} before={said[0]} after={said[1]}')
