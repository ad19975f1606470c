"""Turn text into JSON with the student, greedily.

    python sample.py config/demo.py --text="you are great"      # one JSON line
    python sample.py config/demo.py --input=texts.txt           # one JSON line per input line, in order
    cat texts.txt | python sample.py config/demo.py | jq .tone
    python sample.py config/demo.py                             # on a terminal: a prompt
    python sample.py config/demo.py --input=texts.txt --confidence=True
    python sample.py config/demo.py --input=texts.txt --min_confidence=0.4 --ask_teacher=True

Needs only out/<name>/ (best.pt or ckpt.pt, and tokenizer.json): neither the teacher nor data/. JSON goes to
stdout, the rest to stderr. How good the answers are is what evaluate.py says.
"""
import json
import os
import queue
import stat
import sys
import threading
from collections import deque
from pathlib import Path

import torch

from checkpoint import load_checkpoint, note_changes
from config import command, configure, pick_device, stop
from data import clean
from decode import confidence_of, decode, values
from space import value_name

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
# texts
text = None          # None or text; one text to label, which may be empty
input = ''           # file; a file with a text on each line
too_long = 'cut'     # 'cut' or 'refuse'; what becomes of texts longer than the student reads
constrain = True  # guaranteed: answers are held to the schema, so that they always parse; False: it runs free
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
# doubt
confidence = False   # False, True or 'full'; add "_confidence": {field: probability that it is what the
                     # teacher would say}, or 'full': {field: {value: probability}} of all values
min_confidence = 0.0  # 0..1 or 'target'; a record with a field below gets "_defer": true ... 'target': the
                      # threshold that evaluate.py --target_agreement= found
ask_teacher = False  # ... or, with this, the teacher's answer and "_teacher": true
teacher = ''         # file; the one to ask, as in extract.py; '': the one the student learned from
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of the layers of a student with many weights; auto:
                     # bfloat16 where that is faster
# of the config file, to say so where the student was trained with others
fields = {}
prompt = ''
config = configure(globals())

# -----------------------------------------------------------------------------
# text in, JSON out


def read_ahead(lines):
    """a queue of what the iterable gives, and None after it: so a line of a slow pipe is answered at once,
    and memory does not grow with a fast one."""
    ahead = queue.Queue(1000)

    def read():
        try:
            for line in lines:
                ahead.put(line)
        finally:
            ahead.put(None)
    threading.Thread(target=read, daemon=True).start()
    return ahead


def read_text(line, space, max_text, too_long):
    """a line of bytes -> ids that the student reads, why it is not to be answered or '', number of ids cut
    off."""
    string = clean(line.decode('utf-8', 'replace'))
    ids = space.tokenizer.encode(string, add_special_tokens=False).ids
    n_cut = max(0, len(ids) - max_text)
    if not string:
        return [], 'empty text', 0
    if n_cut and too_long == 'refuse':
        return [], f'text has {len(ids)} tokens, the student reads {max_text}', 0
    return ids[:max_text], '', n_cut


def find_threshold(checkpoint, min_confidence):
    """min_confidence as a number; 'target' is what evaluate.py --target_agreement= found."""
    if min_confidence != 'target':
        return min_confidence
    target = checkpoint.get('target')
    if not target:
        stop(f'no target was set; run: {command("evaluate.py")} --target_agreement=0.9')
    return target['min_confidence']


def load_asker(teacher, task, space, device):
    """loads the teacher a student learned from; returns a function from lists of ids to its answers, output
    indices."""
    try:  # optional: a student that travels leaves teacher.py and transformers behind
        from teacher import Drafts, Teacher, answer_fitting, fingerprint, load_model
    except ImportError as error:
        stop(f'ask_teacher needs teacher.py and transformers here ({error})')
    if task['fingerprint'] == 'labels':
        stop('this student learned from labels that were given: there is no teacher to ask')
    teacher = teacher or task['teacher']
    say(f'loading {teacher}')
    model = load_model(teacher, torch.float32 if device == 'cpu' else torch.bfloat16, device)
    if fingerprint(model) != task['fingerprint']:
        stop(f'{teacher} is not the teacher this student learned from ({task["teacher"]})')
    engine, drafts = Teacher(model, task['before'], space.output_ids), Drafts(space)

    def ask(texts):
        answers = [outs for outs, _, _ in answer_fitting(engine, space, drafts, texts, task['after'])[0]]
        for outs in answers:
            drafts.add(outs)
        return answers
    return ask


class Labeler:
    """A student, from Python: Labeler('out/demo')(['text', ...]) -> [{'sentiment': 'positive', ...,
    '_confidence': {'sentiment': 0.93, ...}}, ...].

    folder: of a training run. confidence: as the setting. too_long: 'cut', or 'refuse' for {'error': ...} in
    place of an answer. min_confidence: records with a field below it get '_defer': True, or, with
    ask_teacher, the teacher's answer and '_teacher': True. SystemExit with one line where the folder will not
    do.
    """

    def __init__(self, folder, device='auto', which='best', batch_size=64, constrain=True, too_long='cut',
                 confidence=True, min_confidence=0.0, ask_teacher=False, teacher='', dtype='auto'):
        device = pick_device(device)
        self.checkpoint, self.student, self.space = load_checkpoint(folder, device, which, dtype)
        self.task, self.batch_size, self.constrain = self.checkpoint['task'], batch_size, constrain
        self.too_long, self.confidence = too_long, confidence
        self.min_confidence = find_threshold(self.checkpoint, min_confidence)
        self.temperature = {name: of_field['temperature']
                            for name, of_field in self.checkpoint['per_field'].items()}
        self.ask = load_asker(teacher, self.task, self.space, device) if ask_teacher else None

    def __call__(self, texts):
        """a dict for each of an iterable of texts, in their order."""
        return [record for record, _ in self.stream(text.encode('utf-8', 'replace') for text in texts)]

    def read(self, line):
        """a text as bytes -> its ids, why it is not to be answered or '', number of ids cut off."""
        return read_text(line, self.space, self.task['max_text'], self.too_long)

    def stream(self, lines):
        """yields (record, number of its text's tokens that were cut off) for every line of bytes, in order,
        as soon as it is known."""
        ahead, results = read_ahead(lines), []
        waiting = deque()  # texts the decoder has not answered yet
        drained = False    # whether there was no line when it asked last

        def texts():
            nonlocal drained
            while True:
                try:
                    line = ahead.get(block=not waiting)
                except queue.Empty:
                    drained = True
                    yield None
                    continue
                if line is None:
                    return
                drained = False
                waiting.append(self.read(line))
                yield waiting[-1][0]  # one without a text takes its place all the same: the order is kept

        for answer in decode(self.student, self.space, texts(), self.batch_size, self.constrain):
            results.append((*waiting.popleft(), *answer))
            if not self.ask or drained or not waiting or len(results) >= self.batch_size:
                yield from self.finish(results)  # the teacher likes many at once
                results = []
        yield from self.finish(results)

    def sure(self, ids, outs, decisions):
        """{field: probability of its value}, and what is shown of it."""
        sure = confidence_of(self.space.fields, decisions, self.temperature)
        if self.confidence != 'full':
            return sure, {name: round(p, 4) for name, p in sure.items()}
        shown = values(self.student, self.space, ids, outs, decisions, self.temperature)
        return sure, {name: dict(zip(map(value_name, self.space.fields[name]), (round(p, 4) for p in row)))
                      for name, row in shown.items()}

    def finish(self, results):
        """the records of these results, (ids, error, n_cut, outs, decisions); those the student is unsure of
        are the teacher's, or marked."""
        records, doubtful = [], {}
        for n, (ids, error, n_cut, outs, decisions) in enumerate(results):
            answer = None if error else self.space.to_json(outs)
            if error:
                record = {'error': error}
            elif answer is None:
                raw = self.space.tokenizer.decode([self.space.output_ids[o] for o in outs],
                                                  skip_special_tokens=True)
                record = {'error': 'answer breaks the schema', 'answer': raw}
                if self.min_confidence:
                    doubtful[n] = ids
            else:
                record = dict(answer)
                if self.confidence or self.min_confidence:
                    sure, shown = self.sure(ids, outs, decisions)
                    record |= {'_confidence': shown} if self.confidence else {}
                    if min(sure.values()) < self.min_confidence:
                        doubtful[n] = ids
            records.append((record, n_cut))
        theirs = self.ask(list(doubtful.values())) if self.ask and doubtful else [None] * len(doubtful)
        for n, outs in zip(doubtful, theirs):
            record, n_cut = records[n]
            if outs is not None:
                sure = {'_confidence': record['_confidence']} if '_confidence' in record else {}
                record = self.space.to_json(outs) | sure
            records[n] = record | {'_defer' if outs is None else '_teacher': True}, n_cut
        return records


def say(line):
    """prose goes to stderr: stdout is JSON alone."""
    print(line, file=sys.stderr, flush=True)


def print_labels(labeler, lines):
    """prints a JSON line per text; a reader that goes away (| head -1) ends it quietly."""
    cut = 0
    try:
        for record, n_cut in labeler.stream(lines):
            print(json.dumps(record, ensure_ascii=False), flush=True)
            cut += n_cut > 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains on its way out
        if not isinstance(error, BrokenPipeError):
            stop(f'cannot write the answers: {error.strerror}')
    if cut:
        say(f'{cut} texts were longer than the {labeler.task["max_text"]} tokens the student reads; '
            'their ends were ignored')


def typed_lines():
    """what a person types, a line at a time."""
    while True:
        say('a text to label (Ctrl-D ends):')
        if not (line := sys.stdin.buffer.readline()):
            return
        yield line


if __name__ == '__main__':
    if not name and not run:
        stop('no task; run: python sample.py config/demo.py')
    device = pick_device(device)
    if ask_teacher and not min_confidence:
        stop('ask_teacher needs a min_confidence: the teacher answers the records with a field below it')
    if input and (not Path(input).exists() or Path(input).is_dir()):
        stop(f'{input} is a directory' if Path(input).is_dir() else f'{input} does not exist')
    if input and text is not None:
        stop('give a text or an input, not both')
    piped = terminal = False
    if sys.stdin and not sys.stdin.closed:
        mode, terminal = os.fstat(0).st_mode, sys.stdin.isatty()
        piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
    if not (text is not None or input or piped or terminal):
        stop(f'nothing to label; give a text: {command("sample.py")} --text="...", --input=FILE, or a pipe')
    labeler = Labeler(Path('out', run or name), device, which, sample_batch, constrain, too_long, confidence,
                      min_confidence, ask_teacher, teacher, dtype)
    note_changes(labeler.task, fields, prompt)
    try:
        if text is not None:
            print_labels(labeler, [text.encode('utf-8', 'replace')])
        elif input or piped:
            print_labels(labeler, open(input or 0, 'rb'))
        else:
            for line in typed_lines():
                print_labels(labeler, [line])
    except KeyboardInterrupt:
        pass
