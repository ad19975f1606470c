"""The student's folder as a page on localhost.

    python device/export.py config/demo.py      # first: it makes the folder
    python device/web.py config/demo.py         # http://127.0.0.1:8080/
    python device/web.py config/demo.py --serve=False   # only makes the folder ready for any web server

Two packages of other people make it answer in a browser: onnxruntime-web and @huggingface/tokenizers. npm
fetches them once, three files of them are kept in the folder's npm/.
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
serve = True         # else the folder is only made ready
host = '127.0.0.1'   # text; 0.0.0.0 lets others in; offline use wants https or localhost
port = 8080          # 0..65535; 0: any that is free
config = configure(globals())

PARTS = {  # package: {file in it: name it is kept under}
    'onnxruntime-web@1.30.0': {'dist/ort.wasm.bundle.min.mjs': 'ort.wasm.bundle.min.mjs',
                               'dist/ort-wasm-simd-threaded.wasm': 'ort-wasm-simd-threaded.wasm.gz'},
    '@huggingface/tokenizers@0.2.0': {'dist/tokenizers.min.mjs': 'tokenizers.min.mjs'}}


def fetch_parts(folder):
    """puts what PARTS names into folder, unless it is there; .gz are packed. SystemExit with one line where
    npm cannot."""
    wanted = ['versions.txt', *(kept for files in PARTS.values() for kept in files.values())]
    versions = folder / 'versions.txt'
    if all((folder / kept).is_file() for kept in wanted) and versions.read_text() == ' '.join(PARTS):
        return
    if not shutil.which('npm'):
        stop('npm is missing; install Node.js, or copy npm/ from another student\'s device folder')
    made = folder.with_name('npm.tmp')
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    with tempfile.TemporaryDirectory() as tmp:
        for package, files in PARTS.items():
            print(f'fetching {package}', flush=True)
            done = subprocess.run(['npm', 'pack', '--silent', '--pack-destination', tmp, package],
                                  capture_output=True, text=True)
            if done.returncode:
                stop(f'npm cannot fetch {package}: {(done.stderr or done.stdout).strip()[-200:]}')
            with tarfile.open(Path(tmp, done.stdout.split()[-1])) as packed:
                for file, kept in files.items():
                    data = packed.extractfile(f'package/{file}').read()
                    (made / kept).write_bytes(gzip.compress(data, mtime=0) if kept.endswith('.gz') else data)
    (made / 'versions.txt').write_text(' '.join(PARTS))
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


class Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        '.mjs': 'text/javascript', '.js': 'text/javascript', '.gz': 'application/octet-stream'}

    def log_message(self, *args):
        pass  # nobody reads it

    def end_headers(self):
        self.send_header('Cache-Control', 'no-cache')  # asks whether a file has changed
        super().end_headers()


if __name__ == '__main__':
    if not name and not run:
        stop('no task; run: python device/web.py config/demo.py')
    folder = Path('out', run or name, 'device')
    if not (folder / 'student.onnx').is_file():
        stop(f'{folder} holds no student; run: python device/export.py {" ".join(sys.argv[1:])}')
    fetch_parts(folder / 'npm')
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
