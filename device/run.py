"""Turn text into JSON with the student in this folder: numpy, onnxruntime and tokenizers, nothing else.

    python run.py --text="you are great"         # one JSON line
    python run.py texts.txt                      # one JSON line per input line, in order
    cat texts.txt | python run.py --confidence   # and a probability per field; --confidence=full: per value
    python run.py texts.txt --min_confidence=0.4 # "_defer": true if a field's confidence is below that

    from run import Student                      # if this folder is in sys.path
    Student('.')(['you are great'])              # [{'sentiment': 'positive', ...}]; '.': this folder

This file is also the specification of decoding. Its answers are those of the project's sample.py:

1. The tokenizer cuts the text into ids. The ids of `start` follow: the tokens between text and answer, and
   the first tokens of the answer, if the schema forces them.
2. task.json holds the schema as a small automaton. Its states are the decisions: the points where the schema
   leaves more than one legal token. At each of them one forward pass reads the text and the answer so far,
   and the legal token with the highest logit is chosen. The forced tokens after it are appended.
3. The choices made in a field spell its value. Its confidence is the product of their probabilities: each is
   a softmax over the logits of the legal tokens, divided by the field's temperature.
"""
import argparse
import json
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == '__main__':  # Ctrl-C ends it without a traceback while the next lines, and the student, are loaded
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

BATCH = 32  # texts that one core reads together


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class Student:
    """Student(folder)(texts) -> a dict for each text, in their order. confidence, min_confidence: as above;
    confidence 'full' gives {field: {value: probability}}. SystemExit with a message if the folder is damaged,
    incomplete, or of another format."""

    def __init__(self, folder, confidence=False, min_confidence=0.0):
        if confidence not in (False, True, 'full'):
            raise ValueError(f'confidence is {confidence!r}; it must be False, True or \'full\'')
        folder, options = Path(folder), onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a batch for each core is faster than each batch on all cores
        self.pool = ThreadPoolExecutor(os.cpu_count())
        try:
            self.task = json.loads((folder / 'task.json').read_text(encoding='utf-8'))
            if self.task['format'] != 2:
                sys.exit(f'{folder} has format {self.task["format"]}, this run.py reads 2; export it again')
            self.tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
            for file, size in self.task['bytes'].items():
                assert (folder / file).stat().st_size == size, f'{file} is not from this export'
            self.session = onnxruntime.InferenceSession(folder / 'student.onnx', options)
        except Exception as error:  # onnxruntime and tokenizers raise nothing narrower
            newer = ', or install onnxruntime 1.24 or newer' if 'opset' in str(error) else ''
            reason = ' '.join(str(error).split())[:150]
            sys.exit(f'{folder} does not hold a complete student ({reason}); export it again{newer}')
        self.fields, self.states = self.task['fields'], self.task['states']
        self.confidence, self.min_confidence = confidence, min_confidence
        if min_confidence == 'target':
            self.min_confidence = self.task['min_confidence']
            if self.min_confidence is None:
                sys.exit('this student has no target; tools/evaluate.py --target_agreement sets one')

    def __call__(self, texts):
        assert not isinstance(texts, str), 'give a list of texts'
        return self.label(text.encode('utf-8', 'replace') for text in texts)

    def encode(self, lines):
        """lines of bytes -> the ids of the text in each; every run of whitespace counts as one space."""
        texts = [' '.join(line.decode('utf-8', 'replace').split()) for line in lines]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def compute_logits(self, rows):
        """B lists of ids -> (B, V) logits of the token after each list, in one forward pass. Rows are padded
        on the right; attention is causal, so the padding changes nothing."""
        ids = np.zeros((len(rows), max(2, *map(len, rows))), np.int64)  # (B, T)
        for n, row in enumerate(rows):
            ids[n, :len(row)] = row
        # where the last token of each row is among the B * T
        asked = np.arange(len(rows)) * ids.shape[1] + [len(row) - 1 for row in rows]
        return self.session.run(None, {'ids': ids, 'asked': asked})[0]

    def decide(self, texts):
        """lists of ids -> for each text {state: (ids read before the decision, logits of its legal tokens,
        index of the token chosen)}."""
        before, offset, start = (self.task[key] for key in ('before', 'offset', 'start'))
        rows, state = [[*before, *(offset + i for i in ids), *start] for ids in texts], [0] * len(texts)
        decisions = [{} for _ in texts]
        while unfinished := [n for n, s in enumerate(state) if s >= 0]:
            for n, row in zip(unfinished, self.compute_logits([rows[n] for n in unfinished])):
                choices = self.states[state[n]]
                logits = row[choices['rows']]  # of V only the legal ones
                choice = int(logits.argmax())
                decisions[n][state[n]] = rows[n], logits, choice
                rows[n] = rows[n] + choices['read'][choice]  # the token chosen and the forced ones after it
                state[n] = choices['next'][choice]  # -1: the answer is complete
        return decisions

    def value_probabilities(self, field, decisions):
        """{value: its probability} of one field, given the answers to the fields before it: the product,
        along the value's path, of the softmax over the legal tokens. Decisions that are not on the answer's
        own path cost one more forward pass."""
        if field not in self.task['ways']:
            return {self.task['names'][field][0]: 1.0}  # a constant is certain
        known = {state: logits for state, (_, logits, _) in decisions.items()}
        missing = {}  # for each decision that the answer did not meet: the ids to read before it
        for path in self.task['ways'][field]:
            ids = decisions[path[0][0]][0]  # all values of a field start at the same decision
            for state, choice in path:
                if state not in known:
                    missing[state] = ids
                ids = ids + self.states[state]['read'][choice]
        if missing:
            for state, row in zip(missing, self.compute_logits(list(missing.values()))):
                known[state] = row[self.states[state]['rows']]
        temperature = self.task['temperature'][field]
        p = [math.prod(float(softmax(known[state].astype(float) / temperature)[choice])
                       for state, choice in path) for path in self.task['ways'][field]]
        return dict(zip(self.task['names'][field], p))

    def make_record(self, decisions):
        """the decisions of one text -> its answer, a dict."""
        answer, confidence = {}, {}
        for field, values in self.fields.items():
            paths = self.task['ways'].get(field, [[]])  # a constant: one value, no decisions
            n = next(n for n, path in enumerate(paths)
                     if all(s in decisions and decisions[s][2] == c for s, c in path))
            answer[field] = values[n]
            if self.confidence or self.min_confidence:
                temperature = self.task['temperature'][field]
                confidence[field] = math.prod(
                    float(softmax(decisions[state][1].astype(float) / temperature)[choice])
                    for state, choice in paths[n])
        if self.confidence:
            full = self.confidence == 'full'
            answer['_confidence'] = {
                field: {v: round(p, 4) for v, p in self.value_probabilities(field, decisions).items()}
                if full else round(p, 4) for field, p in confidence.items()}
        defer = min(confidence.values(), default=1) < self.min_confidence
        return answer | ({'_defer': True} if defer else {})

    def label(self, lines):
        """lines of bytes -> records, in their order. Texts of similar length are read together."""
        texts = self.encode(lines)
        problem = '_error' if 'error' in self.fields else 'error'
        records = [None if ids else {problem: 'empty text'} for ids in texts]
        order = sorted((n for n, ids in enumerate(texts) if ids), key=lambda n: len(texts[n]))

        def label_batch(batch):
            all_decisions = self.decide([texts[n][:self.task['max_text']] for n in batch])
            for n, decisions in zip(batch, all_decisions):
                records[n] = self.make_record(decisions)
        list(self.pool.map(label_batch, (order[at:at + BATCH] for at in range(0, len(order), BATCH))))
        self.n_cut = sum(len(ids) > self.task['max_text'] for ids in texts)
        return records


def read_lines(file):
    """yields lists of lines, each with the lines that have arrived: a slow pipe is answered line by line."""
    rest = b''
    while data := file.read1(1 << 16):
        *lines, rest = (rest + data).split(b'\n')
        yield lines
    yield [rest] if rest else []


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', nargs='?', help='a file with one text per line; none or -: standard input')
    parser.add_argument('--text', help='one text')
    parser.add_argument('--confidence', nargs='?', const='True', default='False',
                        choices=['False', 'True', 'full'])
    parser.add_argument('--min_confidence', default='0', metavar='P', help='0 to 1, or target')
    args = parser.parse_args()
    try:
        threshold = args.min_confidence if args.min_confidence == 'target' else float(args.min_confidence)
        assert threshold == 'target' or 0 <= threshold <= 1
    except (ValueError, AssertionError):
        sys.exit(f'--min_confidence is {args.min_confidence!r}; it must be a number from 0 to 1, or target')
    if args.text is not None:
        parts = [[args.text.encode('utf-8', 'surrogateescape')]]  # in any locale
    elif args.file in (None, '-'):
        if sys.stdin is None or sys.stdin.isatty():
            sys.exit('nothing to label; give a file, a pipe, or --text="..."')
        parts = read_lines(sys.stdin.buffer)
    else:
        try:
            parts = read_lines(open(args.file, 'rb'))
        except OSError as error:
            sys.exit(f'{args.file} cannot be read: {error.strerror}; for a single text use --text="..."')
    confidence = {'False': False, 'True': True}.get(args.confidence, args.confidence)
    student, n_cut = Student(Path(__file__).resolve().parent, confidence, threshold), 0
    sys.stdout.reconfigure(encoding='utf-8')
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for lines in parts:
            for record in student.label(lines):
                print(json.dumps(record, ensure_ascii=False))
            sys.stdout.flush()
            n_cut += student.n_cut
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it exits
    if n_cut:
        print(f'{n_cut} texts were longer than the {student.task["max_text"]} tokens the student reads; '
              'their ends were ignored', file=sys.stderr)
