"""Which records are held out: the texts that people name, else a tenth of all, chosen by the hash of the text.

    {"text": "...", "split": "test"}                  # in input.jsonl, or in the files of --labels and --score
    python train.py config/mine.py --held_out=FILE    # or each text of a file

extract.py stores the hashes of the texts whose lines say test as held_out.bin, and data.Shards reads it. A student
keeps the hashes that it was trained without (`split` of its checkpoint), so that it is measured on no other text.
"""
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from config import data_line, stop
from config.machine import whole_file
from data import DTYPES
from data.lines import cut_text, text_hash
from data.logs import Log, read_lines
from data.tables import read_part
from distil.labels import read_text
from distil.prompts import prompt_text
from distil.space import clean


def texts_of(lines):
    """yields (line, its text) for each of these lines (data.logs.Line) that has a text."""
    for line in lines:
        try:
            text = read_text(line)
        except ValueError:                                      # extract.py counts it
            continue
        yield line, text


def read_parts(lines):
    """yields (text, 'train' or 'test') for each of these lines that has a text. Exits with a message if its split is
    another word."""
    for line, text in texts_of(lines):
        try:
            yield text, read_part(line.record.get('split'))
        except ValueError as error:
            stop(line.say(error))


def hash_texts(texts, tokenizer, task):
    """(n,) uint64, sorted: the hashes that the records of these texts may have, whole or cut. task: a meta.json."""
    hashes = {text_hash(form) for text in texts for form in (text, cut_text(text, tokenizer, task)[1])}
    return np.array(sorted(hashes), DTYPES['index'])


# -----------------------------------------------------------------------------
# of extract.py: what the lines say


def store_split(dataset, name, source, labels, tokenizer, task):
    """writes held_out.bin to the first shard of a task if a line says that its text is held out, else removes it;
    prints the split line. Returns the number of hashes. Exits with a message if a split is no known word.

    The lines are those of labels (distil.labels.Labels or None), else of the file source. If none of them is held
    out, those of input.jsonl: the log of an LLM has no split.
    """
    corpus, folder = Path('data', dataset, 'input.jsonl'), Path('data', dataset, f'{name}-00')
    path = folder / 'held_out.bin'
    readers = [lambda: labels.log if labels else read_lines(source)]
    if corpus.is_file() and not corpus.samefile(source):
        readers.append(lambda: read_lines(corpus))
    for read in readers:
        hashes = hash_texts((text for text, part in read_parts(read()) if part == 'test'), tokenizer, task)
        if len(hashes):
            break
    try:
        if not len(hashes):
            path.unlink(missing_ok=True)                        # of an earlier run
            return 0
        with whole_file(path) as tmp:
            tmp.write_bytes(hashes.tobytes())
    except OSError as error:
        stop(f'cannot write to {folder}: {error.strerror}')
    counts, known = Counter(train=0, held_out=0, both=0), set(hashes.tolist())
    for text, part in read_parts(read()):
        both = part == 'train' and not known.isdisjoint(hash_texts([text], tokenizer, task).tolist())
        counts['held_out' if part == 'test' else 'both' if both else 'train'] += 1
    print(data_line('split', counts))
    if counts['both']:
        print(f'both: {counts["both"]} lines of the training part have a text of the test part, so it is held out')
    return len(hashes)


# -----------------------------------------------------------------------------
# of train.py: the texts of a file


def hold_out_file(path, shards):
    """holds out, in shards, each text of a file too: a .jsonl of texts or the log of an LLM, or one text per line.
    Exits with a message if the file cannot be read, or if none of its texts has a record."""
    tokenizer = Tokenizer.from_file(str(shards.folder / 'tokenizer.json'))
    try:
        if re.search(r'\.(jsonl|ndjson)(\.gz)?$', path.lower()):
            log = Log([path], prompt=prompt_text(shards.meta['prompt']))
            texts = {text for _, text in texts_of(log)}
            log.print_template()
        else:
            texts = {*map(clean, Path(path).read_bytes().decode('utf-8-sig', 'replace').split('\n'))} - {''}
    except (OSError, EOFError, zlib.error) as error:
        stop(f'{path} cannot be read: {getattr(error, "strerror", None) or error}')
    hashes = hash_texts(texts, tokenizer, shards.meta)
    n = int(np.isin(shards.hashes, hashes).sum())
    if not n:
        stop(f'{path}: none of its {len(texts)} texts is among the {len(shards)} records. A held-out text needs an '
             'answer too: extract it with the others')
    print(f'held out: {n} records have one of the {len(texts)} texts of {path}')
    shards.own_split = hashes if shards.own_split is None else np.union1d(shards.own_split, hashes)


# -----------------------------------------------------------------------------
# near duplicates


def simplify(text):
    """a text without case and punctuation."""
    return re.sub(r'[\W_]+', ' ', text.lower()).strip()


def count_near(trained, held_out):
    """number of the held-out texts that are trained on but for case and punctuation, with the same answer, or also but
    for the numbers in them, if these change no answer: of 3x - 5 they do. Both: lists of (text, answer)."""
    without_numbers = lambda text: simplify(re.sub(r'\d+([.,:]\d+)*', '0', text))
    known, answers = {(simplify(text), answer) for text, answer in trained}, {}
    for text, answer in trained:
        answers.setdefault(without_numbers(text), set()).add(answer)
    return sum((simplify(text), answer) in known or answers.get(without_numbers(text)) == {answer}
               for text, answer in held_out)


# -----------------------------------------------------------------------------
# of a student


def pack_split(own_split):
    """the hashes of Shards.own_split as a checkpoint keeps them: a tensor, or None."""
    return None if own_split is None else torch.from_numpy(own_split.view(np.int64))


def split_of(checkpoint):
    """the hashes of the texts that a student was trained without, (n,) uint64; None if it is the tenth."""
    packed = checkpoint.get('split')                            # older ones have none
    return None if packed is None else packed.cpu().numpy().view(np.uint64)


def describe_split(packed):
    """a split, as pack_split gives it, in a few words."""
    return 'a tenth' if packed is None else f'{len(packed)} hashes {text_hash(str(packed.tolist())):x}'
