"""A smaller table for a reader of many languages, of which a task needs one.

    trim_encoder(encoder, ['A fájl nem található', ...], 32768)

multilingual-e5-small has 250,037 tokens, four fifths of its weights. What stays is what the texts have, and then the
likeliest tokens of the letters that the texts have, so also words that they lack. Another word is read in smaller
pieces, at worst letter by letter; a letter that the texts do not have and ASCII does not is unknown.
"""
import json
from collections import Counter

import torch
import torch.nn as nn
from tokenizers import Tokenizer

ASCII = {chr(n) for n in range(32, 127)}


def choose_tokens(tokenizer, vocab, texts, n):
    """the n numbers of the tokens that stay, in order. vocab: [(token, score)] of a Unigram tokenizer, whose scores
    are log probabilities. ValueError if n is too small for its special tokens and letters."""
    counts = Counter(id for encoding in tokenizer.encode_batch_fast(texts) for id in encoding.ids)
    letters = ASCII.union(*map(tokenizer.normalizer.normalize_str, texts)) | {'▁'}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known = [i for i, (token, _) in enumerate(vocab) if token in special or letters.issuperset(token)]
    always = {i for i in known if vocab[i][0] in special or len(vocab[i][0]) == 1}
    if n < len(always):
        raise ValueError(f'reader_tokens is {n}; the letters of the texts alone are {len(always)}')
    order = sorted(known, key=lambda i: (i not in always, -counts[i], -vocab[i][1], i))
    return sorted(order[:n])


@torch.no_grad()
def trim_encoder(encoder, texts, n):
    """keeps n tokens of an Encoder, in place: rows of its table and tokens of its tokenizer. ValueError if that cannot
    be."""
    form = json.loads(encoder.tokenizer.to_str())
    if form['model']['type'] != 'Unigram':
        raise ValueError(f'reader_tokens: the tokenizer of this reader is {form["model"]["type"]}; only a Unigram, '
                         'as e5 has, can be cut')
    vocab = form['model']['vocab']
    kept = choose_tokens(encoder.tokenizer, vocab, texts, min(n, len(vocab)))
    new = {old: i for i, old in enumerate(kept)}
    form['model'] |= {'vocab': [vocab[i] for i in kept], 'unk_id': new[form['model']['unk_id']]}
    for token in form['added_tokens']:
        token['id'] = new[token['id']]
    for token in form['post_processor']['special_tokens'].values():
        token['ids'] = [new[i] for i in token['ids']]
    encoder.tokenizer, encoder.config.vocab_size = Tokenizer.from_str(json.dumps(form)), len(kept)
    encoder.tokenizer.no_truncation()
    rows = encoder.wte.weight[kept]
    encoder.wte = nn.Embedding(len(kept), rows.size(1), device=rows.device)
    encoder.wte.weight.copy_(rows)
