"""The numbers, dates and times of a text, in eight locales; texts that are meant to take long; data/snips."""
import builtins
import json
import re
import shutil
import subprocess
import sys
import time
from datetime import date

import hypothesis
import hypothesis.strategies as st
import pytest

from distil.candidates import find_candidates, fold, read_locale
from distil.values import json_text, plain
from tests.conftest import ROOT
from tests.test_prepare import run_source

LOCALES = {name: read_locale(name) for name in ('en_US', 'en_GB', 'de', 'hu', 'fr', 'fa', 'zh', 'de_CH')}
KINDS = 'number', 'integer', 'date', 'time', 'date-time'
TODAY = '2026-05-20'


def found(kind, locale, text, today=None):
    """[(the text of a candidate, its value)]."""
    return [(text[start:end], value) for start, end, value in find_candidates(kind, text, LOCALES[locale], today)]


def values(kind, locale, text, today=None):
    return [value for _, value in found(kind, locale, text, today)]


# -----------------------------------------------------------------------------
# locales


def test_a_locale_is_plain_json():
    for name, locale in LOCALES.items():
        assert json.loads(json.dumps(locale)) == locale, name
    us, gb, de, hu = (LOCALES[name] for name in ('en_US', 'en_GB', 'de', 'hu'))
    assert [locale['order'] for locale in (us, gb, de, hu)] == ['mdy', 'dmy', 'dmy', 'ymd']
    assert [locale['decimal'] + locale['group'] for locale in (us, gb, de, hu)] == ['.,', '.,', ',.', ', ']
    assert us['months']['sept'] == us['months']['sep.'] == us['months']['september'] == 9
    assert de['months']['mär'] == de['months']['märz'] == hu['months']['márc.'] == hu['months']['március'] == 3
    assert us['days'] == {'yesterday': -1, 'today': 0, 'tomorrow': 1} and de['days']['übermorgen'] == 2


def test_a_language_alone_is_that_of_its_largest_country_and_an_unknown_locale_an_error():
    assert read_locale('en') == read_locale('en-US') == LOCALES['en_US']
    assert read_locale('de_AT')['months'].items() >= {'jänner': 1, 'januar': 1}.items()
    for name in ('xx', 'en_XX', 'English', '', 'a b', '../de', None, 5):
        with pytest.raises(ValueError, match='there is no locale .*CLDR has'):
            read_locale(name)


def test_candidates_are_found_without_babel(monkeypatch):
    def refuse(name, *args, load=builtins.__import__, **kwargs):
        assert name.partition('.')[0] != 'babel'
        return load(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', refuse)
    for kind in KINDS:
        find_candidates(kind, 'May 3 2026 at 10:00, 5', LOCALES['en_US'] | {'dots': True}, TODAY)
    with pytest.raises(AssertionError):
        read_locale('de')


# -----------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize('locale, text, expected', [
    ('en_US', '12', [('12', 12)]),
    ('en_US', 'from -3 to +5', [('-3', -3), ('+5', 5)]),
    ('en_US', '$1,080.00 or 1080€', [('1,080.00', 1080), ('1080', 1080)]),
    ('en_US', 'x=-1,080.5, .5 and (-.25)', [('-1,080.5', -1080.5), ('.5', 0.5), ('-.25', -0.25)]),
    ('en_US', '5% of 1,00,000', [('5', 5), ('1,00,000', 100000)]),
    ('en_US', '1st, 2nd, 3RD', [('1', 1), ('2', 2), ('3', 3)]),
    ('en_US', '5kg, 16GB, 2.5 m and 007.', [('5', 5), ('16', 16), ('2.5', 2.5), ('007', 7)]),
    ('en_US', '3k 2.5m 1bn', []),
    ('en_US', 'A4711 B2 4x4 3f2a91 v1.2 x_5 5_000', []),
    ('en_US', '1.2.3 192.168.0.1 555-123-4567 1,2,3 1.080,00', []),
    ('en_US', '05/03/2026 2026-05-03 14:30 14:30:05 2026-05-03T10:00:00', []),
    ('en_US', '10-12', [('10', 10), ('12', 12)]),
    ('en_US', '10 - 12, 10 -12', [('10', 10), ('12', 12), ('10', 10), ('-12', -12)]),
    ('en_US', '4/5 stars, 2:1, 5-1,080', [('4', 4), ('5', 5), ('2', 2), ('1', 1), ('5', 5), ('1,080', 1080)]),
    ('en_US', 'COVID-19, No.5, so...6 "7"', [('19', 19), ('5', 5), ('6', 6), ('7', 7)]),
    ('en_US', '١٢٣ and ５０ and −7', [('١٢٣', 123), ('５０', 50), ('−7', -7)]),
    ('en_US', '123456789012345 1234567890123456', [('123456789012345', 123456789012345)]),
    ('en_GB', '£1,080.50', [('1,080.50', 1080.5)]),
    ('de', '1.080,00 €, 1,5 und 1.080', [('1.080,00', 1080), ('1,5', 1.5), ('1.080', 1080)]),
    ('de', '1080.5 und 1,080.00', []),
    ('de', 'am 3. Mai', [('3', 3)]),
    ('hu', '1 080,50 Ft', [('1 080,50', 1080.5)]),
    ('hu', '1\xa0080\xa0000 vagy 5 10 15', [('1\xa0080\xa0000', 1080000), ('5', 5), ('10', 10), ('15', 15)]),
    ('hu', '10 000-20 000, 1000 200', [('10 000', 10000), ('20 000', 20000), ('1000', 1000), ('200', 200)]),
    ('fr', '1\u202f080,5', [('1\u202f080,5', 1080.5)]),
    ('fa', '۱٬۰۸۰٫۵', [('۱٬۰۸۰٫۵', 1080.5)]),
    ('de_CH', '1’080.5 und 1\'080', [('1’080.5', 1080.5), ("1'080", 1080)]),
    ('zh', '我要5个', [('5', 5)]),
    ('en_US', '', []),
    ('en_US', 'twelve', []),
])
def test_numbers(locale, text, expected):
    assert found('number', locale, text) == expected
    assert found('integer', locale, text) == [(part, value) for part, value in expected if isinstance(value, int)]
    assert [json_text(plain(value)) for value in values('number', locale, text)] == [
        json_text(value) for _, value in expected]  # 1080 and not 1080.0


# -----------------------------------------------------------------------------
# dates


@pytest.mark.parametrize('locale, text', [
    (locale, text) for locales, texts in (
        (('en_US', 'en_GB', 'de', 'hu'), ('2026-05-03', '2026/05/03', '2026.5.3', '2026. 05. 03', '2026年5月3日')),
        (('en_US', 'en_GB'), ('3 May 2026', '3rd of May 2026', '3rd May, 2026', '03-May-2026', '3-May-26', "3 May '26",
                              'May 3, 2026', 'May 3rd 2026', 'MAY 3,2026')),
        (('en_US',), ('05/03/2026', '5.3.26', '05-03-2026', '5/3/26')),
        (('en_GB', 'de', 'fr'), ('03/05/2026', '3.5.26', '03-05-2026', '3/5/26')),
        (('de',), ('3. Mai 2026', '3.Mai 2026', '3. 5. 2026')),
        (('fr',), ('3 mai 2026', '3-mai-2026')),
        (('hu',), ('2026. május 3', '2026. máj. 3', '26.05.03', '2026 május 3')),
    ) for locale in locales for text in texts])
def test_dates_with_a_year(locale, text):
    for today in (None, TODAY):
        assert found('date', locale, text, today) == [(text, '2026-05-03')]
        assert found('date', locale, f'({text}), 7 x', today) == [(text, '2026-05-03')]


@pytest.mark.parametrize('locale, text, value', [
    ('en_US', '3rd of May', '2026-05-03'), ('en_US', 'May 3rd', '2026-05-03'), ('en_US', '5/3', '2026-05-03'),
    ('en_GB', '5/3', '2026-03-05'), ('de', '5.3', '2026-03-05'), ('hu', 'május 3', '2026-05-03'),
    ('hu', '05. 03', '2026-05-03'), ('en_US', 'December 31', '2025-12-31'), ('en_US', 'Nov 1', '2026-11-01'),
    ('en_US', 'feb 29', '2028-02-29'), ('en_US', 'today', TODAY), ('en_US', 'Tomorrow', '2026-05-21'),
    ('de', 'Vorgestern', '2026-05-18'), ('hu', 'tegnap', '2026-05-19'), ('fr', 'aujourd’hui', TODAY),
    ('zh', '明天', '2026-05-21'), ('fr', '1er mai', '2026-05-01'),
])
def test_dates_without_a_year_are_those_nearest_to_the_reference_date(locale, text, value):
    around = f'{text}.' if LOCALES[locale]['dots'] else f'{text}, 7:00'
    assert found('date', locale, around, TODAY) == [(text, value)]
    assert found('date', locale, around) == []


@pytest.mark.parametrize('locale, text', [
    ('en_US', '31 February 2026'), ('en_US', 'Feb 29, 2026'), ('en_US', '31/12/2026'), ('en_US', '2026-13-01'),
    ('en_US', '0/5/2026'), ('en_US', '0000-01-01'), ('en_US', '1.5.3.26'), ('en_US', '192.168.10.1'),
    ('en_US', 'May 2026'), ('en_US', 'dismay 3'), ('en_US', '3 Mai'), ('en_US', '3 Mayor'), ('en_US', 'May 3.5'),
    ('en_US', '5.3.'), ('en_US', 'Monday'), ('en_US', '4711/3'), ('en_US', 'May 3rds'), ('de', '5.3'),
    ('de', 'Übermorgens'), ('hu', '05/03/2026'),
])
def test_what_is_no_date(locale, text):
    assert values('date', locale, text, TODAY) == []


def test_years_of_two_digits_and_several_dates():
    assert values('date', 'en_US', '1/2/69, 1/2/70, 1/2/00') == ['2069-01-02', '1970-01-02', '2000-01-02']
    text = 'May 3, 2026, May 3rd 2026 - 10-12 May 2026; 3 May 5 2026, 2026-05-03T10:00'
    assert found('date', 'en_US', text, TODAY) == [
        ('May 3, 2026', '2026-05-03'), ('May 3rd 2026', '2026-05-03'), ('12 May 2026', '2026-05-12'),
        ('May 5 2026', '2026-05-05'), ('2026-05-03', '2026-05-03')]
    with pytest.raises(ValueError):
        find_candidates('date', 'today', LOCALES['en_US'], 'today')


# -----------------------------------------------------------------------------
# times, and dates with times


@pytest.mark.parametrize('locale, text, expected', [
    ('en_US', '14:30 and 14:30:05', [('14:30', '14:30:00'), ('14:30:05', '14:30:05')]),
    ('en_US', '2 pm, 2PM, 2:30 p.m., 2.30pm.', [('2 pm', '14:00:00'), ('2PM', '14:00:00'), ('2:30 p.m.', '14:30:00'),
                                                ('2.30pm', '14:30:00')]),
    ('en_US', '12 am, 12:15 pm, 0:15, 14:30 pm', [('12 am', '00:00:00'), ('12:15 pm', '12:15:00'), ('0:15', '00:15:00'),
                                                  ('14:30 pm', '14:30:00')]),
    ('en_US', '10-12:30, 9:00-10:00', [('12:30', '12:30:00'), ('9:00', '09:00:00'), ('10:00', '10:00:00')]),
    ('en_US', '10:00:00Z 10:00:00.5+02:00', [('10:00:00Z', '10:00:00'), ('10:00:00.5+02:00', '10:00:00')]),
    ('en_US', '2, 2.30, 24:00, 12:60, 1:2, 13 pm, 1:30:99, 10:300, a1:30, 5 pmx', []),
    ('de', 'um 14 Uhr, 14.30 Uhr, 14 Uhr 30, 5 am Tor', [('14 Uhr', '14:00:00'), ('14.30 Uhr', '14:30:00')]),
    ('hu', '2:30 du., 2 de, 14:30', [('2:30 du.', '14:30:00'), ('14:30', '14:30:00')]),
    ('zh', '下午2:30', [('下午2:30', '14:30:00')]),
    ('fa', '۱۴:۳۰', [('۱۴:۳۰', '14:30:00')]),
])
def test_times(locale, text, expected):
    assert found('time', locale, text) == expected


@pytest.mark.parametrize('locale, text', [
    ('en_US', '2026-05-03T10:00:00'), ('en_US', '2026-05-03 10:00'), ('en_US', '2026-05-03t10:00:00.25Z'),
    ('en_US', 'May 3 2026 at 10:00'), ('en_US', 'May 3, 2026, 10 am'), ('en_US', '10:00, 3 May 2026'),
    ('en_GB', '10:00 on 3 May 2026'), ('de', '3. Mai 2026 um 10:00'), ('de', '10 Uhr am 3.5.2026'),
    ('fr', '3 mai 2026 à 10:00'), ('hu', '2026. május 3. 10:00'), ('hu', '2026.05.03. 10:00'),
])
def test_a_date_and_a_time_side_by_side(locale, text):
    assert found('date-time', locale, text) == [(text, '2026-05-03T10:00:00')]
    assert found('date-time', locale, f'x {text}; y') == [(text, '2026-05-03T10:00:00')]


def test_a_date_or_a_time_alone_is_no_date_time():
    for text in ('May 3 2026', '10:00', 'May 3 2026 for 10:00', 'May 3 2026 and May 4 2026', '10:00 11:00',
                 'May 3 at 10:00'):
        assert found('date-time', 'en_US', text) == [], text
    assert found('date-time', 'en_US', 'May 3 at 10:00', TODAY) == [('May 3 at 10:00', '2026-05-03T10:00:00')]
    assert values('date-time', 'en_US', '2026-05-03 10:00 2026-05-04 11:00, 12:00') == [
        '2026-05-03T10:00:00', '2026-05-04T11:00:00']


# -----------------------------------------------------------------------------
# any text

FORMS = {'date': r'\d{4}-\d\d-\d\d', 'time': r'\d\d:\d\d:\d\d', 'date-time': r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d'}
PARTS = '1 23 2026 05 . , : / - + ’ am pm May 3rd of ma tomorrow T Z $ € A é ß İ ſ K 😀 ١ ５ 年 月 日 " \ud800 \n \xa0'
parts = st.sampled_from([*PARTS.split(' '), ' '])


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(st.one_of(st.text(), st.lists(parts, max_size=20).map(''.join)), st.sampled_from(sorted(LOCALES)))
def test_of_any_text_candidates_are_in_order_apart_and_of_their_kind(text, locale):
    assert len(fold(text)) == len(text)
    for kind in KINDS:
        candidates = find_candidates(kind, text, LOCALES[locale], TODAY)
        ends = [0, *(candidate.end for candidate in candidates)]
        for end, (start, stop, value) in zip(ends, candidates):
            assert end <= start < stop <= len(text)
            if kind in FORMS:
                assert re.fullmatch(FORMS[kind], value) and (kind == 'time' or date.fromisoformat(value[:10]))
            else:
                assert type(value) is int or type(value) is float and kind == 'number' and not value.is_integer()


@pytest.mark.parametrize('part', ['1', '1,', '1.', '1:', '1-', '1 ', '1 000 ', 'a1', '-', '"', '😀', '１', ' ', 'a',
                                  'may ', '3 may ', '3rd of ', '5/3 ', '2026-', '2026. ', '10:00 ', '12:00:00.1',
                                  '2 p.m. '])
def test_a_text_of_eight_times_the_length_takes_about_eight_times_as_long(part):
    def measure(length):
        text, start = (part * length)[:length], time.process_time()
        for kind in KINDS:
            find_candidates(kind, text, locale, TODAY)
        return time.process_time() - start
    for locale in (LOCALES['en_GB'], LOCALES['hu']):
        measure(100)                                            # the regular expressions are made once
        seconds = [(measure(500), measure(4000)) for _ in range(4)]
        short, long = map(min, zip(*seconds))
        assert long < 24 * short + 0.005                        # 64 times, if it grows with the square


# -----------------------------------------------------------------------------
# data/snips/prepare.py: texts with values to copy


def test_requests_are_read_from_the_published_folder_and_from_lines(tmp_path):
    folder = tmp_path / 'published'
    for intent, encoding, texts in (
            ('RateBook', 'utf-8', [[('rate ', None), ('Café Größe ', 'object_name'), (' 5', None)]]),
            ('PlayMusic', 'latin-1', [[('play ', None), ('Beyoncé', 'artist')], [('play', None)]])):
        requests = [{'data': [{'text': text} | ({'entity': slot} if slot else {}) for text, slot in request]}
                    for request in texts]
        (folder / intent).mkdir(parents=True)
        (folder / intent / f'train_{intent}_full.json').write_text(
            json.dumps({intent: requests}, ensure_ascii=False), encoding=encoding)
        (folder / intent / f'train_{intent}.json').write_text('a part of it')
    records = run_source(tmp_path, 'snips', 'published')
    assert sorted(records, key=lambda record: record['text']) == [
        {'text': 'play', 'answer': {'intent': 'PlayMusic', 'slots': []}},
        {'text': 'play Beyoncé', 'answer': {'intent': 'PlayMusic', 'slots': [{'slot': 'artist', 'value': 'Beyoncé'}]}},
        {'text': 'rate Café Größe  5',
         'answer': {'intent': 'RateBook', 'slots': [{'slot': 'object_name', 'value': 'Café Größe'}]}}]
    (tmp_path / 'lines.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records[::-1]))
    again = run_source(tmp_path, 'snips', 'lines.jsonl')
    assert sorted(map(str, again)) == sorted(map(str, records))


@pytest.mark.parametrize('content, message', [
    (None, 'nothing.jsonl: No such file'), ({}, 'nothing.jsonl has no files train_<intent>_full.json'),
    ('{"text": "a", "answer": {"intent": "b"}}', 'nothing.jsonl, line 1 is not {"text", "answer"'),
    ('{"text": "a", "answer": {"intent": "b", "slots": [{"slot": "c", "value": 5}]}}', 'line 1 is not'),
    ({'train_a_full.json': '{"a": [{"text": "b"}]}'}, 'train_a_full.json is not {intent: [{"data"'),
    ({'train_a_full.json': '{"a": '}, 'train_a_full.json is not'),
])
def test_another_file_exits_with_a_message(tmp_path, content, message):
    path = tmp_path / 'nothing.jsonl'
    if isinstance(content, dict):
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text)
    elif content:
        path.write_text(content)
    (tmp_path / 'snips').mkdir()
    shutil.copy(ROOT / 'data/snips/prepare.py', tmp_path / 'snips')
    shutil.copy(ROOT / 'data/output.py', tmp_path)
    done = subprocess.run([sys.executable, 'snips/prepare.py', path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / 'snips/input.jsonl').exists()
