"""Greedy decoding of a student: at most one forward pass per decision, for many texts at once.

    for outs, decisions in decode(student, space, texts): ...   # texts: lists of ids; answers in their order

It gives the answers of the plain loop in sample.py, many at a time; confidence.py says how sure they are. B rows, T
tokens, H heads of D, V = output_vocab.
"""
import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F

from distil.drafts import Drafts, Forced, accepted_prefix
from distil.places import place_input
from distil.reader import read_pages, text_room
from distil.space import Outs


def pad_rows(rows, device):
    """lists of ids -> (rows, longest) long, padded on the right with -1, as model.Student reads them."""
    T = max(map(len, rows), default=0)
    return torch.tensor(
        [[*row, *[-1] * (T - len(row))] for row in rows], dtype=torch.long, device=device).view(len(rows), T)


class Cache:
    """keys and values of rows, and the attention of new tokens to them. A row lies in a slot, which can be used
    again. begin_pass() says which slots the rows of the next forward pass have; in the pass, the student calls
    place_tokens() once and attend() once per layer."""

    def __init__(self, student):
        c, p = student.config, student.lm_head.weight
        self.gqa, sizes = c.n_head != c.n_kv_head, (c.n_layer, 2, 0, c.block_size, c.n_kv_head, c.n_embd // c.n_head)
        self.store = torch.zeros(sizes, dtype=p.dtype, device=p.device)  # (n_layer, 2, slots, S, n_kv_head, D)
        self.texts = torch.zeros(0, 0, c.n_embd, dtype=p.dtype, device=p.device)  # (slots, T, C), see keep_texts
        self.used = torch.zeros(0, 0, dtype=torch.bool, device=p.device)  # (slots, T)

    def begin_pass(self, slots, n_read):
        """slots: of the R rows of the next pass; n_read: tokens of each that were read before."""
        device, B = self.store.device, max(slots) + 1
        if B > self.store.size(2):
            more = self.store.new_zeros(*self.store.shape[:2], B - self.store.size(2), *self.store.shape[3:])
            self.store = torch.cat((self.store, more), 2)
        self.B, self.slots = B, torch.tensor(slots, device=device)
        self.n_read = torch.tensor(n_read, device=device)

    def keep_texts(self, states, used):
        """stores what the rows of this pass can point to: states (R, T, C) of those that begin, used (R, T) bool.
        Returns the same of all B rows of the pass."""
        (slots, T), (R, T_new) = self.used.shape, used.shape
        more = max(0, self.B - slots), max(0, T_new - T)
        self.texts = F.pad(self.texts, (0, 0, 0, more[1], 0, more[0]))
        self.used = F.pad(self.used, (0, more[1], 0, more[0]))
        begun = self.slots[:R]
        self.used[begun] = F.pad(used, (0, self.used.size(1) - T_new))
        self.texts[begun, :T_new] = states.to(self.texts.dtype)
        return self.texts[self.slots], self.used[self.slots]

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
    feed: list       # output indices that are read next, V for the start token; it ends with the draft
    draft: list      # output indices that are likely to come next, or that the schema forces
    states: list     # the state before each of them, and the one after the last: there the student chooses
    page: object = None  # its Page (places.py), if values are copied from it
    n_text: int = 0  # tokens of the text that stay in the cache; its options do not
    n_read: int = 0  # tokens read before
    outs: list = field(default_factory=list)
    places: list = field(default_factory=list)  # tokens of the text that were pointed to
    decisions: list = field(default_factory=list)

    def begin(self, space, drafts):
        """prepares the first pass. Returns itself."""
        state = 0
        if self.page:
            run, state = space.forced_runs[0]
            self.outs += run
        self.draft_more(space, drafts, state)
        return self

    def accept(self, space, drafts, picks, logits, constrain):
        """extends the answer by what the student chose. Returns True if the answer is complete. picks: output
        indices chosen after each of the draft's tokens, and at last the next one, or V + 1 + t for token t of the text;
        logits (n, V), or with places (n, V + 1 + T), there, -inf where illegal; both of the last place alone if the
        draft has forced tokens only, and constrain."""
        n_forced = len(self.states) - len(picks)
        accepted = accepted_prefix(self.draft, self.draft[:n_forced] + picks)
        last, state = accepted[-1], self.states[len(accepted) - 1]
        if last > space.V:                                      # a place; a draft has none
            self.places.append(last - space.V - 1)
            last = place_input(space.V, self.places[-1], len(self.places) % 2 == 0)
            accepted[-1] = space.place_symbol(state) if state in space.copy_at else -1
        for n, out in enumerate(accepted[n_forced:]):
            state = self.states[n_forced + n]
            if space.decides[state] and out in space.transitions[state]:
                self.decisions.append((space.leaf_at[state], logits[n], picks[n]))
        for out, state in zip(accepted, self.states):
            state = space.transitions[state].get(out, -1)
            run, end = space.forced_runs[state] if state >= 0 else ([], state)
            self.outs += [out, *run] if self.page else [out]
        if state < 0 or end == space.done and (constrain or not run or self.page):  # illegal, or no decision is left
            self.outs += [] if self.page else run
            return True
        self.n_read += (self.n_text if self.text else 0) + len(accepted)
        self.text, self.feed = [], [last]
        self.draft_more(space, drafts, end if self.page else state)
        return False

    def draft_more(self, space, drafts, state):
        """drafts what follows in this state, to be read in the next pass. A student that copies values reads decisions
        alone: what is forced between them says nothing new."""
        tokens, self.states = drafts.propose(self.outs, (), state)
        if self.page:
            tokens, self.states = zip(*((out, at) for out, at in zip(tokens, self.states) if space.decides[at]))
        self.draft = list(tokens[:-1])                          # the last one need not be guessed
        self.feed += self.draft

    def answer(self, space):
        """its output indices; with the spans of its copied values if there are any."""
        if self.page is None:
            return self.outs
        return Outs(self.outs, map(self.page.span, self.parts(space), self.places[::2], self.places[1::2]))

    def parts(self, space):
        """the copied.Copied that have been written."""
        states = space.states_before(self.outs[:-1])            # the last one may be illegal, and is no place
        return [space.copy_at[state] for state, out in zip(states, self.outs) if out >= space.V][::2]

    def legal_places(self, space, state):
        """the tokens of the text that may be chosen in a state in which a place is."""
        part, (*_, before) = space.copy_at[state], [-1, *self.places]
        if len(self.places) % 2:
            return self.page.lasts(part, before)
        return self.page.firsts(part, self.taken(space, part))

    def taken(self, space, part):
        """the tokens with which the earlier items begin of the list that this part is an item of."""
        if not isinstance(part.keys[-1], int):
            return ()
        return [first for other, first in zip(self.parts(space), self.places[::2]) if other.keys[:-1] == part.keys[:-1]]


def mask_illegal(logits, legal, space, places):
    """the logits (M, V) with -inf where a token is illegal. legal (M, V) bool: by the schema; places: a Row and a state
    for each; logits may go on with those of V + 1 and more, the tokens of the text."""
    if not space.copy_at:
        return logits.masked_fill(~legal, -math.inf)
    legal = F.pad(legal, (0, logits.size(1) - legal.size(1)))
    for n, (row, state) in enumerate(places):
        if state in space.copy_at:
            able = row.legal_places(space, state) or [0] * (len(space.transitions[state]) == 1)  # 0: the value is null
            legal[n, [space.V + 1 + token for token in able]] = True
        elif barred := space.barred(state, row.page.spans):
            legal[n, barred] = False
    return logits.masked_fill(~legal, -math.inf)


def choose(logits, V):
    """the greedy choice (M,) among logits (M, V), or (M, V + 1 + T) with places; -inf where illegal. Whether a value is
    copied is one decision, where is another, as for a teacher, who writes a quote or null first: if the places together
    are likelier than each token, it is the likeliest place."""
    if logits.size(1) == V:
        return logits.argmax(1)
    tokens, places = logits[:, :V], logits[:, V:]
    return torch.where(tokens.amax(1) >= places.logsumexp(1), tokens.argmax(1), V + places.argmax(1))


def count_kept(student, ids):
    """how many of the tokens of a text a student's decoder reads: those before its options."""
    return ids.index(student.mark) if student.mark in ids else len(ids)


FEW = 5  # so many decisions and less in an answer are not worth a draft


def start_drafts(space):
    """the Drafts of an OutputSpace, which learn from all its answers."""
    if not hasattr(space, 'drafts'):
        space.drafts = Drafts(space) if space.n_decisions > FEW else Forced(space)
    return space.drafts


@torch.no_grad()
def decode(student, space, texts, batch_size=64, constrain=True, drafts=None, count=None):
    """answers a stream of texts with at most one forward pass per decision; forced tokens cost no pass, and neither do
    decisions that are drafted right (drafts.py).

    texts: iterable of lists of ids. None in it means that no text is available yet: one more pass is made for
    the incomplete answers, then the iterable is read again. Yields in the order of the texts (output indices
    with the end token, decisions: see confidence.py).

    constrain: *guaranteed*: the student chooses only at decisions, among the legal tokens. Otherwise
    *lossless*: the forced tokens are a draft that the student reads, and each must be its own choice, so that
    the answer is its free-running greedy one, in float32 token for token. It ends with the first token
    outside the schema, if there is one. (Draft and verify: speculative decoding,
    https://arxiv.org/abs/2211.17192, with the schema as the draft.)

    A pass reads the new tokens of all rows. When an answer is complete, the next text takes its slot. drafts: None for
    those of the space; count: a Counter of the passes, rows times passes and decisions.
    """
    device, V, drafts = student.lm_head.weight.device, student.config.output_vocab, drafts or start_drafts(space)
    legal, texts, cache = space.next_state.to(device) >= 0, iter(texts), Cache(student)
    rows, done = {}, {}  # rows by slot; done: answers by number, which wait for an earlier one
    n_in, n_out, more = 0, 0, True
    while more or rows:
        arrived, room = [], text_room(student, space)
        while more and len(rows) + len(arrived) < batch_size:
            try:
                ids = next(texts)
            except StopIteration:
                more = False
                break
            if ids is None:
                break
            arrived.append(ids)
        for ids, page in zip(*read_pages(student, space, arrived)):
            assert len(ids) <= room, f'the text has {len(ids)} tokens; with an answer at most {room} fit'
            free_slot = next(slot for slot in range(batch_size) if slot not in rows)
            rows[free_slot] = Row(n_in, ids, [V], [], [], page, count_kept(student, ids)).begin(space, drafts)
            n_in += 1
        if not rows:
            continue
        # the rows that begin come first, and in the order of their slots, as model.Student wants them
        live = sorted(rows.items(), key=lambda item: (not item[1].text, item[0]))
        cache.begin_pass([slot for slot, _ in live], [row.n_read for _, row in live])
        text = pad_rows([row.text for _, row in live if row.text], device)
        answer = pad_rows([row.feed for _, row in live], device)
        # a row has a logit at its last token; or at all that it feeds, if it runs freely or a decision was guessed
        only_last = constrain and not any(space.decides[state] for _, row in live for state in row.states[:-1])
        logits = student(text, answer, cache, only_last=only_last).float()  # (M, V), or (M, V + 1 + T) with places
        places = [(row, state) for _, row in live for state in (row.states[-1:] if only_last else row.states)]
        states = [state for _, state in places]
        masked = mask_illegal(logits, legal[states], space, places)
        if space.copy_at and not constrain:                     # a copied value is held to the text in any case
            pointed = [n for n, state in enumerate(states) if state in space.copy_at]
            logits[pointed] = masked[pointed]
        picks, masked = choose(masked if constrain else logits, V).tolist(), masked.cpu()
        ends = list(accumulate(1 if only_last else len(row.feed) for _, row in live))
        for (slot, row), begin, end in zip(live, [0, *ends], ends):
            if row.accept(space, drafts, picks[begin:end], masked[begin:end], constrain):
                done[row.number] = row.answer(space), row.decisions
                del rows[slot]
                if constrain or space.state_after(row.outs) == space.done:
                    drafts.add(row.outs)
                if count is not None:
                    count['decisions'] += len(row.decisions)
        if count is not None:
            count.update(passes=1, row_passes=len(live))
        while n_out in done:
            yield done.pop(n_out)
            n_out += 1


def generate(student, space, texts, constrain=True, batch_size=64):
    """texts: iterable of lists of ids -> list of lists of output indices, end token included; see decode."""
    return [outs for outs, _ in decode(student, space, texts, batch_size, constrain)]
