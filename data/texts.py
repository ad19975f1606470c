"""Which texts are worth labelling: a stream of lines in, groups of texts out. No settings, no printing."""
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from data import Hashes
from data.lines import cut_encoding, text_hash
from distil.space import kept_part, special_ids

URL = re.compile(r'https?:|www\.|\b[\w-]+\.(com|org|net|io|edu|gov)\b', re.I)
TAG = re.compile(r'</?[a-zA-Z!][^>]*>|<\||&\w+;|\[[^\]]*\]\([^)]*\)|```|\*\*')  # HTML, chat markup, markdown


def refusal_reason(text, ids, too_long, min_text, special, keep_markup=False):
    """the reason why a text is not worth labelling, one word; '' if it is. special: ids of special tokens;
    keep_markup: links and markup are no reason."""
    if too_long:
        return 'long'
    if not keep_markup and URL.search(text):
        return 'url'
    if not keep_markup and TAG.search(text):
        return 'tag'
    if special.intersection(ids):
        return 'special'
    if len(ids) < min_text:
        return 'short'
    return ''


class Text(NamedTuple):
    """a text to be labelled."""
    hash: int
    ids: np.ndarray     # (n,) uint32, of the teacher
    given: object       # what is known of it: an answer, a label (a dict), the reason why it has none, or None


def read_groups(texts, tokenizer, size, min_text, max_text, limit=0, cut='', keep_markup=False, counts=None):
    """yields the texts worth labelling in groups of `size`, each a list of Texts, in the order
    of the file. Streams: it keeps only 16 bytes per text, and 8 more if cut.

    texts: from data.lines.read_texts. cut: of a longer text 'first' keeps the first max_text tokens, 'last' the last
    ones, '' refuses the text. limit: number of texts to keep; 0: all. keep_markup: as for refusal_reason. counts: a
    Counter that is updated with the outcome of each line: `equal_once_cut` is a text that equals an earlier one only
    because of the cut.
    """
    special, seen, pairs, wholes, group = special_ids(tokenizer), Hashes(), Hashes(), Hashes(), []
    counts, texts = Counter() if counts is None else counts, iter(texts)
    max_chars, how = 100 * max_text, {'max_text': max_text, 'keep_end': cut == 'last'}  # no need to tokenize a book
    part = slice(-max_chars, None) if kept_part(how).start else slice(max_chars)
    while block := list(islice(texts, 1024)):
        encodings = tokenizer.encode_batch([text[part] for text, *_ in block], add_special_tokens=False)
        for (text, answer, reason), encoding in zip(block, encodings):
            ids = encoding.ids
            too_long = len(ids) > max_text or len(text) > max_chars
            hash_ = whole = text_hash(text)
            if cut and too_long:  # keep the text as the student will read it
                ids, text = cut_encoding(text, text[part], encoding, how)
                hash_ = text_hash(text)
            reason = reason or refusal_reason(text, ids, too_long and not cut, min_text, special, keep_markup)
            pair = hash_ if answer is None else text_hash(text + json.dumps(answer, sort_keys=True))
            if not reason and hash_ in seen:  # of two answers to a text the first one counts
                is_new = cut and whole not in wholes
                reason = 'equal_once_cut' if is_new else 'duplicate' if pair in pairs else 'conflicting'
            if cut:
                wholes.add(whole)
            counts[reason or 'kept'] += 1
            if reason:
                continue
            seen.add(hash_)
            pairs.add(pair)
            group.append(Text(hash_, np.array(ids, np.uint32), answer))
            is_last = counts['kept'] == limit
            if len(group) == size or is_last:
                yield group
                group = []
            if is_last:
                return
    if group:
        yield group


def prefetch(iterator):
    """yields the items of an iterator; while one is used, a thread computes the next."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, iterator, None)
        while (item := upcoming.result()) is not None:
            upcoming = pool.submit(next, iterator, None)
            yield item
