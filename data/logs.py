"""Logs of calls to an LLM: the text in each prompt, and what was answered. Only the standard library.

    log = Log(['output.jsonl', 'requests.jsonl'])      # or Log(['log.jsonl'], '... {text} ...')
    for line in log: line.text, line.reply             # log.template: the prompt around the texts

A line is one of these, with bodies of /v1/chat/completions or /v1/responses:

    {"messages": [..., {"role": "assistant", "content": "{...}"}]}              a fine-tuning file
    {"request": {"messages": [...]}, "response": {"choices": [...]}}            a logged pair
    {"body": {"messages": [...]}, "response": {"body": {"choices": [...]}}}     another
    {"custom_id": "1", "response": {"body": {"choices": [...]}}}                a batch output ...
    {"custom_id": "1", "body": {"messages": [...]}}                             ... and its input

The text is what differs in the last user messages: it stands between their common beginning and end.
"""
import gzip
import json
import zlib
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix

FEW = 20  # so few different messages may begin alike by accident
OPENING = ':>"\'`([{<|=#*-\n：「『“‘【（《'  # after which a prompt has its text
CLOSING = '"\'`)]}<|=#*-\n」』”’】）》'


@dataclass
class Line:
    """a line of a log. problem: why it cannot be used, as (one word, a sentence); else ''."""
    file: str
    number: int                     # from 1
    record: object = None           # its JSON value
    text: str = ''                  # what the prompt holds in place of {text}
    reply: dict | None = None       # the body of the response; None: not a line of a log
    problem: tuple | str = ''

    def say(self, what):
        """'file line 3: what'."""
        return f'{self.file} line {self.number}: {what}'


# -----------------------------------------------------------------------------
# one line


def find_body(part):
    """the dict of a request or a response, which may lie under "body" or be JSON in a text; {} if there is none."""
    if isinstance(part, str):
        try:
            part = json.loads(part)
        except (ValueError, RecursionError):
            return {}
    if isinstance(part, dict) and isinstance(part.get('body'), (dict, str)):
        return find_body(part['body'])
    return part if isinstance(part, dict) else {}


def split_call(record):
    """(body of the request, body of the response) of a line's JSON value, {} for each that it lacks. None if
    it is not a line of a log."""
    if not isinstance(record, dict):
        return None
    request, response = find_body(record.get('request', record)), find_body(record.get('response'))
    messages = request.get('messages')
    if isinstance(messages, list) or request is not record and 'input' in request:
        last = messages[-1] if messages else None
        if not record.get('response') and isinstance(last, dict) and last.get('role') == 'assistant':
            return {'messages': messages[:-1]}, {'choices': [{'message': last}]}  # a fine-tuning file
        if isinstance(record.get('response'), str) and not response.keys() & {'choices', 'output', 'error'}:
            response = {'choices': [{'message': {'content': record['response']}}]}  # the answer alone
        return request, response
    is_output = 'custom_id' in record and 'response' in record
    return ({}, response) if is_output or 'choices' in response or 'output' in response else None


def read_content(content):
    """the text of a message's content: a string, or a list of parts. ValueError if a part is no text."""
    parts = content if isinstance(content, list) else [{'text': content}]
    texts = [part.get('text') if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('a message is not a text')
    return '\n'.join(texts)


def read_prompt(request):
    """(what comes before, the last user message) of a request's body. ValueError if it has no message."""
    messages = request.get('messages', request.get('input'))
    if isinstance(messages, str):
        messages = [{'role': 'user', 'content': messages}]
    if request.get('instructions'):
        messages = [{'role': 'system', 'content': request['instructions']}, *(messages or [])]
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError('the request has no messages')
    last = max((n for n, m in enumerate(messages) if m.get('role') == 'user'), default=len(messages) - 1)
    contents = [read_content(message.get('content') or '') for message in messages[:last + 1]]
    return '\n\n'.join(contents[:-1]), contents[-1]


def read_reply(reply):
    """(content, tokens) of the body of a response. content: the text, or the arguments of a tool call. tokens:
    list of (bytes, log probability, [(bytes, log probability) of each alternative]), [] if it has none.
    ValueError if there is no answer in it."""
    try:
        if 'output' in reply:                                   # /v1/responses
            parts = [part for item in reply['output'] if item.get('type') == 'message' for part in item['content']]
            calls = [item for item in reply['output'] if item.get('type') == 'function_call']
            content = ''.join(part.get('text') or '' for part in parts) or (calls[0]['arguments'] if calls else '')
            listed = [token for part in parts for token in part.get('logprobs') or []]
        else:
            choice = reply['choices'][0]
            message = choice['message']
            calls = message.get('tool_calls') or [{'function': message.get('function_call')}]
            content = message.get('content') or (calls[0].get('function') or {}).get('arguments') or ''
            content = content if isinstance(content, str) else read_content(content)
            listed = (choice.get('logprobs') or {}).get('content') or []
        as_bytes = lambda token: bytes(token.get('bytes') or token['token'].encode('utf-8', 'replace'))
        return content, [(as_bytes(token), float(token['logprob']), [(as_bytes(other), float(other['logprob']))
                                                                    for other in token.get('top_logprobs') or []])
                         for token in listed]
    except (LookupError, TypeError, AttributeError, ValueError):
        error = reply.get('error') if isinstance(reply, dict) else None
        said = error.get('message') if isinstance(error, dict) else error
        raise ValueError(f'no answer{": " if said else ""}{str(said or "")[:200]}') from None


# -----------------------------------------------------------------------------
# files


def read_lines(path):
    """yields a Line for each line of a .jsonl, which may be packed as .gz, that is not blank."""
    with open(path, 'rb') as file:
        packed = file.peek(2)[:2] == b'\x1f\x8b'
        for number, line in enumerate(gzip.open(file) if packed else file, 1):
            if not line.strip():
                continue
            try:
                yield Line(str(path), number, json.loads(line))
            except UnicodeDecodeError:
                yield Line(str(path), number, problem=('bad_utf8', 'it is not UTF-8'))
            except (ValueError, RecursionError) as error:
                yield Line(str(path), number, problem=('bad_json', f'it is not JSON: {error}'))


def is_log(path):
    """True if the first line of a file that is JSON, of a hundred, is one of a log."""
    try:
        lines = (line for line in islice(read_lines(path), 100) if not line.problem)
        return split_call(next(lines, Line('', 0)).record) is not None
    except (OSError, EOFError, zlib.error):
        return False


def find_template(messages, before, after):
    """the prompt around the texts of some messages, with {text} in it. messages: all that differ, or FEW and
    one more; before, after: the common beginning and end of all.

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
    return before + '{text}' + after[(few and strong or weak)[0]:]


def clean(text):
    """as distil.space.clean: each run of whitespace is one space."""
    return ' '.join(text.split())


def text_between(message, template):
    """the text that a message has in place of the template's {text}; None if it is another prompt. Whitespace
    may differ."""
    before, _, after = map(clean, template.partition('{text}'))
    whole = clean(message)
    if whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before) + len(after):
        return whole[len(before):len(whole) - len(after)].strip()
    return None


def find_text(system, user, template):
    """the text in a prompt, that of the user alone or after what comes before it; None if the template does
    not fit."""
    text = text_between(user, template)
    return text if text is not None or not system else text_between(f'{system} {user}', template)


class Log:
    """the lines of some files, in their order; those of other kinds are left as they are (Line.record).

    template: the user message with {text} in it; '': found. prompt: one that is taken if it fits most
    messages. Found: template, '' if no line is a call; system: what comes before the user messages, '' if it
    differs; n_unanswered: inputs of a batch without an output. Reads all files once, and again at each
    iteration.
    """

    def __init__(self, paths, template='', prompt=''):
        self.paths, self.requests = paths, {}                   # {custom_id: prompt, None if two differ}
        some, systems, answered, n_calls, n_fit = {}, set(), set(), 0, 0  # some: FEW different messages, one more
        before = after = None                                   # what all have in common
        for line in (line for path in paths for line in read_lines(path)):
            call = None if line.problem else split_call(line.record)
            if not call:
                continue
            custom_id = str(line.record.get('custom_id'))
            answered |= {custom_id} if call[1] else set()
            try:
                system, user = read_prompt(call[0])
            except ValueError:                                  # the output of a batch, or unusable
                continue
            if 'custom_id' in line.record and not call[1]:      # the input of a batch
                known = self.requests.setdefault(custom_id, (system, user))
                self.requests[custom_id] = known if known == (system, user) else None
            before, after = (user, user) if before is None else (before, after)
            if not user.startswith(before):
                before = commonprefix([before, user])
            if not user.endswith(after):
                after = commonprefix([after[::-1], user[::-1]])[::-1]
            some |= {user: True} if len(some) <= FEW else {}
            systems |= {system} if len(systems) < 2 else set()
            n_calls += 1
            n_fit += prompt.strip() not in ('', '{text}') and find_text(system, user, prompt) is not None
        self.system = systems.pop() if len(systems) == 1 else ''
        self.template, self.n_unanswered = template, len(self.requests.keys() - answered)
        if not template and n_calls:
            found = find_template([*some], before, after) if len(some) > 1 else '{text}'
            self.template = prompt if 2 * n_fit > n_calls else found

    def print_template(self):
        """prints the template, if the files have calls; of a long one what is near the text."""
        before, _, after = self.template.partition('{text}')
        if self.template:
            before = before if len(before) < 300 else f'... {before[-200:]}'
            after = after if len(after) < 300 else f'{after[:200]} ...'
            print(f'template: {before}{{text}}{after}'.replace('\n', '\\n'))
        if self.template == '{text}':
            print('the prompts have no common beginning or end, so a text is a whole prompt; if that is wrong, '
                  "add --template='... {text} ...'")

    def __iter__(self):
        for line in (line for path in self.paths for line in read_lines(path)):
            call = None if line.problem else split_call(line.record)
            if call:
                line.reply, custom_id = call[1], str(line.record.get('custom_id'))
                try:
                    line.text = self.find_text(call[0], custom_id)
                    if not line.reply and custom_id in self.requests:
                        line.problem = 'request', 'it is the input of a batch'
                except ValueError as error:
                    line.problem = 'unusable', str(error)
            yield line

    def find_text(self, request, custom_id):
        """the text in a request, or in that of the same custom_id if it is empty. ValueError if there is none."""
        if not request and custom_id == 'None':
            raise ValueError('it has no request')
        if not request and self.requests.get(custom_id) is None:
            raise ValueError(f'two requests have its custom_id, {custom_id!r}' if custom_id in self.requests else
                             f'no request has its custom_id, {custom_id!r}: name the input of the batch too')
        system, user = read_prompt(request) if request else self.requests[custom_id]
        text = find_text(system, user, self.template)
        if text is None:
            raise ValueError(f'its prompt does not fit the template: {clean(user)[:80]!r}')
        return text
