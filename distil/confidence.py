"""What a student is sure of: the probability of an answer's values, of all values, of places of the text.

    (outs, decisions), = decode(student, space, [ids])
    confidence_of(space.schema.paths, decisions)                    # {'tone': 0.93}
    value_probabilities(student, space, ids, outs, decisions)       # {'tone': [0.07, 0.93]}

The decisions of decode.py have the logits of what the answer comes to; where others are needed, one more pass reads the
text once and what leads to each of them. V: output vocabulary, T: tokens of a text.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from distil.decode import Cache, count_kept, pad_rows
from distil.places import place_input
from distil.reader import read_pages
from distil.space import Outs


def confidence_of(paths, decisions, temperature=None):
    """{field: probability of the chosen value}, of the student constrained to the schema, given the fields before. It is
    the product, along the value's tokens, of the softmax over the legal tokens. paths: of all leaves, which name the
    fields; decisions: of one answer, [(field, logits (V,), -inf where illegal, output index chosen)]. temperature:
    {field: number that its logits are divided by}, see agreement.fit_temperature."""
    log_p = dict.fromkeys(paths, 0.0)
    for name, logits, choice in decisions:
        log_p[name] += (logits / (temperature or {}).get(name, 1.0)).log_softmax(-1)[choice].item()
    return {name: math.exp(p) for name, p in log_p.items()}


@torch.no_grad()
def value_probabilities(student, space, ids, outs, decisions, temperature=None):
    """{path of a choice: [probability of each of its values, in their order]} for one answer, of the student
    constrained to the schema, given its own answers before; of the choices that the answer comes to. The chosen value's
    is that of confidence_of, where a field is one choice.

    ids: of the text; outs, decisions: as decode yields them for it with constrain. The probability of an option of a
    fork (space.py) is the product, along its tokens, of the softmax over the possible tokens; that of a value is the
    sum over the options that make this choice, among those that agree with the answer in the choices before. Some
    options have decisions that are not on the path of the answer: one more pass computes the logits of these.
    """
    filled = [(start, end, 1 if value in (None, '') else value) for start, end, value in getattr(outs, 'spans', ())]
    states, answer = space.states_before(outs), space.to_json(Outs(outs, filled))  # a number that the text lacks: any
    chosen = [n for n, state in enumerate(states) if space.decides[state]]
    known = {states[n]: logits for n, (_, logits, _) in zip(chosen, decisions)}  # (V,) by state
    walked, start, missing = space.walk(answer), len(space.start), {}
    plans = [plan_fork(space, k, entry) for k, entry, _ in walked]
    for (k, _, n), plan in zip(walked, plans):
        missing |= {state: outs[:start] + before for state, before in plan.states.items() if state not in known}
        start += len(space.forks[k][n].tokens)
    (text,), (page,) = read_pages(student, space, [ids])
    if missing:
        fed = [begin_row(space, page, outs, begun) for begun in missing.values()]
        rows = read_rows(student, text, fed)                    # (n, V)
        if page:                                                # a value begins at one of its places
            rows[:, space.V + 1:][:, ~torch.from_numpy(page.begins)] = -math.inf
        known |= dict(zip(missing, rows))
    result = {choice.path: [1.0] for choice in space.schema.choices if len(choice) == 1}  # a constant is certain
    for (k, _, n), plan in zip(walked, plans):
        p, ways = plan.measure([known[state] / (temperature or {}).get(space.leaf_at[state], 1.0) for state in plan.states],
                               space.V), space.forks[k]
        for i, (path, _) in enumerate(ways[n].made):
            row = [0.0] * len(space.schema.by_choice[path])
            for way, q in zip(ways, p):
                if way.made[:i] == ways[n].made[:i]:
                    row[way.made[i][1]] += q
            result[path] = [q / sum(row) for q in row]
    return {choice.path: result[choice.path] for choice in space.schema.choices if choice.path in result}


@dataclass
class Plan:
    """how the probabilities of the options of a fork follow from logits. states: {state: the option's tokens before}, S of
    them. A sum is one of probabilities of some tokens in one state: row (P,) of which; able (P, V + 1) bool, of what:
    column V is a place, any of them. taken, possible (options, steps): the sums by which an option's probability is
    multiplied and divided; P where it has no more steps."""
    states: dict
    row: object
    able: object
    taken: object
    possible: object

    def measure(self, rows, V):
        """[probability] of the options. rows: S times logits (V,), or (V + 1 + T,) with places; -inf where illegal."""
        rows = torch.stack([torch.cat((row[:V], row[V:].logsumexp(0, keepdim=True))) for row in rows])  # (S, V + 1)
        sums = rows[self.row].masked_fill(~self.able, -math.inf).logsumexp(1)  # (P,)
        sums = torch.cat((sums, sums.new_zeros(1)))
        return (sums[self.taken] - sums[self.possible]).sum(1).exp().tolist()


@lru_cache(maxsize=10_000)
def plan_fork(space, k, entry):
    """the Plan of fork k of an OutputSpace, reached in the state `entry`."""
    states, sums, options = {}, {}, []
    for steps in space.steps(k, entry):
        for state, *_, before in steps:
            states.setdefault(state, [*before])
        options.append([[sums.setdefault((state, some), len(sums)) for some in (taken, possible)]
                        for state, taken, possible, _ in steps])
    numbers = {state: n for n, state in enumerate(states)}
    able = torch.zeros(len(sums), space.V + 1, dtype=torch.bool)
    for n, (_, some) in enumerate(sums):
        able[n, [min(out, space.V) for out in some]] = True
    most = max(map(len, options))
    table = torch.tensor([steps + [[len(sums)] * 2] * (most - len(steps)) for steps in options]).view(len(options), most, 2)
    return Plan(states, torch.tensor([numbers[state] for state, _ in sums], dtype=torch.long), able, *table.unbind(2))


def begin_row(space, page, outs, begun):
    """what a student reads of the beginning of an answer, a list of output indices: the start token and these; with a
    Page of the text the decisions alone, and places as place_input says. outs: the whole answer."""
    if page is None:
        return [space.V, *begun]
    # a number that the text lacks points to token 0, see mask_illegal
    tokens = [(0 if value is None else page.token_of(at, is_last), is_last) for start, end, value in outs.spans
              for at, is_last in ((start, False), (end, True))]
    places = (place_input(space.V, token, is_last) for token, is_last in tokens)
    decided = [out for out, state in zip(begun, space.states_before(begun)) if space.decides[state]]
    return [space.V, *(out if out < space.V else next(places) for out in decided)]


def read_rows(student, text, fed):
    """logits after the last token of each of several rows: (V,) each, or (V + 1 + T,) with places. text: as the student
    reads it, once; fed: lists, of begin_row."""
    device, cache, start = student.lm_head.weight.device, Cache(student), fed[0][:1]
    cache.begin_pass([0], [0])
    first = student(pad_rows([text], device), pad_rows([start], device), cache, only_last=True)  # (1, V)
    rest = [n for n, row in enumerate(fed) if len(row) > 1]
    logits = first.expand(len(fed), -1)
    if rest:
        cache.repeat(len(rest))
        cache.begin_pass(range(len(rest)), [count_kept(student, text) + 1] * len(rest))
        none = torch.zeros(0, len(text), dtype=torch.long, device=device)
        more = student(none, pad_rows([fed[n][1:] for n in rest], device), cache, only_last=True)
        logits = logits.index_copy(0, torch.tensor(rest, device=device), more)
    return logits.float().cpu()


@torch.no_grad()
def span_probabilities(student, space, ids, outs, decisions, temperature=None, most=5):
    """{path of a copied value: [(start, end, value, probability)]} of one answer, the likeliest ones first: of those
    that begin at one of the `most` likeliest places, each with its likeliest end, given the student's answer before.
    ids, outs, decisions: as decode yields them for it, with constrain."""
    (text,), (page,) = read_pages(student, space, [ids])
    states, V, tau, found = space.states_before(outs), space.V, temperature or {}, {}
    logits_at = dict(zip([n for n, state in enumerate(states) if space.decides[state]], decisions))
    for n in [n for n, out in enumerate(outs) if out >= V][::2]:
        part = space.copy_at[states[n]]
        p = (logits_at[n][1] / tau.get(part.group, 1.0)).softmax(-1)[V + 1:]  # (T,) of each first place
        firsts = [first for first in p.topk(min(most, len(p))).indices.tolist() if p[first] > 0]
        begun, spans = begin_row(space, page, outs, outs[:n]), []
        fed = [[*begun, place_input(V, first, False)] for first in firsts]
        for first, row in zip(firsts, read_rows(student, text, fed)):
            able = page.lasts(part, first)
            q = (row[[V + 1 + last for last in able]] / tau.get(part.group, 1.0)).softmax(-1)
            spans.append((*page.span(part, first, able[int(q.argmax())]), (p[first] * q.max()).item()))
        found[part.path] = sorted(spans, key=lambda span: -span[3])
    return found
