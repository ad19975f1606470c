"""The form of the project: short files, imports in one direction, and what pytest prints at its end."""
import ast
import fnmatch

import pytest

from config import PROGRAMS
from tests.conftest import ROOT, describe_skips

SCRIPTS = {'extract.py': 360, 'model.py': 320, 'train.py': 360, 'sample.py': 260}  # lines of each, see fits()
ROOMS = 'distil', 'tools', 'serve', 'device', 'data', 'config', 'docs'
OURS = {'extract', 'model', 'train', 'sample', 'tests', *ROOMS}
HEADER = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root"


def find_sources(*rooms):
    """(path relative to the project, source) of every Python file in these rooms."""
    paths = sorted(path for room in rooms for path in (ROOT / room).rglob('*.py'))
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding='utf-8')) for path in paths]


# -----------------------------------------------------------------------------
# lengths


def test_the_top_level_has_four_scripts_and_the_smoke_test():
    assert {path.name for path in ROOT.glob('*.py')} == {*SCRIPTS, 'test_smoke.py'}


def fits(path, most):
    """True if a file has no more lines than this and a tenth: a limit that makes lines worse is the wrong limit."""
    return len((ROOT / path).read_text(encoding='utf-8').splitlines()) <= 1.1 * most


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_is_short(script):
    assert fits(script, SCRIPTS[script])


def test_the_readme_and_the_explanation_are_short_and_the_readme_is_narrow():
    assert fits('README.md', 250) and fits('docs/how.md', 200)
    assert [line for line in (ROOT / 'README.md').read_text(encoding='utf-8').splitlines() if len(line) > 120] == []


# -----------------------------------------------------------------------------
# imports


def find_imports(tree):
    """full names of all that a syntax tree imports, such as {'sys', 'distil.space.clean'}."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f'{node.module}.{alias.name}' for alias in node.names)
    return names


def imports_of(source, modules):
    """the imports of a source that come from one of these top-level modules."""
    return sorted(name for name in find_imports(ast.parse(source)) if name.partition('.')[0] in modules)


def test_every_program_in_a_room_finds_the_project_in_the_same_way():
    programs = [(path, source) for path, source in find_sources('tools', 'serve', 'device', 'docs')
                if 'configure(globals())' in source]
    assert len(programs) > 8
    for path, source in programs:
        assert source.splitlines().count(HEADER) == source.count('sys.path') == 1, path


def file_of(name, path, files):
    """the file that an import in the file `path` means, None if it is none of ours. The programs in data/ import what
    lies beside them."""
    for module in (name, name.rpartition('.')[0]):
        for root in ('', 'data/') if path.startswith('data/') else ('',):
            found = root + module.replace('.', '/')
            for file in f'{found}.py', f'{found}/__init__.py':
                if module and file in files:
                    return file
    return None


def read_levels(files):
    """{file: number of its line in docs/how.md, whether * stands for it}, from the list of which file imports which."""
    text = (ROOT / 'docs/how.md').read_text(encoding='utf-8').partition('How the files depend')[2]
    lines = [line.partition('#')[0].split() for line in text.splitlines() if line.startswith('    ')]
    levels = {}
    for number, words in enumerate(lines):
        folder = ''
        for word in words:
            if word.endswith(':'):
                folder = word[:-1]
                continue
            pattern = word if '/' in word or '.py' in word else f'{folder}{word}.py'
            for file in files:
                if fnmatch.fnmatchcase(file, pattern):
                    levels.setdefault(file, (number, pattern.endswith('/*')))
    return levels


def test_imports_run_down_the_list_of_the_explanation():
    sources = [(script, (ROOT / script).read_text(encoding='utf-8')) for script in SCRIPTS] + find_sources(*ROOMS)
    files = {path: source for path, source in sources if path.count('/') < 2 or path.endswith('prepare.py')}
    tasks = {path for path in files if path.startswith('config/')} - {'config/__init__.py', 'config/machine.py'}
    levels = read_levels(files)
    missing = {path for path in files if path not in levels} - tasks
    assert missing <= {'distil/__init__.py'}, missing
    arrows = 0
    for path in levels:
        for name in find_imports(ast.parse(files[path])):
            target = file_of(name, path, files)
            if target in (None, path, 'distil/__init__.py'):
                continue
            (below, _), (here, is_room) = levels[target], levels[path]
            assert below > here or below == here and is_room, f'{path} imports {target}'
            arrows += 1
    assert arrows > 200


def test_our_files_are_imported_at_the_top():
    """but for what is optional: the teacher in distil/labeler.py, and in device/."""
    sources = [(script, (ROOT / script).read_text(encoding='utf-8')) for script in SCRIPTS]
    for path, source in sources + find_sources(*ROOMS):
        inside = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside |= {name for name in find_imports(node) if name.partition('.')[0] in OURS}
        if path == 'distil/labeler.py':
            inside = {name for name in inside if not name.startswith('distil.cascade.')}
        assert not inside or path.startswith('device/'), (path, inside)


# -----------------------------------------------------------------------------
# the end of pytest's output


def test_skipped_tests_are_grouped_by_reason_with_the_way_to_install_what_is_missing():
    assert describe_skips([
        ('tests/test_device.py::test_a', 'Skipped: Chromium is not here'),
        ('tests/test_labels.py::test_b[1]', 'Skipped: two values have one name'),
        ('tests/test_device.py::test_c', 'Skipped: Chromium is not here'),
        ('tests/test_device.py::test_d', 'Skipped: Node.js is missing'),
        ('tests/test_serve.py', "Skipped: could not import 'typesafe_sdk': No module named 'typesafe_sdk'"),
        ('tests/test_device.py::test_e', "Skipped: could not import 'playwright.sync_api': No module"),
    ]) == [
        '2 tests skipped: Chromium is missing (apt install chromium), in tests/test_device.py',
        '1 test skipped: two values have one name, in tests/test_labels.py',
        '1 test skipped: Node.js is missing (apt install nodejs npm), in tests/test_device.py',
        '1 whole file skipped: the Python package typesafe_sdk is missing (pip install -r requirements.txt), '
        'in tests/test_serve.py',
        '1 test skipped: the Python package playwright is missing (pip install -r requirements.txt), '
        'in tests/test_device.py',
    ]
    assert describe_skips([]) == []


def test_how_threads_wait_is_set_before_torch_is_loaded():
    """libgomp reads GOMP_SPINCOUNT when it is loaded, and config/machine.py sets it."""
    for path, source in [(script, (ROOT / script).read_text(encoding='utf-8')) for script in PROGRAMS]:
        names = [name.partition('.')[0] for node in ast.parse(source).body for name in find_imports(node)]
        first = min(n for n, name in enumerate(names) if name in {*OURS, 'torch', 'transformers'} - {'data'})
        assert names[first] == 'config', path
