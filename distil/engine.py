"""The teacher's engine: answers to many texts at a time, with their logits. It does not use the student.

    engine, drafts = Teacher(model, before, space.output_ids), Drafts(space)  # distil/drafts.py
    answers, n_read = answer(engine, space, drafts, texts, after)

Four ideas make this an order of magnitude faster than a call of generate for each prompt:
- Prefix cache: the prompt is read once, and all texts attend to the same keys and values of it (Hydragen).
- No padding: a batch is one long row of tokens; only attention needs to know which text a token belongs to.
- Draft and verify: answers are drafted from the schema and earlier answers, and verified many tokens at once.
- Small head: only the rows of the output vocabulary are multiplied, and only at answer positions.

N new tokens of R texts, at most T of one text; P tokens of prompt, S of text and answer; H heads, n_kv
key-value heads with g query heads each, D head size, C channels, V output vocabulary. All ids are the
teacher's.
"""
import resource
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache

from distil.copying import Copier
from distil.drafts import accepted_prefix

PLACE = -2  # what is chosen where a value is copied

# -----------------------------------------------------------------------------
# the network


def attend_with_lse(q, k, v, mask, scale, softcap=None):
    """attention that also returns the logsumexp of its scores, with which attention to the prompt that all texts share
    is merged with attention to a text's own tokens.

    q (B, n_kv, T, D), k and v (B, n_kv, S, D), mask added to the scores or None -> values (B, n_kv, T, D),
    logsumexp (B, n_kv, T). Scores are float32 even for bfloat16 inputs: where they reach hundreds, as in
    Qwen, bfloat16 scores would be whole units apart.
    """
    if q.device.type == 'cpu' and softcap is None:          # the kernel of F.scaled_dot_product_attention
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, attn_mask=mask, scale=scale)
    scores = q.float() @ k.float().mT * scale               # (B, n_kv, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)                              # (B, n_kv, T)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


class Teacher:
    """A causal LM that reads the prompt up to the text once, and keeps its keys and values.

    model: of transformers; its decoder runs unchanged except for its attention, see `attention`. before: ids
    of the prompt up to the text; positions count from their end. output_ids: the V ids to keep. Exits with a
    message if the logits differ from those of the model's own forward pass.
    """

    def __init__(self, model, before, output_ids):
        self.model, self.body, self.n_before = model, model.get_decoder(), len(before)
        self.head = model.get_output_embeddings().weight        # (full vocabulary, C)
        self.device = self.head.device
        self.softcap = getattr(model.config.get_text_config(), 'final_logit_softcapping', None)
        self.max_batch, self.compiled, self.fused = 1 << 30, False, []
        self.output_ids = torch.tensor(output_ids, device=self.device)
        self.kept_head = self.head[self.output_ids].float()     # (V, C)
        with torch.inference_mode():
            cache = DynamicCache()                              # keeps all tokens, also beyond a window
            prompt = torch.tensor([before], device=self.device)
            self.body(prompt, None, None, cache, use_cache=True)  # positional: transformers 5.24 renamed one
            self.prefix = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # (n_kv, P, D) each
            self.check_logits(before, (output_ids * 20)[:20])

    def check_logits(self, before, ids):
        """compares the logits of 20 tokens, read out of order and some twice, with the model's own forward
        pass. Exits with a message if they differ."""
        probe = torch.tensor([[*before, *ids]], device=self.device)
        expected = self.model(probe, logits_to_keep=20).logits[0].float()
        self.allocate(2, 20)
        self.read([0, 1], [ids[:9], ids[:7]], [0, 0])
        hidden = self.read([1, 0], [ids[5:], ids], [5, 0])      # two positions are read a second time
        logits = self.logits(torch.cat((hidden[15:20], hidden[:15])), self.head)
        error = (logits - expected).abs().max().item()
        allowed = 1e-2 if self.head.dtype == torch.float32 else 0.1
        if error > allowed * expected.abs().max().item():
            sys.exit('extract.py does not support the architecture of this teacher: its logits are wrong by '
                     f'{error:.2g}; choose another teacher')

    def compile(self, on=True, backend='inductor'):
        """switches torch.compile of the decoder's layers on or off. It fuses the operations between matrix
        products; attention stays as it is. The first pass after it takes half a minute."""
        if on and not self.fused:
            for layer in self.body.layers:
                layer.compile(dynamic=True, backend=backend)
                self.fused.append(layer._compiled_call_impl)
        self.compiled = on
        for layer, fused in zip(self.body.layers, self.fused):
            layer._compiled_call_impl = fused if on else None

    def allocate(self, R, S):
        """allocates the keys and values of R texts, each of at most S tokens with its answer."""
        self.store = [[p.new_zeros(R, S, p.size(0), p.size(2)) for p in pair] for pair in self.prefix]

    def reserve(self, S):
        """makes room for S tokens of each text."""
        more = S - self.store[0][0].size(1)
        if more > 0:
            self.store = [[F.pad(part, (0, 0, 0, 0, 0, more + 32)) for part in pair] for pair in self.store]

    def read(self, slots, new, starts):
        """hidden states (N, C) of all new tokens, in order. slots: numbers of R texts; new: R lists of ids to
        read; starts: R positions of their first ids. What a text has read at these positions or later is
        discarded."""
        n = [len(ids) for ids in new]
        text = np.repeat(np.arange(len(slots)), n)              # (N,) which of the R texts
        col = np.arange(len(text)) - np.repeat(np.cumsum(n) - n, n)  # (N,) which of its text's new tokens
        pos = np.repeat(starts, n) + col                        # (N,) position, also in the store
        R, T, S = len(slots), max(n), int(pos.max()) + 1
        all_slots = list(slots) == list(range(len(self.store[0][0])))
        cell, padded = text * T + col, np.zeros((2, R * T), np.int64)
        padded[:, cell] = np.arange(len(text)), pos             # (R * T,) which of the N, and its position
        arrays = np.concatenate(new), slots, np.repeat(slots, n), cell, pos, *padded
        on_device = [torch.as_tensor(np.asarray(x), device=self.device) for x in arrays]
        idx, slots, slot, cell, pos, which, until = on_device
        self.batch = SimpleNamespace(slots=slots, slot=slot, cell=cell, pos=pos, which=which, until=until,
                                     shape=(R, T), S=S, all_slots=all_slots, masks={})
        plain = self.model.config._attn_implementation
        AttentionInterface.register('shared_prefix', self.attention)
        self.model.set_attn_implementation('shared_prefix')
        try:
            positions = pos[None] + self.n_before
            out = self.body(input_ids=idx[None], position_ids=positions, use_cache=False)
            return out.last_hidden_state[0]                     # (N, C)
        finally:
            self.model.set_attn_implementation(plain)

    def build_masks(self, window, g, dtype):
        """what is added to the scores of g heads: at the prompt (N * g, P), or None without a window, and at
        a text's own tokens (R, 1, T * g, S). Layers with the same window share both."""
        b, P, cached = self.batch, self.n_before, self.batch.masks
        if (window, g) not in cached:
            hide = max(-1e30, torch.finfo(dtype).min)           # not -inf: it may hide all of the prompt
            place = torch.arange(P + b.S, device=self.device)
            future = place[P:] > b.until[:, None] + P           # (R * T, S)
            beyond_window = lambda pos: place <= pos[:, None] + P - window
            own = future | beyond_window(b.until)[:, P:] if window else future
            to_mask = lambda hidden: torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(
                hidden, hide).repeat_interleave(g, 0)
            cached[window, g] = (to_mask(beyond_window(b.pos)[:, :P]) if window else None,
                                 to_mask(own).view(b.shape[0], 1, -1, b.S))
        return cached[window, g]

    @torch.compiler.disable
    def attention(self, module, query, key, value, attention_mask, scaling=None, sliding_window=None,
                  softcap=None, **_):
        """the attention that transformers calls: query (1, H, N, D), key and value (1, n_kv, N, D) of N new
        tokens of R texts -> (1, N, H, D), None.

        A token attends to the prompt and to its own text, up to itself. Attention to the prompt is one large
        product for all texts; attention to the own text pads the texts to (R, T). The two parts are merged,
        weighted by their logsumexp (Hydragen, https://arxiv.org/abs/2402.05099).
        """
        b, (H, N, D), n_kv = self.batch, query.shape[1:], key.size(1)
        (R, T), g, own = b.shape, H // n_kv, []
        for store, new in zip(self.store[module.layer_idx], (key, value)):
            store[b.slot, b.pos] = new[0].transpose(0, 1)       # (N, n_kv, D)
            store = store[:, :b.S] if b.all_slots else store[b.slots, :b.S]
            own.append(store.transpose(1, 2))                   # (R, n_kv, S, D)
        window = sliding_window if sliding_window and self.n_before + b.S > sliding_window else 0
        prompt_mask, own_mask = self.build_masks(window, g, query.dtype)
        scale = D ** -0.5 if scaling is None else scaling
        q = query[0].transpose(0, 1).reshape(N, n_kv, g, D)
        padded = q[b.which].view(R, T, n_kv, g, D).transpose(1, 2).reshape(R, n_kv, T * g, D)
        y, lse = attend_with_lse(padded, *own, own_mask, scale, softcap)
        y = y.reshape(R, n_kv, T, g, D).transpose(1, 2).reshape(R * T, H, D)[b.cell]  # (N, H, D)
        lse = lse.view(R, n_kv, T, g).transpose(1, 2).reshape(R * T, H)[b.cell]  # (N, H)
        q = q.transpose(0, 1).reshape(1, n_kv, N * g, D)
        prefix = (part[None] for part in self.prefix[module.layer_idx])  # (1, n_kv, P, D)
        y_prompt, lse_prompt = attend_with_lse(q, *prefix, prompt_mask, scale, softcap)
        y_prompt = y_prompt.view(n_kv, N, g, D).transpose(0, 1).reshape(N, H, D)
        lse_prompt = lse_prompt.view(n_kv, N, g).transpose(0, 1).reshape(N, H)
        share = torch.sigmoid(lse_prompt - lse)                 # (N, H) of the prompt in the softmax of both
        y = torch.lerp(y, y_prompt, share[..., None].to(y.dtype))
        return y[None], None

    def logits(self, hidden, head):
        """(n, C) hidden states and (V, C) rows of the head -> (n, V) float32."""
        logits = (hidden.to(head.dtype) @ head.T).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def apply_full_head(self, hidden):
        """hidden states (n, C) -> logsumexp over the full vocabulary (n,), the most probable ids (n,), and
        the eight most probable ids outside the output vocabulary (n, 8) with their probabilities (n, 8)."""
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

@torch.inference_mode()
def answer(teacher, space, drafts, texts, after, constrain=True, full_lse=False, scored=None, missing=None,
           known=None, free=None):
    """the teacher's greedy answers to texts, token for token those of one-step-at-a-time decoding.

    The teacher reads a draft in one pass, which yields its logits at every position. The draft is accepted up
    to the first position where the teacher chooses otherwise; the teacher's choice goes there. Then the rest
    is drafted again, and only the rest is read: the text and the accepted prefix stay in the cache.
    (Speculative decoding, https://arxiv.org/abs/2211.17192; schema and earlier answers are the draft model.)

    texts: list of id arrays. after: ids between text and answer. constrain: choose among legal tokens, by
    calibrated logits. full_lse: also compute the logsumexp over the full vocabulary. scored: answers (lists of
    output indices) to score in place of the teacher's own. missing: a Counter; it is updated with the
    probabilities of ids outside the output vocabulary, at each step where the full vocabulary is computed.
    known: for each text {state: logits (V,)}, which stand in place of the teacher's: fields with a label.
    free: a distil.free.FreeText that the teacher writes first, or None.

    Returns a list with (outs, logits (n, V) float32 before any constraint, lse (n,), nan if not computed) for
    each text, or 'invalid' or 'vocab' if a free answer leaves the schema or the output vocabulary; and the
    number of tokens read. Values that are copied from the texts (copying.py) are written one token in each pass, of all
    texts at a time; then (outs, logits, lse, places (n, 8), weights (n, 8)), or 'not_in_text' if there is nothing to
    copy.
    """
    full_lse = full_lse or not constrain                          # a free answer is chosen from all tokens
    results = [([], [], []) for _ in texts]
    live = list(range(len(texts)))                              # texts whose answer is not complete
    unread = [[*map(int, text), *after] for text in texts]      # what each must read before its draft
    starts = [0] * len(texts)                                   # number of tokens each keeps in the cache
    teacher.allocate(len(texts), max(map(len, unread)) + space.max_answer + (free.room if free else 0))
    n_read, copier = 0, Copier(space, texts) if space.schema.copied else None
    at = {}                                                     # {text that copies a value: its state before it}
    if free:
        n_read = free.write(teacher, unread, starts)
        free.begin(results)
    while live:
        # draft, and read the drafts of all texts in one pass
        if scored is None:                                      # R pairs: outs, states
            drafted = [([PLACE], [at[i]]) if i in at else drafts.propose(results[i][0], known[i] if known else ())
                       for i in live]
        else:
            drafted = [(scored[i], space.states_before(scored[i])) for i in live]
        new = [unread[i] + [space.output_ids[o] for o in outs[:-1]] for i, (outs, _) in zip(live, drafted)]
        teacher.reserve(max(starts[i] + len(ids) for i, ids in zip(live, new)))
        hidden = teacher.read(live, new, [starts[i] for i in live])  # (N, C)
        n_read += len(hidden)

        # the teacher's logits and its choice at every drafted position
        ends = np.cumsum([len(ids) for ids in new])
        keep = np.concatenate([np.arange(end - len(outs), end) for end, (outs, _) in zip(ends, drafted)])
        hidden = hidden[torch.as_tensor(keep, device=hidden.device)]  # (n, C): at answer positions only
        places = [(i, state) for i, (_, states) in zip(live, drafted) for state in states]  # n of them
        logits = teacher.logits(hidden, teacher.kept_head)      # (n, V)
        lse = np.full(len(keep), np.nan, np.float32)
        if full_lse:
            lse, best, other, p_other = teacher.apply_full_head(hidden)
        if known:
            for n, (i, state) in enumerate(places):
                if state in known[i]:
                    logits[n], lse[n] = known[i][state], known[i][state].logsumexp(-1)
        if scored is not None:
            chosen = [o for outs in scored for o in outs]
        elif constrain:
            states = [state for _, state in places]
            legal = space.next_state[states].to(hidden.device) >= 0  # (n, V)
            for n, (i, state) in enumerate(places if copier else ()):
                legal[n, copier.barred(i, state)] = False
            calibrated = logits - space.bias[states].to(hidden.device)
            chosen = calibrated.masked_fill_(~legal, -float('inf')).argmax(-1).tolist()
            chosen = [PLACE if state in space.copy_at else out for state, out in zip(states, chosen)]
        else:
            chosen = [space.output_index.get(i, -1) for i in best.tolist()]
        logits = logits.cpu().numpy()

        # keep the accepted prefix of each draft
        start, unfinished = 0, []
        for i, (draft, states) in zip(live, drafted):
            accepted = accepted_prefix(draft, chosen[start:start + len(draft)])
            n, state = start + len(accepted) - 1, states[len(accepted) - 1]  # of the last one
            start += len(draft)
            token = accepted[-1]
            if token == PLACE:                                  # there a value is copied; all before it has been read
                accepted = accepted[:-1]
                starts[i] += 1
            part = slice(start - len(draft), start - len(draft) + len(accepted))
            for column, values in zip(results[i], (accepted, logits[part], lse[part])):
                column.extend(values)
            if missing is not None and full_lse:
                for name, p in zip(other[part].ravel().tolist(), p_other[part].ravel().tolist()):
                    missing[str(name)] += p
            starts[i] += len(unread[i]) + len(accepted) - 1
            if token == PLACE:
                if i not in at:
                    copier.begin(i, state)
                whole = teacher.logits(hidden[n:n + 1], teacher.head)[0].cpu().numpy()
                token, at[i] = copier.step(i, state, whole, logits[n], space.bias), state
                if token is None:
                    results[i] = 'not_in_text'
                    continue
                if not isinstance(token, list):
                    unread[i] = [token]
                    unfinished.append(i)
                    continue
                del at[i]                                       # the value has ended
                nothing = [np.nan] * (len(token) - 1)
                for column, values in zip(results[i], (token, copier.logits(i, logits[n]), [*nothing, lse[n]])):
                    column.extend(values)
                state, token = space.state_after(token[:-1], state), token[-1]
            state = space.state_after([token], state)
            if state < 0:
                results[i] = 'vocab' if token < 0 else 'invalid'
            elif state != space.done:
                unread[i] = [space.output_ids[token]]
                unfinished.append(i)
        live = unfinished
    for i, result in enumerate(results):
        if not isinstance(result, str):
            outs, logits, lse = result
            results[i] = outs, np.stack(logits), np.array(lse, np.float32), *(copier.record(i, outs) if copier else ())
    return results, n_read


def answer_batched(teacher, space, drafts, texts, after, constrain=True, full_lse=False, scored=None,
                   missing=None, known=None, free=None):
    """answer(), in batches that fit the memory: halves the batch each time the device has no room for it.
    Prints a line then. RuntimeError if one text alone does not fit."""
    answers, n_read = [], 0
    while len(answers) < len(texts):
        part = slice(len(answers), len(answers) + teacher.max_batch)
        of_part, known_part = scored and scored[part], known and known[part]
        try:
            more, n = answer(teacher, space, drafts, texts[part], after, constrain, full_lse, of_part, missing,
                             known_part, free)
            answers, n_read = answers + more, n_read + n
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            size = len(texts[part])
            full = isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)
            if size == 1 or not full:
                raise
            teacher.max_batch = size // 2
            print(f'not enough memory for {size} texts at once; continuing with {size // 2}', file=sys.stderr)
            teacher.store = None
            torch.cuda.empty_cache()
    return answers, n_read


# -----------------------------------------------------------------------------
# memory


def peak_memory_gb(device):
    """peak memory of this process so far, in GB: of the GPU, or on a CPU of the host."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
