"""Your own texts, from a file of any common format -> data/<dataset>/input.jsonl

    python data/prepare.py mine messages.csv                   # writes data/mine/input.jsonl
    python data/prepare.py mine a.xlsx b.csv.gz --column=body  # several files, the text in column `body`
    python data/prepare.py mine rated.csv --column=body --truth=team,urgent
    python data/prepare.py mine lines.csv --delimiter=none     # one column: commas belong to the texts
    some-command | python data/prepare.py mine -               # one text per line

.txt: one text per line. .csv, .tsv: a table with a header, or one column. .jsonl: {"text": ...} per line.
.json: a list of such objects, or of texts. .xlsx: the first sheet (needs openpyxl). .parquet, or a directory
of such files (needs pyarrow). Each may end in .gz; upper and lower case are the same. Pipes and other names
are read as .txt, with --column or --delimiter as .csv. The encoding is UTF-8, or UTF-16 with a byte-order
mark. Bytes that are neither become U+FFFD, and their lines are counted.

The text is in the column (or under the key) that --column names, else in `text`, else in the only one. A
table without a header needs a column number: --column=2. --delimiter is needed if the table does not show
it: comma, semicolon, tab, pipe, none, or another character. bad_row counts the rows with more cells than the
first, which are left out.

--truth names columns (or keys) with the truth of a field. It is never trained on; tools/evaluate.py compares
with it. A cell is text: TRUE, 1.0 and none mean true, 1 and null in a field with these values. .json and
.jsonl keep `truth`, `answer` and `probabilities`, without NaN. Empty and repeated texts are left out. If
anything fails, an earlier input.jsonl stays.
"""
import codecs
import csv
import gzip
import io
import json
import os
import re
import secrets
import sys
import textwrap
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

KEPT = 'truth', 'answer', 'probabilities'
UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
ONE_COLUMN = '\x1f'  # as a delimiter: no text has it
DELIMITERS = {'comma': ',', 'semicolon': ';', 'tab': '\t', 'pipe': '|', 'none': ONE_COLUMN}
QUOTED = re.compile(r'(?<![^,;\t|\r\n]) *"[^"]*(?:""[^"]*)*"(?![^,;\t|\r\n])')  # a cell in quotes
BINARY = {  # what a file is, and what to do: how it begins
    'a zip archive or a damaged workbook; unpack it, or save its table as .csv': (b'PK\3\4', b'PK\5\6'),
    'packed; unpack it first': (b'BZh91AY', b'\xfd7zXZ', b'(\xb5/\xfd', b'7z\xbc\xaf', b'Rar!\x1a'),
    'an old or locked Office file (.xls, .doc); save it as .xlsx or .csv': (b'\xd0\xcf\x11\xe0',),
    'an SQLite database; save its table as .csv': (b'SQLite format 3',),
    'a PDF; save its texts as .txt': (b'%PDF-',),
    'an image; a text file is needed': (b'\x89PNG', b'\xff\xd8\xff', b'GIF8', b'II*\0', b'MM\0*'),
    'an Arrow file; save it as .parquet': (b'ARROW1', b'\xff\xff\xff\xff')
}


def open_bytes(path):
    """opens a file, or standard input if path is -, and unpacks it if it is gzip, whatever its name."""
    raw = sys.stdin.buffer if path == '-' else open(path, 'rb')
    while raw.peek(2)[:2] == b'\x1f\x8b':
        raw = io.BufferedReader(gzip.open(raw))
    if raw.peek(4)[:4] in (b'PAR1', b'PK\3\4') and not raw.seekable():  # these are read from their end
        raw = io.BufferedReader(io.BytesIO(raw.read()))
    return raw


def find_kind(raw, path, is_table):
    """what a file holds: csv, tsv, jsonl, json, txt, xlsx or parquet. Binary content decides, else the name.
    Exits with a message if the content is binary of another kind. is_table: True for csv instead of txt."""
    head = raw.peek(4096)[:4096]
    if head.startswith(b'PAR1'):
        return 'parquet'
    is_zip = head.startswith(b'PK\3\4') and zipfile.is_zipfile(raw)
    if is_zip and 'xl/workbook.xml' in zipfile.ZipFile(raw).namelist():
        return 'xlsx'
    what = next((what for what, starts in BINARY.items() if head.startswith(starts)), '')
    controls = len(re.findall(rb'[\x01-\x08\x0e-\x1a\x1c-\x1f]', head))
    if head[257:262] == b'ustar':
        what = 'a tar archive; unpack it first'
    elif controls > max(8, len(head) / 20) and head[:2] not in UTF16:
        what = what or 'binary; save its texts as .txt or .csv'
    if what:
        sys.exit(f'{path} is {what}')
    kind = re.search(r'\.(csv|tsv|jsonl|ndjson|json|xls|xlsx|parquet)(\.gz)?$', path.lower())
    kind = kind[1] if kind else 'csv' if is_table else 'txt'
    if kind in ('xls', 'xlsx', 'parquet'):
        sys.exit(f'{path} is not in the format of .{kind}; if it is text, name it .csv or .txt')
    return kind


def open_lines(raw, counts):
    """yields the lines of an opened file. Counts those that are not UTF-8 in counts['bad_utf8']."""
    is_utf16 = raw.peek(2)[:2] in UTF16
    encoding, errors = ('utf-16', 'replace') if is_utf16 else ('utf-8-sig', 'surrogateescape')
    for line in io.TextIOWrapper(raw, encoding, errors, newline=''):
        if re.search('[\ud800-\udfff]', line):  # the bytes that could not be decoded
            counts['bad_utf8'] += 1
            line = line.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
        yield line.replace('\0', '')


@contextmanager
def use_package(package, path, what):
    """exits with a message if the block cannot import an optional package, or cannot read the file."""
    try:
        yield
    except ImportError:
        sys.exit(f'{path} is {what}; to read it: pip install {package}')
    except Exception as error:  # whatever the package raises for a damaged file
        sys.exit(f'{path} cannot be read as {what}: {" ".join(str(error).split())}')


def find_column(names, column, path, option='column', hint=''):
    """the index of the column named `column`, or else of the column of the text. Exits with a message if none
    or several are known. option, hint: for the message."""
    found = [i for i, name in enumerate(names) if (name == column if column else name.lower() == 'text')]
    if len(found) == 1 or not column and len(names) == 1:
        return found[0] if found else 0
    if found:
        sys.exit(f'{path} has {len(found)} columns called {names[found[0]]}; rename one')
    problem = f'has no column {column!r}' if column else 'has several columns, and none is called text'
    shown = textwrap.shorten(', '.join(names)[:2000], 500, placeholder=' ...')
    sys.exit(f'{path} {problem}; add --{option}= with one of: {shown}{hint}')


def find_delimiter(start, column, path):
    """the delimiter of a table that starts with these lines: the one that makes a cell of its header the name
    of the text's column, else one that all lines have, or nine in ten equally often, else ONE_COLUMN."""
    named, shares = {ONE_COLUMN: 1}, {}  # {delimiter: cells in the header}, {delimiter: share of like lines}
    lines = [line for line in re.split('[\r\n]+', QUOTED.sub('', ''.join(start)[:100_000])) if line.strip()]
    for delimiter in ',;\t|':
        numbers = Counter(line.count(delimiter) for line in lines)
        try:
            rows = csv.reader(start, delimiter=delimiter, strict=True, skipinitialspace=True)
            names = [name.strip().lower() for name in next(filter(None, rows), [])]
            if (column or 'text').lower() in names:
                named[delimiter] = len(names)
        except csv.Error:  # not with this delimiter
            pass
        share = max((n / len(lines) for number, n in numbers.items() if number), default=0)
        if share >= 0.9 or share and not numbers[0]:
            shares[delimiter] = share
    if len(named) > 1:
        return max(named, key=named.get)
    if len(shares) > 1 and column.isdecimal():
        options = [f'--delimiter={name}' for name, d in DELIMITERS.items() if d in shares]
        sys.exit(f'{path} has several possible delimiters; add {" or ".join(options)}')
    return max(shares, key=shares.get, default=ONE_COLUMN)


def csv_rows(lines, path, delimiter, column, is_tsv, counts):
    """yields the rows of a .csv or .tsv as lists of cells. Exits with a message if it is no table."""
    csv.field_size_limit(1 << 30)
    start = list(islice(lines, 100))
    excel = re.fullmatch(r'"?sep=(.)"?\s*', start[0], re.I) if start else None  # a first line of Excel's own
    start = start[1:] if excel else start
    delimiter = (delimiter or excel and excel[1] or is_tsv and '\t' in ''.join(start[:1]) and '\t'
                 or find_delimiter(start, column, path))
    rows = csv.reader(chain(start, lines), delimiter=delimiter, strict=True, skipinitialspace=True)
    line, width = 1, 0                                          # where a row begins; cells of the first row
    try:
        for row in rows:
            width = width or len(row) * any(map(str.strip, row))
            if any(map(str.strip, row[width:])):
                counts['bad_row'] += 1
            elif row and width:
                yield row
            line = rows.line_num + 1
    except csv.Error as error:
        error = str(error).replace(ONE_COLUMN, 'end of line')
        sys.exit(f'{path} cannot be read as a table, line {line + bool(excel)}: {error}; is a closing quote '
                 'missing? If each line is one text, name it .txt')


def cell_text(cell):
    """a cell of a typed table as text: numbers, true and false as in JSON; '' for nothing, NaN, objects."""
    if cell is None or cell != cell:
        return ''
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, (bool, int, float)):
        return json.dumps(cell)
    return '' if isinstance(cell, (list, dict, bytes)) else str(cell)


def xlsx_rows(raw, path):
    """yields the rows of the first sheet of an Excel workbook as lists of texts."""
    with use_package('openpyxl', path, 'an Excel workbook'):
        import openpyxl
        warnings.simplefilter('ignore')  # about formats that it does not know
        book = openpyxl.load_workbook(raw, read_only=True, data_only=True)
        sheet = book.worksheets[0]
        if len(book.worksheets) > 1:
            print(f'{path} has {len(book.worksheets)} sheets; only the first, {sheet.title!r}, is read')
        sheet.reset_dimensions()  # some programs write wrong ones, which would cut the rows
        for row in sheet.iter_rows(values_only=True):
            cells = [cell_text(cell).replace('_x000D_', '\r') for cell in row]  # a carriage return
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield cells


def read_table(rows, path, column, truths, hint=''):
    """yields (text, {'truth': ...} or {}) for each row but the header. rows: lists of texts. Exits with a
    message if a column is unknown."""
    rows = iter(rows)
    names = [name.strip() for name in next(rows, [])]
    if not names:
        return
    unnamed = len(names) == 1 and not column and names[0].lower() != 'text'
    if column.isdecimal() and column not in names or unnamed:
        # no header: the first row holds a text too
        at, rows = int(column or 1) - 1, chain([names], rows)
        if not 0 <= at < len(names):
            sys.exit(f'{path} has no column {column}; it has {len(names)}, counted from 1'
                     + ('; if there are more, add --delimiter=' if hint else ''))
        if truths:
            sys.exit(f'{path} has no header, so it has no column {truths[0]!r}; add a header')
    else:
        at = find_column(names, column, path, hint='; or its number, if there is no header' + hint)
    columns = {truth: find_column(names, truth, path, 'truth') for truth in truths}
    for row in rows:
        if len(names) == 1 and any(row[1:]):  # only in a workbook
            sys.exit(f'{path} has one cell in its first row, more below; delete the rows above the header')
        truth = {name: row[i].strip() for name, i in columns.items() if len(row) > i and row[i].strip()}
        yield row[at] if len(row) > at else '', {'truth': truth} if truth else {}


def read_parquet(raw, path, column, truths):
    """yields (text, {'truth': ...} or {}) for each row of a Parquet file."""
    with use_package('pyarrow', path, 'a Parquet file'):
        from pyarrow.parquet import ParquetFile
        file = ParquetFile(raw)
        names = file.schema_arrow.names
        column = names[find_column(names, column, path)]
        wanted = list(dict.fromkeys([column, *(names[find_column(names, t, path, 'truth')] for t in truths)]))
        rows = (list(map(cell_text, row)) for batch in file.iter_batches(columns=wanted)
                for row in zip(*(batch[name].to_pylist() for name in wanted)))
        yield from read_table(chain([wanted], rows), path, column, truths)


def is_json(value):
    """False if a value holds NaN or Infinity, which JSON does not have."""
    try:
        return bool(json.dumps(value, allow_nan=False))
    except ValueError:
        return False


def read_objects(objects, path, column, truths, counts):
    """yields (text, {key: value} of the KEPT keys) for each JSON value: a text, or an object with one. Counts
    other values in counts['bad_json']."""
    for value in objects:
        if isinstance(value, str):
            yield value, {}
        elif isinstance(value, dict):
            names = [name for name in value if name not in KEPT]
            text = value[names[find_column(names, column, path)]] if names else ''
            extra = {key: value[key] for key in KEPT if key in value}
            if truths:
                truth = extra['truth'] if isinstance(extra.get('truth'), dict) else {}
                extra['truth'] = truth | {name: value[name] for name in truths if name in value}
            for key, known in extra.items():
                if isinstance(known, dict):
                    extra[key] = {name: known[name] for name in known if is_json(known[name])}
            yield text, {key: extra[key] for key in extra if is_json(extra[key])}
        else:
            counts['bad_json'] += 1


def parse_lines(lines):
    """yields the JSON value of each line that is not blank, None if it is not JSON."""
    for line in lines:
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def read_records(path, column, truths, delimiter, counts):
    """yields (text, {key: value} of the KEPT keys) for each record of a file of any kind."""
    raw = open_bytes(path)
    kind, lines = find_kind(raw, path, column or delimiter), open_lines(raw, counts)
    if kind in ('csv', 'tsv'):
        rows = csv_rows(lines, path, delimiter, column, kind == 'tsv', counts)
        hint = '' if delimiter else '; or --delimiter=none, if each line is one text'
        yield from read_table(rows, path, column, truths, hint)
    elif kind == 'xlsx':
        yield from read_table(xlsx_rows(raw, path), path, column, truths)
    elif kind == 'parquet':
        yield from read_parquet(raw, path, column, truths)
    elif kind in ('jsonl', 'ndjson'):
        yield from read_objects(parse_lines(lines), path, column, truths, counts)
    elif kind == 'json':
        try:
            values = json.loads(''.join(lines))
        except (ValueError, RecursionError) as error:
            sys.exit(f'{path} is not JSON: {error}; if each line is one object, name it .jsonl')
        if not isinstance(values, list):
            sys.exit(f'{path} must hold a list, not one {type(values).__name__}')
        yield from read_objects(values, path, column, truths, counts)
    else:
        yield from ((line, {}) for line in lines)


if __name__ == '__main__':
    if {'-h', '--help'} & {*sys.argv}:
        sys.exit(print(__doc__))
    sys.stdout.reconfigure(errors='backslashreplace')  # for names that it cannot encode
    options = dict(arg[2:].partition('=')[::2] for arg in sys.argv[1:] if arg.startswith('--'))
    if unknown := options.keys() - {'column', 'truth', 'delimiter'}:
        sys.exit(f'data/prepare.py has no option --{unknown.pop()}; its options are --column=, --truth= and '
                 '--delimiter=')
    if '' in options.values():
        sys.exit('an option needs a value right after its =; the shell needs quotes around ; and |')
    column, delimiter = options.get('column', ''), options.get('delimiter', '')
    delimiter = DELIMITERS.get(delimiter.lower(), delimiter)
    if len(delimiter) > 1 or delimiter in (' ', '"'):
        sys.exit(f'--delimiter={delimiter} is not comma, semicolon, tab, pipe, none or one other character')
    truths = [name.strip() for name in options.get('truth', '').split(',') if name.strip()]
    name, *paths = [arg for arg in sys.argv[1:] if not arg.startswith('--')] or ['']
    if not paths or not re.fullmatch(r'\w[\w.-]*', name, re.ASCII):
        sys.exit('run: python data/prepare.py NAME FILE... [--column=C] [--truth=C,C] [--delimiter=D]; '
                 'NAME is the dataset')
    files = []
    for path in paths:
        if path != '-' and not os.path.exists(path):
            sys.exit(f'{path} does not exist')
        found = sorted(map(str, Path(path).rglob('*.parquet'))) if os.path.isdir(path) else [path]
        if not found:
            sys.exit(f'{path} is a directory without .parquet files; name the files in it')
        files += found
    target = Path(__file__).absolute().parent / name / 'input.jsonl'
    tmp = target.with_suffix(f'.{secrets.token_hex(4)}.tmp')  # its own, for another run may write now
    counts, seen, known = Counter(), set(), set()
    try:
        target.parent.mkdir(exist_ok=True)
        with open(tmp, 'w', encoding='utf-8') as file:
            for path in files:
                for text, extra in read_records(path, column, truths, delimiter, counts):
                    text = ' '.join(text.split()) if isinstance(text, str) else ''
                    counts['read'] += 1
                    reason = 'empty' if not text else 'duplicate' if text in seen else 'kept'
                    counts[reason] += 1
                    if reason == 'kept':
                        seen.add(text)
                        known |= {truth for truth in truths if truth in extra.get('truth', ())}
                        file.write(json.dumps({'text': text, **extra}) + '\n')
        shown = ['read', 'kept', 'empty', 'duplicate', 'bad_utf8']
        shown += [key for key in ('bad_json', 'bad_row') if counts[key]]
        figures = ' '.join(f'{key}={counts[key]}' for key in shown)
        if not counts['kept']:
            sys.exit(f'{", ".join(paths)}: no text found ({figures})')
        if missing := [truth for truth in truths if truth not in known]:
            sys.exit(f'no text has a value in {missing[0]!r}; correct --truth=, or leave it out')
        os.replace(tmp, target)
    except (OSError, EOFError, zlib.error) as error:  # the last two: an incomplete or damaged .gz
        sys.exit(f'{getattr(error, "filename", None) or path}: {error}')
    finally:
        tmp.unlink(missing_ok=True)
    print('prepare', figures)
    print(f'{os.path.relpath(target)} is written; next: a config with dataset = {name!r}')
