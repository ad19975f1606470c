"""The student's network. No settings, no printing, no files.

    student = Student(StudentConfig(vocab_size=262144, output_vocab=525, output_ids=range(525)))
    text, answer = torch.tensor([[5, 77]]), torch.tensor([[525, 3]])   # (B, T) each, -1 on padding
    logits = student(text, answer)        # (2, 525): what follows the start token, what follows token 3

A causal decoder (RMSNorm, RoPE, GeGLU) reads a text and what is written of its answer, and predicts the next
token of the answer. The text is given as ids of a large vocabulary, the answer as *output indices*, positions in
the small output vocabulary of V tokens (distil/space.py); index V is the start token. Without an encoder the
text's tokens are looked up in a table, the teacher's whole vocabulary. With one, a pre-trained BERT or MPNet reads the
text in both directions, and its states take the place of the table's rows (distil/encoder.py).

train.py trains it, sample.py and distil/decode.py decode with it. B rows, T tokens, C = n_embd channels,
H = n_head heads of D = n_embd / n_head, V = output_vocab.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class StudentConfig:
    vocab_size: int = 262144  # rows of the input table: the teacher's whole vocabulary, for any text
    output_vocab: int = 525                                 # V, rows of the head: only what an answer can need
    output_ids: tuple = ()    # row of the table for each output index; (): with an encoder, which has V + 1 rows
    start_id: int = 2                                       # row of the table between text and answer
    block_size: int = 75                                    # longest row: text + answer
    n_layer: int = 16
    n_head: int = 16
    n_kv_head: int = 16  # fewer than n_head: grouped-query attention, https://arxiv.org/abs/2305.13245
    n_embd: int = 1024
    n_mlp: int = 4096                                       # hidden width of the gated MLP
    n_table: int = 0                                        # width of the input table; 0: n_embd
    dropout: float = 0.0
    rope_base: float = 10000.0
    places: bool = False      # an answer may point to tokens of its text, which an encoder has read
    encoder: dict = None                                    # sizes of the EncoderConfig in front; None: none


# -----------------------------------------------------------------------------
# the decoder


def rotate(x, cos, sin):
    """rotary position embedding, https://arxiv.org/abs/2104.09864: x (B, H, T, D) rotated by the angles of its
    positions. cos, sin (1, 1, T, D). Channel i is paired with channel i + D/2."""
    a, b = x.chunk(2, dim=-1)                               # (B, H, T, D/2) each
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class RMSNorm(nn.RMSNorm):
    """https://arxiv.org/abs/1910.07467, computed in the precision of its weight, also under autocast"""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """causal self-attention with rotary positions; with a cache `attend` replaces the attention itself"""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        self.head_size = config.n_embd // config.n_head
        n_heads = config.n_head + 2 * config.n_kv_head      # queries, keys and values in one product
        self.c_attn = nn.Linear(config.n_embd, n_heads * self.head_size, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, attend=None, kept=None):
        B, T, C = x.shape
        sizes = [n * self.head_size for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = self.c_attn(x).split(sizes, dim=2)        # (B, T, H * D), twice (B, T, n_kv_head * D)
        q = q.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, n_kv_head, T, D)
        v = v.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, n_kv_head, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if attend is not None:                              # decoding: a cache holds keys and values
            y = attend(q, k, v, kept)                       # (1, H, n, D); without kept n is N
        else:
            dropout = self.dropout if self.training else 0.0
            with torch.autocast('cpu', enabled=False):      # in bfloat16 a CPU's gradient is 9 times slower
                y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), dropout_p=dropout, is_causal=True,
                                                   enable_gqa=self.n_head != self.n_kv_head)
        y = y.transpose(1, 2).flatten(2)                    # (B, H, T, D) -> (B, T, C)
        if kept is not None:                                # (n, C)
            y = y[0] if attend is not None else y.flatten(0, 1)[kept]
        return self.c_proj(y)                               # (B, T, C), or (n, C)


class MLP(nn.Module):
    """GeGLU, https://arxiv.org/abs/2002.05202"""

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.c_up = nn.Linear(config.n_embd, config.n_mlp, bias=False)
        self.c_proj = nn.Linear(config.n_mlp, config.n_embd, bias=False)

    def forward(self, x):
        x = F.gelu(self.c_gate(x), approximate='tanh') * self.c_up(x)  # (B, T, C) -> (B, T, n_mlp)
        return self.c_proj(x)                               # (B, T, C)


class Block(nn.Module):
    """pre-norm residual block: attention, then MLP"""

    def __init__(self, config):
        super().__init__()
        norm = partial(RMSNorm, config.n_embd, eps=1e-6)
        self.norm_1, self.attn, self.norm_2, self.mlp = norm(), Attention(config), norm(), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, attend=None, kept=None):
        y = self.attn(self.norm_1(x), cos, sin, attend, kept)  # (B, T, C), or (n, C) with kept
        x = (x if kept is None else x.flatten(0, 1)[kept]) + self.drop(y)
        return x + self.drop(self.mlp(self.norm_2(x)))


def own_tokens(text, mark):
    """(R,) tokens of each text (R, T) before its options: the decoder does not read these, an answer points to them.
    mark: the id that they begin with."""
    return ((text >= 0) & ((text == mark).cumsum(1) == 0)).sum(1)


def lay_out(text, answer, mark=-2):
    """text (R, T), answer (B, T), padded with -1 -> the cells of B rows of text, then answer, (B, T_row) each: source,
    which of all tokens of text and then of answer it holds; used, bool, False on padding, whose source is the first
    start token; of_text, bool. Rows from R on have no text. mark: see own_tokens."""
    n_text = F.pad(own_tokens(text, mark), (0, answer.size(0) - text.size(0)))  # (B,)
    n_row = n_text + (answer >= 0).sum(1)                   # (B,)
    # a graph for export has no size that depends on the data, so its rows may be longer than needed
    T_row = text.size(1) + answer.size(1) if torch.compiler.is_exporting() else int(n_row.max())
    b, t = torch.arange(answer.size(0), device=answer.device)[:, None], torch.arange(T_row, device=answer.device)
    used, of_text = t < n_row[:, None], t < n_text[:, None]
    source = torch.where(of_text, text.size(1) * b + t, text.numel() + answer.size(1) * b + t - n_text[:, None])
    return source.masked_fill(~used, text.numel()), used, of_text


class Student(nn.Module):
    """encoder: an Encoder that reads the texts, of the sizes in config.encoder, or None. ValueError if the sizes do
    not fit together."""

    def __init__(self, config, encoder=None):
        super().__init__()
        if config.n_embd % (2 * config.n_head) or config.n_head % config.n_kv_head:
            sizes = f'n_embd = {config.n_embd}, n_head = {config.n_head}, n_kv_head = {config.n_kv_head}'
            raise ValueError(f'{sizes}: n_embd / n_head must be an even number, and n_head a multiple of n_kv_head')
        self.config, C, V = config, config.n_embd, config.output_vocab
        width = config.n_table or C
        self.wte = nn.Embedding(config.vocab_size, width)   # text and answer share it, if there is no encoder
        self.wte_proj = nn.Linear(width, C, bias=False) if width != C else nn.Identity()
        self.encoder = encoder
        self.mark = (config.encoder or {}).get('marks', (-2,))[0]  # see own_tokens
        if encoder is not None:
            assert width == C and config.start_id == V, 'with an encoder the table has a row per output index, and V'
            assert config.vocab_size == V + (3 if config.places else 1), 'and two more for what is pointed to'
            self.encoder_proj = nn.Linear(encoder.config.n_embd, C, bias=False)
        if config.places:
            assert encoder is not None, 'a text to point to is read by an encoder'
            self.point_query, self.point_key = (nn.Linear(C, 2 * C, bias=False) for _ in range(2))  # first, last
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(C, eps=1e-6)
        self.lm_head = nn.Linear(C, V, bias=False)          # not tied to wte: V rows
        # what follows from config: the row of the table for each output index, and for the start token
        row = torch.tensor([*(config.output_ids or range(V)), config.start_id])
        self.register_buffer('answer_row', row, persistent=False)  # (V + 1,)
        D = C // config.n_head
        self.register_buffer('rope_freq', config.rope_base ** (-torch.arange(0, D, 2).float() / D), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2 and not name.startswith('encoder.'):  # that is pre-trained
                # residual projections start smaller, so that depth does not grow the stream (GPT-2, 2.3)
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02
                nn.init.normal_(p, std=std)
        if width != C:
            nn.init.normal_(self.wte_proj.weight, std=width ** -0.5)  # keeps the variance
        if encoder is not None:                             # so does this
            nn.init.normal_(self.encoder_proj.weight, std=encoder.config.n_embd ** -0.5)
        if config.places:                                   # beside the states of a text, its own words are as large
            nn.init.normal_(self.wte.weight)
            for part in (self.point_query, self.point_key):
                nn.init.normal_(part.weight, std=C ** -0.5)

    def forward(self, text, answer, cache=None, only_last=False):
        """text (R, T) ids, answer (B, T) output indices, the start token V first; -1 pads both on the right. Row b is
        text b and then answer b, without a gap: text [[5, 7], [9, -1]] and answer [[V, 3], [V, -1]] are the rows
        5 7 V 3 and 9 V. Returns logits over the output vocabulary after each token of the answers, V included: (n, V)
        in row order; with only_last after the last token of each answer alone, (B, V). With places the logits go on:
        (n, V + 1 + T), where column V + 1 + t is token t of the row's text, and V is never likely.

        With a cache (decode.Cache) text and answer hold what is not in it yet: the first R rows begin, each with a
        text; the others (R <= B) go on with their answer. T is then of the longest text in the cache.
        """
        source, used, of_text = lay_out(text, answer, self.mark)  # (B, T_row) each
        B, n_row = used.size(0), used.sum(1)                # (B,) tokens of each row
        if cache is None:                                   # rows padded on the right
            pos = torch.arange(used.size(1), device=used.device)  # (T_row,)
            last = torch.arange(B, device=used.device) * used.size(1) + n_row - 1  # (B,)
            kept = last if only_last else (used & ~of_text).flatten().nonzero()[:, 0]  # (n,) cells
        else:                                               # one row after the other, no padding: (1, N)
            source, of_text = source[used][None], of_text[used][None]
            kept = n_row.cumsum(0) - 1 if only_last else (~of_text[0]).nonzero()[:, 0]
            pos = cache.place_tokens(used, kept)            # (N,) which also tells the cache where they go
        angle = pos[:, None] * self.rope_freq               # (T, D/2)
        angle = torch.cat((angle, angle), dim=-1)[None, None]  # (1, 1, T, D)
        cos, sin = angle.cos(), angle.sin()
        x, texts = self.embed(text, answer, source, cache)
        x = self.drop(x)                                    # (B, T, C), or (1, N, C)
        narrow = cache is not None or only_last  # behind its attention the last layer has the kept cells only
        for i, block in enumerate(self.h):
            attend = None if cache is None else partial(cache.attend, i)
            x = block(x, cos, sin, attend, kept if narrow and i == len(self.h) - 1 else None)
        x = self.norm_f(x if narrow else x.flatten(0, 1)[kept])  # (n, C)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 logits near 10 are 0.06 apart
            logits = self.lm_head(x)                        # (n, V)
            return self.point(x, logits, answer, only_last, *texts) if texts else logits

    def embed(self, text, answer, source, cache):
        """(the cells of lay_out (B, T, C), or of a cache's pass (1, N, C): rows of the table, or the encoder's states
        where it reads; what the rows can point to: their states (B, T, C) and which of them there are (B, T), or
        None)"""
        dtype = self.lm_head.weight.dtype                   # a frozen table is fp16
        answer_row = self.answer_row[answer.clamp(max=self.config.output_vocab)]  # (B, T)
        if self.encoder is None:
            row = torch.cat((text.flatten(), answer_row.flatten()))[source]  # (B, T)
            return self.wte_proj(self.wte(row).to(dtype)).to(dtype), None
        written, texts = self.wte(answer_row), None         # the table has V + 1 rows, and they are C wide
        states = written.new_zeros(*text.shape, written.size(-1))
        if text.numel():                                    # else the texts were read in an earlier pass
            states = self.encoder_proj(self.encoder(text)).to(dtype)  # (R, T, C)
        if self.config.places:
            texts = (states, text >= 0) if cache is None else cache.keep_texts(states, text >= 0)
            place = answer - self.config.output_vocab - 1   # (B, Ta) 2 t or 2 t + 1, or negative
            token = place.clamp(min=0)[..., None] // 2      # (B, Ta, 1)
            pointed = texts[0].gather(1, token.expand(-1, -1, states.size(-1))).to(dtype)
            kind = self.wte.weight[self.config.output_vocab + 1 + place % 2]  # (B, Ta, C) of a first, of a last one
            written = torch.where(place[..., None] >= 0, pointed + kind, written)
        return torch.cat((states.flatten(0, 1), written.flatten(0, 1)))[source], texts

    def point(self, x, logits, answer, only_last, states, used):
        """logits (n, V), and those of all places: (n, V + 1 + T). x (n, C): what the head has read; states (B, T, C),
        used (B, T): of the texts"""
        asked, place = answer >= 0, answer - self.config.output_vocab - 1  # (B, Ta): where x stands
        after_first = (place >= 0) & (place % 2 == 0)       # (B, Ta): there the last one is asked for
        if only_last:
            after_first = after_first.gather(1, asked.sum(1, keepdim=True) - 1)  # (B, 1)
        which = torch.stack((~after_first, after_first), -1)  # (B, Ta, 2), or (B, 1, 2)
        which = which[:, 0] if only_last else which[asked]  # (n, 2)
        query = (self.point_query(x).unflatten(-1, (2, -1)) * which[..., None]).flatten(1)  # (n, 2 C)
        query = (query[:, None] if only_last else
                 query.new_zeros(*asked.shape, query.size(-1)).index_put((asked,), query))
        scores = query @ self.point_key(states.float()).mT / math.sqrt(x.size(-1))  # (B, Ta, T), or (B, 1, T)
        scores = scores.masked_fill(~used[:, None], -1e4)
        scores = scores[:, 0] if only_last else scores[asked]  # (n, T)
        return torch.cat((logits, torch.full_like(logits[:, :1], -1e4), scores), 1)

    def param_groups(self, weight_decay):
        """AdamW groups: matrices decay. A table does not (rows absent from a batch would shrink), nor do norms
        and biases."""
        groups = {(of_encoder, decays): [] for of_encoder in (False, True) for decays in (True, False)}
        for name, p in self.named_parameters():
            if p.requires_grad:
                decays = p.dim() == 2 and not name.endswith(('wte.weight', 'wpe.weight', 'wre.weight'))
                groups[name.startswith('encoder.'), decays].append(p)
        return [{'params': params, 'weight_decay': weight_decay if decays else 0.0, 'of_encoder': of_encoder}
                for (of_encoder, decays), params in groups.items() if self.encoder or not of_encoder]

    def count_params(self):
        """{part: number of parameters}; `total` also counts the norms."""
        parts = {'total': '', 'embedding': 'wte', 'attention': '.attn.', 'mlp': '.mlp.', 'head': 'lm_head.'}
        parts |= {'encoder': 'encoder'} if self.encoder else {}
        return {part: sum(p.numel() for name, p in self.named_parameters()
                          if key in name and (part in ('total', 'encoder') or not name.startswith('encoder')))
                for part, key in parts.items()}
