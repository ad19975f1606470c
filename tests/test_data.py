"""The file format: nothing that is committed is lost; the split and the batches do not change."""
import math
import os

import numpy as np
import pytest

import data
from tests.conftest import make_shards, random_records


def test_hashes_behaves_like_a_set():
    rng = np.random.default_rng(0)
    first, more = (rng.integers(0, 1 << 64, 300000, np.uint64).tolist() for _ in range(2))
    hashes, expected = data.Hashes(first), set(first) | set(more)
    for h in more:
        hashes.add(h)
    assert len(hashes) == len(expected) and len(hashes.sorted) > 500000  # most of the recent ones are merged
    assert all(h in hashes for h in first[:1000] + more[-1000:])
    assert not any(h in hashes for h in rng.integers(0, 1 << 64, 1000, np.uint64).tolist())


def test_fp16_below_the_maximum_keeps_every_decision(tmp_path):
    records = list(random_records(50, 500, offset=25))  # raw logits near 25, where fp16 is 0.016 apart
    for r in records:
        r[3][:, 7] = r[3].max(1) + 0.004  # a close decision
    assert any((r[3].astype(np.float16).argmax(1) != 7).any() for r in records)  # plain fp16 loses some
    shards = make_shards(tmp_path, records, 500)
    for i, (_, ids, outs, logits, lse) in enumerate(records):
        assert shards.ids(i).tolist() == ids.tolist() and shards.answer(i).tolist() == outs.tolist()
        assert (shards.answer(i, 'logits').argmax(1) == 7).all()
        np.testing.assert_array_equal(shards.answer(i, 'stats'), np.stack((logits.max(1), lse), 1))


def test_the_writer_cuts_off_what_was_not_committed(tmp_path):
    records = list(random_records(9, 8))
    make_shards(tmp_path, records[:6], 8)
    for name in data.kept_files(has_places=False):
        with open(tmp_path / f'd/t-00/{name}.bin', 'ab') as file:
            file.write(b'x' * 13)
    writer = data.Writer(tmp_path / 'd/t-00', 8)
    assert writer.n_records == 6
    with pytest.raises(BlockingIOError):
        data.Writer(tmp_path / 'd/t-00', 8)
    writer.append(records[6:])
    writer.close()
    shards = data.Shards('d', 't', tmp_path)
    assert [shards.answer(i).tolist() for i in range(9)] == [r[2].tolist() for r in records]
    os.truncate(tmp_path / 'd/t-00/logits.bin', 100)  # a file lost its end, and so its last records
    assert len(data.read_index(tmp_path / 'd/t-00', 8)) < 9


def test_a_dropped_answer_is_kept_apart_and_a_later_one_counts(tmp_path):
    records = list(random_records(6, 8))
    empty = [(hash_, [], [], np.zeros((0, 8), np.float32), np.zeros(0, np.float32)) for hash_, *_ in records]
    make_shards(tmp_path, [records[0], *empty[1:5]], 8)
    folder, meta = tmp_path / 'd/t-00', {'output_ids': range(8)}
    writer = data.Writer(folder, 8)
    assert (writer.n_records, writer.n_answered, len(writer.without)) == (5, 1, 4)
    assert writer.describe() == ('1 records are safe, and 4 texts have no answer (--ask_again=True asks about them '
                                 'again)')
    assert len(data.stored_hashes([folder], meta)) == 5
    assert data.stored_hashes([folder], meta, answered=True).sorted.tolist() == [records[0][0]]
    writer.append([records[2], empty[3], empty[5]])         # answered now; dropped again, which adds no row; new
    writer.append([empty[3]])
    assert (writer.n_records, writer.n_answered, len(writer.without)) == (7, 2, 4)
    writer.close()
    assert data.Writer(folder, 8).describe() == writer.describe()
    shards = data.Shards('d', 't', tmp_path)
    assert shards.hashes.tolist() == [records[0][0], records[2][0]]
    assert shards.answer(1).tolist() == records[2][2].tolist() and shards.ids(1).tolist() == records[2][1].tolist()
    assert sorted(np.concatenate(shards.split())) == [0, 1] and len(data.stored_hashes([folder], meta)) == 6
    assert [len(outs) for outs in data.first_answers(folder, meta, 9)] == [len(records[0][2]), 0, 0, 0, 0,
                                                                           len(records[2][2]), 0]


def test_the_split_depends_on_the_text_and_not_on_its_place(tmp_path):
    records = list(random_records(300, 4))
    one, two = make_shards(tmp_path / 'a', records, 4), make_shards(tmp_path / 'b', records[::-1], 4,
                                                                    ('t-00', 't-01'))
    held = [{int(s.hashes[i]) for i in s.split()[1]} for s in (one, two)]
    assert held[0] == held[1] and 10 < len(held[0]) < 60
    assert not held[0] & {int(one.hashes[i]) for i in one.split()[0]}


def test_batches_align_inputs_targets_and_logits(tmp_path):
    records = list(random_records(5, 8))
    text, answer, targets, teacher_logits = make_shards(tmp_path, records, 8).batch([3, 0])
    row = 0
    for b, (_, ids, outs, logits, _) in enumerate([records[3], records[0]]):
        n, m = len(ids), len(outs)
        assert text[b].tolist() == [*ids, *[-1] * (text.size(1) - n)]
        assert answer[b].tolist() == [8, *outs[:-1], *[-1] * (answer.size(1) - m)]  # 8: the start token
        assert targets[b].tolist() == [*outs, *[-1] * (answer.size(1) - m)]
        np.testing.assert_allclose(teacher_logits[row:row + m], logits - logits.max(1, keepdims=True),
                                   atol=0.01)
        row += m
    assert row == len(teacher_logits) == (targets >= 0).sum()


def test_an_epoch_is_a_fixed_order_of_batches_of_similar_length():
    lengths = np.random.default_rng(0).integers(20, 64, 1000)
    epochs = [data.batches(lengths, 32, 1, epoch) for epoch in (0, 1)]
    for order in epochs:
        assert sorted(np.concatenate(order)) == list(range(1000)) and len(order) == math.ceil(1000 / 32)
        assert lengths.sum() / sum(lengths[b].max() * len(b) for b in order) > 0.93
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    assert all(np.array_equal(a, b) for a, b in zip(epochs[1], data.batches(lengths, 32, 1, 1)))
    firsts = [lengths[data.batches(lengths, 32, seed, 0)[0]].mean()
              for seed in range(50)]  # the first batch is of no particular length
    assert abs(np.mean(firsts) - lengths.mean()) < 5
