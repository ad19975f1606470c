"""The JSON object in what a model wrote, and where its values stand. Only the standard library.

    find_object('Sure! {"tone": "friendly"}')    # ({'tone': 'friendly'}, {'tone': (15, 25)})
"""
import json
import re

SPACE = re.compile(r'[ \t\r\n]*')
DECODER = json.JSONDecoder()


def parse_object(text, at):
    """(the JSON object that begins at text[at], {key: (start, end) of its value}, the end). ValueError if
    none does."""
    answer, spans = {}, {}
    skip = lambda at: SPACE.match(text, at).end()
    at = skip(at + 1)
    while text[at:at + 1] != '}':
        key, at = DECODER.raw_decode(text, at)
        at = skip(at)
        if not isinstance(key, str) or text[at:at + 1] != ':':
            raise ValueError(f'no key at {at}')
        start = skip(at + 1)
        answer[key], at = DECODER.raw_decode(text, start)
        spans[key] = start, at
        at = skip(at)
        if text[at:at + 1] == ',':
            at = skip(at + 1)
        elif text[at:at + 1] != '}':
            raise ValueError(f'the object does not end at {at}')
    return answer, spans, at + 1


def find_object(text):
    """(the last JSON object in a text, {key: (start, end) of its value, in characters}), or (None, {}).
    What a model thinks before (<think> ... </think>), what it says around the object and a fence are left
    aside."""
    at, found = text.rfind('</think>') + 1, (None, {})
    while (at := text.find('{', at)) >= 0:
        try:
            *found, at = parse_object(text, at)
        except (ValueError, RecursionError):
            at += 1
    return tuple(found)


def plain(value):
    """a JSON value in which whole numbers are int: 1.0 and 1 are one value, as in JavaScript; true is another."""
    if isinstance(value, list):
        return [*map(plain, value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value
