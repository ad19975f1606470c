"""The form of the project: short files with comments, imports in one direction, and what pytest prints at its
end."""
import ast
import io
import tokenize

import pytest

from config import PROGRAMS
from tests.conftest import ROOT, describe_skips

SCRIPTS = {'extract.py': 360, 'model.py': 300, 'train.py': 360, 'sample.py': 260}  # most lines of each
ROOMS = 'distil', 'tools', 'serve', 'device', 'data', 'config', 'docs'
OURS = {'extract', 'model', 'train', 'sample', 'tests', *ROOMS}
ABOVE = {'extract', 'train', 'sample', 'tools', 'serve', 'device', 'docs', 'tests'}  # they import distil
HEADER = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root"


def find_sources(*rooms):
    """(path relative to the project, source) of every Python file in these rooms."""
    paths = sorted(path for room in rooms for path in (ROOT / room).rglob('*.py'))
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding='utf-8')) for path in paths]


# -----------------------------------------------------------------------------
# lengths and comments


def test_the_top_level_has_four_scripts_and_the_smoke_test():
    assert {path.name for path in ROOT.glob('*.py')} == {*SCRIPTS, 'test_smoke.py'}


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_is_short(script):
    assert len((ROOT / script).read_text(encoding='utf-8').splitlines()) <= SCRIPTS[script]


def test_the_readme_is_short_and_narrow():
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 250
    assert [line for line in lines if len(line) > 120] == []


def test_the_explanation_is_short():
    assert len((ROOT / 'docs/how.md').read_text(encoding='utf-8').splitlines()) <= 200


def count_comments(source):
    """(number of comments, number of lines with code). Docstrings and blank lines are neither."""
    docstrings = set()  # line numbers
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) \
                and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    comments, code = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in blank:
            code.update(range(token.start[0], token.end[0] + 1))
    return comments, len(code - docstrings)


def test_comments_and_lines_of_code_are_counted():
    source = ('"""doc\n# not one"""\n# one\n\nx = """a\n# not one"""  # two\n\n'
              'def f():\n    "doc"\n    return f(\n        1)\n')
    assert count_comments(source) == (2, 5)


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_has_a_comment_for_every_third_line_of_code(script):
    comments, code = count_comments((ROOT / script).read_text(encoding='utf-8'))
    assert 3 * comments >= code, f'{script} has {comments} comments for {code} lines of code'


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


def test_distil_imports_no_program():
    for path, source in find_sources('distil'):
        assert imports_of(source, ABOVE) == [], path


def test_data_and_config_import_only_the_output_space():
    for path, source in find_sources('data', 'config'):
        names = imports_of(source, ABOVE | {'model', 'distil'})
        assert [name for name in names if not f'{name}.'.startswith('distil.space.')] == [], path


def test_the_model_imports_none_of_our_files():
    assert imports_of((ROOT / 'model.py').read_text(encoding='utf-8'), OURS) == []


def test_our_files_are_imported_at_the_top():
    """but for what is optional: the teacher in sample.py, and in device/."""
    sources = [(script, (ROOT / script).read_text(encoding='utf-8')) for script in SCRIPTS]
    for path, source in sources + find_sources(*ROOMS):
        inside = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside |= {name for name in find_imports(node) if name.partition('.')[0] in OURS}
        if path == 'sample.py':
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
