"""What a reply of an LLM server is: an answer, a refusal, a reason to wait or the end; and why an answer is none.

    kind, value = judge_reply(reply)
"""
import json
import re

from data.objects import find_object
from distil.keys import hide_keys

# the text of the request is the reason, whatever else the message names
OF_THE_TEXT = re.compile(r'context[_ ](length|window|size)|content[_ ](filter|management|policy)|flagged|moderation|'
                         r'too (long|many tokens)|string_above_max_length', re.I)
NO_MONEY = re.compile('insufficient_quota|billing_hard_limit_reached|billing_not_active')
BUSY = 408, 425, 429, 503, 529      # it wants less at a time, which says nothing about the text
REFUSED = 400, 413, 422             # the text, or an option of the request
DENIED = 403, 451                   # the text (moderation), or everything


def judge_reply(reply):
    """(kind, value) of an httpx.Response. kind: 'answer', with its JSON as the value, else with a message: 'refused';
    'text', refused because of the text; 'denied', the text or everything; 'busy' and 'failed', which may pass; 'stop',
    which will not."""
    status, kind = reply.status_code, reply.headers.get('content-type', '').partition(';')[0].strip().lower()
    is_page = kind == 'text/html' or reply.content[:200].lstrip().lower().startswith((b'<!doctype html', b'<html'))
    if 300 <= status < 400:
        place = hide_keys(reply.headers.get('location', 'nowhere'))[:200]
        return 'stop', f'says {status} and points to {place}; that is the URL to set, without /chat/completions'
    if is_page and status < 500 and status not in BUSY:
        return 'stop', f'answers with a page for people, status {status}; is it the URL of an API (.../v1)?'
    if status != 200:
        return judge_error(status, error_message(reply), reply.text)
    try:
        content = reply.json()
    except (ValueError, RecursionError):
        return 'failed', f'answers with no JSON: {hide_keys(reply.text[:100])!r}'
    error = find_error(content)
    if not error:
        return 'answer', content
    code = error.get('code') if isinstance(error, dict) else None
    code = int(code) if str(code).isdigit() and 400 <= int(code) < 600 else 500
    return judge_error(code, f'(in a reply with status 200) {message_of(error)}', json.dumps(error))


def judge_error(status, message, whole):
    """(kind, message) of an error. whole: the text of the reply, which may have a code that the message lacks."""
    said = f'says {status} {message}'
    if status == 402 or NO_MONEY.search(whole):
        return 'stop', said
    if status in REFUSED:
        return 'text' if status == 413 or OF_THE_TEXT.search(whole) else 'refused', message
    if status in DENIED:
        return 'denied', said
    if status in BUSY:
        return 'busy', said
    return 'stop' if status < 500 and status != 409 or status in (501, 505) else 'failed', said


def find_error(content):
    """the error in the JSON of a reply that has status 200: a dict, a text, or None if there is none."""
    if not isinstance(content, dict):
        return None
    choice = first_choice(content)
    message = choice.get('message')
    empty = not isinstance(message, dict) or not (message.get('content') or message.get('tool_calls'))
    if choice.get('finish_reason') == 'error' and empty:
        return choice.get('error') or content.get('error') or 'finish_reason: error'
    return content.get('error') or choice.get('error') or None


def first_choice(content):
    """the first choice of a reply, {} if it has none."""
    choices = content.get('choices') if isinstance(content, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def message_of(error):
    """the message of an error, in one line and without keys."""
    message = error.get('message') if isinstance(error, dict) else error
    if not message or not isinstance(message, str):
        message = json.dumps(error)
    return hide_keys(' '.join(message.split()))[:200]


def error_message(reply):
    """the message in the reply of a server that refuses, in one line and without keys."""
    try:
        return message_of(reply.json()['error'])
    except (ValueError, LookupError, TypeError):
        return hide_keys(' '.join(reply.text.split()))[:200]


# -----------------------------------------------------------------------------
# an answer that is none


def find_refusal(reply):
    """the words with which a model refuses to answer, '' if it does not. reply: the JSON of it."""
    message = first_choice(reply).get('message')
    refusal = message.get('refusal') if isinstance(message, dict) else None
    return refusal if isinstance(refusal, str) else ''


def explain_invalid(schema, content, reply):
    """why an answer breaks the schema, with the beginning of it. content: its text; reply: the JSON it came in."""
    if refusal := find_refusal(reply):
        return hide_keys(f'the model refuses: {refusal[:200]!r}')
    choice = first_choice(reply)
    message = choice.get('message') if isinstance(choice.get('message'), dict) else {}
    thought = message.get('reasoning_content') or message.get('reasoning')
    answer, finish, found = find_object(content)[0], choice.get('finish_reason'), []
    if finish == 'length':
        found.append('finish_reason: length, it was cut off')
    elif finish not in (None, 'stop', 'tool_calls', 'function_call'):
        found.append(f'finish_reason: {finish}')
    if thought and not content:
        found.append(f'the model only thought (reasoning_content, {len(str(thought)):,} characters): switch its '
                     'thinking off')
    elif answer is None:
        found.append('it has no JSON object')
    else:
        try:
            schema.numbers(answer)
        except ValueError as error:
            found.append(str(error))
    return hide_keys(f'{content[:200]!r} ({"; ".join(found) or "it breaks the schema"})')
