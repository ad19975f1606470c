"""Your own texts, in whatever file they are -> data/<dataset>/input.jsonl

    python data/prepare.py mine messages.csv                  # writes data/mine/input.jsonl
    python data/prepare.py mine a.csv b.csv.gz --column=body  # several files, the text in column `body`
    python data/prepare.py mine rated.csv --column=body --truth=team,urgent
    some-command | python data/prepare.py mine -              # a text a line

.txt: a text a line. .csv, .tsv: a table with a header, or one column. .jsonl: {"text": ...} a line. .json: a
list of such objects, or of texts. Each also .gz, in upper or lower case. Pipes and other names are read as
.txt, with --column as .csv. UTF-8, or UTF-16 by its mark; bytes that are neither become U+FFFD, and their
lines are counted.

The text is in the column (or under the key) that --column names, else in `text`, else in the only one. A
table without a header wants its number: --column=2. --truth names columns with the truth of a field: never
trained on, evaluate.py compares with it. In .json and .jsonl `truth`, `answer` and `probabilities` are kept.
Texts that are empty, or came before, are left out. Where anything is wrong, an earlier input.jsonl stays as
it is.
"""
import codecs
import csv
import gzip
import io
import json
import os
import re
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

KEPT = 'truth', 'answer', 'probabilities'


def open_lines(path, counts):
    """yields the lines of a file, or of standard input where path is -; tells counts of those that are not
    UTF-8."""
    raw = sys.stdin.buffer if path == '-' else open(path, 'rb')
    if raw.peek(2)[:2] == b'\x1f\x8b':  # whatever its name
        raw = io.BufferedReader(gzip.open(raw))
    utf16 = raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ('utf-16', 'replace') if utf16 else ('utf-8-sig', 'surrogateescape')
    for line in io.TextIOWrapper(raw, encoding, errors, newline=''):
        if re.search('[\ud800-\udfff]', line):  # the bytes that could not be decoded
            counts['bad_utf8'] += 1
            line = line.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
        yield line.replace('\0', '')


def find_column(names, column, path):
    """the number of the column that holds the text; ends in one line where none is known to."""
    lower = [name.lower() for name in names]
    if column and column in names:
        return names.index(column)
    if not column and ('text' in lower or len(names) == 1):
        return lower.index('text') if 'text' in lower else 0
    why = f'has no column {column!r}' if column else 'has several columns, and none is called text'
    sys.exit(f'{path} {why}; say --column= one of: {", ".join(names)}')


def as_value(cell):
    """a cell as the JSON value it looks like (a number, true, false, null), else as text."""
    try:
        return json.loads(cell.lower() if cell.lower() in ('true', 'false') else cell)
    except ValueError:
        return cell


def read_table(lines, path, delimiter, column, truths):
    """yields (text, {'truth': ...} where there is one) for each row of a .csv or .tsv."""
    csv.field_size_limit(1 << 30)
    start = list(islice(lines, 100))
    if not delimiter:
        try:
            delimiter = csv.Sniffer().sniff(''.join(start), ',;\t|').delimiter
        except csv.Error:  # one column
            delimiter = ','
    rows = csv.reader(chain(start, lines), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        one = len(names) == 1 and names[0].lower() not in ('text', column.lower())
        if column.isdecimal() and column not in names or one and not column:
            # no header: the first row is one of the others
            at, rows = int(column or 1) - 1, chain([names], rows)
            if not 0 <= at < len(names):
                sys.exit(f'{path} has no column {column}; there are {len(names)}, counted from 1')
            if truths:
                sys.exit(f'{path} has no header, so no column {truths[0]!r}; write one above it')
        else:
            at = find_column(names, column, path)
        places = {truth: find_column(names, truth, path) for truth in truths}
        for row in rows:
            truth = {name: as_value(row[place]) for name, place in places.items() if len(row) > place}
            if len(names) == 1:
                row = [delimiter.join(row)]  # what looked like more columns is a text with commas
            if row:
                yield row[at] if len(row) > at else '', {'truth': truth} if truth else {}
    except csv.Error as error:
        sys.exit(f'{path} cannot be read as a table: {error}; is a quote left open?')


def read_objects(objects, path, column, counts):
    """yields (text, what is kept beside it) for each JSON value: a text, or an object with one."""
    for value in objects:
        if isinstance(value, str):
            yield value, {}
        elif isinstance(value, dict):
            names = [name for name in value if name not in KEPT]
            text = value[names[find_column(names, column, path)]] if names else ''
            yield text, {key: value[key] for key in KEPT if key in value}
        else:
            counts['bad_json'] += 1


def parse_lines(lines):
    """yields the JSON value of each line, None where it has none."""
    for line in lines:
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def read(path, column, truths, counts):
    """yields (text, what is kept beside it) of a file of any kind."""
    kind = re.search(r'\.(csv|tsv|jsonl|json)(\.gz)?$', path.lower())
    kind = kind[1] if kind else 'csv' if column else 'txt'
    lines = open_lines(path, counts)
    if kind in ('csv', 'tsv'):
        yield from read_table(lines, path, '\t' if kind == 'tsv' else '', column, truths)
    elif kind == 'jsonl':
        yield from read_objects(parse_lines(lines), path, column, counts)
    elif kind == 'json':
        try:
            values = json.loads(''.join(lines))
        except (ValueError, RecursionError) as error:
            sys.exit(f'{path} is no JSON: {error}')
        if not isinstance(values, list):
            sys.exit(f'{path} must hold a list, not one {type(values).__name__}')
        yield from read_objects(values, path, column, counts)
    else:
        yield from ((line, {}) for line in lines)


if __name__ == '__main__':
    if {'-h', '--help'} & {*sys.argv}:
        sys.exit(print(__doc__))
    options = dict(arg[2:].partition('=')[::2] for arg in sys.argv[1:] if arg.startswith('--'))
    if unknown := options.keys() - {'column', 'truth'}:
        sys.exit(f'there is no --{unknown.pop()}; there are --column= and --truth=')
    name, *paths = [arg for arg in sys.argv[1:] if not arg.startswith('--')] or ['']
    if not paths or not re.fullmatch(r'\w[\w.-]*', name, re.ASCII):
        sys.exit('run: python data/prepare.py NAME FILE... [--column=C] [--truth=C,C]; NAME: of a dataset')
    for path in paths:
        if path != '-' and (not os.path.exists(path) or os.path.isdir(path)):
            sys.exit(f'{path} is a directory' if os.path.isdir(path) else f'{path} does not exist')
    target = Path(__file__).absolute().parent / name / 'input.jsonl'
    tmp, counts, seen = target.with_suffix('.tmp'), Counter(), set()
    truths = [column for column in options.get('truth', '').split(',') if column]
    try:
        target.parent.mkdir(exist_ok=True)
        with open(tmp, 'w', encoding='utf-8') as file:
            for path in paths:
                for text, beside in read(path, options.get('column', ''), truths, counts):
                    text = ' '.join(text.split()) if isinstance(text, str) else ''
                    counts['read'] += 1
                    reason = 'empty' if not text else 'duplicate' if text in seen else 'kept'
                    counts[reason] += 1
                    if reason == 'kept':
                        seen.add(text)
                        file.write(json.dumps({'text': text, **beside}) + '\n')
        if not counts['kept']:
            sys.exit(f'there is no text in {", ".join(paths)}')
        os.replace(tmp, target)
    except (OSError, EOFError) as error:  # EOFError: a .gz cut short
        sys.exit(f'{getattr(error, "filename", None) or ", ".join(paths)}: {error}')
    finally:
        tmp.unlink(missing_ok=True)
    shown = ['read', 'kept', 'empty', 'duplicate', 'bad_utf8'] + ['bad_json'] * bool(counts['bad_json'])
    print('prepare', *(f'{key}={counts[key]}' for key in shown))
    print(f'{os.path.relpath(target)} is there; next: a config with dataset = {name!r}')
