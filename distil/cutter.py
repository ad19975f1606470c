"""The written form of the answers (schema.Schema.place), cut into tokens: the parts of an automaton.

    cutter = Cutter(schema.place(), lambda text: tokenizer.encode(text, add_special_tokens=False))
    make_parts(cutter.start, cutter.forks)                      # for automaton.Automaton
"""
import math
import re
from functools import lru_cache, partial
from typing import NamedTuple

from distil.copied import MARKS
from distil.written import Option, Place

MARKED = re.compile(f'([{chr(MARKS)}-{chr(MARKS + 0xffff)}])')


def common_prefix(seqs):
    """length of the longest prefix that all these sequences share."""
    n = 0
    while all(len(s) > n for s in seqs) and len({s[n] for s in seqs}) == 1:
        n += 1
    return n


def form_of(text):
    """the last two characters of a text, all letters and digits being one."""
    return re.sub(r'\w', 'a', text[-2:])


class Way(NamedTuple):
    """an option of a fork, in tokens. made: see written.Option; tokens: ids, then output indices; following: number of
    the next fork, or None; text: what the tokens spell, without that of the end token."""
    made: tuple
    tokens: tuple
    following: int
    text: str


class Encoding(NamedTuple):
    """ids of a text, and the characters of each token, as those of tokenizers."""
    ids: list
    offsets: list


def encode_pieces(text, encode):
    """the Encoding of a text with marks of copied values (copied.Copied): what is between two of them is encoded alone,
    since the value stands there. A mark is two tokens, the first and the last place of the value: the id -1 - k for
    the k-th one."""
    ids, offsets, at = [], [], 0
    for piece in MARKED.split(text):
        if MARKED.fullmatch(piece):
            ids += 2 * [-1 - (ord(piece) - MARKS)]
            offsets += 2 * [(at, at + 1)]
        elif piece:
            encoding = encode(piece)
            ids += encoding.ids
            offsets += [(at + begin, at + end) for begin, end in encoding.offsets]
        at += len(piece)
    return Encoding(ids, offsets)


class Cutter:
    """Cuts the written form of the answers (schema.Schema.place) into tokens, at its forks.

    A token may reach over a fork, from the text before it into that after it. So texts are encoded within whole
    answers, and the answers are cut where a token begins whatever is chosen: at the fork or a little before it. The
    texts that lead to a fork may end in different ways, such as "a" and 1; each way is a fork of its own.

    start, start_text: the ids before the first fork, and their text; forks: [list of Way]. encode: text ->
    tokenizers.Encoding. ValueError if the tokens of two values merge.
    """

    def __init__(self, place, encode):
        self.encode, self.endings, self.number = (
            lru_cache(maxsize=100_000)(partial(encode_pieces, encode=encode)), {}, {})
        first = place.fork
        if first is None:
            if not MARKED.search(place.text):
                raise ValueError('nothing to decide: the schema allows one answer alone')
            self.start, self.start_text, self.forks = tuple(self.encode(place.text).ids), place.text, []
            return
        while True:
            self.edges = {}                                     # {fork: [(text before an option, the option)]}
            todo = [('', Option((), place.text, first))]
            while todo:
                before, option = todo.pop(0)
                if option.fork is not None:
                    if option.fork not in self.edges:
                        todo += [(before + option.text, following) for following in option.fork.options]
                    self.edges.setdefault(option.fork, []).append((before, option))
            self.cuts = {fork: self.find_cuts(fork) for fork in self.edges}  # {fork: {text: how far before it}}
            if all(self.cuts.values()):
                break
            self.endings.clear()
        tail, begin = self.tail_of(first, place.text)
        self.start_text = place.text[:begin]
        self.start, self.forks = self.ids_between('', place.text + self.ending(first), 0, begin), []
        todo = [(first, tail, place.text[:begin])]
        self.number[first, tail] = 0
        while todo:
            fork, tail, before = todo.pop(0)
            ways = []
            for option in fork.options:
                text, end, key = tail + option.text, None, None
                if option.fork is not None:
                    key = option.fork, self.tail_of(option.fork, option.text)[0]
                    end = len(before) + len(text) - len(key[1])
                    if key not in self.number:
                        self.number[key] = len(self.number)
                        todo.append((*key, (before + text)[:end]))
                ids = self.ids_between(before, text + self.ending(option.fork), len(before), end)
                spelled = text[:None if end is None else end - len(before)]
                ways.append(Way(option.made, ids, self.number.get(key), spelled))
            self.forks.append(ways)
        for (fork, _), ways in zip(self.number, self.forks):
            for n, way in enumerate(ways):                      # what follows it must tell it from a longer one
                after = set() if way.following is None else {w.tokens[:1] for w in self.forks[way.following]}
                longer = {w.tokens[len(way.tokens):][:1] for k, w in enumerate(ways)
                          if k != n and w.tokens[:len(way.tokens)] == way.tokens}
                if () in longer or longer & after:
                    self.refuse(fork)

    def refuse(self, fork):
        raise ValueError(f'the tokens of field {fork.options[0].made[0][0]!r} merge with those of the field before; '
                         'use indent = 2')

    def ending(self, fork):
        """the shortest text of an answer from a fork on."""
        stack = [fork]
        while stack:
            at = stack[-1]
            todo = [] if at is None else [
                o.fork for o in at.options if o.fork is not None and o.fork not in self.endings]
            stack += todo
            if not todo:
                stack.pop()
                self.endings[at] = '' if at is None else min(
                    (o.text + self.endings.get(o.fork, '') for o in at.options), key=len)
        return self.endings[fork]

    def begins(self, before, edge, option):
        """where tokens begin in the option that leads to a fork, counted from its end, if this other one follows."""
        text, end = edge.text, len(before) + len(edge.text)
        found = self.encode(before + text + option.text + self.ending(option.fork)).offsets
        return {begin - end for begin, _ in found if min(end - len(text) + 1, end) <= begin <= end}

    def find_cuts(self, fork):
        """{text of an option that leads to a fork: where to cut, counted from its end}. {} if there is no such place
        because an option is but a bracket: then it is written together with the options that follow."""
        left, cuts = self.edges[fork], {}
        while left:
            places = set.intersection(*(self.begins(*left[0], option) for option in fork.options))
            alike = [edge for edge in left if form_of(edge[1].text) == form_of(left[0][1].text)]
            shared = places.intersection(*(self.begins(*edge, fork.options[0]) for edge in alike))
            shared = {cut for cut in shared if len({edge.text[len(edge.text) + cut:] for _, edge in alike}) == 1}
            if not places:
                short = [edge for _, edge in alike if not set(edge.text) - set('{}[], \n')]
                for other in self.edges if short else ():
                    other.options = [one for option in other.options for one in (
                        Place('', fork).join(option.made, option.text) if option in short else [option])]
                if not short or len(fork.options) > 1000:
                    self.refuse(fork)
                return {}
            cut = max(shared or places)
            tail = left[0][1].text[len(left[0][1].text) + cut:]
            chosen = alike if shared else [edge for edge in alike if edge[1].text.endswith(tail)
                                           and cut in self.begins(*edge, fork.options[0])]
            cuts |= {edge.text: cut for _, edge in chosen}
            left = [edge for edge in left if edge[1].text not in cuts]
        return cuts

    def tail_of(self, fork, text):
        """(the end of an option's text that leads to a fork, from its cut on; where that begins)."""
        begin = len(text) + self.cuts[fork][text]
        return text[begin:], begin

    def ids_between(self, before, text, left, right):
        """the ids of a text that begin between two places; right: None for the end."""
        encoding = self.encode(before + text)
        return tuple(i for i, (begin, _) in zip(encoding.ids, encoding.offsets)
                     if left <= begin < (math.inf if right is None else right))


def make_parts(start, forks):
    """the parts of an Automaton. What all options of a fork begin with is a part of its own, and so is what those end
    with that lead to the same fork; the labels of the options between are (number of the fork, number of the
    option)."""
    parts, first = [[(start, ('fork', 0) if forks else None, None)]], {}  # first: {what a part is: its number}
    for k, ways in enumerate(forks):
        shared = common_prefix([way.tokens for way in ways])
        first['fork', k] = len(parts)
        if shared:
            parts.append([(ways[0].tokens[:shared], ('rest', k), None)])
        first['rest', k] = len(parts)
        parts.append(middle := [])
        for following in dict.fromkeys(way.following for way in ways):
            own = [(n, way.tokens[shared:]) for n, way in enumerate(ways) if way.following == following]
            end = common_prefix([tokens[::-1] for _, tokens in own]) if len(own) > 1 else 0
            target = following if following is None else ('fork', following)
            if end:
                parts.append([(own[0][1][len(own[0][1]) - end:], target, None)])
                target = len(parts) - 1
            middle += [(tokens[:len(tokens) - end], target, (k, n)) for n, tokens in own]
        middle.sort(key=lambda alternative: alternative[2])
    return [[(tokens, first.get(target, target), label) for tokens, target, label in part] for part in parts]
