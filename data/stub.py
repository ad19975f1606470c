"""The config of a task, from the log of the LLM that does it today, or from labels: its fields, its prompt, a
student."""
import json
import math
import pprint
from collections import Counter
from contextlib import suppress

from calls import read_replies  # these lie beside this file
from infer import infer
from objects import find_object
from schemas import Fit, asked_schema, find_changing, find_difference, with_options

WIDTH = 110  # of the fields in a config


def log_answers(log):
    """yields (text, answer as dict or None) of the calls of a log, each answer if n > 1."""
    for line in log:
        if not line.problem and line.reply is not None:
            with suppress(ValueError):                          # no answer
                options = [json.dumps(option) for of_name in line.options.values() for option in of_name]
                text = ' '.join([line.text, *options])          # options are read behind the text
                yield from ((text, find_object(content)[0]) for content, _ in read_replies(line.reply))


def label_answers(path):
    """([(text, answer as dict)] of the labels in an input.jsonl, the complete ones first, for they show the order of
    the fields, [] if some have probabilities; {name: JSON Schema} of the properties whose options come with the
    texts)."""
    records = [json.loads(line) for line in open(path, encoding='utf-8')]
    if any('probabilities' in record for record in records):
        return [], {}
    known, values = [], {}
    for record in records:
        if isinstance(answer := record.get('answer'), dict):
            options = record.get('options') if isinstance(record.get('options'), dict) else {}
            lists = {name: of_name for name, of_name in options.items() if isinstance(of_name, list)}
            known.append((' '.join([record['text'], *(json.dumps(of_name) for of_name in lists.values())]), answer))
            for name in lists:
                values.setdefault(name, []).append(answer.get(name))
    kind = lambda of_name: ['string', 'null'] if None in of_name else 'string'
    given = {name: {'type': 'array', 'items': {'type': 'string', 'x-options': True}} if any(
        isinstance(value, list) for value in of_name) else {'type': kind(of_name), 'x-options': True}
        for name, of_name in values.items()}
    return sorted(known, key=lambda of_text: -len(of_text[1])), given


def quote(text):
    """a text as a Python constant that can be read, if possible in three quotes."""
    plain = "'''" not in text and '\\' not in text and not text.endswith("'") and '\r' not in text
    return f"'''{text}'''" if plain else repr(text)


def write_python(value, depth=0, used=0):
    """a JSON value as Python, in lines of WIDTH where that is possible. depth: of the line that it begins in; used:
    columns of that line before it."""
    pad, text = '    ' * (depth + 1), repr(value)
    if used + len(text) < WIDTH or not isinstance(value, (dict, list, str)) or not value:
        return text
    if isinstance(value, str):
        return pprint.pformat(value, width=max(40, WIDTH - used)).replace('\n', '\n' + ' ' * used)
    if isinstance(value, dict):
        lines = [f'{pad}{key!r}: {write_python(inner, depth + 1, len(pad) + len(repr(key)) + 3)},'
                 for key, inner in value.items()]
    elif any(isinstance(inner, (dict, list)) for inner in value):
        lines = [f'{pad}{write_python(inner, depth + 1, len(pad) + 1)},' for inner in value]
    else:
        lines = [pad + pprint.pformat(value, width=WIDTH - len(pad), compact=True)[1:-1].replace('\n ', '\n' + pad)]
    left, right = '{}' if isinstance(value, dict) else '[]'
    return '\n'.join([left, *lines, '    ' * depth + right])


def find_schema(log):
    """(the JSON Schema that most requests of a log ask for, a line if there are others); (None, '') if there is
    none. A property whose values change from request to request has options that come with each."""
    counts = Counter(json.dumps(schema) for _, request, response in log.read_calls()
                     if (schema := asked_schema(request, response)))
    if not counts:
        return None, ''
    if names := find_changing(map(json.loads, counts)):
        log.given = names
        merged = Counter()
        for text, n in counts.items():
            schema = json.loads(text)
            merged[json.dumps(with_options(schema, [name for name in names if name in schema['properties']]))] += n
        said = f'the values of {", ".join(map(repr, names))} change from request to request: they are its options'
        note = f' ({len(merged)} schemas remain)' if len(merged) > 1 else ''
        return json.loads(merged.most_common(1)[0][0]), said + note
    (text, n), *others = counts.most_common()
    schema = json.loads(text)
    where = find_difference(schema, json.loads(others[0][0])) if others else ''
    return schema, f'the requests have {len(counts)} schemas, which differ in {where!r}; the most frequent is taken, ' \
        f'of {n} of {counts.total()}' if others else ''


def write_stub(name, answers, labels, n_texts, prompt, schema=None, given=None):
    """(the text of a config file for a task, [lines that tell what is not in it]); ('', lines) if its answers leave
    nothing to decide. answers: (text, answer as dict) each; labels: what extract.py reads; n_texts: different texts;
    prompt: of a log, '' of labels; schema: the JSON Schema of the answers, None to infer it; given: {name: JSON Schema}
    of properties that need not be inferred."""
    found, notes = infer(answers, bool(prompt)), []
    for path in given or ():
        found.fields[path] = given[path]
        found.left_out.pop(path, None)
        found.notes.pop(path, None)
    fit = Fit(schema, found.part) if schema else None
    if fit and fit.problem:
        notes, fit = [f'the JSON Schema cannot be used: {fit.problem}'], None
    left_out = fit.left_out if fit else found.left_out
    why = [' '.join(f'{path!r} is left out: {why}'.split()) for path, why in left_out.items()]
    if not found.part.forms or not fit and not found.decides:
        return '', [*notes, *why]
    lines = []
    if fit:
        lines = [f'# {line}' for line in ['the JSON Schema of the answers', *fit.notes]]
        lines += [f'fields = {write_python(fit.schema, 0, len("fields = "))}']
    else:
        for field, values in found.fields.items():
            lines += [f'    # {line}' for line in found.notes.get(field, ())]
            flat = isinstance(values, list)                     # in one line, whatever its length
            lines += [f'    {field!r}: {values if flat else write_python(values, 1, len(repr(field)) + 6)},']
        lines = ['fields = {             # above each its values, and how often they occur', *lines, '}']
    if why:
        lines += [*(f'# {line}' for line in why), f'left_out = {write_python([*left_out], 0, len("left_out = "))}']
    is_flat = not fit and not left_out and all(isinstance(values, list) for values in found.fields.values())
    longest = found.longest_answer if is_flat else (fit or Fit(found.json_schema, found.part)).longest()
    max_text = min(LONGEST, 8 * math.ceil((found.longest_text / 2.5 + 4) / 8))
    return CONFIG.format(
        source=FROM_LOG if prompt else FROM_LABELS, name=name, labels=labels,
        fields='\n'.join(lines),
        max_text=max_text, block_size=max_text + longest // 2 + 24,
        prompt=f'prompt = {quote(prompt)}\n' if prompt else '',
        max_epochs=max(4, min(40, round(STEPS * 32 / n_texts)))), [*notes, *(fit.notes if fit else ()), *why]


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
{fields}
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
