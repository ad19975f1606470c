"""A finite automaton over tokens: what may come next, and where only one token may. It knows no schema.

    automaton = Automaton([(None, [(0,)]), ('tone', [(1,), (2, 3)]), (None, [(4,)])])
    automaton.state_after([0, 2, 3, 4]) == automaton.done

A *forced* token is the only legal one, at a *decision* several are legal. Tokens are output indices, numbers of a
small vocabulary (space.py). S states.
"""
import torch


class Automaton:
    """The sequences that take one alternative of each part, in order. parts: (path, [tuples of tokens]) each; path: of
    the leaf that the part writes, or None for fixed text. V: size of the vocabulary.

    transitions  (S,) list    {legal token: state after it}; sequences start in state 0
    next_state   (S, V) long  the same as a table, -1 for an illegal token
    done         int          the state after the last token
    forced       (S,) long    the only legal token, -1 at a decision and at done
    forced_runs  (S,) list    (forced tokens that follow, state after them: a decision, or done)
    leaf_at      (S,) list    path of the leaf whose value is being written, None in fixed text
    longest      int          tokens of the longest sequence
    """

    def __init__(self, parts, V):
        self.parts, self.V = parts, V
        self.longest = sum(max(map(len, alternatives)) for _, alternatives in parts)
        self.compile()
        self.make_tables()

    def close(self, points):
        """points, and all that follow from them without a token: a complete alternative leads to the next part."""
        closed, todo = set(), list(points)
        while todo:
            part, alternative, position = point = todo.pop()
            if part < len(self.parts) and position == len(self.parts[part][1][alternative]):
                following = self.parts[part + 1][1] if part + 1 < len(self.parts) else [()]
                todo += [(part + 1, n, 0) for n in range(len(following))]
            else:
                closed.add(point)
        return frozenset(closed)

    def compile(self):
        """subset construction (https://en.wikipedia.org/wiki/Powerset_construction). A state is the set of points (part,
        alternative, position) that the tokens so far allow. So values that are prefixes of other values need no special
        case."""
        start = self.close((0, n, 0) for n in range(len(self.parts[0][1])))
        number, rows, todo = {start: 0}, {}, [start]            # number: {set of points: state}
        while todo:
            points = todo.pop()
            reached = {}                                        # {token: points after it}
            for part, alternative, position in points:
                if part < len(self.parts):
                    token = self.parts[part][1][alternative][position]
                    reached.setdefault(token, set()).add((part, alternative, position + 1))
            row = rows[number[points]] = {}
            for token in sorted(reached):
                after = self.close(reached[token])
                if after not in number:
                    number[after] = len(number)
                    todo.append(after)
                row[token] = number[after]
        self.transitions = [rows[state] for state in range(len(number))]
        self.done = number[frozenset({(len(self.parts), 0, 0)})]
        self.leaf_at = []
        for points in number:
            paths = [self.parts[part][0] for part, _, _ in points if part < len(self.parts)]
            self.leaf_at.append(next((path for path in paths if path is not None), None))

    def make_tables(self):
        """derives next_state, forced and forced_runs from the transitions."""
        self.next_state = torch.full((len(self.transitions), self.V), -1)
        for state, row in enumerate(self.transitions):
            for token, after in row.items():
                self.next_state[state, token] = after
        legal = self.next_state >= 0
        self.forced = torch.where(legal.sum(1) == 1, legal.int().argmax(1), -1)
        self.forced_runs = []
        for state in range(len(self.transitions)):
            run = []
            while len(self.transitions[state]) == 1:
                (token, state), = self.transitions[state].items()
                run.append(token)
            self.forced_runs.append((run, state))

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
