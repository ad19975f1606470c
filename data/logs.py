"""Logs of calls to an LLM: the text in each prompt, and what was answered. Only the standard library.

    log = Log(['output.jsonl', 'requests.jsonl'])      # or Log(['log.jsonl'], '... {text} ...')
    for line in log: line.text, line.reply             # log.template: the prompt around the texts

A line is one of these, with bodies of /v1/chat/completions or /v1/responses:

    {"messages": [..., {"role": "assistant", "content": "{...}"}]}              a fine-tuning file
    {"request": {"messages": [...]}, "response": {"choices": [...]}}            a logged pair
    {"body": {"messages": [...]}, "response": {"body": {"choices": [...]}}}     another
    {"custom_id": "1", "response": {"body": {"choices": [...]}}}                a batch output ...
    {"custom_id": "1", "body": {"messages": [...]}}                             ... and its input
    {"messages": "[...]", "proxy_server_request": "{}", "response": "{...}"}    a spend log of LiteLLM
    {"type": "GENERATION", "input": "{...}", "output": "{...}"}                 an export of Langfuse
    {"request_body": {"messages": [...]}, "response_body": {"choices": [...]}}  one of Helicone
    {"prompt": "...", "completion": "{...}"}                                    a pair of texts

A response may be the chunks of a stream: a list, or the text that was sent. The text is what differs in the last user
messages (data/templates.py): it stands between their common beginning and end.
"""
import codecs
import gzip
import io
import json
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from os.path import commonprefix

if __package__:
    from data.calls import is_chunk, read_prompt, split_call
    from data.schemas import asked_schema, options_in
    from data.templates import (FEW, clean, find_changing_template, find_template, find_text, join_changing,
                                split_changing)
else:  # of data/prepare.py, whose files lie beside it
    from calls import is_chunk, read_prompt, split_call
    from schemas import asked_schema, options_in
    from templates import (FEW, clean, find_changing_template, find_template, find_text, join_changing,
                           split_changing)

UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
SOME = 200  # messages that are compared to find dates and ids
CHUNK = 'it is one chunk of a streamed answer; join those of an answer in one line, with its request'
TRIES = 4   # passes over the files in which a template with these is corrected


@dataclass
class Line:
    """a line of a log. problem: why it cannot be used, as (one word, a sentence); else ''."""
    file: str
    number: int                     # from 1
    record: object = None           # its JSON value
    text: str = ''                  # what the prompt holds in place of {text}
    reply: dict | None = None       # the body of the response; None: not a line of a log
    problem: tuple | str = ''
    options: dict = field(default_factory=dict)  # of the request's schema, for those properties that Log.given names

    def say(self, what):
        """'file line 3: what'."""
        return f'{self.file} line {self.number}: {what}'


# -----------------------------------------------------------------------------
# files


def read_lines(path):
    """yields a Line for each line of a .jsonl that is not blank. It may be packed as .gz, and be UTF-16 with a
    byte-order mark."""
    with open(path, 'rb') as raw:
        file = gzip.open(raw) if raw.peek(2)[:2] == b'\x1f\x8b' else raw
        is_utf16 = file.peek(2)[:2] in UTF16
        for number, line in enumerate(io.TextIOWrapper(file, 'utf-16', 'replace') if is_utf16 else file, 1):
            if not line.strip():
                continue
            try:
                yield Line(str(path), number, json.loads(line))
            except UnicodeDecodeError:
                yield Line(str(path), number, problem=('bad_utf8', 'it is not UTF-8'))
            except (ValueError, RecursionError) as error:
                yield Line(str(path), number, problem=('bad_json', f'it is not JSON: {error}'))


def is_log(path):
    """True if one of the first hundred lines of a file is one of a log; others may tell of the file or of an event."""
    try:
        return any(split_call(line.record) is not None for line in islice(read_lines(path), 100) if not line.problem)
    except (OSError, EOFError, zlib.error):
        return False


# -----------------------------------------------------------------------------
# batches


def pair_by_order(paths, inputs, outputs):
    """{output: input} of the files of several batches, by their order: the input of each batch comes after its outputs,
    or before them; or all inputs are in the order of the outputs. {} if that is not clear."""
    order, groups = [path for path in paths if path in inputs or path in outputs], {}
    for path in order if order[0] in inputs else order[::-1]:
        if path in inputs:
            groups[path] = []
        elif groups:
            groups[[*groups][-1]].append(path)
    if all(groups.values()) and sum(map(len, groups.values())) == len(outputs):
        return {output: path for path, some in groups.items() for output in some}
    return dict(zip(outputs, inputs)) if len(inputs) == len(outputs) else {}


class Batches:
    """the requests of batches, which their outputs name by custom_id. Two batches may have the same ids."""

    def __init__(self):
        self.inputs, self.outputs = defaultdict(dict), defaultdict(set)  # of each file: {id: prompt}, ids
        self.partner = {}                                       # {file of outputs: file of their requests}

    def add_request(self, file, custom_id, prompt):
        """prompt: (what comes before, the last user message). None is kept if a file has two for one id."""
        known = self.inputs[file].setdefault(custom_id, prompt)
        self.inputs[file][custom_id] = known if known == prompt else None

    def pair(self, paths):
        """finds out which file has the requests of which outputs: the only one that has all their ids, or by the order
        of the files (pair_by_order)."""
        outputs = [path for path in paths if path in self.outputs and path not in self.inputs]
        inputs = [path for path in paths if path in self.inputs]
        by_order = pair_by_order(paths, inputs, outputs) if inputs and outputs else {}
        for path in self.outputs:
            having = [path for path in [path] if path in self.inputs] or [
                other for other in inputs if self.outputs[path] <= self.inputs[other].keys()]
            self.partner[path] = having[0] if len(having) == 1 else by_order.get(path)

    def files_of(self, file, custom_id):
        """the files of requests that may have the one of an output: its partner, else all that have the id."""
        if custom_id in self.inputs.get(self.partner.get(file), ()):
            return [self.partner[file]]
        return [path for path, prompts in self.inputs.items() if custom_id in prompts]

    def find(self, file, custom_id):
        """the prompt of the request of an output. ValueError if there is none, or if two differ."""
        prompts = {self.inputs[path][custom_id] for path in self.files_of(file, custom_id)}
        if not prompts:
            raise ValueError(f'no request has its custom_id, {custom_id!r}: name the input of the batch too')
        if len(prompts) > 1 or None in prompts:
            raise ValueError(f'two requests have its custom_id, {custom_id!r}; of several batches name the input right '
                             'after its outputs, or read them one after the other')
        return prompts.pop()

    def count_unanswered(self):
        """number of requests without an output."""
        answered = {(path, id_) for file, ids in self.outputs.items() for id_ in ids
                    for path in self.files_of(file, id_)}
        return sum(map(len, self.inputs.values())) - len(answered)


# -----------------------------------------------------------------------------
# a log


class Log:
    """the lines of some files, in their order; those of other kinds are left as they are (Line.record).

    template: the user message with {text} in it; '': found. prompt: one that is taken if it fits most
    messages. Found: template, '' if no line is a call; system: what comes before the user messages, '' if it
    differs in more than dates and ids; n_unanswered: inputs of a batch without an output. Reads all files once,
    again to find what else changes in the prompts, and again at each iteration.
    """

    def __init__(self, paths, template='', prompt=''):
        self.paths, self.batches, self.given = paths, Batches(), ()
        some, telling, systems, n_calls, n_fit = {}, [], {}, 0, 0  # some: the first of the different messages
        before = after = None                                   # what all have in common
        for line, request, response in self.read_calls():
            custom_id = str(line.record.get('custom_id'))
            try:
                system, user = read_prompt(request)
            except ValueError:                                  # the output of a batch, or unusable
                if 'custom_id' in line.record and response:
                    self.batches.outputs[line.file].add(custom_id)
                continue
            if 'custom_id' in line.record and not response:     # the input of a batch
                self.batches.add_request(line.file, custom_id, (system, user))
            before, after = (user, user) if before is None else (before, after)
            if not (user.startswith(before) and user.endswith(after)):
                before, after = commonprefix([before, user]), commonprefix([after[::-1], user[::-1]])[::-1]
                telling += [user] if len(telling) < SOME else []
            some |= {user: True} if len(some) < SOME else {}
            fixed, values = split_changing(system)
            if fixed in systems or len(systems) < 2:
                systems[fixed] = [value if value == other else '{*}'
                                  for value, other in zip(systems.get(fixed, values), values)]
            n_calls += 1
            n_fit += prompt.strip() not in ('', '{text}') and find_text(system, user, prompt) is not None
        self.batches.pair([*dict.fromkeys(map(str, paths))])
        self.n_unanswered, self.template = self.batches.count_unanswered(), template
        self.system = join_changing(*systems.popitem()) if len(systems) == 1 else ''
        if not template and 2 * n_fit > n_calls:
            self.template = prompt
        elif not template and n_calls:
            self.template = '{text}' if len(some) < 2 else (
                self.find_changing([*some, *telling]) or find_template([*some][:FEW + 1], before, after))

    def read_calls(self):
        """yields (Line, body of the request, body of the response) of each call."""
        for line in (line for path in self.paths for line in read_lines(path)):
            call = None if line.problem else split_call(line.record)
            if call:
                yield line, *call

    def find_changing(self, some):
        """the template with {*} for dates and ids, if there are any beside the texts and it fits all messages; else ''.
        some: messages to begin with; those that it does not fit are compared too."""
        for _ in range(TRIES):
            if not (template := find_changing_template(some)):
                return ''
            others = set()
            for _, request, _ in self.read_calls():
                try:
                    system, user = read_prompt(request)
                except ValueError:
                    continue
                if find_text('', user, template) is None and len(others) < SOME:
                    others.add(user)
            if not others:
                return template
            some = [*some, *sorted(others)]
        return ''

    def print_template(self):
        """prints the template, if the files have calls; of a long one what is near the text."""
        before, _, after = self.template.partition('{text}')
        if self.template:
            before = before if len(before) < 300 else f'... {before[-200:]}'
            after = after if len(after) < 300 else f'{after[:200]} ...'
            print(f'template: {before}{{text}}{after}'.replace('\n', '\\n'))
        if '{*}' in self.template:
            print('{*} stands for what changes beside the text, such as a date or an id, and is not read; '
                  "if it is a part of the text, name the prompt: --template='... {text} ...'")
        if self.template == '{text}':
            print('the prompts have no common beginning or end, so a text is a whole prompt; if that is wrong, '
                  "add --template='... {text} ...'")

    def __iter__(self):
        for line in (line for path in self.paths for line in read_lines(path)):
            call = None if line.problem else split_call(line.record)
            if call:
                request, line.reply = call
                try:
                    line.text = self.find_text(line, request)
                    asked = asked_schema(request, line.reply) if self.given else None
                    line.options = {name: options_in(asked, name) for name in self.given}
                    if not line.reply and 'custom_id' in line.record:
                        line.problem = 'request', 'it is the input of a batch'
                except ValueError as error:
                    line.problem = 'unusable', str(error)
            yield line

    def find_text(self, line, request):
        """the text in a request, or in that of the same custom_id if it is empty. ValueError if there is none."""
        if not request and 'custom_id' not in line.record:
            raise ValueError(CHUNK if is_chunk(line.record) else 'it has no request')
        system, user = read_prompt(request) if request else self.batches.find(line.file, str(line.record['custom_id']))
        text = find_text(system, user, self.template)
        if text is None:
            raise ValueError(f'its prompt does not fit the template: {clean(user)[:80]!r}')
        return text
