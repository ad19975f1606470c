"""The output space: every answer a schema allows, as an automaton over tokens, and the vocabulary it needs.

    space = OutputSpace(tokenizer, {'tone': ['neutral', 'friendly'], 'spam': [True, False]})
    space.to_json(space.from_json({'tone': 'friendly', 'spam': False}))

An answer is a sequence of tokens. A *forced* token is the only legal one, at a *decision* several are legal:

    {"tone":"   neutral | friendly   ","spam":   true | false   }\n
    forced      decision             forced      decision       forced

An *id* is a row of the teacher's vocabulary: the tokenizer returns ids and the student reads them. An *output
index* is a position in space.output_ids: the student predicts output indices and output.bin stores them.
"""
import hashlib
import json
import random
import re
from functools import cached_property, lru_cache

import torch

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


def special_ids(tokenizer):
    """set of the ids of a tokenizers.Tokenizer that stand for no text: turns, padding, images."""
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def value_name(value):
    """a JSON value as a string, for the keys of a JSON object; see value_names."""
    return value if isinstance(value, str) else json.dumps(value)


def value_names(values):
    """the values of a field as different strings, for the keys of a JSON object: True is 'true'. If two would
    be the same, as True and 'true', all are written as JSON: 'true' and '"true"'."""
    return [*names_of(json.dumps(values))]


@lru_cache(maxsize=1000)
def names_of(values):
    """value_names as a tuple; values: the list as JSON."""
    values = json.loads(values)
    names = tuple(map(value_name, values))
    return names if len(set(names)) == len(names) else tuple(map(json.dumps, values))


def check_fields(fields):
    """ValueError if a dict is not a schema: {name: [different JSON values]}, with something to decide."""
    for name, values in fields.items():
        if not isinstance(name, str):
            raise ValueError(f'field names must be strings, not {name!r}')
        for constant in [name, *values] if isinstance(values, list) else [name]:
            try:
                text = json.dumps(constant, ensure_ascii=False, allow_nan=False)
                text.encode()  # raises on a lone surrogate
            except (TypeError, ValueError, RecursionError):
                raise ValueError(f'field {name!r}: {constant!r} cannot be written as JSON') from None
            if has_object(constant):
                raise ValueError(f'field {name!r}: {constant!r} has a JSON object in it; values are strings, numbers, '
                                 'true, false, null and lists of them')
        if not isinstance(values, list) or not values or len(set(map(json.dumps, values))) < len(values):
            raise ValueError(f'field {name!r} needs a list of different values, not {values!r}')
    if not any(len(values) > 1 for values in fields.values()):
        raise ValueError("nothing to decide; a task needs fields = {'name': [two or more values], ...}")


def has_object(value):
    """True if a JSON value is an object or a list with one in it."""
    return isinstance(value, dict) or isinstance(value, list) and any(map(has_object, value))


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


def common_prefix(seqs):
    """length of the longest prefix that all these sequences share."""
    n = 0
    while all(len(s) > n for s in seqs) and len({s[n] for s in seqs}) == 1:
        n += 1
    return n


# -----------------------------------------------------------------------------
# the output space


class OutputSpace:
    """All answers that a schema allows, as a DFA of S states over tokens, and the output vocabulary of V
    tokens.

    tokenizer: a tokenizers.Tokenizer. fields: {name: [allowed JSON values]} in output order. indent, fence:
    style of the JSON. end_id: the teacher's end of turn, or None if a newline ends the answer (few-shot
    completion). auxiliary: ids appended to the output vocabulary. bias: what calibration subtracts from the
    teacher's logits, see calibrate.py. ValueError if the schema cannot be compiled.

    output_ids   (V,) list    ids of the output vocabulary, first the n_required ids of valid answers
    transitions  (S,) list    {legal output index: state after it}; answers start in state 0
    next_state   (S, V) long  the same as a table, -1 for an illegal token
    done         int          the state after the end token
    forced       (S,) long    the only legal output index, -1 at a decision and at done
    forced_runs  (S,) list    (forced output indices that follow, state after them: a decision, or done)
    field        (S,) list    the field whose value is being written, None between values
    max_answer   int          tokens of the longest answer, end token included
    bias         (S, V)       float32, 0 without calibration
    """

    def __init__(self, tokenizer, fields, indent=None, fence=False, end_id=None, auxiliary=(), bias=None):
        self.tokenizer, self.fields, self.end_id = tokenizer, fields, end_id
        self.indent, self.fence = indent, fence
        check_fields(fields)
        self.check_constants()
        self.segments = self.find_segments()
        required = dict.fromkeys(t for alternatives in self.segments for a in alternatives for t in a)
        self.n_required = len(required)
        self.output_ids = list(required | dict.fromkeys(auxiliary))
        self.output_index = {t: i for i, t in enumerate(self.output_ids)}
        self.compile()
        self.verify()
        self.set_bias(bias or {})
        self.parse = lru_cache(maxsize=10_000)(self.parse)  # answers repeat; the limit bounds the memory

    @classmethod
    def from_task(cls, tokenizer, task):
        """the OutputSpace that a meta.json or a checkpoint describes. task: a dict."""
        keys = 'fields', 'indent', 'fence', 'end_id', 'output_ids', 'bias'  # output_ids as auxiliary
        return cls(tokenizer, *(task.get(key) for key in keys))

    def check_constants(self):
        """raises ValueError if a name or a value contains a special token of the tokenizer."""
        special = special_ids(self.tokenizer)
        for name, values in self.fields.items():
            for constant in [name, *values]:
                text = json.dumps(constant, ensure_ascii=False)
                if special.intersection(self.tokenizer.encode(text, add_special_tokens=False).ids):
                    raise ValueError(f'field {name!r}: {constant!r} has a special token of the tokenizer in it')

    def text(self, values):
        """the canonical text of an answer. values: one per field, in order."""
        answer = json.dumps(dict(zip(self.fields, values)), indent=self.indent, ensure_ascii=False,
                            separators=(',', ':' if self.indent is None else ': '))
        answer = f'```json\n{answer}\n```' if self.fence else answer
        return answer if self.end_id is not None else answer + '\n'

    def encode(self, values):
        """ids of an answer, end token included. values: one per field, in order."""
        ids = self.tokenizer.encode(self.text(values), add_special_tokens=False).ids
        return ids if self.end_id is None else ids + [self.end_id]

    # from fields to automaton

    def find_segments(self):
        """the answer as a list of segments, each a list of alternative tuples of ids. Scaffolding has one
        alternative, a field has one per value; the two take turns.

        Each value is encoded once, with all other fields at their first value. The span of a value is what
        differs between these encodings.
        """
        base = [values[0] for values in self.fields.values()]
        base_ids, segments, end = self.encode(base), [], 0      # end: of the segments so far, in base_ids
        for i, (name, values) in enumerate(self.fields.items()):
            if len(values) == 1:
                continue  # a constant is scaffolding
            seqs = [self.encode(base[:i] + [v] + base[i + 1:]) for v in values]
            start = common_prefix(seqs)
            stop = common_prefix([s[start:][::-1] for s in seqs])  # counted from the end
            if start < end:
                raise ValueError(f'the tokens of field {name!r} merge with those of the field before; '
                                 'use indent = 2')
            segments += [[tuple(base_ids[end:start])], [tuple(s[start:len(s) - stop]) for s in seqs]]
            end = len(base_ids) - stop
        return segments + [[tuple(base_ids[end:])]]

    def compile(self):
        """builds the automaton from the segments, by subset construction
        (https://en.wikipedia.org/wiki/Powerset_construction). Sets all attributes of states.

        A state is the set of points (segment, alternative, position) that the tokens so far allow. So values
        that are prefixes of other values need no special case.
        """
        def find_closure(points):
            closed, todo = set(), list(points)
            while todo:
                seg, alt, pos = point = todo.pop()
                if seg < len(self.segments) and pos == len(self.segments[seg][alt]):  # complete: next segment
                    following = self.segments[seg + 1] if seg + 1 < len(self.segments) else [()]
                    todo += [(seg + 1, a, 0) for a in range(len(following))]
                else:
                    closed.add(point)
            return frozenset(closed)

        start = find_closure((0, a, 0) for a in range(len(self.segments[0])))
        number, rows, todo = {start: 0}, {}, [start]            # number: {set of points: state}
        while todo:
            points = todo.pop()
            reached = {}                                        # {output index: points after it}
            for seg, alt, pos in points:
                if seg < len(self.segments):
                    token = self.output_index[self.segments[seg][alt][pos]]
                    reached.setdefault(token, set()).add((seg, alt, pos + 1))
            row = rows[number[points]] = {}
            for token in sorted(reached):
                after = find_closure(reached[token])
                if after not in number:
                    number[after] = len(number)
                    todo.append(after)
                row[token] = number[after]
        self.transitions = [rows[state] for state in range(len(number))]
        self.done = number[frozenset({(len(self.segments), 0, 0)})]
        names = [name for name, values in self.fields.items() if len(values) > 1]
        self.field = []
        for points in number:
            odd = [seg for seg, _, _ in points if seg % 2 and seg < len(self.segments)]  # segments of values
            self.field.append(names[odd[0] // 2] if odd else None)
        self.max_answer = sum(max(map(len, alternatives)) for alternatives in self.segments)
        self.make_tables()

    def make_tables(self):
        """derives next_state, forced and forced_runs from the transitions."""
        self.next_state = torch.full((len(self.transitions), len(self.output_ids)), -1)
        for state, row in enumerate(self.transitions):
            for token, after in row.items():
                self.next_state[state, token] = after
        legal = self.next_state >= 0
        self.forced = torch.where(legal.sum(1) == 1, legal.int().argmax(1), -1)
        self.forced_runs = []
        for state in range(len(self.transitions)):
            run = []
            while len(self.transitions[state]) == 1:
                (out, state), = self.transitions[state].items()
                run.append(out)
            self.forced_runs.append((run, state))

    def verify(self, n=200):
        """raises ValueError if the automaton rejects one of n random answers as the tokenizer encodes it."""
        rng = random.Random(0)
        for _ in range(n):
            values = [rng.choice(v) for v in self.fields.values()]
            outs = [self.output_index.get(t, -1) for t in self.encode(values)]
            if -1 in outs or self.state_after(outs) != self.done:
                raise ValueError(f'the tokenizer encodes {self.text(values)!r} differently from its parts; '
                                 'try another indent')

    # probabilities and bias

    def set_bias(self, bias):
        """makes the table of the bias. bias: {state: {output index: number}}, as meta.json keeps it."""
        self.bias = torch.zeros(self.next_state.shape)
        for state, row in bias.items():
            for out, value in row.items():
                self.bias[int(state), int(out)] = value

    def token_shares(self, field, probabilities):
        """{state: {output index: probability}} at the decisions on the way to each value of a field that has a
        probability above 0. The probability of a token is the sum over the values that it leads to, normalised
        at each state. probabilities: a list, one per value of the field, in order."""
        rows = {}
        for path, p in zip(self.value_paths.get(field, []), probabilities):
            for state, out, _ in path if p else ():
                row = rows.setdefault(state, dict.fromkeys(self.transitions[state], 0.0))
                row[out] += p
        for row in rows.values():
            total = sum(row.values())
            row.update({out: p / total for out, p in row.items()})
        return rows

    @cached_property
    def value_paths(self):
        """{field: [path of each of its values]} for the fields with a choice. The path of a value is the list
        of its decisions (state, output index, the output indices from the field's first decision to it)."""
        paths, first = {}, {name: values[0] for name, values in self.fields.items()}
        for name in [name for name, values in self.fields.items() if len(values) > 1]:
            paths[name] = []
            for value in self.fields[name]:
                outs = self.from_json({**first, name: value})
                decisions = [(n, state) for n, state in enumerate(self.states_before(outs))
                             if self.field[state] == name and len(self.transitions[state]) > 1]
                start = decisions[0][0]
                paths[name].append([(state, outs[n], tuple(outs[start:n])) for n, state in decisions])
        return paths

    # answers and output indices

    def prompt_mismatches(self, prompt):
        """yields a message for each JSON object in a prompt that is not an answer of this schema, or not in
        the canonical form."""
        for shown in re.findall(r'\{[^{}]*"[^{}]*\}', prompt):
            try:
                answer = json.loads(shown)
            except ValueError:
                continue
            if self.from_json(answer) is None:
                yield f'{shown} is not an answer of this schema'
            elif shown not in (expected := self.text([answer[name] for name in self.fields])):
                yield f'{shown} must be written {expected.strip()}'

    def state_after(self, outs, state=0):
        """the state after the output indices outs, from `state` on; -1 if one of them is illegal."""
        for out in outs:
            state = self.transitions[state].get(out, -1) if state >= 0 else -1
        return state

    def states_before(self, outs):
        """the state before each of the output indices outs, which must begin a valid answer."""
        states = [0]
        for out in outs:
            states.append(self.transitions[states[-1]][out])
        return states[:-1]

    def from_json(self, answer):
        """dict -> list of the output indices of that answer, or None if the schema does not allow it."""
        if not isinstance(answer, dict) or set(answer) != set(self.fields):
            return None
        for name, values in self.fields.items():
            if json.dumps(answer[name]) not in map(json.dumps, values):  # as text: in Python 1 == True
                return None
        return [self.output_index[i] for i in self.encode([answer[name] for name in self.fields])]

    def to_json(self, outs):
        """output indices -> dict, or None if they are not a complete valid answer."""
        return self.parse(tuple(outs))

    def parse(self, outs):
        """to_json of a tuple; __init__ puts a cache around it."""
        if self.state_after(outs) != self.done:
            return None
        text = self.tokenizer.decode([self.output_ids[o] for o in outs], skip_special_tokens=True)
        return json.loads(text.strip().removeprefix('```json').removesuffix('```'))
