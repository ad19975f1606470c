"""Options that come with each text: they stand behind it, and an answer points at one of them. Only the standard
library.

    write_options('my train leaves at 9', {'folder': ['Invoices', {'value': 'Travel', 'description': 'tickets'}]})
    # 'my train leaves at 9 ¶ folder • Invoices • Travel — tickets'
    find_options('my train leaves at 9 ¶ folder • Invoices', 'folder')  # [(32, 40, 'Invoices')]

So teacher and student read them as part of the text, and what can be answered is found in it, as a number or a date is
(places.py). The three signs have no other meaning there: in the text and in the options similar ones take their place.
"""
import re

HEAD, ITEM, ABOUT = '¶', '•', '—'
SIGNS = str.maketrans({HEAD: ' ', ITEM: '·', ABOUT: '–'})


def tidy(text):
    """a text without the three signs, its white space cleaned."""
    return ' '.join(text.translate(SIGNS).split())


def write_options(text, options):
    """a text with its options behind it. options: {name of a property: [option]}; an option is its value, a text, or
    {"value": text, "description": text}. ValueError if that is not what they are."""
    blocks = [tidy(text)]
    if not isinstance(options, dict):
        raise ValueError(f'options are {{property: [option]}}, not {options!r}')
    for name, of_name in options.items():
        if not isinstance(of_name, list):
            raise ValueError(f'the options of {name} are a list, not {of_name!r}')
        lines = {}                                              # each value once
        for option in of_name:
            option = option if isinstance(option, dict) else {'value': option}
            value, about = option.get('value'), option.get('description') or ''
            if not isinstance(value, str) or not tidy(value) or not isinstance(about, str):
                raise ValueError(f'an option of {name} is a text, or has a value and a description, not {option!r}')
            lines.setdefault(tidy(value), f' {ABOUT} {tidy(about)}' if tidy(about) else '')
        blocks.append(' '.join([tidy(name), *(f'{ITEM} {value}{about}' for value, about in lines.items())]))
    return f' {HEAD} '.join(blocks)


def read_text(record):
    """the text of a line of a file, cleaned, with the options of its line behind it, if it has lists of them. record:
    {"text": ..., "options": ...}. KeyError, TypeError or ValueError if it has none."""
    text, options = ' '.join(record['text'].split()), record.get('options')
    is_ours = isinstance(options, dict) and any(isinstance(of_name, list) for of_name in options.values())
    return write_options(text, options) if text and is_ours else text


def text_end(text):
    """the number of characters before the options."""
    found = re.search(rf'(?:^| ){HEAD} ', text)
    return found.start() if found else len(text)


def split_options(text):
    """[(name, [(start, end)])] of the blocks of options of a text: the characters of each option, its sign included."""
    blocks, at = [], text_end(text)
    for block in re.finditer(rf'{HEAD} ([^{HEAD}]*)', text[at:]):
        start, name = at + block.start(1), block[1].partition(ITEM)[0].strip()
        blocks.append((name, [(start + item.start(), start + item.end())
                              for item in re.finditer(rf'{ITEM} [^{ITEM}]*[^{ITEM} ]', block[1])]))
    return blocks


def find_options(text, name):
    """[(start, end, value)] of the options of a property."""
    found = []
    for start, end in (item for other, items in split_options(text) if other == name for item in items):
        value = text[start + 2:end].partition(f' {ABOUT} ')[0]
        found.append((start + 2, start + 2 + len(value), value))
    return found


def keep_options(text, name, values):
    """a text with these options of a property alone, and all of the others."""
    blocks = [text[:text_end(text)]]
    for other, items in split_options(text):
        kept = [text[start:end] for start, end in items
                if other != name or text[start + 2:end].partition(f' {ABOUT} ')[0] in values]
        blocks.append(' '.join([other, *kept]))
    return f' {HEAD} '.join(blocks)


def check_options(schema, answer, text):
    """ValueError if an answer has what is not among the options of its text. schema: a Schema."""
    for part in schema.copied:
        value = part.get(answer) if part.is_option else None
        if isinstance(value, str) and value not in [option for *_, option in find_options(text, part.of)]:
            raise ValueError(f'{part.path} is {value!r}, which is not among its options')


def thin_options(text, rng, keep=()):
    """(the text without some of its options; [(start, end, start there)] of its parts in the text given). Of n options
    n ** (1 - u) stay, u uniform up to a half. rng: a random.Random; keep: characters at which values begin that must
    stay."""
    at = text_end(text)
    parts, written, n = [(0, at, 0)], [text[:at]], at
    for name, items in split_options(text):
        share = len(items) ** (-rng.random() / 2) if items else 1
        written.append(f' {HEAD} {name}')
        n += len(written[-1])
        for start, end in items:
            if start + 2 in keep or rng.random() < share:
                written.append(' ' + text[start:end])
                parts.append((n + 1, n + 1 + end - start, start))
                n += 1 + end - start
    return ''.join(written), parts
