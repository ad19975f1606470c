"""Which texts are worth labelling: a stream of lines in, groups of texts out. No settings, no printing."""
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from data import Hashes, first_tokens, text_hash
from distil.space import special_ids

URL = re.compile(r'https?:|www\.|\b[\w-]+\.(com|org|net|io|edu|gov)\b', re.I)
TAG = re.compile(r'</?[a-zA-Z!][^>]*>|<\||&\w+;|\[[^\]]*\]\([^)]*\)|```|\*\*')  # HTML, chat markup, markdown


def refusal_reason(text, ids, too_long, min_text, special):
    """why a text is not worth labelling, in a word; '' where it is."""
    if too_long:
        return 'long'
    if URL.search(text):
        return 'url'
    if TAG.search(text):
        return 'tag'
    if special.intersection(ids):
        return 'special'
    if len(ids) < min_text:
        return 'short'
    return ''


def read_groups(texts, tokenizer, size, min_text, max_text, limit=0, cut=False, counts=None):
    """yields the texts worth labelling in groups of `size`, each a list of (hash, ids, answer), in the file's
    order.

    texts: from data.read_texts. cut: of a text longer than max_text tokens keep the first so many, else
    refuse it. Streams: all it remembers is 8 bytes a text. counts, a Counter, is told what became of each
    line.
    """
    special, seen, group = special_ids(tokenizer), Hashes(), []
    counts, texts = Counter() if counts is None else counts, iter(texts)
    most = 100 * max_text  # characters: no need to tokenize a book
    while block := list(islice(texts, 1024)):
        encodings = tokenizer.encode_batch([text[:most] for text, *_ in block], add_special_tokens=False)
        for (text, answer, reason), encoding in zip(block, encodings):
            ids = encoding.ids
            long = len(ids) > max_text or len(text) > most
            if cut and long:  # the text as the student will read it
                ids, text = first_tokens(text, encoding, max_text)
            hash_ = text_hash(text)
            reason = reason or refusal_reason(text, ids, long and not cut, min_text, special)
            reason = reason or ('duplicate' if hash_ in seen else 'kept')
            counts[reason] += 1
            if reason != 'kept':
                continue
            seen.add(hash_)
            group.append((hash_, np.array(ids, np.uint32), answer))
            last = counts['kept'] == limit
            if len(group) == size or last:
                yield group
                group = []
            if last:
                return
    if group:
        yield group


def prefetch(iterator):
    """the same items; while one is used a thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item
