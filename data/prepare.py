"""Your own texts, from a file of any common format -> data/<dataset>/input.jsonl

    python data/prepare.py mine messages.csv                   # writes data/mine/input.jsonl
    python data/prepare.py mine a.xlsx b.csv.gz --column=body  # several files, the text in column `body`
    python data/prepare.py mine rated.csv --column=body --answer=team,urgent   # labels: also prints a config
    python data/prepare.py mine rated.csv --column=body --truth=team,urgent
    python data/prepare.py mine rated.csv --column=body --split=part   # whose cells say train or test
    python data/prepare.py mine lines.csv --delimiter=none     # one column: commas belong to the texts
    python data/prepare.py mine log.jsonl --config=config/mine.py  # the log of an LLM: also makes a config
    some-command | python data/prepare.py mine -               # one text per line

.txt: one text per line. .csv, .tsv: a table with a header, or one column. .jsonl: {"text": ...} per line.
.json: a list of such objects, or of texts. .xlsx: the first sheet (needs openpyxl); a merged cell has its value in
all of its rows. .parquet and .arrow, or a directory of them, such as a saved Hugging Face data set (needs pyarrow);
of a class label its name is taken, and -1 is none. Each may end in .gz; upper and lower case are the same. Pipes and
other names are read as .txt, with --column or --delimiter as .csv. The encoding is UTF-8, or UTF-16 with a byte-order
mark. Bytes that are neither become U+FFFD, and their lines are counted.

The text is in the column (or under the key) that --column names, else in `text`, else in the only one. A
table without a header needs a column number: --column=2. Dots name nested keys, in .json, .jsonl, .parquet and
.arrow: --column=request.text. --delimiter is needed if the table does not show
it: comma, semicolon, tab, pipe, none, or another character. bad_row counts the rows with more cells than the
first, which are left out.

--answer names columns (or keys) with the labels of a field, which a student learns without a teacher. A cell with
true, false, a whole number, or an object or a list as JSON is that, any other is text; an empty one beside labels is
null. An object in a column called answer is the whole answer. --truth names columns with the truth of a field. It is
never trained on; tools/evaluate.py compares with it. Here a cell is text: TRUE, 1.0 and none mean true, 1 and null in
a field with these values. .json and .jsonl keep `truth`, `answer`, `probabilities` and `options`, without NaN.

--split names the column (or key) that says to which part a text belongs: train, or test (val, validation, valid,
dev, eval, held_out), which is held out from training. A key `split` of a .json or .jsonl with one of these words
needs no option; other_split counts those with another word, which is not kept. Else the names of the files say so, if
there are some of both parts: train.csv and test.csv, or in a directory train/0000.parquet and test/0000.parquet.

Empty and repeated texts are left out, but all labels of a text (`answer`, `probabilities`) are kept. If anything
fails, an earlier input.jsonl stays.

A .jsonl may be the log of an LLM that does the task today: fine-tuning files, requests with their responses,
batch inputs and outputs (data/logs.py has the forms). The text is what differs between the prompts, or stands
where --template='... {text} ...' says. Prints a config with the fields, the values and the prompt of the log, or of
the labels of any other file, or writes it to the file that --config names. If the requests ask for a JSON Schema, or
if --schema=FILE names one, the fields are those of it. What no student can answer, such as free text, is named.
"""
import json
import os
import re
import sys
import zlib
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path

from contents import find_kind, open_bytes, open_lines  # these lie beside this file
from logs import Log, is_log
from objects import parse_json
from output import describe_error, exit_on_stop, replace_file
from parts import find_files, split_files
from schemas import read_schema_file
from stub import find_schema, label_answers, log_answers, write_stub
from tables import DELIMITERS, by_option, csv_rows, find_value, read_part, read_table
from templates import check_template
from typed import read_typed, xlsx_rows

KEPT = 'truth', 'answer', 'probabilities', 'options', 'split'


def is_json(value):
    """False if a value holds NaN or Infinity, which JSON does not have."""
    try:
        return bool(json.dumps(value, allow_nan=False))
    except ValueError:
        return False


def read_objects(objects, path, column, options, counts):
    """yields (text, {key: value} of the KEPT keys) for each JSON value: a text, or an object with
    one. Counts other values in counts['bad_json']. options: as for read_table."""
    for value in objects:
        if isinstance(value, str):
            yield value, {}
        elif isinstance(value, dict):
            known = {name: of_name for name, of_name in value.items() if name not in KEPT}
            text = find_value(known, column, path) if known else ''
            extra = {key: value[key] for key in KEPT if key in value}
            named = by_option({name: value[name] for name in options if name in value}, options)
            if not any(cell is not None for cell in named.get('answer', {}).values()):
                named.pop('answer', None)                       # no label, as a table row without any cell of one
            for option, cells in named.items():
                extra[option] = (extra[option] if isinstance(extra.get(option), dict) else {}) | cells
            for key, known in extra.items():
                if isinstance(known, dict):
                    extra[key] = {name: known[name] for name in known if is_json(known[name])}
            yield text, {key: extra[key] for key in extra if is_json(extra[key])}
        else:
            counts['bad_json'] += 1


def parse_labels(row):
    """(text, {option: {column: cell}}) of a row, in which a label that is an object or a list as JSON is that. An
    object in a column called answer is the whole answer, as it is in a .jsonl."""
    text, extra = row
    for option in {'answer', 'truth'} & extra.keys():
        extra[option] = {name: parse_json(cell) for name, cell in extra[option].items()}
        whole = extra[option].get(option)
        if isinstance(whole, dict):
            extra[option] = {**whole, **{name: cell for name, cell in extra[option].items() if name != option}}
    return text, extra


def parse_lines(lines):
    """yields the JSON value of each line that is not blank, None if it is not JSON."""
    for line in lines:
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def read_records(path, column, options, delimiter, counts, notes):
    """yields (text, {key: value} of the KEPT keys) for each record of a file of any kind."""
    raw = open_bytes(path)
    kind, lines = find_kind(raw, path, column or delimiter), open_lines(raw, counts)
    if kind in ('csv', 'tsv'):
        rows = csv_rows(lines, path, delimiter, column, kind == 'tsv', counts)
        hint = '' if delimiter else '; or --delimiter=none, if each line is one text'
        yield from map(parse_labels, read_table(rows, path, column, options, hint))
    elif kind == 'xlsx':
        yield from map(parse_labels, read_table(xlsx_rows(raw, path, notes), path, column, options))
    elif kind in ('parquet', 'arrow'):
        yield from map(parse_labels, read_typed(raw, path, kind, column, options))
    elif kind in ('jsonl', 'ndjson'):
        yield from read_objects(parse_lines(lines), path, column, options, counts)
    elif kind == 'json':
        try:
            values = json.loads(''.join(lines))
        except (ValueError, RecursionError) as error:
            sys.exit(f'{path} is not JSON: {error}; if each line is one object, name it .jsonl')
        if not isinstance(values, list):
            sys.exit(f'{path} must hold a list, not one {type(values).__name__}')
        yield from read_objects(values, path, column, options, counts)
    else:
        yield from ((line, {}) for line in lines)


def read_files(files, parts, *how):
    """yields (text, {key: value} of the KEPT keys, part) of several files. parts: {file: its part};
    how: as for read_records. Exits with a message if a file is damaged."""
    for path in files:
        try:
            for text, extra in read_records(path, *how):
                yield text, extra, parts.get(path, '')
        except (OSError, EOFError, zlib.error) as error:  # the last two: an incomplete or damaged .gz
            sys.exit(f'{path}: {getattr(error, "strerror", None) or error}')


def read_log(log, parts, counts, problems):
    """yields (text, {}, part) for each line of a Log. Counts those without a text by their reason,
    and adds up to three messages to problems. parts: {file: its part}."""
    for line in log:
        if line.problem and line.problem[0] != 'request':       # the input of a batch has a text
            counts[line.problem[0]] += 1
            problems += [line.say(line.problem[1])] if len(problems) < 3 else []
        else:
            is_text = line.reply is None and isinstance(line.record, dict)
            yield line.record.get('text') if is_text else line.text, {}, parts.get(line.file, '')


def pop_part(extra, split, part, counts):
    """takes the split out of a record: of the column `split`, which read_records has put into its
    split; if that is '', of its key `split`, if that has a known word, else `part`; other words are
    counted in counts['other_split']. Returns 'train' or 'test', '' if it has none. ValueError if
    the column has another word."""
    own = extra.pop('split', '')
    if not split:
        with suppress(ValueError):
            return read_part(own) if own else part
        counts['other_split'] += 1                              # of another kind, or misspelt
        return part
    value = own.get(split) if isinstance(own, dict) else None
    return '' if value in ('', None) else read_part(value)


def describe_value(value):
    """what a value is that stands where a text should."""
    kinds = {list: 'a list', dict: 'an object', bytes: 'binary', bool: 'true or false'}
    return kinds.get(type(value), 'a number')


def write_texts(records, file, counts, split, problems):
    """writes each different text to an opened input.jsonl, and counts. records: (text, what else is
    kept of it, the part of its file); split: '', or the column of it. A text of both parts is
    written twice: extract.py then holds it out. Returns {name: number of the texts that have a
    value for it}. Adds to problems what was no text. Exits with a message if a split is no known
    word."""
    seen, known, others = set(), Counter(), Counter()
    for value, extra, part in records:
        text = ' '.join(value.split()) if isinstance(value, str) else ''
        names = {*extra, *(name for of_key in extra.values() if isinstance(of_key, dict) for name in of_key)}
        try:
            part = pop_part(extra, split, part, counts)
        except ValueError as error:
            sys.exit(f'{text[:60]!r}: {error}')
        key = (text, part) if part == 'test' else text
        key = (key, json.dumps(extra['options'])) if 'options' in extra else key
        counts['read'] += 1
        labelled = 'answer' in extra or 'probabilities' in extra  # several labels of a text are averaged by extract.py
        reason = 'empty' if not text else 'duplicate' if key in seen and not labelled else 'kept'
        if value is not None and not isinstance(value, str):
            reason = 'not_text'
            others[describe_value(value)] += 1
        counts[reason] += 1
        if reason == 'kept':
            seen.add(key)
            known.update(names)
            record = {'text': text, **extra, **({'split': part} if part else {})}
            file.write(json.dumps(record, ensure_ascii=False) + '\n')
    if others:
        found = ', '.join(f'{kind} {n} times' for kind, n in others.most_common())
        problems.append(f'not_text: where the text should be there is {found}; name another column, or one inside it, '
                        'with --column=')
    return known


if __name__ == '__main__':
    if {'-h', '--help'} & {*sys.argv}:
        sys.exit(print(__doc__))
    exit_on_stop()
    sys.stdout.reconfigure(errors='backslashreplace')  # for names that it cannot encode
    typed = [arg.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace') for arg in sys.argv[1:]]  # in any locale
    options = dict(arg[2:].partition('=')[::2] for arg in typed if arg.startswith('--'))
    if unknown := options.keys() - {'column', 'answer', 'truth', 'split', 'delimiter', 'template', 'schema', 'config'}:
        sys.exit(f'data/prepare.py has no option --{unknown.pop()}; its options are --column=, --answer=, --truth=, '
                 '--split=, --delimiter=, --template=, --schema= and --config=')
    if '' in options.values():
        sys.exit('an option needs a value right after its =; the shell needs quotes around ; and |')
    column, delimiter = options.get('column', ''), options.get('delimiter', '')
    delimiter = DELIMITERS.get(delimiter.lower(), delimiter)
    if len(delimiter) > 1 or delimiter in (' ', '"'):
        sys.exit(f'--delimiter={delimiter} is not comma, semicolon, tab, pipe, none or one other character')
    split = options.get('split', '')
    named = [(split, 'split')] if split else []                 # (column, the option that names it)
    named += [(name.strip(), option) for option in ('answer', 'truth')
              for name in options.get(option, '').split(',') if name.strip()]
    if len(dict(named)) < len(named):
        sys.exit('--answer=, --truth= and --split= name the same column')
    named = dict(named)
    template, config = options.get('template', ''), options.get('config', '')
    schema, schema_note = read_schema_file(options['schema']) if 'schema' in options else None, ''
    try:
        check_template(template or '{text}')
    except ValueError as error:
        sys.exit(f'--template= {error}')
    if os.path.exists(config):
        sys.exit(f'{config} exists; remove it, or name another file')
    name, *paths = [arg for arg in sys.argv[1:] if not arg.startswith('--')] or ['']
    if not paths or not re.fullmatch(r'\w[\w.-]*', name, re.ASCII):
        sys.exit('run: python data/prepare.py NAME FILE... [--column=C] [--answer=C,C] [--truth=C,C] [--split=C] '
                 '[--delimiter=D] [--template=T] [--schema=FILE] [--config=FILE]; NAME is the dataset')
    parts = {file: part for path in paths for file, part in find_files(path).items()}
    lines = [path for path in parts if re.search(r'\.(jsonl|ndjson)(\.gz)?$', path.lower())]
    logs = [path for path in lines if not column and is_log(path)]
    if template and not logs:
        sys.exit(f'{", ".join(paths)}: no file is the log of an LLM, so there is no use for --template=')
    others = [path for path in parts if path not in logs]
    parts = {} if split else split_files(parts)
    root = Path(__file__).absolute().parents[1]
    target = root / 'data' / name / 'input.jsonl'
    counts, problems = Counter(), []
    try:
        target.parent.mkdir(exist_ok=True)
        log = Log(logs, template)
        with replace_file(target) as file:
            records = chain(read_log(log, parts, counts, problems),
                            read_files(others, parts, column, named, delimiter, counts, problems))
            known = write_texts(records, file, counts, split, problems)
            file.flush()
            shown = ['read', 'kept', 'empty', 'duplicate', 'bad_utf8']
            shown += [key for key in ('bad_json', 'bad_row', 'not_text', 'unusable', 'other_split') if counts[key]]
            figures = ' '.join(f'{key}={counts[key]}' for key in shown)
            if not counts['kept']:
                sys.exit(f'{", ".join(paths)}: no text found ({"; ".join([figures, *problems[:1]])})')
            if missing := [column for column in named if not known[column]]:
                sys.exit('; '.join([f'no text has a value in {missing[0]!r}; correct --{named[missing[0]]}=, or leave '
                                    'it out', *problems[:1]]))
            labels = ','.join(os.path.relpath(path, root) for path in logs) or f'data/{name}/input.jsonl'
            answers, given = (log_answers(log), {}) if logs else label_answers(file.name)
            prompt = '\n\n'.join(filter(None, (log.system, log.template)))
            if logs and not schema:
                schema, schema_note = find_schema(log)
            stub, notes = write_stub(name, answers, labels, counts['kept'], prompt, schema, given)
            if (config or schema) and not stub and not logs:
                sys.exit(f'{", ".join(paths)}: no labels of a few values, so there is no use for '
                         f'--{"config" if config else "schema"}=')
            if stub and config:
                with replace_file(Path(config)) as config_file:
                    config_file.write(stub)
    except (EOFError, zlib.error) as error:  # of an incomplete or damaged .gz
        sys.exit(f'{", ".join(logs)}: {error}')
    except OSError as error:  # of a log, if it has no name
        sys.exit(describe_error(error, ', '.join(logs)))
    log.print_template()
    print('\n'.join(['prepare ' + figures, *problems, *filter(None, [schema_note]), *notes]))
    for column in named:
        if known[column] < counts['kept']:
            print(f'{counts["kept"] - known[column]} of {counts["kept"]} texts have no value in {column!r}')
    print(f'{os.path.relpath(target)} is written; next: '
          + (f'look at {config}, then extract.py' if stub and config else f'a config with dataset = {name!r}'
             + (', such as this one:' if stub else '')))
    if logs and not stub:
        print('none is made of this log: its answers are no JSON objects with fields of a few values')
    if stub and not config:
        print(f'\n{stub}', end='')
