"""How a teacher copies a value out of the text: one token after another, each of which goes on as the text does.

    value = Value(source, part, vocabulary)                     # of one place in an answer that has a copied value
    value.step(logits, closing)                                 # until it returns a token that closes the value

Legal is what continues some place of the text at which a value may begin (places.py), byte for byte as JSON writes it;
the tokens need not be those of the text. A number or a date is written as one of the candidates. Where the value may
end, what follows it in the answer is legal, too. Its probability goes to the places: what a token that was not chosen
would have begun is shared by the places that begin so, and places that cannot be told apart share alike.
"""
import json
import math
from functools import lru_cache

import numpy as np
import torch

from distil.places import MOST_PLACES, Source
from distil.shares import logits_of

MOST_BYTES = 48  # of a token that is looked for; longer ones are runs of signs


@lru_cache(4)
def token_bytes(tokenizer):
    """{bytes: id} of all tokens of a tokenizers.Tokenizer that stand for text."""
    byte_level = 'ByteLevel' in json.dumps(json.loads(tokenizer.to_str())['decoder'])
    special, found = tokenizer.get_added_tokens_decoder(), {}
    alphabet = byte_alphabet() if byte_level else {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[0].startswith('<0x'), item[1])):
        if i in special:
            continue
        if byte_level:
            spelled = bytes(alphabet[char] for char in token) if all(char in alphabet for char in token) else b''
        elif len(token) == 6 and token.startswith('<0x'):
            spelled = bytes([int(token[3:5], 16)])
        else:
            spelled = token.replace('▁', ' ').encode('utf-8', 'replace')
        if 0 < len(spelled) <= MOST_BYTES:
            found.setdefault(spelled, i)
    return found


def byte_alphabet():
    """{character: byte} of the tokens of a byte-level BPE: printable ones stand for themselves, the others for the
    characters from 256 on (GPT-2, https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""
    plain = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


class Value:
    """a value that is being written. source: a places.Source; part: a copied.Copied; vocabulary: token_bytes of the
    teacher's tokenizer; taken: characters at which earlier items of the same list begin. ids: written so far.

    points: {(number of a spelling, character where it begins): byte that comes next}."""

    def __init__(self, source, part, vocabulary, taken=()):
        self.part, self.source, self.vocabulary, self.ids, text = part, source, vocabulary, [], source.text
        self.reached, self.left, self.starts, self.ends, self.span, self.instead = 1.0, 1.0, {}, {}, None, {}
        if part.kind == 'text':                                 # one spelling, which begins and ends at many places
            parts = [json.dumps(char, ensure_ascii=False)[1:-1].encode() for char in text]
            at = np.concatenate(([0], np.cumsum([len(spelled) for spelled in parts]))).astype(int).tolist()
            self.spellings = [(b''.join(parts), {at[n]: n for n in range(1, len(at)) if source.ends(n)})]
            able = [n for n in range(len(text)) if source.begins(n)]
            self.points = {(0, n): at[n] for n in able if n not in taken} or {(0, n): at[n] for n in able}
        else:
            found = source.candidates(part.kind)
            spelled = [json.dumps(value, ensure_ascii=False).strip('"').encode() for _, _, value in found]
            self.spellings = [(text, {len(text): end}) for text, (_, end, _) in zip(spelled, found)]
            self.points = {(n, start): 0 for n, (start, _, _) in enumerate(found)}

    def legal(self):
        """{id: the points after it} of the tokens that go on."""
        found, known = {}, {}
        for (n, start), at in self.points.items():
            spelled = self.spellings[n][0]
            if (n, at) not in known:
                known[n, at] = [(i, end) for end in range(at + 1, min(at + MOST_BYTES, len(spelled)) + 1)
                                if (i := self.vocabulary.get(spelled[at:end])) is not None]
            for i, end in known[n, at]:
                found.setdefault(i, {})[n, start] = end
        return found

    def closed(self):
        """{(number of a spelling, start): character after the value} of the points at which it may end."""
        ends = {(n, start): self.spellings[n][1].get(at) for (n, start), at in self.points.items()}
        return {key: end for key, end in ends.items() if end is not None and end > key[1]} if self.ids else {}

    def step(self, logits, closing, instead):
        """chooses the next token: an id, or (output index,) of one that closes the value, or that comes in its place;
        None if there is none. logits: of the whole vocabulary, an array; closing, instead: {output index: logit} of
        what may follow the value, or be written instead of it, such as null."""
        going, closed = self.legal(), self.closed()
        other = closing if closed else {} if self.ids else instead
        keys = [*going, *((out,) for out in other)]
        if not keys:
            return None
        scores = np.array([logits[i] for i in going] + [*other.values()], np.float64)
        p = np.exp(scores - scores.max())
        p /= p.sum()
        best, n_going = int(scores.argmax()), len(going)
        p_close = float(p[n_going:].sum()) if closed else 0.0
        if not self.ids:
            self.instead, self.reached = dict(zip(instead, p[n_going:].tolist())), float(p[:n_going].sum())
            p[:n_going] /= max(self.reached, 1e-30)
        for n, (i, points) in enumerate(going.items()):
            if n != best:
                self.share(self.reached * p[n], points)
        if closed:
            end = min(closed.values())
            self.ends[end] = self.ends.get(end, 0.0) + self.left * p_close
            self.left *= 1 - p_close
            self.share(self.reached * p_close, closed)
        if best >= n_going and not closed:
            return keys[best]
        if best >= n_going:
            start = min(closed)[1] if self.part.kind == 'text' else min(start for _, start in closed)
            self.span = start, closed[next(key for key in closed if key[1] == start)]
            return keys[best]
        self.reached *= p[best]
        self.points = going[keys[best]]
        self.ids.append(keys[best])
        return keys[best]

    def share(self, mass, points):
        """gives this probability to the places at which these points begin."""
        for _, start in points:
            self.starts[start] = self.starts.get(start, 0.0) + mass / len(points)

    def rows(self):
        """[(places (8,), log weights (8,))] of the first and of the last place of the value that was written, or of the
        step at which none was."""
        total = sum(self.instead.values())
        mass = [self.starts, self.ends] if self.span else [self.starts]
        return [best_places(of, at, 1 - total * (n == 0)) for n, (of, at) in enumerate(zip(mass, self.span or [None]))]


def best_places(mass, chosen, total):
    """(places, log weights) of {character: probability}, made to have this total; the chosen one first."""
    order = sorted(mass, key=lambda at: (at != chosen, -mass[at]))[:MOST_PLACES]
    places, weights = np.zeros(MOST_PLACES, np.uint16), np.full(MOST_PLACES, -np.inf, np.float16)
    factor = total / max(sum(mass.values()), 1e-30)
    places[:len(order)] = order
    weights[:len(order)] = [max(math.log(max(mass[at] * factor, 1e-30)), -60.0) for at in order]
    return places, weights


class Copier:
    """Copies the values of a batch of texts. space: an OutputSpace; texts: lists of ids."""

    def __init__(self, space, texts):
        self.space, self.vocabulary = space, token_bytes(space.tokenizer)
        self.sources = [Source(space.tokenizer.decode(list(map(int, ids))), space) for ids in texts]
        self.values = [[] for _ in texts]                       # of each text, in order
        self.open = {}                                          # {number of a text: its Value that is being written}

    def begin(self, i, state):
        """begins a value of text i, in the state before its first place."""
        part = self.space.copy_at[state]
        taken = [value.span[0] for value in self.values[i] if isinstance(part.keys[-1], int) and value.span
                 and value.part.keys[:-1] == part.keys[:-1]]
        self.open[i] = Value(self.sources[i], part, self.vocabulary, taken)

    def step(self, i, state, logits, kept, bias):
        """one token of the value of text i: an id; or a list of output indices, two places and what closes the value,
        or what is written in its place; or None if it cannot be written. state: before its first place; logits: of the
        whole vocabulary; kept (V,): of the output vocabulary; bias (S, V): of the space."""
        place = self.space.place_symbol(state)
        after = self.space.state_after([place, place], state)
        able = [sorted(out for out in set(self.space.transitions[at]) - set(self.barred(i, at)) if out < self.space.V)
                for at in (after, state)]
        closing, instead = ({out: float(kept[out] - bias[at, out]) for out in of}
                            for at, of in zip((after, state), able))
        token = self.open[i].step(logits, closing, instead)
        if not isinstance(token, tuple):
            return token
        self.values[i].append(value := self.open.pop(i))
        return [place, place, *token] if value.span else [*token]

    def write(self, teacher, state, rows, unread, starts):
        """lets a distil.engine.Teacher write a value in each of these texts. state: before its first place; unread: of
        each text, ids that are not read yet; starts: how many are. Changes both, but for what ends the value. Returns
        {number of a text: output indices, see step; [] if it cannot be written}."""
        written = {}
        for i in rows:
            self.begin(i, state)
        while rows:
            teacher.reserve(max(starts[i] + len(unread[i]) for i in rows))
            hidden = teacher.read(rows, [unread[i] for i in rows], [starts[i] for i in rows])
            last = np.cumsum([len(unread[i]) for i in rows]) - 1
            whole, going = teacher.logits(hidden[last], teacher.head).cpu().numpy(), []
            for i, logits in zip(rows, whole):
                starts[i] += len(unread[i])
                token = self.step(i, state, logits, logits[self.space.output_ids], self.space.bias)
                if isinstance(token, int):
                    unread[i] = [token]
                    going.append(i)
                else:
                    written[i] = token or []
            rows = going
        return written

    def logits(self, i, kept):
        """rows (V,) of logits for what step has returned as a list, at last: of both places, or of what is in their
        stead, and of the closing token, whose row is kept."""
        value, V = self.values[i][-1], len(kept)
        first = logits_of(value.instead, V)
        return [first, logits_of({}, V), kept] if value.span else [first]

    def barred(self, i, state):
        """the tokens that lead to a number or a date, where text i has none."""
        return self.space.barred(state, self.sources[i].candidates)

    def record(self, i, outs):
        """(places, weights), (n, 8) each, of the answer to text i."""
        rows = iter([row for value in self.values[i] for row in value.rows()])
        nothing = np.zeros(MOST_PLACES, np.uint16), np.full(MOST_PLACES, -np.inf, np.float16)
        states = self.space.states_before(outs)
        return [np.stack(part) for part in zip(*(next(rows) if state in self.space.copy_at else nothing
                                                 for state in states))]


@torch.inference_mode()
def answer_slowly(model, space, before, text, after, free=None, known=()):
    """the twin of distil/engine.py for answers with copied values: one token and one whole forward pass after another.
    model: of transformers; before, text, after: lists of ids; free: a free.FreeText; known: {state: logits (V,)}, in
    place of the model's. Returns what engine.answer does for one text."""
    copier, ids, state = Copier(space, [text]), [*before, *map(int, text), *after], 0
    outs, rows = [], []
    if free:
        ids, outs, rows, state = free.write_slowly(model, ids), [*free.outs], [*free.rows], free.state
    while state != space.done:
        whole = model(torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1].float().cpu()
        kept = whole[space.output_ids].numpy()                  # (V,)
        if state in space.copy_at:
            if 0 not in copier.open:
                copier.begin(0, state)
            token = copier.step(0, state, whole.numpy(), kept, space.bias)
            if token is None:
                return 'not_in_text'
            if not isinstance(token, list):
                ids.append(token)
                continue
            more, new = token, copier.logits(0, kept)
        else:
            kept = known[state] if state in known else kept
            able = sorted(set(space.transitions[state]) - set(copier.barred(0, state)))
            more, new = [max(able, key=lambda out: kept[out] - space.bias[state, out])], [kept]
        outs, rows, state = outs + more, rows + new, space.state_after(more, state)
        ids.append(space.output_ids[more[-1]])
    return outs, np.stack(rows), np.full(len(outs), np.nan, np.float32), *copier.record(0, outs)
