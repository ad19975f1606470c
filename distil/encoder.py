"""The encoder that reads a text for a student, if it has one: BERT, https://arxiv.org/abs/1810.04805 (MiniLM, bge,
e5), or MPNet, https://arxiv.org/abs/2004.09297. reader.py loads it with pre-trained weights.

    encoder = Encoder(EncoderConfig(vocab_size=30522, n_layer=6, n_head=12, n_embd=384, n_mlp=1536, n_pos=512))
    states = encoder(torch.tensor([[101, 7592, 102], [101, 102, -1]]))  # (2, 3, 384); -1 on padding

B texts, T tokens, C = n_embd channels, H = n_head heads; K tokens of all texts, one after the other.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import own_tokens


@dataclass
class EncoderConfig:
    vocab_size: int              # of its own tokenizer
    n_layer: int
    n_head: int
    n_embd: int
    n_mlp: int
    n_pos: int                   # longest text it was trained with
    norm_eps: float = 1e-12
    n_buckets: int = 0           # of distances, which MPNet adds to its attention; 0: none
    marks: tuple = (-2, -2)      # the ids that begin a list of options behind a text, and an option (options.py)


class EncoderBlock(nn.Module):
    """post-norm residual block: attention in both directions, then MLP"""

    def __init__(self, config):
        super().__init__()
        self.n_head, C = config.n_head, config.n_embd
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_up, self.c_down = nn.Linear(C, config.n_mlp), nn.Linear(config.n_mlp, C)
        self.norm_1, self.norm_2 = (nn.LayerNorm(C, eps=config.norm_eps) for _ in range(2))

    def forward(self, x, attend):
        """x (B, T, C) rows or (K, C) tokens; attend: attend_rows or attend_groups, for these texts"""
        x = self.norm_1(x + self.c_proj(attend(self.c_attn(x), self.n_head)))
        return self.norm_2(x + self.c_down(F.gelu(self.c_up(x))))


def attend_rows(qkv, n_head, sees):
    """attention in both directions. qkv (B, T, 3 C): queries, keys and values of rows; sees: what Encoder.place
    returns, for these rows -> (B, T, C)."""
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).reshape(B, T, -1)


def attend_groups(qkv, n_head, groups):
    """the same for the tokens (K, 3 C) of Groups of rows, one after the other -> (K, C)."""
    with torch.autocast(qkv.device.type, enabled=False):    # in the type of qkv
        heads = qkv.view(len(qkv) * 3 * n_head, -1)
        return torch.cat([group.attend(heads) for group in groups]).view(len(qkv), -1)


class Group:
    """rows that are about as long, and where their tokens are among all. used (B, T): where they have one; sees: what
    Encoder.place returns; first: the number of their first token; n_head."""

    def __init__(self, used, sees, first, n_head):
        (B, T), H, device = used.shape, n_head, used.device
        token = (first + used.flatten().cumsum(0) - 1).clamp(min=0).view(1, B, 1, T)  # padding is the token before it
        part = torch.arange(3 * H, device=device).view(3, 1, H, 1)
        cell = torch.arange(B, device=device)[:, None] * H * T + torch.arange(T, device=device)  # (B, T)
        self.shape, self.sees, self.bias = (3, B, H, T), sees, None
        self.spread = (3 * H * token + part).flatten()      # (3 B H T) queries, keys and values of rows
        self.gather = (cell[used][:, None] + T * part[0, 0, :, 0]).flatten()  # (k H) of the k tokens, from (B H T)

    def attend(self, heads):
        """heads (K 3 H, D): queries, keys and values of all tokens, each part by heads -> (k H, D)"""
        q, k, v = heads.index_select(0, self.spread).view(*self.shape, -1)  # (B, H, T, D) each
        fused = heads.device.type != 'cpu' or q.size(2) * q.itemsize > MOST_BYTES
        if self.bias is None:                               # in the first layer
            sees = self.sees if self.sees.dtype != torch.bool else torch.where(self.sees, 0.0, UNSEEN)
            bias = sees.to(q.dtype).expand(*q.shape[:3], q.size(2))  # (B, H, T, T)
            self.bias = bias if fused else bias.flatten(0, 1)
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))  # (B H, T, D)
            scores = torch.baddbmm(self.bias, q, k.mT, alpha=q.size(-1) ** -0.5)
            y = scores.float().softmax(-1).to(v.dtype) @ v
        return y.reshape(-1, y.size(-1)).index_select(0, self.gather)


UNSEEN = -1e4     # the score of what a token does not see; finite, so that padding, which may see nothing, is not NaN
MOST_BYTES = 192  # scores of a token whose attention a CPU computes faster as plain products: for 16 to 48 tokens its
                  # fused kernel takes two to three times as long, and a gradient in bfloat16 five times
MOST_KEPT = 2 ** 16  # tokens whose states an encoder keeps, if it keeps any: 100 MB of 384 channels


class Encoder(nn.Module):
    """ids of its own vocabulary -> hidden states of its last layer. tokenizer, keep_end: see distil/reader.py.
    keeps: whether it keeps the states of the texts it read last, as is worth while where the same texts are asked
    about again (confidence.py)."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.keep_end = config, tokenizer, False
        self.keeps, self.kept = False, OrderedDict()            # {ids: states (T, C)}, the oldest first
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_pos, config.n_embd)
        if config.n_buckets:                                    # the same in all layers
            self.wre = nn.Embedding(config.n_buckets, config.n_head)
        self.norm_e = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.h = nn.ModuleList(EncoderBlock(config) for _ in range(config.n_layer))

    def forward(self, text):
        """text (B, T) ids, -1 on padding -> states (B, T, C), of no meaning on padding"""
        if not self.keeps or torch.is_grad_enabled():
            return self.read(text)
        rows = [tuple(row[:n]) for row, n in zip(text.tolist(), (text >= 0).sum(1).tolist())]
        found = {row: self.kept.get(row) for row in rows}       # other threads may read, too
        new = [n for n, row in enumerate(rows) if found[row] is None]
        if new:
            read = {rows[n]: of_text[:len(rows[n])].clone() for n, of_text in zip(new, self.read(text[new]))}
            found |= read
            self.kept.update(read)
        states = found[rows[0]].new_zeros(*text.shape, self.config.n_embd)
        for row, of_text in zip(rows, states):
            of_text[:len(row)] = found[row]
        while sum(map(len, [*self.kept])) > MOST_KEPT:
            self.kept.popitem(last=False)
        return states

    def train(self, mode=True):
        """as a Module does; what was read with other weights is forgotten."""
        self.kept.clear()
        return super().train(mode)

    def read(self, text):
        """what forward returns, of texts that are read now"""
        used = text >= 0
        if torch.compiler.is_exporting():                   # no size may depend on the data
            pos, sees = self.place(text)
            return self.run(text.clamp(min=0), pos, partial(attend_rows, sees=sees))
        # padding costs nothing: the texts in the order of their lengths, in groups of up to 16 tokens, 32, ...
        n, order = used.sum(1).clamp(min=1).sort(stable=True)  # (B,) each
        text = F.pad(text, (0, -text.size(1) % 16), value=-1)[order]
        widths, sizes = (16 * ((n + 15) // 16)).unique_consecutive(return_counts=True)
        parts = [part[:, :T] for part, T in zip(text.split(sizes.tolist()), widths.tolist())]
        masks, (pos, sees) = [part >= 0 for part in parts], zip(*map(self.place, parts))
        first = [0, *accumulate(int(mask.sum()) for mask in masks)]
        groups = [Group(*group, self.config.n_head) for group in zip(masks, sees, first)]
        ids, pos = (torch.cat([part[mask] for part, mask in zip(whole, masks)]) for whole in (parts, pos))  # (K,)
        x = self.run(ids, pos, partial(attend_groups, groups=groups))  # (K, C)
        return x.new_zeros(*used.shape, x.size(-1)).index_put((used[order],), x)[order.argsort()]

    def place(self, text):
        """the positions (B, T) of the tokens of texts, and which tokens each of them sees, see add_bias. Positions
        begin anew at each of the options behind a text, and an option sees the text, itself and the name of its list:
        so their order is of no account. The text sees them all."""
        (head, item), used, t = self.config.marks, text >= 0, torch.arange(text.size(1), device=text.device)
        if head < 0:                                        # no text has options
            return t.expand_as(text), self.add_bias(t[None], used[:, None].expand(-1, text.size(1), -1))
        is_head, last = text == head, used & ~F.pad(used[:, 1:], (0, 1))  # the last token is one of the text
        start = torch.where(is_head | (text == item), t, 0).cummax(1)[0].masked_fill(last, 0)  # (B, T) of its part
        n, of_list, own = own_tokens(text, head)[:, None], is_head.cumsum(1), start == 0
        pos = torch.where(own, torch.minimum(t, n), n + 1 + t - start).clamp(max=self.config.n_pos - 1)
        of_same = (start[:, :, None] == start[:, None]) | (
            (of_list[:, :, None] == of_list[:, None]) & is_head.gather(1, start)[:, None])
        return pos, self.add_bias(pos, (own[:, :, None] | own[:, None] | of_same) & used[:, None])

    def add_bias(self, pos, sees):
        """sees (B, T, T) bool as (B, 1, T, T), or with n_buckets what is added to the scores, (B, H, T, T): a number
        for each head and distance, near ones exact, far ones in steps of a logarithm (T5,
        https://arxiv.org/abs/1910.10683)"""
        if not self.config.n_buckets:
            return sees[:, None]
        back = pos[:, :, None] - pos[:, None]                   # (1 or B, T, T) how far behind it is
        half, n = self.config.n_buckets // 2, back.abs()        # of them for what comes after
        near = half // 2
        far = near + ((n.clamp(min=near) / near).log() / math.log(128 / near) * (half - near)).long()
        bucket = torch.where(n < near, n, far.clamp(max=half - 1)) + half * (back < 0)
        return self.wre(bucket).permute(0, 3, 1, 2).masked_fill(~sees[:, None], UNSEEN)

    def run(self, ids, pos, attend):
        """the states of ids (B, T) or (K,) at positions pos; attend: see EncoderBlock."""
        x = self.norm_e(self.wte(ids) + self.wpe(pos))      # (B, T, C) or (K, C)
        for block in self.h:
            x = block(x, attend)
        return x
