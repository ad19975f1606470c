"""The numbers, dates and times that stand in a text, each with its place and its value: what an answer can copy. Only
the standard library, but for read_locale, which needs babel; what it returns is JSON, for a student's files.

    locale = read_locale('en_GB')
    find_candidates('number', 'about $1,080.00', locale)        # [Candidate(start=7, end=15, value=1080)]
    find_candidates('date', 'on 5/3', locale, '2026-05-01')     # [Candidate(start=3, end=6, value='2026-03-05')]

Numbers are digits with the signs of the locale: 1,080.00 -3 .5. Currency signs, % and letters (2nd, 5kg) may stand
beside them. There is none after a letter (A4711), before letters with more digits (4x4), and before k, m, mn, b or bn,
with which it is another number. Digits joined by . , : / or - are read as a whole: as one number, as the two around
one - / or :, else as none (1.2.3, 14:30, 05/03/2026). More than 15 digits are none: readers of JSON round them.

Dates are 2026-05-03, those in the order of the locale (05/03/2026, 5.3.26; years of two digits are 1970 to 2069; in a
locale that begins with the year, 05/03/2026 is none) and those with the name of a month (3rd of May 2026, May 3, 2026,
2026. május 3). Words such as tomorrow, and dates without a year (May 3, 5/3), count only if the reference date is
known: it is the nearest one. Names of days are none: Monday may be the next or the last.

Times are 14:30, 14:30:05, 2 pm, 2.30 p.m., 14 Uhr. A zone after the seconds is part of the place, not of the value.
A date-time is a date and a time side by side, with a comma, a word such as "at" or the T of ISO between them.

The regular expressions use only what JavaScript has too, and read the text as fold() writes it.
"""
import json
import re
import unicodedata
from calendar import monthrange
from datetime import date, timedelta
from functools import lru_cache
from typing import NamedTuple

LETTERS = 'a-z_ß-ɏͰ-ԯḀ-ỿ'  # Latin, Greek, Cyrillic: their words end before a number, those of Chinese need not
SAME = dict(zip('\xa0\u2009\u202f’−．，：／－', "   '-.,:/-"))
LINK = re.compile(r'[.,]? ?(?:(?:at|on|um|am|à|às|a las|alle|om|kl\.?|klo) )?|t')  # between a date and a time


class Candidate(NamedTuple):
    """a value in a text. start, end: its characters, the end exclusive; value: in JSON, as in answers."""
    start: int
    end: int
    value: object


@lru_cache(maxsize=4096)
def fold_character(character):
    digit, lower = unicodedata.decimal(character, None), character.lower()
    return SAME.get(character, lower if len(lower) == 1 else character) if digit is None else str(digit)


def fold(text):
    """a text of the same length: lower case; 0 to 9 for the digits of all scripts; one kind of blank, one of minus."""
    return ''.join(map(fold_character, text))


# -----------------------------------------------------------------------------
# locales


def read_locale(name):
    """how numbers, dates and times are written, as a dict of JSON values, from CLDR. name: such as 'en_GB', 'de', 'hu';
    a language alone means its largest country: 'en' is American, with the month first. ValueError for an unknown one.

    decimal, group: signs, each a character; order: 'mdy', 'dmy' or 'ymd'; day_first: in a date without a year; dots:
    dates are written with them; months: {name: 1 to 12}; days: {word: days from today}; am, pm: words.
    """
    from babel import Locale, UnknownLocaleError                # a student has the dict in its files
    try:
        own = Locale.parse(str(name).replace('-', '_'))
    except (ValueError, UnknownLocaleError):
        raise ValueError(f'there is no locale {name!r}; CLDR has en_US, en_GB, de, hu and others') from None
    signs = [own.number_symbols[system] for system in dict.fromkeys([own.default_numbering_system, 'latn'])]
    short, day_month = (re.sub("'[^']*'|[^dmy.]", '', pattern.pattern.lower())
                        for pattern in (own.date_formats['short'], own.datetime_skeletons['Md']))
    months, halves = {'sept.': 9, 'sept': 9} if own.language == 'en' else {}, {}
    for locale in own, Locale(own.language):                    # in Vienna it is Jänner or Januar
        for width, end in ('abbreviated', '.'), ('wide', ''):
            for number, month in (item for context in locale.months.values() for item in context[width].items()):
                plain = fold(month).rstrip('.')
                months |= {} if re.search(r'\d', plain) else {plain: number, plain + end: number}
    for half in 'am', 'pm':
        words = {own.day_periods['format'].get(width, {}).get(half, half) for width in ('abbreviated', 'wide')}
        halves[half] = {*map(fold, words), half, '.'.join(half), '.'.join(half) + '.'}
    halves['am'] -= {'am'} if own.language == 'de' else set()   # a word of its own: "um 5 am Tor"
    return {'decimal': ''.join(fold(part.get('decimal', '')) for part in signs),
            'group': ''.join(fold(part.get('group', '')) for part in signs),
            'order': ''.join(dict.fromkeys(short.replace('.', ''))), 'dots': '.' in short,
            'day_first': day_month.index('d') < day_month.index('m'), 'months': months,
            'days': {fold(word): days for days, word in own._data['date_fields']['day'].get('relative', {}).items()},
            **{half: sorted(words) for half, words in halves.items()}}


def any_of(words):
    """a regular expression for one of these words, the longest that fits. Without words it never matches."""
    return '|'.join(map(re.escape, sorted(words, key=len, reverse=True))) or '(?!)'


@lru_cache(maxsize=32)
def compile_patterns(text):
    """the regular expressions of a locale, given as JSON: {'run', 'number', 'time': one, 'dates': a list}."""
    locale = json.loads(text)
    decimal, group = (f'[{re.escape(locale[key])}]' for key in ('decimal', 'group'))
    joins = re.escape(''.join(sorted({*'.,:/-', *locale['decimal'], *locale['group']} - {' '})))
    blank = r'| \d{3}(?!\d)' if ' ' in locale['group'] else ''
    run = (rf'(?P<glued>[{LETTERS}])?(?P<sign>(?<![{LETTERS}\d)+-])[+-])?(?P<digits>(?:(?<![{LETTERS}\d.,]){decimal})?'
           rf'\d+(?:[{joins}]\d+{blank})*)(?P<unit>[{LETTERS}]+(?:\d[{LETTERS}\d]*)?)?')
    number = rf'(?P<whole>\d{{1,3}}(?:{group}\d{{2,3}})*{group}\d{{3}}|\d*)(?:{decimal}(?P<part>\d+))?'

    before, after = rf'(?<![{LETTERS}\d])(?<!\d[-/.,:])', r'(?!\d|[-/.,:]\d)'
    part = {'y': r'(?P<y>\d{4}|\d\d)', 'm': r'(?P<m>\d\d?)', 'd': r'(?P<d>\d\d?)'}
    month, nth = rf'(?P<name>{any_of(locale["months"])})(?![{LETTERS}])', part['d'] + '(?:st|nd|rd|th)?'
    year = rf"(?:(?:,? ?|[-/])(?:de )?(?P<y>\d{{4}})|(?:[-/]| ?')(?P<yy>\d\d))?(?![{LETTERS}\d]|[.,:]\d)"
    one, two, three = (part[key] for key in locale['order'])
    first, second = (part[key] for key in ('dm' if locale['day_first'] else 'md'))
    dates = [rf'{before}(?P<y>\d{{4}})(?P<s>[-/]|\. ?){part["m"]}(?P=s){part["d"]}{after}',
             rf'{before}{one}(?P<s>[-/]|\. ?){two}(?P=s){three}{after}',
             rf'{before}{first}/{second}{after}',
             rf'{before}{first}\. ?{second}(?=\.){after}' if locale['dots'] else '(?!)',
             rf'(?<![{LETTERS}\d])(?<!\d[.,:]){part["d"]}(?:st|nd|rd|th|er|\.|º)?[ -]?(?:(?:of|de) )?{month}{year}',
             rf'{before}{month}[ -]?{nth}{year}',
             rf'{before}(?P<y>\d{{4}})\.?[ -]?{month}[ -]?{nth}{after}' if locale['order'] == 'ymd' else '(?!)',
             rf'(?<!\d)(?:(?P<y>\d{{4}})[年년] ?)?{part["m"]}[月월] ?{part["d"]}[日일]',
             rf'(?<![{LETTERS}\d])(?P<word>{any_of(locale["days"])})(?![{LETTERS}\d])']

    halves = {*locale['am'], *locale['pm'], 'uhr'}
    leading = any_of(word for word in halves if not re.match(f'[{LETTERS}]', word))  # as in Chinese
    time = (rf'(?:(?P<leading>{leading}) ?)?(?:(?<![{LETTERS}\d])|(?<=\dt))(?<!\d[:.,/])(?P<h>\d\d?)'
            r'(?:(?P<join>[:.])(?P<m>\d\d)(?::(?P<s>\d\d)(?:\.\d{1,9})?(?:z|[+-]\d\d:?\d\d)?)?)?'
            rf'(?: ?(?P<half>{any_of(halves)})(?![{LETTERS}])(?!(?<=uhr) \d))?(?!\d|[/.,:]\d)')
    return {'run': re.compile(run), 'number': re.compile(number), 'time': re.compile(time),
            'dates': [re.compile(pattern) for pattern in dates]}


# -----------------------------------------------------------------------------
# candidates


def find_candidates(kind, text, locale, reference_date=None):
    """the Candidates of a text, in its order; none overlaps another, the longest reading of a place counts. kind:
    'number', 'integer', 'date', 'time' or 'date-time'; locale: from read_locale; reference_date: as '2026-05-03', the
    day on which the text was written, or None. Values: numbers, '2026-05-03', '14:30:00', '2026-05-03T14:30:00'."""
    text, patterns = fold(text), compile_patterns(json.dumps(locale, sort_keys=True))
    if kind in ('number', 'integer'):
        return [found for found in find_numbers(text, patterns) if kind == 'number' or isinstance(found.value, int)]
    today = reference_date and date.fromisoformat(reference_date)
    dates = [] if kind == 'time' else find_dates(text, patterns['dates'], locale, today)
    times = [] if kind == 'date' else find_times(text, patterns['time'], locale)
    return {'date': dates, 'time': times, 'date-time': join_dates_and_times(text, dates, times)}[kind]


def find_numbers(text, patterns):
    """yields the numbers of a folded text."""
    for run in patterns['run'].finditer(text):
        unit, start, sign = run['unit'] or '', run.start('digits'), run['sign'] or ''
        if run['glued'] or re.search(r'\d', unit) or unit in ('k', 'm', 'mn', 'b', 'bn'):
            continue
        for part in split_run(run['digits'], patterns['number']):
            found = patterns['number'].fullmatch(part)
            if found and len(re.sub(r'\D', '', part)) <= 15:
                value = float(sign + re.sub(r'\D', '', found['whole']) + '.' + (found['part'] or '0'))
                yield Candidate(start - len(sign), start + len(part), int(value) if value.is_integer() else value)
            start, sign = start + len(part) + 1, ''


def split_run(digits, number):
    """the parts of joined digits that may be numbers: the whole, or the two around a sign, or those between blanks."""
    if number.fullmatch(digits):
        return [digits]
    parts = re.split('[-/:]', digits)
    if len(parts) == 2 and not re.fullmatch(r'\d\d?:\d\d', digits):
        return parts
    return digits.split(' ') if ' ' in digits else []


def find_dates(text, patterns, locale, today):
    """the dates of a folded text. today: a date, or None."""
    kept, candidates = [], []
    for found in (found for pattern in patterns for found in pattern.finditer(text)):
        part = {'y': None, 'yy': None, **found.groupdict()}
        if 'word' in part:
            day = today and today + timedelta(locale['days'][part['word']])
        else:
            month = locale['months'][part['name']] if 'name' in part else int(part['m'])
            day = read_date(part['y'] or part['yy'], month, int(part['d']), today)
        if day:
            candidates.append(Candidate(*found.span(), day.isoformat()))
    for found in sorted(candidates, key=lambda found: (found.start, -found.end)):
        if not kept or found.start >= kept[-1].end:
            kept.append(found)
        elif found.end - found.start > kept[-1].end - kept[-1].start:
            kept[-1] = found
    return kept


@lru_cache(maxsize=4096)
def read_date(year, month, day, today):
    """a date, or None if there is none. year: two or four digits, or None: then it is the one nearest to today."""
    if year:
        years = [int(year) if len(year) == 4 else 1900 + int(year) + 100 * (year < '70')]
    else:
        years = [today.year + n for n in range(-4, 5)] if today else []
    days = [date(n, month, day) for n in years
            if 0 < n < 10000 and 0 < month < 13 and 0 < day <= monthrange(n, month)[1]]
    return days[0] if year and days else min(days, key=lambda found: abs(found - today), default=None)


def find_times(text, pattern, locale):
    """the times of a folded text."""
    times = []
    for found in pattern.finditer(text):
        hour, minute, second = (int(found[name] or 0) for name in 'hms')
        half = found['half'] or found['leading']
        if half != 'uhr' and half and 1 <= hour <= 12:
            hour = hour % 12 + 12 * (half in locale['pm'])
        elif half != 'uhr' and found['join'] != ':':            # 2, 2.30, 14 pm
            continue
        if hour < 24 and minute < 60 and second < 60:
            times.append(Candidate(*found.span(), f'{hour:02}:{minute:02}:{second:02}'))
    return times


def join_dates_and_times(text, dates, times):
    """each date with the time beside it, before or after it."""
    joined, places = [], sorted([(found, True) for found in dates] + [(found, False) for found in times])
    for (first, first_is_date), (second, is_date) in zip(places, places[1:]):
        is_used = joined and joined[-1].end > first.start
        if first_is_date != is_date and not is_used and first.end <= second.start and LINK.fullmatch(
                text, first.end, second.start):
            day, time = (first, second) if first_is_date else (second, first)
            joined.append(Candidate(first.start, second.end, f'{day.value}T{time.value}'))
    return joined
