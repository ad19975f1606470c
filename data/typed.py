"""Tables with types, for prepare.py: .xlsx, .parquet and .arrow files -> their texts.

A class label of a Hugging Face data set is a number; the file says what its name is, and that is the label.
"""
import json
import re
import sys
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from tables import find_column, find_value, read_table  # it lies beside this file


@contextmanager
def use_package(package, path, what):
    """exits with a message if the block cannot import an optional package, or cannot read the
    file."""
    try:
        yield
    except ImportError:
        sys.exit(f'{path} is {what}; to read it: pip install {package}')
    except Exception as error:  # whatever the package raises for a damaged file
        sys.exit(f'{path} cannot be read as {what}: {" ".join(str(error).split())}')


def cell_text(cell):
    """a cell of a typed table as text: numbers, true and false as in JSON; '' for nothing and NaN.
    Lists, objects and bytes that are no UTF-8 stay as they are: they are no text."""
    if cell is None or cell != cell:
        return ''
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, (bool, int, float)):
        return json.dumps(cell)
    if isinstance(cell, bytes):
        try:
            return cell.decode()                                # older programs write texts in this way
        except ValueError:
            return cell
    return cell if isinstance(cell, (list, dict)) else str(cell)


def cell_label(cell):
    """a cell of a typed table as a label: its text, or the list or object; '' if JSON does not have
    it."""
    cell = cell_text(cell)
    try:
        return '' if isinstance(cell, bytes) else json.loads(json.dumps(cell, allow_nan=False))
    except (ValueError, TypeError):                             # NaN, a date in a list
        return ''


# -----------------------------------------------------------------------------
# Excel

MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*\bref="(\w+:\w+)"')  # x: a prefix of some programs
NO_VALUE = re.compile(rb'''
    <(?:\w+:)?c\s([^>]*)>\s*                                   # a cell, as <c r="B2">
    <(?:\w+:)?f\b(?:[^>]*/>|[^<]*</(?:\w+:)?f>)\s*             # with a formula
    (?:<(?:\w+:)?v\s*/>|<(?:\w+:)?v>\s*</(?:\w+:)?v>)?\s*</    # and no value
    ''', re.X)


def scan_sheet(file):
    """([range, as B2:B9] of the merged cells, Counter of the formulas without a value in each
    column, as B) of the opened XML of a sheet. The merged cells stand behind all rows; this scan
    takes a thirtieth of the reading."""
    merged, formulas, rest = [], Counter(), b''
    while rest := rest + (block := file.read(1 << 20)):
        end = rest.rfind(b'c>') + 1 if block else len(rest)     # after </c, so that no cell is cut in two
        merged += [ref.decode() for ref in MERGED.findall(rest, 0, end)]
        for cell in NO_VALUE.findall(rest, 0, end):
            column = re.search(rb'\br="([A-Z]+)', cell)
            if b't="str"' not in cell:                          # that is an empty text
                formulas[column[1].decode() if column else '?'] += 1
        rest = rest[end:]
    return merged, formulas


def fill_merged(rows, ranges):
    """yields rows, lists of texts, with the value of each merged cell in all of its rows. ranges:
    (first column, first row, last column, last row), from 1. Those of the first row that is not
    empty stay: they are a header."""
    starts, below, is_header = {}, {}, True                     # below: {column: (last row, value)}
    for column, first, _, last in ranges:
        starts.setdefault(first, []).append((column - 1, last))
    for n, cells in enumerate(rows, 1):
        for column, (last, value) in [*below.items()]:
            if n > last:
                del below[column]
                continue
            cells += [''] * (column + 1 - len(cells))
            cells[column] = value
        if not is_header:
            below |= {column: (last, cells[column]) for column, last in starts.get(n, ()) if len(cells) > column}
        is_header = is_header and not any(cells)
        yield cells


def xlsx_rows(raw, path, notes):
    """yields the rows of the first sheet of an Excel workbook as lists of texts. Adds to notes, a
    list of sentences, what cannot be read."""
    with use_package('openpyxl', path, 'an Excel workbook'):
        import openpyxl
        warnings.simplefilter('ignore')  # about formats that it does not know
        book = openpyxl.load_workbook(raw, read_only=True, data_only=True)
        sheet = book.worksheets[0]
        if len(book.worksheets) > 1:
            print(f'{path} has {len(book.worksheets)} sheets; only the first, {sheet.title!r}, is read')
        with zipfile.ZipFile(raw).open(sheet._worksheet_path) as file:
            merged, formulas = scan_sheet(file)
        if formulas:
            notes.append(f'{path}: {formulas.total()} formulas, in the columns {", ".join([*formulas][:9])}, have no '
                         'stored value, and count as empty; open the file in a spreadsheet program and save it')
        sheet.reset_dimensions()  # some programs write wrong ones, which would cut the rows
        # _x000D_ is a carriage return
        rows = ([cell_text(cell).replace('_x000D_', '\r') for cell in row] for row in sheet.iter_rows(values_only=True))
        for cells in fill_merged(rows, map(openpyxl.utils.range_boundaries, merged)):
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield cells


# -----------------------------------------------------------------------------
# Parquet and Arrow


def find_features(metadata, path):
    """{column: its type} as Hugging Face datasets describe them, in the metadata of a schema or
    else in the dataset_info.json beside the file; {} if they do not."""
    info = Path(path).parent / 'dataset_info.json'
    beside = info.read_bytes() if path != '-' and info.is_file() else b''
    for content in ((metadata or {}).get(b'huggingface', b''), beside):
        try:
            known = json.loads(content)
            features = known.get('info', known)['features']
            if isinstance(features, dict):
                return features
        except (ValueError, LookupError, TypeError, AttributeError):  # none, or of another kind
            pass
    return {}


def name_labels(value, feature):
    """a value with the names of its class labels in place of their numbers; -1 is no label: None.
    feature: its type, as find_features has it. ValueError if a number has no name."""
    if isinstance(feature, list):                               # as older versions write the type of a list
        return name_labels(value, feature[0] if feature else {})
    if not isinstance(feature, dict) or value is None:
        return value
    kind = feature['_type'] if isinstance(feature.get('_type'), str) else ''
    inner = feature['feature'] if kind and 'feature' in feature else feature  # of a list
    if isinstance(value, list):
        return [name_labels(part, inner) for part in value]
    if isinstance(value, dict) and isinstance(inner, dict):     # a list of objects is kept as an object of lists
        return {key: name_labels(part, inner.get(key)) for key, part in value.items()}
    names = feature.get('names')
    if kind != 'ClassLabel' or not isinstance(names, list) or not isinstance(value, int):
        return value
    if value >= len(names):
        raise ValueError(f'a class label is {value}, but there are {len(names)} names')
    return names[value] if value >= 0 else None


def open_batches(raw, kind):
    """(schema, a function from names of columns to batches of their rows) of a Parquet or Arrow
    file. The latter is a file or a stream, as Hugging Face datasets save it."""
    if kind == 'parquet':
        from pyarrow.parquet import ParquetFile
        file = ParquetFile(raw)
        return file.schema_arrow, lambda wanted: file.iter_batches(columns=wanted)
    from pyarrow import ipc
    if raw.peek(6)[:6] != b'ARROW1':
        stream = ipc.open_stream(raw)
        return stream.schema, lambda _: stream
    file = ipc.open_file(raw)
    return file.schema, lambda _: map(file.get_batch, range(file.num_record_batches))


def read_typed(raw, path, kind, column, options):
    """yields what read_table yields for each row of a Parquet or Arrow file."""
    with use_package('pyarrow', path, {'parquet': 'a Parquet file', 'arrow': 'an Arrow file'}[kind]):
        schema, read_batches = open_batches(raw, kind)
        names, features = schema.names, find_features(schema.metadata, path)
        top = column if column in names else column.partition('.')[0]
        top = names[find_column(names, top, path)]
        others = (names[find_column(names, name, path, option)] for name, option in options.items())
        wanted = list(dict.fromkeys([top, *others]))
        nested = column not in ('', top)

        def read_rows():
            for batch in read_batches(wanted):
                for row in zip(*(batch[name].to_pylist() for name in wanted)):
                    values = [name_labels(value, features.get(name)) for name, value in zip(wanted, row)]
                    text = find_value({top: values[0]}, column, path) if nested else values[0]
                    yield [cell_text(text), *map(cell_label, values[1:])]
        yield from read_table(chain([wanted], read_rows()), path, top, options)
