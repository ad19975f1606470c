"""The pre-trained encoder in front of a student (the setting `reader`): loading it, and its tokens.

    encoder = load_encoder('data/teachers/minilm', n_layer=3)  # an encoder.Encoder with these weights
    encode_texts(encoder, ['a text'], max_tokens=64)           # [[101, 1037, 3793, 102]]

The encoder reads the text for the student. It is part of the student: trained with it at a lower learning rate,
and saved in its checkpoint. It has a tokenizer of its own, so its ids are made from the text, not from the
teacher's ids. Its architecture is BERT's, as of MiniLM, bge and e5, or MPNet's.
"""
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from config import stop
from distil.encoder import Encoder, EncoderConfig
from distil.options import HEAD, ITEM, thin_options
from distil.places import Page, Source

# -----------------------------------------------------------------------------
# its tokens


def encode_texts(encoder, texts, max_tokens):
    """lists of the encoder's ids of strings, each with its first and last special token and at most max_tokens
    long: the first ones, or with keep_end the last."""
    return [cut_row(encoder, encoding.ids, max_tokens) for encoding in encoder.tokenizer.encode_batch_fast(texts)]


def most_read(encoder, max_tokens):
    """most tokens of a text that an encoder reads; positions begin anew at each option, so they set no limit there."""
    return max_tokens if encoder.config.marks[0] >= 0 else min(max_tokens, encoder.config.n_pos)


def cut_row(encoder, row, max_tokens, n_last=1):
    """what is kept of a list with a number, or something else, for each token of a text. n_last: of its last ones,
    which are kept."""
    longest = most_read(encoder, max_tokens)
    if len(row) <= longest:
        return row
    n_last = n_last if n_last < longest else 1
    return row[:1] + row[1 - longest:] if encoder.keep_end else row[:longest - n_last] + row[-n_last:]


def count_unread(encoder, text, max_tokens):
    """how many tokens of a text encode_texts leaves out."""
    return max(0, len(encoder.tokenizer.encode(text).ids) - most_read(encoder, max_tokens))


def text_room(student, space):
    """most ids of a text that fit into a row beside the longest answer."""
    return student.config.block_size - space.max_answer


def student_ids(student, space, texts):
    """what a student reads of texts, given as lists of the teacher's ids: these, or the ids of its encoder, for
    which a text that does not fit beside an answer is cut. Lists of ids."""
    if student.encoder is None:
        return [list(map(int, ids)) for ids in texts]
    strings = space.tokenizer.decode_batch([list(map(int, ids)) for ids in texts])
    return encode_texts(student.encoder, strings, text_room(student, space))


def read_pages(student, space, texts):
    """(the ids that student_ids gives, the Page of each text, see places.py); None for each if nothing is copied."""
    if not space.schema.copied:
        return student_ids(student, space, texts), [None] * len(texts)
    strings = space.tokenizer.decode_batch([list(map(int, ids)) for ids in texts])
    return encode_pages(student.encoder, space, strings, text_room(student, space))


def encode_pages(encoder, space, texts, max_tokens):
    """(lists of ids, as encode_texts gives them, of strings; the Page of each)."""
    rows, pages = [], []
    for text, encoding in zip(texts, encoder.tokenizer.encode_batch(texts)):
        source = Source(text, space)
        n_last = 1 + sum(start >= len(source.own) for start, end in encoding.offsets if end)  # the options stay
        rows.append(cut_row(encoder, encoding.ids, max_tokens, n_last))
        pages.append(Page(source, cut_row(encoder, encoding.offsets, max_tokens, n_last)))
    return rows, pages


def leave_out_options(student, space, shards, rows, rng):
    """lets shards.batch give the texts of these records without some of their options, so a student learns to choose
    among few and many. rng: a random.Random."""
    texts, moves = space.tokenizer.decode_batch([shards.ids(i).tolist() for i in rows]), []
    for n, i in enumerate(map(int, rows)):
        places, weights = shards.answer(i, 'places'), shards.answer(i, 'weights')
        texts[n], parts = thin_options(texts[n], rng, places[weights[:, 0] > -math.inf, 0].tolist())
        moves.append(parts)
    read, pages = encode_pages(student.encoder, space, texts, text_room(student, space))
    for i, ids, page, parts in zip(map(int, rows), read, pages, moves):
        begin, end, there = np.array(parts).T                   # its tokens, as if they stood where they stood before
        part = np.searchsorted(begin, page.starts, 'right').clip(1) - 1
        shift = np.where((page.starts >= begin[part]) & (page.starts < end[part]), there[part] - begin[part], -10 ** 6)
        shards.encoded[i], shards.pages[i] = ids, (page.starts + shift, page.ends + shift)


def count_cut(student, space, ids, max_text):
    """how many of a text's ids a student does not read: those after the first max_text, or, if these still are
    too many for its encoder, tokens of the encoder."""
    if len(ids) > max_text or student.encoder is None:
        return max(0, len(ids) - max_text)
    return count_unread(student.encoder, space.tokenizer.decode(ids), text_room(student, space))


def encode_records(student, space, shards, rows):
    """lets shards.batch give the texts of these records as the student reads them. Returns how many of them an
    encoder cannot read whole, because block_size is too small."""
    if student.encoder is None:
        shards.encoded = {}
        return 0
    new = [i for i in map(int, rows) if i not in shards.encoded]
    read, pages = read_pages(student, space, [shards.ids(i) for i in new])
    shards.encoded.update(zip(new, read))
    shards.pages.update((i, (page.starts, page.ends)) for i, page in zip(new, pages) if page)
    full = [i for i in new if len(shards.encoded[i]) >= text_room(student, space)]
    return sum(count_cut(student, space, shards.ids(i).tolist(), math.inf) > 0 for i in full)


# -----------------------------------------------------------------------------
# loading


# the parts of a layer as transformers calls them: query, key, value, and then in the order of the layer
PARTS = {'bert': ('attention.self.query', 'attention.self.key', 'attention.self.value', 'attention.output.dense',
                  'attention.output.LayerNorm', 'intermediate.dense', 'output.dense', 'output.LayerNorm'),
         'mpnet': ('attention.attn.q', 'attention.attn.k', 'attention.attn.v', 'attention.attn.o',
                   'attention.LayerNorm', 'intermediate.dense', 'output.dense', 'output.LayerNorm')}


def load_encoder(name, n_layer=0):
    """an Encoder with pre-trained weights. name: Hugging Face id or directory; n_layer: keep the first n layers,
    0: all. Exits with a message if it cannot be loaded or is neither BERT nor MPNet."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer  # a trained student needs no transformers
    try:
        c, wrapped = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        is_ours = Path(name).parent == Path('data/teachers') and Path(name).name in ('minilm', 'e5', 'mpnet')
        hint = f'; run: python data/teachers/prepare.py {Path(name).name}' if is_ours else ''
        is_path = name.count('/') > 1 or name.startswith(('.', '/'))  # a Hugging Face id is owner/name
        problem = 'no such directory' if is_path and not Path(name).is_dir() else str(error).strip().splitlines()[0]
        stop(f'reader = {name} cannot be loaded: {problem}{hint}')
    absolute = getattr(c, 'position_embedding_type', None) in (None, 'absolute')
    if c.model_type not in PARTS or c.hidden_act != 'gelu' or not absolute:
        stop(f'reader = {name} is a {c.model_type} model; it must be a BERT, such as MiniLM, bge or e5, or an MPNet')
    if n_layer > c.num_hidden_layers:
        stop(f'reader_layers = {n_layer}, but {name} has {c.num_hidden_layers}')
    n_buckets, n_pos = getattr(c, 'relative_attention_num_buckets', 0), c.max_position_embeddings
    n_pos -= 2 if n_buckets else 0                          # the first two of MPNet stand for padding
    config = EncoderConfig(c.vocab_size, n_layer or c.num_hidden_layers, c.num_attention_heads, c.hidden_size,
                           c.intermediate_size, n_pos, c.layer_norm_eps, n_buckets)
    wrapped.backend_tokenizer.no_padding()
    wrapped.backend_tokenizer.no_truncation()               # encode_texts cuts
    encoder = Encoder(config, wrapped.backend_tokenizer)
    copy_weights(encoder, AutoModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32))
    return encoder


def keep_options_apart(encoder):
    """lets an encoder read the options behind a text one by one: see Encoder.place. Exits with a message if its
    tokenizer does not know the signs."""
    marks = [encoder.tokenizer.encode(f'a {sign} b', add_special_tokens=False) for sign in (HEAD, ITEM)]
    ids = [next(id for id, (start, end) in zip(mark.ids, mark.offsets) if start <= 2 < end) for mark in marks]
    if not all(sign in encoder.tokenizer.id_to_token(id) for id, sign in zip(ids, (HEAD, ITEM))):
        stop(f'the tokenizer of the reader has no token for {HEAD} or {ITEM}, which part the options of a text')
    encoder.config.marks = tuple(ids)


@torch.no_grad()
def copy_weights(encoder, model):
    """fills an Encoder with the weights of a transformers BertModel or MPNetModel."""
    e = model.embeddings
    encoder.wte.weight.copy_(e.word_embeddings.weight)
    encoder.wpe.weight.copy_(e.position_embeddings.weight[-encoder.config.n_pos:])
    if not encoder.config.n_buckets:
        encoder.wpe.weight += e.token_type_embeddings.weight[0]
    else:
        encoder.wre.weight.copy_(model.encoder.relative_attention_bias.weight)
    encoder.norm_e.load_state_dict(e.LayerNorm.state_dict())
    for block, layer in zip(encoder.h, model.encoder.layer):
        *qkv, project, norm_1, up, down, norm_2 = map(layer.get_submodule, PARTS[model.config.model_type])
        block.c_attn.weight.copy_(torch.cat([part.weight for part in qkv]))
        block.c_attn.bias.copy_(torch.cat([part.bias for part in qkv]))
        for name, part in (('c_proj', project), ('norm_1', norm_1), ('c_up', up), ('c_down', down), ('norm_2', norm_2)):
            block.get_submodule(name).load_state_dict(part.state_dict())


def read_tokenizer(folder):
    """the encoder's tokenizer in the folder of a student."""
    tokenizer = Tokenizer.from_file(str(Path(folder, 'reader.json')))
    tokenizer.no_truncation()                               # encode_texts cuts
    return tokenizer
