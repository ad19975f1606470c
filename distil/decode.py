"""Greedy decoding of a student: one forward pass per decision, for many texts at once.

    for outs, decisions in decode(student, space, texts): ...   # texts: lists of ids; answers in their order

The forced tokens between two decisions cost no pass. confidence_of returns the probability of each field's
value, value_probabilities the probabilities of all its values. B rows, T tokens, H heads of D, V =
output_vocab.
"""
import json
import math
import queue
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from distil.space import accepted_prefix
from model import attend_with_lse


class Cache:
    """keys and values of rows, and the attention of new tokens to them. A row is a slot that can be used
    again. If the student keeps a prompt, all rows share its keys and values. Before a forward pass,
    place_tokens() sets where its tokens go. In the pass, the student calls attend() once per layer."""

    def __init__(self, student):
        c, p = student.config, student.lm_head.weight
        sizes = c.n_layer, 2, 0, c.block_size, c.n_kv_head, student.h[0].attn.head_size
        self.store = torch.zeros(sizes, dtype=p.dtype, device=p.device)  # (n_layer, 2, B, S, n_kv_head, D)
        self.n_prompt, self.gqa = c.n_prompt, c.n_head != c.n_kv_head
        self.prompt = student.prompt if c.n_prompt else None    # (n_layer, 2, n_kv_head, P, D)
        self.mask_repeats = c.n_head // c.n_kv_head if c.n_prompt else 1

    def place_tokens(self, slots, starts, counts, n_outputs):
        """sets where the N tokens of the next pass go. For each of R rows: its slot, the position of its
        first new token, the number of new tokens, and for how many of the last of them the student computes
        an output. Returns the positions (1, N), and which of the N have an output (M,)."""
        device, B = self.store.device, max(slots) + 1
        if B > self.store.size(2):
            more = self.store.new_zeros(*self.store.shape[:2], B - self.store.size(2), *self.store.shape[3:])
            self.store = torch.cat((self.store, more), 2)
        ends, slot = np.cumsum(counts), np.repeat(slots, counts)  # (R,), (N,)
        pos = np.arange(len(slot)) + np.repeat(np.array(starts) - ends + counts, counts)  # (N,)
        # (M,) which of the N have an output
        keep = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, n_outputs)])
        at = pos - self.n_prompt                                # (N,) index in its row of the store
        self.B, self.S = B, int(at.max()) + 1
        self.all = self.make_grid(slot, at, counts)
        self.kept = self.make_grid(slot[keep], at[keep], n_outputs)
        self.slot, self.at, pos, keep = (torch.from_numpy(x).to(device) for x in (slot, at, pos, keep))
        return pos[None], keep

    def make_grid(self, slot, at, counts):
        """attention pads the N tokens to (B, T). Returns the cell of each token (N,), T, and the mask that is
        added to the scores: (B, 1, T, S), or with a prompt, for all H / n_kv_head heads that share a key,
        (B, 1, H / n_kv_head * T, S)."""
        T, device = max(counts), self.store.device
        col = np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts, counts)  # (N,) token of its row
        cell = slot * T + col
        padded = np.zeros(self.B * T, np.int64)
        padded[cell] = at
        own = torch.from_numpy(padded).to(device).view(self.B, 1, T, 1)
        hidden = torch.arange(self.S, device=device) > own      # (B, 1, T, S): a token sees no later one
        mask = torch.zeros(hidden.shape, dtype=self.store.dtype, device=device)
        mask = mask.masked_fill_(hidden, -math.inf).repeat(1, 1, self.mask_repeats, 1)
        return torch.from_numpy(cell).to(device), T, mask

    def attend(self, layer, q, k, v, kept):
        """stores k and v (1, n_kv_head, N, D) of the new tokens. q: (1, H, N, D) of all new tokens, or, if
        kept, (1, H, M, D) of those with an output. Returns what q attends to, in the shape of q."""
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
            # the prompt is one product for all rows; the two parts are merged as in engine.py
            y, lse = attend_with_lse(padded.reshape(self.B, n_kv_head, -1, D), k, v, mask, D ** -0.5)
            y, lse = to_rows(y.reshape(self.B, H, T, D)), to_rows(lse.reshape(self.B, H, T))
            prompt = self.prompt[layer, :, None]                # (2, 1, n_kv_head, P, D)
            y_prompt, lse_prompt = attend_with_lse(q.reshape(1, n_kv_head, -1, D), *prompt, None, D ** -0.5)
            share = torch.sigmoid(lse_prompt.reshape(H, n) - lse.T)[..., None]
            return torch.lerp(y.transpose(0, 1), y_prompt.reshape(H, n, D), share)[None]


@dataclass
class Row:
    """a text whose answer is not complete yet."""
    number: int      # of the text
    feed: list       # ids to read next; it ends with those of the draft
    draft: list      # output indices that the schema forces there
    state: int       # after the draft: a decision, or done
    n_read: int      # tokens read before
    outs: list = field(default_factory=list)
    decisions: list = field(default_factory=list)

    def accept(self, space, id_of, picks, logits, constrain):
        """extends the answer by what the student chose. Returns True if the answer is complete. picks: output
        indices chosen at the output positions; logits (V,) at the last of them, -inf where illegal."""
        accepted = accepted_prefix(self.draft, self.draft + picks if constrain else picks)
        self.outs += accepted
        if len(accepted) <= len(self.draft):  # no decision: the draft ended the answer, or was rejected
            return True
        state = space.transitions[self.state].get(accepted[-1], -1)
        if state < 0:                       # a free-running answer that breaks the schema
            return True
        self.decisions.append((space.field[self.state], logits, accepted[-1]))
        self.draft, self.state = space.forced_runs[state]
        if self.state == space.done and (constrain or not self.draft):  # no decision is left
            self.outs += self.draft
            return True
        self.n_read += len(self.feed)
        ids = [id_of[o] for o in (accepted[-1], *self.draft)]
        self.feed = ids[:-1] if self.state == space.done else ids  # the end token need not be read
        return False


def text_room(student, space):
    """most ids of a text that fit into a row beside the longest answer."""
    return student.config.block_size - space.max_answer - len(student.config.start) + 1


def count_cut(student, space, ids, max_text):
    """how many of a text's ids a student does not read: those after the first max_text, or, if these still are
    too many for its reader, tokens of the reader."""
    if len(ids) > max_text or student.reader is None:
        return max(0, len(ids) - max_text)
    return student.reader.count_cut(space.tokenizer.decode(ids), text_room(student, space))


def input_ids(student, space, texts):
    """what a student reads of texts, given as lists of the teacher's ids: these, or the ids of its reader (see
    model.Student). Lists of ids; a text longer than fits beside an answer is cut for the reader."""
    if student.reader is None:
        return [list(map(int, ids)) for ids in texts]
    strings = space.tokenizer.decode_batch([list(map(int, ids)) for ids in texts])
    offset = student.config.vocab_size
    return [[offset + i for i in ids] for ids in student.reader.encode(strings, text_room(student, space))]


def answer_ids(student, space):
    """for each output index the id at which the student reads it, (V,) list: the teacher's, or with a reader
    the output index itself."""
    return space.output_ids if student.reader is None else list(range(len(space.output_ids)))


def convert_records(student, space, shards, rows):
    """lets shards.batch give these records as the student reads them. Returns how many of the texts a reader
    cannot read whole, because block_size is too small."""
    if student.reader is None:
        shards.texts, shards.answer_ids = {}, shards.meta['output_ids']
        return 0
    new = [i for i in map(int, rows) if i not in shards.texts]
    shards.texts.update(zip(new, input_ids(student, space, [shards.ids(i) for i in new])))
    shards.answer_ids = answer_ids(student, space)
    full = [i for i in new if len(shards.texts[i]) >= text_room(student, space)]
    return sum(count_cut(student, space, shards.ids(i).tolist(), math.inf) > 0 for i in full)


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

    A pass reads the new tokens of all rows as one long row. When an answer is complete, the next text takes
    its slot.
    """
    device, start, n_prompt = student.lm_head.weight.device, student.config.start, student.config.n_prompt
    legal, texts, cache = space.next_state.to(device) >= 0, iter(texts), Cache(student)
    id_of = answer_ids(student, space)                          # by output index
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
            ids, = input_ids(student, space, [ids])
            room = text_room(student, space)
            assert len(ids) <= room, f'the text has {len(ids)} tokens; with an answer at most {room} fit'
            draft, state = space.forced_runs[0]
            feed = [*ids, *start, *(id_of[o] for o in draft)]
            free_slot = next(slot for slot in range(batch_size) if slot not in rows)
            rows[free_slot] = Row(n_in, feed, draft, state, n_prompt)
            n_in += 1
        if not rows:
            continue
        live = list(rows.values())
        counts = [len(row.feed) for row in live]
        n_outputs = [1] * len(live)                             # output positions at the end of each feed
        if not constrain:
            n_outputs = [len(row.draft) + (row.state != space.done) for row in live]
        pos, keep = cache.place_tokens(list(rows), [row.n_read for row in live], counts, n_outputs)
        idx = torch.tensor([[i for row in live for i in row.feed]], device=device)  # (1, N)
        logits = student(idx, cache=cache, pos=pos, keep=keep).float()  # (M, V)
        last = np.cumsum(n_outputs) - 1                         # (R,) of the M
        masked = logits[last].masked_fill(~legal[[row.state for row in live]], -math.inf)  # (R, V)
        picks = np.split((masked if constrain else logits).argmax(-1).cpu().numpy(), last[:-1] + 1)
        for (slot, row), row_picks, row_logits in zip(list(rows.items()), picks, masked.cpu()):
            if row.accept(space, id_of, row_picks.tolist(), row_logits, constrain):
                done[row.number] = row.outs, row.decisions
                del rows[slot]
        while n_out in done:
            yield done.pop(n_out)
            n_out += 1


def read_lines(path):
    """yields the lines of a file as bytes, or of a .jsonl their texts; '' for a line without one."""
    for line in open(path, 'rb'):
        if path.lower().endswith(('.jsonl', '.ndjson')):
            try:
                line = json.loads(line)['text']
            except (ValueError, LookupError, TypeError, RecursionError):
                line = ''
        yield line


def read_ahead(items):
    """a queue of (item, None) for each item of an iterable, then (None, error): the exception that ended it,
    or a StopIteration. A thread fills it: a line from a slow pipe is answered at once, and memory does not
    grow with a fast one."""
    ahead = queue.Queue(1000)                                   # blocks the thread when it is full

    def read():
        error = None
        try:
            for item in items:
                ahead.put((item, None))
        except BaseException as raised:                         # belongs to the caller, not to this thread
            error = raised
        ahead.put((None, error or StopIteration()))             # the end
    threading.Thread(target=read, daemon=True).start()          # daemon: it must not keep the program alive
    return ahead


def generate(student, space, texts, constrain=True, batch_size=64):
    """texts: iterable of lists of ids -> list of lists of output indices, end token included; see decode."""
    return [outs for outs, _ in decode(student, space, texts, batch_size, constrain)]


# -----------------------------------------------------------------------------
# confidence


def confidence_of(fields, decisions, temperature=None):
    """{field: probability of the chosen value}, of the student constrained to the schema, given the fields
    before. It is the product, along the value's tokens, of the softmax over the legal tokens. decisions: of
    one answer, [(field, logits (V,), -inf where illegal, output index chosen)]. temperature: {field: number
    that its logits are divided by}, see agreement.fit_temperature."""
    log_p = dict.fromkeys(fields, 0.0)
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
    paths, states = space.value_paths, space.states_before(outs)
    chosen = [n for n, state in enumerate(states) if len(space.transitions[state]) > 1]
    known = {states[n]: logits for n, (_, logits, _) in zip(chosen, decisions)}  # (V,) by state
    first = {}                                                  # {field: position of its first decision}
    for n in chosen:
        first.setdefault(space.field[states[n]], n)
    missing = {state: [*outs[:first[name]], *before] for name, of_values in paths.items()
               for path in of_values for state, _, before in path if state not in known}
    if missing:
        (text,), id_of = input_ids(student, space, [ids]), answer_ids(student, space)
        rows = [[*text, *student.config.start, *(id_of[o] for o in answer)] for answer in missing.values()]
        T, device = max(map(len, rows)), student.lm_head.weight.device
        idx = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # (rows, T)
        last = torch.tensor([n * T + len(row) - 1 for n, row in enumerate(rows)], device=device)
        logits = student(idx, keep=last).float().cpu()          # (rows, V)
        legal = space.next_state[list(missing)] >= 0
        known |= dict(zip(missing, logits.masked_fill(~legal, -math.inf)))
    result = {name: [1.0] for name in space.fields}             # a constant is certain
    for name, of_values in paths.items():
        t = (temperature or {}).get(name, 1.0)
        log_p = {state: (known[state] / t).log_softmax(-1).tolist()
                 for state in {state for path in of_values for state, _, _ in path}}
        result[name] = [math.exp(sum(log_p[state][out] for state, out, _ in path)) for path in of_values]
    return result
