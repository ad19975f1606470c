"""What an LLM server answered, as probabilities of values: from the text, and from the tokens' log
probabilities.

    answer, spans = find_object('Sure! {"tone": "friendly"}')        # {'tone': 'friendly'}, where its value stands
    p, outside = probabilities_from_tokens(values, tokens, *spans['tone'])  # (number of values,), mass of other answers

The server's tokens are those of an unknown tokenizer, so all of this works on bytes: an alternative to a
token counts for the values that the text with it could still become.
"""
import json
from contextlib import suppress
from functools import lru_cache

import numpy as np

from data.objects import find_object
from distil.schema import plain

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
    wrote before: (len(values),) with sum 1, and the share of probability that no value has.

    tokens: list of (bytes, log probability, [(bytes, log probability) of alternatives]) that the answer
    consists of; start, end: of the written value, in bytes. At each token the probability of an
    alternative goes to the values that it begins. Values that it cannot tell apart share it as they share
    what can be told apart. What is beyond the alternatives listed is spread over the values not begun by
    any, at most the smallest probability listed for each. ValueError if the value is spelled in an unusual
    way, or if nothing is probable.
    """
    content, texts = b''.join(token for token, *_ in tokens), [spellings(json.dumps(value)) for value in values]
    able = lambda written: [j for j, ways in enumerate(texts) if any(may_become(written, way) for way in ways)]
    p, outside, shared, reached, at = np.zeros(len(values)), 0.0, [], 1.0, 0
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
    joined = b''.join(token for token, *_ in tokens)
    offset = joined.find(content.encode('utf-8', 'replace'))    # a server may strip the text
    if not tokens or offset < 0:
        return {'answer': answer}, 0.0
    place = lambda n: offset + len(content[:n].encode('utf-8', 'replace'))
    probabilities, worst = {}, 0.0
    for leaf in schema.leaves:
        p, outside = leaf.read(leaf.get(answer)), 0.0
        if leaf.keys[0] in spans:                               # not of a key that is left out
            with suppress(ValueError):                          # such as "\\u0061" for "a"
                p, outside = probabilities_from_tokens(leaf.values, tokens, *map(place, spans[leaf.keys[0]]))
        probabilities[leaf.path] = p
        worst = max(worst, outside)
    return schema.write_label(probabilities), worst


def label_from_samples(schema, contents):
    """the label of several answers to one text, drawn at a temperature: the share of each value, with one
    answer more spread over all of them (so that no value is impossible). None if none of them fits the
    schema."""
    labels = [label for content in contents if (label := label_from_answer(schema, content, [])[0])]
    if not labels:
        return None
    shares = {}
    for leaf in schema.leaves:
        counts = np.sum([leaf.read(leaf.get(label['answer'])) for label in labels], axis=0)
        shares[leaf.path] = (counts + 1 / len(leaf)) / (len(labels) + 1)
    return schema.write_label(shares)
