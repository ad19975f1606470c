"""Keys of servers: read from the environment, checked, and kept out of what is shown.

    key = read_key('TEACHER_API_KEY')       # '' if there is none
    print(hide_keys(str(error)))            # stars in place of each key that was read
"""
import json
import logging
import os
import re
from contextlib import suppress
from urllib.parse import quote, urlsplit

from config import stop

SHORTEST = 8  # characters of a key that is hidden: 'none', for a server that wants no key, may be any word
SPELLINGS = set()  # of the keys that were read, as they may appear in a message


def check_key(key, name):
    """a key without the white space around it, which a file or a .env leaves there. From now on it is hidden. Exits
    with a message, which does not show the key, if no HTTP header can hold it. name: of its variable or setting."""
    stripped = key.strip()
    if key and not stripped:
        stop(f'{name} is set, but there is only white space in it; set it to the key, or remove it')
    if wrong := re.search(r'[^\x20-\x7e]', stripped):
        stop(f'{name}: character {wrong.start() + 1} is {describe(wrong[0])}, which no key in an HTTP header has; '
             'copy the key again')
    if len(stripped) >= SHORTEST:
        SPELLINGS.update({stripped, repr(stripped)[1:-1], json.dumps(stripped)[1:-1], quote(stripped),
                          quote(stripped, safe='')})
    return stripped


def describe(char):
    """a character by its number, such as U+201C."""
    return f'U+{ord(char):04X}'


def read_key(name):
    """the key in a variable of the environment, '' if there is none, see check_key."""
    return check_key(os.environ.get(name, ''), name)


def hide_password(url):
    """hides the password that a URL has, http://name:password@host, if it has one."""
    with suppress(ValueError):
        password = urlsplit(url).password or ''
        SPELLINGS.update({password} if len(password) >= SHORTEST else ())


def hide_keys(text):
    """a text, or bytes, with stars in place of all keys that were read: as many, so that it keeps its length."""
    for key in sorted(SPELLINGS, key=len, reverse=True):
        text = text.replace(key, '*' * len(key)) if isinstance(text, str) else text.replace(
            key.encode(), b'*' * len(key))
    return text


async def hide_in_stream(parts):
    """yields the parts of a body, bytes, with all keys hidden, also one that is cut by the end of a part."""
    keys, held = [key.encode() for key in SPELLINGS], b''
    async for part in parts:
        part = hide_keys(held + part)
        n = max((n for key in keys for n in range(1, len(key)) if part.endswith(key[:n])), default=0)
        part, held = part[:len(part) - n], part[len(part) - n:]  # held: it may be the beginning of a key
        if part:
            yield part
    if held:
        yield held


def failure_text(error):
    """what the exception of an HTTP client says, in one line and without keys."""
    if type(error).__name__ == 'LocalProtocolError':            # its text is the header
        return 'the request has a header that HTTP does not allow'
    return hide_keys(' '.join(str(error).split()) or type(error).__name__)[:300]


class Formatter(logging.Formatter):
    """of log lines: without keys, whatever wrote them."""

    def format(self, record):
        return hide_keys(super().format(record))
