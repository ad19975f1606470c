"""Settings for all programs:  default  <  config file  <  --key=value, whatever the order typed.

    python train.py config/demo.py --batch_size=32

A program's settings are its top-level `name = value` lines above `config = configure(globals())`.
A config file is plain Python; its names that start with _ are private to it.
First how all programs end and speak, last the machine a program runs on, alone or as one of several that
torchrun has started.
"""
import ast
import datetime
import difflib
import io
import math
import os
import re
import runpy
import shlex
import signal
import sys
import time
import tokenize
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
# one config file serves them all
SCRIPTS = ('extract.py', 'train.py', 'ensemble.py', 'sample.py', 'evaluate.py', 'bench.py', 'serve.py',
           'device/export.py')
WORLD, RANK = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))  # torchrun sets them


def stop(line):
    """ends the program with this line and status 1; of several processes that find the same, one says it."""
    sys.exit(line if RANK == 0 else 1)


def data_line(tag, figures):
    """<tag> key=value ...; floats to four figures."""
    pairs = (f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in figures.items())
    return ' '.join([tag, *pairs])


# -----------------------------------------------------------------------------
# settings


def settings_block(script):
    """names of a program's settings and the source lines that define them, read without importing it."""
    source = Path(script).read_text(encoding='utf-8')
    names, first = [], None
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == 'config':
                return names, '\n'.join(source.splitlines()[first - 1:node.lineno - 1]).rstrip()
            first = first or node.lineno
            names.append(node.targets[0].id)
    return names, ''


PART = r"None|True|False|text|word|file|'[^']*'|-?[\d.e-]*\d|-?[\d.e-]*\.\.[\d.e-]*"


def read_limits(block):
    """{setting: what it may be}, from the comments in a settings block: `batch_size = 64  # 1..; records per
    step`.

    What stands before the semicolon, parted by commas or `or`, is a list of constants, of ranges (1.., 0..1,
    with both ends), and of the words `text`, `word` (letters, digits, and . _ - between them) and `file` (a
    path, if typed that of the caller's folder). Any other comment is prose, and sets no limit.
    """
    limits, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(block + '\n').readline):
        if token.type == tokenize.NAME and token.start[1] == 0:
            name = token.string
        if token.type == tokenize.COMMENT and token.start[1] > 0:
            parts = re.split(r', | or ', token.string[1:].partition(';')[0].strip())
            if all(re.fullmatch(PART, part) for part in parts):
                limits.setdefault(name, parts)
    return limits


def allows(part, value):
    """whether a value is what one part of a limit says."""
    if part in ('text', 'file'):
        return isinstance(value, str)
    if part == 'word':
        return isinstance(value, str) and bool(re.fullmatch(r'(\w[\w.-]*)?', value, re.ASCII))
    if '..' not in part:
        constant = ast.literal_eval(part)
        return type(value) is type(constant) and value == constant
    low, _, high = part.partition('..')
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return number and float(low or '-inf') <= value <= float(high or 'inf')


def in_words(parts):
    """a limit as an error says it."""
    words, said = {'word': 'a word of letters, digits and . _ -', 'text': 'a text', 'file': 'a path'}, []
    for part in parts:
        low, dots, high = part.partition('..')
        if dots and low and high:
            said.append(f'from {low} to {high}')
        elif dots:
            said.append(f'{low} or more' if low else f'{high} or less')
        else:
            said.append(words.get(part, part))
    return ('one of ' if len(said) > 2 else '') + (', ' if len(said) > 2 else ' or ').join(said)


def convert(value, default, parts=()):
    """value with the type of default; text is read as that type, and a plain constant as the text it would be
    on the command line. ValueError or SyntaxError where it cannot be. parts: what the setting may be; a word
    among them stands for itself."""
    if isinstance(value, str) and repr(value) in parts:
        return value
    if isinstance(default, str) and isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, str) and not isinstance(default, str) and 'text' not in parts:
        if isinstance(default, bool):
            value = value.replace('true', 'True').replace('false', 'False')
        value = ast.literal_eval(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is None or type(value) is type(default):
        return value
    raise ValueError


def read_config(path):
    """[(name, value)] that a config file defines; ends in one line where it does not run."""
    if not Path(path).is_file() and (ROOT / path).is_file():  # beside the program, not where it was called
        path = str(ROOT / path)
    if not Path(path).is_file():
        known = sorted(f'config/{file.name}' for file in (ROOT / 'config').glob('[!_]*.py'))
        stop(f'{path} does not exist; there are: {", ".join(known)}')
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        stop(f'{path} does not run: {type(error).__name__}: {error}')
    return [(name, value) for name, value in values.items()
            if not (name.startswith('_') or callable(value) or isinstance(value, ModuleType))]


def say_stopped(kind, error, trace):
    """the excepthook of the programs: Ctrl-C is no fault of theirs, and ends in one line."""
    if issubclass(kind, KeyboardInterrupt):
        print('\nstopped', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def configure(g):
    """apply config files and command line to the settings in g = globals(); returns them as a dict.

    Ends in one line, with status 1, on an unknown key, a wrong type, a value out of its limits or a missing
    file. Then it goes to the program's own folder, so that data/ and out/ are those beside it; files that
    were typed stay those of the caller's folder. Imported programs keep their defaults, and the folder.
    """
    this = Path(g['__file__']).name
    names, block = settings_block(g['__file__'])
    defaults = {name: g[name] for name in names}
    if g['__name__'] != '__main__':
        return defaults
    sys.excepthook = say_stopped
    if WORLD > 1 and this not in ('extract.py', 'train.py'):
        stop(f'{this} is one process; run it without torchrun')
    limits, owners = read_limits(block), {}  # owners of the settings that are not this program's
    for script in SCRIPTS:
        if script != this and (ROOT / script).is_file():  # sample.py may be alone
            owners = dict.fromkeys(settings_block(ROOT / script)[0], script) | owners  # the first of several
    changes, typed = [], []
    for arg in sys.argv[1:]:
        if arg in ('-h', '--help'):
            print(f'{g["__doc__"]}\nsettings, with their defaults:\n\n{block}')
            sys.exit(0)
        key, equals, value = arg.partition('=')  # a value may hold more of them
        if arg.startswith('--') and equals:
            typed.append(('command line', key[2:].replace('-', '_'), value))
        elif arg.startswith('-') or not arg.endswith('.py'):
            stop(f'{this}: cannot read {arg!r}; settings are typed --key=value, config files end in .py')
        else:
            changes += [(arg, name, value) for name, value in read_config(arg)]

    for source, key, value in changes + typed:
        if key not in defaults:
            if key in owners and source != 'command line':
                continue  # another program's setting: it reads the same file
            near = difflib.get_close_matches(key, [*defaults, *owners], 1)
            hint = f'did you mean {near[0]!r}?' if near else 'see -h'
            if source != 'command line':
                hint += '; a name that is the file\'s own starts with _'
            hint = f'it belongs to {owners[key]}' if key in owners else hint
            stop(f'{source}: {this} has no setting {key!r}; {hint}')
        default, parts = defaults[key], limits.get(key, [])
        try:
            value = convert(value, default, parts)
        except (ValueError, SyntaxError):
            kind = 'a Python constant' if default is None else type(default).__name__
            stop(f'{source}: {key} is {value!r}; it must be {kind}, like its default {default!r}')
        if parts and not any(allows(part, value) for part in parts):
            stop(f'{source}: {key} is {value!r}; it must be {in_words(parts)}')
        if 'file' in parts and source == 'command line' and value and Path(value).exists():
            value = str(Path(value).absolute())
        if value != g[key] and RANK == 0:
            new, old = (t if len(t) < 60 else f'{t[:56]} ...' for t in (repr(value), repr(g[key])))
            new = '(a secret)' if key.endswith('_key') else new
            print(f'{key} = {new} ({source}; was {old})', file=sys.stderr)
        g[key] = value
    folder = Path(g['__file__']).absolute().parent
    os.chdir(folder if (folder / 'config').is_dir() else folder.parent)  # docs/pictures.py is one below
    return {name: g[name] for name in defaults}


def command(script):
    """the command that runs another program on what this one was run on: its config files, and of the
    settings typed those that say which task and run are meant. Typed where this one was, it works."""
    names = 'name', 'run'
    if (ROOT / script).is_file():                               # a student that travels leaves the others behind
        names = settings_block(ROOT / script)[0]
    known = [f'--{key}' for key in ('name', 'dataset', 'run') if key in names]
    same = [arg for arg in sys.argv[1:] if arg.endswith('.py') or arg.partition('=')[0] in known]
    here = Path(sys.argv[0]).parent
    here = here.parent if here.name == 'device' else here
    return shlex.join(['python', str(here / script), *same])


# -----------------------------------------------------------------------------
# the machine


def can_compile():
    """whether torch.compile works here: it wants a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception:  # whatever it is that is missing
        return False
    return True


def pick_device(device):
    """'auto' -> the fastest device there is. Ends in one line where the one asked for is not there."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        stop(f'device = {device} cannot be used here: {str(error).splitlines()[0]}')
    return device


def products_per_s(dtype, size=1024):
    """matrix products of this size that the CPU makes in a second; the best of five."""
    a, times = torch.ones(size, size, dtype=dtype), []
    for _ in range(6):  # the first warms up
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 1 / min(times[1:])


def pick_dtype(dtype, device):
    """'auto' -> bfloat16 where the hardware multiplies it faster, else float32; as a torch.dtype.

    A GPU that has it is faster. A CPU that says so may be three times faster or half as fast, so it is
    measured; one that does not is hundreds of times slower, and is not asked.
    """
    if dtype == 'auto':
        cpu, faster = torch.cpu.get_capabilities(), False
        if device.startswith('cuda'):
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device == 'cpu' and (cpu.get('amx_bf16') or cpu.get('avx512_bf16')):
            faster = products_per_s(torch.bfloat16) > 1.3 * products_per_s(torch.float32)
        dtype = 'bfloat16' if faster else 'float32'
    return getattr(torch, dtype)


def start_ranks(device, backend):
    """joins the other processes, if torchrun has started several, and returns this one's device. Only the
    first speaks.

    The others wait for a day where the first alone has work, which an evaluation or the first look at ten
    million texts takes hours of; the default is minutes. Where one dies torchrun ends them all, so a long
    wait costs nothing.
    """
    if WORLD == 1:
        return device
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if RANK:
        sys.stdout = open(os.devnull, 'w')
    if device == 'cuda':
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    return device


def on_stop(handle):
    """calls handle(number, frame) on Ctrl-C, on kill, and where the terminal goes away (unless nohup ignores
    that)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def end_ranks():
    """waits until every process is here."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def tell_all(find):
    """what find() returns in the first process, in all of them; where it ends the first, it ends them all."""
    if WORLD == 1:
        return find()
    told = [None]
    try:
        if RANK == 0:
            told = [find()]
    finally:
        dist.broadcast_object_list(told)
    return sys.exit(1) if told[0] is None else told[0]
