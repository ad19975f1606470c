"""Settings: defaults, config files, the command line."""
import re
import runpy
import sys

import pytest

import config as configure_module
from conftest import PROGRAMS, ROOT


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """settings(script text, config text, *arguments) -> globals of the script after configure()."""
    def call(arguments, config_text='', script="a = 1\nb = 2.0\nc = 'x'\nd = True\ne = None\nf = {}\n"):
        (tmp_path / 'extract.py').write_text(f"'''doc'''\n{script}config = configure(globals())\nafter = 5\n")
        (tmp_path / 'my.py').write_text(config_text)
        monkeypatch.setattr(sys, 'argv', ['extract.py', *arguments])
        g = dict(__file__=str(tmp_path / 'extract.py'), __name__='__main__', __doc__='doc',
                 configure=configure_module.configure)
        exec((tmp_path / 'extract.py').read_text(), g)
        return g
    call.file = str(tmp_path / 'my.py')
    return call


def test_command_line_beats_file_beats_default_in_any_order(settings):
    for arguments in (['--a=3', settings.file], [settings.file, '--a=3']):
        g = settings(arguments, 'a = 2\nb = 5\n')
        assert (g['a'], g['b'], g['c']) == (3, 5.0, 'x') and type(g['b']) is float
        assert g['config'] == {k: g[k] for k in 'abcdef'}


def test_values_keep_the_type_of_their_default(settings):
    g = settings(['--a=7', '--b=1', '--c=1=2', '--d=false', '--e=2', "--f={'k': [1, None]}"])
    assert [g[k] for k in 'abcdef'] == [7, 1.0, '1=2', False, 2, {'k': [1, None]}]
    for wrong in ('--a=1.5', '--a=x', '--b=x', '--d=1', '--f=[1]'):
        with pytest.raises(SystemExit, match=f'command line: {wrong[2]} is'):
            settings([wrong])
    with pytest.raises(SystemExit, match="e is 'x'; it must be a Python constant, like its default None"):
        settings(['--e=x'])


def test_a_constant_in_a_file_is_the_text_it_would_be_on_the_command_line(settings):
    for typed in ('False', '270', '1.5'):
        assert settings([settings.file], f'c = {typed}\n')['c'] == settings([f'--c={typed}'])['c'] == typed
    with pytest.raises(SystemExit, match='c is .* it must be str'):
        settings([settings.file], 'c = [1]\n')


def test_unknown_keys_stop_with_a_hint(settings):
    assert settings(
        [settings.file],
        'learning_rate = 1.0\n_private = 3\nimport os\n')['a'] == 1  # train.py's key is skipped in a file ...
    with pytest.raises(SystemExit, match="it belongs to train.py"):
        settings(['--learning-rate=1'])                                    # ... but typed, it names its owner
    with pytest.raises(SystemExit, match="no setting 'learning_rat'; did you mean 'learning_rate'"):
        settings([settings.file], 'learning_rat = 1.0\n')
    for wrong in ('--a', 'a=1', 'nowhere.py'):
        with pytest.raises(SystemExit, match='cannot read|does not exist'):
            settings([wrong])


def test_help_prints_the_settings_block(settings, capsys):
    with pytest.raises(SystemExit):
        settings(['-h'], script='a = 1  # why\n')
    assert 'a = 1  # why' in capsys.readouterr().out


@pytest.mark.parametrize('script', PROGRAMS)
def test_shipped_configs_fit_every_script(script, monkeypatch):
    names, _ = configure_module.settings_block(ROOT / script)
    for path in sorted((ROOT / 'config').glob('[!_]*.py')):
        g = dict(runpy.run_path(str(ROOT / script), run_name='imported'), __name__='__main__',
                 __file__=str(ROOT / script))
        monkeypatch.setattr(sys, 'argv', [script, str(path)])
        assert configure_module.configure(g)['name'] == path.stem


def test_commands_that_are_shown_name_files_and_settings_that_exist():
    documents = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / script for script in PROGRAMS),
                 *(ROOT / 'config').glob('*.py'), ROOT / 'Makefile']
    text = '\n'.join(document.read_text() for document in documents)
    commands = re.findall(
        r'(?:python|torchrun \S+) ([\w/]+\.py)((?: +(?:--\w+=(?:"[^"]*"|[^\s`]*)|config/\w+\.py))*)', text)
    assert len(commands) > 50
    for script, arguments in commands:
        assert (ROOT / script).is_file() or 'mine' in script, script
        for argument in re.findall(r'config/\w+\.py|--\w+', arguments):
            if argument.startswith('config/'):
                assert (ROOT / argument).is_file() or 'mine' in argument, (script, argument)
            elif script in PROGRAMS:
                assert argument[2:] in configure_module.settings_block(ROOT / script)[0], (script, argument)
