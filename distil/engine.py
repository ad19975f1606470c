"""The teacher's engine: answers to many texts at a time, with their logits. It does not know the student.

    engine, drafts = Teacher(model, before, space.output_ids), Drafts(space)
    answers, n_read = answer(engine, space, drafts, texts, after)

Four ideas make this an order of magnitude faster than calling generate on each prompt:
- The prompt is read once. All rows of all batches look at the same keys and values of it (Hydragen).
- A batch is one long row of tokens without padding; only attention knows which text a token belongs to.
- Answers are drafted from the schema and the answers so far, and verified many tokens at a time.
- Only the rows of the head that the output vocabulary needs are multiplied, and only at answer positions.

N new tokens of R texts, T of one text at most; P tokens of prompt, S of text and answer; H heads, n_kv
key-value heads with g query heads each, D head size, C channels, V output vocabulary. All ids are the
teacher's.
"""
import resource
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AttentionInterface, DynamicCache

from distil.space import accepted_prefix
from distil.teacher import fingerprint, load_model
from model import attend_with_lse

# -----------------------------------------------------------------------------
# the network


class Teacher:
    """A causal LM that has read the prompt up to the text once.

    Its decoder keeps doing what transformers wrote, one attention excepted: see `attention`. Positions here
    count from the end of that prompt. Where the model's logits are not those of its own forward pass, it ends
    in one line.
    """

    def __init__(self, model, before, output_ids):
        self.model, self.body, self.n_before = model, model.get_decoder(), len(before)
        self.head = model.get_output_embeddings().weight        # (whole vocabulary, C)
        self.device = self.head.device
        self.softcap = getattr(model.config.get_text_config(), 'final_logit_softcapping', None)
        self.max_batch, self.compiled, self.fused = 1 << 30, False, []
        self.output_ids = torch.tensor(output_ids, device=self.device)
        self.kept_head = self.head[self.output_ids].float()     # (V, C)
        with torch.inference_mode():
            cache = DynamicCache()                              # it keeps all, whatever the window
            prompt = torch.tensor([before], device=self.device)
            self.body(prompt, None, None, cache, use_cache=True)  # by position: transformers 5.24 renamed one
            self.prefix = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # (n_kv, P, D) each
            self.check(before, (output_ids * 20)[:20])

    def check(self, before, ids):
        """compares 20 tokens read here, out of order and some twice, with the model's own forward pass."""
        probe = torch.tensor([[*before, *ids]], device=self.device)
        theirs = self.model(probe, logits_to_keep=20).logits[0].float()
        self.start(2, 20)
        self.read([0, 1], [ids[:9], ids[:7]], [0, 0])
        hidden = self.read([1, 0], [ids[5:], ids], [5, 0])      # two positions are read a second time
        ours = self.logits(torch.cat((hidden[15:20], hidden[:15])), self.head)
        off, allowed = (ours - theirs).abs().max().item(), 1e-2 if self.head.dtype == torch.float32 else 0.1
        if off > allowed * theirs.abs().max().item():
            sys.exit('this teacher computes its logits in a way extract.py does not know '
                     f'(they differ by {off:.2g})')

    def compile(self, on=True, backend='inductor'):
        """fuses what lies between the products of a layer, by torch.compile, or not any more. Attention stays
        as it is. The first pass then takes half a minute."""
        if on and not self.fused:
            for layer in self.body.layers:
                layer.compile(dynamic=True, backend=backend)
                self.fused.append(layer._compiled_call_impl)
        self.compiled = on
        for layer, fused in zip(self.body.layers, self.fused):
            layer._compiled_call_impl = fused if on else None

    def start(self, R, S):
        """makes room for the keys and values of R texts of S tokens with their answers."""
        self.store = [[p.new_zeros(R, S, p.size(0), p.size(2)) for p in pair] for pair in self.prefix]

    def read(self, slots, new, at):
        """slots: numbers of R texts; new: R lists of ids to read; at: R positions of the first of them. What
        a text read before at those positions and after is forgotten. Returns the hidden states (N, C) of all
        new tokens, in order."""
        n = [len(ids) for ids in new]
        text = np.repeat(np.arange(len(slots)), n)              # (N,) which of the R
        col = np.arange(len(text)) - np.repeat(np.cumsum(n) - n, n)  # (N,) which of its new tokens
        pos = np.repeat(at, n) + col                            # (N,) position, also where it is stored
        R, T, S = len(slots), max(n), int(pos.max()) + 1
        all_ = list(slots) == list(range(len(self.store[0][0])))
        cell, padded = text * T + col, np.zeros((2, R * T), np.int64)
        padded[:, cell] = np.arange(len(text)), pos             # (R * T,) which of the N, and its position
        arrays = np.concatenate(new), slots, np.repeat(slots, n), cell, pos, *padded
        on_device = [torch.as_tensor(np.asarray(x), device=self.device) for x in arrays]
        idx, slots, slot, cell, pos, which, until = on_device
        self.batch = SimpleNamespace(slots=slots, slot=slot, cell=cell, pos=pos, which=which, until=until,
                                     shape=(R, T), S=S, all=all_, masks={})
        plain = self.model.config._attn_implementation
        AttentionInterface.register('shared_prefix', self.attention)
        self.model.set_attn_implementation('shared_prefix')
        try:
            positions = pos[None] + self.n_before
            out = self.body(input_ids=idx[None], position_ids=positions, use_cache=False)
            return out.last_hidden_state[0]                     # (N, C)
        finally:
            self.model.set_attn_implementation(plain)

    def masks(self, window, g, dtype):
        """what is added to the scores of g heads at the prompt, (N * g, P) or None, and at a text's own
        tokens, (R, 1, T * g, S); the same for all layers that see as far."""
        b, P, found = self.batch, self.n_before, self.batch.masks
        if (window, g) not in found:
            hide = max(-1e30, torch.finfo(dtype).min)           # not -inf: all of the prompt may be too far
            place = torch.arange(P + b.S, device=self.device)
            future = place[P:] > b.until[:, None] + P           # (R * T, S)
            far = lambda pos: place <= pos[:, None] + P - window
            own = future | far(b.until)[:, P:] if window else future
            to_mask = lambda hidden: torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(
                hidden, hide).repeat_interleave(g, 0)
            found[window, g] = (to_mask(far(b.pos)[:, :P]) if window else None,
                                to_mask(own).view(b.shape[0], 1, -1, b.S))
        return found[window, g]

    @torch.compiler.disable
    def attention(self, module, query, key, value, attention_mask, scaling=None, sliding_window=None,
                  softcap=None, **_):
        """query (1, H, N, D), key and value (1, n_kv, N, D) of N new tokens of R texts -> (1, N, H, D), for
        transformers.

        A token sees the prompt and, of its own text, itself and what came before. The prompt part is one
        large product for all texts, the own part pads the texts to (R, T); both are put together by their
        logsumexp (Hydragen, https://arxiv.org/abs/2402.05099).
        """
        b, (H, N, D), n_kv = self.batch, query.shape[1:], key.size(1)
        (R, T), g, own = b.shape, H // n_kv, []
        for store, new in zip(self.store[module.layer_idx], (key, value)):
            store[b.slot, b.pos] = new[0].transpose(0, 1)       # (N, n_kv, D)
            store = store[:, :b.S] if b.all else store[b.slots, :b.S]
            own.append(store.transpose(1, 2))                   # (R, n_kv, S, D)
        window = sliding_window if sliding_window and self.n_before + b.S > sliding_window else 0
        at_prompt, at_own = self.masks(window, g, query.dtype)
        how = D ** -0.5 if scaling is None else scaling, softcap
        q = query[0].transpose(0, 1).reshape(N, n_kv, g, D)
        padded = q[b.which].view(R, T, n_kv, g, D).transpose(1, 2).reshape(R, n_kv, T * g, D)
        y, lse = attend_with_lse(padded, *own, at_own, *how)
        y = y.reshape(R, n_kv, T, g, D).transpose(1, 2).reshape(R * T, H, D)[b.cell]  # (N, H, D)
        lse = lse.view(R, n_kv, T, g).transpose(1, 2).reshape(R * T, H)[b.cell]  # (N, H)
        q = q.transpose(0, 1).reshape(1, n_kv, N * g, D)
        prefix = (part[None] for part in self.prefix[module.layer_idx])  # (1, n_kv, P, D)
        y_prompt, lse_prompt = attend_with_lse(q, *prefix, at_prompt, *how)
        y_prompt = y_prompt.view(n_kv, N, g, D).transpose(0, 1).reshape(N, H, D)
        share = torch.sigmoid(lse_prompt.view(n_kv, N, g).transpose(0, 1).reshape(N, H) - lse)
        y = torch.lerp(y, y_prompt, share[..., None].to(y.dtype))
        return y[None], None

    def logits(self, hidden, head):
        """(n, C) hidden states and (V, C) rows of the head -> (n, V) float32."""
        logits = (hidden.to(head.dtype) @ head.T).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def full_head(self, hidden):
        """(n, C) -> over the full vocabulary logsumexp (n,) and the most likely ids (n,); of the tokens that
        are not kept the eight most likely ids (n, 8) and their probabilities (n, 8)."""
        parts = []
        for h in hidden.split(64):                              # 64 rows of 262,144 logits at a time
            logits = self.logits(h, self.head)
            lse, best = logits.logsumexp(-1), logits.argmax(-1)
            logits[:, self.output_ids] = -float('inf')
            top, other = logits.topk(8)
            parts.append((lse, best, other, (top - lse[:, None]).exp()))
        return [torch.cat(part).cpu().numpy() for part in zip(*parts)]


# -----------------------------------------------------------------------------
# draft and verify

PASS_COST = 2  # what a forward pass costs on top of its tokens, in tokens of each text


class Drafts:
    """Guesses how an answer goes on: the most frequent choice so far, given all that is already decided."""

    def __init__(self, space):
        self.space, self.after, self.at = space, defaultdict(Counter), defaultdict(Counter)

    def add(self, outs):
        """learn from an answer."""
        state = 0
        for i, out in enumerate(outs):
            if len(self.space.transitions[state]) > 1:
                self.after[tuple(outs[:i])][out] += 1
                self.at[state][out] += 1
            state = self.space.transitions[state][out]

    def propose(self, outs):
        """output indices that follow outs, and the state before each. It ends with the answer, or with a
        guess that is more likely to waste the tokens drafted after it than to save a pass."""
        outs, states, state, n, sure = list(outs), [], self.space.state_after(outs), len(outs), 1.0
        while state != self.space.done:
            legal = self.space.transitions[state]
            out = next(iter(legal))
            if len(legal) > 1:
                seen = self.after.get(tuple(outs)) or self.at.get(state) or Counter({out: 0})
                (out, count), = seen.most_common(1)
                sure *= count / (seen.total() + 1)
            outs.append(out)
            states.append(state)
            state = legal[out]
            if len(legal) > 1:
                n_more = len(self.space.forced_runs[state][0]) + 1  # a wrong guess wastes the forced tokens after it
                if sure < n_more / (n_more + PASS_COST):
                    break
        return outs[n:], states


@torch.inference_mode()
def answer(teacher, space, drafts, texts, after, constrain=True, whole=False, given=None, missing=None):
    """The teacher's greedy answers to texts, token for token what one-step-at-a-time decoding gives.

    Drafted tokens go through the teacher in one pass, which yields its logits at every position. They are
    kept up to the first position where the teacher chooses otherwise; its choice goes there, the rest is
    drafted again and only that is read: the text and the accepted tokens stay in the cache. (Speculative
    decoding, https://arxiv.org/abs/2211.17192, with the schema and the answers so far as the draft model.)

    texts: list of id arrays. after: ids between text and answer. whole: also logsumexp over the full
    vocabulary. given: answers (lists of output indices) to score instead of asking for the teacher's own.
    missing: a Counter, told how likely tokens outside the output vocabulary were, summed over the steps at
    which the whole vocabulary was seen. Returns per text (outs, logits (n, V) float32 before any constraint,
    lse (n,)), or 'invalid' or 'vocab' where a free answer leaves the schema or the output vocabulary. Second
    value: number of tokens read.
    """
    whole = whole or not constrain                              # a free answer is chosen from all of it
    results = [([], [], []) for _ in texts]
    live = list(range(len(texts)))                              # texts still without an answer
    feed = [[*map(int, text), *after] for text in texts]        # what each must read before its draft
    at = [0] * len(texts)                                       # tokens each has read that stand
    teacher.start(len(texts), max(map(len, feed)) + space.max_answer)
    n_read = 0
    while live:
        if given is None:
            guesses = [drafts.propose(results[i][0]) for i in live]  # R pairs of n output indices and n states
        else:
            guesses = [(given[i], space.states_before(given[i])) for i in live]
        new = [feed[i] + [space.output_ids[o] for o in outs[:-1]] for i, (outs, _) in zip(live, guesses)]
        hidden = teacher.read(live, new, [at[i] for i in live])  # (N, C)
        n_read += len(hidden)

        ends = np.cumsum([len(ids) for ids in new])
        spots = np.concatenate([np.arange(end - len(outs), end) for end, (outs, _) in zip(ends, guesses)])
        hidden = hidden[torch.as_tensor(spots, device=hidden.device)]  # (n, C): at answer positions only
        logits = teacher.logits(hidden, teacher.kept_head)      # (n, V)
        lse = np.full(len(spots), np.nan, np.float32)
        if whole:
            lse, best, other, p_other = teacher.full_head(hidden)
        if given is not None:
            choice = [o for outs in given for o in outs]
        elif constrain:
            states = [state for _, states in guesses for state in states]
            legal = space.next_state[states].to(hidden.device) >= 0  # (n, V)
            unbiased = logits - space.bias[states].to(hidden.device)
            choice = unbiased.masked_fill_(~legal, -float('inf')).argmax(-1).tolist()
        else:
            choice = [space.output_index.get(i, -1) for i in best.tolist()]
        logits = logits.cpu().numpy()

        start, still = 0, []
        for i, (draft, states) in zip(live, guesses):
            stands = accepted_prefix(draft, choice[start:start + len(draft)])
            part = slice(start, start + len(stands))
            start += len(draft)
            for store, values in zip(results[i], (stands, logits[part], lse[part])):
                store.extend(values)
            if missing is not None and whole:
                for token, p in zip(other[part].ravel().tolist(), p_other[part].ravel().tolist()):
                    missing[str(token)] += p
            state = space.state_after(stands[-1:], states[len(stands) - 1])
            if state < 0:
                results[i] = 'vocab' if stands[-1] < 0 else 'invalid'
            elif state != space.done:
                at[i] += len(feed[i]) + len(stands) - 1
                feed[i] = [space.output_ids[stands[-1]]]
                still.append(i)
        live = still
    for i, result in enumerate(results):
        if not isinstance(result, str):
            outs, logits, lse = result
            results[i] = outs, np.stack(logits), np.array(lse, np.float32)
    return results, n_read


def answer_batched(teacher, space, drafts, texts, after, constrain=True, whole=False, given=None,
                   missing=None):
    """answer(), on half the batch from the moment on that the device has no room for the whole."""
    answers, n_read = [], 0
    while len(answers) < len(texts):
        part = slice(len(answers), len(answers) + teacher.max_batch)
        some = given and given[part]
        try:
            more, n = answer(teacher, space, drafts, texts[part], after, constrain, whole, some, missing)
            answers, n_read = answers + more, n_read + n
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            size = len(texts[part])
            full = isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)
            if size == 1 or not full:
                raise
            teacher.max_batch = size // 2
            print(f'no memory for {size} texts at once, going on with {size // 2}', file=sys.stderr)
            teacher.store = None
            torch.cuda.empty_cache()
    return answers, n_read


def load_answerer(name, task, space, device):
    """a function from lists of ids to the answers of the teacher that a student learned from, as lists of
    output indices. task: of the student's checkpoint. Exits with a message if it is another teacher."""
    model = load_model(name, torch.float32 if device == 'cpu' else torch.bfloat16, device)
    if fingerprint(model) != task['fingerprint']:
        sys.exit(f'{name} is not the teacher this student learned from ({task["teacher"]})')
    teacher, drafts = Teacher(model, task['before'], space.output_ids), Drafts(space)

    def answer_texts(texts):
        answers = [outs for outs, _, _ in answer_batched(teacher, space, drafts, texts, task['after'])[0]]
        for outs in answers:
            drafts.add(outs)
        return answers
    return answer_texts


def peak_memory_gb(device):
    """most memory this process has held so far: of the GPU, or on a CPU of the host."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
