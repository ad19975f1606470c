"""Greedy decoding of a student: one forward pass per decision, for many texts at once.

    for outs, decisions in decode(student, space, texts): ...   # texts: lists of ids; answers in their order

What the schema forces between two decisions costs no pass. confidence_of gives the probability of each
field's value, value_probabilities those of all its values. B rows, T tokens, H heads of D, V = output_vocab.
"""
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from distil.space import accepted_prefix
from model import attend_with_lse


class Cache:
    """keys and values of rows, and the attention of new tokens to them. A row is a slot that can be used
    again. Those of a prompt that the student keeps are the same for all rows. place() says where the tokens
    of the next pass go; in it the student calls attend() once a layer."""

    def __init__(self, student):
        c, p = student.config, student.lm_head.weight
        sizes = c.n_layer, 2, 0, c.block_size, c.n_kv_head, student.h[0].attn.head_size
        self.store = torch.zeros(sizes, dtype=p.dtype, device=p.device)  # (n_layer, 2, B, S, n_kv_head, D)
        self.n_prompt, self.gqa = c.n_prompt, c.n_head != c.n_kv_head
        self.prompt = student.prompt if c.n_prompt else None    # (n_layer, 2, n_kv_head, P, D)
        self.fold = c.n_head // c.n_kv_head if c.n_prompt else 1

    def place(self, slots, starts, counts, asked):
        """where the coming N tokens go: for each of R rows its slot, the position of its first new token,
        their number, and for how many of the last of them an output is asked. Returns their positions (1, N),
        and which of the N are asked for (M,)."""
        device, B = self.store.device, max(slots) + 1
        if B > self.store.size(2):
            more = self.store.new_zeros(*self.store.shape[:2], B - self.store.size(2), *self.store.shape[3:])
            self.store = torch.cat((self.store, more), 2)
        ends, slot = np.cumsum(counts), np.repeat(slots, counts)  # (R,), (N,)
        pos = np.arange(len(slot)) + np.repeat(np.array(starts) - ends + counts, counts)  # (N,)
        keep = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, asked)])  # (M,)
        at = pos - self.n_prompt                                # (N,) where in its row
        self.B, self.S = B, int(at.max()) + 1
        self.all, self.kept = self.grid(slot, at, counts), self.grid(slot[keep], at[keep], asked)
        self.slot, self.at, pos, keep = (torch.from_numpy(x).to(device) for x in (slot, at, pos, keep))
        return pos[None], keep

    def grid(self, slot, at, counts):
        """for attention N tokens are padded to (B, T): the cell of each (N,), T, and what is added to the
        scores (B, 1, T, S), or of all H / n_kv_head heads that share a key (B, 1, H / n_kv_head * T, S)."""
        T, device = max(counts), self.store.device
        col = np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts, counts)  # (N,) which of its row's
        cell = slot * T + col
        padded = np.zeros(self.B * T, np.int64)
        padded[cell] = at
        until = torch.from_numpy(padded).to(device).view(self.B, 1, T, 1)
        hidden = torch.arange(self.S, device=device) > until    # (B, 1, T, S): it sees its row up to itself
        mask = torch.zeros(hidden.shape, dtype=self.store.dtype, device=device)
        mask = mask.masked_fill_(hidden, -math.inf).repeat(1, 1, self.fold, 1)
        return torch.from_numpy(cell).to(device), T, mask

    def attend(self, layer, q, k, v, kept):
        """k and v (1, n_kv_head, N, D) of the placed tokens; q (1, H, N, D) of all of them, or (1, H, M, D)
        of the kept ones, those asked for -> like q."""
        (H, n, D), n_kv_head = q.shape[1:], k.size(1)
        for store, new in zip(self.store[layer], (k, v)):
            store[self.slot, self.at] = new[0].transpose(0, 1).to(store.dtype)  # (N, n_kv_head, D)
        cell, T, mask = self.kept if kept else self.all
        k, v = self.store[layer, :, :self.B, :self.S].transpose(2, 3)  # (B, n_kv_head, S, D) each
        padded = q.new_zeros(self.B * T, H, D)
        padded[cell] = q[0].transpose(0, 1)
        padded = padded.view(self.B, T, H, D).transpose(1, 2)   # (B, H, T, D)
        to_rows = lambda y: y.transpose(1, 2).reshape(-1, *y.shape[1:2], *y.shape[3:])[cell]  # (n, H, ...)
        with torch.autocast(q.device.type, enabled=False):      # scores of bfloat16 are too coarse
            if self.prompt is None:
                y = to_rows(F.scaled_dot_product_attention(padded, k, v, attn_mask=mask, enable_gqa=self.gqa))
                return y.transpose(0, 1)[None]
            # the prompt is one product for all rows; the parts are put together as in teacher.py
            y, lse = attend_with_lse(padded.reshape(self.B, n_kv_head, -1, D), k, v, mask, D ** -0.5)
            y, lse = to_rows(y.reshape(self.B, H, T, D)), to_rows(lse.reshape(self.B, H, T))
            prompt = self.prompt[layer, :, None]                # (2, 1, n_kv_head, P, D)
            y_prompt, lse_prompt = attend_with_lse(q.reshape(1, n_kv_head, -1, D), *prompt, None, D ** -0.5)
            share = torch.sigmoid(lse_prompt.reshape(H, n) - lse.T)[..., None]
            return torch.lerp(y.transpose(0, 1), y_prompt.reshape(H, n, D), share)[None]


@dataclass
class Row:
    """a text whose answer is under way."""
    number: int      # of the text
    feed: list       # ids to read next; the last of them are the draft's
    draft: list      # output indices that the schema forces there
    state: int       # after the draft: a decision, or done
    n_read: int      # tokens read before
    outs: list = field(default_factory=list)
    decisions: list = field(default_factory=list)

    def take(self, space, pick, logits, constrain):
        """goes on with what the student chose at the asked positions; whether that was the end of the answer.
        pick: list of output indices; logits (V,) at the last of them, -inf where illegal."""
        stands = accepted_prefix(self.draft, self.draft + pick if constrain else pick)
        self.outs += stands
        if len(stands) <= len(self.draft):  # no decision: the draft ended the answer, or was not chosen
            return True
        state = space.transitions[self.state].get(stands[-1], -1)
        if state < 0:                       # a free answer that leaves the schema
            return True
        self.decisions.append((space.field[self.state], logits, stands[-1]))
        self.draft, self.state = space.forced_runs[state]
        if self.state == space.done and (constrain or not self.draft):  # nothing is left to ask
            self.outs += self.draft
            return True
        self.n_read += len(self.feed)
        ids = [space.output_ids[o] for o in (stands[-1], *self.draft)]
        self.feed = ids[:-1] if self.state == space.done else ids  # the end token itself need not be read
        return False


@torch.no_grad()
def decode(student, space, texts, batch_size=64, constrain=True):
    """Answers to a stream of texts, with one forward pass per decision: what the schema forces in between
    costs none.

    texts: iterable of lists of ids, in which None says that there is nothing yet: what is under way goes on,
    and then it is asked again. Yields in their order (output indices with the end token, decisions: see
    confidence_of).

    constrain: *guaranteed*: the student is asked only where the schema leaves a choice, and held to what is
    legal there. Else *lossless*: forced tokens are a draft which the student reads and must itself have
    chosen, so that the answer is its free greedy one, in float32 token for token; it ends with the first
    token outside the schema, if there is one. (Speculative decoding, https://arxiv.org/abs/2211.17192, with
    the schema as the draft.)

    A pass reads the new tokens of all rows as one long row; where an answer is complete, the next text takes
    its place.
    """
    device, start, n_prompt = student.lm_head.weight.device, student.config.start, student.config.n_prompt
    legal, texts, cache = space.next_state.to(device) >= 0, iter(texts), Cache(student)
    rows, done = {}, {}  # rows by slot; done: answers by number, held up by an earlier one
    n_in, n_out, more = 0, 0, True
    while more or rows:
        while more and len(rows) < batch_size:
            try:
                ids = next(texts)
            except StopIteration:
                more = False
                break
            if ids is None:
                break
            room = student.config.block_size - space.max_answer - len(start) + 1
            assert len(ids) <= room, f'{len(ids)} tokens of text leave no room for an answer: {room} would'
            draft, state = space.forced_runs[0]
            feed = [*ids, *start, *(space.output_ids[o] for o in draft)]
            free = next(slot for slot in range(batch_size) if slot not in rows)
            rows[free] = Row(n_in, feed, draft, state, n_prompt)
            n_in += 1
        if not rows:
            continue
        live = list(rows.values())
        counts = [len(row.feed) for row in live]
        asked = [1] * len(live)                                 # how many of the last of each feed
        if not constrain:
            asked = [len(row.draft) + (row.state != space.done) for row in live]
        pos, keep = cache.place(list(rows), [row.n_read for row in live], counts, asked)
        idx = torch.tensor([[i for row in live for i in row.feed]], device=device)  # (1, N)
        logits = student(idx, cache=cache, pos=pos, keep=keep).float()  # (M, V)
        last = np.cumsum(asked) - 1                             # (R,) of the M
        held = logits[last].masked_fill(~legal[[row.state for row in live]], -math.inf)  # (R, V)
        picks = np.split((held if constrain else logits).argmax(-1).cpu().numpy(), last[:-1] + 1)
        for (slot, row), pick, row_logits in zip(list(rows.items()), picks, held.cpu()):
            if row.take(space, pick.tolist(), row_logits, constrain):
                done[row.number] = row.outs, row.decisions
                del rows[slot]
        while n_out in done:
            yield done.pop(n_out)
            n_out += 1


def generate(student, space, texts, constrain=True, batch_size=64):
    """texts: iterable of lists of ids -> list of lists of output indices, end token included; see decode."""
    return [outs for outs, _ in decode(student, space, texts, batch_size, constrain)]


# -----------------------------------------------------------------------------
# how sure it is


def confidence_of(fields, decisions, temperature=None):
    """{field: probability of the value chosen}: of the student held to the schema, given the fields before.
    It is the product, along the value's tokens, of the softmax over the legal ones. decisions: of an answer,
    [(field, logits (V,), -inf where illegal, the choice)]. temperature: {field: what its logits are divided
    by}, see agreement.fit_temperature."""
    log_p = dict.fromkeys(fields, 0.0)
    for name, logits, choice in decisions:
        log_p[name] += (logits / (temperature or {}).get(name, 1.0)).log_softmax(-1)[choice].item()
    return {name: math.exp(p) for name, p in log_p.items()}


@torch.no_grad()
def value_probabilities(student, space, ids, outs, decisions, temperature=None):
    """{field: [probability of each of its values, in their order]} for one answer: of the student held to the
    schema, given the fields before as it answered them. That of the value chosen is confidence_of's.

    ids: of the text; outs, decisions: what decode gave for it, held to the schema. A value's probability is
    the product along its tokens of the softmax over the legal ones, so those of a field sum to 1. Where
    values share their first tokens the decisions that are not on the answer's way are asked too, in one pass.
    """
    ways, states = space.value_paths, space.states_before(outs)
    chosen = [n for n, state in enumerate(states) if len(space.transitions[state]) > 1]
    known = {states[n]: logits for n, (_, logits, _) in zip(chosen, decisions)}  # (V,) by state
    first = {}                                                  # of each field: where its first decision is
    for n in chosen:
        first.setdefault(space.field[states[n]], n)
    missing = {state: [*outs[:first[name]], *before] for name, of_values in ways.items()
               for way in of_values for state, _, before in way if state not in known}
    if missing:
        rows = [[*ids, *student.config.start, *(space.output_ids[o] for o in answer)]
                for answer in missing.values()]
        T, device = max(map(len, rows)), student.lm_head.weight.device
        idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # (rows, T)
        last = torch.tensor([n * T + len(row) - 1 for n, row in enumerate(rows)], device=device)
        logits = student(idx, keep=last).float().cpu()          # (rows, V)
        legal = space.next_state[list(missing)] >= 0
        known |= dict(zip(missing, logits.masked_fill(~legal, -math.inf)))
    result = {name: [1.0] for name in space.fields}             # a constant is certain
    for name, of_values in ways.items():
        t = (temperature or {}).get(name, 1.0)
        log_p = {state: (known[state] / t).log_softmax(-1).tolist()
                 for state in {state for way in of_values for state, _, _ in way}}
        result[name] = [math.exp(sum(log_p[state][out] for state, out, _ in way)) for way in of_values]
    return result
