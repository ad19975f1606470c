"""JSON values, two marks beside them, and the paths that lead to a part of an answer. Only the standard library."""
import json


class Mark:
    """a value that is none of JSON: that a part is missing, or that it is there."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name

    def __reduce__(self):                                       # a copy is the same one
        return self.name.upper()


MISSING, PRESENT = Mark('missing'), Mark('present')

# -----------------------------------------------------------------------------
# JSON values


def plain(value):
    """a JSON value with whole numbers as such: 1.0 is 1, also in lists and objects."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


def json_text(value):
    """a JSON value as a text: two values are equal if their texts are. In Python 1 == True."""
    return value.name if isinstance(value, Mark) else json.dumps(value, sort_keys=True, default=repr)


def value_name(value):
    """a JSON value as a string, for the keys of a JSON object; see value_names."""
    return value if isinstance(value, str) else json_text(value)


def value_names(values):
    """JSON values as different strings, for the keys of a JSON object: True is 'true'. If two would be the same, as
    True and 'true', all are written as JSON: 'true' and '"true"'."""
    names = list(map(value_name, values))
    return names if len(set(names)) == len(names) else list(map(json_text, values))


def said(value):
    """a value in a message."""
    return value.name if isinstance(value, Mark) else json.dumps(value, ensure_ascii=False, default=repr)


def path_of(keys):
    """keys as one text: customer.mood, findings[0].kind."""
    return ''.join(f'[{key}]' if isinstance(key, int) else f'.{key}' for key in keys).removeprefix('.')


def group_of(keys):
    """the same without the numbers of items: findings[].kind."""
    return ''.join('[]' if isinstance(key, int) else f'.{key}' for key in keys).removeprefix('.')


def follow(answer, keys):
    """what the keys lead to in an answer, MISSING if there is no such part. None in keys stands for each item of a
    list: then it is the list of what they lead to in each, MISSING in those that have none."""
    for n, key in enumerate(keys):
        if key is None:
            return [follow(item, keys[n + 1:]) for item in answer] if isinstance(answer, list) else []
        known = isinstance(answer, dict) and key in answer or isinstance(key, int) and isinstance(
            answer, list) and key < len(answer)
        if not known:
            return MISSING
        answer = answer[key]
    return answer
