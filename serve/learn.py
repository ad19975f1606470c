"""Templates from logged requests: the common beginnings and ends of their messages."""
import json
import sys
from collections import Counter, defaultdict

from serve.prompts import read_turns
from serve.request import Refusal

AT_LEAST = 3  # messages of one template


def read_prompts(lines):
    """yields (system and user messages as one string) for each logged request: a JSON body a line, of chat
    completions, responses or completions, or an object that holds one as `body`. Other lines are None."""
    for line in lines:
        try:
            body = json.loads(line)
            body = body['body'] if isinstance(body.get('body'), dict) else body
            messages = next(body[key] for key in ('messages', 'input', 'prompt') if key in body)
            if isinstance(messages, str):
                messages = [{'role': 'user', 'content': messages}]
            if body.get('instructions'):
                messages = [{'role': 'system', 'content': body['instructions']}, *messages]
            turns = read_turns(messages, 'messages')
            user = next(n for n, turn in enumerate(turns) if turn.role == 'user')
            yield '\n'.join(turn.text for turn in turns[:user + 1] if turn.role != 'assistant')
        except (ValueError, KeyError, AttributeError, TypeError, StopIteration, Refusal, RecursionError):
            yield None


def fixed_words(rows, n):
    """the words of a prompt that stand at place n of rows, tuples of words: one that four rows in five share,
    or up to three that 95 % share. [] if the words there are those of texts."""
    following = Counter(row[n] for row in rows if len(row) > n).most_common(3)
    following = [(word, count) for word, count in following if count >= AT_LEAST]
    if following and following[0][1] >= 0.8 * len(rows):
        return [following[0][0]]
    shared = sum(count for _, count in following) >= 0.95 * len(rows)
    return [word for word, _ in following] if shared else []


def common_beginnings(rows):
    """{beginning, a tuple of words: the rows that have it} of rows, tuples of words. Where the words are
    those of texts, a word of a tenth of the rows begins a prompt if fixed words come after it."""
    groups, result = [(0, rows)], defaultdict(list)
    while groups:
        n, rows = groups.pop()
        by_word = defaultdict(list)
        for row in rows:
            by_word[row[n] if len(row) > n else None].append(row)
        words = fixed_words(rows, n)
        if not words:
            words = [word for word, some in by_word.items() if word is not None
                     and len(some) >= max(5, 0.1 * len(rows)) and fixed_words(some, n + 1)]
            rest = [row for word, some in by_word.items() if word not in words for row in some]
            if len(rest) >= AT_LEAST:
                result[rest[0][:n]] += rest
        groups += [(n + 1, by_word[word]) for word in words]
    return dict(result)


def learn_templates(prompts):
    """[(template, number of prompts, up to three of their texts)], the most frequent first. prompts: strings.
    Whitespace is not kept, as templates match without it."""
    found = []
    for before, rows in common_beginnings([tuple(prompt.split())
                                           for prompt in dict.fromkeys(prompts)]).items():
        rest = [row[len(before):][::-1] for row in rows]
        for after, backwards in common_beginnings(rest).items():
            texts = [' '.join(row[len(after):][::-1]) for row in backwards]
            if (before or after) and '{text}' not in after and len({*texts}) >= AT_LEAST:
                template = ' '.join([*before, '{text}', *after[::-1]])
                found.append((template, len(texts), texts[:3]))
    return sorted(found, key=lambda item: -item[1])


def print_templates(path):
    """prints the templates of a file of logged requests, ready to paste into a config. Exits with a
    message if it cannot be read."""
    try:
        with open(path, encoding='utf-8-sig', errors='replace') as file:
            prompts = list(read_prompts(line for line in file if line.strip()))
    except OSError as error:
        sys.exit(f'{path} cannot be read: {error.strerror}')
    readable = [prompt for prompt in prompts if prompt]
    templates = learn_templates(readable)
    print(f'# {len(prompts)} requests, {len(readable)} with a user message')
    for template, count, texts in templates:
        print(f'# {count} of them, such as: {"; ".join(text[:60] for text in texts)}')
    print('templates = [')
    for template, _, _ in templates:
        print(f'    {template!r},')
    print(']')
