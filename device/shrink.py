"""A smaller student of the same answers: fewer tokens in its table, 8 bits a weight. No settings, no files.

Most of a small student's bytes are its table: a row for each of the 150,000 or 260,000 tokens its teacher
knows, of which a narrow job sees a tenth. `choose_tokens` says which to keep, `trim_tokenizer` makes a
tokenizer that knows no others and still cuts any text into pieces, `trim` takes the rows.
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
    """{(left piece, right piece): rank} of the `model` of a tokenizer.json. ValueError where it is no BPE."""
    if model['type'] != 'BPE':
        raise ValueError(f'its tokenizer is {model["type"]}, not BPE, and cannot be trimmed: set keep_tokens=0')
    pairs = (pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges'])
    return {tuple(pair): rank for rank, pair in enumerate(pairs)}


def pieces_of(token, ranks):
    """all pieces that byte pair encoding makes on its way from the characters of a token to the token, which
    is the last: without one of them it would never get there. (https://arxiv.org/abs/1508.07909)"""
    parts = list(token)
    made = list(parts)
    while len(parts) > 1:
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(parts, parts[1:])))
        if rank == len(ranks):
            return [token]  # no merge leads there: it is found whole, or never
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        made.append(parts[i])
    return made


def kind_of(i, text):
    """which tokens are alike: begun by a space or not, script and case, and about as common in the text that
    the vocabulary was made from (BPE numbers the commonest first)."""
    word = text.strip()
    script = unicodedata.name(word[:1], '?').split()[0] if word else ''  # LATIN, CYRILLIC, CJK, DIGIT, ...
    case = word.islower(), word.isupper(), word.istitle(), word.isalpha(), word.isascii()
    return text[:1] == ' ', script, case, min(i.bit_length(), 15) + i // 16384


def choose_tokens(tokenizer, n, counts, always):
    """the ids to keep, sorted: at most n, or all where n is 0.

    always: ids kept in any case, as are the pieces that any text can be cut into (the 256 bytes). Then come
    those of counts {id: how often it was seen}, the commonest first, then the others: first those of kinds of
    which most were seen. Each brings the pieces it is made of, so a text whose tokens are all kept is cut as
    before: merging takes the best pair there is, and none of those is lost.
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
    pieces = lambda i: {vocab.get(piece, i) for piece in pieces_of(names[i], ranks)}
    kept = {i for token, i in vocab.items() if is_byte(token) or token == unknown}.union(*map(pieces, always))
    if n < len(kept):
        raise ValueError(f'keep_tokens is {n}; the bytes and the answers alone are {len(kept)}')
    ids = sorted(names)
    kinds = {i: kind_of(i, text) for i, text in zip(ids, tokenizer.decode_batch([[i] for i in ids]))}
    of_kind, seen = Counter(kinds.values()), Counter(kinds[i] for i in counts)
    share = {kind: seen[kind] / (total + 1) for kind, total in of_kind.items()}
    for i in [*sorted(counts, key=lambda i: (-counts[i], i)), *sorted(ids, key=lambda i: (-share[kinds[i]], i))]:
        if i not in kept and len(kept) + len(new := pieces(i) - kept) <= n:
            kept |= new
    return sorted(kept)


def trim_tokenizer(tokenizer, kept):
    """a tokenizers.Tokenizer of the tokens kept alone, numbered in that order; merges whose parts or result
    are gone go too. Where all are kept it is as it was."""
    spec, number = json.loads(tokenizer.to_str()), {i: n for n, i in enumerate(kept)}
    spec['post_processor'] = None  # it names tokens by their old numbers, and a student's text has none around
    if kept != list(range(tokenizer.get_vocab_size())):
        model = spec['model']
        there = model['vocab'] = {token: number[i] for token, i in model['vocab'].items() if i in number}
        merges = merge_ranks(model)
        model['merges'] = [[a, b] for a, b in merges if a in there and b in there and a + b in there]
        spec['added_tokens'] = [t | {'id': number[t['id']]} for t in spec['added_tokens'] if t['id'] in number]
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))


@torch.no_grad()
def trim(student, space, kept, tokenizer):
    """the student with the rows kept of its table, and of its head those that an answer can need, and its
    OutputSpace. tokenizer: of trim_tokenizer. What both answer is the same for a text of the same tokens."""
    number = {i: n for n, i in enumerate(kept)}
    small = copy.copy(student)
    small._modules = dict(student._modules)  # its own table and head; the layers between are shared
    small.wte = take_rows(student.wte, kept)
    small.lm_head = take_rows(student.lm_head, range(space.n_required))
    small.config = StudentConfig(**asdict(student.config) | {
        'vocab_size': len(kept), 'output_vocab': space.n_required,
        'start_id': number.get(student.config.start_id, 0),
        'after': tuple(number[i] for i in student.config.after)})
    end_id = None if space.end_id is None else number[space.end_id]
    trimmed = OutputSpace(tokenizer, space.fields, space.indent, space.fence, end_id)
    assert trimmed.output_ids == [number[i] for i in space.output_ids[:space.n_required]]
    return small, trimmed


def take_rows(part, rows):
    """an embedding or a linear layer without bias, or one of the two in 8 bits, of these rows alone."""
    taken, rows = copy.copy(part), torch.tensor(list(rows))
    taken._parameters = {key: p if p is None else nn.Parameter(p[rows], requires_grad=False)
                         for key, p in part._parameters.items()}
    taken._buffers = {key: p[rows] for key, p in part._buffers.items()}
    return taken


# -----------------------------------------------------------------------------
# fewer bits


class Int8(nn.Module):
    """a matrix as whole numbers from -127 to 127 and a scale for each row, symmetric and to the nearest."""

    def __init__(self, weight):
        super().__init__()
        top = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12)
        self.register_buffer('scale', top / 127)                # (rows, 1)
        self.register_buffer('whole', (weight.float() / self.scale).round().to(torch.int8))

    @property
    def weight(self):
        return self.whole.float() * self.scale                  # (rows, columns)


class Int8Embedding(Int8):
    def forward(self, idx):
        return self.whole[idx].float() * self.scale[idx]


class Int8Linear(Int8):
    def __init__(self, linear):
        super().__init__(linear.weight)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def fold_table(student):
    """a copy of the student whose table has the projection worked in, where that makes it narrower: 128
    numbers a row in place of the teacher's 896, and the same answers."""
    folded = copy.deepcopy(student)
    projection = folded.wte_proj
    if isinstance(projection, nn.Linear) and projection.out_features < projection.in_features:
        rows = student.wte.weight.split(4096)  # a part at a time: the whole in float32 is half a gigabyte
        table = torch.cat([projection(part.to(projection.weight.dtype)) for part in rows])
        folded.wte, folded.wte_proj = nn.Embedding.from_pretrained(table), nn.Identity()
    return folded.eval()


@torch.no_grad()
def round_to_int8(student):
    """a copy of the student with its table and every matrix in 8 bits; it computes in float32. The head stays
    as it is: of its few rows each decides, and they are a thousandth of the bytes."""
    rounded = copy.deepcopy(student)
    for name, part in list(rounded.named_modules()):
        parent, _, key = name.rpartition('.')
        if key == 'lm_head':
            continue
        if isinstance(part, nn.Linear):
            setattr(rounded.get_submodule(parent), key, Int8Linear(part))
        elif isinstance(part, nn.Embedding):
            setattr(rounded.get_submodule(parent), key, Int8Embedding(part.weight))
    return rounded
