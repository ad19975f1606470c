"""Drafts of answers: what is likely to come next, learned from earlier answers. A model that reads a whole draft in one
pass verifies many decisions at once, and its answer is the same. (Speculative decoding,
https://arxiv.org/abs/2211.17192; the schema and earlier answers are the draft model.)

    drafts = Drafts(space)
    drafts.add(outs)                                            # an answer
    tokens, states = drafts.propose([])                         # what may come first, and the state before each token
"""
from collections import Counter, defaultdict

PASS_COST = 2  # overhead of a forward pass, in tokens per text
MOST_ANSWERS = 10_000  # to learn from: what is frequent is known then


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


class Drafts:
    """Drafts the rest of an answer: at each decision the most frequent choice of earlier answers that agree
    up to there or, if there are none, of all earlier answers at this state."""

    def __init__(self, space):
        self.space, self.n_answers = space, 0
        self.by_prefix, self.by_state = defaultdict(Counter), defaultdict(Counter)

    def add(self, outs):
        """updates the counts with an answer, a list of output indices."""
        self.n_answers += 1
        if self.n_answers > MOST_ANSWERS:
            return
        state = 0
        for i, out in enumerate(outs):
            if self.space.decides[state]:
                self.by_prefix[tuple(outs[:i])][out] += 1
                self.by_state[state][out] += 1
            state = self.space.transitions[state][out]

    def propose(self, outs, known=(), state=None):
        """the draft after outs, as output indices, and the state before each of them. A draft stops at the
        end of the answer, or after a choice too uncertain for the tokens behind it to be worth their cost.
        known: {state: logits (V,)} at decisions that are given, see engine.answer; state: after outs, if it is
        known."""
        state = self.space.state_after(outs) if state is None else state
        outs, states, n, confidence = list(outs), [], len(outs), 1.0
        while state != self.space.done:
            legal = self.space.transitions[state]
            out = next(iter(legal))
            if state in self.space.copy_at:                     # a place of the text cannot be guessed
                return [*outs[n:], -1], [*states, state]
            if state in known:
                out = int(known[state].argmax())
            elif len(legal) > 1:
                counts = self.by_prefix.get(tuple(outs)) or self.by_state.get(state) or Counter({out: 0})
                (out, count), = counts.most_common(1)
                confidence *= count / (counts.total() + 1)
            outs.append(out)
            states.append(state)
            state = legal[out]
            if len(legal) > 1:
                n_more = len(self.space.forced_runs[state][0]) + 1  # tokens to the next choice, included
                # if rejected they waste n_more tokens, if accepted they save a pass, so
                # drafting them pays off if confidence * PASS_COST >= (1 - confidence) * n_more
                if confidence < n_more / (n_more + PASS_COST):
                    break
        return outs[n:], states


class Forced(Drafts):
    """drafts what the schema forces, and nothing else."""

    def add(self, outs):
        pass

    def propose(self, outs, known=(), state=None):
        """the forced tokens after outs, and any token at the decision behind them; the state before each."""
        state = self.space.state_after(outs) if state is None else state
        run, end = self.space.forced_runs[state]
        states = [state]
        for out in run:
            states.append(self.space.transitions[states[-1]][out])
        return (run, states[:-1]) if end == self.space.done else ([*run, -1], states)
