"""The student: the network, its output space, and greedy decoding. No settings, no printing, no files.

    model = Student(StudentConfig(vocab_size=262144, output_vocab=525))
    space = OutputSpace(tokenizer, {'tone': ['neutral', 'friendly'], 'spam': [True, False]})
    space.to_json(generate(model, space, [tokenizer.encode('hi there', add_special_tokens=False).ids])[0])

Two vocabularies meet here. An *id* is a row of the teacher's vocabulary (what the tokenizer gives, what the student
reads). An *output index* is a position in space.output_ids (what the student predicts, what output.bin stores).
"""
import json
import math
import random
from dataclasses import dataclass
from functools import partial

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

    def forward(self, x, cos, sin, cache=None, pos=None, mask=None):
        B, T, C = x.shape
        sizes = [h * self.head_size for h in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = (y.view(B, T, -1, self.head_size).transpose(1, 2) for y in self.c_attn(x).split(sizes, dim=2))
        if hasattr(self, 'q_norm'):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, D)
        if cache is not None:  # each row writes at its own positions and reads everything up to them
            rows = torch.arange(B, device=x.device)[:, None]
            for store, new in zip(cache, (k, v)):
                store[rows, :, pos] = new.transpose(1, 2)  # store (B, n_kv_head, S, D)
            k, v = cache
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
                                           enable_gqa=self.n_head != self.n_kv_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x, *attn_args):
        x = x + self.drop(self.post_1(self.attn(self.norm_1(x), *attn_args)))
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

    def forward(self, idx, targets=None, cache=None, pos=None):
        """idx (B, T) ids, rows padded on the right -> logits over the output vocabulary.

        Without targets (B, T, V). With targets (B, T) only where targets >= 0, as (n, V) in row order: the head never
        sees a text position. With a cache (see new_cache), pos (B, T) says where in its row each column of idx belongs.
        """
        B, T = idx.shape
        assert cache is not None or T <= self.config.block_size, f'{T} tokens do not fit block_size {self.config.block_size}'
        mask = None
        if cache is None:
            pos = torch.arange(T, device=idx.device)[None]
        else:
            mask = torch.arange(cache[0][0].size(2), device=idx.device) <= pos[:, None, :, None]  # (B, 1, T, S)
        angle = pos[:, None, :, None] * self.rope_freq[:, None, None, None]  # (n_rope, B or 1, 1, T, D/2)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos(), angle.sin()
        x = self.drop(self.wte_proj(self.wte(idx).to(self.lm_head.weight.dtype)))  # (B, T, C)
        for i, block in enumerate(self.h):
            rope = self.rope_of_layer[i]
            x = block(x, cos[rope], sin[rope], None if cache is None else cache[i], pos, mask)
        x = self.norm_f(x)
        return self.lm_head(x if targets is None else x[targets >= 0])

    def new_cache(self, B):
        """empty keys and values for B rows: per layer a pair of (B, n_kv_head, block_size, D)."""
        c, p = self.config, self.lm_head.weight
        shape = (2, B, c.n_kv_head, c.block_size, self.h[0].attn.head_size)
        return [torch.zeros(shape, dtype=p.dtype, device=p.device) for _ in self.h]

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
# output space: every valid answer as a token automaton


def common_prefix(seqs):
    n = 0
    while all(len(s) > n for s in seqs) and len({s[n] for s in seqs}) == 1:
        n += 1
    return n


class OutputSpace:
    """All answers a schema allows, as a DFA over tokens, and the output vocabulary they and their neighbours need.

    tokenizer: a tokenizers.Tokenizer. fields: {name: [allowed JSON values]} in output order. indent, fence: style of
    the JSON. end_id: the teacher's end of turn, or None where a newline ends the answer (few-shot completion).
    auxiliary: ids appended to the output vocabulary. ValueError where the schema cannot be compiled.

    output_ids  (V,) list   ids of the output vocabulary, the n_required of valid answers first
    moves       per state {legal output index: state after it}; answers start in state 0
    next_state  (S, V) long the same as a table, -1 where the schema forbids
    done        int         the state after the end token
    forced      (S,) long   the only legal output index, -1 where there is a choice
    field       per state   the field whose value is being written, None between them
    max_answer  int         tokens of the longest answer, end token included
    """

    def __init__(self, tokenizer, fields, indent=None, fence=False, end_id=None, auxiliary=()):
        self.tokenizer, self.fields, self.indent, self.fence, self.end_id = tokenizer, fields, indent, fence, end_id
        for name, values in fields.items():
            if not values or len({json.dumps(v) for v in values}) < len(values):
                raise ValueError(f'field {name!r} needs a list of different values, not {values!r}')
        if not fields:
            raise ValueError("no fields; a task needs fields = {'name': [allowed values], ...}")
        self.segments = self.find_segments()
        required = dict.fromkeys(t for alternatives in self.segments for a in alternatives for t in a)
        self.n_required = len(required)
        self.output_ids = list(required | dict.fromkeys(auxiliary))
        self.output_index = {t: i for i, t in enumerate(self.output_ids)}
        self.compile()
        self.verify()
        self.parsed = {}  # answers seen by to_json: few are distinct

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
        """the answer as a row of segments, each a list of alternative id tuples: scaffolding has one, a field several.

        One encoding per value: what differs between the values of a field, all else equal, is that field's span.
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
        """subset construction: a state is the set of (segment, alternative, position) that the tokens so far allow,
        so values that are prefixes of each other need no special case."""
        def settle(points):
            seen, todo = set(), list(points)
            while todo:
                seg, alt, at = point = todo.pop()
                if seg < len(self.segments) and at == len(self.segments[seg][alt]):  # finished: open the next segment
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
        self.moves = [rows[state] for state in range(len(number))]
        names = [name for name, values in self.fields.items() if len(values) > 1]  # odd segments are theirs, in order
        self.field = [next((names[seg // 2] for seg, _, _ in state if seg % 2 and seg // 2 < len(names)), None) for state in number]
        self.next_state = torch.full((len(number), len(self.output_ids)), -1)
        for state, row in enumerate(self.moves):
            for token, after in row.items():
                self.next_state[state, token] = after
        self.done = number[frozenset({(len(self.segments), 0, 0)})]
        legal = self.next_state >= 0
        self.forced = torch.where(legal.sum(1) == 1, legal.int().argmax(1), -1)
        self.max_answer = sum(max(map(len, alternatives)) for alternatives in self.segments)

    def verify(self, n=200):
        """random whole answers must be accepted token for token as the tokenizer writes them. ValueError if not."""
        rng = random.Random(0)
        for _ in range(n):
            values = [rng.choice(v) for v in self.fields.values()]
            outs = [self.output_index.get(t, -1) for t in self.encode(values)]
            if -1 in outs or self.walk(outs) != self.done:
                raise ValueError(f'the tokenizer writes {self.text(values)!r} in a way its parts do not; try another indent')

    def walk(self, outs):
        """state after the output indices outs, -1 once they have left the schema."""
        state = 0
        for out in outs:
            state = self.moves[state].get(out, -1) if state >= 0 else -1
        return state

    def states(self, outs):
        """the state before each of the output indices outs, which must be the start of a valid answer."""
        states = [0]
        for out in outs:
            states.append(self.moves[states[-1]][out])
        return states[:-1]

    def from_json(self, answer):
        """dict -> output indices of that answer, or None where the schema has no such answer."""
        if not isinstance(answer, dict) or set(answer) != set(self.fields):
            return None
        if any(json.dumps(answer[name]) not in map(json.dumps, values) for name, values in self.fields.items()):
            return None
        return [self.output_index[i] for i in self.encode([answer[name] for name in self.fields])]

    def to_json(self, outs):
        """output indices of an answer -> dict, or None where they are not a whole valid answer."""
        key = tuple(outs)
        if key not in self.parsed:
            text = self.tokenizer.decode([self.output_ids[o] for o in outs], skip_special_tokens=True)
            text = text.strip().removeprefix('```json').removesuffix('```')
            self.parsed[key] = json.loads(text) if self.walk(outs) == self.done else None
        return self.parsed[key]


# -----------------------------------------------------------------------------
# greedy decoding


@torch.no_grad()
def generate(model, space, texts, constrain=True):
    """texts: list of lists of ids -> list of lists of output indices, end token included.

    constrain: the answer is held to the schema, so it always parses. Else the student runs free and a row stops at its
    first token outside the schema (kept, so that the caller sees it), at the end token or when block_size is full.
    """
    device, block_size = model.lm_head.weight.device, model.config.block_size
    next_state, output_ids = space.next_state.to(device), torch.tensor(space.output_ids, device=device)
    lengths = torch.tensor([len(t) for t in texts], device=device)
    rows = torch.arange(len(texts), device=device)
    idx = torch.full((len(texts), int(lengths.max()) + 1), model.config.start_id, device=device)  # padding is never attended to
    for i, text in enumerate(texts):
        idx[i, :len(text)] = torch.tensor(text, device=device)
    cache = model.new_cache(len(texts))
    pos = torch.arange(idx.size(1), device=device).expand_as(idx)
    logits = model(idx, cache=cache, pos=pos)[rows, lengths]  # (B, V), read at each row's start token
    state, alive, at = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool), lengths
    outs = []
    while True:
        if constrain:
            logits = logits.masked_fill((next_state[state] < 0), -math.inf)
        choice = logits.argmax(-1)
        outs.append(torch.where(alive, choice, -1))
        state = torch.where(alive, next_state[state, choice], state)
        at = at + 1
        alive = alive & (state >= 0) & (state != space.done) & (at < block_size)
        if not alive.any():
            break
        state, at = state.clamp(min=0), at.clamp(max=block_size - 1)  # finished rows idle
        logits = model(output_ids[choice][:, None], cache=cache, pos=at[:, None])[:, 0]
    return [[o for o in row if o >= 0] for row in torch.stack(outs, 1).tolist()]
