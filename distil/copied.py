"""A leaf of the answers whose value the text says. Only the standard library."""
import math
from contextlib import suppress

from distil.options import tidy
from distil.values import Mark, follow, group_of, path_of, plain, said

MARKS = 0x100000  # characters for private use: the k-th of them stands where the k-th copied value is written
EXAMPLES = {'text': 'x', 'number': 1, 'integer': 1, 'date': '2026-01-01', 'time': '12:00:00',
            'date-time': '2026-01-01T12:00:00'}


class Copied:
    """a leaf: a value that the text says. kind: 'text', copied word for word; 'number' or 'integer', of a number in the
    text; 'date', 'time' or 'date-time', of one in the text (places.py); 'option:folder', one of those for the property
    folder that come with the text (options.py). It is no Choice: its values are places of the text, and each text has
    others. mark: stands for it where it is written; number: from 0, see Schema."""
    is_list, about, number, choices, values, texts, names = False, '', 0, (), (), (), ()

    def __init__(self, keys, kind='text'):
        self.keys, self.kind, self.path, self.group = keys, kind, path_of(keys), group_of(keys)

    def __len__(self):
        return 0

    def __bool__(self):
        return True

    @property
    def is_number(self):
        return self.kind in ('number', 'integer')

    @property
    def mark(self):
        return chr(MARKS + self.number)

    @property
    def of(self):
        """the name of the property whose options it is one of."""
        return self.kind.partition(':')[2]

    @property
    def is_option(self):
        return self.kind.startswith('option:')

    @property
    def example(self):
        """a value that stands for any."""
        return EXAMPLES.get(self.kind, 'x')

    def describe(self, most=12):
        if self.is_option:
            return f'one of the options for {self.of}'
        return 'words of the text' if self.kind == 'text' else (
            f'{"an" if self.kind == "integer" else "a"} {self.kind} in the text')

    def check(self, value):
        """the value in its form: white space of a text is cleaned, 1.0 is 1. ValueError if it is of another type."""
        if isinstance(value, Mark):
            raise ValueError(f'it has no {self.path}')
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not (is_number if self.is_number else isinstance(value, str) and value.strip()):
            raise ValueError(f'{self.path} is {said(value)[:80]}, not {self.describe()}')
        return plain(value) if is_number else tidy(value) if self.is_option else ' '.join(value.split())

    def meant_by(self, truth):
        """the value that a truth means: a text, such as a cell of a table, may be a number."""
        if isinstance(truth, str) and self.is_number:
            with suppress(ValueError):
                return plain(float(truth))
        return truth

    def get(self, answer):
        return follow(answer, self.keys)

    def numbers(self, value):
        """its value, which has no number."""
        yield self.path, self.check(value)

    def fill(self, choose):
        return choose(self)

    def place(self, lead, rest, skip, style, depth):
        quote = '' if self.is_number else '"'
        return rest.after(lead + quote + self.mark + quote)

    def json_schema(self):
        if self.is_option:
            return {'type': 'string', 'x-options': True}
        if self.kind in ('text', 'number', 'integer'):
            return {'type': 'string' if self.kind == 'text' else self.kind}
        return {'type': 'string', 'format': self.kind}
