"""What an LLM server answered, as probabilities of values: from the text, and from the tokens' log
probabilities.

    answer, spans = find_object('Sure! {"tone": "friendly"}')        # {'tone': 'friendly'}, where its value stands
    p, outside = probabilities_from_tokens(values, tokens,
                                           *spans['tone',])  # (number of values,), mass of other answers

The server's tokens are those of an unknown tokenizer, so all of this works on bytes: an alternative to a
token counts for the values that the text with it could still become.
"""
import json
from functools import lru_cache

import numpy as np

from data.objects import find_object
from distil.copied import Copied
from distil.kinds import Choice, Items, Maybe, Object, Several
from distil.values import MISSING, json_text, plain

# -----------------------------------------------------------------------------
# log probabilities


@lru_cache(10000)
def spellings(constant):
    """the ways in which a server may write a JSON value, as bytes. constant: the value as JSON."""
    value = json.loads(constant)
    forms = [value, plain(value)]                               # 1.0 and 1
    forms += [float(value)] if type(value) is int and abs(value) < 1e15 else []
    return {json.dumps(form, ensure_ascii=ascii, separators=separators).encode('utf-8', 'replace')
            for form in forms for ascii in (True, False) for separators in (None, (',', ':'))}


def may_become(written, spelling):
    """True if a value that begins with these bytes may be, or is, the one spelled so. A number goes on
    until something else follows: 1 may become 11."""
    if len(written) <= len(spelling):
        return spelling.startswith(written)
    return written.startswith(spelling) and written[len(spelling)] in b' \t\r\n,}]'


def written_of(lead, token):
    """what a token writes of a value, if first comes the `lead` before the value, in whatever whitespace:
    b'' if the token ends before the value, None if it writes something else than the lead."""
    lead, n = lead.translate(None, b' \t\r\n'), 0
    for i, char in enumerate(token):
        if char in b' \t\r\n':
            continue
        if n == len(lead):
            return token[i:]
        if char != lead[n]:
            return None
        n += 1
    return b''


def probabilities_from_tokens(values, tokens, start, end):
    """the probability of each of a field's values at the place where the server wrote one, given what it
    wrote before: (len(values),) with sum 1, and the share of probability that no value has. See spread."""
    return spread([spellings(json.dumps(value)) for value in values], tokens, start, end)


def spread(texts, tokens, start, end):
    """the probability of each of several texts at the place where the server wrote one: (len(texts),) with sum 1, and
    the share of probability that none has. texts: of each the ways in which it may be spelled, as bytes.

    tokens: list of (bytes, log probability, [(bytes, log probability) of alternatives]) that the answer
    consists of; start, end: of the written value, in bytes. At each token the probability of an
    alternative goes to the values that it begins. Values that it cannot tell apart share it as they share
    what can be told apart. What is beyond the alternatives listed is spread over the values not begun by
    any, at most the smallest probability listed for each. ValueError if the value is spelled in an unusual
    way, or if nothing is probable.
    """
    content = b''.join(token for token, *_ in tokens)
    able = lambda written: [j for j, ways in enumerate(texts) if any(may_become(written, way) for way in ways)]
    p, outside, shared, reached, at = np.zeros(len(texts)), 0.0, [], 1.0, 0
    for token, logprob, alternatives in tokens:
        first, at = at, at + len(token)
        if at <= start:
            continue
        if first > end:                                         # at the end: of 1 and 11 the next token decides
            break
        written, lead = content[start:max(start, first)], content[first:start]
        if len(candidates := able(written)) < 2:                # decided
            break
        known = {other: float(np.exp(log_p)) for other, log_p in [*alternatives, (token, logprob)]}
        begun = set()
        for other, q in known.items():
            rest = other if written else written_of(lead, other)
            leads = candidates if rest == b'' else able(written + rest) if rest else []
            begun.update(leads if rest else ())
            if other == token:
                continue
            if len(leads) == 1:
                p[leads] += reached * q
            elif leads:
                shared.append((leads, reached * q))
            else:
                outside += reached * q
        beyond, missing = max(0.0, 1 - sum(known.values())), [j for j in candidates if j not in begun]
        if missing:
            p[missing] += reached * min(beyond / len(missing), min(known.values()))
            beyond = max(0.0, beyond - min(known.values()) * len(missing))
        outside += reached * beyond
        reached *= known[token]
    chosen = able(content[start:end])
    p[min(chosen, key=lambda j: min(map(len, texts[j])))] += reached  # of 1 and 11 it is the shorter one
    if not p.sum():
        raise ValueError('no value has a probability')
    for leads, mass in shared:
        weights = p[leads] + 1e-9
        p[leads] += mass * weights / weights.sum()
    return p / p.sum(), float(outside / (outside + p.sum()))


def next_character(tokens, start, characters):
    """the probability of each of several characters (bytes) as the next one but white space at a place, given what the
    server wrote before: a list with sum 1; None if none of them is probable there."""
    at, mass = 0, dict.fromkeys(characters, 0.0)
    for token, logprob, alternatives in tokens:
        content, at = token, at + len(token)
        if at <= start:
            continue
        lead = content[:max(0, start - (at - len(token)))]
        for other, q in {**dict(alternatives), token: logprob}.items():
            rest = (written_of(lead, other) or b'').lstrip()
            mass[rest[:1]] = mass.get(rest[:1], 0.0) + float(np.exp(q))
        if content[len(lead):].strip():
            break
    total = sum(mass[character] for character in characters)
    return [mass[character] / total for character in characters] if total else None


class Reading:
    """the probabilities of the choices of one answer of a server. content, tokens: of label_from_answer; spans: of the
    parts of its JSON object (data/objects.py)."""

    def __init__(self, content, tokens, spans):
        joined = b''.join(token for token, *_ in tokens)
        offset = joined.find(content.encode('utf-8', 'replace'))  # a server may strip the text
        self.is_known, self.tokens, self.spans, self.worst = bool(tokens) and offset >= 0, tokens, spans, 0.0
        self.content, self.place = joined, lambda n: offset + len(content[:n].encode('utf-8', 'replace'))

    def at(self, texts, start, end):
        """the probabilities of texts at a place, or None if they are spelled in an unusual way."""
        try:
            p, outside = spread(texts, self.tokens, start, end)
        except ValueError:                                      # such as "\\u0061" for "a"
            return None
        self.worst = max(self.worst, outside)
        return p

    def read(self, part, found):
        """updates found, {path of a choice: probabilities}, of a part of the tree, with what the tokens tell."""
        span = self.spans.get(part.keys)
        if span is None:                                        # a key that is missing
            return
        if isinstance(part, Object):
            for inner in part.properties.values():
                self.read(inner, found)
        elif isinstance(part, Maybe):
            self.read(part.part, found)
            start = self.place(span[0])
            if None in part.choice.values:
                opening = [b'[' if isinstance(part.part, (Items, Several)) else b'{']
                if isinstance(part.part, Copied):
                    opening = [bytes([c]) for c in (b'-0123456789' if part.part.is_number else b'"')]
                p = next_character(self.tokens, start, [*opening, b'n'])
                if p:
                    found[part.choice.path] = [sum(p[:-1]), p[-1], 0.0][:len(part.choice)]
        elif isinstance(part, Choice):
            values = [value for value in part.values if value is not MISSING]
            p = self.at([spellings(json.dumps(value)) for value in values], *map(self.place, span))
            if p is not None:                                   # it is not missing
                found[part.path] = [*p, *[0.0] * (len(part) - len(values))]
        elif isinstance(part, Items):
            self.read_items(part, found)
        elif isinstance(part, Several):
            self.read_several(part, found)

    def slots(self, part):
        """yields (start, end) in bytes, for each item of a list and its end: of what is written between the item before
        and the end of this one."""
        first, last = self.spans[part.keys]
        n, start = 0, self.place(first) + 1
        while (*part.keys, n) in self.spans:
            end = self.place(self.spans[*part.keys, n][1])
            yield start, end
            n, start = n + 1, end
        yield start, self.place(last)

    def read_items(self, part, found):
        for n, (start, end) in enumerate(list(self.slots(part))[:len(part.items)]):
            more = b',' if n else self.content[start:end].lstrip()[:1] or b'{'  # what an item begins with
            p = next_character(self.tokens, start, [b']', more])
            if p:
                found[part.more[n].path] = p
            self.read(part.items[n], found)

    def read_several(self, part, found):
        """of a list in the order of the schema, the probability of each value given the values before it; in another
        order, that it comes at one of the places."""
        written = [json_text(plain(json.loads(self.content[self.place(a):self.place(b)]))) for a, b in (
            self.spans[*part.keys, n] for n in range(len(part.values)) if (*part.keys, n) in self.spans)]
        texts = [json_text(plain(value)) for value in part.values]
        order = [texts.index(text) for text in written]
        is_sorted, left, absent = order == sorted(set(order)), list(range(len(texts))), {}
        for n, (start, end) in zip(order + [None], self.slots(part)):
            comma = (b',', b', ') if start > self.place(self.spans[part.keys][0]) + 1 else (b'',)
            spelled = [{lead + way for lead in comma for way in spellings(json.dumps(part.values[k]))} for k in left]
            p = self.at([*spelled, {b']'}], start, end)
            if p is None:
                return
            rest = 1.0
            for k, q in zip(left, p):
                share = q / max(rest, 1e-9) if is_sorted else 1 - (1 - absent.get(k, 0.0)) * (1 - q)
                rest -= q
                if k == n:
                    share = share if is_sorted else 1 - p[-1]
                found[part.choices[k].path] = [1 - min(share, 1.0), min(share, 1.0)]
                absent[k] = share
                if is_sorted and k == n:
                    break
            left = [k for k in left if (k > n if is_sorted else k != n)] if n is not None else []


def label_from_answer(schema, content, tokens):
    """the label of an answer, as Schema.read_label reads it: {'probabilities': {field: {value: probability}}}, or
    {'answer': {field: value}} without tokens; and the largest share outside the values. (None, 0.0) if the answer
    breaks the schema. A key that it lacks means null, in a field that has it. content: the server's text; tokens: see
    probabilities_from_tokens, or []."""
    answer, spans = find_object(content)
    try:
        answer = schema.canonical(answer)
    except ValueError:
        return None, 0.0
    reading = Reading(content, tokens, spans)
    if not reading.is_known:
        return {'answer': answer}, 0.0
    probabilities, found = schema.read_label({'answer': answer}), {}
    reading.read(schema.tree, found)
    probabilities |= {path: list(map(float, p)) for path, p in found.items()}
    return schema.write_label(probabilities, answer if schema.copied else None), reading.worst


def label_from_samples(schema, contents):
    """the label of several answers to one text, drawn at a temperature: the share of each value, with one answer more
    spread over all of them (so that no value is impossible), or, with copied values, the commonest. None if none of
    them fits the schema."""
    labels = [label for content in contents if (label := label_from_answer(schema, content, [])[0])]
    if not labels:
        return None
    if schema.copied:                                           # values cannot be averaged: the commonest answer
        texts = [json_text(label['answer']) for label in labels]
        return labels[texts.index(max(texts, key=texts.count))]
    rows, shares = list(map(schema.read_label, labels)), {}
    for choice in schema.choices:
        counts = np.sum([row[choice.path] for row in rows], axis=0)
        shares[choice.path] = (counts + 1 / len(choice)) / (counts.sum() + 1) if counts.any() else counts
    return schema.write_label(shares)
