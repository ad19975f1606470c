"""The prompt around the texts of a log: how it is found, and what else changes in it."""
import random
import re

import pytest

from data.logs import Log
from data.templates import FEW, text_between
from distil.prompts import prompt_messages, prompt_text
from serve.prompts import Prompts, read_turns
from tests.test_labels import write_lines
from tests.test_logs import TEMPLATE, request


def log_of(tmp_path, messages, **how):
    lines = [{'request': {'messages': [{'role': 'user', 'content': message}]}, 'response': {}} for message in messages]
    return Log([write_lines(tmp_path / 'a.jsonl', lines)], **how)


@pytest.mark.parametrize('template', [
    'Message: {text}\n', 'Label "{text}" now', '请分类：{text}', '<text>{text}</text>\nJSON:', '{text}',
    '{text}\n\nJSON:', 'Do it: now.\n\n```\n{text}\n```\n'])
@pytest.mark.parametrize('texts', [
    ['I am here.', 'I am there.', 'I was here.'], ['the cat', 'the dog'], ['a', 'ab', 'abc'], ['我好', '我不好'],
    ['été', 'éte', '😀 x'], ['x' * 4000 + 'y', 'x' * 4000 + 'z', 'b']])
def test_texts_that_begin_and_end_alike_by_accident_stay_whole(tmp_path, template, texts):
    log = log_of(tmp_path, [template.replace('{text}', text) for text in texts])
    assert log.template == template and [line.text for line in log] == texts


def test_the_template_of_many_prompts_ends_between_words(tmp_path):
    texts = [f'{word} {n}' for word in ('on', 'of', 'or') for n in range(FEW)]
    template = 'You sort: messages. Classify the message {text} into one of three'
    assert log_of(tmp_path, [template.replace('{text}', text) for text in texts]).template == template


def test_one_prompt_or_several_show_no_template_and_one_can_be_given(tmp_path, capsys):
    for messages in (['Message: a'], ['Message: a'] * 3, ['Sort: a', 'Rank: b']):
        log = log_of(tmp_path, messages)
        assert log.template == '{text}' and log.system == ''
        log.print_template()
        assert 'no common beginning' in capsys.readouterr().out
    log = log_of(tmp_path, ['Sort: a', 'Rank: b'], template='Sort: {text}')
    assert [line.text or line.problem[0] for line in log] == ['a', 'unusable']
    assert log_of(tmp_path, ['Sort: the a', 'Sort: the b', 'x'], prompt='Sort: {text}').template == 'Sort: {text}'
    assert log_of(tmp_path, ['Sort: the a', 'x', 'y'], prompt='Sort: {text}').template == '{text}'


def test_whitespace_of_a_template_may_differ_and_a_system_message_may_belong_to_it():
    assert text_between('a  b:\n x  y \n\nz', 'a b: {text} z') == 'x y'
    assert text_between('a b: x', 'a c: {text}') is None and text_between('ab', 'ab{text}b') is None


# -----------------------------------------------------------------------------
# what else changes in a prompt

DAYS = '2026-01-05', '2026-02-17', '2026-02-18'
CHANGING = {
    'Current time: {*}\nClassify the message.\nMessage: {text}': DAYS,
    'Current time: {*}. Message: {text}\n': ['2026-01-05 10:23:11', '2026-01-05 10:24:01', '2026-11-30 08:00:00'],
    'Today is {*}.\n\n{text}\n\nAnswer in JSON:': [
        'Monday, January 5, 2026', 'Friday, May 8, 2026', 'Sunday, July 5, 2026'],
    'Date: {*}\n\n{text}\n\nJSON:': DAYS,
    'Heute ist {*}.\nNachricht: {text}': ['Montag, 5. Januar 2026', 'Dienstag, 6. Mai 2026', 'Freitag, 8. Mai 2026'],
    '日期：{*}\n请分类：{text}': ['2026年1月5日', '2026年2月7日', '2026年12月31日'],
    'user_id: {*}\nMessage: {text}': ['u-8371', 'u-12', 'abc77'],
    '{text}\n---\nUser: {*}\nSort it.': ['4711', '4712', '99'],
    'Request {*} at {*}: label "{text}" now': [
        ('4f3c2b1a-0000-4000-8000-123456789abc', '10:22'), ('1f3c2b1a-0000-4000-8000-123456789abc', '23:59'),
        ('4f3c2b1a-ffff-4000-8000-123456789abc', '08:00 PM')],
    'At {*} (knowledge until 2024-06-01) the user u1 wrote: {text}': DAYS,
}


def fill(template, changing, text):
    for part in changing if isinstance(changing, tuple) else [changing]:
        template = template.replace('{*}', part, 1)
    return template.replace('{text}', text)


@pytest.mark.parametrize('template', CHANGING)
@pytest.mark.parametrize('n', [6, 400])
def test_dates_and_ids_beside_the_text_do_not_land_in_it(tmp_path, capsys, template, n):
    """in short and long logs, even if the second day comes late; the same text under two dates is one text."""
    rng = random.Random(0)
    texts = [' '.join(rng.choice(['cat', 'dog', 'the', 'on', '2026-01-05', '10:22', 'user 7', 'ran']) for _ in range(5))
             for _ in range(n // 2)]
    texts = 2 * [rng.choice(['I', 'you', '7', 'Ünal']) + ' ' + text for text in texts]
    days = CHANGING[template]
    log = log_of(tmp_path, [fill(template, days[min(2, 3 * i // n)], text) for i, text in enumerate(texts)])
    assert log.template == template and [line.text for line in log] == texts
    log.print_template()
    assert '{*} stands for what changes beside the text' in capsys.readouterr().out
    later = fill(template, ('2027-03-01', '2027-03-02'), 'a new one')
    later = [{'role': 'user', 'content': later}]                # as serve.py reads it
    assert Prompts([template]).find_text(read_turns(later, 'messages'), 'messages')[0] == 'a new one'


@pytest.mark.parametrize('template', ['Message: {text}', '{text}\nJSON:', 'On 2026-01-05 a user wrote: {text}'])
@pytest.mark.parametrize('texts', [
    ['2026-01-05 lunch?', '2026-01-05 dinner', '2026-03-07 tea', '2027-03-07 x'], ['12:30', '12:45', '13:00'],
    ['1', '2', '33'], ['2026-01-05\n\nlunch', '2026-01-06\n\nlunch', '2026-01-07\n\ntea'],
    ['Due: 2026-01-05', 'Due: 2026-01-06', 'paid on 2026-01-06'], ['user 7 ran', 'user 8 sat'],
    ['From: ann Stars: 5', 'From: bob Stars: 4', 'From: eve Stars: 3'], ['Monday', 'Tuesday']])
@pytest.mark.parametrize('times', [1, 30])
def test_dates_and_numbers_of_the_text_stay_in_it(tmp_path, template, texts, times):
    if times > 1:
        texts = [f'{text} {n}' for n in range(times) for text in texts]
    log = log_of(tmp_path, [template.replace('{text}', text) for text in texts])
    found = [line.text for line in log]
    texts = [' '.join(text.split()) for text in texts]
    assert '{*}' not in log.template
    assert all(text.endswith(part) and len(text.removesuffix(part).split()) <= 2 and not re.search(
        r'\d', text.removesuffix(part)) for text, part in zip(texts, found)), (log.template, found[:4])


def test_a_date_in_the_system_message_is_a_part_of_the_prompt_that_is_not_read(tmp_path):
    systems = [f'You label messages. It is {day}.' for day in DAYS]
    lines = [{'request': request(f'text {n}', system=systems[n % 3]), 'response': {}} for n in range(9)]
    log = Log([write_lines(tmp_path / 'a.jsonl', lines)])
    assert (log.system, log.template) == ('You label messages. It is {*}.', TEMPLATE)
    prompt = f'{log.system}\n\n{log.template}'
    assert [line.text for line in Log(log.paths, prompt=prompt)] == [f'text {n}' for n in range(9)]
    turns = read_turns(request('new', system='You label messages. It is 2027-01-01.')['messages'], 'messages')
    assert Prompts([prompt]).find_text(turns, 'messages')[0] == 'new'
    for line in lines[:2]:
        line['request']['messages'][0]['content'] += ' Be quick.'
    assert Log([write_lines(tmp_path / 'a.jsonl', lines)]).system == ''


@pytest.mark.parametrize('message, template, text', [
    ('Name: Ann Lee\nText: a b', 'Name: {*} Text: {text}', 'a b'),
    ('Name: \nText: a b', 'Name: {*}\nText: {text}', 'a b'),
    ('a b\nName: x Name: y', '{text} Name: {*}', 'a b\nName: x'),
    ('1 Text: a Text: b', '{*} Text: {text}', 'a Text: b'), ('Now: 10:22\n\na b', 'Now: {*} {text}', 'a b'),
    ('x a y 1 z 2', 'x {text} y {*} z {*}', 'a'), ('Name: Ann', 'Name: {*} Text: {text}', None),
    ('Text: Name:', 'Name: {*} Text: {text}', None), ('a b', 'a {*} b {text}', ''), ('ab', 'ab {*} b {text}', None)])
def test_a_template_may_have_parts_that_are_not_read(tmp_path, message, template, text):
    assert text_between(message, template) == (text and ' '.join(text.split()))
    if text:
        log = log_of(tmp_path, [message], template=template)
        assert [line.text for line in log] == [' '.join(text.split())]
        turns = read_turns([{'role': 'user', 'content': message}], 'messages')
        assert Prompts([template]).find_text(turns, 'messages')[0] == ' '.join(text.split())


def test_what_is_not_read_is_left_out_when_a_prompt_is_asked():
    assert prompt_messages('Day: {*}\nText: {text}', 'a {*} {text}')[0]['content'] == 'Day: \nText: a {*} {text}'
    assert prompt_text('Day: {*}\nText: {text}') == 'Day: {*}\nText: {text}'
