"""Files and batches, as OpenAI's: a JSONL of requests is uploaded and answered in the background, some lines
at a time, so that other requests are answered meanwhile. Everything is in one folder, and an unfinished batch
starts again with the server.

    <folder>/file-<id>.json, file-<id>.jsonl    what the caller is told of a file, and its content
    <folder>/batch_<id>.json                    what the caller is told of a batch
"""
import asyncio
import json
import logging
import os
import re
import time
import uuid
from contextlib import contextmanager

from serve.request import Refusal, parse_body, require

MAX_FILE = 200 << 20  # bytes, as OpenAI's
AT_A_TIME = 64       # lines under way
log = logging.getLogger('serve')


@contextmanager
def using_disk():
    """context: a Refusal in place of an OSError, of a full or read-only disk or of a missing file."""
    try:
        yield
    except OSError as error:
        log.warning('%s', error)
        raise Refusal(500, f'the server cannot store or read its files: {error.strerror}') from None


def read_multipart(body, content_type):
    """{name: (filename or '', bytes)} of a multipart/form-data body (RFC 7578)."""
    boundary = re.search(r'boundary="?([^";,]+)', content_type)
    if not content_type.lower().startswith('multipart/form-data') or not boundary:
        raise Refusal(400, 'a file is sent as multipart/form-data', 'file')
    parts = {}
    for part in (b'\r\n' + body).split(b'\r\n--' + boundary[1].encode())[1:-1]:
        head, _, content = part.partition(b'\r\n\r\n')
        head = head.decode('utf-8', 'replace')
        name, filename = re.search(r'\bname="([^"]*)"', head), re.search(r'filename="([^"]*)"', head)
        if name:
            parts[name[1]] = (filename[1] if filename else '', content)
    return parts


def custom_id_of(line):
    """the custom_id of a line of a batch, None if it has none."""
    try:
        return parse_body(line).get('custom_id')
    except Refusal:
        return None


class Batches:
    """the files and batches in a folder (a Path). answer: coroutine function of (path of a route, body) that
    returns the body of the reply, or raises a Refusal. paths: the routes that a batch may use."""

    def __init__(self, folder, answer, paths, write_error):
        self.folder, self.answer, self.paths, self.write_error = folder, answer, paths, write_error
        self.objects, self.tasks = {}, {}                       # {id: object}, {id of a batch: its task}
        self.cancelled = set()                                  # ids of batches

    def load(self):
        """reads the folder, and starts its unfinished batches again."""
        for path in sorted(self.folder.glob('*.json')) if self.folder.is_dir() else ():
            self.objects[path.stem] = json.loads(path.read_text(encoding='utf-8'))
        for id_, found in self.objects.items():
            if found.get('status') in ('validating', 'in_progress', 'finalizing'):
                self.start(id_)
            elif found.get('status') == 'cancelling':           # when the server was killed
                found |= {'status': 'cancelled', 'cancelled_at': int(time.time())}

    def save(self, found):
        """stores an object, on disk and in memory. Refusal if the disk fails."""
        with using_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            tmp = self.folder / f'{found["id"]}.tmp'
            tmp.write_text(json.dumps(found), encoding='utf-8')
            os.replace(tmp, self.folder / f'{found["id"]}.json')
        self.objects[found['id']] = found
        return found

    def find(self, id_, kind):
        """the object of an id. kind: 'file' or 'batch'. Refusal if there is none."""
        found = self.objects.get(id_)
        if not found or found['object'] != kind:
            raise Refusal(404, f'there is no {kind} {id_[:80]!r}', 'id')
        return found

    def list_of(self, kind, limit):
        """the newest objects of a kind, as the clients expect a list."""
        data = [found for found in self.objects.values() if found['object'] == kind]
        data = sorted(data, key=lambda found: (found['created_at'], found['id']), reverse=True)
        return {'object': 'list', 'data': data[:limit], 'has_more': len(data) > limit,
                'first_id': data[0]['id'] if data else None,
                'last_id': data[:limit][-1]['id'] if data else None}

    def content_path(self, id_):
        """the path of a file's content."""
        return self.folder / f'{id_}.jsonl'

    def read_content(self, id_):
        """GET /v1/files/{id}/content: its bytes."""
        self.find(id_, 'file')
        with using_disk():
            return self.content_path(id_).read_bytes()

    def upload(self, body, content_type):
        """POST /v1/files: stores the file of a multipart body."""
        parts = read_multipart(body, content_type)
        if 'file' not in parts:
            raise Refusal(400, 'file is missing', 'file')
        purpose = parts.get('purpose', ('', b''))[1].decode('utf-8', 'replace')
        if purpose != 'batch':
            raise Refusal(400, f"purpose must be batch, not {purpose[:40]!r}: other files are of no use here",
                          'purpose')
        name, content = parts['file']
        return self.add_file(name or 'batch.jsonl', content, 'batch')

    def add_file(self, name, content, purpose):
        """stores a file, and returns what the caller is told of it."""
        id_ = f'file-{uuid.uuid4().hex}'
        with using_disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.content_path(id_).write_bytes(content)
        return self.save({'id': id_, 'object': 'file', 'bytes': len(content), 'created_at': int(time.time()),
                          'filename': name, 'purpose': purpose, 'status': 'processed'})

    def delete(self, id_):
        """DELETE /v1/files/{id}"""
        self.find(id_, 'file')
        with using_disk():
            self.content_path(id_).unlink(missing_ok=True)
            (self.folder / f'{id_}.json').unlink(missing_ok=True)
        del self.objects[id_]
        return {'id': id_, 'object': 'file', 'deleted': True}

    def create(self, body):
        """POST /v1/batches"""
        endpoint = require(body.get('endpoint'), str, 'a string', 'endpoint', status=400)
        if endpoint not in self.paths:
            raise Refusal(400, f'endpoint must be one of: {", ".join(sorted(self.paths))}', 'endpoint')
        input_id = require(body.get('input_file_id'), str, 'a string', 'input_file_id', status=400)
        self.find(input_id, 'file')
        stages = ('in_progress', 'finalizing', 'completed', 'failed', 'expired', 'cancelling', 'cancelled')
        batch = {'id': f'batch_{uuid.uuid4().hex}', 'object': 'batch', 'endpoint': endpoint, 'errors': None,
                 'input_file_id': input_id, 'completion_window': body.get('completion_window') or '24h',
                 'status': 'validating', 'output_file_id': None, 'error_file_id': None,
                 'created_at': int(time.time()), 'expires_at': int(time.time()) + 86400,
                 **{f'{stage}_at': None for stage in stages},
                 'request_counts': {'total': 0, 'completed': 0, 'failed': 0},
                 'metadata': body.get('metadata')}
        self.save(batch)
        self.start(batch['id'])
        return batch

    def start(self, id_):
        """starts the work on a batch."""
        task = asyncio.get_running_loop().create_task(self.run(self.objects[id_]))
        self.tasks[id_] = task
        task.add_done_callback(lambda _: self.forget(id_))

    def forget(self, id_):
        """of a batch that is no longer worked on."""
        self.tasks.pop(id_, None)
        if self.objects[id_]['status'] == 'cancelling':         # before the work began
            self.objects[id_] |= {'status': 'cancelled', 'cancelled_at': int(time.time())}

    def cancel(self, id_):
        """POST /v1/batches/{id}/cancel"""
        batch = self.find(id_, 'batch')
        if id_ in self.tasks:
            self.cancelled.add(id_)
            self.tasks[id_].cancel()
            batch |= {'status': 'cancelling', 'cancelling_at': int(time.time())}
            self.save(batch)
        return batch

    def stop(self):
        """stops all work, when the server ends; the next one goes on."""
        for task in self.tasks.values():
            task.cancel()

    async def run(self, batch):
        """answers the lines of a batch, and stores the files of its answers and its errors. If it is cancelled or
        fails, what is answered is stored too, and each other line has the reason among the errors."""
        lines, results = [], {}
        try:
            content = self.read_content(batch['input_file_id']).splitlines()
            lines += [(n, line) for n, line in enumerate(content, 1) if line.strip()]
            batch |= {'status': 'in_progress', 'in_progress_at': int(time.time()),
                      'request_counts': {'total': len(lines), 'completed': 0, 'failed': 0}}
            self.save(batch)
            todo = iter(lines)

            async def work():
                for n, line in todo:
                    results[n] = await self.answer_line(n, line, batch['endpoint'])
                    failed = results[n]['response']['status_code'] != 200
                    batch['request_counts']['failed' if failed else 'completed'] += 1
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_A_TIME):
                    group.create_task(work())
            self.finish(batch, 'completed', lines, results)
        except asyncio.CancelledError:
            if batch['id'] not in self.cancelled:               # the server ends; the next one goes on
                raise
            self.end_early(batch, 'cancelled', lines, results, 'batch_cancelled', 'the batch was cancelled')
        except Exception as error:
            while isinstance(error, ExceptionGroup):            # of the TaskGroup
                error = error.exceptions[0]
            if not isinstance(error, Refusal):
                log.error('batch %s failed', batch['id'], exc_info=error)
            reason = str(error) if isinstance(error, Refusal) else f'internal error ({type(error).__name__})'
            self.end_early(batch, 'failed', lines, results, 'internal', reason)

    def finish(self, batch, status, lines, results, more=None):
        """stores the files of a batch, and its status. lines: [(number, line)] of its input; results: {number: line
        of the output or error file}; more: what else becomes of the batch."""
        done = [results[n] for n, _ in lines if n in results]
        for key, wanted in (('output_file_id', True), ('error_file_id', False)):
            rows = [row for row in done if ((row['response'] or {}).get('status_code') == 200) == wanted]
            content = ''.join(json.dumps(row) + '\n' for row in rows).encode()
            if rows:
                batch[key] = self.add_file(f'{batch["id"]}_{key[:-8]}.jsonl', content, 'batch_output')['id']
        self.save(batch | {'status': status, f'{status}_at': int(time.time())} | (more or {}))

    def end_early(self, batch, status, lines, results, code, reason):
        """stores what there is of a batch that is not completed. code, reason: why, for each line without a result."""
        for n, line in lines:
            if n not in results:
                results[n] = self.row(custom_id_of(line), None, {'code': code, 'message': reason})
        errors = {'object': 'list', 'data': [{'code': code, 'message': reason, 'line': None, 'param': None}]}
        try:
            self.finish(batch, status, lines, results, {'errors': errors} if status == 'failed' else None)
        except Refusal:                                         # the disk is full: what is known stays in memory
            self.objects[batch['id']] = batch | {'status': status, f'{status}_at': int(time.time()), 'errors': errors}

    def row(self, custom_id, response, error=None):
        """a line of an output or error file."""
        return {'id': f'batch_req_{uuid.uuid4().hex}', 'custom_id': custom_id, 'error': error, 'response': response}

    async def answer_line(self, n, line, endpoint):
        """the line of the output or error file for line n of the input."""
        custom_id, status = None, 200
        try:
            request = parse_body(line)
            custom_id = request.get('custom_id')
            if request.get('url', endpoint) != endpoint:
                raise Refusal(400, f'line {n}: url must be {endpoint}, as the endpoint of the batch', 'url')
            body = require(request.get('body'), dict, 'an object', 'body', status=400)
            if body.get('stream'):
                raise Refusal(400, f'line {n}: a batch cannot stream', 'stream')
            while True:
                try:
                    reply = await self.answer(endpoint, body)
                    break
                except Refusal as refusal:
                    if refusal.status != 503:                   # else the server is full
                        raise
                    await asyncio.sleep(1)
        except Refusal as refusal:
            status, reply = refusal.status, self.write_error(refusal)
        except Exception:
            log.exception('line %d of a batch failed', n)
            status, reply = 500, {'error': {'message': 'internal error', 'type': 'server_error',
                                            'param': None,
                                            'code': None}}
        return self.row(custom_id, {'status_code': status, 'request_id': uuid.uuid4().hex, 'body': reply})
