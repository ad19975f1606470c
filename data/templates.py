"""The prompt around the texts of a log: found by comparing prompts, and taken away again. Only the standard library.

    find_changing_template(messages)                              # 'Today is {*}. Message: {text}'
    text_between('Today is Monday. Message: hi', 'Today is {*}. Message: {text}')    # 'hi'

A template holds {text} once, where the text goes, and {*} for each part that is not read, such as a date or the id
of a user. Whitespace may differ.
"""
import re
from functools import lru_cache
from os.path import commonprefix

FEW = 20  # so few different messages may begin alike by accident
OPENING = ':>"\'`([{<|=#*-\n：「『“‘【（《'  # after which a prompt has its text
CLOSING = '"\'`)]}<|=#*-\n」』”’】）》'


def clean(text):
    """as distil.space.clean: each run of whitespace is one space."""
    return ' '.join(text.split())


# -----------------------------------------------------------------------------
# a template and a message


@lru_cache(1000)
def split_template(template):
    """(the words before the text, those after it) of a template: two lists of strings, with a {*} between each string
    and the next one. Of several {text} the last counts."""
    before, _, after = template.rpartition('{text}')
    return [clean(part) for part in before.split('{*}')], [clean(part) for part in after.split('{*}')]


def text_between(message, template):
    """the text that a message has in place of the template's {text}; None if it is another prompt."""
    (first, *others_before), (*others_after, last) = split_template(template)
    whole = clean(message)
    start, end = len(first), len(whole) - len(last)
    if start > end or not (whole.startswith(first) and whole.endswith(last)):
        return None
    for words in others_before:                                 # each {*} is as short as it can be
        at = whole.find(words, start, end)
        if at < 0:
            return None
        start = at + len(words)
    for words in reversed(others_after):
        end = whole.rfind(words, start, end)
        if end < 0:
            return None
    text = whole[start:end].strip()
    if others_before and not others_before[-1] and (match := CHANGING.match(text)):
        text = text[match.end():].strip()                       # right before the text {*} is a date, a time or an id
    return text


def find_text(system, user, template):
    """the text in a prompt, that of the user alone or after what comes before it; None if the template does
    not fit."""
    text = text_between(user, template)
    return text if text is not None or not system else text_between(f'{system} {user}', template)


def check_template(template):
    """ValueError, which says why, if a string is no template."""
    if template.count('{text}') != 1:
        raise ValueError('must hold {text} once, where the text goes')
    before, after = split_template(template)
    if len(before) > 1 and not before[-1] or len(after) > 1 and not after[0]:
        raise ValueError('must have words between {*} and {text}: else nobody knows where the text begins')


# -----------------------------------------------------------------------------
# what changes from call to call: dates, times, ids

WORD = r'[^\W\d_]{3,10}'
DATE = '|'.join((
    r'\d{4}-\d\d-\d\d', r'\d{4}/\d\d?/\d\d?', r'\d\d?[./-]\d\d?[./-]\d{4}', r'\d{4}年\d\d?月\d\d?日',
    rf'\d\d?\.? (?:de )?{WORD}\.?,? (?:de )?\d{{4}}',           # 5 January 2026
    rf'{WORD}\.? \d\d?(?:st|nd|rd|th)?,? \d{{4}}',              # January 5, 2026
    rf'\d{{4}}\. {WORD} \d\d?\.'))                              # 2026. január 5.
TIME = (r'\d\d?:\d\d(?::\d\d(?:[.,]\d+)?)?(?: ?[AaPp]\.?[Mm]\b\.?)?'
        r'(?: ?(?:Z|UTC|GMT|[CEMP][DS]T|CES?T|IST|JST)\b| ?[+-]\d\d:?\d\d)?')
DAY = r'(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day'
MOMENT = rf'(?:{WORD}, (?=(?:{DATE})))?(?:{DATE}|{TIME}|{DAY})'  # with any day of the week before a date
MARK = '(?:id|ID|Id|uuid|UUID)'
LABEL = rf'(?:\b{MARK}|_{MARK}|(?<=[a-z])I[dD]|\b(?i:user|session|request|trace|customer|client))\b'
CHANGING = re.compile(
    rf'(?<![\w.-])(?:{MOMENT})(?:(?:,? |T|, ?| at )(?:{MOMENT}))*(?!-?\w)'
    r'|\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b'                          # a UUID
    r'|\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{12,}\b|\b1\d{9}(?:\d{3})?\b'                    # a hash; seconds since 1970
    rf'|(?P<label>{LABEL}["\']?(?: (?:no\.?|number))? ?[:=#]? ?["\'#]?)(?=[\w.@+-]*\d)\w[\w.@+-]*\b')
NAMED = re.compile(rf'(?i:\b(?:date|time|timestamp|today|now|day)|{LABEL})(?: is)?\W*\Z')  # it tells of these
LETTER = r'[^\W\d_]'
MASK = '\0'  # in place of what changes


@lru_cache(100)
def split_changing(message):
    """(the strings between what may change from call to call, the strings that may) of a message: two tuples."""
    fixed, values, end, message = [], [], 0, message.replace(MASK, ' ')
    for match in CHANGING.finditer(message):
        start = match.end('label') if match['label'] else match.start()
        fixed.append(message[end:start])
        values.append(message[start:match.end()])
        end = match.end()
    return (*fixed, message[end:]), tuple(values)


def join_changing(fixed, values):
    """a message again, with its values between the fixed strings."""
    return ''.join(part for pair in zip(fixed, [*values, '']) for part in pair)


def mask_changing(messages):
    """the messages with MASK in place of each date, time and id, but of those that are the same in all of them."""
    parts = [split_changing(message) for message in messages]
    n = min((len(values) for _, values in parts), default=0)
    same = lambda i: len({values[i] for _, values in parts}) == 1
    first, last = ({i for i in range(n) if same(i)}, {i for i in range(-n, 0) if same(i)})
    masked = []
    for fixed, values in parts:
        shown = [value if i in first or i - len(values) in last else MASK for i, value in enumerate(values)]
        masked.append(join_changing(fixed, shown))
    return masked


# -----------------------------------------------------------------------------
# finding it


def common_ends(messages):
    """(the common beginning, the common end) of strings."""
    return commonprefix(messages), commonprefix([message[::-1] for message in messages])[::-1]


def cut_ends(messages, before, after):
    """(beginning, end) of the prompt around the texts of some messages. messages: all that differ, or more than FEW;
    before, after: what all have in common.

    Both are cut where a text can begin or end, not in the middle of a word. The texts of a few messages may
    begin alike by accident. So then three words or less of the beginning are part of the text, if they follow
    a line break, a colon, a quote or a bracket. The end is cut in the same way.
    """
    few, length = len(messages) <= FEW, min(map(len, messages))
    weak = [n for n in range(len(before) + 1) if not before[n - 1:n].isalnum()]
    strong = [n for n in weak if before[:n].rstrip(' \t')[-1:] in {'', *OPENING} and len(before[n:].split()) <= 3]
    before = before[:(few and strong or weak)[-1]]
    after = after[max(0, len(after) - (length - len(before))):]
    weak = [n for n in range(len(after) + 1) if after[n:n + 1] in {'', ' ', '\t', *CLOSING}]
    strong = [n for n in weak if after[n:n + 1] in {'', *CLOSING} and len(after[:n].split()) <= 3]
    return before, after[(few and strong or weak)[0]:]


def find_template(messages, before, after):
    """the prompt around the texts of some messages, with {text} in it; the arguments are those of cut_ends."""
    before, after = cut_ends(messages, before, after)
    return before + '{text}' + after


def ends_before(before):
    """True if the last MASK of a prompt's beginning does not belong to the text after it: words stand between them, or
    it ends a sentence or a paragraph. But after a colon or the like it may begin the text ("Message: "), if the words
    before it do not tell what it is ("Date: ")."""
    line, _, rest = before.rpartition(MASK)
    line = line.rpartition('\n')[2].rstrip()
    is_apart = re.search(r'\A[.)]\s*\n|\n\s*\n', rest) and line and (line[-1] not in OPENING or NAMED.search(line))
    return bool(re.search(LETTER, rest) or is_apart)


def find_changing_template(messages):
    """as find_template, but what changes from call to call does not count in comparing, and is {*} in the template.
    '' if nothing else differs, or if it finds no more than find_template. messages: strings, some of all.

    A date or an id right beside the text belongs to it: a text stays whole.
    """
    masked = list(dict.fromkeys(mask_changing(messages)))
    if len(masked) < 2 or not any(MASK in message for message in masked):
        return ''
    before, after = cut_ends(masked, *common_ends(masked))
    while MASK in before and not ends_before(before):
        before = before.rpartition(MASK)[0]
    while MASK in after and not re.search(LETTER, after.partition(MASK)[0]):
        after = after.partition(MASK)[2]
    template = f'{before}{{text}}{after}'.replace(MASK, '{*}')
    return '' if template == find_template(messages, *common_ends(messages)) else template
