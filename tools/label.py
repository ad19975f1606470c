"""A student over tables: Parquet, CSV, JSON lines, on this machine or on a Ray cluster, on a disk or in a bucket.

    python tools/label.py config/demo.py --input=messages.parquet --column=body --output=labelled/
    python tools/label.py config/demo.py --input='s3://bucket/2026/*.parquet' --output=s3://... --address=auto
    # the same command again, after a kill: it goes on

Writes a Parquet file for each piece of the input: all its columns and rows in their order, and the answer's
properties as columns, `_error` if there is no answer. A file is there whole or not at all, so a row is neither lost
nor doubled; the files of a table sort in the order of its rows. Needs `pip install -r requirements-cluster.txt`, and
of the project only out/<name>/. docs/tables.md says more.
"""
import json
import logging
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, stop

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as filesystems
from tqdm import tqdm

from distil.checkpoint import checkpoint_path, find_threshold, read_checkpoint
from distil.labeler import Labeler
from distil.resume import lock_folder
from distil.schema import Schema
from distil.values import json_text
from tools.tables import answer_columns, answer_fields, cut_file, find_files, read_piece, schema_of

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use
input = ''           # text; a table, a folder with tables, or a glob; a URI that Arrow reads: s3://, gs://, hdfs://
column = 'text'      # text; the column with the texts
output = ''          # text; the folder that is written, or its URI
prefix = ''          # text; of the names of the answer's columns
rows = 10000         # 1..; of the input for one file of the output: what a kill costs at most
# as in sample.py
confidence = False   # columns _confidence_<field>
min_confidence = 0.0  # 0..1 or 'target'; column _defer, or with ask_teacher _teacher
ask_teacher = False  # each of the processes asks about what is below min_confidence, best an LLM behind a URL
teacher = ''         # file; or that URL; '': where it was for extract.py
price_in = 0.0       # 0..; of a teacher behind a URL, as in sample.py
price_out = 0.0      # 0..
max_cost = 0.0       # 0..; of this run: each process has its share of it
too_long = 'cut'     # 'cut' or 'refuse'
sample_batch = 128   # 1..
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; as in sample.py
# machines
address = ''         # text; of a Ray cluster; 'auto': the one that this machine belongs to; '': this machine alone
processes = 0        # 0..; that answer, one core each; 0: as many as there are cores
hour_price = 1.0     # 0..; of all these processes, as in tools/evaluate.py
config = configure(globals())

GROUP_BYTES = 1 << 25  # of a row group of the output, about
ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """answers pieces, in a process of Ray's. student: {file: bytes} of its folder, or the folder; options: of Labeler;
    place: of the output; column, prefix: settings."""

    def __init__(self, student, options, place, column, prefix):
        import torch
        torch.set_num_threads(1)
        if isinstance(student, dict):                           # on another machine
            import tempfile
            self.folder = tempfile.TemporaryDirectory()
            for file, content in student.items():
                Path(self.folder.name, file).write_bytes(content)
            student = self.folder.name
        self.labeler, self.problem = None, ''
        try:
            self.labeler = Labeler(student, **options)
        except SystemExit as error:                             # it would be started again and again
            self.problem = str(error)
        self.fs, self.base = open_place(place)
        self.column, self.prefix, self.options = column, prefix, options

    def __call__(self, batch):
        """{'item': [a Piece]} -> {'rows': [number of rows], 'failed': ['' or why there are no answers]}; rows is -1 if
        no process can answer."""
        if self.labeler is None:
            return {'rows': [-1], 'failed': [self.problem]}
        piece, in_fs = batch['item'][0]
        try:
            n, why = self.answer(piece, filesystems.LocalFileSystem() if in_fs is None else in_fs), ''
        except (OSError, ValueError, pa.ArrowException) as error:
            n, why = 0, f'{piece.path}: {str(error).strip().splitlines()[0]}'
        return {'rows': [n], 'failed': [why]}

    def answer(self, piece, fs):
        """writes the file of a piece. Returns the number of its rows."""
        schema, fields = table_schema(fs, piece, self.column, self.labeler.space.schema, self.options, self.prefix)
        counts, target = Counter(), f'{self.base}/{piece.name}'
        is_local = isinstance(self.fs, filesystems.LocalFileSystem)  # a bucket shows a file when it is whole
        written, parts = f'{target}.{os.getpid()}.tmp' if is_local else target, []
        try:
            with self.fs.open_output_stream(written) as file, pq.ParquetWriter(file, schema) as writer:
                for table, broken in read_piece(fs, piece):
                    texts = table.column(self.column).to_pylist()
                    records = self.labeler(['' if text is None else text for text in texts])
                    columns = answer_columns(records, fields, self.labeler.problem, self.prefix, broken)
                    parts.append(pa.table(table.columns + columns, schema))
                    count_answers(self.labeler.space.schema, records, self.labeler.problem, counts)
                    if sum(part.nbytes for part in parts) > GROUP_BYTES:
                        writer.write_table(pa.concat_tables(parts))
                        parts = []
                if parts:
                    writer.write_table(pa.concat_tables(parts))
                writer.add_key_value_metadata({'label': json.dumps(counts)})
            if is_local:
                os.replace(written, target)
        except BaseException:
            if is_local:
                with suppress(OSError):
                    os.unlink(written)
            raise
        return counts['rows']


def open_place(place):
    """(filesystem, path in it) of a folder, or of its URI."""
    return filesystems.FileSystem.from_uri(place) if '://' in place else (
        filesystems.LocalFileSystem(), str(Path(place).absolute()))


def table_schema(fs, piece, column, schema, options, prefix):
    """(pyarrow.Schema of the output, that of the answer's columns). ValueError with a sentence if the column is none of
    texts, or a name comes twice."""
    given = schema_of(fs, piece)
    fields = answer_fields(schema, options['confidence'], options['min_confidence'], prefix)
    if column not in given.names:
        near = get_close_matches(column, given.names, 1)
        hint = f'did you mean {near[0]!r}?' if near else f'it has {", ".join(given.names)}'
        raise ValueError(f'it has no column {column!r}; {hint}')
    kind = given.field(column).type
    while pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
            or pa.types.is_binary(kind) or pa.types.is_null(kind)):
        raise ValueError(f'its column {column!r} is {kind}, not text')
    if both := [name for name in fields.names if name in given.names]:
        raise ValueError(f'it has a column {both[0]!r} already, as the answer does: set --prefix=new_')
    return pa.schema([*given, *fields]), fields


def count_answers(schema, records, problem, counts):
    """adds to a Counter: rows; errors; deferred; by_teacher; and 'path=value' for the values of leaves."""
    counts['rows'] += len(records)
    for record in records:
        counts['deferred'] += bool(record.get('_defer'))
        counts['by_teacher'] += bool(record.get('_teacher'))
        counts['errors'] += problem in record
        for leaf in schema.leaves if problem not in record else ():
            if leaf.values:
                value = leaf.get(record)
                for one in value if isinstance(value, list) else [value]:
                    counts[f'{leaf.path}={json_text(one)}'] += 1


# -----------------------------------------------------------------------------
# main


def plan(fs, paths, schema, options):
    """(the Pieces of the files, {path: why it cannot be read})."""
    pieces, failed = [], {}
    for path in tqdm(paths, desc='look', unit='file', disable=len(paths) < 100):
        try:
            found = cut_file(fs, path, rows)
            if found:
                table_schema(fs, found[0], column, schema, options, prefix)
            pieces += found
        except (OSError, ValueError, pa.ArrowException) as error:
            failed[path] = str(error).strip().splitlines()[0]
    return pieces, failed


def check_output(fs, base, student, wanted):
    """the names of the files that the output has already. Exits with a message if they are of another student or
    other settings."""
    fs.create_dir(base, recursive=True)
    path = f'{base}/_label.json'
    now = {**wanted, 'student': student}
    names = [info.base_name for info in fs.get_file_info(filesystems.FileSelector(base))]
    if '_label.json' in names:
        with fs.open_input_stream(path) as file:
            before = json.loads(file.read())
        if differ := [key for key in now if now[key] != before.get(key)]:
            stop(f'{output} holds answers of another {differ[0]} ({str(before.get(differ[0]))[:60]}): write into '
                 'another folder, or remove it')
    elif parts := [name for name in names if not name.startswith(('.', '_'))]:
        stop(f'{output} is not empty and holds {parts[0]}: write into a folder of its own')
    with fs.open_output_stream(path) as file:
        file.write(json.dumps(now, indent=2).encode())
    remove_unfinished(fs, base)
    return {*names}


def remove_unfinished(fs, base):
    """removes what processes that were killed have left in a folder of this disk."""
    for path in Path(base).glob('*.tmp') if isinstance(fs, filesystems.LocalFileSystem) else ():
        path.unlink(missing_ok=True)


def start_ray():
    """connects to the cluster, or starts Ray on this machine. Returns the number of cores."""
    os.environ.setdefault('RAY_BACKEND_LOG_LEVEL', 'fatal')     # before it is loaded
    os.environ.setdefault('RAY_worker_niceness', '0')           # not behind everything else on this machine
    os.environ.setdefault('MALLOC_ARENA_MAX', '1')              # 50 MB less in each process
    import ray
    environment = {'env_vars': {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}}
    local = {'include_dashboard': False, 'object_store_memory': 100 << 20, 'num_cpus': processes or os.cpu_count()}
    if address:
        left_here = ['/out', '/.git', '/.venv', '/data/*/*', '*.bin', '*.gguf']
        environment = {'working_dir': str(ROOT), 'excludes': left_here, 'env_vars': {'OMP_NUM_THREADS': '1'}}
    try:
        ray.init(address=address or 'local', runtime_env=environment, logging_level=logging.ERROR, log_to_driver=False,
                 **({} if address else local))
    except (ConnectionError, RuntimeError, ValueError) as error:
        stop(f'no Ray at address = {address or "local"}: {str(error).strip().splitlines()[0]}')
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger('ray.data').setLevel(logging.ERROR)
    return processes or int(ray.cluster_resources().get('CPU', 1))


def answer_all(todo, fs, folder, options):
    """yields {'rows', 'failed'} of the pieces as they are done."""
    n = min(start_ray(), len(todo))
    options |= {'budget': {'price_in': price_in, 'price_out': price_out, 'max_cost': max_cost / n}}
    import ray.data
    student = str(folder.absolute())
    if address:                                                 # other machines do not have it
        files = (folder / file for file in ('best.pt', 'ckpt.pt', 'tokenizer.json', 'reader.json'))
        student = {file.name: file.read_bytes() for file in files if file.is_file()}
    in_fs = None if isinstance(fs, filesystems.LocalFileSystem) else fs
    items = ray.data.from_items([{'item': (piece, in_fs)} for piece in todo], override_num_blocks=len(todo))
    place = output if '://' in output else str(Path(output).absolute())
    done = items.map_batches(Worker, fn_constructor_args=(student, options, place, column, prefix), batch_size=1,
                             concurrency=n, num_cpus=1)
    yield from done.iter_rows()


def summarize(fs, base, pieces, schema):
    """(counts of the files of these pieces, see count_answers; the number of files)."""
    total, n = Counter(), 0
    for piece in pieces:
        with suppress(FileNotFoundError):
            with fs.open_input_file(f'{base}/{piece.name}') as file:
                total.update(json.loads(pq.ParquetFile(file).metadata.metadata[b'label']))
            n += 1
    return total, n


if __name__ == '__main__':
    if not (name or run) or not input or not output:
        stop('no task or no table; run: python tools/label.py config/demo.py --input=messages.parquet --column=body '
             '--output=labelled/')
    if not find_spec('ray'):
        stop('this needs Ray; run: pip install -r requirements-cluster.txt')
    folder = Path('out', run or name)
    checkpoint = read_checkpoint(checkpoint_path(folder, which), 'cpu')
    schema = Schema(checkpoint['task']['fields'], checkpoint['task'].get('left_out'))
    options = {'device': 'cpu', 'which': which, 'batch_size': sample_batch, 'too_long': too_long, 'dtype': dtype,
               'confidence': confidence, 'min_confidence': find_threshold(checkpoint, min_confidence),
               'ask_teacher': ask_teacher, 'teacher': teacher}
    if ask_teacher and not min_confidence:
        stop('ask_teacher needs a min_confidence: the teacher answers the rows with a field below it')
    try:
        fs, paths = find_files(input)
        out_fs, base = open_place(output)
    except (OSError, ValueError, pa.ArrowException) as error:
        stop(str(error).strip().splitlines()[0])
    pieces, failed = plan(fs, paths, schema, options)
    for path, why in list(failed.items())[:10]:
        print(f'{path}: {why}', file=sys.stderr)
    if not pieces:
        stop(f'there is nothing to answer in {input}')
    if '://' not in output:                                     # held until the program ends; no part of a table
        lock = lock_folder(Path(output), '_lock', 'another run is writing to {}: wait for it')
    wanted = {'column': column, 'prefix': prefix, 'confidence': confidence, 'min_confidence': options['min_confidence'],
              'ask_teacher': ask_teacher, 'too_long': too_long, 'rows': rows}
    student = f'{folder.name} {which} {checkpoint["step"]} {checkpoint["task"]["fingerprint"]}'
    try:
        there = check_output(out_fs, base, student, wanted)
    except OSError as error:                                    # no such bucket, no right to write
        stop(f'{output} cannot be written: {str(error).strip().splitlines()[0]}')
    todo = [piece for piece in pieces if piece.name not in there]
    n_rows, start = sum(max(0, piece.rows) for piece in todo), time.time()
    if len(todo) < len(pieces):
        print(f'{len(pieces) - len(todo)} of {len(pieces)} pieces are answered already')
    answered = 0
    with tqdm(total=n_rows, desc='label', unit='row', smoothing=0.02, disable=not todo) as bar:
        for piece in answer_all(todo, fs, folder, options) if todo else ():
            if piece['rows'] < 0:
                bar.close()
                stop(piece['failed'])
            answered += piece['rows']
            bar.update(piece['rows'])
            if piece['failed']:
                path, _, why = piece['failed'].partition(': ')
                failed[path] = why
                bar.write(piece['failed'], file=sys.stderr)
    seconds = time.time() - start
    remove_unfinished(out_fs, base)
    total, n_files = summarize(out_fs, base, pieces, schema)
    for leaf in schema.leaves:
        n = max(1, total['rows'] - total['errors'])
        shares = {text: total[f'{leaf.path}={text}'] / n for text in leaf.texts}
        common = sorted(shares.items(), key=lambda share: -share[1])[:8]
        if common:
            print(f'{leaf.path}:', ', '.join(f'{text} {share:.3f}' for text, share in common))
    speed = {'rows_s': answered / seconds, 'million': 1e6 * seconds / answered / 3600 * hour_price} if answered else {}
    kinds = {key: total[key] for key in ('errors', 'deferred', 'by_teacher') if total[key] or key == 'errors'}
    print(data_line('label', {'rows': total['rows'], **kinds, 'files': n_files, **speed}))
    if failed:
        path, why = next(iter(failed.items()))
        stop(f'{len(failed)} of {len(paths)} files are not answered to their end, such as {path} ({why}); mend that, '
             'and the same command does the rest')
