"""The written form of answers: a graph of texts. Only the standard library.

A Place is a fixed text and then a Fork, a Fork the options that there are, each a text and then another Fork:

    {"tone":    "neutral" | "friendly"    ,"spam":    true | false    }
    Place       Fork                      (the end of each option's text)
"""
import json
from typing import NamedTuple


class Option(NamedTuple):
    """a way on from a Fork. made: the choices that it makes, (path of a Choice, number of its value) each; text: what
    is written then; fork: the next one, None at the end of the answer."""
    made: tuple
    text: str
    fork: object


class Fork:
    """a place in the answer at which several texts may follow. options: a list of Option."""

    def __init__(self, options=()):
        self.options = list(options)


class Place(NamedTuple):
    """what follows: a fixed text, and then a Fork, or None at the end."""
    text: str
    fork: object

    def after(self, text):
        return Place(text + self.text, self.fork)

    def options(self, made=(), text=''):
        """the options of a Fork that goes on here, after these choices and this text."""
        if text or self.text or self.fork is None:
            return [Option(made, text + self.text, self.fork)]
        return self.join(made, text)

    def join(self, made, text):
        """the same, with the options of the Fork themselves."""
        return [Option(made + inner.made, text + inner.text, inner.fork) for inner in self.fork.options]


class Style(NamedTuple):
    """how JSON is written. indent: None for one line, or the number of blanks."""
    indent: int = None

    def line(self, depth):
        return '' if self.indent is None else '\n' + ' ' * self.indent * depth

    def key(self, name):
        return json.dumps(name, ensure_ascii=False) + (':' if self.indent is None else ': ')

    def value(self, value, depth=1):
        """a JSON value as it stands in an object or list at this depth."""
        separators = (',', ':' if self.indent is None else ': ')
        text = json.dumps(value, ensure_ascii=False, indent=self.indent, separators=separators)
        return text if self.indent is None else text.replace('\n', self.line(depth))
