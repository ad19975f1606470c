"""Settings for all programs:  default  <  config file  <  --key=value, whatever the order typed.

    python train.py config/demo.py --batch_size=32

A program's settings are its top-level `name = value` lines above `config = configure(globals())`.
A config file is plain Python; its names that start with _ are private to it.
Below that: the machine a program runs on, alone or as one of several that torchrun has started.
"""
import ast
import datetime
import difflib
import os
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = 'extract.py', 'train.py', 'sample.py', 'evaluate.py', 'bench.py'  # one config file serves them all
WORLD, RANK = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))  # torchrun sets them


def stop(line):
    """ends the program with this line and status 1; of several processes that find the same, one says it."""
    sys.exit(line if RANK == 0 else 1)


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


def convert(value, default):
    """value with the type of default; text is read as that type, and a plain constant as the text it would be
    on the command line. ValueError or SyntaxError where it cannot be."""
    if isinstance(default, str) and isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, str) and not isinstance(default, str):
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
    if not Path(path).is_file():
        known = sorted(map(str, Path('config').glob('[!_]*.py')))
        stop(f'{path} does not exist; there are: {", ".join(known)}')
    try:
        values = runpy.run_path(path)
    except Exception as error:
        stop(f'{path} does not run: {type(error).__name__}: {error}')
    return [(name, value) for name, value in values.items()
            if not (name.startswith('_') or callable(value) or isinstance(value, ModuleType))]


def configure(g):
    """apply config files and command line to the settings in g = globals(); returns them as a dict.

    Exits with one line and status 1 on an unknown key, a wrong type or a missing file. Imported programs keep
    defaults.
    """
    this = Path(g['__file__']).name
    names, block = settings_block(g['__file__'])
    defaults = {name: g[name] for name in names}
    if g['__name__'] != '__main__':
        return defaults
    owners = {}  # of the settings that are not this program's
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
            hint = f'it belongs to {owners[key]}' if key in owners else hint
            stop(f'{source}: {this} has no setting {key!r}; {hint}')
        default = defaults[key]
        try:
            value = convert(value, default)
        except (ValueError, SyntaxError):
            kind = 'a Python constant' if default is None else type(default).__name__
            stop(f'{source}: {key} is {value!r}; it must be {kind}, like its default {default!r}')
        if value != g[key] and RANK == 0:
            new, old = (t if len(t) < 60 else f'{t[:56]} ...' for t in (repr(value), repr(g[key])))
            print(f'{key} = {new} ({source}; was {old})', file=sys.stderr)
        g[key] = value
    return {name: g[name] for name in defaults}


def check_choices(config, choices):
    """ends in one line where a setting is none of its choices: {setting: allowed values}."""
    for key, allowed in choices.items():
        if config[key] not in allowed:
            stop(f'{key} is {config[key]!r}; it must be one of {", ".join(map(repr, allowed))}')


def command(script):
    """the command that runs another program on what this one was run on: its config files, and of the
    settings typed those that say which task and run are meant."""
    same = [arg for arg in sys.argv[1:] if arg.endswith('.py')
            or arg.partition('=')[0] in ('--name', '--dataset', '--run') and arg[2:].partition('=')[0] in
            settings_block(ROOT / script)[0]]
    return shlex.join(['python', script, *same])


# -----------------------------------------------------------------------------
# the machine


def pick_device(device):
    """'auto' -> the fastest device there is."""
    if device != 'auto':
        return device
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


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
