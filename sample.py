"""Turn text into JSON with the student, greedily.

    python sample.py config/demo.py --text="you are great"      # one JSON line
    python sample.py config/demo.py --input=texts.txt           # one JSON line per input line, in order
    cat texts.txt | python sample.py config/demo.py | jq .tone
    python sample.py config/demo.py                             # on a terminal: asks for texts
    python sample.py config/demo.py --input=texts.txt --confidence=True
    python sample.py config/demo.py --input=texts.txt --min_confidence=0.4 --ask_teacher=True

Needs only out/<name>/ (best.pt or ckpt.pt, and tokenizer.json), neither the teacher nor data/. JSON goes to
stdout, everything else to stderr. tools/evaluate.py measures how good the answers are.
"""
import json
import os
import queue
import stat
import sys
import threading
from collections import deque
from pathlib import Path

from config import configure, next_command, stop
from config.machine import pick_device
from distil.checkpoint import load_checkpoint, warn_changed_task
from distil.decode import confidence_of, decode, value_probabilities
from distil.space import clean, value_name

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
# texts
text = None          # None or text; one text to label, which may be empty
input = ''           # file; a file with one text per line
too_long = 'cut'     # 'cut' or 'refuse'; what happens to texts longer than the student reads
constrain = True     # answers are held to the schema, so that they always parse; False: free decoding
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
# deferral
confidence = False   # False, True or 'full'; add "_confidence": {field: probability that the teacher would
                     # say the same}, or with 'full' {field: {value: probability}} of all values
min_confidence = 0.0  # 0..1 or 'target'; a record with a field below it gets "_defer": true ... 'target': the
                      # threshold that tools/evaluate.py --target_agreement= found
ask_teacher = False  # ... or, with this, the teacher's answer and "_teacher": true
teacher = ''         # file; the one to ask, as in extract.py; '': the one the student learned from
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of the layers of a student with many weights; auto:
                     # bfloat16 where that is faster
# of the config file, to warn if the student was trained with others
fields = {}
prompt = ''
config = configure(globals())

# -----------------------------------------------------------------------------
# text in, JSON out


def read_ahead(lines):
    """a queue of the items of an iterable, then None. A thread fills it, so a line from a slow pipe is answered
    at once, and memory does not grow with a fast one."""
    ahead = queue.Queue(1000)

    def read():
        try:
            for line in lines:
                ahead.put(line)
        finally:
            ahead.put(None)
    threading.Thread(target=read, daemon=True).start()
    return ahead


def find_threshold(checkpoint, min_confidence):
    """min_confidence as a number; 'target' is the one that tools/evaluate.py --target_agreement= stored."""
    if min_confidence != 'target':
        return min_confidence
    target = checkpoint.get('target')
    if not target:
        stop(f'no target was set; run: {next_command("tools/evaluate.py")} --target_agreement=0.9')
    return target['min_confidence']


def load_teacher_to_ask(teacher, task, space, device):
    """a function from lists of ids to the teacher's answers, lists of output indices. Exits with a message if
    this is not the teacher that the student learned from."""
    try:  # optional: a student that is copied elsewhere leaves the teacher's engine behind
        from distil.engine import load_answerer
    except ImportError as error:
        stop(f'ask_teacher needs distil/engine.py, distil/teacher.py and transformers here ({error})')
    if task['fingerprint'] == 'labels':
        stop('this student learned from given labels: there is no teacher to ask')
    print_note(f'loading {teacher or task["teacher"]}')
    return load_answerer(teacher or task['teacher'], task, space, device)


class Labeler:
    """A student, from Python: Labeler('out/demo')(['text', ...]) -> [{'sentiment': 'positive', ...,
    '_confidence': {'sentiment': 0.93, ...}}, ...].

    folder: of a training run. confidence: as the setting. too_long: 'cut', or 'refuse' for {'error': ...} in
    place of an answer. min_confidence: records with a field below it get '_defer': True, or, with
    ask_teacher, the teacher's answer and '_teacher': True. SystemExit with a message if the student cannot be
    loaded.
    """

    def __init__(self, folder, device='auto', which='best', batch_size=64, constrain=True, too_long='cut',
                 confidence=True, min_confidence=0.0, ask_teacher=False, teacher='', dtype='auto'):
        device = pick_device(device)
        self.checkpoint, self.student, self.space = load_checkpoint(folder, device, which, dtype)
        self.task, self.batch_size, self.constrain = self.checkpoint['task'], batch_size, constrain
        self.too_long, self.confidence = too_long, confidence
        self.min_confidence = find_threshold(self.checkpoint, min_confidence)
        self.temperature = {name: of_field['temperature']  # makes confidence a probability
                            for name, of_field in self.checkpoint['per_field'].items()}
        self.ask = load_teacher_to_ask(teacher, self.task, self.space, device) if ask_teacher else None

    def __call__(self, texts):
        """a dict for each of an iterable of texts, in their order."""
        return [record for record, _ in self.stream(text.encode('utf-8', 'replace') for text in texts)]

    def encode(self, line):
        """a text as bytes -> (ids the student reads, reason why there is no answer or '', number of ids cut
        off)."""
        string, max_text = clean(line.decode('utf-8', 'replace')), self.task['max_text']
        ids = self.space.tokenizer.encode(string, add_special_tokens=False).ids
        n_cut = max(0, len(ids) - max_text)
        if not string:
            return [], 'empty text', 0
        if n_cut and self.too_long == 'refuse':
            return [], f'text has {len(ids)} tokens, the student reads {max_text}', 0
        return ids[:max_text], '', n_cut

    def stream(self, lines):
        """yields (record, number of the text's tokens that were cut off) for each line of bytes, in order, as
        soon as it is known."""
        ahead, results = read_ahead(lines), []
        waiting = deque()   # encoded texts that the decoder has not answered yet
        drained = False     # True if no line was there when the decoder last asked

        def texts():
            nonlocal drained
            while True:
                try:
                    line = ahead.get(block=not waiting)
                except queue.Empty:
                    drained = True
                    yield None                                  # tells the decoder to go on without a new text
                    continue
                if line is None:
                    return
                drained = False
                waiting.append(self.encode(line))
                yield waiting[-1][0]                            # [] for a text without answer: keeps the order

        for answer in decode(self.student, self.space, texts(), self.batch_size, self.constrain):
            results.append((*waiting.popleft(), *answer))
            if not self.ask or drained or not waiting or len(results) >= self.batch_size:
                yield from self.finish(results)                 # the teacher is faster on many at once
                results = []
        yield from self.finish(results)

    def confidence_in(self, ids, outs, decisions):
        """({field: probability of its value}, what the record shows of it)."""
        p_chosen = confidence_of(self.space.fields, decisions, self.temperature)
        if self.confidence != 'full':
            return p_chosen, {name: round(p, 4) for name, p in p_chosen.items()}
        p_values = value_probabilities(self.student, self.space, ids, outs, decisions, self.temperature)
        return p_chosen, {name: dict(zip(map(value_name, self.space.fields[name]), (round(p, 4) for p in row)))
                          for name, row in p_values.items()}

    def finish(self, results):
        """[(record, n_cut)] of results, (ids, error, n_cut, outs, decisions) each. Records below
        min_confidence are marked, or answered by the teacher."""
        records, below = [], {}                                 # below: {number in results: ids}
        for n, (ids, error, n_cut, outs, decisions) in enumerate(results):
            answer = None if error else self.space.to_json(outs)
            if error:
                record = {'error': error}
            elif answer is None:                                # only without constrain
                raw = self.space.tokenizer.decode([self.space.output_ids[o] for o in outs],
                                                  skip_special_tokens=True)
                record = {'error': 'answer breaks the schema', 'answer': raw}
                if self.min_confidence:
                    below[n] = ids
            else:
                record = dict(answer)
                if self.confidence or self.min_confidence:
                    p_chosen, shown = self.confidence_in(ids, outs, decisions)
                    record |= {'_confidence': shown} if self.confidence else {}
                    if min(p_chosen.values()) < self.min_confidence:
                        below[n] = ids
            records.append((record, n_cut))
        teacher_outs = self.ask(list(below.values())) if self.ask and below else [None] * len(below)
        for n, outs in zip(below, teacher_outs):
            record, n_cut = records[n]
            if outs is not None:
                shown = {'_confidence': record['_confidence']} if '_confidence' in record else {}
                record = self.space.to_json(outs) | shown
            records[n] = record | {'_defer' if outs is None else '_teacher': True}, n_cut
        return records


# -----------------------------------------------------------------------------
# main


def print_note(line):
    """prints prose to stderr: stdout is JSON alone."""
    print(line, file=sys.stderr, flush=True)


def print_labels(labeler, lines):
    """prints a JSON line per text. Stops without complaint when the reader goes away (| head -1)."""
    n_cut_texts = 0
    try:
        for record, n_cut in labeler.stream(lines):
            print(json.dumps(record, ensure_ascii=False), flush=True)
            n_cut_texts += n_cut > 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        if not isinstance(error, BrokenPipeError):
            stop(f'cannot write the answers: {error.strerror}')
    if n_cut_texts:
        print_note(f'{n_cut_texts} texts were longer than the {labeler.task["max_text"]} tokens the student '
                   'reads; the rest of them was ignored')


def typed_lines():
    """yields the lines a person types, until Ctrl-D."""
    while True:
        print_note('a text to label (Ctrl-D ends):')
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
        stop('set text or input, not both')
    piped = terminal = False
    if sys.stdin and not sys.stdin.closed:
        mode, terminal = os.fstat(0).st_mode, sys.stdin.isatty()
        piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
    if not (text is not None or input or piped or terminal):
        stop(f'no text; give one: {next_command("sample.py")} --text="...", --input=FILE, or a pipe')
    labeler = Labeler(Path('out', run or name), device, which, sample_batch, constrain, too_long, confidence,
                      min_confidence, ask_teacher, teacher, dtype)
    warn_changed_task(labeler.task, fields, prompt)
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
