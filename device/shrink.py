"""Makes a student smaller: fewer tokens in its table, 8 bits per weight. No settings, no files.

Most of a small student's bytes are its table: one row for each of the teacher's 150,000 or 260,000 tokens. A
narrow task uses a tenth of them. `choose_tokens` chooses the ids to keep. `trim_tokenizer` makes a tokenizer
that has only these tokens and still encodes any text. `trim_student` takes the rows of the kept tokens.
"""
import copy
import json
import unicodedata
from collections import Counter
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

from distil.space import OutputSpace
from model import StudentConfig

# -----------------------------------------------------------------------------
# fewer tokens


def merge_ranks(model):
    """{(left piece, right piece): rank} of the `model` of a tokenizer.json. ValueError if it is not BPE."""
    if model['type'] != 'BPE':
        raise ValueError(f'the tokenizer is {model["type"]}, only BPE can be trimmed: set keep_tokens=0')
    pairs = (pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges'])
    return {tuple(pair): rank for rank, pair in enumerate(pairs)}


def list_pieces(token, ranks):
    """the pieces from which byte pair encoding builds a token: its characters, then every merged piece; the
    last is the token itself. Without one of them it cannot be built. (https://arxiv.org/abs/1508.07909)"""
    parts = list(token)
    pieces = list(parts)
    while len(parts) > 1:
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(parts, parts[1:])))
        if rank == len(ranks):
            return [token]  # no merges build it: it is found whole, or never
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        pieces.append(parts[i])
    return pieces


def classify_token(i, text):
    """id of a token and its text -> its kind, a tuple: whether it starts with a space; its script and case;
    roughly how common it was in the texts that the vocabulary was made from (BPE numbers the commonest
    first)."""
    word = text.strip()
    script = unicodedata.name(word[:1], '?').split()[0] if word else ''  # LATIN, CYRILLIC, CJK, DIGIT, ...
    case = word.islower(), word.isupper(), word.istitle(), word.isalpha(), word.isascii()
    return text[:1] == ' ', script, case, min(i.bit_length(), 15) + i // 16384


def choose_tokens(tokenizer, n, counts, always):
    """the ids to keep, sorted: at most n, or all if n is 0. ValueError if n is too small.

    The ids in `always` are kept in any case, and the 256 bytes, with which any text can be encoded. Next
    come the lowest n / 8 ids, the commonest tokens of the vocabulary: other texts have them (curly quotes,
    say) even if the counted ones do not. Then come the ids of counts {id: how often it was seen}, the
    commonest first. The other ids follow by their kind: the larger the share of a kind that was seen, the
    earlier. Each id brings the pieces that it is built from, so a text whose tokens are all kept is cut as
    before: at each step BPE merges the pair of the lowest rank, and none of these merges is lost.
    """
    spec = json.loads(tokenizer.to_str())
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if n == 0 or n >= len(names):
        return sorted(names)
    vocab, ranks = spec['model']['vocab'], merge_ranks(spec['model'])
    unknown = spec['model'].get('unk_token')
    # byte-level BPE writes each byte as one character; with byte_fallback it is a token like <0x0A>
    fallback = spec['model'].get('byte_fallback')
    is_byte = lambda t: len(t) == 6 and t[:3] == '<0x' if fallback else len(t) == 1
    pieces = lambda i: {vocab.get(piece, i) for piece in list_pieces(names[i], ranks)}
    kept = {i for token, i in vocab.items() if is_byte(token) or token == unknown}.union(*map(pieces, always))
    if n < len(kept):
        raise ValueError(f'keep_tokens is {n}; the bytes and the answers alone need {len(kept)}')
    ids = sorted(names)
    kinds = {i: classify_token(i, text) for i, text in zip(ids, tokenizer.decode_batch([[i] for i in ids]))}
    of_kind, seen = Counter(kinds.values()), Counter(kinds[i] for i in counts)
    share = {kind: seen[kind] / (total + 1) for kind, total in of_kind.items()}
    by_count = sorted(counts, key=lambda i: (-counts[i], i))
    by_kind = sorted(ids, key=lambda i: (-share[kinds[i]], i))
    for i in [*ids[:n // 8], *by_count, *by_kind]:
        if i not in kept and len(kept) + len(new := pieces(i) - kept) <= n:
            kept |= new
    return sorted(kept)


def trim_tokenizer(tokenizer, kept):
    """a tokenizers.Tokenizer with only the tokens of the ids `kept`, numbered in that order. Merges whose
    parts or result are not kept are removed. If all ids are kept, it encodes as before."""
    spec, new_id = json.loads(tokenizer.to_str()), {i: n for n, i in enumerate(kept)}
    spec['post_processor'] = None  # it adds tokens by their old ids, and a student's text gets none
    if kept != list(range(tokenizer.get_vocab_size())):
        model = spec['model']
        vocab = model['vocab'] = {token: new_id[i] for token, i in model['vocab'].items() if i in new_id}
        merges = merge_ranks(model)
        model['merges'] = [[a, b] for a, b in merges if a in vocab and b in vocab and a + b in vocab]
        spec['added_tokens'] = [t | {'id': new_id[t['id']]}
                                for t in spec['added_tokens'] if t['id'] in new_id]
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))


@torch.no_grad()
def trim_student(student, space, kept, tokenizer):
    """(the student, its OutputSpace), trimmed: the table has only the rows `kept`, the head only those that
    an answer can need. tokenizer: that of trim_tokenizer. A text of the same tokens gets the same answer."""
    new_id = {i: n for n, i in enumerate(kept)}
    small = copy.copy(student)
    # table and head are its own; it shares the layers between them
    small._modules, small._buffers = dict(student._modules), dict(student._buffers)
    small.wte = take_rows(student.wte, kept)
    small.lm_head = take_rows(student.lm_head, range(space.n_required))
    output_ids, start_id = ([new_id[i] for i in space.output_ids[:space.n_required]],
                            new_id.get(student.config.start_id, 0))
    small.config = StudentConfig(**asdict(student.config) | {
        'vocab_size': len(kept), 'output_vocab': space.n_required, 'output_ids': output_ids, 'start_id': start_id})
    small.answer_row = torch.tensor([*output_ids, start_id])
    end_id = None if space.end_id is None else new_id[space.end_id]
    trimmed = OutputSpace(tokenizer, space.schema.fields, space.indent, space.fence, end_id,
                          left_out=space.schema.left_out)
    assert trimmed.output_ids == output_ids
    return small, trimmed


def take_rows(part, rows):
    """a copy of an embedding or of a linear layer without bias, with only these rows; it may be in 8 bits."""
    taken, rows = copy.copy(part), torch.tensor(list(rows))
    taken._parameters = {key: p if p is None else nn.Parameter(p[rows], requires_grad=False)
                         for key, p in part._parameters.items()}
    taken._buffers = {key: p[rows] for key, p in part._buffers.items()}
    return taken


# -----------------------------------------------------------------------------
# fewer bits


GROUP = 32  # columns of a layer's matrix that share a scale


class Int8(nn.Module):
    """a matrix as whole numbers from -127 to 127, symmetric, rounded to nearest, with one scale per row, or per `group`
    columns of it, which then has 16 bits: a few large weights of a row leave the others their precision."""

    def __init__(self, weight, group=0):
        super().__init__()
        parts = weight.float().unflatten(1, (-1, group or weight.size(1)))  # (rows, groups, columns of one)
        scale = parts.abs().amax(2).clamp(min=1e-5) / 127
        self.register_buffer('scale', scale.half() if group else scale)  # (rows, groups)
        whole = (parts / self.scale.float()[..., None]).round().clamp(-127, 127)
        self.register_buffer('whole', whole.to(torch.int8).flatten(1))

    @property
    def weight(self):
        parts = self.whole.float().unflatten(1, (self.scale.size(1), -1))
        return (parts * self.scale.float()[..., None]).flatten(1)  # (rows, columns)


class Int8Embedding(Int8):
    def forward(self, idx):
        return self.whole[idx].float() * self.scale[idx]


class Int8Linear(Int8):
    def __init__(self, linear):
        super().__init__(linear.weight, 0 if linear.in_features % GROUP else GROUP)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class HalfEmbedding(nn.Module):
    """a table in 16 bits"""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer('table', weight.half())

    @property
    def weight(self):
        return self.table.float()

    def forward(self, idx):
        return self.table[idx].float()


@torch.no_grad()
def fold_table(student):
    """a copy of the student whose table is multiplied by the projection after it, if that makes it narrower:
    128 numbers per row instead of the teacher's 896, and the same answers."""
    folded = copy.deepcopy(student)
    projection = folded.wte_proj
    if isinstance(projection, nn.Linear) and projection.out_features < projection.in_features:
        rows = student.wte.weight.split(4096)  # in parts: the whole in float32 is half a gigabyte
        table = torch.cat([projection(part.to(projection.weight.dtype)) for part in rows])
        folded.wte, folded.wte_proj = nn.Embedding.from_pretrained(table), nn.Identity()
    return folded.eval()


@torch.no_grad()
def round_to_int8(student):
    """a copy of the student with its table and every matrix in 8 bits; it computes in float32. The head stays
    as it is: each of its few rows matters for the choice, and they are a thousandth of the bytes. So does, in 16 bits,
    what an encoder adds for positions and distances: it is in every state, and a few of its columns are large."""
    rounded = copy.deepcopy(student)
    for name, part in list(rounded.named_modules()):
        parent, _, key = name.rpartition('.')
        if key == 'lm_head':
            continue
        if key in ('wpe', 'wre'):
            setattr(rounded.get_submodule(parent), key, HalfEmbedding(part.weight))
        elif isinstance(part, nn.Linear):
            setattr(rounded.get_submodule(parent), key, Int8Linear(part))
        elif isinstance(part, nn.Embedding):
            setattr(rounded.get_submodule(parent), key, Int8Embedding(part.weight))
    return rounded
