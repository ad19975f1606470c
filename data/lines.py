"""The lines of a .jsonl as texts: what is read of them, and their hashes."""
import hashlib
import json

from distil.options import read_text, split_options, text_end
from distil.space import clean, kept_part


def cut_text(text, tokenizer, task):
    """(ids, text) of what is read of a text: of a long one only kept_part, as a cleaned text."""
    part, most = kept_part(task), 100 * task['max_text']        # no need to tokenize a book
    shown = text[-most:] if part.start else text[:most]
    encoding = tokenizer.encode(shown, add_special_tokens=False)
    return cut_encoding(text, shown, encoding, task)


def cut_encoding(text, shown, encoding, task):
    """cut_text of a text whose beginning, or end, has been encoded. encoding: of tokenizers, of the text `shown`."""
    if len(encoding.ids) <= task['max_text'] and len(shown) == len(text):
        return encoding.ids, text
    part = kept_part(task)
    if len(shown) == len(text) and not part.start and split_options(text):  # they stay
        at = text_end(text)
        n = task['max_text'] - sum(start >= at for start, _ in encoding.offsets)
        if n > 0:
            n_own = sum(start < at for start, _ in encoding.offsets)
            return [*encoding.ids[:n], *encoding.ids[n_own:]], clean(text[:encoding.offsets[n - 1][1]] + text[at:])
    (start, _), (_, end) = encoding.offsets[part][0], encoding.offsets[part][-1]
    return encoding.ids[part], clean(shown[start:] if part.start else shown[:end])


def read_texts(path, key='answer'):
    """yields for each line of a .jsonl, whatever its bytes: (text, value under key or None, ''), or
    ('', None, reason) if it holds no text. key None: the value is the whole object. Options stand behind the text."""
    with open(path, 'rb') as file:
        for line in file:
            try:
                record = json.loads(line) if line.strip() else {'text': ''}
                text = read_text(record)
                text.encode()  # fails for a lone surrogate
                value = record.get(key) if key else record
                yield (text, value, '') if text else ('', None, 'empty')
            except UnicodeError:
                yield '', None, 'bad_utf8'
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield '', None, 'bad_json'


def text_hash(text):
    """64-bit hash of a cleaned text, equal on every machine. UnicodeEncodeError for a lone surrogate."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')
