"""How programs end when it is not their own fault: signals, also while they load; full and read-only disks; output
that nobody reads."""
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config.machine import interrupt, stop_anyway, whole_file
from data import write_json
from distil.checkpoint import save_checkpoint
from distil.resume import Training
from tests.conftest import ROOT, clone_task, one_line, run
from tests.test_config import ALL

DOCS = 'docs/agent.py', 'docs/demo.py', 'docs/options.py', 'docs/pictures.py', 'docs/reference.py', 'docs/truth.py'
# in place of a package: says that it is being loaded, and swallows exceptions as some packages do
SLOW = '''import os, time
os.write(1, b'loading\\n')
for _ in range(600):
    try:
        time.sleep(0.1)
    except BaseException:
        pass
'''


def own_program(tmp_path, body):
    """the path of a program with the settings of ours and this body."""
    program = tmp_path / 'extract.py'
    program.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r}); from config import configure\n'
                       f'a = 1\nconfig = configure(globals())\n{body}\n')
    return program


# -----------------------------------------------------------------------------
# signals


@pytest.fixture
def slow_packages(tmp_path):
    """the environment of a program whose packages load for a minute."""
    for package in ('torch', 'numpy', 'tokenizers', 'transformers', 'sklearn', 'openai', 'tqdm'):
        (tmp_path / package).mkdir()
        (tmp_path / package / '__init__.py').write_text(SLOW)
    return {**os.environ, 'PYTHONPATH': str(tmp_path)}


@pytest.mark.parametrize('program', [*ALL, *DOCS])
def test_a_signal_while_a_program_loads_ends_it_with_one_line(program, slow_packages):
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, ROOT / program, 'config/demo.py'], env=slow_packages,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'loading\n', process.stderr.read()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=10)
        assert stderr == '\nstopped\n' and process.returncode == -number


def test_the_first_process_of_a_container_stops_while_it_loads(slow_packages):
    """the kernel ignores the default action of a signal there."""
    new = ['unshare', '--pid', '--fork']
    if not shutil.which('unshare') or subprocess.run([*new, 'true'], capture_output=True).returncode:
        pytest.skip('no right to start the first process of a container')
    process = subprocess.Popen([*new, sys.executable, ROOT / 'serve/serve.py'], env=slow_packages,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'loading\n', process.stderr.read()
    child = int(Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text())
    os.kill(child, signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert stderr == '\nstopped\n' and process.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_program_that_imports_ours_keeps_its_signals_and_its_exceptions(tmp_path):
    program = tmp_path / 'mine.py'
    program.write_text(f'import signal, sys; sys.path.insert(0, {str(ROOT)!r})\n'
                       'handlers = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]\n'
                       'before = handlers()\n'               # in a background job Ctrl-C is ignored
                       'import config, sample\n'
                       'assert handlers() == before and sys.excepthook is sys.__excepthook__\n')
    assert subprocess.run([sys.executable, program]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize('number', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_leaves_no_unfinished_file_behind(tmp_path, number):
    (tmp_path / 'old.txt').write_text('old')
    done = subprocess.run([sys.executable, own_program(tmp_path, f'''
import os, signal
from config.machine import whole_file
with whole_file({str(tmp_path / 'old.txt')!r}) as tmp:
    tmp.write_text('half')
    os.kill(os.getpid(), signal.{number})''')], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr == '\nstopped\n'
    assert (tmp_path / 'old.txt').read_text() == 'old' and not list(tmp_path.glob('*.tmp'))


@pytest.mark.slow
@pytest.mark.parametrize('swallow', ['pass', 'raise RuntimeError'])
def test_a_signal_ends_a_program_even_in_a_package_that_catches_its_exception(tmp_path, swallow):
    done = subprocess.run([sys.executable, own_program(tmp_path, f'''
import os, signal
from config.machine import stop_anyway
with stop_anyway():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        {swallow}
print('not reached')''')], capture_output=True, text=True)
    assert done.returncode and (done.stdout, done.stderr) == ('', '\nstopped\n')
    with pytest.raises(ZeroDivisionError), stop_anyway():       # any other exception is left alone
        1 / 0


def test_a_stopped_export_leaves_nothing_behind(project, tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    from device.export import new_folder, write_onnx
    (tmp_path / 'device.tmp').mkdir()
    (tmp_path / 'device.tmp/half').write_text('of another run')
    before = signal.getsignal(signal.SIGTERM)

    def fake_export(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise RuntimeError('Create an issue in the PyTorch GitHub repository') from None
    monkeypatch.setattr(torch.onnx, 'export', fake_export)
    student = torch.nn.Linear(1, 1)
    student.encoder = None
    student.config = type('', (), {'block_size': 9})
    with pytest.raises(SystemExit) as raised, new_folder(tmp_path / 'device.tmp'):
        assert not list((tmp_path / 'device.tmp').iterdir())
        write_onnx(student, tmp_path / 'device.tmp/student.onnx')
    assert raised.value.code == 128 + signal.SIGTERM and not (tmp_path / 'device.tmp').exists()
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT)
    with pytest.raises(SystemExit, match='^cannot write .*device.tmp: No space left on device; an earlier'):
        with new_folder(tmp_path / 'device.tmp'), open('/dev/full', 'w') as file:
            file.write('x')
    assert not (tmp_path / 'device.tmp').exists()


# -----------------------------------------------------------------------------
# disks


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / 'new/file.json'
    with whole_file(path) as tmp:
        tmp.write_text('old')
    tmp.symlink_to('/dev/full')
    with pytest.raises(SystemExit, match='^cannot write .*/new/file.json: No space left on device; later$'):
        with whole_file(path, 'later') as tmp:
            tmp.write_text('new')
    with pytest.raises(ZeroDivisionError), whole_file(path) as tmp:
        tmp.write_text(str(1 / 0))
    with pytest.raises(RuntimeError, match='^another$'), whole_file(path):
        raise RuntimeError('another')                           # not of the disk: a fault, with its traceback
    assert path.read_text() == 'old' and os.listdir(path.parent) == ['file.json']


def test_a_json_file_that_cannot_be_written_leaves_no_other_behind(tmp_path):
    write_json(tmp_path / 'meta.json', {'a': 1})
    (tmp_path / 'meta.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError):
        write_json(tmp_path / 'meta.json', {'a': 2})
    assert os.listdir(tmp_path) == ['meta.json'] and (tmp_path / 'meta.json').read_text() == '{\n "a": 1\n}'


def test_on_a_full_disk_the_log_and_the_last_checkpoint_are_kept(tmp_path):
    state = {'model': torch.zeros(10000)}
    for file in ('best.pt', 'ckpt.pt'):
        advice = 'there is no checkpoint yet: make room, and run the same command again'
        for _ in range(2):
            (tmp_path / file.replace('.pt', '.tmp')).symlink_to('/dev/full')
            with pytest.raises(SystemExit, match=f'/{file}: No space left on device; {advice}$'):
                save_checkpoint(tmp_path / file, state)
            save_checkpoint(tmp_path / 'ckpt.pt', {'step': 1})
            advice = 'the last checkpoint is kept: make room, and the same command continues'
        (tmp_path / 'ckpt.pt').unlink()
    assert not list(tmp_path.glob('*.*'))
    (tmp_path / 'log.txt').symlink_to('/dev/full')
    with pytest.raises(SystemExit, match='/log.txt: No space left on device; there is no checkpoint yet: make room'):
        Training(tmp_path, {}, None, None).log('train', {'step': 1})


@pytest.mark.slow
def test_a_line_that_does_not_fit_is_not_left_in_half(tmp_path):
    done = subprocess.run([sys.executable, '-c', f'''
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from distil.resume import append_whole
path = Path({str(tmp_path / 'log.txt')!r})
append_whole(path, b'one\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
append_whole(path, b'two and more\\n')'''], capture_output=True, text=True)
    assert 'OSError' in done.stderr and (tmp_path / 'log.txt').read_text() == 'one\n'


@pytest.mark.slow
def test_programs_on_a_full_disk_name_the_file_and_continue_with_the_same_command(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    size = (root / 'data/toy/toy-00/tokenizer.json').stat().st_size
    for file, limit in (('tokenizer.json', size // 2), ('best.pt', 2 * size)):
        line = one_line(run(root, 'train.py', '--max_epochs=1', file_limit=limit))
        assert line.startswith(f'cannot write out/toy/{file}: File too large; there is no checkpoint yet'), line
    assert run(root, 'train.py', '--max_epochs=1').returncode == 0
    (root / 'out/toy/report.png').unlink(missing_ok=True)
    line = one_line(run(root, 'tools/evaluate.py', file_limit=9000))
    assert line.startswith('cannot write out/toy/report.png: File too large; all figures are complete'), line
    before = (root / 'out/toy/best.pt').read_bytes()
    line = one_line(run(root, 'tools/evaluate.py', '--target_agreement=0.01', file_limit=9000))
    assert line.startswith('cannot write out/toy/best.pt: File too large; the last checkpoint is kept'), line
    assert (root / 'out/toy/best.pt').read_bytes() == before
    line = one_line(run(root, 'extract.py', '--max_records=5', '--name=new', file_limit=size // 2))
    assert line.startswith('cannot write data/toy/new-00/tokenizer.json: File too large; make room, and'), line
    assert run(root, 'extract.py', '--max_records=5', '--name=new').returncode == 0
    assert not list(root.rglob('*.tmp'))


def test_a_file_that_cannot_be_written_is_named_in_one_line(project, tmp_path):
    """a folder in its place stands for a disk that cannot be written to, since root may write anywhere else."""
    root = clone_task(project, tmp_path, 'toy-00', 'out')
    for path in ('out/toy/report.png', 'out/compare.png', 'out/toy/export.lock'):
        (root / path).unlink(missing_ok=True)
        (root / path).mkdir()
    for path, program, *args in (('out/toy/report.png', 'tools/evaluate.py'),
                                 ('out/compare.png', 'tools/evaluate.py', '--compare=out/toy'),
                                 ('out/toy', 'device/export.py')):
        if program == 'device/export.py':
            pytest.importorskip('onnxscript')
            pytest.importorskip('onnxruntime')
        assert re.match(f'cannot write (to )?{path}: Is a directory', one_line(run(root, program, *args)))
    assert not list(root.rglob('*.tmp'))


# -----------------------------------------------------------------------------
# output


MANY = 'for n in range(100000): print(n)'


@pytest.mark.slow
@pytest.mark.parametrize('body, output, message, status', [
    (MANY, '| head -n 1', '\nstopped: nobody reads the output\n', 0),
    ('import time; print(1, flush=True); time.sleep(0.5); print(2)', '| head -n 1', '', 0),
    (MANY, '> /dev/full', '\ncannot write the output: No space left on device\n', 1),
    ('print(1)', '> /dev/full', 'cannot write the output: No space left on device\n', 1),
    (f'{MANY}\nfrom tqdm import tqdm; tqdm.write("1")', '>&-', '', 0), ('print(1, file=sys.stderr)', '2>&-', '', 0)])
def test_output_that_cannot_be_written_gives_at_most_one_line(tmp_path, body, output, message, status):
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    done = subprocess.run(f'{sys.executable} {own_program(tmp_path, body)} {output}', shell=True, capture_output=True,
                          text=True, env=env)
    assert (done.stderr, done.returncode) == (message, status)


def test_evaluate_sets_no_target_while_the_student_is_trained(project, tmp_path):
    import fcntl
    root = clone_task(project, tmp_path, 'toy-00', 'out')
    with open(root / 'out/toy/lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(root, 'tools/evaluate.py', '--target_agreement=0.5')
    assert 'another training is writing to out/toy' in one_line(done)
