"""The JSON object in what a model wrote, and where its values stand. Only the standard library.

    find_object('Sure! {"tone": "friendly"}')    # ({'tone': 'friendly'}, {('tone',): (15, 25), (): (6, 26)})
"""
import json
import re

SPACE = re.compile(r'[ \t\r\n]*')
DECODER = json.JSONDecoder()


def skip(text, at):
    return SPACE.match(text, at).end()


def parse_value(text, at, keys, spans):
    """(the JSON value that begins at text[at], the end). Adds {keys that lead to it: (start, end)} to spans, of all its
    parts, too. ValueError if none does."""
    start, opening = at, text[at:at + 1]
    if opening not in ('{', '['):
        value, at = DECODER.raw_decode(text, at)
    else:
        value, at = ({}, skip(text, at + 1)) if opening == '{' else ([], skip(text, at + 1))
        closing = '}' if opening == '{' else ']'
        while text[at:at + 1] != closing:
            key = len(value)
            if opening == '{':
                key, at = DECODER.raw_decode(text, at)
                at = skip(text, at)
                if not isinstance(key, str) or text[at:at + 1] != ':':
                    raise ValueError(f'no key at {at}')
                at = skip(text, at + 1)
            part, at = parse_value(text, at, (*keys, key), spans)
            if opening == '{':
                value[key] = part
            else:
                value.append(part)
            at = skip(text, at)
            if text[at:at + 1] == ',':
                at = skip(text, at + 1)
            elif text[at:at + 1] != closing:
                raise ValueError(f'no end at {at}')
        at += 1
    spans[keys] = start, at
    return value, at


def find_object(text):
    """(the last JSON object in a text, {keys that lead to a part of it, a tuple: (start, end), in characters}), or
    (None, {}). What a model thinks before (<think> ... </think>), what it says around the object and a fence are left
    aside."""
    at, found = text.rfind('</think>') + 1, (None, {})
    while (at := text.find('{', at)) >= 0:
        spans = {}
        try:
            answer, at = parse_value(text, at, (), spans)
            found = answer, spans
        except (ValueError, RecursionError):
            at += 1
    return found


def plain(value):
    """a JSON value in which whole numbers are int: 1.0 and 1 are one value, as in JavaScript; true is another."""
    if isinstance(value, list):
        return [*map(plain, value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_json(cell):
    """the object or list that a text is as JSON; else the value itself."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ('{', '['):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass
    return cell
