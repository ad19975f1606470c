"""The config of a task, from the log of the LLM that does it today, or from labels: its fields, its prompt, a
student."""
import json
import math
from collections import Counter
from contextlib import suppress

from calls import read_replies  # these lie beside this file
from objects import find_object, plain

MANY = 20  # a field with more values may be free text


def log_answers(log):
    """yields (text, answer as dict or None) of the calls of a log, each answer if n > 1."""
    for line in log:
        if not line.problem and line.reply is not None:
            with suppress(ValueError):                          # no answer
                yield from ((line.text, find_object(content)[0]) for content, _ in read_replies(line.reply))


def label_answers(path):
    """[(text, answer as dict)] of the labels in an input.jsonl, the complete ones first, for they show the order of
    the fields; [] if some have probabilities."""
    records = [json.loads(line) for line in open(path, encoding='utf-8')]
    if any('probabilities' in record for record in records):
        return []
    known = [(record['text'], record['answer']) for record in records if isinstance(record.get('answer'), dict)]
    return sorted(known, key=lambda of_text: -len(of_text[1]))


def count_answers(answers, is_log):
    """({field: Counter of the JSON texts of its values}, the longest text in bytes, the longest answer in bytes)
    of (text, answer) each."""
    fields, longest_text, longest_answer, forms = {}, 0, 0, Counter()  # forms: the sets of keys
    for text, answer in answers:
        longest_text = max(longest_text, len(' '.join(text.split()).encode()))
        if answer is not None:
            forms[frozenset(answer)] += 1
        with suppress(ValueError):                              # NaN
            for name, value in (answer or {}).items():
                fields.setdefault(name, Counter())[json.dumps(value, allow_nan=False)] += 1
            longest_answer = max(longest_answer, len(json.dumps(answer or {})))
    if is_log or any(form >= fields.keys() for form in forms):  # else each label tells of some fields only
        add_missing(fields, forms)
        longest_answer += sum(len(f'"{name}": null, ') for name in fields if any(name not in form for form in forms))
    return {name: merge_numbers(counts) for name, counts in fields.items()}, longest_text, longest_answer


def add_missing(fields, forms):
    """counts null in fields, {name: Counter}, for each answer that lacks the key. forms: Counter of the sets of keys of
    all answers. One that shares no key with the most common form, such as {"error": ...}, is none of the task."""
    usual = max(forms, key=forms.get, default=frozenset())
    alike = {form: n for form, n in forms.items() if form & usual or not form}
    for name, counts in fields.items():
        if not any(name in form for form in alike):
            counts.clear()
        elif n_missing := sum(n for form, n in alike.items() if name not in form):
            counts['null'] += n_missing


def merge_numbers(counts):
    """a Counter of JSON texts in which 1 and 1.0 are one value, in its more common spelling."""
    spelled, merged = {}, Counter()
    for text, n in counts.most_common():
        merged[spelled.setdefault(json.dumps(plain(json.loads(text))), text)] += n
    return merged


def why_no_field(counts):
    """why a field of the answers is not one of the student's; '' if it is."""
    if not counts:
        return 'only answers without the usual keys have it'
    values = [json.loads(text) for text in counts]
    if any('{' in text and not isinstance(value, str) for text, value in zip(counts, values)):
        return 'its values are objects'
    rare = sum(n == 1 for n in counts.values())
    if len(counts) > MANY and (rare > len(counts) / 2 or any(isinstance(value, float) for value in values)):
        return f'{len(counts)} values in {counts.total()} answers: free text, or a number'
    return ''


def quote(text):
    """a text as a Python constant that can be read, if possible in three quotes."""
    plain = "'''" not in text and '\\' not in text and not text.endswith("'") and '\r' not in text
    return f"'''{text}'''" if plain else repr(text)


def write_stub(name, answers, labels, n_texts, prompt):
    """the text of a config file for a task, '' if its answers leave nothing to decide. answers: (text, answer as
    dict) each; labels: what extract.py reads; n_texts: different texts; prompt: of a log, '' of labels."""
    found, longest_text, longest_answer = count_answers(answers, bool(prompt))
    if not any(len(counts) > 1 and not why_no_field(counts) for counts in found.values()):
        return ''
    fields = []
    for field, counts in found.items():
        often = ', '.join(f'{text} {n}' for text, n in counts.most_common(12)) + ', ...' * (len(counts) > 12)
        values = ', '.join(repr(json.loads(text)) for text, _ in counts.most_common())
        reason = why_no_field(counts)
        fields += [f'# {field!r} is left out: {reason}'] if reason else [f'# {often}', f'{field!r}: [{values}],']
    max_text = min(LONGEST, 8 * math.ceil((longest_text / 2.5 + 4) / 8))
    return CONFIG.format(
        source=FROM_LOG if prompt else FROM_LABELS, name=name, labels=labels,
        fields='\n'.join(f'    {line}' for line in fields),
        max_text=max_text, block_size=max_text + longest_answer // 2 + 24,
        prompt=f'prompt = {quote(prompt)}\n' if prompt else '',
        max_epochs=max(4, min(40, round(STEPS * 32 / n_texts))))


LONGEST = 448  # tokens of a text: the reader sees 512
STEPS = 600    # of training; few texts need many epochs
FROM_LOG = 'From a log of the LLM that does this task today. Look at fields and prompt: are these all? Then:'
FROM_LABELS = 'From labels that exist already. Look at fields: are these all? Then:'
CONFIG = """# {source}
#     python extract.py config/{name}.py
#     python train.py config/{name}.py
#     python tools/evaluate.py config/{name}.py
name = {name!r}
dataset = {name!r}
labels = {labels!r}
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # not asked; the student writes its answers with these tokens
fields = {{             # above each its values, and how often they occur
{fields}
}}
{prompt}max_text = {max_text}         # tokens
too_long = 'cut'
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py qwen2.5-coder-0.5b minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = {block_size}       # tokens of the encoder, and those of the answer
# training
max_epochs = {max_epochs}
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
"""
