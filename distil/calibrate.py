"""Calibration: the bias that a teacher has whatever the text, measured and subtracted. (Batch calibration,
Zhou et al. 2023, https://arxiv.org/abs/2309.17249.)

A language model that labels is biased: to the words of the last example in its prompt, to the more common
word. At each decision of the answer's automaton (space.py) the mean probability of every legal token over a
few hundred texts measures that bias. The prior is the true share of each value, so far as it is known. With

    bias = log(mean / prior)        logits - bias

the bias is subtracted, and what remains depends on the text. extract.py measures it once, before it stores
anything. The bias is kept in meta.json and in space.bias; the stored logits are those before subtraction.

It is one step, as in the paper: the mean comes nearer to the prior without reaching it. (Repeated steps until
the mean equals the prior were no better, docs/results.md, and depended more on which texts were used.)

A teacher behind a URL tells probabilities of values, not logits: there the same is done value by value, before
the answer is stored.
"""
import json
import math
from collections import Counter
from contextlib import suppress
from itertools import chain

import numpy as np
import torch

from config import data_line
from data import write_json
from distil.copying import Copier
from distil.schema import Schema
from distil.values import PRESENT, json_text, said
from distil.free import open_free
from distil.shares import find_known

# -----------------------------------------------------------------------------
# the prior


def find_priors(schema, prior, only):
    """{path of a choice: probabilities of its values, in their order} of the fields to calibrate. Values that the
    prior does not name share the rest of the probability evenly; without a prior all are equal.

    schema: a Schema; a field is the path of one of its leaves. prior: {field: {value: probability}}; of a list of
    values {field: {value: share of the texts that have it}}, with all values. only: the fields to calibrate, [] for
    all that are no lists of values, and those with a prior. ValueError if a field or a value is not in the schema, or
    if the probabilities cannot sum to 1.
    """
    priors = {}
    for leaf in map(schema.leaf, {**prior, **dict.fromkeys(only)}):
        known = prior.get(leaf.path, {})
        if leaf.is_list and len(leaf.choices[0]) == 2 and PRESENT in leaf.choices[0].values:
            priors |= list_priors(leaf, known)
            continue
        given = {json_text(value): p for value, p in known.items()} if isinstance(known, dict) else None
        if given is None or not all(type(p) in (int, float) and 0 < p <= 1 for p in given.values()):
            raise ValueError(f'{leaf.path!r} needs {{value: share above 0}}, not {known!r}')
        if unknown := [value for value in known if json_text(value) not in leaf.texts]:
            raise ValueError(f'{leaf.path!r} has no value {json.dumps(unknown[0], ensure_ascii=False)}')
        rest, n = 1 - sum(given.values()), len(leaf) - len(given)
        if rest < -1e-6 or (rest > 1e-6) != (n > 0):
            raise ValueError(f'{leaf.path!r}: the named shares sum to {1 - rest:g}; all shares together must be 1')
        priors |= {choice.path: [given.get(text, rest / max(1, n)) for text in leaf.texts] for choice in leaf.choices}
    for choice in schema.choices:                               # without a prior
        if PRESENT not in choice.values:
            priors.setdefault(choice.path, [1 / len(choice)] * len(choice))
    return {path: p for path, p in priors.items() if not only or schema.by_choice[path].group in only}


def list_priors(leaf, known):
    """the same of a list of values. known: {value: share of the texts that have it}."""
    given = {json_text(value): p for value, p in known.items()} if isinstance(known, dict) else {}
    missing = [name for name, text in zip(leaf.names, leaf.texts) if not 0 < given.get(text, 0) < 1]
    if missing or len(given) > len(leaf) or not leaf.values:
        raise ValueError(f'{leaf.path!r} is a list: its prior needs {{value: share of the texts that have it, between '
                         f'0 and 1}} for each of its values, so also for {", ".join(missing[:3]) or "no other value"}')
    return {choice.path: [1 - given[text], given[text]] for choice, text in zip(leaf.choices, leaf.texts)}


# -----------------------------------------------------------------------------
# the bias


@torch.inference_mode()
def learn_bias(teacher, space, texts, after, priors, batch_size=64, min_texts=16, known=None, free=None):
    """measures the bias decision by decision, each after the calibrated choices at the ones before. The cost
    is that of answering these texts.

    teacher: a Teacher. texts: list of id arrays; after: ids between text and answer. priors: from
    find_priors. Sets space.bias. Returns it as {state: {output index: bias}}, and a report: for each state of
    a calibrated field (state, number of texts that reach it, {output index: share of these texts whose choice
    it is} before calibration, the same after it). A state that fewer than min_texts reach is not calibrated.
    known, free: as for engine.answer.

    All texts that reach a state must be read there before any of them continues. So the next state is always
    the one with the longest path left: no text that waits at another state can still reach it.
    """
    prior_at, copier = space.token_shares(priors), None         # {state: {output index: prior}}
    if space.schema.copied:                                     # where a value begins or ends there is none
        copier = Copier(space, texts)
        for state in space.copy_at:
            prior_at.pop(state, None)
            prior_at.pop(space.state_after([space.place_symbol(state)], state), None)
    n_left, bias, report = space.n_left, {}, []
    forced, first = space.forced_runs[0]
    states, n_read = [first] * len(texts), [0] * len(texts)     # of each text: its next decision; tokens read
    begin = [] if free else [space.output_ids[o] for o in forced]
    unread = [[*map(int, text), *after, *begin] for text in texts]
    teacher.allocate(len(texts), max(map(len, unread)) + space.max_answer + (free.room if free else 0))
    for k in range(0, len(texts) if free else 0, batch_size):
        part = slice(k, k + batch_size)
        free.write(teacher, unread, n_read, range(len(texts))[part])
    while (state := max(states, key=n_left.__getitem__)) != space.done:
        rows = [i for i, waiting in enumerate(states) if waiting == state]
        if state in space.copy_at:
            for batch in (rows[k:k + batch_size] for k in range(0, len(rows), batch_size)):
                for i, written in copier.write(teacher, state, batch, unread, n_read).items():
                    forced, states[i] = space.forced_runs[space.state_after(written, state) if written else space.done]
                    unread[i] = [space.output_ids[o] for o in (*written[-1:], *forced)]
            continue
        outs, parts = list(space.transitions[state]), []        # the legal output indices
        for batch in (rows[k:k + batch_size] for k in range(0, len(rows), batch_size)):
            teacher.reserve(max(n_read[i] + len(unread[i]) for i in batch))
            hidden = teacher.read(batch, [unread[i] for i in batch], [n_read[i] for i in batch])
            last = np.cumsum([len(unread[i]) for i in batch]) - 1
            parts.append(teacher.logits(hidden[last], teacher.kept_head[outs]).cpu())
        logits = torch.cat(parts).double()                      # (n, legal)
        for n, i in enumerate(rows):
            if known and state in known[i]:
                logits[n] = known[i][state][outs]
            if copier:
                logits[n, [outs.index(o) for o in copier.barred(i, state)]] = -math.inf
        shift = torch.zeros(len(outs), dtype=torch.float64)     # (legal,) the bias at this state
        if state in prior_at and len(rows) >= min_texts:
            prior = torch.tensor([prior_at[state][o] for o in outs], dtype=torch.float64)
            shift = (logits.softmax(-1).mean(0) / prior).log()
            bias[state] = dict(zip(outs, shift.tolist()))
            counts = [np.bincount(x.argmax(-1), minlength=len(outs)) for x in (logits, logits - shift)]
            report.append((state, len(rows), *(dict(zip(outs, c / len(rows))) for c in counts)))
        for i, k in zip(rows, (logits - shift).argmax(-1).tolist()):
            forced, states[i] = space.forced_runs[space.transitions[state][outs[k]]]
            n_read[i] += len(unread[i])
            unread[i] = [space.output_ids[o] for o in (outs[k], *forced)]
    space.set_bias(bias)
    return bias, report


def calibrate_teacher(engine, space, meta, sample, priors, batch_size):
    """measures the bias of a teacher on the Texts of a sample, prints it, and returns {'bias': it} for meta.json. It is
    subtracted where the teacher chooses and where the student learns; the stored logits stay raw."""
    print(f'measuring the teacher\'s bias on {len(sample)} texts')
    known = find_known(space, [text.given for text in sample], meta)
    bias, report = learn_bias(engine, space, [text.ids.tolist() for text in sample], meta['after'], priors, batch_size,
                              known=known, free=open_free(space, meta))
    print_bias(report, space)
    return {'bias': bias}


def print_bias(report, space):
    """prints a line for each calibrated field: the share of texts for which the teacher chooses each value,
    before and after calibration. report: from learn_bias."""
    seen = set()
    for state, n, before, after in report:
        field = space.leaf_at[state]
        if field in seen:  # a later decision of the same value
            continue
        seen.add(field)
        names, k = {}, space.labels[state][0][0]                # {output index: values that begin with it}
        entry = next(entry for fork, entry in space.entries if fork == k)
        for way, steps in zip(space.forks[k], space.steps(k, entry)):
            path, number = way.made[-1]
            value = space.schema.by_choice[path].values[number]
            name = path.rpartition('.')[2] if value is PRESENT else said(value).strip('"')
            names.setdefault(steps[0][1][0], []).append(name)
        top = sorted(names, key=lambda out: -before[out] - after[out])[:8]
        shares = [','.join(f'{"|".join(names[out][:2])}:{share[out]:.2f}' for out in top).replace(' ', '_')
                  for share in (before, after)]
        print(data_line('calibrate', {'field': field, 'texts': n, 'before': shares[0], 'after': shares[1]}))


# -----------------------------------------------------------------------------
# of answers that are probabilities of values, from a server


def calibrate_label(label, bias):
    """a label (see labels.py) with the bias subtracted from the log probabilities of its values. bias:
    {field: {value: bias}}. A bare answer stays what it is."""
    if not bias or 'probabilities' not in label:
        return label
    return label | {'probabilities': label['probabilities'] | {
        name: {value: p * math.exp(-bias[name][value]) for value, p in label['probabilities'][name].items()}
        for name in bias if name in label['probabilities']}}


def learn_value_bias(labels, schema, priors):
    """{field: {value: log(mean probability / prior)}} of labels with probabilities. One text more, with the
    prior's probabilities, counts among them: what was never seen has no infinite bias. priors: from
    find_priors."""
    bias = {}
    for name, prior in priors.items():
        if name in schema.by_path and len(prior) > 1:           # not of lists: their values come one by one
            names, prior = schema.leaf(name).names, np.array(prior)
            known = [label['probabilities'][name] for label in labels if name in label['probabilities']]
            p = np.array([[of_text[value] for value in names] for of_text in known]).reshape(-1, len(names))
            bias[name] = dict(zip(names, np.log((p.sum(0) + prior) / (len(p) + 1) / prior).tolist()))
    return bias


def calibrated_answers(ask, groups, folder, meta, priors):
    """yields what ask(groups) yields, lists of (hash, ids, label or reason), with the bias subtracted that the
    first meta['calibrate']['texts'] answers show. Sets meta['value_bias'].

    Nothing can be stored before the bias is known. So the first answers are kept in the folder's
    calibrate.jsonl as they come: a run that is killed does not pay for them twice.
    """
    path, bias, waiting, again = folder / 'calibrate.jsonl', meta.get('value_bias'), [], []
    lines = path.read_text().splitlines() if path.exists() else []
    # by hash; a text without an answer may get one now
    kept = {line[0]: line for line in map(read_line, lines) if line and isinstance(line[2], dict)}

    def unknown():                                              # the texts to ask about
        for group in groups:
            again.extend(kept[hash_] for hash_, *_ in group if hash_ in kept)
            if rest := [text for text in group if text[0] not in kept]:
                yield rest

    first = list(kept.values())
    with open(path, 'a') as file:
        file.write('\n' if lines else '')                       # the last line may be cut off
        for group in chain(ask(unknown()), [None]):             # None: the end
            if group and bias is None:
                file.writelines(json.dumps([hash_, list(map(int, ids)), label]) + '\n' for hash_, ids, label in group)
                file.flush()
                first += group
            waiting += group or []
            while again:
                waiting.append(again.pop())
            if bias is None and (group is None or len(first) >= meta['calibrate']['texts']):
                labels = [label for _, _, label in first if 'probabilities' in label]
                schema = Schema(meta['fields'], meta.get('left_out'))
                bias = meta['value_bias'] = learn_value_bias(labels, schema, priors) if labels else {}
                write_json(folder / 'meta.json', meta)
                print_value_bias(labels, bias)
            if waiting and bias is not None:
                yield [(hash_, ids, calibrate_label(label, bias)) for hash_, ids, label in waiting]
                waiting = []


def read_line(line):
    """[hash, ids, label] of a line of calibrate.jsonl; None if a kill cut it off."""
    with suppress(ValueError):
        return json.loads(line)


def print_value_bias(labels, bias):
    """prints a line for each calibrated field: the share of labels in which each value is the likeliest one, before
    and after calibration."""
    if not bias:
        print('calibrate: the server tells no probabilities, so there is nothing to calibrate')
    for name in bias:
        shares = []
        for of in labels, [calibrate_label(label, bias) for label in labels]:
            known = [label['probabilities'][name] for label in of if name in label['probabilities']]
            count = Counter(max(p, key=p.get) for p in known)
            top = ','.join(f'{value}:{n / len(known):.2f}' for value, n in count.most_common(8))
            shares.append(top.replace(' ', '_'))
        print(data_line('calibrate', {'field': name, 'texts': len(labels), 'before': shares[0], 'after': shares[1]}))
