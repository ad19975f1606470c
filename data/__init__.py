"""The file format between teacher and student: an append-and-commit writer, a memmap reader, the split, the batches.

    data/<dataset>/<name>-00/    one shard, little-endian, append-only
      input.bin    uint32    ids of each text, concatenated
      output.bin   uint16    the teacher's answers as output-vocabulary indices, concatenated
      logits.bin   float16   (steps, V) raw logit minus the row's maximum over V: fp16 is exact enough near 0
      stats.bin    float32   (steps, 2) that maximum, and logsumexp over the full vocabulary (nan where not asked for)
      index.bin    uint64    (records, 3) end offset in input.bin, end offset in output.bin, hash of the text
      meta.json              teacher, tokenizer hash, prompt, fields, output ids: enough to rebuild the output space
      tokenizer.json         the teacher's tokenizer

A record exists when its row of index.bin does, and that row is written last: a run killed anywhere loses at most the
batch in flight. Offsets count elements, not bytes.
"""
import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

FORMAT = 1
DTYPES = {'input': np.dtype('<u4'), 'output': np.dtype('<u2'), 'logits': np.dtype('<f2'), 'stats': np.dtype('<f4'),
          'index': np.dtype('<u8')}


def clean(text):
    """the one form of a text that is hashed, labelled, trained on and sampled from: runs of whitespace are one space."""
    return ' '.join(text.split())


def text_hash(text):
    """64-bit hash of a cleaned text, the same on every machine. UnicodeEncodeError on a lone surrogate."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def held_out(hashes):
    """True for the tenth of all texts that is never trained on; it stays put when data grows, moves or resumes."""
    return np.asarray(hashes, np.uint64) % np.uint64(10) == 0


def tokenizer_hash(tokenizer):
    """hash of what a tokenizers.Tokenizer does: its vocabulary, and how it cuts a probe text."""
    probe = tokenizer.encode('{"a": "b c", "n": -12}\n```json\n  été 日本 😀 <b> I\'m', add_special_tokens=False).ids
    vocab = sorted((i, t) for t, i in tokenizer.get_vocab().items())
    return hashlib.blake2b(repr((vocab, probe)).encode('utf-8', 'backslashreplace'), digest_size=8).hexdigest()


def write_json(path, value):
    """whole or not at all."""
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding='utf-8')
    os.replace(tmp, path)


class Writer:
    """appends records to a shard; opening it cuts off whatever an interrupted run left uncommitted.

    hashes: set of the texts already there. BlockingIOError where another run holds the shard.
    """

    def __init__(self, folder, V):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(folder / f'{name}.bin', 'ab', buffering=0) for name in DTYPES}
        fcntl.flock(self.files['index'], fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
        index, (self.n_input, self.n_output) = read_index(folder, V), (0, 0)
        if len(index):
            self.n_input, self.n_output = map(int, index[-1, :2])
        self.hashes = set(index[:, 2].tolist())
        sizes = {'input': self.n_input, 'output': self.n_output, 'logits': self.n_output * V, 'stats': self.n_output * 2,
                 'index': index.size}
        for name, file in self.files.items():
            file.truncate(sizes[name] * DTYPES[name].itemsize)

    def append(self, records):
        """commits records: list of (hash, ids, outs (n,), logits (n, V) raw, lse (n,)). OSError leaves none of them."""
        parts, index = {name: [] for name in DTYPES}, []
        n_input, n_output = self.n_input, self.n_output
        for hash_, ids, outs, logits, lse in records:
            top = logits.max(axis=1)
            values = {'input': ids, 'output': outs, 'logits': logits - top[:, None], 'stats': np.stack((top, lse), axis=1)}
            for name, value in values.items():
                parts[name].append(np.asarray(value).astype(DTYPES[name]).tobytes())
            n_input, n_output = n_input + len(ids), n_output + len(outs)
            index.append((n_input, n_output, hash_))
        parts['index'] = [np.array(index, DTYPES['index']).tobytes()]
        for name, file in self.files.items():  # index is the last of them
            view = memoryview(b''.join(parts[name]))
            while view:
                view = view[file.write(view):]
            if name != 'index':
                os.fsync(file.fileno())  # the index must never promise what a power cut can take
        self.n_input, self.n_output = n_input, n_output
        self.hashes.update(row[2] for row in index)

    def close(self):
        for file in self.files.values():
            file.close()


def read_index(folder, V):
    """(records, 3) rows of index.bin that the other files can keep."""
    index = np.fromfile(folder / 'index.bin', DTYPES['index'])
    index = index[:len(index) // 3 * 3].reshape(-1, 3)
    have = {name: (folder / f'{name}.bin').stat().st_size // DTYPES[name].itemsize for name in DTYPES}
    steps = min(have['output'], have['logits'] // V, have['stats'] // 2)
    return index[(index[:, 0] <= have['input']) & (index[:, 1] <= steps)]


class Shards:
    """all records extracted for one task, memory-mapped. FileNotFoundError where there are none, ValueError where the
    shards disagree or have another format.

    meta: dict of the first meta.json. hashes (N,). Record i is `ids(i)` and `answer(i)`.
    """

    def __init__(self, dataset, name, root='data'):
        folders = sorted(p.parent for p in (Path(root) / dataset).glob(f'{name}-[0-9][0-9]/meta.json'))
        metas = [json.loads((folder / 'meta.json').read_text(encoding='utf-8')) for folder in folders]
        for folder, meta in zip(folders, metas):
            if meta['format'] != FORMAT or meta['output_ids'] != metas[0]['output_ids']:
                raise ValueError(f'{folder} has another format or output vocabulary than {folders[0]}; extract it again')
        self.shards, spans = [], []
        for n, (folder, meta) in enumerate(zip(folders, metas)):
            V = len(meta['output_ids'])
            index = read_index(folder, V)
            if not len(index):
                continue
            shapes = {'input': (), 'output': (), 'logits': (V,), 'stats': (2,)}  # of one element
            self.shards.append({key: np.memmap(folder / f'{key}.bin', DTYPES[key], 'r', shape=(int(index[-1, 0 if key == 'input' else 1]), *shape))
                                for key, shape in shapes.items()})
            ends = np.concatenate((np.zeros((1, 2), np.int64), index[:, :2].astype(np.int64)))
            spans += [(len(self.shards) - 1, *ends[i], *ends[i + 1], index[i, 2]) for i in range(len(index))]
        if not spans:
            raise FileNotFoundError(f'data/{dataset} has no records extracted for {name!r}')
        self.folder, self.meta = folders[0], metas[0]
        self.hashes = np.array([s[5] for s in spans], np.uint64)
        self.spans = np.array([s[:5] for s in spans], np.int64)  # shard, input start, output start, input end, output end

    def __len__(self):
        return len(self.spans)

    def ids(self, i):
        """(n,) ids of the text."""
        shard, start, _, stop, _ = self.spans[i]
        return self.shards[shard]['input'][start:stop]

    def answer(self, i, what='output'):
        """(n,) output indices of the teacher's answer; (n, V) its 'logits' below their maximum; (n, 2) its 'stats'."""
        shard, _, start, _, stop = self.spans[i]
        return self.shards[shard][what][start:stop]

    def split(self):
        """record numbers to train on, record numbers held out."""
        held = held_out(self.hashes)
        return np.flatnonzero(~held), np.flatnonzero(held)

    def batch(self, rows, start_id):
        """idx (B, T) ids: text, start, answer without its last token. targets (B, T) output indices, -1 on the text and
        the padding. teacher_logits (n, V) float32, one row per target >= 0, in their order."""
        texts, outs = [self.ids(i) for i in rows], [self.answer(i) for i in rows]
        T = max(len(t) + len(o) for t, o in zip(texts, outs))
        output_ids = np.array(self.meta['output_ids'])
        idx, targets = np.full((len(rows), T), start_id), np.full((len(rows), T), -1)
        for b, (t, o) in enumerate(zip(texts, outs)):
            idx[b, :len(t)] = t
            idx[b, len(t) + 1:len(t) + len(o)] = output_ids[o[:-1]]
            targets[b, len(t):len(t) + len(o)] = o
        logits = np.concatenate([self.answer(i, 'logits') for i in rows]).astype(np.float32)
        return torch.from_numpy(idx), torch.from_numpy(targets), torch.from_numpy(logits)


def batches(n, batch_size, seed, epoch):
    """the order of an epoch, a pure function of its arguments: arrays of positions below n, the last one may be short."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return [order[i:i + batch_size] for i in range(0, n, batch_size)]
