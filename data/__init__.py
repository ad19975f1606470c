"""The file format between teacher and student: append-and-commit writer, memmap reader, split, batches.

    data/<dataset>/<name>-00/    one shard, little-endian, append-only
      input.bin    uint32    ids of each text, concatenated
      output.bin   uint16    the teacher's answers as output-vocabulary indices, concatenated
      logits.bin   float16   (steps, V) raw logit minus the row's maximum over V: fp16 is exact enough near 0
      stats.bin    float32   (steps, 2) that maximum, and logsumexp over all tokens (nan if not computed)
      places.bin   uint16    (steps, 8) only where answers have copied values: at a step at which a place of the text
                             may come (an index from V on), the likeliest ones, the answer's first: the character at
                             which the value begins or, at the second of its two steps, ends
      weights.bin  float16   (steps, 8) the log probability of each, -inf where there are fewer; at these steps
                             logits.bin has log probabilities, too, once the maximum of stats.bin is added
      index.bin    uint64    (records, 3) end offset in input.bin, end offset in output.bin, hash of the text
      held_out.bin uint64    hashes of the texts that people hold out (distil/split.py), if there are any
      meta.json              teacher, tokenizer hash, prompt, fields, output ids: what the output space needs;
                             bias: what is subtracted from the logits on reading; they are stored raw
      tokenizer.json         the teacher's tokenizer

A record exists if its row of index.bin exists. That row is written last, so a run that is killed loses at
most the batch it was writing. Offsets count elements, not bytes. A row without an answer is a text whose
answer was dropped; if a later row of its hash has an answer, that one counts.
"""
import fcntl
import json
import os
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from distil.places import MOST_PLACES, Source, point
from distil.space import OutputSpace, Outs

FORMAT = 1
DTYPES = {'input': np.dtype('<u4'), 'output': np.dtype('<u2'), 'logits': np.dtype('<f2'),
          'stats': np.dtype('<f4'), 'places': np.dtype('<u2'), 'weights': np.dtype('<f2'), 'index': np.dtype('<u8')}


def held_out(hashes, own_split=None):
    """True for the texts of the held-out split, which is never trained on: those whose hash is in own_split, or if
    that is None a tenth of all. It does not change when data grows, moves or is resumed."""
    hashes = np.asarray(hashes, np.uint64)
    return hashes % np.uint64(10) == 0 if own_split is None else np.isin(hashes, own_split)


def write_json(path, value):
    """writes value to path as JSON, whole or not at all."""
    tmp = path.with_suffix('.tmp')
    try:
        tmp.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding='utf-8')
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def read_meta(folder):
    """the dict of a shard's meta.json. ValueError if it is damaged."""
    try:
        return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{folder}/meta.json is damaged ({error}); restore it, or extract under another '
                         'name') from None


def answers_from(meta):
    """where the answers of a shard come from, by its meta.json: 'teacher', a model that ran here; 'score', given
    answers with that model's logits; 'server', a model behind a URL; 'labels', people or a log."""
    if 'server' in meta:
        return 'server'
    return {'labels': 'labels', True: 'score'}.get(meta.get('score'), 'teacher')


class Record(NamedTuple):
    """a text and its answer, of n tokens, as it is stored. An answer that was dropped has none."""
    hash: int           # of the text
    ids: object         # of the text
    outs: object        # (n,) output indices
    logits: object      # (n, V) raw
    lse: object         # (n,) logsumexp over all tokens; nan if not computed
    places: object = None  # (n, 8) and their weights (n, 8), see places.bin
    weights: object = None

    @classmethod
    def dropped(cls, hash_, V):
        return cls(hash_, [], [], np.zeros((0, V), np.float32), np.zeros(0, np.float32))


class Hashes:
    """a set of 64-bit hashes that takes 8 bytes per hash, far less than a set of Python."""

    def __init__(self, hashes=()):
        self.sorted, self.recent = np.unique(np.array(hashes, np.uint64)), set()

    def __len__(self):
        return len(self.sorted) + len(self.recent)

    def __contains__(self, hash_):
        i = np.searchsorted(self.sorted, np.uint64(hash_))
        return hash_ in self.recent or bool(i < len(self.sorted) and self.sorted[i] == hash_)

    def add(self, hash_):
        self.recent.add(hash_)
        if len(self.recent) == 1 << 18:
            both = np.concatenate((self.sorted, np.sort(np.array(list(self.recent), np.uint64))))
            both.sort(kind='stable')  # merges the two sorted runs; another sort would start from scratch
            self.sorted, self.recent = both[np.append(True, both[1:] != both[:-1])], set()


class Writer:
    """appends records to a shard. When it opens a shard, it cuts off what an interrupted run did not commit.

    folder: of the shard; V: size of the output vocabulary; has_places: its answers have copied values. n_records,
    n_answered, n_output: rows, those with an answer and the tokens of these; without: hashes of the texts that have no
    answer. BlockingIOError if another run writes to it.
    """

    def __init__(self, folder, V, has_places=False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.names = folder, kept_files(has_places)
        self.files = {name: open(folder / f'{name}.bin', 'ab', buffering=0) for name in self.names}
        fcntl.flock(self.files['index'], fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the file is closed
        index, (self.n_input, self.n_output) = read_index(folder, V), (0, 0)
        if len(index):
            self.n_input, self.n_output = map(int, index[-1, :2])
        answered = has_answer(index)
        self.n_records, self.n_answered = len(index), int(answered.sum())
        self.without = {*index[~answered, 2].tolist()} - {*index[answered, 2].tolist()}
        sizes = {'input': self.n_input, 'output': self.n_output, 'logits': self.n_output * V,
                 'stats': self.n_output * 2, 'index': index.size} | dict.fromkeys(
                     ('places', 'weights'), self.n_output * MOST_PLACES)
        for name, file in self.files.items():
            file.truncate(sizes[name] * DTYPES[name].itemsize)

    def append(self, records):
        """commits records: list of (hash, ids, outs (n,), raw logits (n, V), lse (n,)), and with copied values places
        and weights (n, 8). After an OSError none of them is stored."""
        parts, index = {name: [] for name in self.names}, []
        n_input, n_output = self.n_input, self.n_output
        records = [record for record in records if len(record[2]) or record[0] not in self.without]
        for hash_, ids, outs, logits, lse, *places in records:
            top = logits.max(axis=1)
            values = {'input': ids, 'output': outs, 'logits': logits - top[:, None],
                      'stats': np.stack((top, lse), axis=1)}
            if 'places' in parts and len(outs):
                values |= dict(zip(('places', 'weights'), places))
            for name, value in values.items():
                parts[name].append(np.asarray(value).astype(DTYPES[name]).tobytes())
            n_input, n_output = n_input + len(ids), n_output + len(outs)
            index.append((n_input, n_output, hash_))
        parts['index'] = [np.array(index, DTYPES['index']).tobytes()]
        for name, file in self.files.items():  # index is the last one
            view = memoryview(b''.join(parts[name]))
            while view:
                view = view[file.write(view):]
            if name != 'index':
                os.fsync(file.fileno())  # before the index: after a power cut it must not point to lost data
        self.n_input, self.n_output = n_input, n_output
        self.n_records += len(index)
        answered = {hash_ for hash_, _, outs, *_ in records if len(outs)}
        self.n_answered += sum(len(record[2]) > 0 for record in records)
        self.without = (self.without | {record[0] for record in records}) - answered

    def describe(self):
        """what the shard holds, for the message that ends a run."""
        dropped = f', and {len(self.without)} texts have no answer (--ask_again=True asks about them again)'
        return f'{self.n_answered} records are safe{dropped if self.without else ""}'

    def close(self):
        for file in self.files.values():
            file.close()


def kept_files(has_places):
    """the names of the files of a shard, index last."""
    return [name for name in DTYPES if has_places or name not in ('places', 'weights')]


def read_index(folder, V):
    """(records, 3) the rows of index.bin whose data the other files hold completely."""
    index = np.fromfile(folder / 'index.bin', DTYPES['index'])
    index = index[:len(index) // 3 * 3].reshape(-1, 3)
    names = kept_files((folder / 'places.bin').exists())
    sizes = {name: (folder / f'{name}.bin').stat().st_size // DTYPES[name].itemsize for name in names}
    steps = min(sizes['output'], sizes['logits'] // V, sizes['stats'] // 2,
                *(sizes[name] // MOST_PLACES for name in ('places', 'weights') if name in names))
    return index[(index[:, 0] <= sizes['input']) & (index[:, 1] <= steps)]


def has_answer(index):
    """(rows,) bool: False for the rows of read_index whose answer was dropped."""
    return np.diff(index[:, 1].astype(np.int64), prepend=0) > 0


def shard_folders(dataset, name, root='data'):
    return sorted(path.parent for path in (Path(root) / dataset).glob(f'{name}-[0-9][0-9]/meta.json'))


def stored_hashes(folders, meta, answered=False):
    """the Hashes of all texts in these shards, including those whose answer was dropped; answered: without these."""
    indices = [read_index(folder, len(meta['output_ids'])) for folder in folders]
    parts = [index[has_answer(index) | (not answered), 2] for index in indices]
    return Hashes(np.concatenate([np.empty(0, np.uint64), *parts]))


def first_answers(folder, meta, n):
    """list of the answers to the first n texts of a shard, (steps,) output indices each; empty if the answer
    was dropped."""
    ends = read_index(folder, len(meta['output_ids']))[:n, 1].astype(np.int64)
    if not len(ends):
        return []
    return np.split(np.fromfile(folder / 'output.bin', DTYPES['output'], ends[-1]), ends[:-1])


class Shards:
    """all records extracted for one task, memory-mapped. FileNotFoundError if the task has no records.
    ValueError if the shards do not belong together or have another format.

    metas: dict of each meta.json; meta: the first. hashes (N,). own_split: hashes of the texts that people hold
    out, or None. Record i is `ids(i)` and `answer(i)`.
    """

    def __init__(self, dataset, name, root='data'):
        folders = shard_folders(dataset, name, root)
        self.metas = [read_meta(folder) for folder in folders]
        self.shards, spans, hashes = [], [], []
        keys = 'output_ids', 'bias', 'fingerprint'
        for folder, meta in zip(folders, self.metas):
            matches = all(meta.get(key) == self.metas[0].get(key) for key in keys)
            if meta['format'] != FORMAT or not matches:
                raise ValueError(f'{folder} has another format, teacher, output vocabulary or calibration '
                                 f'than {folders[0]}; make it again, or choose another name')
            V = len(meta['output_ids'])
            index = read_index(folder, V)
            ends = index[:, :2].astype(np.int64)
            starts = np.concatenate((np.zeros((1, 2), np.int64), ends))[:-1]
            answered = has_answer(index)
            if not answered.any():
                continue
            spans.append(np.column_stack((np.full(len(index), len(self.shards)), starts, ends))[answered])
            hashes.append(index[answered, 2])
            n_input, n_output = map(int, ends[-1])
            shapes = {'input': (n_input,), 'output': (n_output,), 'logits': (n_output, V),
                      'stats': (n_output, 2)}
            if (folder / 'places.bin').exists():
                shapes |= dict.fromkeys(('places', 'weights'), (n_output, MOST_PLACES))
            self.shards.append({key: np.memmap(folder / f'{key}.bin', DTYPES[key], 'r', shape=shape)
                                for key, shape in shapes.items()})
        if not hashes:
            raise FileNotFoundError(f'data/{dataset} has no records extracted for {name!r}')
        self.folder, self.meta, self.hashes = folders[0], self.metas[0], np.concatenate(hashes)
        self.spans = np.concatenate(spans)  # (N, 5) shard, input start, output start, input end, output end
        named = [np.fromfile(path, DTYPES['index']) for folder in folders if (path := folder / 'held_out.bin').exists()]
        self.own_split = np.unique(np.concatenate(named)) if named else None
        self.encoded = {}  # {record: the ids of a student's encoder}, see reader.encode_records
        self.read = {}     # {record: the tokens of its answer that a student reads}, see steps
        self.pages = {}    # {record: the characters at which these tokens begin, and end}, if values are copied
        self.has_places = 'places' in self.shards[0]

    def __len__(self):
        return len(self.spans)

    def ids(self, i):
        """(n,) ids of the text of record i."""
        shard, start, _, stop, _ = self.spans[i]
        return self.shards[shard]['input'][start:stop]

    def outs(self, i):
        """the answer of record i as a list of output indices, space.Outs if values are copied."""
        outs = self.answer(i).tolist()
        if not self.has_places:
            return outs
        space = self.task_space
        return with_spans(space, space.tokenizer.decode(self.ids(i).tolist()), outs, self.answer(i, 'places'))

    def answer(self, i, part='output'):
        """of the answer of record i: its output indices (n,), or, if part is 'logits', its raw logits minus
        their maximum (n, V), or, if part is 'stats', its row of stats.bin per token (n, 2), or (n, 8) of places.bin
        or weights.bin."""
        shard, _, start, _, stop = self.spans[i]
        return self.shards[shard][part][start:stop]

    @cached_property
    def space(self):
        """the OutputSpace with the bias of a calibrated teacher; None if there is no bias to subtract."""
        if not self.meta.get('bias'):
            return None
        return self.open_space()

    @cached_property
    def task_space(self):
        """the OutputSpace of the task, opened once."""
        return self.space or self.open_space()

    def open_space(self):
        """the OutputSpace of the task."""
        return OutputSpace.from_task(Tokenizer.from_file(str(self.folder / 'tokenizer.json')), self.meta)

    def logits(self, i):
        """(n, V) float32: the teacher's logits up to a constant per row, with its bias subtracted."""
        logits = self.answer(i, 'logits').astype(np.float32)
        if self.space:
            logits -= self.space.bias[self.space.states_before(self.answer(i).tolist())].numpy()
        return logits

    def split(self):
        """(numbers of the records to train on, numbers of the held-out records)."""
        is_held_out = held_out(self.hashes, self.own_split)
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def is_odd(self, rows):
        """(n,) bool, about half of the held-out records `rows`: the confidence is tested on them, and fitted on the
        others. True for all if it would be for none."""
        # the two parts of an own split may take turns in the file, so its records are told apart by their hashes
        odd = (np.asarray(rows) if self.own_split is None else self.hashes[rows]) % 2 == 1
        return odd if odd.any() else ~odd

    def batch(self, rows):
        """(text, answer, targets, teacher_logits) of the records `rows`, B texts and their answers, padded on the
        right with -1. text (B, T) ids; answer (B, T) output indices: the start token V, then all but the last;
        targets, the same shape: what follows each of them; teacher_logits (n, V): see logits(), a row per
        target, in their order. With copied values these are the decisions alone, a place is V + 1 + the number of the
        student's token, and teacher_logits are (n, V + 1 + T)."""
        texts = [self.encoded[i] if i in self.encoded else self.ids(i) for i in map(int, rows)]
        outs, V = [self.answer(i) for i in rows], len(self.meta['output_ids'])
        read, logits = outs, np.concatenate([self.logits(i) for i in rows])
        if self.has_places:
            pointed = [point(self, i, max(map(len, texts))) for i in map(int, rows)]
            read, outs, logits = [part for part, *_ in pointed], [part for _, part, _ in pointed], np.concatenate(
                [part for *_, part in pointed])
        padded = [pad(texts), pad([[V, *o[:-1]] for o in read]), pad(outs), logits]
        return tuple(map(torch.from_numpy, padded))

    def steps(self, i):
        """(n,) which tokens of the answer of record i a student reads: all, or with copied values the decisions."""
        if i not in self.read:
            outs = self.answer(i).tolist()
            states = self.task_space.states_before(outs) if self.has_places else []
            self.read[i] = np.flatnonzero([self.task_space.decides[state] for state in states]
                                          if states else np.ones(len(outs)))
        return self.read[i]


def with_spans(space, text, outs, places):
    """the Outs of an answer to a text, with its copied values. outs: output indices; places (n, 8): see
    data/__init__.py."""
    source, steps = Source(text, space), [n for n, out in enumerate(outs) if out >= space.V]
    states, spans = space.states_before(outs), []
    for first, last in zip(steps[::2], steps[1::2]):
        start, end = int(places[first][0]), int(places[last][0])
        spans.append((start, end, source.value(space.copy_at[states[first]], start, end)))
    return Outs(outs, spans)


def pad(rows):
    """rows (lists of numbers) -> (rows, longest) int64, with -1 on the right."""
    padded = np.full((len(rows), max(map(len, rows))), -1)
    for b, row in enumerate(rows):
        padded[b, :len(row)] = row
    return padded


def batches(lengths, batch_size, seed, epoch, window=16):
    """the batches of an epoch, a pure function of the arguments: arrays of positions in lengths (n,). The
    last batch of a window may be short.

    Records of similar length share a batch, so that padding is small: a random order is cut into windows of
    16 batches, each window is sorted by length and cut into batches, and the batches are shuffled.
    """
    rng = np.random.default_rng((seed, epoch))
    order, size, cut = rng.permutation(len(lengths)), window * batch_size, []
    for start in range(0, len(order), size):
        part = order[start:start + size]
        part = part[np.argsort(lengths[part], kind='stable')]
        cut += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]
