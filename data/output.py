"""What every prepare.py does with its file: it is written whole or not at all. Only the standard library.

    exit_on_stop()                              # Ctrl-C and kill: one line, and nothing half-written stays
    write_lines(target, records)                # a .jsonl of these dicts
    with replace_file(target) as file: ...      # or whatever else
"""
import io
import json
import os
import secrets
import signal
import sys
from contextlib import contextmanager


def exit_on_stop():
    """makes Ctrl-C, kill and the end of a terminal exit with one line and status 1, so that
    `finally` is reached."""
    def stop(*_):
        sys.exit('\nstopped')
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, stop)


class NamedFile(io.FileIO):
    """a file whose errors have its name: without it nobody knows whether an input or the output
    failed."""

    def __init__(self, path, target):
        self.target = str(target)
        with self.named():
            super().__init__(path, 'w')

    @contextmanager
    def named(self):
        try:
            yield
        except OSError as error:                                # such as a full disk
            raise OSError(error.errno, f'cannot be written: {error.strerror}', self.target) from None

    def write(self, content):
        with self.named():
            return super().write(content)


@contextmanager
def replace_file(target):
    """a text file, in UTF-8, that takes the place of target when the block ends; if anything fails,
    what was there stays. OSError with target as its filename if it cannot be written."""
    tmp = target.with_suffix(f'.{secrets.token_hex(4)}.tmp')    # its own, for another run may write now
    try:
        # half an emoji is \ud83d in JSON, too
        with io.TextIOWrapper(io.BufferedWriter(NamedFile(tmp, target), 1 << 20), 'utf-8', 'backslashreplace') as file:
            yield file
        os.replace(tmp, target)
    finally:
        tmp.unlink(missing_ok=True)


def write_text(target, parts):
    """writes a text, given in parts, whole or not at all. Exits with a message if that fails."""
    try:
        with replace_file(target) as file:
            file.writelines(parts)
    except OSError as error:
        sys.exit(describe_error(error))


def write_lines(target, records):
    """writes a .jsonl of these records (dicts), whole or not at all. Exits with a message if that
    fails."""
    write_text(target, (json.dumps(record, ensure_ascii=False) + '\n' for record in records))


def describe_error(error, path=''):
    """an OSError of a file as one line. path: of the file, if the error does not know it."""
    return f'{error.filename or path}: {error.strerror or error}'
