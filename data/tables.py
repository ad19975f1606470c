"""Tables, for prepare.py: .csv files, and the rows of those that typed.py reads -> their texts.

Rows are lists of texts. Whatever a file's column is called or separated by, a message says what to type.
"""
import csv
import json
import re
import sys
import textwrap
from collections import Counter
from itertools import chain, islice

ONE_COLUMN = '\x1f'  # as a delimiter: no text has it
DELIMITERS = {'comma': ',', 'semicolon': ';', 'tab': '\t', 'pipe': '|', 'none': ONE_COLUMN}
QUOTED = re.compile(r'(?<![^,;\t|\r\n]) *"[^"]*(?:""[^"]*)*"(?![^,;\t|\r\n])')  # a cell in quotes
CONSTANT = re.compile('true|false|0|-?[1-9][0-9]{0,14}')

TEST = 'test', 'val', 'validation', 'valid', 'dev', 'eval', 'held_out'  # names of a part to measure on


def read_part(split):
    """'test' if a split, such as a cell or the value of a line, is one of TEST; 'train' for train,
    or nothing. ValueError if it is anything else."""
    word = '' if split is None else str(split).strip().lower().replace('-', '_')
    if word not in ('', 'train', *TEST):
        raise ValueError(f'its split is {split!r}, neither train nor one of {", ".join(TEST)}')
    return 'test' if word in TEST else 'train'


def find_column(names, column, path, option='column', hint=''):
    """the index of the column named `column`, or else of the column of the text. Exits with a
    message if none or several are known. option, hint: for the message."""
    found = [i for i, name in enumerate(names) if (name == column if column else name.lower() == 'text')]
    if len(found) == 1 or not column and len(names) == 1:
        return found[0] if found else 0
    if found:
        sys.exit(f'{path} has {len(found)} columns called {names[found[0]]}; rename one')
    problem = f'has no column {column!r}' if column else 'has several columns, and none is called text'
    shown = textwrap.shorten(', '.join(names)[:2000], 500, placeholder=' ...')
    sys.exit(f'{path} {problem}; add --{option}= with one of: {shown}{hint}')


def find_value(value, column, path):
    """the value of an object (a dict that is not empty) under a column, which may name nested keys
    with dots: request.text, messages.0.content. None if there is nothing to look in. Exits with a
    message if a key is unknown."""
    for key in column.split('.') if column not in value else [column]:
        if isinstance(value, list):                             # a number counts from 0
            value = value[int(key)] if key.isdecimal() and int(key) < len(value) else None
        elif isinstance(value, dict):
            names = [*value]
            value = value[names[find_column(names, key, path)]] if names else None
        else:
            return None
    return value


def find_delimiter(start, column, path):
    """the delimiter of a table that starts with these lines: the one that makes a cell of its
    header the name of the text's column, else one that all lines have, or nine in ten equally
    often, else ONE_COLUMN."""
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
    """yields the rows of a .csv or .tsv as lists of cells. Exits with a message if it is no
    table."""
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


def read_cell(cell, is_answer):
    """a cell of a column with labels. In an answer a text is what it means: true, false or a whole
    number, in any case; else it is itself, as is a list."""
    cell = cell.strip() if isinstance(cell, str) else cell
    is_constant = is_answer and isinstance(cell, str) and CONSTANT.fullmatch(cell.lower())
    return json.loads(cell.lower()) if is_constant else cell


def by_option(cells, options):
    """{option: {column: its cell}} of {column: its cell}. options: {column: the option that names
    it}."""
    parts = {}
    for column, cell in cells.items():
        parts.setdefault(options[column], {})[column] = cell
    return parts


def read_table(rows, path, column, options, hint=''):
    """yields (text, {option: {column: cell}}) for each row but the header. rows: lists of texts,
    but for what is no text in a table with types; options: {column: the option that names it}.
    Exits with a message if a column is unknown."""
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
        if options:
            sys.exit(f'{path} has no header, so it has no column {[*options][0]!r}; add a header')
    else:
        at = find_column(names, column, path, hint='; or its number, if there is no header' + hint)
    columns = {name: find_column(names, name, path, option) for name, option in options.items()}
    for row in rows:
        if len(names) == 1 and any(row[1:]):  # only in a workbook
            sys.exit(f'{path} has one cell in its first row, more below; delete the rows above the header')
        cells = {name: read_cell(row[i], options[name] == 'answer') for name, i in columns.items() if len(row) > i}
        cells = {name: cell for name, cell in cells.items() if cell != ''}
        yield row[at] if len(row) > at else '', by_option(cells, options)
