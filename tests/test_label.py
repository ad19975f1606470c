"""tools/label.py and tools/tables.py: a student over tables; a row is neither lost nor doubled."""
import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distil.labeler import Labeler
from distil.schema import Schema
from tests.conftest import clone_task, one_line, run
from tools.label import Worker
from tools.tables import answer_fields, arrow_type, cut_file, find_files, fit, read_piece, schema_of

FULL = Schema({'type': 'object', 'properties': {
    'tone': {'enum': ['calm', 'angry', None]}, 'n': {'enum': [1, 2]}, 'mixed': {'enum': [1, 'a', True]},
    'labels': {'type': 'array', 'items': {'enum': ['bug', 'ui']}},
    'who': {'type': 'object', 'required': ['name'],
            'properties': {'name': {'type': ['string', 'null']}, 'age': {'type': 'integer'}, 'x': {'type': 'number'}}},
    'lines': {'type': 'array', 'maxItems': 2, 'items': {'type': 'object', 'properties': {'ok': {'type': 'boolean'}}}}}})


def write_tables(folder, n=250):
    """the same rows in three forms, some of them odd. Returns [(id, text)]."""
    rng = random.Random(1)
    texts = [' '.join(rng.choices(['the cat', 'said, "hello"', 'to\nmy', 'friend 😀', '日本', 'a;b'], k=4))
             for _ in range(n)]
    texts[3], texts[4] = '', '"'
    ids = list(range(n))
    table = pa.table({'id': ids, 'body': texts, 'x': [i / 8 for i in ids], 'tags': [['a', str(i)] for i in ids]})
    pq.write_table(table, folder / 'rows.parquet', row_group_size=70)
    with open(folder / 'rows.jsonl', 'w', encoding='utf-8') as file:
        file.writelines(json.dumps({'id': i, 'body': text, 'x': i / 8, 'tags': ['a', str(i)]}) + '\n'
                        for i, text in zip(ids, texts))
    quote = lambda text: '"' + text.replace('"', '""') + '"'
    content = '\ufeffid,body\r\n' + ''.join(f'{i},{quote(text)}\r\n' for i, text in zip(ids, texts))
    (folder / 'rows.csv').write_bytes(content.encode())
    (folder / 'packed.csv.gz').write_bytes(gzip.compress(content.rstrip('\r\n').encode()))  # no line break at its end
    return list(zip(ids, texts))


@pytest.mark.parametrize('n', [1, 7, 70, 249, 250, 251, 1000])
def test_the_pieces_of_a_table_are_its_rows(tmp_path, n):
    rows = write_tables(tmp_path)
    for name in ('rows.parquet', 'rows.csv', 'rows.jsonl', 'packed.csv.gz'):
        fs, (path,) = find_files(str(tmp_path / name))
        pieces = cut_file(fs, path, n)
        assert (len({piece.name for piece in pieces}) == len(pieces)
                and sorted(pieces, key=lambda piece: piece.name) == pieces)
        tables = [table for piece in pieces for table, _ in read_piece(fs, piece)]
        assert all(table.schema == schema_of(fs, pieces[0]) for table in tables)
        found = [(int(row['id']), row['body']) for table in tables for row in table.to_pylist()]
        assert found == rows, name
        if name != 'packed.csv.gz':
            assert max(sum(len(table) for table, _ in read_piece(fs, piece)) for piece in pieces) <= n
    assert tables[0].schema.types == [pa.string(), pa.string()]  # CSV is text


def test_lines_that_do_not_fit(tmp_path):
    path = tmp_path / 'odd.jsonl'
    path.write_text('{"body": "a", "n": 1, "any": [1]}\n\n[1]\nno\n{"body": "b", "n": null, "any": "x"}')
    fs, (found,) = find_files(str(path))
    (piece,) = cut_file(fs, found, 100)
    (table, broken), = read_piece(fs, piece)
    assert table.to_pylist() == [{'body': 'a', 'n': 1, 'any': '[1]'}, {'body': None, 'n': None, 'any': None},
                                 {'body': None, 'n': None, 'any': None}, {'body': 'b', 'n': None, 'any': '"x"'}]
    assert broken == {1: 'no JSON object', 2: 'no JSON object'}
    path.write_text('{"body": "a", "n": 1}\n' * 1100 + '{"body": "b", "n": "two"}\n')
    (piece,) = cut_file(fs, found, 2000)
    with pytest.raises(ValueError, match='n is "two" in line 1101, where others are int64'):
        list(read_piece(fs, piece))
    (tmp_path / 'wide.csv').write_text('a,b\n1,2,3\n')
    (tmp_path / 'twice.csv').write_text('a,a\n1,2\n')
    (wide,) = cut_file(fs, str(tmp_path / 'wide.csv'), 9)
    with pytest.raises(ValueError, match='record 1 has 3 values for 2 columns'):
        list(read_piece(fs, wide))
    with pytest.raises(ValueError, match='does not name each column once'):
        cut_file(fs, str(tmp_path / 'twice.csv'), 9)


def test_a_large_row_group_is_read_in_small_parts(tmp_path):
    path, wide = str(tmp_path / 'wide.parquet'), [os.urandom(2000).hex() for _ in range(10_000)]  # 40 MB
    pq.write_table(pa.table({'body': ['a text'] * len(wide), 'wide': wide}), path)
    fs, (path,) = find_files(path)
    before, most, n = pa.total_allocated_bytes(), 0, 0
    for table, _ in read_piece(fs, cut_file(fs, path, 5000)[1]):
        most, n = max(most, pa.total_allocated_bytes() - before), n + len(table)
    assert n == 5000 and most < 20e6


def test_files_are_found(tmp_path):
    write_tables(tmp_path)
    (tmp_path / 'deep').mkdir()
    os.link(tmp_path / 'rows.csv', tmp_path / 'deep/more.tsv')
    (tmp_path / '_done.csv').write_text('x')
    names = lambda place: [Path(path).name for path in find_files(place)[1]]
    assert names(str(tmp_path)) == ['more.tsv', 'packed.csv.gz', 'rows.csv', 'rows.jsonl', 'rows.parquet']
    assert names(f'{tmp_path}/rows.*') == ['rows.csv', 'rows.jsonl', 'rows.parquet']
    assert names(f'file://{tmp_path}/rows.p*') == ['rows.parquet'] == names(f'file://{tmp_path}/rows.parquet')
    assert names(f'file://{tmp_path}/deep') == ['more.tsv']
    for wrong in ('nowhere.csv', 'no*.csv', 'file:///no/where'):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            find_files(wrong)
    (tmp_path / 'deep/more.tsv').rename(tmp_path / 'deep/notes.txt')
    with pytest.raises(ValueError, match='has no table: a name ends in .parquet'):
        find_files(str(tmp_path / 'deep'))


def test_answers_have_the_types_of_their_schema():
    fields = answer_fields(FULL, False, 0.5, 'new_')
    assert dict(zip(fields.names, fields.types)) == {
        'new_tone': pa.string(), 'new_n': pa.int64(), 'new_mixed': pa.string(), 'new_labels': pa.list_(pa.string()),
        'new_who': pa.struct([('name', pa.string()), ('age', pa.int64()), ('x', pa.float64())]),
        'new_lines': pa.list_(pa.struct([('ok', pa.bool_())])),
        '_defer': pa.bool_(), '_teacher': pa.bool_(), '_error': pa.string()}
    kind = arrow_type({'enum': [1, 'a', None]})
    assert [fit(value, kind) for value in (1, 'a', None)] == ['1', 'a', None]
    assert fit({'name': 'x'}, fields.field('new_who').type) == {'name': 'x', 'age': None, 'x': None}


def label(root, folder, *args, **more):
    return run(root, 'tools/label.py', '--name=toy', f'--input={folder}', f'--output={folder}/out', '--column=body',
               *args, **more)


def test_what_is_no_table_ends_with_a_sentence(project, tmp_path):
    pytest.importorskip('ray')
    write_tables(tmp_path)
    assert 'no task or no table' in one_line(run(project, 'tools/label.py'))
    assert 'does not exist' in one_line(
        run(project, 'tools/label.py', '--name=toy', '--input=nowhere.csv', '--output=x'))
    done = run(project, 'tools/label.py', '--name=toy', f'--input={tmp_path}/rows.csv', f'--output={tmp_path}/out',
               '--column=bdy')
    assert "it has no column 'bdy'; did you mean 'body'?" in done.stderr and done.returncode == 1
    done = run(project, 'tools/label.py', '--name=toy', f'--input={tmp_path}/rows.parquet',
               f'--output={tmp_path}/out', '--column=x')
    assert "its column 'x' is double, not text" in done.stderr and done.returncode == 1
    table = pa.table({'body': ['a'], 'tone': ['x']})
    pq.write_table(table, tmp_path / 'tone.parquet')
    done = run(project, 'tools/label.py', '--name=toy', f'--input={tmp_path}/tone.parquet',
               f'--output={tmp_path}/out', '--column=body')
    assert "it has a column 'tone' already" in done.stderr and '--prefix=' in done.stderr
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/mine.txt').write_text('x')
    done = run(project, 'tools/label.py', '--name=toy', f'--input={tmp_path}/rows.csv', f'--output={tmp_path}/full',
               '--column=body')
    assert 'is not empty and holds mine.txt' in one_line(done) and (tmp_path / 'full/mine.txt').read_text() == 'x'


def test_tables_in_a_bucket_are_read_and_answered_in_a_bucket(project, tmp_path, monkeypatch):
    moto, boto3 = pytest.importorskip('moto.server'), pytest.importorskip('boto3')  # a server of S3, for tests
    for key, value in (('AWS_ACCESS_KEY_ID', 'a'), ('AWS_SECRET_ACCESS_KEY', 'b'), ('AWS_DEFAULT_REGION', 'us-east-1')):
        monkeypatch.setenv(key, value)
    server = moto.ThreadedMotoServer('127.0.0.1', port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings, rows = f'?endpoint_override={host}:{port}&scheme=http', write_tables(tmp_path)
        bucket = boto3.resource('s3', endpoint_url=f'http://{host}:{port}').create_bucket(Bucket='texts')
        for key in ('2025/rows.csv', '2026/rows.csv', '2026/rows.parquet', '2026/packed.csv.gz', '2026/notes.txt'):
            bucket.upload_file(str(tmp_path / key[5:]) if 'notes' not in key else __file__, key)
        names = lambda place: find_files(f's3://texts/{place}{settings}')[1]
        assert names('2026') == names('2026/*') == [
            'texts/2026/packed.csv.gz', 'texts/2026/rows.csv', 'texts/2026/rows.parquet']
        assert (names('*/rows.c*') == ['texts/2025/rows.csv', 'texts/2026/rows.csv']
                and names('2026/rows.csv') == ['texts/2026/rows.csv'])
        for wrong in ('2027', '2027/*.csv'):
            with pytest.raises(FileNotFoundError, match='does not exist'):
                names(wrong)
        options = {'device': 'cpu', 'confidence': False, 'min_confidence': 0.0}
        worker = Worker(str(project / 'out/toy'), options, f's3://texts/answers{settings}', 'body', '')
        fs, paths = find_files(f's3://texts/2026{settings}')
        for piece in (piece for path in paths for piece in cut_file(fs, path, 100)):
            assert worker({'item': [(piece, fs)]})['failed'] == ['']
        expected = Labeler(project / 'out/toy', 'cpu', confidence=False)([text for _, text in rows])
        for start in ('packed', 'rows'):
            found = [row for path in names('answers') if path.startswith(f'texts/answers/{start}')
                     for row in pq.read_table(path, filesystem=fs).to_pylist()]
            assert len(found) == len(rows) * (2 if start == 'rows' else 1)
            assert all(row['tone'] == expected[int(row['id'])].get('tone') for row in found)
        done = run(project, 'tools/label.py', '--name=toy', f'--input=s3://a:b@texts/2026{settings}', '--column=body',
                   f'--output=s3://a:b@nowhere/out{settings}')
        assert 'cannot be written: Bucket' in one_line(done)
    finally:
        server.stop()


@pytest.mark.slow
def test_tables_are_answered_as_by_a_labeler(project, tmp_path):
    pytest.importorskip('ray')
    folder = tmp_path / 'in'
    folder.mkdir()
    rows = write_tables(folder)
    (folder / 'torn.parquet').write_bytes((folder / 'rows.parquet').read_bytes()[:900])
    done = label(project, folder, '--rows=60', '--confidence=True', f'--output={tmp_path}/out')
    assert (done.returncode == 1 and 'torn.parquet' in done.stderr
            and 'label rows=1000 errors=4' in done.stdout), done.stderr
    expected = Labeler(project / 'out/toy', 'cpu')([text for _, text in rows])
    names = sorted(path.name for path in (tmp_path / 'out').glob('*.parquet'))
    assert all(pq.ParquetFile(tmp_path / 'out' / name).metadata.num_row_groups == 1 for name in names)
    for start, kind in (('packed', str), ('rows', int)):
        found = [row for name in names if name.startswith(start)
                 for row in pq.read_table(tmp_path / 'out' / name).to_pylist()]
        assert len(found) == len(rows) * (1 if start == 'packed' else 3)
        for row in found:
            record = expected[int(row['id'])]
            assert row['body'] == rows[int(row['id'])][1] and row['_error'] == record.get('error')
            assert {name: row[name] for name in ('tone', 'spam')} == {
                name: record.get(name) for name in ('tone', 'spam')}
            if 'error' not in record:
                assert {path: row[f'_confidence_{path}'] for path in ('tone', 'spam')} == pytest.approx(
                    record['_confidence'], abs=1e-4)
    types = [pq.read_schema(tmp_path / 'out' / name).types[:4] for name in names]
    assert types.count([pa.int64(), pa.string(), pa.float64(), pa.list_(pa.string())]) == 7  # of Parquet, as they were
    before = {name: (tmp_path / 'out' / name).stat().st_mtime_ns for name in names}
    done = label(project, folder, '--rows=60', '--confidence=True', f'--output={tmp_path}/out')
    assert 'pieces are answered already' in done.stdout and 'label rows=1000' in done.stdout  # nothing is written twice
    assert before == {name: (tmp_path / 'out' / name).stat().st_mtime_ns for name in names}
    done = label(project, folder, '--rows=60', f'--output={tmp_path}/out')
    assert done.returncode == 1 and 'holds answers of another confidence' in done.stderr


def workers_in(folder):
    """process ids of the processes of Ray that answer for a program that was started in this folder."""
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if b'ray::MapWorker' in (path / 'cmdline').read_bytes() and os.readlink(path / 'cwd') == str(folder):
                found.append(int(path.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize('kills', [1])
def test_a_killed_run_goes_on_and_no_row_is_lost_or_doubled(project, tmp_path, kills):
    pytest.importorskip('ray')
    root = clone_task(project, tmp_path, 'out')
    (tmp_path / 'in').mkdir()
    rows, rng = write_tables(tmp_path / 'in', 3000), random.Random(0)
    command = [sys.executable, 'tools/label.py', '--name=toy', f'--input={tmp_path}/in/rows.parquet',
               f'--output={tmp_path}/out', '--column=body', '--rows=30', '--processes=2']
    out = lambda: sorted(path.name for path in (tmp_path / 'out').glob('*.parquet'))
    for n in range(kills):                                      # the program, while it writes
        before, process = len(out()), subprocess.Popen(
            command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(out()) < before + rng.randint(2, 8) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
        while workers_in(root):                                 # Ray ends them when the program is gone
            time.sleep(0.1)
    assert 0 < len(out()) < 100
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    before = len(out())
    while len(out()) < before + 3 and process.poll() is None:   # one of the processes that answer
        time.sleep(0.02)
    os.kill(workers_in(root)[0], signal.SIGKILL)
    stdout, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and 'label rows=3000' in stdout
    found = [row for name in out() for row in pq.read_table(tmp_path / 'out' / name).to_pylist()]
    assert [(row['id'], row['body']) for row in found] == rows and not list((tmp_path / 'out').glob('*.tmp'))
    expected = Labeler(project / 'out/toy', 'cpu')([text for _, text in rows])
    assert [row['tone'] for row in found] == [record.get('tone') for record in expected]
