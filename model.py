"""The student: the network and greedy decoding. No settings, no printing, no files.

    model = Student(StudentConfig(vocab_size=262144, output_vocab=525))
    space = OutputSpace(tokenizer, {'tone': ['neutral', 'friendly'], 'spam': [True, False]})
    space.to_json(generate(model, space, [tokenizer.encode('hi there', add_special_tokens=False).ids])[0])

It reads ids of the teacher's whole vocabulary and predicts output indices (space.py says what those are).
"""
import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


def pick_device(device):
    """'auto' -> the fastest device there is."""
    if device != 'auto':
        return device
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


# -----------------------------------------------------------------------------
# network


@dataclass
class StudentConfig:
    vocab_size: int = 262144  # rows of the input embedding: the teacher's whole vocabulary, so any text can be read
    output_vocab: int = 525   # V, rows of the head: only what an answer can need
    block_size: int = 75      # text tokens + answer tokens
    n_layer: int = 16
    n_head: int = 16
    n_kv_head: int = 16       # fewer than n_head: grouped-query attention
    n_embd: int = 1024
    n_mlp: int = 4096         # hidden width of the gated MLP
    dropout: float = 0.0
    rope_base: float = 10000.0
    start_id: int = 2         # the id between text and answer
    # what it takes to hold layers of a Gemma 3 or Llama teacher; norm offsets, embedding and query scales go into weights
    head_size: int = 0        # 0: n_embd // n_head
    n_table: int = 0          # width of the input embedding; 0: n_embd, else it is projected to that
    activation: str = 'gelu'  # of the MLP: gelu (its tanh form) or silu
    qk_norm: bool = False     # RMSNorm on queries and keys
    sandwich: bool = False    # RMSNorm also after attention and MLP
    norm_eps: float = 1e-6
    rope_of_layer: tuple = ()  # row of rope_freq that each layer uses; (): 0


def rotate(x, cos, sin):
    """x (B, H, T, D) turned by the angles of its positions, cos and sin (B or 1, 1, T, D); halves are the pairs.
    Rotary position embedding, https://arxiv.org/abs/2104.09864"""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        self.head_size = config.head_size or config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_size, bias=False)
        self.c_proj = nn.Linear(config.n_head * self.head_size, config.n_embd, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.head_size, eps=config.norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, attend=None, keep=None):
        B, T, C = x.shape
        sizes = [h * self.head_size for h in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = (y.view(B, T, -1, self.head_size).transpose(1, 2) for y in self.c_attn(x).split(sizes, dim=2))
        if hasattr(self, 'q_norm'):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, D)
        if attend is not None:
            y = attend(q if keep is None else q[:, :, keep], k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True,
                                               enable_gqa=self.n_head != self.n_kv_head)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """GeGLU or SwiGLU, https://arxiv.org/abs/2002.05202"""

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.c_up = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.c_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)
        self.activation = {'gelu': partial(F.gelu, approximate='tanh'), 'silu': F.silu}[config.activation]

    def forward(self, x):
        return self.c_proj(self.activation(self.c_gate(x)) * self.c_up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = partial(nn.RMSNorm, config.n_embd, eps=config.norm_eps)
        self.norm_1, self.attn, self.norm_2, self.mlp = norm(), Attention(config), norm(), MLP(config)
        self.post_1, self.post_2 = (norm(), norm()) if config.sandwich else (nn.Identity(), nn.Identity())
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, attend=None, keep=None):
        y = self.attn(self.norm_1(x), cos, sin, attend, keep)
        x = (x if keep is None else x[:, keep]) + self.drop(self.post_1(y))
        return x + self.drop(self.post_2(self.mlp(self.norm_2(x))))


class Student(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.n_table or config.n_embd
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wte_proj = nn.Linear(width, config.n_embd, bias=False) if width != config.n_embd else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.output_vocab, bias=False)
        D, self.rope_of_layer = self.h[0].attn.head_size, config.rope_of_layer or (0,) * config.n_layer
        freq = config.rope_base ** (-torch.arange(0, D, 2).float() / D)
        self.register_buffer('rope_freq', freq.expand(max(self.rope_of_layer) + 1, -1).clone())  # (n_rope, D/2)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # residual projections are scaled down so that depth does not grow the stream (GPT-2)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)
        if width != config.n_embd:
            nn.init.normal_(self.wte_proj.weight, std=width ** -0.5)  # keeps the variance

    def forward(self, idx, targets=None, cache=None, pos=None, keep=None):
        """idx (B, T) ids, rows padded on the right -> logits over the output vocabulary.

        Without targets (B, T, V). With targets (B, T) only where targets >= 0, as (n, V) in row order: the head never
        sees a text position. With a Cache, idx (1, N) are the new tokens of several rows one after another, pos (1, N)
        their positions, keep (M,) those whose output is asked for, and the result is (M, V).
        """
        T = idx.size(1)
        assert cache is not None or T <= self.config.block_size, f'{T} tokens do not fit block_size {self.config.block_size}'
        pos = torch.arange(T, device=idx.device)[None] if pos is None else pos
        angle = pos[:, None, :, None] * self.rope_freq[:, None, None, None]  # (n_rope, 1, 1, T, D/2)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos(), angle.sin()
        x = self.drop(self.wte_proj(self.wte(idx).to(self.lm_head.weight.dtype)))  # (B, T, C)
        for i, block in enumerate(self.h):
            rope = self.rope_of_layer[i]
            x = block(x, cos[rope], sin[rope], None if cache is None else partial(cache.attend, i), keep if i == len(self.h) - 1 else None)
        x = self.norm_f(x if targets is None else x[targets >= 0])
        return self.lm_head(x if cache is None else x[0])

    def param_groups(self, weight_decay):
        """AdamW groups: matrices decay; the embedding and the norms do not (a row unseen in a batch must not shrink)."""
        learned = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        decay = [p for name, p in learned if p.dim() == 2 and name != 'wte.weight']
        rest = [p for name, p in learned if p.dim() != 2 or name == 'wte.weight']
        return [{'params': decay, 'weight_decay': weight_decay}, {'params': rest, 'weight_decay': 0.0}]

    def count_params(self):
        """number of parameters by part; `total` is their sum and that of the norms."""
        parts = {'total': '', 'embedding': 'wte', 'attention': '.attn.', 'mlp': '.mlp.', 'head': 'lm_head.'}
        return {part: sum(p.numel() for name, p in self.named_parameters() if key in name) for part, key in parts.items()}


# -----------------------------------------------------------------------------
# greedy decoding


class Cache:
    """keys and values of rows, and the attention of new tokens to them. A row is a slot that can be used again."""

    def __init__(self, student):
        c, p = student.config, student.lm_head.weight
        self.store = torch.zeros(c.n_layer, 2, 0, c.block_size, c.n_kv_head, student.h[0].attn.head_size, dtype=p.dtype, device=p.device)
        self.gqa = c.n_head != c.n_kv_head

    def place(self, slots, starts, counts, asked):
        """where the coming N tokens go: for each of R rows its slot, the position of its first new token, their number, and for how
        many of the last of them an output is asked. Returns the positions (1, N), and which of the N are asked for (M,)."""
        device, more = self.store.device, max(slots) + 1 - self.store.size(2)
        if more > 0:
            self.store = torch.cat((self.store, self.store.new_zeros(*self.store.shape[:2], more, *self.store.shape[3:])), 2)
        ends, slot = np.cumsum(counts), np.repeat(slots, counts)  # slot (N,)
        pos = np.arange(len(slot)) + np.repeat(np.array(starts) - ends + counts, counts)
        keep = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, asked)])
        self.B, self.S = max(slots) + 1, int(pos.max()) + 1
        self.grids = [self.grid(slot, pos, counts), self.grid(slot[keep], pos[keep], asked)]
        self.slot, self.pos, keep = (torch.from_numpy(x).to(device) for x in (slot, pos, keep))
        return self.pos[None], keep

    def grid(self, slot, pos, counts):
        """for attention these tokens are padded to (B, T): the cell of each, T, and the mask (B, 1, T, S)."""
        T, device = max(counts), self.store.device
        cell = slot * T + np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts, counts)
        padded = np.zeros(self.B * T, np.int64)
        padded[cell] = pos
        mask = torch.arange(self.S, device=device) <= torch.from_numpy(padded).to(device).view(self.B, 1, T, 1)  # its row, up to itself
        return torch.from_numpy(cell).to(device), T, mask

    def attend(self, layer, q, k, v):
        """k and v (1, n_kv_head, N, D) of the placed tokens; q (1, H, N or M, D) of all, or of those asked for -> like q."""
        H, n, D = q.shape[1:]
        for store, new in zip(self.store[layer], (k, v)):
            store[self.slot, self.pos] = new[0].transpose(0, 1)
        cell, T, mask = next(grid for grid in self.grids if len(grid[0]) == n)
        k, v = self.store[layer, :, :self.B, :self.S].transpose(2, 3)  # (B, n_kv_head, S, D) each
        padded = q.new_zeros(self.B * T, H, D)
        padded[cell] = q[0].transpose(0, 1)
        y = F.scaled_dot_product_attention(padded.view(self.B, T, H, D).transpose(1, 2), k, v, attn_mask=mask, enable_gqa=self.gqa)
        return y.transpose(1, 2).reshape(-1, H, D)[cell].transpose(0, 1)[None]


@dataclass
class Row:
    """a text whose answer is under way."""
    number: int   # of the text
    feed: list    # ids to read next
    draft: list   # output indices the schema forces there
    state: int    # after the draft: a decision, or done
    at: int = 0   # tokens read
    outs: list = field(default_factory=list)
    decisions: list = field(default_factory=list)


@torch.no_grad()
def decode(model, space, take, batch_size=64, constrain=True):
    """Answers to a stream of texts, with one forward pass per decision: what the schema forces in between costs none.

    take(wait) -> the ids of the next text; None if there is none yet and wait is False; StopIteration at the end.
    Yields in the order of the texts (output indices with the end token, decisions: what confidence takes).

    constrain: *guaranteed*: the student is asked only where the schema leaves a choice, and held to what is legal there. Else
    *lossless*: forced tokens are a draft which the student reads and must itself have chosen, so that the answer is its free
    greedy one, token for token; it ends with the first token outside the schema, if there is one.
    (Speculative decoding, https://arxiv.org/abs/2211.17192, with the schema as the draft.)

    A pass reads the new tokens of all rows as one long row; where an answer is complete, the next text takes its place.
    """
    device, legal = model.lm_head.weight.device, space.next_state.to(model.lm_head.weight.device) >= 0
    ids_of = lambda outs: [space.output_ids[o] for o in outs]
    cache, rows, done, n_in, n_out, more = Cache(model), {}, {}, 0, 0, True
    while more or rows:
        while more and len(rows) < batch_size:
            try:
                text = take(not rows)
            except StopIteration:
                more = False
                break
            if text is None:
                break
            draft, state = space.runs[0]
            assert len(text) + space.max_answer <= model.config.block_size, f'{len(text)} tokens leave no room for an answer'
            rows[next(s for s in range(batch_size) if s not in rows)] = Row(n_in, [*text, model.config.start_id, *ids_of(draft)], draft, state)
            n_in += 1
        if not rows:
            break
        counts = [len(row.feed) for row in rows.values()]
        asked = [1 if constrain else len(row.draft) + (row.state != space.done) for row in rows.values()]  # the last of each feed
        pos, keep = cache.place(list(rows), [row.at for row in rows.values()], counts, asked)
        logits = model(torch.tensor([[i for row in rows.values() for i in row.feed]], device=device), cache=cache, pos=pos, keep=keep).float()
        last = np.cumsum(asked) - 1
        held = logits[last].masked_fill(~legal[[row.state for row in rows.values()]], -math.inf)  # (R, V)
        choice = np.split((held if constrain else logits).argmax(-1).cpu().numpy(), last[:-1] + 1)

        for (slot, row), picks, logits in zip(list(rows.items()), choice, held.cpu()):
            picks = row.draft + picks.tolist() if constrain else picks.tolist()
            n = next((j for j, pair in enumerate(zip(picks, row.draft)) if pair[0] != pair[1]), len(row.draft))  # of the draft, accepted
            row.outs += picks[:n + 1]
            state = -1 if n < len(row.draft) else space.moves[row.state].get(picks[-1], -1) if row.state != space.done else space.done
            if state >= 0 and row.state != space.done:
                row.decisions.append((space.field[row.state], logits, picks[-1]))
            draft, after = space.runs[state] if state >= 0 else ([], -1)
            if constrain and after == space.done:
                row.outs, draft, state = row.outs + draft, [], after
            if state in (-1, space.done):
                done[row.number] = row.outs, row.decisions
                del rows[slot]
            else:  # the end token itself need not be read
                row.at += len(row.feed)
                row.feed, row.draft, row.state = ids_of([picks[-1], *draft])[:len(draft) + (after != space.done)], draft, after
        while n_out in done:
            yield done.pop(n_out)
            n_out += 1


def confidence(fields, decisions, temperature=None):
    """{field: probability of the value chosen}: of the student held to the schema, given the fields before. It is the product, along the
    value's tokens, of the softmax over the legal ones. decisions: of an answer, [(field, logits (V,), -inf where illegal, the choice)].
    temperature: {field: what its logits are divided by}, see evaluate.py."""
    log_p = dict.fromkeys(fields, 0.0)
    for name, logits, choice in decisions:
        log_p[name] += (logits / (temperature or {}).get(name, 1.0)).log_softmax(-1)[choice].item()
    return {name: math.exp(p) for name, p in log_p.items()}


def generate(model, space, texts, constrain=True, batch_size=64):
    """texts: list of lists of ids -> list of lists of output indices, end token included; see decode."""
    texts = iter(texts)
    return [outs for outs, _ in decode(model, space, lambda wait: next(texts), batch_size, constrain)]
