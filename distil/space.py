"""The output space: every answer a schema allows, as an automaton over tokens, and the vocabulary it needs.

    space = OutputSpace(tokenizer, {'tone': ['neutral', 'friendly'], 'spam': [True, False]})
    space.to_json(space.from_json({'tone': 'friendly', 'spam': False}))

An *id* is a row of the teacher's vocabulary: what the tokenizer gives and the student reads. An *output
index* is a position in space.output_ids: what the student predicts and output.bin stores.
"""
import hashlib
import json
import random
import re
from functools import cached_property, lru_cache

import torch


def tokenizer_hash(tokenizer):
    """hash of what a tokenizers.Tokenizer does: its vocabulary, and how it cuts a probe text."""
    probe = '{"a": "b c", "n": -12}\n```json\n  été 日本 😀 <b> I\'m'
    ids = tokenizer.encode(probe, add_special_tokens=False).ids
    vocab = sorted((i, t) for t, i in tokenizer.get_vocab().items())
    return hashlib.blake2b(repr((vocab, ids)).encode('utf-8', 'backslashreplace'), digest_size=8).hexdigest()


def clean(text):
    """the one form of a text that is hashed, labelled, trained on and sampled from: each run of whitespace as
    one space."""
    return ' '.join(text.split())


def special_ids(tokenizer):
    """ids of a tokenizers.Tokenizer that stand for no text: turns, padding, images."""
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def value_name(value):
    """a value as the key of a JSON object."""
    return value if isinstance(value, str) else json.dumps(value)


def accepted_prefix(draft, chosen):
    """what stands of a draft that a model has read at once: its tokens as far as the model would have written
    them too, then the model's own. So greedy decoding gives the same answer, only in fewer passes.

    draft (n,) and chosen (n or n + 1,): lists of output indices, chosen[i] the model's choice where draft[i]
    stands. (Greedy speculative decoding, https://arxiv.org/abs/2211.17192.)
    """
    n = 0
    while n < len(draft) and chosen[n] == draft[n]:
        n += 1
    return chosen[:n + 1]


def common_prefix(seqs):
    """number of tokens that all of these sequences begin with."""
    n = 0
    while all(len(s) > n for s in seqs) and len({s[n] for s in seqs}) == 1:
        n += 1
    return n


class OutputSpace:
    """All answers a schema allows, as a DFA over tokens, and the output vocabulary they and their neighbours
    need.

    tokenizer: a tokenizers.Tokenizer. fields: {name: [allowed JSON values]} in output order. indent, fence:
    style of the JSON. end_id: the teacher's end of turn, or None where a newline ends the answer (few-shot
    completion). auxiliary: ids appended to the output vocabulary. bias: what calibration takes off the
    teacher's logits, see calibrate.py. ValueError where the schema cannot be compiled.

    output_ids  (V,) list   ids of the output vocabulary, the n_required of valid answers first
    moves       per state {legal output index: state after it}; answers start in state 0
    next_state  (S, V) long the same as a table, -1 where the schema forbids
    done        int         the state after the end token
    forced      (S,) long   the only legal output index, -1 where there is a choice
    runs        per state   the forced output indices that follow, and the state after: a decision, or done
    field       per state   the field whose value is being written, None between them
    max_answer  int         tokens of the longest answer, end token included
    bias        (S, V)      float32, 0 where nothing is taken off
    """

    def __init__(self, tokenizer, fields, indent=None, fence=False, end_id=None, auxiliary=(), bias=None):
        self.tokenizer, self.fields, self.end_id = tokenizer, fields, end_id
        self.indent, self.fence = indent, fence
        for name, values in fields.items():
            self.check_constants(name, [name, *values] if isinstance(values, list) else [name])
            if not isinstance(values, list) or not values or len(set(map(json.dumps, values))) < len(values):
                raise ValueError(f'field {name!r} needs a list of different values, not {values!r}')
        if not any(len(values) > 1 for values in fields.values()):
            raise ValueError("nothing to decide; a task needs fields = {'name': [two or more values], ...}")
        self.segments = self.find_segments()
        required = dict.fromkeys(t for alternatives in self.segments for a in alternatives for t in a)
        self.n_required = len(required)
        self.output_ids = list(required | dict.fromkeys(auxiliary))
        self.output_index = {t: i for i, t in enumerate(self.output_ids)}
        self.compile()
        self.verify()
        self.set_bias(bias or {})
        self.parse = lru_cache(maxsize=10_000)(self.parse)  # most answers come again; memory must not grow

    @classmethod
    def from_task(cls, tokenizer, task):
        """as a meta.json or a checkpoint describes it. task: a dict."""
        keys = 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'bias'
        return cls(tokenizer, *(task.get(key) for key in keys))

    def check_constants(self, name, constants):
        """ValueError where one of them is not what JSON can say, or the tokenizer would not read it as
        text."""
        if not isinstance(name, str):
            raise ValueError(f'field names are texts, not {name!r}')
        special = special_ids(self.tokenizer)
        for constant in constants:
            try:
                text = json.dumps(constant, ensure_ascii=False, allow_nan=False)
                text.encode()  # a lone surrogate is no text
            except (TypeError, ValueError, RecursionError):
                raise ValueError(f'field {name!r}: {constant!r} is nothing that JSON can say') from None
            if special.intersection(self.tokenizer.encode(text, add_special_tokens=False).ids):
                raise ValueError(f'field {name!r}: {constant!r} is a special token to the tokenizer, no text')

    def text(self, values):
        """the canonical text of an answer; values in field order."""
        answer = json.dumps(dict(zip(self.fields, values)), indent=self.indent, ensure_ascii=False,
                            separators=(',', ':' if self.indent is None else ': '))
        answer = f'```json\n{answer}\n```' if self.fence else answer
        return answer if self.end_id is not None else answer + '\n'

    def encode(self, values):
        """ids of an answer, end token included."""
        ids = self.tokenizer.encode(self.text(values), add_special_tokens=False).ids
        return ids if self.end_id is None else ids + [self.end_id]

    def find_segments(self):
        """the answer as a row of segments, each a list of alternative id tuples: scaffolding has one, a field
        more.

        One encoding per value: what differs between the values of a field, all else equal, is its span.
        """
        base = [values[0] for values in self.fields.values()]
        base_ids, segments, at = self.encode(base), [], 0
        for i, (name, values) in enumerate(self.fields.items()):
            if len(values) == 1:
                continue  # a constant is scaffolding
            seqs = [self.encode(base[:i] + [v] + base[i + 1:]) for v in values]
            start = common_prefix(seqs)
            stop = common_prefix([s[start:][::-1] for s in seqs])  # counted from the end
            if start < at:
                raise ValueError(f'the tokens of field {name!r} merge with the field before; use indent = 2')
            segments += [[tuple(base_ids[at:start])], [tuple(s[start:len(s) - stop]) for s in seqs]]
            at = len(base_ids) - stop
        return segments + [[tuple(base_ids[at:])]]

    def compile(self):
        """subset construction (https://en.wikipedia.org/wiki/Powerset_construction): a state is the set of
        (segment, alternative, position) that the tokens so far allow, so values that are prefixes of others
        are no special case."""
        def settle(points):
            seen, todo = set(), list(points)
            while todo:
                seg, alt, at = point = todo.pop()
                if seg < len(self.segments) and at == len(self.segments[seg][alt]):  # finished: open the next
                    following = self.segments[seg + 1] if seg + 1 < len(self.segments) else [()]
                    todo += [(seg + 1, a, 0) for a in range(len(following))]
                else:
                    seen.add(point)
            return frozenset(seen)

        start = settle((0, a, 0) for a in range(len(self.segments[0])))
        number, rows, todo = {start: 0}, {}, [start]
        while todo:
            state = todo.pop()
            moves = {}
            for seg, alt, at in state:
                if seg < len(self.segments):
                    token = self.output_index[self.segments[seg][alt][at]]
                    moves.setdefault(token, set()).add((seg, alt, at + 1))
            row = rows[number[state]] = {}
            for token in sorted(moves):
                after = settle(moves[token])
                if after not in number:
                    number[after] = len(number)
                    todo.append(after)
                row[token] = number[after]
        self.transitions = [rows[state] for state in range(len(number))]
        names = [name for name, values in self.fields.items() if len(values) > 1]
        self.field = []
        for state in number:
            odd = [seg for seg, _, _ in state if seg % 2 and seg < len(self.segments)]  # these are values
            self.field.append(names[odd[0] // 2] if odd else None)
        self.next_state = torch.full((len(number), len(self.output_ids)), -1)
        for state, row in enumerate(self.transitions):
            for token, after in row.items():
                self.next_state[state, token] = after
        self.done = number[frozenset({(len(self.segments), 0, 0)})]
        legal = self.next_state >= 0
        self.forced = torch.where(legal.sum(1) == 1, legal.int().argmax(1), -1)
        self.forced_runs = []
        for state in range(len(self.transitions)):
            run = []
            while len(self.transitions[state]) == 1:
                (out, state), = self.transitions[state].items()
                run.append(out)
            self.forced_runs.append((run, state))
        self.max_answer = sum(max(map(len, alternatives)) for alternatives in self.segments)

    def verify(self, n=200):
        """n random whole answers must be accepted token for token as the tokenizer writes them, else
        ValueError."""
        rng = random.Random(0)
        for _ in range(n):
            values = [rng.choice(v) for v in self.fields.values()]
            outs = [self.output_index.get(t, -1) for t in self.encode(values)]
            if -1 in outs or self.state_after(outs) != self.done:
                raise ValueError(f'the tokenizer writes {self.text(values)!r} in a way its parts do not; '
                                 'try another indent')

    def set_bias(self, bias):
        """bias: {state: {output index: number}}, as meta.json keeps it."""
        self.bias = torch.zeros(self.next_state.shape)
        for state, row in bias.items():
            for out, value in row.items():
                self.bias[int(state), int(out)] = value

    def token_shares(self, field, probabilities):
        """{state: {output index: probability}} at every decision in a field's value, from the probabilities
        of its values (a list, in their order): at each state those of the values that a token leads to,
        summed. Where none of them can be reached all tokens are alike."""
        rows = {}
        for way, p in zip(self.value_paths.get(field, []), probabilities):
            for state, out, _ in way:
                row = rows.setdefault(state, dict.fromkeys(self.transitions[state], 0.0))
                row[out] += p
        for row in rows.values():
            total = sum(row.values())
            row.update({out: p / total if total else 1 / len(row) for out, p in row.items()})
        return rows

    @cached_property
    def value_paths(self):
        """{field: [way of each of its values]}, of fields with a choice: the way to a value is its decisions,
        [(state, output index, the output indices from the field's first decision to here)]."""
        ways, first = {}, {name: values[0] for name, values in self.fields.items()}
        for name in [name for name, values in self.fields.items() if len(values) > 1]:
            ways[name] = []
            for value in self.fields[name]:
                outs = self.from_json({**first, name: value})
                at = [(n, state) for n, state in enumerate(self.states_before(outs))
                      if self.field[state] == name and len(self.transitions[state]) > 1]
                ways[name].append([(state, outs[n], tuple(outs[at[0][0]:n])) for n, state in at])
        return ways

    def prompt_mismatches(self, prompt):
        """yields what is wrong with each JSON object in a prompt that is no answer of this schema in its due
        form."""
        for shown in re.findall(r'\{[^{}]*"[^{}]*\}', prompt):
            try:
                answer = json.loads(shown)
            except ValueError:
                continue
            if self.from_json(answer) is None:
                yield f'{shown} is no answer of this schema'
            elif shown not in (due := self.text([answer[name] for name in self.fields])):
                yield f'{shown} will have to be written {due.strip()}'

    def state_after(self, outs, state=0):
        """state after the output indices outs, written in `state`; -1 once they have left the schema."""
        for out in outs:
            state = self.transitions[state].get(out, -1) if state >= 0 else -1
        return state

    def states_before(self, outs):
        """the state before each of the output indices outs, which must be the start of a valid answer."""
        states = [0]
        for out in outs:
            states.append(self.transitions[states[-1]][out])
        return states[:-1]

    def from_json(self, answer):
        """dict -> output indices of that answer, or None where the schema has no such answer."""
        if not isinstance(answer, dict) or set(answer) != set(self.fields):
            return None
        for name, values in self.fields.items():
            if json.dumps(answer[name]) not in map(json.dumps, values):  # as text, for to Python 1 == True
                return None
        return [self.output_index[i] for i in self.encode([answer[name] for name in self.fields])]

    def to_json(self, outs):
        """output indices of an answer -> dict, or None where they are not a whole valid answer."""
        return self.parse(tuple(outs))

    def parse(self, outs):
        """to_json of a tuple; answers that come again are remembered, see __init__."""
        if self.state_after(outs) != self.done:
            return None
        text = self.tokenizer.decode([self.output_ids[o] for o in outs], skip_special_tokens=True)
        return json.loads(text.strip().removeprefix('```json').removesuffix('```'))
