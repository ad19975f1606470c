"""Serves the student's folder as a page on localhost.

    python device/export.py config/demo.py      # first: it makes the folder
    python device/web.py config/demo.py         # http://127.0.0.1:8080/
    python device/web.py config/demo.py --serve=False   # only prepares the folder for any web server

In a browser the student needs two npm packages: onnxruntime-web and @huggingface/tokenizers. npm fetches them
once; the folder's npm/ keeps three of their files.
"""
import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, stop

name = ''            # word; out/<name>/device is the folder ...
run = ''             # word; ... or out/<run>/device
serve = True         # False: the folder is only prepared
host = '127.0.0.1'   # text; 0.0.0.0: other machines can connect; offline use needs https or localhost
port = 8080          # 0..65535; 0: any free port
config = configure(globals())

PACKAGES = {  # package: {file in it: its name in npm/}
    'onnxruntime-web@1.30.0': {'dist/ort.wasm.bundle.min.mjs': 'ort.wasm.bundle.min.mjs',
                               'dist/ort-wasm-simd-threaded.wasm': 'ort-wasm-simd-threaded.wasm.gz'},
    '@huggingface/tokenizers@0.2.0': {'dist/tokenizers.min.mjs': 'tokenizers.min.mjs'}}


def fetch_packages(folder):
    """puts the files of PACKAGES into the folder, unless it has them; a name in .gz is compressed. Exits with
    a message if npm is missing or fails."""
    expected = ['versions.txt', *(kept for files in PACKAGES.values() for kept in files.values())]
    versions = folder / 'versions.txt'
    if all((folder / kept).is_file() for kept in expected) and versions.read_text() == ' '.join(PACKAGES):
        return
    if not shutil.which('npm'):
        stop('npm is missing; install Node.js, or copy npm/ from another student\'s device folder')
    new = folder.with_name('npm.tmp')
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    with tempfile.TemporaryDirectory() as tmp:
        for package, files in PACKAGES.items():
            print(f'fetching {package}', flush=True)
            done = subprocess.run(['npm', 'pack', '--silent', '--pack-destination', tmp, package],
                                  capture_output=True, text=True)
            if done.returncode:
                stop(f'npm cannot fetch {package}: {(done.stderr or done.stdout).strip()[-200:]}')
            with tarfile.open(Path(tmp, done.stdout.split()[-1])) as packed:
                for file, kept in files.items():
                    data = packed.extractfile(f'package/{file}').read()
                    (new / kept).write_bytes(gzip.compress(data, mtime=0) if kept.endswith('.gz') else data)
    (new / 'versions.txt').write_text(' '.join(PACKAGES))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


class Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        '.mjs': 'text/javascript', '.js': 'text/javascript', '.gz': 'application/octet-stream'}

    def log_message(self, *args):
        pass  # no line per request

    def end_headers(self):
        self.send_header('Cache-Control', 'no-cache')  # the browser checks whether a file has changed
        super().end_headers()


if __name__ == '__main__':
    if not name and not run:
        stop('no task; run: python device/web.py config/demo.py')
    folder = Path('out', run or name, 'device')
    if not (folder / 'student.onnx').is_file():
        stop(f'{folder} holds no student; run: python device/export.py {" ".join(sys.argv[1:])}')
    fetch_packages(folder / 'npm')
    if serve:
        try:
            server = ThreadingHTTPServer((host, port), partial(Handler, directory=str(folder)))
        except OSError as error:
            stop(f'cannot listen on {host}:{port}: {error.strerror}; choose another --port')
        print(f'http://{host}:{server.server_port}/', flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
