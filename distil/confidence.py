"""What a student is sure of: the probability of an answer's values, of all values, of places of the text.

    (outs, decisions), = decode(student, space, [ids])
    confidence_of(space.schema.paths, decisions)                    # {'tone': 0.93}
    value_probabilities(student, space, ids, outs, decisions)       # {'tone': [0.07, 0.93]}

The decisions of decode.py have the logits of what the answer comes to; where others are needed, more passes read the
text once and what leads to each of them. V: output vocabulary, T: tokens of a text.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from distil.decode import Cache, count_kept, pad_rows
from distil.places import place_input
from distil.reader import read_pages
from distil.space import Outs

LEAST = 1e-5  # probability of coming to a decision below which it is not asked for: its values share that


def confidence_of(paths, decisions, temperature=None):
    """{field: probability of the chosen value}, of the student constrained to the schema, given the fields before. It
    is the product, along the value's tokens, of the softmax over the legal tokens. paths: of all leaves, which name the
    fields; decisions: of one answer, [(field, logits (V,), -inf where illegal, output index chosen)]. temperature:
    {field: number that its logits are divided by}, see agreement.fit_temperature."""
    log_p = dict.fromkeys(paths, 0.0)
    for name, logits, choice in decisions:
        log_p[name] += (logits / (temperature or {}).get(name, 1.0)).log_softmax(-1)[choice].item()
    return {name: math.exp(p) for name, p in log_p.items()}


def value_probabilities(student, space, ids, outs, decisions, temperature=None):
    """{path of a choice: [probability of each of its values, in their order]} for one answer, of the student
    constrained to the schema, given its own answers before; of the choices that the answer comes to. The chosen value's
    is that of confidence_of, where a field is one choice.

    ids: of the text; outs, decisions: as decode yields them for it with constrain. The probability of an option of a
    fork (space.py) is the product, along its tokens, of the softmax over the possible tokens; that of a value is the
    sum over the options that make this choice, among those that agree with the answer in the choices before.
    """
    return all_probabilities(student, space, [(ids, outs, decisions)], temperature)[0]


@torch.no_grad()
def all_probabilities(student, space, answers, temperature=None):
    """value_probabilities of many answers, a list of (ids, outs, decisions). Some options have decisions that are not
    on the path of the answer: these are asked for in more passes, as far as they are likely at all; texts and answers
    are read once."""
    asked, read = [Values(space, outs) for _, outs, _ in answers], None
    learn(asked, [(n, state, logits.numpy()) for n, (_, _, decisions) in enumerate(answers)
                  for state, (_, logits, _) in zip(asked[n].decided, decisions)], temperature or {})
    while missing := [(n, *state) for n, values in enumerate(asked) for state in values.missing()]:
        if read is None:
            texts, pages = read_pages(student, space, [ids for ids, *_ in answers])
            read = Begun(student, texts, [begin_row(space, page, outs, outs[:-1])
                                          for page, (_, outs, _) in zip(pages, answers)])
        rows = read.ask([(n, begin_row(space, pages[n], answers[n][1], begun)) for n, _, begun in missing])
        for (n, _, _), row in zip(missing, rows):
            if pages[n]:                                        # a value begins at one of its places
                places, begins = row[space.V + 1:], pages[n].begins
                places[~np.pad(begins, (0, len(places) - len(begins)))] = -math.inf
        learn(asked, [(n, state, row) for (n, state, _), row in zip(missing, rows)], temperature or {})
    return [values.probabilities() for values in asked]


class Values:
    """the probabilities of all values of one answer, from logits of its decisions and of others that it asks for.
    decided: the states of its decisions."""

    def __init__(self, space, outs):
        filled = [(start, end, 1 if value in (None, '') else value) for start, end, value in getattr(outs, 'spans', ())]
        states, answer = space.states_before(outs), space.to_json(Outs(outs, filled))  # any number for none
        self.space, self.known = space, set()
        self.decided = [state for state in states if space.decides[state]]
        self.forks, start = [], len(space.start)            # (Plan, sums, options, the answer's one, that before it)
        for k, entry, n in space.walk(answer):
            plan, ways = plan_fork(space, k, entry), space.forks[k]
            self.forks.append((plan, plan.alike.copy(), ways, n, outs[:start]))
            start += len(ways[n].tokens)

    def missing(self):
        """[(state, output indices that lead to it)] whose logits are needed next."""
        found = {}
        for plan, sums, _, _, begun in self.forks:
            reached = plan.reach(sums, [state in self.known for state in plan.states])
            found |= {state: begun + before for (state, before), p in zip(plan.states.items(), reached)
                      if p > LEAST and state not in self.known}
        return list(found.items())

    def probabilities(self):
        """what value_probabilities returns."""
        schema = self.space.schema
        result = {choice.path: [1.0] for choice in schema.choices if len(choice) == 1}  # a constant is certain
        for plan, sums, ways, n, _ in self.forks:
            p = plan.measure(sums)
            for i, (path, _) in enumerate(ways[n].made):
                row = [0.0] * len(schema.by_choice[path])
                for way, q in zip(ways, p):
                    if way.made[:i] == ways[n].made[:i]:
                        row[way.made[i][1]] += q
                total = sum(row)
                result[path] = [q / total for q in row]
        return {choice.path: result[choice.path] for choice in schema.choices if choice.path in result}


def learn(asked, found, temperature):
    """enters logits in the sums of answers, those of one state at once. asked: a list of Values; found: (number of one
    of them, state, logits (V,), or (V + 1 + T,) with places, -inf where illegal) each; temperature: {field: number}."""
    alike = {}
    for n, state, row in found:
        asked[n].known.add(state)
        for plan, sums, *_ in asked[n].forks:
            if state in plan.states:
                some = alike.setdefault((id(plan), state, len(row)), (plan, asked[n].space, [], []))
                some[2].append(sums)
                some[3].append(row)
    for (_, state, _), (plan, space, sums, rows) in alike.items():
        rows, numbers = np.stack(rows) / temperature.get(space.leaf_at[state], 1.0), plan.of_state[state]
        nothing = np.full(len(rows), -np.inf)
        rows = np.column_stack((rows[:, :space.V], log_sum(rows[:, space.V:]), nothing))  # a place, any; nothing
        for one, new in zip(sums, log_sum(rows[:, plan.able[numbers]])):
            one[numbers] = new


def log_sum(rows):
    """logarithms (...,) of the sums of e ** rows (..., m); -inf for none."""
    most = rows.max(-1, initial=-1e30)
    with np.errstate(divide='ignore'):
        return most + np.log(np.exp(rows - most[..., None]).sum(-1))


@dataclass
class Plan:
    """how the probabilities of the options of a fork follow from logits. states: {state: the option's tokens before},
    each after that before it. A sum is one of probabilities of some tokens in one state. able (P, K): of which, the V
    tokens, a place, any of them (V), or nothing (V + 1); of_state: {state: (the numbers of its sums)}; alike (P + 1,):
    the logarithms of all sums where all tokens are alike. taken, possible (options, steps): the sums by which an
    option's probability is multiplied and divided; P where it has no more steps. parents: for each state that before
    it, or None, and the two sums that lead from there."""
    states: dict
    able: object
    of_state: dict
    alike: object
    taken: object
    possible: object
    parents: list

    def reach(self, sums, known):
        """the probabilities of coming to each of the states; 0 behind one that is not known, a list of bool."""
        p = []
        for parent, taken, possible in self.parents:
            p.append(1.0 if parent is None else known[parent] and p[parent] * math.exp(sums[taken] - sums[possible]))
        return p

    def measure(self, sums):
        """[probability] of the options."""
        return np.exp((sums[self.taken] - sums[self.possible]).sum(1)).tolist()


@lru_cache(maxsize=10_000)
def plan_fork(space, k, entry):
    """the Plan of fork k of an OutputSpace, reached in the state `entry`."""
    states, sums, options, parents = {}, {}, [], {}
    for steps in space.steps(k, entry):
        option, before_it = [], (None, 0, 0)
        for state, taken, possible, before in steps:
            states.setdefault(state, [*before])
            parents.setdefault(state, before_it)
            option.append([sums.setdefault((state, some), len(sums)) for some in (taken, possible)])
            before_it = list(states).index(state), *option[-1]
        options.append(option)
    most, wide = max(map(len, options)), max([len(some) for _, some in sums], default=0)
    able = [[min(out, space.V) for out in some] + [space.V + 1] * (wide - len(some)) for _, some in sums]
    able, of_state = np.array(able, int).reshape(len(sums), wide), {}
    for (state, _), number in sums.items():
        of_state.setdefault(state, []).append(number)
    table = [steps + [[len(sums)] * 2] * (most - len(steps)) for steps in options]
    taken, possible = np.moveaxis(np.array(table, int).reshape(len(options), most, 2), 2, 0)
    alike = np.append(np.log((able <= space.V).sum(1)), 0.0)
    return Plan(states, able, of_state, alike, taken, possible, [parents[state] for state in states])


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


class Begun:
    """texts that a student has read, each with a row, and other rows of these texts, which may begin as that does.
    texts: lists, as the student reads them; rows: what is fed after each of them: the start token first."""

    def __init__(self, student, texts, rows):
        self.student, self.device, self.cache, self.rows = student, student.lm_head.weight.device, Cache(student), rows
        self.n_text, self.T = [count_kept(student, text) for text in texts], max(map(len, texts))
        if student.encoder:                                     # decode has read them just now, from the second time on
            student.encoder.keeps = True
        self.cache.begin_pass(range(len(texts)), [0] * len(texts))
        student(pad_rows(texts, self.device), pad_rows(rows, self.device), self.cache, only_last=True)

    def ask(self, rows, most=256):
        """a list of arrays: the logits (V,) after the last token of each row, or (V + 1 + T,) with places. rows:
        (number of its text, what is fed) each."""
        logits, none = [], torch.zeros(0, self.T, dtype=torch.long, device=self.device)
        for some in (rows[start:start + most] for start in range(0, len(rows), most)):
            texts, fed = zip(*some)
            kept = [count_alike(row[:-1], self.rows[n]) for n, row in some]
            branches = Branches(self.cache, texts, [self.n_text[n] + n_kept for n, n_kept in zip(texts, kept)])
            fed = pad_rows([row[n_kept:] for row, n_kept in zip(fed, kept)], self.device)
            logits.extend(self.student(none, fed, branches, only_last=True).float().cpu().numpy())
        return [row.copy() for row in logits]


class Branches:
    """rows that begin as rows of a Cache, several of one of them, for one forward pass: the tokens that are new see
    the keys and values of that beginning, which are there once, and those of their own row. texts: slots of the cache;
    n_read: how many of its tokens each row begins with."""

    def __init__(self, cache, texts, n_read):
        device = cache.store.device
        self.slots, self.of_row = torch.tensor(texts, device=device).unique(return_inverse=True)
        self.n_read = torch.tensor(n_read, device=device)
        self.store, self.gqa = cache.store[:, :, :, :max(n_read)].index_select(2, self.slots), cache.gqa
        self.texts, self.used = cache.texts, cache.used

    def keep_texts(self, states, used):
        """what the rows can point to: (B, T, C), and bool (B, T). No row begins in this pass."""
        slots = self.slots[self.of_row]
        return self.texts[slots], self.used[slots]

    def place_tokens(self, used, keep):
        """as Cache.place_tokens does. A slot has a grid of the new tokens of all its rows, in their order."""
        row, col = used.nonzero(as_tuple=True)                  # (N,) each
        slot, B, S = self.of_row[row], len(self.slots), self.store.size(3)
        rank = F.one_hot(slot, B).cumsum(0).gather(1, slot[:, None])[:, 0] - 1
        self.T = int(rank.max()) + 1
        self.cell = slot * self.T + rank                        # of B x T
        lay = lambda value, empty: value.new_full((B * self.T,), empty).index_put((self.cell,), value).view(B, self.T)
        row_of, col_of, n_seen = lay(row, -1), lay(col, 0), lay(self.n_read[row], 0)
        own = (row_of[:, :, None] == row_of[:, None]) & (col_of[:, :, None] >= col_of[:, None])  # (B, T, T)
        begun = torch.arange(S, device=slot.device) < n_seen[..., None]  # (B, T, S)
        self.mask = torch.cat((begun, own), -1)[:, None]        # (B, 1, T, S + T)
        return self.n_read[row] + col

    def attend(self, layer, q, k, v, keep):
        """as Cache.attend does; nothing is stored."""
        lay = lambda x, cell: x.new_zeros(len(self.slots) * self.T, *x.shape[1:]).index_put((cell,), x).unflatten(
            0, (-1, self.T))                                    # (N, H, D) -> (B, T, H, D)
        k, v = (torch.cat((begun, lay(new[0].transpose(0, 1).to(begun.dtype), self.cell)), 1).transpose(1, 2)
                for begun, new in zip(self.store[layer], (k, v)))  # (B, n_kv_head, S + T, D) each
        cell, q = (self.cell, q[0]) if keep is None else (self.cell[keep], q[0][:, keep])
        with torch.autocast(q.device.type, enabled=False):
            y = F.scaled_dot_product_attention(lay(q.transpose(0, 1), cell).transpose(1, 2).to(k.dtype), k, v,
                                               attn_mask=self.mask, enable_gqa=self.gqa)
        return y.transpose(1, 2).flatten(0, 1)[cell].transpose(0, 1)[None]


def count_alike(row, other):
    """how many tokens two lists begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(row, other)) if a != b), min(len(row), len(other)))


def read_rows(student, text, fed):
    """logits after the last token of each of several rows: (n, V), or (n, V + 1 + T) with places. text: as the student
    reads it; fed: lists, of begin_row."""
    return torch.from_numpy(np.stack(Begun(student, [text], fed[:1]).ask([(0, row) for row in fed])))


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
