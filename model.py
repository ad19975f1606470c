"""The student's network. No settings, no printing, no files.

    student = Student(StudentConfig(vocab_size=262144, output_vocab=525))
    logits = student(torch.tensor([[5, 77, 2]]))  # (B, T) ids -> (B, T, V) logits over the output vocabulary

A decoder-only transformer (RMSNorm, RoPE, GeGLU). It reads ids of the teacher's whole vocabulary and predicts
output indices (distil/space.py defines both). distil/decode.py decodes with it, train.py trains it.

B rows, T tokens, C = n_embd channels, H = n_head heads of D = head_size, V = output_vocab.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class StudentConfig:
    vocab_size: int = 262144  # rows of the input embedding: the teacher's whole vocabulary, for any text
    output_vocab: int = 525                                 # V, rows of the head: only what an answer can need
    block_size: int = 75                                    # longest row: text + answer, + len(after) - 1
    n_layer: int = 16
    n_head: int = 16
    n_kv_head: int = 16  # fewer than n_head: grouped-query attention, https://arxiv.org/abs/2305.13245
    n_embd: int = 1024
    n_mlp: int = 4096                                       # hidden width of the gated MLP
    dropout: float = 0.0
    rope_base: float = 10000.0
    start_id: int = 2                                       # the id between text and answer ...
    after: tuple = ()                                       # ... or these, as in the teacher's prompt
    n_prompt: int = 0                                       # P, prompt tokens kept as keys and values
    reader: dict = None                                     # sizes of an encoder in front, see Student
    # what a block needs to hold a layer of Gemma 3, Llama or Qwen 2 (distil/start.py copies them)
    head_size: int = 0                                      # 0: n_embd // n_head
    n_table: int = 0                                        # width of the input embedding; 0: n_embd
    activation: str = 'gelu'                                # of the MLP: gelu (its tanh form) or silu
    qk_norm: bool = False                                   # RMSNorm on queries and keys
    qkv_bias: bool = False                                  # queries, keys and values have a bias
    sandwich: bool = False                                  # RMSNorm also after attention and MLP
    norm_eps: float = 1e-6
    rope_of_layer: tuple = ()                               # row of rope_freq for each layer; (): always 0

    @property
    def start(self):
        """ids between text and answer; at the last of them the first token of the answer is predicted."""
        return list(self.after) or [self.start_id]


# -----------------------------------------------------------------------------
# attention


def rotate(x, cos, sin):
    """rotary position embedding, https://arxiv.org/abs/2104.09864: x (B, H, T, D) rotated by the angles of its
    positions. cos, sin (B or 1, 1, T, D). Channel i is paired with channel i + D/2."""
    a, b = x.chunk(2, dim=-1)                               # (B, H, T, D/2) each
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend_with_lse(q, k, v, mask, scale, softcap=None):
    """attention that also returns the logsumexp of its scores, with which the decoder and the teacher's engine
    merge attention to a shared prompt with attention to a text's own tokens.

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


class RMSNorm(nn.RMSNorm):
    """https://arxiv.org/abs/1910.07467, computed in the precision of its weight, also under autocast"""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """causal self-attention with rotary positions; with a cache `attend` replaces the attention itself"""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        self.head_size = config.head_size or config.n_embd // config.n_head
        n_heads = config.n_head + 2 * config.n_kv_head      # queries, keys and values in one product
        self.c_attn = nn.Linear(config.n_embd, n_heads * self.head_size, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * self.head_size, config.n_embd, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_size, eps=config.norm_eps)
            self.k_norm = RMSNorm(self.head_size, eps=config.norm_eps)

    def forward(self, x, cos, sin, prompt=None, attend=None, keep=None):
        B, T, C = x.shape
        sizes = [n * self.head_size for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = self.c_attn(x).split(sizes, dim=2)        # (B, T, H * D), twice (B, T, n_kv_head * D)
        q = q.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = v.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, n_kv_head, T, D)
        if hasattr(self, 'q_norm'):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if attend is not None:                              # decoding: a cache holds keys and values
            y = attend(q if keep is None else q[:, :, keep], k, v, keep is not None)
        else:
            mask, dropout, gqa = None, self.dropout if self.training else 0.0, self.n_head != self.n_kv_head
            if prompt is not None:                          # (2, n_kv_head, P, D): every token sees all of it
                k, v = (torch.cat((old.expand(B, -1, -1, -1), new), 2) for old, new in zip(prompt, (k, v)))
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)  # (T, P + T)
            with torch.autocast('cpu', enabled=False):      # in bfloat16 a CPU's gradient is 9 times slower
                y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, dropout_p=dropout,
                                                   is_causal=mask is None, enable_gqa=gqa)
        y = y.transpose(1, 2).flatten(2)                    # (B, H, T, D) -> (B, T, H * D)
        if keep is not None:                                # (M, H * D); attend has selected them already
            y = y.flatten(0, 1)[keep] if attend is None else y[0]
        return self.c_proj(y)                               # (B, T, C), or (M, C)


# -----------------------------------------------------------------------------
# the rest of the network


class MLP(nn.Module):
    """GeGLU or SwiGLU, https://arxiv.org/abs/2002.05202"""

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.c_up = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.c_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)
        self.activation = {'gelu': partial(F.gelu, approximate='tanh'), 'silu': F.silu}[config.activation]

    def forward(self, x):
        x = self.activation(self.c_gate(x)) * self.c_up(x)  # (B, T, C) -> (B, T, n_mlp)
        return self.c_proj(x)                               # (B, T, C)


class Block(nn.Module):
    """pre-norm residual block: attention, then MLP"""

    def __init__(self, config):
        super().__init__()
        norm = partial(RMSNorm, config.n_embd, eps=config.norm_eps)
        self.norm_1, self.attn, self.norm_2, self.mlp = norm(), Attention(config), norm(), MLP(config)
        self.post_1, self.post_2 = (norm(), norm()) if config.sandwich else (nn.Identity(), nn.Identity())
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, prompt=None, attend=None, keep=None):
        y = self.attn(self.norm_1(x), cos, sin, prompt, attend, keep)  # (B, T, C), or (M, C) with keep
        x = (x if keep is None else x.flatten(0, 1)[keep]) + self.drop(self.post_1(y))
        return x + self.drop(self.post_2(self.mlp(self.norm_2(x))))


class Student(nn.Module):
    """ValueError if the sizes do not fit together.

    reader: a pre-trained encoder (distil/reader.py) or None. With one, the inputs are not the teacher's ids:
    ids below vocab_size = V + 1 are output indices and the start token, vocab_size + i is the reader's id i.
    """

    def __init__(self, config, reader=None):
        super().__init__()
        head_size = config.head_size or config.n_embd / config.n_head
        if head_size % 2 or config.n_head % config.n_kv_head:
            sizes = f'n_embd = {config.n_embd}, n_head = {config.n_head}, n_kv_head = {config.n_kv_head}'
            raise ValueError(f'{sizes}: n_embd / n_head must be an even number, and n_head a multiple of n_kv_head')
        self.config = config
        width = config.n_table or config.n_embd
        self.wte = nn.Embedding(config.vocab_size, width)   # text and answer share one input embedding
        self.wte_proj = nn.Identity()
        if width != config.n_embd:                          # a teacher's embedding is projected
            self.wte_proj = nn.Linear(width, config.n_embd, bias=False)
        self.reader = reader
        if reader is not None:                              # C of the reader -> C
            self.reader_proj = nn.Linear(reader.config.n_embd, config.n_embd, bias=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        if config.n_prompt:
            shape = config.n_layer, 2, config.n_kv_head, config.n_prompt, self.h[0].attn.head_size
            self.prompt = nn.Parameter(torch.zeros(shape))  # keys, already rotated, and values
        self.norm_f = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.output_vocab, bias=False)  # not tied to wte: V rows
        D, self.rope_of_layer = self.h[0].attn.head_size, config.rope_of_layer or (0,) * config.n_layer
        freq = config.rope_base ** (-torch.arange(0, D, 2).float() / D)  # (D/2,)
        freq = freq.expand(max(self.rope_of_layer) + 1, -1).clone()  # (n_rope, D/2)
        self.register_buffer('rope_freq', freq)
        for name, p in self.named_parameters():
            if name.startswith('reader.'):                  # it is pre-trained
                continue
            if p.dim() == 2:
                # residual projections start smaller, so that depth does not grow the stream (GPT-2, 2.3)
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        if width != config.n_embd:
            nn.init.normal_(self.wte_proj.weight, std=width ** -0.5)  # keeps the variance
        if reader is not None:                              # keeps it, too
            nn.init.normal_(self.reader_proj.weight, std=reader.config.n_embd ** -0.5)

    def forward(self, idx, targets=None, cache=None, pos=None, keep=None):
        """idx (B, T) ids, rows padded on the right -> logits over the output vocabulary, (B, T, V).

        With targets (B, T): only where targets >= 0, as (n, V) in row order, so that the head is not computed
        at text positions. With keep (M,) instead: only at these of the B * T positions, as (M, V). With a
        cache (decode.Cache): idx (1, N) are the new tokens of several rows one after another, pos (1, N)
        their positions, counted from the prompt's first token.
        """
        T = idx.size(1)
        if cache is None:
            assert T <= self.config.block_size, f'{T} tokens do not fit block_size {self.config.block_size}'
            pos = self.config.n_prompt + torch.arange(T, device=idx.device)[None]  # (1, T)
        angle = pos[:, None, :, None] * self.rope_freq[:, None, None, None]  # (n_rope, 1, 1, T, D/2)
        angle = torch.cat((angle, angle), dim=-1)           # (n_rope, 1, 1, T, D)
        cos, sin = angle.cos(), angle.sin()
        x = self.drop(self.embed(idx))                      # (B, T, C)
        for i, block in enumerate(self.h):
            rope = self.rope_of_layer[i]
            prompt = self.prompt[i] if self.config.n_prompt else None
            attend = None if cache is None else partial(cache.attend, i)
            wanted = keep if i == len(self.h) - 1 else None  # the last layer computes only these positions
            x = block(x, cos[rope], sin[rope], prompt, attend, wanted)
        x = self.norm_f(x if targets is None else x[targets >= 0])  # (B, T, C), (n, C) or (M, C)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 logits near 10 are 0.06 apart
            return self.lm_head(x)                          # (B, T, V), (n, V) or (M, V)

    def embed(self, idx):
        """idx (B, T) -> (B, T, C): the input embedding, or the reader's states where idx is the reader's"""
        dtype = self.lm_head.weight.dtype                   # a frozen table is fp16
        if self.reader is None:
            return self.wte_proj(self.wte(idx).to(dtype)).to(dtype)  # (B, T, n_table) -> (B, T, C)
        text = idx >= self.config.vocab_size                # (B, T) True where the reader reads
        states = self.reader.read(idx - self.config.vocab_size, text)  # (B, T, C of the reader)
        x = self.wte(idx.masked_fill(text, 0))
        return torch.where(text[..., None], self.reader_proj(states).to(dtype), x)

    def param_groups(self, weight_decay):
        """AdamW groups: matrices decay. The embedding does not (rows absent from a batch would shrink), nor do
        norms, biases and a kept prompt."""
        groups = {(of_reader, decays): [] for of_reader in (False, True) for decays in (True, False)}
        for name, p in self.named_parameters():
            if p.requires_grad:
                decays = p.dim() == 2 and not name.endswith(('wte.weight', 'wpe.weight'))
                groups[name.startswith('reader.'), decays].append(p)
        return [{'params': params, 'weight_decay': weight_decay if decays else 0.0, 'of_reader': of_reader}
                for (of_reader, decays), params in groups.items() if self.reader or not of_reader]

    def count_params(self):
        """{part: number of parameters}; `total` also counts the norms."""
        parts = {'total': '', 'embedding': 'wte', 'attention': '.attn.', 'mlp': '.mlp.', 'head': 'lm_head.'}
        parts |= {'prompt': 'prompt'} if self.config.n_prompt else {}
        parts |= {'reader': 'reader'} if self.reader else {}
        return {part: sum(p.numel() for name, p in self.named_parameters()
                          if key in name and (part in ('total', 'reader') or not name.startswith('reader')))
                for part, key in parts.items()}
