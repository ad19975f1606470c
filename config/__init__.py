"""Settings of all programs:  default  <  config file  <  --key=value, in whatever order they are typed.

    python train.py config/demo.py --batch_size=32

A program's settings are its top-level `name = value` lines above `config = configure(globals())`.
A config file is plain Python. Names in it that start with _ are private to the file.
"""
# first: it handles Ctrl-C while the other imports are slow
from config.machine import RANK, ROOT, WORLD, interrupt, on_stop, open_streams, print_exception, stop

import ast
import codecs
import difflib
import io
import json
import math
import os
import re
import runpy
import shlex
import sys
import tokenize
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from distil.schema import Schema, write_object

STARTED_IN = os.getcwd()  # the user's folder; configure() leaves it
# the programs that share one config file
PROGRAMS = ('extract.py', 'train.py', 'sample.py', 'tools/evaluate.py', 'tools/bench.py',
            'tools/accuracy.py', 'tools/batch.py', 'serve/serve.py', 'serve/bench.py', 'device/export.py')


# a value that is written as it is; any other one is written as a JSON text
PLAIN = re.compile(r'[^\s="\x00-\x1f\x7f\ud800-\udfff]+')
PAIR = re.compile(r'(?<!\S)("(?:[^"\\]|\\.)*"|[^\s="]+)=("(?:[^"\\]|\\.)*"(?!\S)|\S*)')  # of a data line


def quote(text):
    """a text as it is if it has no blank, no = and no quotes, else as a JSON text that has no other white space than
    blanks, and no =. One at which a line may break is escaped, and so is half of a character."""
    if PLAIN.fullmatch(text):
        return text
    escape = lambda found: f'\\u{ord(found[0]):04x}'
    return re.sub(r'[^\S ]|[=\x7f\ud800-\udfff]', escape, json.dumps(text, ensure_ascii=False))


def data_line(tag, figures):
    """'<tag> key=value ...' from a dict; floats to four significant digits, other values as str() has them. What
    cannot stand between blanks is quoted, such as name="two words"; read_data_line() reads it."""
    shown = {key: f'{value:.4g}' if isinstance(value, float) else str(value) for key, value in figures.items()}
    return ' '.join([tag, *(f'{quote(key)}={quote(value)}' for key, value in shown.items())])


def read_data_line(line):
    """(tag, {key: value}) of a line that data_line() wrote, the values as texts; ('', {}) of an empty one. What is no
    pair is skipped: earlier versions quoted nothing."""
    def unquote(text):
        with suppress(ValueError):
            return json.loads(text) if text.startswith('"') else text
        return text
    tag, _, pairs = line.strip().partition(' ')
    return tag, {unquote(key): unquote(value) for key, value in PAIR.findall(pairs)}


def json_line(value):
    """a value as JSON in one line for stdout; in ASCII if the encoding of stdout is not UTF-8, as in a POSIX locale."""
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    return json.dumps(value, ensure_ascii=codecs.lookup(encoding).name != 'utf-8')


def write_examples(template, fields, examples):
    """the examples of a prompt as text. template: of one, with {} for its text and {} for its answer, which gets the
    form of answers on one line; examples: (text, value of each field, in order)."""
    answers = (write_object(dict(zip(fields, values))) for _, *values in examples)
    return ''.join(template.format(text, answer) for (text, *_), answer in zip(examples, answers))


def write_fields(fields, left_out=()):
    """the fields as lines of a prompt: the path of each, its description if its JSON Schema has one, its values."""
    return Schema(fields, left_out).write_for_prompt()


# -----------------------------------------------------------------------------
# the settings block and its limits


def settings_block(program):
    """(names of a program's settings, the source lines that define them), read without importing it."""
    source = Path(program).read_text(encoding='utf-8')
    names, first = [], None
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == 'config':
                return names, '\n'.join(source.splitlines()[first - 1:node.lineno - 1]).rstrip()
            first = first or node.lineno
            names.append(node.targets[0].id)
    return names, ''


LIMIT = r"None|True|False|text|messages|word|file|'[^']*'|-?[\d.e-]*\d|-?[\d.e-]*\.\.[\d.e-]*"


def read_limits(block):
    """{setting: list of limits}, from the comments in a settings block, such as
    `batch_size = 64  # 1..; records per step`.

    The limits stand before the semicolon, separated by commas or `or`. Each is a constant, a range (1.. or
    0..1, both ends included) or one of the words `text`, `messages` (of a chat), `word` (letters, digits, and
    . _ - between them) and `file` (a path; on the command line it is relative to the user's folder). A comment
    that starts in any other way sets no limit.
    """
    limits, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(block + '\n').readline):
        if token.type == tokenize.NAME and token.start[1] == 0:
            name = token.string
        if token.type == tokenize.COMMENT and token.start[1] > 0:
            parts = re.split(r', | or ', token.string[1:].partition(';')[0].strip())
            if all(re.fullmatch(LIMIT, part) for part in parts):
                limits.setdefault(name, parts)
    return limits


def allows(limit, value):
    """True if a value satisfies one limit."""
    if limit in ('text', 'file'):
        return isinstance(value, str)
    if limit == 'messages':
        return isinstance(value, list) and value != [] and all(
            isinstance(message, dict) and set(message) == {'role', 'content'}
            and all(isinstance(part, str) for part in message.values()) for message in value)
    if limit == 'word':
        return isinstance(value, str) and bool(re.fullmatch(r'(\w[\w.-]*)?', value, re.ASCII))
    if '..' not in limit:
        constant = ast.literal_eval(limit)
        return type(value) is type(constant) and value == constant
    low, _, high = limit.partition('..')
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and float(low or '-inf') <= value <= float(high or 'inf')


def describe_limits(limits):
    """the limits of a setting in words, for an error message."""
    words = {'word': 'a word of letters, digits and . _ -', 'text': 'a text', 'file': 'a path',
             'messages': "a list of {'role': ..., 'content': ...}"}
    described = []
    for limit in limits:
        low, dots, high = limit.partition('..')
        if dots and low and high:
            described.append(f'from {low} to {high}')
        elif dots:
            described.append(f'{low} or more' if low else f'{high} or less')
        else:
            described.append(words.get(limit, limit))
    if len(described) > 2:
        return f'one of {", ".join(described)}'
    return ' or '.join(described)


def convert(value, default, limits=()):
    """converts a value to the type of its default. Text is parsed as that type; a number or boolean for a text
    setting becomes the text one would type. ValueError or SyntaxError if that is impossible."""
    if isinstance(value, str) and repr(value) in limits:        # a word that is allowed as it is
        return value
    if isinstance(default, str) and isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, str) and not isinstance(default, str) and 'text' not in limits:
        if isinstance(default, bool):
            value = value.replace('true', 'True').replace('false', 'False')
        value = ast.literal_eval(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is None or type(value) is type(default) or (type(value) is list and 'messages' in limits):
        return value
    raise ValueError


# -----------------------------------------------------------------------------
# config files and the command line


def read_config(path):
    """[(name, value)] that a config file defines. Exits with a message if the file does not run."""
    if not Path(path).is_file() and (ROOT / path).is_file():    # relative to the project, not to the user
        path = str(ROOT / path)
    if not Path(path).is_file():
        known = sorted(f'config/{file.name}' for file in (ROOT / 'config').glob('*.py')
                       if file.name not in ('__init__.py', 'machine.py'))
        stop(f'{path} does not exist; there are: {", ".join(known)}')
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        stop(f'{path} does not run: {type(error).__name__}: {error}')
    return [(name, value) for name, value in values.items()
            if not (name.startswith('_') or callable(value) or isinstance(value, ModuleType))]


def split_paths(value):
    """the paths in a text, separated by commas. A path may have commas in it, if it exists."""
    parts, paths = value.split(','), []
    while parts:
        n = next((n for n in range(len(parts), 1, -1) if Path(','.join(parts[:n])).exists()), 1)
        paths.append(','.join(parts[:n]))
        parts = parts[n:]
    return paths


def configure(g):
    """applies config files and the command line to the settings in g = globals(). Returns them as a dict.

    Exits with a message on an unknown key, a wrong type, a value outside its limits or a missing file. Then it
    changes to the project's folder, so that data/ and out/ mean those of the project; paths typed on the
    command line still mean those of the user's folder. In an imported program it only returns the defaults.
    """
    program = os.path.basename(g['__file__'])
    names, block = settings_block(g['__file__'])
    defaults = {name: g[name] for name in names}
    if g['__name__'] != '__main__':
        return defaults
    open_streams()
    sys.excepthook = print_exception
    on_stop(interrupt)                                          # the slow imports are over
    if WORLD > 1 and program not in ('extract.py', 'train.py'):
        stop(f'{program} is one process; run it without torchrun')
    limits, owners = read_limits(block), {}                     # owners: programs of the other settings
    here = [other for other in PROGRAMS if (ROOT / other).is_file()]  # a copied student lacks some
    for other in here:
        if not os.path.samefile(ROOT / other, g['__file__']):
            owners = dict.fromkeys(settings_block(ROOT / other)[0], other) | owners  # the first one counts
    from_files, typed = [], []
    for arg in sys.argv[1:]:
        if arg in ('-h', '--help'):
            print(f'{g["__doc__"]}\nsettings, with their defaults:\n\n{block}')
            sys.exit(0)
        key, equals, value = arg.partition('=')                 # the value may contain more of them
        if arg.startswith('--') and equals:
            typed.append(('command line', key[2:].replace('-', '_'), value))
        elif arg.startswith('-') or not arg.endswith('.py'):
            stop(f'{program}: cannot read {arg!r}; settings are typed --key=value, config files end in .py')
        else:
            from_files += [(arg, name, value) for name, value in read_config(arg)]

    for source, key, value in from_files + typed:
        if key not in defaults:
            if source != 'command line' and (key in owners or len(here) < len(PROGRAMS)):
                continue  # another program's setting: it reads the same file
            near = difflib.get_close_matches(key, [*defaults, *owners], 1)
            hint = f'did you mean {near[0]!r}?' if near else 'see -h'
            if source != 'command line':
                hint += '; start a name with _ if it is private to the file'
            hint = f'it belongs to {owners[key]}' if key in owners else hint
            stop(f'{source}: {program} has no setting {key!r}; {hint}')
        default, allowed = defaults[key], limits.get(key, [])
        if source == 'command line' and 'file' not in allowed:  # UTF-8, whatever the locale; a path stays as it is
            value = value.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
        try:
            value = convert(value, default, allowed)
        except (ValueError, SyntaxError):
            kind = 'a Python constant' if default is None else type(default).__name__
            stop(f'{source}: {key} is {value!r}; it must be {kind}, like its default {default!r}')
        if allowed and not any(allows(limit, value) for limit in allowed):
            stop(f'{source}: {key} is {value!r}; it must be {describe_limits(allowed)}')
        if 'file' in allowed and source == 'command line':      # or several, separated by commas
            value = ','.join(str(Path(part).absolute()) if part and Path(part).exists() else part
                             for part in split_paths(value))
        if value != g[key] and RANK == 0:
            new, old = (t if len(t) < 60 else f'{t[:56]} ...' for t in (repr(value), repr(g[key])))
            new = '(a secret)' if key.endswith('_key') else new
            print(f'{key} = {new} ({source}; was {old})', file=sys.stderr)
        g[key] = value
    folder = Path(g['__file__']).absolute().parent
    os.chdir(folder if (folder / 'config').is_dir() else folder.parent)  # a program in a room is one below
    return {name: g[name] for name in defaults}


def split_tasks(args):
    """the arguments of a program for several tasks -> a list of arguments for each. Each config file that
    sets `name` is a task; those that do not belong to the one before, and typed settings to all."""
    typed = [arg for arg in args if arg.startswith('-') or not arg.endswith('.py')]
    tasks, named = [[]], False
    for path in (arg for arg in args if arg not in typed):
        names_task = any(key == 'name' for key, _ in read_config(path))
        if names_task and named:
            tasks.append([])
        tasks[-1].append(path)
        named = named or names_task
    return [[*files, *typed] for files in tasks]


def read_settings(program, args):
    """the settings of a program as configure() would set them for these arguments, as a dict."""
    g = {'__file__': program, '__name__': '__main__', '__doc__': ''}
    exec(settings_block(program)[1], g)
    os.chdir(STARTED_IN)                                        # paths are relative to it
    sys.argv[1:] = args
    return configure(g)


def next_command(program):
    """the command that runs another program on the same task: with the config files of this command line, and
    those of its --name, --dataset and --run that the other program has. For the folder it is typed in."""
    names = 'name', 'run'
    if (ROOT / program).is_file():                              # a copied student lacks the other programs
        names = settings_block(ROOT / program)[0]
    kept = [f'--{key}' for key in ('name', 'dataset', 'run') if key in names]
    same = [arg for arg in sys.argv[1:] if arg.endswith('.py') or arg.partition('=')[0] in kept]
    return shlex.join(['python', os.path.relpath(program, STARTED_IN), *same])
