"""Turn text into JSON with the student in this folder: numpy, onnxruntime and tokenizers, nothing else.

    python run.py --text="you are great"         # one JSON line
    python run.py texts.txt                      # one JSON line per input line, in order
    cat texts.txt | python run.py --confidence   # and how sure it is; --confidence=full: of every value
    python run.py texts.txt --min_confidence=0.4 # "_defer": true where it is less sure of a field

    from run import Student                      # where this folder is in sys.path
    Student('.')(['you are great'])              # [{'sentiment': 'positive', ...}]; '.': this folder

It reads as the specification of decoding, too: the answers are those of the project's sample.py. The text is
cut into tokens; from there on the schema is a small automaton (task.json) whose states are the decisions it
leaves. At each the student reads text and answer so far in one pass, and takes the likeliest of the choices.
"""
import argparse
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

BATCH = 32  # texts read together, by each core


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class Student:
    """Student(folder)(texts) -> a dict for each text, in their order. confidence, min_confidence: as above,
    confidence 'full' for {field: {value: probability}}. SystemExit with one line where the folder will not
    do."""

    def __init__(self, folder, confidence=False, min_confidence=0.0):
        if confidence not in (False, True, 'full'):
            raise ValueError(f'confidence is {confidence!r}; it must be False, True or \'full\'')
        folder, options = Path(folder), onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a batch to each core is faster than each batch on all of them
        self.pool = ThreadPoolExecutor(os.cpu_count())
        try:
            self.task = json.loads((folder / 'task.json').read_text(encoding='utf-8'))
            if self.task['format'] != 1:
                sys.exit(f'{folder} has format {self.task["format"]}, this run.py reads 1; export it again')
            self.tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
            for file, size in self.task['bytes'].items():
                assert (folder / file).stat().st_size == size, f'{file} is not of this export'
            self.session = onnxruntime.InferenceSession(folder / 'student.onnx', options)
        except Exception as error:  # onnxruntime and tokenizers raise nothing narrower
            newer = ', or onnxruntime is older than 1.24' if 'opset' in str(error) else ''
            said = ' '.join(str(error).split())[:150]
            sys.exit(f'{folder} is no whole student ({said}); export it again{newer}')
        self.fields, self.states = self.task['fields'], self.task['states']
        self.confidence, self.min_confidence = confidence, min_confidence
        if min_confidence == 'target':
            self.min_confidence = self.task['min_confidence']
            if self.min_confidence is None:
                sys.exit('this student has no target; see evaluate.py --target_agreement')

    def __call__(self, texts):
        assert not isinstance(texts, str), 'give a list of texts'
        return self.label(text.encode('utf-8', 'replace') for text in texts)

    def read(self, lines):
        """lines of bytes -> the ids of the text in each, whitespace of any kind and length as one space."""
        texts = [' '.join(line.decode('utf-8', 'replace').split()) for line in lines]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def logits(self, rows):
        """lists of ids -> (B, V) logits of what follows each: one pass. Rows are padded on the right, where
        nobody looks."""
        ids = np.zeros((len(rows), max(2, *map(len, rows))), np.int64)
        for n, row in enumerate(rows):
            ids[n, :len(row)] = row
        asked = np.arange(len(rows)) * ids.shape[1] + [len(row) - 1 for row in rows]
        return self.session.run(None, {'ids': ids, 'asked': asked})[0]

    def decide(self, texts):
        """lists of ids -> for each {state: (what was read before it, logits of its choices, the choice)}."""
        rows, state = [[*ids, *self.task['start']] for ids in texts], [0] * len(texts)
        made = [{} for _ in texts]
        while open_ := [n for n, s in enumerate(state) if s >= 0]:
            for n, row in zip(open_, self.logits([rows[n] for n in open_])):
                choices = self.states[state[n]]
                of_choices = row[choices['rows']]
                pick = int(of_choices.argmax())
                made[n][state[n]] = rows[n], of_choices, pick
                rows[n], state[n] = rows[n] + choices['read'][pick], choices['next'][pick]
        return made

    def values(self, field, made):
        """{value: its probability} of one field, given the fields before as they were answered: the product
        along its way of the softmax over the choices. Decisions off the way of the answer are asked too."""
        if field not in self.task['ways']:
            return {self.task['names'][field][0]: 1.0}  # a constant is certain
        known = {state: of_choices for state, (_, of_choices, _) in made.items()}
        before = {}  # what would have been read before each decision that was not met
        for way in self.task['ways'][field]:
            read = made[way[0][0]][0]
            for state, choice in way:
                if state not in known:
                    before[state] = read
                read = read + self.states[state]['read'][choice]
        if before:
            for state, row in zip(before, self.logits(list(before.values()))):
                known[state] = row[self.states[state]['rows']]
        temperature = self.task['temperature'][field]
        p = [math.prod(float(softmax(known[state].astype(float) / temperature)[choice]) for state, choice in way)
             for way in self.task['ways'][field]]
        return dict(zip(self.task['names'][field], p))

    def record(self, made):
        """the answer that these decisions spell out."""
        answer, sure = {}, {}
        for field, values in self.fields.items():
            ways = self.task['ways'].get(field, [[]])
            n = next(n for n, way in enumerate(ways) if all(s in made and made[s][2] == c for s, c in way))
            answer[field] = values[n]
            if self.confidence or self.min_confidence:
                temperature = self.task['temperature'][field]
                sure[field] = math.prod(float(softmax(made[state][1].astype(float) / temperature)[choice])
                                        for state, choice in ways[n])
        if self.confidence:
            full = self.confidence == 'full'
            answer['_confidence'] = {
                field: {v: round(p, 4) for v, p in self.values(field, made).items()} if full else round(p, 4)
                for field, p in sure.items()}
        return answer | ({'_defer': True} if min(sure.values(), default=1) < self.min_confidence else {})

    def label(self, lines):
        """lines of bytes -> records, in their order; texts of like length are read together."""
        texts = self.read(lines)
        records = [None if ids else {'error': 'empty text'} for ids in texts]
        order = sorted((n for n, ids in enumerate(texts) if ids), key=lambda n: len(texts[n]))

        def answer(batch):
            for n, made in zip(batch, self.decide([texts[n][:self.task['max_text']] for n in batch])):
                records[n] = self.record(made)
        list(self.pool.map(answer, (order[at:at + BATCH] for at in range(0, len(order), BATCH))))
        self.n_cut = sum(len(ids) > self.task['max_text'] for ids in texts)
        return records


def lines_of(file):
    """yields lists of lines, each as many as are there: a slow pipe is answered line by line."""
    rest = b''
    while data := file.read1(1 << 16):
        *lines, rest = (rest + data).split(b'\n')
        yield lines
    yield [rest] if rest else []


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', nargs='?', help='a file with a text on each line; none or -: what is piped in')
    parser.add_argument('--text', help='one text')
    parser.add_argument('--confidence', nargs='?', const='True', default='False',
                        choices=['False', 'True', 'full'])
    parser.add_argument('--min_confidence', default='0', metavar='P', help='0 to 1, or target')
    args = parser.parse_args()
    try:
        least = args.min_confidence if args.min_confidence == 'target' else float(args.min_confidence)
        assert least == 'target' or 0 <= least <= 1
    except (ValueError, AssertionError):
        sys.exit(f'--min_confidence is {args.min_confidence!r}; it must be a number from 0 to 1, or target')
    if args.text is not None:
        parts = [[args.text.encode('utf-8', 'replace')]]
    elif args.file in (None, '-'):
        if sys.stdin is None or sys.stdin.isatty():
            sys.exit('nothing to label; give a file, a pipe, or --text="..."')
        parts = lines_of(sys.stdin.buffer)
    else:
        try:
            parts = lines_of(open(args.file, 'rb'))
        except OSError as error:
            sys.exit(f'{args.file} cannot be read: {error.strerror}; a text is given as --text="..."')
    confidence = {'False': False, 'True': True}.get(args.confidence, args.confidence)
    student, n_cut = Student(Path(__file__).resolve().parent, confidence, least), 0
    sys.stdout.reconfigure(encoding='utf-8')
    try:
        for lines in parts:
            for record in student.label(lines):
                print(json.dumps(record, ensure_ascii=False))
            sys.stdout.flush()
            n_cut += student.n_cut
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a reader that went away is told nothing more
    if n_cut:
        print(f'{n_cut} texts were longer than the {student.task["max_text"]} tokens the student reads; '
              'their ends were ignored', file=sys.stderr)
