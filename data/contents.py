"""What a file holds, whatever its name, and its lines, for prepare.py: plain or packed, in UTF-8 or UTF-16."""
import codecs
import gzip
import io
import re
import sys
import zipfile

UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
BINARY = {  # what a file is, and what to do: how it begins
    'a zip archive or a damaged workbook; unpack it, or save its table as .csv': (b'PK\3\4', b'PK\5\6'),
    'packed; unpack it first': (b'BZh91AY', b'\xfd7zXZ', b'(\xb5/\xfd', b'7z\xbc\xaf', b'Rar!\x1a'),
    'an old or locked Office file (.xls, .doc); save it as .xlsx or .csv': (b'\xd0\xcf\x11\xe0',),
    'an SQLite database; save its table as .csv': (b'SQLite format 3',),
    'a PDF; save its texts as .txt': (b'%PDF-',),
    'an image; a text file is needed': (b'\x89PNG', b'\xff\xd8\xff', b'GIF8', b'II*\0', b'MM\0*')
}


def open_bytes(path):
    """opens a file, or standard input if path is -, and unpacks it if it is gzip, whatever its name."""
    raw = sys.stdin.buffer if path == '-' else open(path, 'rb')
    while raw.peek(2)[:2] == b'\x1f\x8b':
        raw = io.BufferedReader(gzip.open(raw))
    if raw.peek(4)[:4] in (b'PAR1', b'ARRO', b'PK\3\4') and not raw.seekable():  # these are read from their end
        raw = io.BufferedReader(io.BytesIO(raw.read()))
    return raw


def find_kind(raw, path, is_table):
    """what a file holds: csv, tsv, jsonl, json, txt, xlsx, parquet or arrow. Binary content decides, else the name.
    Exits with a message if the content is binary of another kind. is_table: True for csv instead of txt."""
    head = raw.peek(4096)[:4096]
    if head.startswith(b'PAR1'):
        return 'parquet'
    if head.startswith((b'ARROW1', b'\xff\xff\xff\xff')):
        return 'arrow'
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
    kind = re.search(r'\.(csv|tsv|jsonl|ndjson|json|xls|xlsx|parquet|arrow)(\.gz)?$', path.lower())
    kind = kind[1] if kind else 'csv' if is_table else 'txt'
    if kind in ('xls', 'xlsx', 'parquet', 'arrow'):
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
