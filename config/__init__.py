"""Settings for all scripts:  default  <  config file  <  --key=value, whatever the order typed.

    python train.py config/demo.py --batch_size=32

A script's settings are its top-level `name = value` lines above `config = configure(globals())`.
A config file is plain Python; its names that start with _ are private to it.
"""
import ast
import difflib
import runpy
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ('extract.py', 'train.py', 'sample.py')  # one config file serves all three


def settings_block(script):
    """names of a script's settings and the source lines that define them, read without importing it."""
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
    """value with the type of default; text is read as that type. ValueError or SyntaxError where it cannot be."""
    if isinstance(value, str) and not isinstance(default, str):
        value = ast.literal_eval(value.replace('true', 'True').replace('false', 'False') if isinstance(default, bool) else value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is None or type(value) is type(default):
        return value
    raise ValueError


def configure(g):
    """apply config files and command line to the settings in g = globals(); returns them as a dict.

    Exits with one line and status 1 on an unknown key, a wrong type or a missing file. Imported scripts keep defaults.
    """
    this = Path(g['__file__']).name
    names, block = settings_block(g['__file__'])
    defaults = {name: g[name] for name in names}
    if g['__name__'] != '__main__':
        return defaults
    owners = {key: s for s in SCRIPTS if s != this and (ROOT / s).is_file() for key in settings_block(ROOT / s)[0]}  # sample.py may be alone
    changes, typed = [], []
    for arg in sys.argv[1:]:
        if arg in ('-h', '--help'):
            print(f'{g["__doc__"]}\nsettings, with their defaults:\n\n{block}')
            sys.exit(0)
        key, equals, value = arg.partition('=')  # a value may hold more of them
        if arg.startswith('--') and equals:
            typed.append(('command line', key[2:].replace('-', '_'), value))
            continue
        if arg.startswith('-') or not arg.endswith('.py'):
            sys.exit(f'{this}: cannot read {arg!r}; settings are typed --key=value, config files end in .py')
        if not Path(arg).is_file():
            sys.exit(f'{arg} does not exist; there are: {", ".join(sorted(map(str, Path("config").glob("[!_]*.py"))))}')
        try:
            values = runpy.run_path(arg)
        except Exception as error:
            sys.exit(f'{arg} does not run: {type(error).__name__}: {error}')
        changes += [(arg, key, value) for key, value in values.items()
                    if not (key.startswith('_') or callable(value) or isinstance(value, ModuleType))]
    for source, key, value in changes + typed:
        if key not in defaults:
            if key in owners and source != 'command line':
                continue  # another script's setting: it reads the same file
            near = difflib.get_close_matches(key, [*defaults, *owners], 1)
            hint = f'it belongs to {owners[key]}' if key in owners else f'did you mean {near[0]!r}?' if near else 'see -h'
            sys.exit(f'{source}: {this} has no setting {key!r}; {hint}')
        try:
            value = convert(value, defaults[key])
        except (ValueError, SyntaxError):
            sys.exit(f'{source}: {key} is {value!r}; it must be {type(defaults[key]).__name__}, like its default {defaults[key]!r}')
        if value != g[key]:
            new, old = (text if len(text) < 60 else text[:56] + ' ...' for text in (repr(value), repr(g[key])))
            print(f'{key} = {new} ({source}; was {old})', file=sys.stderr)
        g[key] = value
    return {name: g[name] for name in defaults}
