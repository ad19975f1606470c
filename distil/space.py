"""The output space: every answer a schema allows, as an automaton over tokens, and the vocabulary it needs.

    space = OutputSpace(tokenizer, {'tone': ['neutral', 'friendly'], 'spam': [True, False]})
    space.to_json(space.from_json({'tone': 'friendly', 'spam': False}))

An answer is a sequence of tokens. A *forced* token is the only legal one, at a *decision* several are legal:

    {"tone":"   neutral | friendly   ","spam":   true | false   }\n
    forced      decision             forced      decision       forced

An *id* is a row of the teacher's vocabulary: the tokenizer returns ids and the student reads texts as them. An
*output index* is a position in space.output_ids: answers are output indices, and output.bin stores them. An index
from V on stands for a place of the text, the first or the last one of a copied value (places.py). The schema
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


class Outs(list):
    """the output indices of an answer with copied values. spans: of these, in order, (start, end, value) each: the
    characters of the text at which it stands."""

    def __init__(self, outs, spans=()):
        super().__init__(outs)
        self.spans = list(spans)

    def __eq__(self, other):
        """True if the answers are equal, wherever their values stand."""
        values = [[value for _, _, value in getattr(outs, 'spans', ())] for outs in (self, other)]
        return list.__eq__(self, other) and values[0] == values[1]

    __hash__ = None


# -----------------------------------------------------------------------------
# the output space


class OutputSpace(Automaton):
    """All answers that a schema allows, as an automaton over the V tokens of the output vocabulary.

    tokenizer: a tokenizers.Tokenizer. fields: as in a config, see schema.py. indent, fence: style of the JSON. end_id:
    the teacher's end of turn, or None if a newline ends the answer (few-shot completion). auxiliary: ids appended to
    the output vocabulary. bias: what calibration subtracts from the teacher's logits, see calibrate.py. locale,
    reference_date: how numbers and dates of a text are read, see candidates.py. ValueError if the schema cannot be
    compiled.

    schema       the Schema; space.leaf_at[state] is the path of one of its leaves, or None
    copy_at      {state: the copied.Copied whose first or last place may be chosen there; a token may be legal, too, as
                 where a number or null is written}
    output_ids   (V,) list    ids of the output vocabulary, first the n_required ids of valid answers
    output_index              {id: output index}
    max_answer   int          tokens of the longest answer that a student reads: all, end token included; with copied
                              values the start and the decisions alone
    bias         (S, V)       float32, 0 without calibration
    """

    def __init__(self, tokenizer, fields, indent=None, fence=False, end_id=None, auxiliary=(), bias=None, left_out=(),
                 locale=None, reference_date=None):
        self.locale, self.reference_date = locale, reference_date
        self.tokenizer, self.schema, self.end_id = tokenizer, Schema(fields, left_out).check(), end_id
        self.indent, self.fence = indent, fence
        self.has_options = any(part.is_option for part in self.schema.copied)
        self.check_constants()
        place = self.schema.place(indent, fence, '' if end_id is not None else '\n')
        cut, end = Cutter(place, lambda text: tokenizer.encode(text, add_special_tokens=False)), end_id is not None
        forks = [[way._replace(tokens=(*way.tokens, *[end_id] * (end and way.following is None))) for way in ways]
                 for ways in cut.forks]
        parts = make_parts(cut.start, forks)
        required = dict.fromkeys(i for part in parts for ids, _, _ in part for i in ids if i >= 0)
        self.n_required = len(required)
        self.output_ids = list(required | dict.fromkeys(auxiliary))
        self.output_index = {i: out for out, i in enumerate(self.output_ids)}
        outs = lambda ids: tuple(self.output_index[i] if i >= 0 else len(self.output_ids) - 1 - i for i in ids)
        super().__init__([[(outs(ids), *rest) for ids, *rest in part] for part in parts], len(self.output_ids))
        self.start, self.start_text = outs(cut.start), cut.start_text
        self.forks = [[way._replace(tokens=outs(way.tokens)) for way in ways] for ways in forks]
        self.copy_at = {state: self.schema.copied[out - self.V] for state, row in enumerate(self.transitions)
                        for out in row if out >= self.V}
        self.leaf_at = list(map(self.find_leaf, self.labels))
        self.max_answer = self.n_decisions + 1 if self.schema.copied else self.longest
        for state, part in self.copy_at.items():
            self.leaf_at[state] = part.group
        self.verify()
        self.set_bias(bias or {})
        self.parse = lru_cache(maxsize=10_000)(self.parse)  # answers repeat; the limit bounds the memory

    @classmethod
    def from_task(cls, tokenizer, task):
        """the OutputSpace that a meta.json or a checkpoint describes. task: a dict."""
        keys = ('fields', 'indent', 'fence', 'end_id', 'output_ids', 'bias', 'left_out', 'locale',
                'reference_date')                               # output_ids as auxiliary
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
            if self.schema.copied:                              # cut into pieces where the values stand
                outs, values = self.write_outs(answer)
                assert self.to_json(Outs(outs, [(0, 0, value) for value in values])) == answer
                continue
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
        numbers = self.schema.numbers(self.schema.with_examples(answer))
        state, found = self.state_after(self.start), []
        k = 0 if self.forks else None
        while k is not None:
            n = next(n for n, way in enumerate(self.forks[k]) if all(numbers.get(path) == m for path, m in way.made))
            found.append((k, state, n))
            state, k = self.state_after(self.forks[k][n].tokens, state), self.forks[k][n].following
        return found

    @cached_property
    def entries(self):
        """[(number of a fork, state)] for each state in which a fork can be reached, the earlier ones first."""
        found, todo = {}, [(0 if self.forks else None, self.state_after(self.start))]
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

    @cached_property
    def needs(self):
        """{state: the kinds of numbers and dates that are copied whatever is chosen from there on}."""
        needs = {self.done: frozenset()}
        for state in sorted(range(len(self.transitions)), key=self.n_left.get):
            ways = [needs[after] | ({self.copy_at[state].kind} - {'text'} if out >= self.V else set())
                    for out, after in self.transitions[state].items()]
            needs[state] = frozenset.intersection(*map(frozenset, ways)) if ways else frozenset()
        return needs

    def barred(self, state, has):
        """the tokens after which a number or a date must be copied though the text has none, in a state in which others
        are legal, too. has: function of a kind of copied.Copied that says whether it has one."""
        row = self.transitions[state]
        if len(row) < 2 or not self.copy_at:
            return []
        barred = [out for out, after in row.items() if not all(map(has, self.needs[after]))
                  or out >= self.V and self.copy_at[state].kind != 'text' and not has(self.copy_at[state].kind)]
        return [out for out in barred if out < self.V] if len(barred) < len(row) else []

    def place_symbol(self, state):
        """the index from V on that stands for a place, in a state in which one may be chosen."""
        return max(self.transitions[state])

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

    def write_outs(self, answer):
        """(output indices of an answer, its copied values in order). ValueError if the schema does not allow it."""
        outs, numbers = [*self.start], self.schema.numbers(answer)
        for k, _, n in self.walk(answer):
            outs += self.forks[k][n].tokens
        states = self.states_before(outs)
        copied = [self.copy_at[state] for state, out in zip(states, outs) if out >= self.V][::2]
        return outs, [numbers[part.path] for part in copied]

    def from_json(self, answer):
        """dict -> list of the output indices of that answer, or None if the schema does not allow it. Copied values
        have no place in it: see places.py."""
        if not self.schema.is_answer(answer):
            return None
        return self.write_outs(answer)[0] if self.schema.copied else [self.output_index[i] for i in self.encode(answer)]

    def to_json(self, outs):
        """output indices -> dict, or None if they are not a complete valid answer. outs: a list, Outs if there are
        copied values."""
        return self.parse(tuple(outs), tuple(value for _, _, value in getattr(outs, 'spans', ())))

    def parse(self, outs, values=()):
        """to_json of tuples; __init__ puts a cache around it. values: that are copied."""
        if self.state_after(outs) != self.done:
            return None
        text, run, values = '', [], iter(values)
        for out, before in zip((*outs, None), (None, *outs)):
            if out is not None and out < self.V:
                run.append(self.output_ids[out])
                continue
            text += self.tokenizer.decode(run, skip_special_tokens=True)
            if out is not None and (before is None or before < self.V):  # the first of the two places of a value
                value = next(values)
                text += json.dumps(value, ensure_ascii=False)[slice(1, -1) if isinstance(value, str) else slice(None)]
            run = []
        return json.loads(text.strip().removeprefix('```json').removesuffix('```'))
