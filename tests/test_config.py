"""Data lines; settings: defaults, config files, the command line."""
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

import config as configure_module
from config import data_line, read_data_line
from distil.space import OutputSpace
from tests.conftest import CONFIGS, FIELDS, PROGRAMS, ROOT, clone_task, one_line, run

ALL = (*PROGRAMS, 'tools/accuracy.py', 'tools/batch.py', 'serve/serve.py', 'serve/bench.py',
       'device/export.py', 'device/web.py', 'device/bench.py')



# -----------------------------------------------------------------------------
# data lines

texts = st.one_of(st.text(), st.text(alphabet='a =:,"\'\\\n\t\0\x7f\x85\xa0\u2028😀{}'))


@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
@hypothesis.given(st.dictionaries(texts, texts))
def test_a_data_line_is_one_line_that_gives_back_every_text(figures):
    line = data_line('field', figures)
    assert len(line.splitlines()) == 1 and read_data_line(line) == read_data_line(f'{line}\n') == ('field', figures)
    if not any(' ' in text for pair in figures.items() for text in pair):
        assert len(dict(f.split('=') for f in line.split()[1:])) == len(figures)


def test_a_data_line_quotes_only_what_cannot_be_read_otherwise():
    plain = {'step': 200, 'lr': 3e-4, 'kl': 0.123456, 'ok': True, 'name': 'größe', 'mood': '😀', 'file': 'C:\\a',
             'n': -1}
    line = 'train step=200 lr=0.0003 kl=0.1235 ok=True name=größe mood=😀 file=C:\\a n=-1'
    assert data_line('train', plain) == line
    assert read_data_line(line) == ('train', dict(f.split('=') for f in line.split()[1:]))
    odd = {'a': 'two words', 'b': 'x=y', 'c': '', 'd': '"q"', 'e': 'half \ud83d', 'f': None}
    line = 'field a="two words" b="x\\u003dy" c="" d="\\"q\\"" e="half \\ud83d" f=None'
    assert data_line('field', odd) == line and read_data_line(line) == ('field', odd | {'f': 'None'})
    # as earlier versions wrote them, and lines that a kill or a full disk cut off
    for line, pairs in (('field name=order status agree=0.81', {'name': 'order', 'agree': '0.81'}),
                        ('field name=a=b agree=1', {'name': 'a=b', 'agree': '1'}), ('val', {}), ('val kl=', {'kl': ''}),
                        ('val name="two wo', {'name': '"two'}), ('truth name="q" n=1', {'name': 'q', 'n': '1'})):
        assert read_data_line(line) == (line.split()[0], pairs)
    assert read_data_line('') == read_data_line('\n') == ('', {})


# -----------------------------------------------------------------------------
# settings


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """settings(arguments, config text, script text) -> globals of the script after configure()."""
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


def test_a_path_may_be_several_each_relative_to_the_folder_it_is_typed_in(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ('a', 'b', 'c,d'):
        (tmp_path / file).write_text('')
    for typed, read in (('a,b', f'{tmp_path}/a,{tmp_path}/b'), ('c,d', f'{tmp_path}/c,d'), ('', ''),
                        ('a,no,', f'{tmp_path}/a,no,'), ('http://a,http://b', 'http://a,http://b')):
        monkeypatch.chdir(tmp_path)
        assert settings([f'--c={typed}'], script="c = 'x'  # file\n")['c'] == read


def test_a_constant_for_a_text_setting_becomes_the_same_text_in_a_file_and_on_the_command_line(settings):
    for typed in ('False', '270', '1.5'):
        assert settings([settings.file], f'c = {typed}\n')['c'] == settings([f'--c={typed}'])['c'] == typed
    with pytest.raises(SystemExit, match='c is .* it must be str'):
        settings([settings.file], 'c = [1]\n')


def test_unknown_keys_stop_with_a_hint(settings):
    # a key of train.py is skipped in a file; on the command line it is an error that names train.py
    assert settings([settings.file], 'learning_rate = 1.0\n_private = 3\nimport os\n')['a'] == 1
    with pytest.raises(SystemExit, match="it belongs to train.py"):
        settings(['--learning-rate=1'])
    with pytest.raises(SystemExit, match="no setting 'learning_rat'; did you mean 'learning_rate'"):
        settings([settings.file], 'learning_rat = 1.0\n')
    for wrong in ('--a', 'a=1', 'nowhere.py'):
        with pytest.raises(SystemExit, match='cannot read|does not exist'):
            settings([wrong])


def test_help_prints_the_settings_block(settings, capsys):
    with pytest.raises(SystemExit):
        settings(['-h'], script='a = 1  # why\n')
    assert 'a = 1  # why' in capsys.readouterr().out


@pytest.mark.parametrize('script', [
    pytest.param(script, marks=[pytest.mark.slow] * (script not in PROGRAMS)) for script in ALL])
def test_shipped_configs_fit_every_script(script, monkeypatch):
    names, _ = configure_module.settings_block(ROOT / script)
    read = runpy.run_path(str(ROOT / script), run_name='imported')
    for path in CONFIGS:
        g = {**read, '__name__': '__main__', '__file__': str(ROOT / script)}
        monkeypatch.setattr(sys, 'argv', [script, str(path)])
        assert configure_module.configure(g)['name'] == path.stem
    monkeypatch.setattr(sys, 'argv', [script, 'config/demo.py', 'config/small.py'])
    settings = configure_module.configure({**read, '__name__': '__main__', '__file__': str(ROOT / script)})
    assert settings['name'] == 'demo' and not settings.get('reader')


def test_documented_commands_name_files_and_settings_that_exist():
    documents = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / script for script in ALL),
                 *(ROOT / 'config').glob('*.py'), ROOT / 'Makefile']
    text = '\n'.join(document.read_text() for document in documents)
    commands = re.findall(
        r'(?:python|torchrun \S+) ([\w/]+\.py)((?: +(?:--\w+=(?:"[^"]*"|[^\s`]*)|config/\w+\.py))*)', text)
    assert len(commands) > 50
    for script, arguments in commands:
        script = re.sub(r'^(out/\w+/device/|(?=run\.py))', 'device/', script)  # an exported copy of it
        assert (ROOT / script).is_file() or 'mine' in script, script
        for argument in re.findall(r'config/\w+\.py|--\w+', arguments):
            if argument.startswith('config/'):
                assert (ROOT / argument).is_file() or 'mine' in argument, (script, argument)
            elif script in ALL:
                assert argument[2:] in configure_module.settings_block(ROOT / script)[0], (script, argument)


@pytest.mark.parametrize('program', ALL)
def test_every_numeric_setting_has_limits_that_its_default_satisfies(program):
    names, block = configure_module.settings_block(ROOT / program)
    limits = configure_module.read_limits(block)
    defaults = runpy.run_path(str(ROOT / program), run_name='imported')
    for name in names:
        number = isinstance(defaults[name], (int, float)) and not isinstance(defaults[name], bool)
        assert name in limits or not number, name
        if name in limits:
            assert any(configure_module.allows(part, defaults[name]) for part in limits[name]), name


def test_limits_are_read_from_comments_and_checked_in_files_and_on_the_command_line(settings):
    script = (
        "a = 4  # 1..; a number\nb = 0.5  # 0..1\nc = 'x'  # 'x', 'y' or 'z'; one of three\n"
        "d = None  # None or 0..8; either\n"
        "e = ''  # word; a name\nf = 3  # 0: all of them; not a limit\n")
    assert settings(['--a=1', '--b=1', '--c=z', '--d=8', '--e=a.b-c', '--f=-7'], script=script)['d'] == 8
    for wrong, limits in (('a = 0', '1 or more'), ('b = 1.5', 'from 0 to 1'),
                          ("c = 'w'", "one of 'x', 'y', 'z'"), ('d = 9', 'None or'), ("e = 'a b'", 'a word'),
                          ("e = 'a*'", 'a word'), ('d = True', 'from 0 to 8'), ('b = 1e999', 'from 0 to 1')):
        with pytest.raises(SystemExit, match=f'my.py: {wrong[0]} is .*; it must be .*{limits}'):
            settings([settings.file], wrong + '\n', script=script)
        typed = '--' + wrong.replace(' = ', '=').replace("'", '')
        with pytest.raises(SystemExit, match=f'command line: {wrong[0]} is'):
            settings([typed], script=script)


def test_a_prompt_may_be_a_list_of_messages(settings):
    script, message = "a = ''  # text or messages; a prompt\n", {'role': 'user', 'content': '{text}'}
    assert settings([settings.file], f'a = {[message]!r}', script=script)['a'] == [message]
    assert settings([settings.file], "a = '{text}'", script=script)['a'] == '{text}'
    for wrong in [], [1], [{'role': 'user'}], [message | {'name': 'x'}], [{'role': 'user', 'content': 1}], {'a': 1}:
        with pytest.raises(SystemExit, match='my.py: a is .*; it must be'):
            settings([settings.file], f'a = {wrong!r}', script=script)


def test_examples_of_a_prompt_have_the_form_that_the_schema_requires(settings, tokenizer):
    fields = {'tone': ['neutral', 'é "x"'], 'n': [1, None], 'ok': [True, False]}
    space = OutputSpace(tokenizer, fields, end_id=1)
    text = f"""from config import write_examples
_examples = [('a {{}} b', 'é "x"', 1, True), ('c', 'neutral', None, False)]
a = write_examples('Text: {{}}\\n{{}}\\n', {fields!r}, _examples)"""
    first, second = (space.text(dict(zip(fields, values))) for values in (['é "x"', 1, True], ['neutral', None, False]))
    assert settings([settings.file], text, script="a = ''\n")['a'] == f'Text: a {{}} b\n{first}\nText: c\n{second}\n'


def test_a_broken_config_file_exits_with_a_message(settings):
    assert settings([settings.file], 'import json\n_x = lambda: 1\nhelp_me = lambda: 2\na = 3\n')['a'] == 3
    for content, message in (('for i in range(3): pass', 'has no setting .i.; .*start a name with _'),
                             ('import sys\nsys.exit()', 'SystemExit'), ('raise SystemExit(0)', 'SystemExit'),
                             ('import nowhere_at_all', 'ModuleNotFoundError'), ('a = (', 'SyntaxError')):
        with pytest.raises(SystemExit, match=f'my.py.* {message}'):
            settings([settings.file], content + '\n')


@pytest.mark.parametrize(
    'program, wrong',
    [('sample.py',
      ('sample_batch=0', 'sample_batch=-3', 'min_confidence=50', 'device=cuda', 'name=a b', 'name=t*')),
     ('train.py', ('max_epochs=0', 'batch_size=0', 'grad_accum=0', 'seed=-1', 'dropout=1.5', 'dtype=float8',
                   'n_head=3', 'max_records=-5')),
     ('extract.py', ('max_records=-5', 'indent=-1', 'extract_batch=0', 'dtype=float8', "extra_vocab=['a', 5]",
                     'device=cuda')),
     ('tools/evaluate.py', ('examples=-1', 'which=luck')),
     ('tools/bench.py', ('what=luck', 'batch_size=0'))])
def test_settings_out_of_range_exit_with_a_message_that_names_them(project, program, wrong):
    for setting in wrong:
        line = one_line(run(project, program, f'--{setting}', *['--run=other'] * (program == 'train.py')))
        assert setting.partition('=')[0] in line and ('must be' in line or 'cannot be used' in line
                                                      or 'a head needs' in line), line


@pytest.mark.slow
def test_from_another_folder_typed_paths_belong_to_it_and_data_to_the_project(project, tmp_path):
    (tmp_path / 'with spaces').mkdir()
    (tmp_path / 'with spaces' / 'my texts.txt').write_text('hello my friend\n')
    script, config = str(project / 'sample.py'), str(project / 'config/toy.py')
    done = subprocess.run([sys.executable, script, config, '--input=my texts.txt'],
                          cwd=tmp_path / 'with spaces', capture_output=True, text=True)
    assert list(json.loads(done.stdout)) == list(FIELDS), done.stderr
    done = subprocess.run([sys.executable, script, config, '--run=other', '--text=hi'], cwd=tmp_path,
                          capture_output=True, text=True)
    hint = done.stderr.splitlines()[-1].partition('run: ')[2]
    assert hint == f'python {os.path.relpath(project / "train.py", tmp_path)} {config} --run=other'
    assert done.returncode == 1


def test_programs_of_one_process_refuse_torchrun(project, monkeypatch):
    monkeypatch.setattr(configure_module, 'WORLD', 2)
    for program in ('sample.py', 'tools/evaluate.py', 'tools/bench.py'):
        with pytest.raises(SystemExit, match=f'{Path(program).name} is one process; run it without torchrun'):
            configure_module.configure({**runpy.run_path(str(ROOT / program), run_name='imported'),
                                        '__name__': '__main__', '__file__': str(ROOT / program)})


@pytest.mark.slow
def test_no_program_raises_a_warning(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    for program, args in (('train.py', ['--max_epochs=1']), ('tools/evaluate.py', []),
                          ('sample.py', ['--text=hi'])):
        done = subprocess.run([sys.executable, program, 'config/toy.py', *args], cwd=root,
                              capture_output=True, text=True, env={**os.environ, 'PYTHONWARNINGS': 'error'})
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ctrl_c_prints_one_line_and_an_error_its_traceback(tmp_path):
    for raised, last_word in (('KeyboardInterrupt', 'stopped'), ('ZeroDivisionError', 'ZeroDivisionError')):
        program = tmp_path / 'extract.py'
        program.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r}); from config import configure\n'
                           f'a = 1\nconfig = configure(globals())\nraise {raised}\n')
        done = subprocess.run([sys.executable, program], capture_output=True, text=True)
        assert done.returncode and done.stderr.split()[-1] == last_word
        assert ('Traceback' in done.stderr) == (raised != 'KeyboardInterrupt')


NARROW = {'LC_ALL': 'POSIX', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}


@pytest.mark.parametrize('env', [NARROW, *(pytest.param(env, marks=pytest.mark.slow) for env in (
    {**NARROW, 'PYTHONIOENCODING': ''}, {'PYTHONIOENCODING': 'latin-1'}, {'PYTHONIOENCODING': 'utf-8'}))])
def test_no_program_fails_at_a_character_that_a_stream_cannot_encode(tmp_path, env):
    """texts and values are printed as escapes, JSON stays JSON, and what is typed is UTF-8 in any locale."""
    program = tmp_path / 'extract.py'
    program.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r}); from config import configure, json_line
a = ''  # text
config = configure(globals())
print(json_line({{a: a}}))
print(a, 'half \\ud800')
print(a, file=sys.stderr)
""", encoding='utf-8')
    text = 'glücklich, 喜び 😀'
    done = subprocess.run([sys.executable, program, f'--a={text}'], capture_output=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    json_text, prose = done.stdout.splitlines()
    assert json.loads(json_text) == {text: text} and b'cklich' in prose and b'half' in prose
    assert (text in json_text.decode()) == (env.get('PYTHONIOENCODING') == 'utf-8')


@pytest.mark.slow
def test_a_task_beyond_ascii_works_in_a_posix_locale(project, tmp_path):
    root, fields = clone_task(project, tmp_path), {'größe': ['glücklich', '喜び']}
    texts = [json.loads(line)['text'] + ' été' for line in open(root / 'data/toy/input.jsonl')]
    lines = [{'text': text, 'answer': {'größe': fields['größe'][' cat ' in text]}} for text in texts]
    (root / 'labels.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    with open(root / 'config/toy.py', 'a', encoding='utf-8') as file:
        file.write(f'fields = {fields!r}\nprompt = "Größe von {{text}}"\nlabels = "labels.jsonl"\ncalibrate = 0\n'
                   'prior = {}\nmax_epochs = 1\n')
    texts[1] = 'ein glücklicher Text, 喜び'

    def run_narrow(program, *args, env=NARROW):
        done = subprocess.run([sys.executable, program, 'config/toy.py', *args], cwd=root, capture_output=True,
                              input='\n'.join(texts[:3]).encode(), env={**os.environ, **env})
        assert done.returncode == 0, done.stderr.decode('utf-8', 'replace')
        return done.stdout
    for program in ('extract.py', 'train.py'):
        assert b'gr\\xf6\\xdfe' in run_narrow(program)
    answers = [json.loads(line) for line in run_narrow('sample.py').splitlines()]
    assert len(answers) == 3 and all(answer['größe'] in fields['größe'] for answer in answers)
    typed = [run_narrow('sample.py', '--confidence=True', f'--text={texts[1]}', env=env) for env in (NARROW, {})]
    assert json.loads(typed[0]) == json.loads(typed[1]) and typed[0] != typed[1]  # the same text was read
