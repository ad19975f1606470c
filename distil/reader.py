"""A pre-trained encoder in front of the student: it reads the text both ways, then the student writes.

    reader = load_reader('data/teachers/minilm', n_layer=3)  # Reader
    states = reader(ids, mask)                               # (B, T) ids of its own vocabulary -> (B, T, C)

The student's decoder gets these states in place of the embeddings of a text. The reader is part of the
student: it is trained with it at a lower learning rate, and saved in its checkpoint. Its architecture is
BERT's (https://arxiv.org/abs/1810.04805): MiniLM, bge, e5. B texts, T tokens, C channels, H heads.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

from config import stop


@dataclass
class ReaderConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_mlp: int
    n_pos: int                                              # longest text it was trained with
    norm_eps: float = 1e-12


class ReaderBlock(nn.Module):
    """post-norm residual block: attention in both directions, then MLP"""

    def __init__(self, config):
        super().__init__()
        self.n_head, C = config.n_head, config.n_embd
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_up, self.c_down = nn.Linear(C, config.n_mlp), nn.Linear(config.n_mlp, C)
        self.norm_1, self.norm_2 = (nn.LayerNorm(C, eps=config.norm_eps) for _ in range(2))

    def forward(self, x, attend):
        """x (B, T, C) rows or (K, C) tokens; attend: attend_rows or attend_groups, for these texts."""
        x = self.norm_1(x + self.c_proj(attend(self.c_attn(x), self.n_head)))
        return self.norm_2(x + self.c_down(F.gelu(self.c_up(x))))


def attend_rows(qkv, n_head, mask):
    """attention in both directions. qkv (B, T, 3 C): queries, keys and values of rows; mask (B, T) bool,
    False on padding -> (B, T, C)."""
    B, T, _ = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, C / H) each
    mask = mask[:, None, None].expand(-1, 1, T, -1)         # (B, 1, T, T): a token sees the whole text
    with torch.autocast(qkv.device.type, enabled=False):    # as in model.py
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, -1)


def attend_groups(qkv, n_head, groups):
    """the same for tokens (K, 3 C) that lie one after the other, group after group -> (K, C). groups: for
    each (cell (n,) of its n tokens in its padded rows, mask (B, T)). Its texts have about one length, so that
    there is little padding."""
    parts = []
    for part, (cell, mask) in zip(qkv.split([len(cell) for cell, _ in groups]), groups):
        rows = part.new_zeros(mask.numel(), part.size(-1)).index_put((cell,), part)
        parts.append(attend_rows(rows.view(*mask.shape, -1), n_head, mask).flatten(0, 1)[cell])
    return torch.cat(parts)


class Reader(nn.Module):
    """ids of its vocabulary -> hidden states of its last layer. tokenizer: a tokenizers.Tokenizer, see
    encode."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_pos, config.n_embd)
        self.norm_e = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.h = nn.ModuleList(ReaderBlock(config) for _ in range(config.n_layer))

    def forward(self, ids, mask):
        """ids (B, T), mask (B, T) bool, False on padding -> states (B, T, C)"""
        pos = torch.arange(ids.size(1), device=ids.device)
        return self.run(ids, pos, partial(attend_rows, mask=mask))

    def run(self, ids, pos, attend):
        """the states of ids (B, T) or (K,) at positions pos; attend: see ReaderBlock."""
        x = self.norm_e(self.wte(ids) + self.wpe(pos))      # (B, T, C) or (K, C)
        for block in self.h:
            x = block(x, attend)
        return x

    def read(self, ids, text):
        """states (B, T, C) of the texts in rows of ids (B, T), 0 elsewhere. text (B, T) bool: True at the
        tokens of a text. Neighbouring tokens are one text; between two texts there is a position that is
        none."""
        if torch.compiler.is_exporting():                   # one text at the start of each row
            return self(ids.masked_fill(~text, 0), text)
        where = text.flatten().nonzero()[:, 0]              # (K,)
        states = self.norm_e.weight.new_zeros(ids.numel(), self.config.n_embd)
        if not len(where):                                  # the texts were read in an earlier pass
            return states.view(*ids.shape, -1)
        first = where.diff(prepend=where[:1] - 2) > 1       # (K,) True at the first token of a text
        row = first.cumsum(0) - 1                           # (K,) which text
        col = where - where[first][row]                     # (K,) which token of it
        length = row.bincount()[row]                        # (K,) of its text
        by_length = length.argsort(stable=True)
        where, col, row, length = (x[by_length] for x in (where, col, row, length))
        groups = make_groups(length, row, col)
        read = self.run(ids.flatten()[where], col, partial(attend_groups, groups=groups))  # (K, C)
        return states.index_put((where,), read.to(states.dtype)).view(*ids.shape, -1)

    def encode(self, texts, max_tokens):
        """lists of ids of strings, each with its first and last special token and at most max_tokens
        long."""
        longest = min(max_tokens, self.config.n_pos)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        return [row if len(row) <= longest else row[:longest - 1] + row[-1:] for row in rows]

    def count_cut(self, text, max_tokens):
        """how many tokens of a text encode leaves out."""
        return max(0, len(self.tokenizer.encode(text).ids) - min(max_tokens, self.config.n_pos))


def make_groups(length, row, col):
    """the groups of attend_groups for K tokens in the order of their texts' lengths. length (K,) of its text,
    row (K,) which text, col (K,) which token of it."""
    sizes = ((length - 1) // 8).unique_consecutive(return_counts=True)[1].tolist()  # up to 8 tokens, 16, ...
    groups = []
    for T, row, col in zip(*(x.split(sizes) for x in (length, row, col))):
        row, T = row.unique_consecutive(return_inverse=True)[1], int(T[-1])
        cell = row * T + col                                # (n,)
        mask = torch.zeros(int(row[-1]) + 1, T, dtype=torch.bool, device=row.device)
        mask.view(-1)[cell] = True
        groups.append((cell, mask))
    return groups


# -----------------------------------------------------------------------------
# loading


def load_reader(name, n_layer=0):
    """a Reader with the weights of a pre-trained encoder. name: Hugging Face id or directory; n_layer:
    keep the first so many layers, 0: all. Exits with a message if it cannot be loaded or is not of BERT's
    family."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer  # a trained student needs no transformers
    try:
        c, wrapped = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        hint = '; run: python data/teachers/prepare.py minilm' if Path(name) == Path('data/teachers/minilm') else ''
        is_path = name.count('/') > 1 or name.startswith(('.', '/'))  # a Hugging Face id is owner/name
        problem = 'no such directory' if is_path and not Path(name).is_dir() else str(error).strip().splitlines()[0]
        stop(f'reader = {name} cannot be loaded: {problem}{hint}')
    absolute = getattr(c, 'position_embedding_type', None) in (None, 'absolute')
    if c.model_type != 'bert' or c.hidden_act != 'gelu' or not absolute:
        stop(f'reader = {name} is a {c.model_type} model; it must be of BERT\'s family, such as MiniLM, bge or e5')
    if n_layer > c.num_hidden_layers:
        stop(f'reader_layers = {n_layer}, but {name} has {c.num_hidden_layers}')
    config = ReaderConfig(c.vocab_size, n_layer or c.num_hidden_layers, c.num_attention_heads, c.hidden_size,
                          c.intermediate_size, c.max_position_embeddings, c.layer_norm_eps)
    wrapped.backend_tokenizer.no_padding()
    wrapped.backend_tokenizer.no_truncation()               # encode cuts
    reader = Reader(config, wrapped.backend_tokenizer)
    copy_bert(reader, AutoModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32))
    return reader


@torch.no_grad()
def copy_bert(reader, model):
    """fills a Reader with the weights of a transformers BertModel."""
    e = model.embeddings
    reader.wte.weight.copy_(e.word_embeddings.weight)
    reader.wpe.weight.copy_(e.position_embeddings.weight + e.token_type_embeddings.weight[0])
    reader.norm_e.load_state_dict(e.LayerNorm.state_dict())
    for block, layer in zip(reader.h, model.encoder.layer):
        attention = layer.attention
        qkv = attention.self.query, attention.self.key, attention.self.value
        block.c_attn.weight.copy_(torch.cat([part.weight for part in qkv]))
        block.c_attn.bias.copy_(torch.cat([part.bias for part in qkv]))
        parts = ((block.c_proj, attention.output.dense), (block.norm_1, attention.output.LayerNorm),
                 (block.c_up, layer.intermediate.dense), (block.c_down, layer.output.dense),
                 (block.norm_2, layer.output.LayerNorm))
        for part, of_bert in parts:
            part.load_state_dict(of_bert.state_dict())


def read_tokenizer(folder):
    """the reader's tokenizer in the folder of a student."""
    tokenizer = Tokenizer.from_file(str(Path(folder, 'reader.json')))
    tokenizer.no_truncation()                               # encode cuts
    return tokenizer
