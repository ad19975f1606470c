"""Tables in pieces: files of rows, on a disk or in a bucket, cut into pieces that are answered one by one, each into a
Parquet file of its own. The programs are tools/label.py and its workers.

    fs, paths = find_files('s3://bucket/2026/*.parquet')
    pieces = [piece for path in paths for piece in cut_file(fs, path, 20_000)]
    for table in read_piece(fs, pieces[0]): ...                 # pyarrow.Table, of up to ROWS rows

A piece of Parquet is some rows of a row group; of CSV and JSON lines it is some bytes, from the end of one record to
that of another. Values of CSV are kept as the text they are.
"""
import csv
import fnmatch
import glob
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as filesystems

ROWS = 1024  # that are read and answered together
csv.field_size_limit(1 << 30)
FORMS = {'.parquet': 'parquet', '.csv': 'csv', '.tsv': 'csv', '.jsonl': 'jsonl', '.ndjson': 'jsonl'}
PACKED = {'.gz': 'gzip', '.zst': 'zstd', '.bz2': 'bz2'}


@dataclass
class Piece:
    """rows of a file. begin, end: rows of row group `group` of a Parquet file, or bytes; of a packed file 0 and -1.
    first: number of its first row in the file; rows: how many, -1 if that is not known before it is read. name: of the
    file with the answers. fields: of CSV their names; of JSON lines {name: type}, see guess_types."""
    path: str
    form: str
    begin: int
    end: int
    group: int = 0
    first: int = 0
    rows: int = -1
    name: str = ''
    fields: object = None


def split_name(path):
    """(form of a table, or None; name of its compression, or None)."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    packed = PACKED.get(suffixes[-1]) if suffixes else None
    suffix = suffixes[-2 if packed else -1] if len(suffixes) > bool(packed) else ''
    return FORMS.get(suffix), packed


def find_files(place):
    """(filesystem, paths in it) of a file, a folder with all in it, or a glob; of this disk, or a URI that Arrow reads:
    s3://, gs://, hdfs://, abfss://. FileNotFoundError or ValueError with a sentence if there is none."""
    if '://' not in place:
        fs = filesystems.LocalFileSystem()
        is_glob = glob.has_magic(place) and not Path(place).exists()
        found = sorted(glob.glob(place, recursive=True)) if is_glob else [place]
        found = [str(Path(one).absolute()) for one in found]    # the same file has one name
        paths = [path for one in found for path in (
            sorted(map(str, Path(one).rglob('*'))) if Path(one).is_dir() else [one])]
        missing = not found or not Path(found[0]).exists()
    else:
        place, mark, settings = place.partition('?')            # such as of the server
        start = place.partition('*')[0].rpartition('/')[0] if '*' in place else place
        fs, base = filesystems.FileSystem.from_uri(start + mark + settings)
        info = fs.get_file_info(base)
        missing = info.type == filesystems.FileType.NotFound
        inside = [] if missing or info.is_file else fs.get_file_info(filesystems.FileSelector(base, recursive=True))
        paths = [base] if info.is_file else sorted(entry.path for entry in inside if entry.is_file)
        if '*' in place:
            pattern = base + place[len(start):]
            paths = [path for path in paths if fnmatch.fnmatch(path, pattern)]
    if missing:
        raise FileNotFoundError(f'{place} does not exist')
    tables = [path for path in paths if split_name(path)[0] and not Path(path).name.startswith(('.', '_'))]
    if not tables:
        raise ValueError(f'{place} has no table: a name ends in {", ".join(FORMS)}, or that and {", ".join(PACKED)}')
    return fs, tables


# -----------------------------------------------------------------------------
# pieces


def cut_file(fs, path, rows):
    """the Pieces of a file, of up to `rows` rows each. Raises what Arrow does if it cannot be read."""
    form, packed = split_name(path)
    info = fs.get_file_info(path)
    key = hashlib.blake2b(f'{path}\n{info.size}'.encode(), digest_size=4).hexdigest()
    name = f'{Path(path).name.partition(".")[0]}-{key}'
    if form == 'parquet':
        found, first = [], 0
        with fs.open_input_file(path) as file:
            meta = pq.ParquetFile(file).metadata
        for group in range(meta.num_row_groups):
            n = meta.row_group(group).num_rows
            for begin in range(0, n, rows):
                found.append(Piece(path, form, begin, min(begin + rows, n), group, first + begin, min(rows, n - begin)))
            first += n
    else:
        fields = read_names(fs, path, packed) if form == 'csv' else guess_types(fs, path, packed)
        found = [Piece(path, form, 0, -1)]
        if not packed:
            ends = [(0, 0), *find_ends(fs, path, rows, form == 'csv')]
            found = [Piece(path, form, begin, end, first=first, rows=last - first)
                     for (begin, first), (end, last) in zip(ends, ends[1:])]
        for piece in found:
            piece.fields = fields
    for piece in found:
        piece.name = f'{name}-{piece.first:010d}.parquet'
    return found


def find_ends(fs, path, rows, quoted):
    """yields where each `rows` records of a file end, in bytes, and how many come before, and so for the last one.
    quoted: a line break between quotes ends no record (RFC 4180, where a quote in a value is written twice, which
    changes nothing here)."""
    offset, inside, seen = 0, 0, 0
    with fs.open_input_stream(path) as file:
        while block := file.read(1 << 24):
            data = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(data == 10)
            if quoted:
                quotes = np.cumsum(data == 34) + inside
                ends, inside = ends[quotes[ends] % 2 == 0], int(quotes[-1]) % 2
            first = rows - 1 - seen % rows
            for n in range(first, len(ends), rows):
                yield offset + int(ends[n]) + 1, seen + n + 1
            seen, offset, last = seen + len(ends), offset + len(block), int(ends[-1]) + 1 if len(ends) else 0
    if offset and (seen % rows or last != len(data)):           # what is left, with or without a line break at its end
        yield offset, seen + (last != len(data))


def open_text(fs, path, packed, begin=0, end=-1):
    """a binary stream of a file, or of some bytes of it."""
    if packed:
        return fs.open_input_stream(path, compression=packed)
    if end < 0:
        return fs.open_input_stream(path, compression=None)
    with fs.open_input_file(path) as file:
        return io.BytesIO(file.read_at(end - begin, begin))


def delimiter_of(path):
    return '\t' if '.tsv' in Path(path).name.lower() else ','


def read_names(fs, path, packed):
    """the names of the columns of a CSV: its first record. ValueError if there is none, or if one comes twice."""
    with open_text(fs, path, packed) as file:
        names = next(csv.reader(io.TextIOWrapper(file, 'utf-8-sig', newline=''), delimiter=delimiter_of(path)), [])
    if not names or len({*names}) < len(names):
        raise ValueError(f'its first line, {",".join(names)[:80]!r}, does not name each column once')
    return names


def guess_types(fs, path, packed):
    """{name: 'string', 'bool', 'int64', 'double' or 'json'} of the columns of a file of JSON lines, by its first
    thousand: json, a text, for objects, lists and a mixture."""
    kinds = {}
    with open_text(fs, path, packed) as file:
        for _, line in zip(range(1000), io.TextIOWrapper(file, 'utf-8-sig', 'replace')):
            for name, value in (parse_line(line) or {}).items():
                kinds.setdefault(name, set())
                if value is not None:
                    kinds[name].add(type(value))
    types = {frozenset([str]): 'string', frozenset([bool]): 'bool', frozenset([int]): 'int64',
             frozenset([float]): 'double', frozenset([int, float]): 'double', frozenset(): 'string'}
    return {name: types.get(frozenset(kind), 'json') for name, kind in kinds.items()}


def parse_line(line):
    """the object of a line of JSON; None if it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def arrow_fields(types):
    return pa.schema([(name, pa.string() if kind == 'json' else kind) for name, kind in types.items()])


def schema_of(fs, piece):
    """the pyarrow.Schema of the rows of a piece."""
    if piece.form == 'parquet':
        with fs.open_input_file(piece.path) as file:
            return pq.ParquetFile(file).schema_arrow.remove_metadata()
    return arrow_fields(dict.fromkeys(piece.fields, 'string') if piece.form == 'csv' else piece.fields)


def read_piece(fs, piece):
    """yields (pyarrow.Table, {number of a row in it: why it has no values}) of the rows of a piece, up to ROWS at a
    time. ValueError if a value is of another type than in the rows before, or a record has too many values."""
    if piece.form == 'parquet':
        with fs.open_input_file(piece.path) as file:
            n, table = 0, pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)  # else a whole group is in memory
            for batch in table.iter_batches(ROWS, [piece.group]):
                begin, end = max(piece.begin - n, 0), min(piece.end - n, len(batch))
                n += len(batch)
                if begin < end:
                    yield pa.table(batch.slice(begin, end - begin)).replace_schema_metadata(), {}
                if n >= piece.end:
                    return
        return
    _, packed = split_name(piece.path)
    with open_text(fs, piece.path, packed, piece.begin, piece.end) as file:
        lines = io.TextIOWrapper(file, 'utf-8-sig' if not piece.begin else 'utf-8', 'replace', newline='')
        read = read_csv if piece.form == 'csv' else read_lines
        yield from read(lines, piece)


def read_csv(lines, piece):
    names, rows, n = piece.fields, [], piece.first
    for n, row in enumerate(csv.reader(lines, delimiter=delimiter_of(piece.path)), piece.first):
        if n == 0 or not row:                                   # the names; an empty line
            continue
        if len(row) > len(names):
            raise ValueError(f'record {n} has {len(row)} values for {len(names)} columns')
        rows.append(row + [None] * (len(names) - len(row)))
        if len(rows) == ROWS:
            yield table_of(rows, names), {}
            rows = []
    if rows:
        yield table_of(rows, names), {}


def table_of(rows, names):
    return pa.table([pa.array(column, pa.string()) for column in zip(*rows)], names)


def read_lines(lines, piece):
    rows, broken, types, schema = [], {}, piece.fields, arrow_fields(piece.fields)
    for n, line in enumerate(lines, piece.first):
        if not line.strip():
            continue
        row = parse_line(line)
        if row is None:
            broken[len(rows)] = 'no JSON object'
        for name, value in (row or {}).items():
            known = types.get(name)
            if known is None:
                raise ValueError(f'line {n + 1} has {name!r}, which none of the first thousand lines of the file has')
            if known == 'json' and value is not None:
                row[name] = json.dumps(value, ensure_ascii=False)
            elif value is not None and type(value) not in {'string': (str,), 'bool': (bool,), 'int64': (int,),
                                                           'double': (int, float)}[known]:
                raise ValueError(f'{name} is {json.dumps(value)[:60]} in line {n + 1}, where others are {known}')
        rows.append(row or {})
        if len(rows) == ROWS:
            yield pa.Table.from_pylist(rows, schema), broken
            rows, broken = [], {}
    if rows:
        yield pa.Table.from_pylist(rows, schema), broken


# -----------------------------------------------------------------------------
# answers as columns


def arrow_type(form):
    """the Arrow type of the values of a JSON Schema of distil: an object is a struct, an array a list, a choice between
    values of one type that type; a mixture is JSON in a text."""
    if form.get('type') == 'object':
        return pa.struct([(name, arrow_type(part)) for name, part in form['properties'].items()])
    if form.get('type') == 'array':
        return pa.list_(arrow_type(form['items']))
    if 'anyOf' in form:
        kinds = {arrow_type(part) for part in form['anyOf'] if part.get('type') != 'null'}
    else:
        values = form.get('enum', [form['const']] if 'const' in form else None)
        names = {type(value) for value in values if value is not None} if values else form.get('type')
        names = names if values else {names} if isinstance(names, str) else {*names} - {'null'}
        known = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64(), 'string': pa.string(),
                 'boolean': pa.bool_(), 'integer': pa.int64(), 'number': pa.float64()}
        kinds = {known[name] for name in names}
    if kinds == {pa.int64(), pa.float64()}:
        return pa.float64()
    return kinds.pop() if len(kinds) == 1 else pa.string()


def fit(value, kind):
    """a value of an answer as one of an Arrow type: what has no type of its own is JSON in a text."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {field.name: fit(value.get(field.name), field.type) for field in kind}
    if pa.types.is_list(kind):
        return [fit(item, kind.value_type) for item in value]
    return json.dumps(value, ensure_ascii=False) if pa.types.is_string(kind) and not isinstance(value, str) else value


def answer_fields(schema, confidence, min_confidence, prefix):
    """the pyarrow.Schema of the columns of a distil.schema.Schema's answers."""
    form = schema.tree.json_schema()
    fields = [(prefix + name, arrow_type(part)) for name, part in form['properties'].items()]
    if confidence:
        fields += [(f'_confidence_{path}', pa.float32()) for path in schema.paths]
    marks = ['_defer', '_teacher'] if min_confidence else []
    return pa.schema([*fields, *((name, pa.bool_()) for name in marks), ('_error', pa.string())])


def answer_columns(records, fields, problem, prefix, broken):
    """the columns of records, as a Labeler returns them. problem: the key of why there is no answer; broken: {number:
    why}, of rows that could not be read."""
    columns = []
    for field in fields:
        name = field.name.removeprefix(prefix)
        if field.name == '_error':
            column = [broken.get(n) or record.get(problem) for n, record in enumerate(records)]
        elif field.name in ('_defer', '_teacher'):
            column = [bool(record.get(field.name)) for record in records]
        elif field.name.startswith('_confidence_'):
            column = [record.get('_confidence', {}).get(field.name[12:]) for record in records]
        else:
            column = [None if problem in record else fit(record.get(name), field.type) for record in records]
        columns.append(pa.array(column, field.type))
    return columns
