"""A finite automaton over tokens: what may come next, and where only one token may. It knows no schema.

    automaton = Automaton([[((0,), 1, None)], [((1,), 2, 'neutral'), ((2, 3), 2, 'friendly')],
                           [((4,), None, None)]], V=5)
    automaton.state_after([0, 2, 3, 4]) == automaton.done

A *forced* token is the only legal one, at a *decision* several are legal. Tokens are output indices, numbers of a
small vocabulary (space.py). A number from V on stands for any place of a text: there is a decision, too, which place it
is. S states.
"""
import math

import torch

MOST_STATES = 30_000


class Automaton:
    """Sequences of tokens through parts, from part 0 on. A part is a list of alternatives, each (tuple of tokens,
    number of the next part or None at the end, label). No sequence is endless. V: size of the vocabulary. ValueError
    if there are too many states.

    transitions  (S,) list    {legal token: state after it}; sequences start in state 0
    next_state   (S, V) long  the same as a table, without places, -1 for an illegal token
    decides      (S,) list    True at a decision
    done         int          the state after the last token
    forced       (S,) long    the only legal token, -1 at a decision and at done
    forced_runs  (S,) list    (forced tokens that follow, state after them: a decision, or done)
    labels       (S,) list    the labels, but None, of the alternatives that are being written
    longest, n_decisions      tokens of the longest sequence; most decisions of one
    n_left                    {state: tokens of the longest way to the end}
    """

    def __init__(self, parts, V):
        self.parts, self.V = parts, V
        self.compile()
        self.make_tables()

    def close(self, points):
        """points, and all that follow from them without a token: a complete alternative leads to the next part."""
        closed, todo = set(), list(points)
        while todo:
            part, alternative, position = point = todo.pop()
            if part is not None and position == len(self.parts[part][alternative][0]):
                following = self.parts[part][alternative][1]
                n = 1 if following is None else len(self.parts[following])
                todo += [(following, k, 0) for k in range(n)]
            else:
                closed.add(point)
        return frozenset(closed)

    def compile(self):
        """subset construction (https://en.wikipedia.org/wiki/Powerset_construction). A state is the set of points
        (part, alternative, position) that the tokens so far allow. So values that are prefixes of other values need no
        special case."""
        start = self.close((0, n, 0) for n in range(len(self.parts[0])))
        number, rows, todo = {start: 0}, {}, [start]            # number: {set of points: state}
        while todo:
            points = todo.pop()
            reached = {}                                        # {token: points after it}
            for part, alternative, position in points:
                if part is not None:
                    token = self.parts[part][alternative][0][position]
                    reached.setdefault(token, set()).add((part, alternative, position + 1))
            row = rows[number[points]] = {}
            for token in sorted(reached):
                after = self.close(reached[token])
                if after not in number:
                    number[after] = len(number)
                    todo.append(after)
                row[token] = number[after]
            if len(number) > MOST_STATES:
                raise ValueError(f'the schema has too many different answers (more than {MOST_STATES:,} states of an '
                                 'automaton): lower maxItems, or leave a property out')
        self.transitions = [rows[state] for state in range(len(number))]
        self.done = number[frozenset({(None, 0, 0)})]
        self.labels = [[self.parts[part][alternative][2] for part, alternative, _ in sorted(
            points, key=lambda point: point[:2] if point[0] is not None else (math.inf, 0))
            if part is not None and self.parts[part][alternative][2] is not None] for points in number]

    def make_tables(self):
        """derives next_state, forced and forced_runs from the transitions."""
        self.next_state = torch.full((len(self.transitions), self.V), -1)
        for state, row in enumerate(self.transitions):
            for token, after in row.items():
                if token < self.V:
                    self.next_state[state, token] = after
        self.decides = [len(row) > 1 or any(token >= self.V for token in row) for row in self.transitions]
        legal = self.next_state >= 0
        self.forced = torch.where(legal.sum(1) == 1, legal.int().argmax(1), -1)
        self.forced_runs = []
        for state in range(len(self.transitions)):
            run = []
            while state != self.done and not self.decides[state]:
                (token, state), = self.transitions[state].items()
                run.append(token)
            self.forced_runs.append((run, state))
        # of a state: tokens, and decisions, on the longest way to the end
        n_left, n_choices, todo = {self.done: 0}, {self.done: 0}, [0]
        while todo:
            following = [after for after in self.transitions[todo[-1]].values() if after not in n_left]
            todo += following
            if not following:
                state = todo.pop()
                row = self.transitions[state].values()
                n_left[state] = 1 + max(map(n_left.get, row))
                n_choices[state] = self.decides[state] + max(map(n_choices.get, row))
        self.longest, self.n_left, self.n_decisions = n_left[0], n_left, n_choices[0]

    def state_after(self, tokens, state=0):
        """the state after these tokens, from `state` on; -1 if one of them is illegal."""
        for token in tokens:
            state = self.transitions[state].get(token, -1) if state >= 0 else -1
        return state

    def states_before(self, tokens):
        """the state before each of these tokens, which must begin a sequence of the automaton."""
        states = [0]
        for token in tokens:
            states.append(self.transitions[states[-1]][token])
        return states[:-1]
