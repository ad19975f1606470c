"""The output space: every answer a schema allows, as an automaton over tokens, and the vocabulary it needs.

    space = OutputSpace(tokenizer, {'tone': ['neutral', 'friendly'], 'spam': [True, False]})
    space.to_json(space.from_json({'tone': 'friendly', 'spam': False}))

An answer is a sequence of tokens. A *forced* token is the only legal one, at a *decision* several are legal:

    {"tone":"   neutral | friendly   ","spam":   true | false   }\n
    forced      decision             forced      decision       forced

An *id* is a row of the teacher's vocabulary: the tokenizer returns ids and the student reads texts as them. An
*output index* is a position in space.output_ids: answers are output indices, and output.bin stores them. The schema
(schema.py) says what the answers are and how they are written, the automaton (automaton.py) which token may come next.
"""
import hashlib
import json
import math
import random
from functools import cached_property, lru_cache

import torch

from distil.automaton import Automaton
from distil.cutter import Cutter, make_parts
from distil.schema import Schema
from distil.values import Mark

# -----------------------------------------------------------------------------
# texts and tokens


def tokenizer_hash(tokenizer):
    """hash of a tokenizers.Tokenizer: of its vocabulary and of the ids of a probe text."""
    probe = '{"a": "b c", "n": -12}\n```json\n  été 日本 😀 <b> I\'m'
    ids = tokenizer.encode(probe, add_special_tokens=False).ids
    vocab = sorted((i, t) for t, i in tokenizer.get_vocab().items())
    return hashlib.blake2b(repr((vocab, ids)).encode('utf-8', 'backslashreplace'), digest_size=8).hexdigest()


def clean(text):
    """the form of a text that is hashed, labelled, trained on and sampled from: each run of whitespace is one
    space."""
    return ' '.join(text.split())


def kept_part(task):
    """the slice of a longer text's ids that is read: the first max_text, or the last. task: a meta.json."""
    return slice(-task['max_text'], None) if task.get('keep_end') else slice(task['max_text'])


def special_ids(tokenizer):
    """set of the ids of a tokenizers.Tokenizer that stand for no text: turns, padding, images."""
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


# -----------------------------------------------------------------------------
# the output space


class OutputSpace(Automaton):
    """All answers that a schema allows, as an automaton over the V tokens of the output vocabulary.

    tokenizer: a tokenizers.Tokenizer. fields: as in a config, see schema.py. indent, fence: style of the JSON. end_id:
    the teacher's end of turn, or None if a newline ends the answer (few-shot completion). auxiliary: ids appended to
    the output vocabulary. bias: what calibration subtracts from the teacher's logits, see calibrate.py. ValueError if
    the schema cannot be compiled.

    schema       the Schema; space.leaf_at[state] is the path of one of its leaves, or None
    output_ids   (V,) list    ids of the output vocabulary, first the n_required ids of valid answers
    output_index              {id: output index}
    max_answer   int          tokens of the longest answer, end token included
    bias         (S, V)       float32, 0 without calibration
    """

    def __init__(self, tokenizer, fields, indent=None, fence=False, end_id=None, auxiliary=(), bias=None, left_out=()):
        self.tokenizer, self.schema, self.end_id = tokenizer, Schema(fields, left_out).check(), end_id
        self.indent, self.fence = indent, fence
        self.check_constants()
        place = self.schema.place(indent, fence, '' if end_id is not None else '\n')
        cut, end = Cutter(place, lambda text: tokenizer.encode(text, add_special_tokens=False)), end_id is not None
        forks = [[way._replace(tokens=(*way.tokens, *[end_id] * (end and way.following is None))) for way in ways]
                 for ways in cut.forks]
        parts = make_parts(cut.start, forks)
        required = dict.fromkeys(i for part in parts for ids, _, _ in part for i in ids)
        self.n_required = len(required)
        self.output_ids = list(required | dict.fromkeys(auxiliary))
        self.output_index = {i: out for out, i in enumerate(self.output_ids)}
        outs = lambda ids: tuple(self.output_index[i] for i in ids)
        super().__init__([[(outs(ids), *rest) for ids, *rest in part] for part in parts], len(self.output_ids))
        self.start, self.start_text = outs(cut.start), cut.start_text
        self.forks = [[way._replace(tokens=outs(way.tokens)) for way in ways] for ways in forks]
        self.leaf_at, self.max_answer = list(map(self.find_leaf, self.labels)), self.longest
        self.verify()
        self.set_bias(bias or {})
        self.parse = lru_cache(maxsize=10_000)(self.parse)  # answers repeat; the limit bounds the memory

    @classmethod
    def from_task(cls, tokenizer, task):
        """the OutputSpace that a meta.json or a checkpoint describes. task: a dict."""
        keys = 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'bias', 'left_out'  # output_ids as auxiliary
        return cls(tokenizer, *(task.get(key) for key in keys))

    def check_constants(self):
        """raises ValueError if a key or a value contains a special token of the tokenizer."""
        special = special_ids(self.tokenizer)
        for leaf in self.schema.leaves:
            for constant in [*leaf.keys, *leaf.values]:
                text = constant if isinstance(constant, Mark) else json.dumps(constant, ensure_ascii=False)
                encoding = self.tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else None
                if encoding and special.intersection(encoding.ids):
                    raise ValueError(f'field {leaf.path!r}: {constant!r} has a special token of the tokenizer in it')

    def find_leaf(self, labels):
        """the path of the leaf that is decided where these options are possible: that of the first choice in which
        they differ, else of the last one that is made; None in fixed text. labels: (fork, option) each."""
        made = [self.forks[k][n].made for k, n in labels if k == labels[0][0]]
        for choices in zip(*made):
            if len(set(choices)) > 1:
                return self.schema.by_choice[choices[0][0]].group
        return self.schema.by_choice[made[0][-1][0]].group if made else None

    def text(self, answer):
        """the canonical text of an answer, a dict."""
        text = self.schema.write(answer, self.indent, self.fence)
        return text if self.end_id is not None else text + '\n'

    def encode(self, answer):
        """ids of an answer, a dict, end token included."""
        ids = self.tokenizer.encode(self.text(answer), add_special_tokens=False).ids
        return ids if self.end_id is None else ids + [self.end_id]

    def verify(self, n=200):
        """raises ValueError if the automaton rejects one of n random answers as the tokenizer encodes it."""
        rng = random.Random(0)
        for _ in range(n):
            answer = self.schema.fill(lambda choice: rng.randrange(len(choice)))
            outs = [self.output_index.get(i, -1) for i in self.encode(answer)]
            if -1 in outs or self.state_after(outs) != self.done:
                raise ValueError(f'the tokenizer encodes {self.text(answer)!r} differently from its parts; '
                                 'try another indent')

    # between the distribution of a choice and that of the tokens

    def set_bias(self, bias):
        """makes the table of the bias. bias: {state: {output index: number}}, as meta.json keeps it."""
        self.bias = torch.zeros(self.next_state.shape)
        for state, row in bias.items():
            for out, value in row.items():
                self.bias[int(state), int(out)] = value

    def walk(self, answer):
        """[(number of a fork, state in which it is reached, option)] of an answer, in order: the option is the number
        of that which the answer takes."""
        numbers, k, state, found = self.schema.numbers(answer), 0, self.state_after(self.start), []
        while k is not None:
            n = next(n for n, way in enumerate(self.forks[k]) if all(numbers.get(path) == m for path, m in way.made))
            found.append((k, state, n))
            state, k = self.state_after(self.forks[k][n].tokens, state), self.forks[k][n].following
        return found

    @cached_property
    def entries(self):
        """[(number of a fork, state)] for each state in which a fork can be reached, the earlier ones first."""
        found, todo = {}, [(0, self.state_after(self.start))]
        while todo:
            k, state = entry = todo.pop()
            if k is not None and entry not in found:
                found[entry] = True
                todo += [(way.following, self.state_after(way.tokens, state)) for way in self.forks[k]]
        return sorted(found, key=lambda entry: -self.n_left[entry[1]])

    @lru_cache(maxsize=100_000)
    def steps(self, k, entry):
        """for each option of fork k, reached in the state `entry`, its decisions in order: (state, the tokens that take
        it on, all tokens that are possible if the answer is at this fork, the option's tokens before). Most are taken
        on by one token. But if an option is the beginning of another one, as 1 of 11, all that may follow it are."""
        ways, found = self.forks[k], []
        for way in ways:
            state, steps = entry, []
            for n in range(len(way.tokens) + 1):
                alike = [other.tokens for other in ways if other.tokens[:n] == way.tokens[:n]]
                own, legal = {tokens[n] for tokens in alike if len(tokens) > n}, set(self.transitions[state])
                if n == len(way.tokens):
                    if own:                                     # of longer options
                        steps.append((state, tuple(legal - own), tuple(legal), way.tokens))
                    break
                possible = legal if any(len(tokens) == n for tokens in alike) else own
                if len(possible) > 1:
                    steps.append((state, (way.tokens[n],), tuple(possible), way.tokens[:n]))
                state = self.transitions[state][way.tokens[n]]
            found.append(steps)
        return found

    def token_shares(self, probabilities, entries=None):
        """{state: {output index: probability}} at the decisions of the choices whose probabilities are given, {path of
        a choice: list}, if they are independent. The probability of a token is the sum over the options that it leads
        to, normalised at each state. entries: see there; those to look at, None for all."""
        rows, left = {}, {}                                     # left: {state: share of what follows a shorter option}
        for k, entry in self.entries if entries is None else entries:
            if not all(path in probabilities for way in self.forks[k] for path, _ in way.made):
                continue
            share = left.get(entry, 1.0)
            for way, steps in zip(self.forks[k], self.steps(k, entry)):
                p = math.prod(probabilities[path][n] for path, n in way.made)
                for state, outs, _, _ in steps if p else ():
                    row = rows.setdefault(state, dict.fromkeys(self.transitions[state], 0.0))
                    if len(outs) > 1:
                        left[state] = p
                    else:
                        row[outs[0]] += p * (share if state == entry else 1.0)
        rows = {state: row for state, row in rows.items() if sum(row.values())}
        for row in rows.values():
            total = sum(row.values())
            row.update({out: p / total for out, p in row.items()})
        return rows

    # answers and output indices

    def prompt_mismatches(self, prompt):
        """yields a message for each JSON object in a prompt that is not an answer of this schema, or not in
        the canonical form. It may have properties that are left out."""
        at, names, decoder = prompt.find('{'), self.schema.tree.properties.keys(), json.JSONDecoder()
        while at >= 0:
            try:
                answer, end = decoder.raw_decode(prompt, at)
            except (ValueError, RecursionError):
                answer, end = {}, at + 1
            shown, kept = prompt[at:end], {k: v for k, v in answer.items() if k not in self.schema.left_out}
            at = prompt.find('{', end)
            if not names & answer.keys():
                continue
            if not self.schema.is_answer(kept):
                yield f'{shown} is not an answer of this schema'
            elif kept == answer and shown not in (expected := self.text(answer)):
                yield f'{shown} must be written {expected.strip()}'

    def from_json(self, answer):
        """dict -> list of the output indices of that answer, or None if the schema does not allow it."""
        return [self.output_index[i] for i in self.encode(answer)] if self.schema.is_answer(answer) else None

    def to_json(self, outs):
        """output indices -> dict, or None if they are not a complete valid answer."""
        return self.parse(tuple(outs))

    def parse(self, outs):
        """to_json of a tuple; __init__ puts a cache around it."""
        if self.state_after(outs) != self.done:
            return None
        text = self.tokenizer.decode([self.output_ids[out] for out in outs], skip_special_tokens=True)
        return json.loads(text.strip().removeprefix('```json').removesuffix('```'))
