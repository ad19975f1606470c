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
import re
from functools import cached_property, lru_cache
from itertools import accumulate

import torch

from distil.automaton import Automaton
from distil.schema import Schema

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


def accepted_prefix(draft, chosen):
    """the accepted prefix of a draft that a model has read in one pass: the draft's tokens up to the first
    that the model would not have chosen, then the model's own choice. Greedy decoding with it gives the same
    answer in fewer passes.

    draft (n,) and chosen (n or n + 1,): lists of output indices; chosen[i] is the model's choice at the
    position of draft[i]. (Greedy speculative decoding, https://arxiv.org/abs/2211.17192.)
    """
    n = 0
    while n < len(draft) and chosen[n] == draft[n]:
        n += 1
    return chosen[:n + 1]


# -----------------------------------------------------------------------------
# from the pieces of the written form to tokens


def common_prefix(seqs):
    """length of the longest prefix that all these sequences share."""
    n = 0
    while all(len(s) > n for s in seqs) and len({s[n] for s in seqs}) == 1:
        n += 1
    return n


def split_tokens(pieces, encode):
    """the parts of an Automaton, in ids: [(path or None, [tuples of ids])], of the pieces of a written form (Schema.pieces).
    encode: text -> tokenizers.Encoding. ValueError if the tokens of two values merge.

    A token may reach from a value into the text beside it, so a value is encoded within a whole answer, in which all
    other slots have their first value. In each fixed text between two slots there must be a place where a token begins
    whatever the values are: the answer is cut there. What all values of a slot have in common at the ends of their cuts
    is fixed, too.
    """
    first = [piece if isinstance(piece, str) else piece.texts[0] for piece in pieces]
    at = list(accumulate(map(len, first), initial=0))           # where each piece begins
    encoded = {}                                                # {slot: [(ids, where each begins, how much longer)]}
    for k, piece in enumerate(pieces):
        for text in () if isinstance(piece, str) else piece.texts:
            encoding = encode(''.join([*first[:k], text, *first[k + 1:]]))
            begins = [begin for begin, _ in encoding.offsets]
            encoded.setdefault(k, []).append((encoding.ids, begins, len(text) - len(first[k])))

    def find_cut(gap):
        """the place of a cut in a fixed text, counted in the answer of first values."""
        if gap == 0 or gap == len(pieces) - 1:
            return 0 if gap == 0 else math.inf
        places = set(range(at[gap], at[gap + 1]))
        for k in gap - 1, gap + 1:
            for _, begins, longer in encoded[k]:
                places &= {begin - longer * (k < gap) for begin in begins}
        if not places:
            raise ValueError(f'the tokens of field {pieces[gap + 1].path!r} merge with those of the field before; '
                             'use indent = 2')
        return min(places)
    parts = []
    for k in encoded:
        left, right = find_cut(k - 1), find_cut(k + 1)
        seqs = [tuple(i for i, begin in zip(ids, begins) if left <= begin < right + longer)
                for ids, begins, longer in encoded[k]]
        start = common_prefix(seqs)
        end = common_prefix([seq[start:][::-1] for seq in seqs])  # counted from the end
        values = [seq[start:len(seq) - end] for seq in seqs]
        parts += [(None, [seqs[0][:start]]), (pieces[k].path, values), (None, [seqs[0][len(seqs[0]) - end:]])]
    return parts


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

    def __init__(self, tokenizer, fields, indent=None, fence=False, end_id=None, auxiliary=(), bias=None):
        self.tokenizer, self.schema, self.end_id = tokenizer, Schema(fields).check(), end_id
        self.indent, self.fence = indent, fence
        self.check_constants()
        pieces = self.schema.pieces(indent, fence)
        pieces[-1] += '' if end_id is not None else '\n'
        parts = split_tokens(pieces, lambda text: tokenizer.encode(text, add_special_tokens=False))
        parts += [] if end_id is None else [(None, [(end_id,)])]
        required = dict.fromkeys(i for _, alternatives in parts for ids in alternatives for i in ids)
        self.n_required = len(required)
        self.output_ids = list(required | dict.fromkeys(auxiliary))
        self.output_index = {i: out for out, i in enumerate(self.output_ids)}
        super().__init__([(path, [tuple(self.output_index[i] for i in ids) for ids in alternatives])
                          for path, alternatives in parts], len(self.output_ids))
        self.max_answer = self.longest
        self.verify()
        self.set_bias(bias or {})
        self.parse = lru_cache(maxsize=10_000)(self.parse)  # answers repeat; the limit bounds the memory

    @classmethod
    def from_task(cls, tokenizer, task):
        """the OutputSpace that a meta.json or a checkpoint describes. task: a dict."""
        keys = 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'bias'  # output_ids as auxiliary
        return cls(tokenizer, *(task.get(key) for key in keys))

    def check_constants(self):
        """raises ValueError if a key or a value contains a special token of the tokenizer."""
        special = special_ids(self.tokenizer)
        for leaf in self.schema.leaves:
            for constant in [*leaf.keys, *leaf.values]:
                text = json.dumps(constant, ensure_ascii=False)
                if special.intersection(self.tokenizer.encode(text, add_special_tokens=False).ids):
                    raise ValueError(f'field {leaf.path!r}: {constant!r} has a special token of the tokenizer in it')

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
            answer = self.schema.build([rng.randrange(len(leaf)) for leaf in self.schema.leaves])
            outs = [self.output_index.get(i, -1) for i in self.encode(answer)]
            if -1 in outs or self.state_after(outs) != self.done:
                raise ValueError(f'the tokenizer encodes {self.text(answer)!r} differently from its parts; '
                                 'try another indent')

    # between the distribution of a leaf and that of the tokens

    def set_bias(self, bias):
        """makes the table of the bias. bias: {state: {output index: number}}, as meta.json keeps it."""
        self.bias = torch.zeros(self.next_state.shape)
        for state, row in bias.items():
            for out, value in row.items():
                self.bias[int(state), int(out)] = value

    @cached_property
    def ways(self):
        """{path of a leaf: [way of each of its values]} for the leaves with a choice. The way of a value is the list of
        its decisions (state, output index, the output indices from the leaf's first decision to it)."""
        ways = {}
        for leaf in self.schema.decided:
            ways[leaf.path] = []
            for value in leaf.values:
                outs = self.from_json(self.schema.replace(leaf, value))
                decisions = [(n, state) for n, state in enumerate(self.states_before(outs))
                             if self.leaf_at[state] == leaf.path and len(self.transitions[state]) > 1]
                start = decisions[0][0]
                ways[leaf.path].append([(state, outs[n], tuple(outs[start:n])) for n, state in decisions])
        return ways

    def token_shares(self, path, probabilities):
        """{state: {output index: probability}} at the decisions on the way to each value of a leaf that has a
        probability above 0. The probability of a token is the sum over the values that it leads to, normalised
        at each state. probabilities: a list, one per value of the leaf, in order."""
        rows = {}
        for way, p in zip(self.ways.get(path, []), probabilities):
            for state, out, _ in way if p else ():
                row = rows.setdefault(state, dict.fromkeys(self.transitions[state], 0.0))
                row[out] += p
        for row in rows.values():
            total = sum(row.values())
            row.update({out: p / total for out, p in row.items()})
        return rows

    # answers and output indices

    def prompt_mismatches(self, prompt):
        """yields a message for each JSON object in a prompt that is not an answer of this schema, or not in
        the canonical form."""
        for shown in re.findall(r'\{[^{}]*"[^{}]*\}', prompt):
            try:
                answer = json.loads(shown)
            except ValueError:
                continue
            if not self.schema.is_answer(answer):
                yield f'{shown} is not an answer of this schema'
            elif shown not in (expected := self.text(answer)):
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
