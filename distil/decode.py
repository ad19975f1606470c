"""Greedy decoding of a student: one forward pass per decision, for many texts at once.

    for outs, decisions in decode(student, space, texts): ...   # texts: lists of ids; answers in their order

It gives the answers of the plain loop in sample.py, many at a time. confidence_of returns the probability of each
field's value, value_probabilities the probabilities of all its values. B rows, T tokens, H heads of D, V =
output_vocab.
"""
import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F

from distil.reader import student_ids, text_room
from distil.space import accepted_prefix


def pad_rows(rows, device):
    """lists of ids -> (rows, longest) long, padded on the right with -1, as model.Student reads them."""
    T = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[-1] * (T - len(row))] for row in rows], dtype=torch.long, device=device).view(len(rows), T)


class Cache:
    """keys and values of rows, and the attention of new tokens to them. A row lies in a slot, which can be used
    again. begin_pass() says which slots the rows of the next forward pass have; in the pass, the student calls
    place_tokens() once and attend() once per layer."""

    def __init__(self, student):
        c, p = student.config, student.lm_head.weight
        self.gqa, sizes = c.n_head != c.n_kv_head, (c.n_layer, 2, 0, c.block_size, c.n_kv_head, c.n_embd // c.n_head)
        self.store = torch.zeros(sizes, dtype=p.dtype, device=p.device)  # (n_layer, 2, slots, S, n_kv_head, D)

    def begin_pass(self, slots, n_read):
        """slots: of the R rows of the next pass; n_read: tokens of each that were read before."""
        device, B = self.store.device, max(slots) + 1
        if B > self.store.size(2):
            more = self.store.new_zeros(*self.store.shape[:2], B - self.store.size(2), *self.store.shape[3:])
            self.store = torch.cat((self.store, more), 2)
        self.B, self.slots = B, torch.tensor(slots, device=device)
        self.n_read = torch.tensor(n_read, device=device)

    def place_tokens(self, used, keep):
        """sets where the N new tokens go: used (R, T) bool, which cells have one. keep (M,): for which of the N the
        last layer computes an output. Returns the positions (N,) in their rows."""
        row, col = used.nonzero(as_tuple=True)              # (N,) each
        self.slot, self.at = self.slots[row], self.n_read[row] + col
        self.S = int(self.at.max()) + 1
        first = torch.ones_like(keep, dtype=torch.bool)     # (M,) True at the first that is kept of its row
        first[1:] = row[keep][1:] != row[keep][:-1]
        rank = torch.arange(len(keep), device=keep.device)
        self.all = self.make_grid(self.slot, self.at, col)
        self.kept = self.make_grid(self.slot[keep], self.at[keep], rank - torch.where(first, rank, 0).cummax(0)[0])
        return self.at

    def make_grid(self, slot, at, col):
        """attention pads n tokens to (B, T). slot, at, col (n,): where a token is stored, and which of the tokens of
        its row it is. Returns the cell of each (n,), T, and the mask that is added to the scores, (B, 1, T, S)."""
        T = int(col.max()) + 1
        cell = slot * T + col
        own = at.new_zeros(self.B * T).index_put((cell,), at).view(self.B, 1, T, 1)
        hidden = torch.arange(self.S, device=at.device) > own  # (B, 1, T, S): a token sees no later one
        mask = torch.zeros(hidden.shape, dtype=self.store.dtype, device=at.device).masked_fill_(hidden, -math.inf)
        return cell, T, mask

    def attend(self, layer, q, k, v, keep):
        """stores k and v (1, n_kv_head, N, D) of the new tokens. q (1, H, N, D). Returns what they attend to,
        (1, H, N, D), or, with keep (M,), what these of them do, (1, H, M, D)."""
        for store, new in zip(self.store[layer], (k, v)):
            store[self.slot, self.at] = new[0].transpose(0, 1).to(store.dtype)  # (N, n_kv_head, D)
        (cell, T, mask), q = (self.all, q[0]) if keep is None else (self.kept, q[0][:, keep])
        k, v = self.store[layer, :, :self.B, :self.S].transpose(2, 3)  # (B, n_kv_head, S, D) each
        padded = q.new_zeros(self.B * T, len(q), q.size(-1))
        padded[cell] = q.transpose(0, 1)
        padded = padded.view(self.B, T, len(q), -1).transpose(1, 2)  # (B, H, T, D)
        with torch.autocast(q.device.type, enabled=False):  # scores of bfloat16 are too coarse
            y = F.scaled_dot_product_attention(padded, k, v, attn_mask=mask, enable_gqa=self.gqa)
        return y.transpose(1, 2).flatten(0, 1)[cell].transpose(0, 1)[None]


@dataclass
class Row:
    """a text whose answer is not complete yet."""
    number: int      # of the text
    text: list       # ids that are read next, [] once they have been
    feed: list       # output indices that are read next, V for the start token; it ends with those of the draft
    draft: list      # output indices that the schema forces there
    state: int       # after the draft: a decision, or done
    n_read: int = 0  # tokens read before
    outs: list = field(default_factory=list)
    decisions: list = field(default_factory=list)

    def accept(self, space, picks, logits, constrain):
        """extends the answer by what the student chose. Returns True if the answer is complete. picks: output
        indices chosen at the output positions; logits (V,) at the last of them, -inf where illegal."""
        accepted = accepted_prefix(self.draft, self.draft + picks if constrain else picks)
        self.outs += accepted
        if len(accepted) <= len(self.draft):  # no decision: the draft ended the answer, or was rejected
            return True
        state = space.transitions[self.state].get(accepted[-1], -1)
        if state < 0:                       # a free-running answer that breaks the schema
            return True
        self.decisions.append((space.leaf_at[self.state], logits, accepted[-1]))
        self.draft, self.state = space.forced_runs[state]
        if self.state == space.done and (constrain or not self.draft):  # no decision is left
            self.outs += self.draft
            return True
        self.n_read += len(self.text) + len(self.feed)
        self.text, self.feed = [], [accepted[-1], *self.draft]
        if self.state == space.done:
            self.feed.pop()                 # the end token need not be read
        return False


@torch.no_grad()
def decode(student, space, texts, batch_size=64, constrain=True):
    """answers a stream of texts with one forward pass per decision; forced tokens cost no pass.

    texts: iterable of lists of ids. None in it means that no text is available yet: one more pass is made for
    the incomplete answers, then the iterable is read again. Yields in the order of the texts (output indices
    with the end token, decisions: see confidence_of).

    constrain: *guaranteed*: the student chooses only at decisions, among the legal tokens. Otherwise
    *lossless*: the forced tokens are a draft that the student reads, and each must be its own choice, so that
    the answer is its free-running greedy one, in float32 token for token. It ends with the first token
    outside the schema, if there is one. (Draft and verify: speculative decoding,
    https://arxiv.org/abs/2211.17192, with the schema as the draft.)

    A pass reads the new tokens of all rows. When an answer is complete, the next text takes its slot.
    """
    device, V, (prefix, first) = student.lm_head.weight.device, student.config.output_vocab, space.forced_runs[0]
    legal, texts, cache = space.next_state.to(device) >= 0, iter(texts), Cache(student)
    rows, done = {}, {}  # rows by slot; done: answers by number, which wait for an earlier one
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
            ids, = student_ids(student, space, [ids])
            room = text_room(student, space)
            assert len(ids) <= room, f'the text has {len(ids)} tokens; with an answer at most {room} fit'
            free_slot = next(slot for slot in range(batch_size) if slot not in rows)
            rows[free_slot] = Row(n_in, ids, [V, *prefix], prefix, first)
            n_in += 1
        if not rows:
            continue
        # the rows that begin come first, and in the order of their slots, as model.Student wants them
        live = sorted(rows.items(), key=lambda item: (not item[1].text, item[0]))
        cache.begin_pass([slot for slot, _ in live], [row.n_read for _, row in live])
        text = pad_rows([row.text for _, row in live if row.text], device)
        answer = pad_rows([row.feed for _, row in live], device)
        logits = student(text, answer, cache, only_last=constrain).float()  # (R, V); (M, V) if it runs freely
        # a row has a logit at its last token, or at all that it feeds
        ends = list(accumulate(1 if constrain else len(row.feed) for _, row in live))
        masked = logits[[end - 1 for end in ends]].masked_fill(~legal[[row.state for _, row in live]], -math.inf)
        picks = (masked if constrain else logits).argmax(-1).tolist()
        for (slot, row), begin, end, row_logits in zip(live, [0, *ends], ends, masked.cpu()):
            if row.accept(space, picks[begin:end], row_logits, constrain):
                done[row.number] = row.outs, row.decisions
                del rows[slot]
        while n_out in done:
            yield done.pop(n_out)
            n_out += 1


def generate(student, space, texts, constrain=True, batch_size=64):
    """texts: iterable of lists of ids -> list of lists of output indices, end token included; see decode."""
    return [outs for outs, _ in decode(student, space, texts, batch_size, constrain)]


# -----------------------------------------------------------------------------
# confidence


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
    """{field: [probability of each of its values, in their order]} for one answer, of the student constrained
    to the schema, given its own answers in the fields before. The chosen value's is that of confidence_of.

    ids: of the text; outs, decisions: as decode yields them for it with constrain. A value's probability is
    the product, along its tokens, of the softmax over the legal tokens, so a field's probabilities sum to 1.
    If values share their first tokens, some of their decisions are not on the path of the answer: one more
    pass computes the logits of these.
    """
    ways, states = space.ways, space.states_before(outs)
    chosen = [n for n, state in enumerate(states) if len(space.transitions[state]) > 1]
    known = {states[n]: logits for n, (_, logits, _) in zip(chosen, decisions)}  # (V,) by state
    first = {}                                                  # {field: position of its first decision}
    for n in chosen:
        first.setdefault(space.leaf_at[states[n]], n)
    missing = {state: [*outs[:first[name]], *before] for name, of_values in ways.items()
               for way in of_values for state, _, before in way if state not in known}
    if missing:
        device, V = student.lm_head.weight.device, student.config.output_vocab
        text = pad_rows(student_ids(student, space, [ids]) * len(missing), device)
        answer = pad_rows([[V, *before] for before in missing.values()], device)
        logits = student(text, answer, only_last=True).float().cpu()  # (rows, V)
        legal = space.next_state[list(missing)] >= 0
        known |= dict(zip(missing, logits.masked_fill(~legal, -math.inf)))
    result = {name: [1.0] for name in space.schema.paths}       # a constant is certain
    for name, of_values in ways.items():
        t = (temperature or {}).get(name, 1.0)
        log_p = {state: (known[state] / t).log_softmax(-1).tolist()
                 for state in {state for way in of_values for state, _, _ in way}}
        result[name] = [math.exp(sum(log_p[state][out] for state, out, _ in way)) for way in of_values]
    return result
