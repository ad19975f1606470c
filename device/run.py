"""Turn text into JSON with the student in this folder: numpy, onnxruntime and tokenizers, nothing else.

    python run.py --text="you are great"         # one JSON line
    python run.py texts.txt                      # one JSON line per input line, in order
    cat texts.txt | python run.py --confidence   # and a probability per field; --confidence=full: per value
    python run.py texts.txt --min_confidence=0.4 # "_defer": true if a field's confidence is below that

    from run import Student                      # if this folder is in sys.path
    Student('.')(['you are great'])              # [{'sentiment': 'positive', ...}]; '.': this folder

This file is also the specification of decoding. Its answers are those of the project's sample.py:

1. The tokenizer cuts the text into ids, which stand between those of `before` and `after`. The answer begins with
   `start`: the start token, and the first tokens that the schema forces. The tokens of an answer are numbers of a
   small vocabulary of their own.
2. task.json holds the schema as a small automaton. Its states are the decisions: the points where the schema
   leaves more than one legal token. At each of them one forward pass of student.onnx reads the text and the answer so
   far, and the legal token with the highest logit is chosen. The forced tokens after it are appended. If there is a
   reader.onnx, it has read the text before, once, and student.onnx gets the states that it returned.
3. The answer is JSON: `text`, and then the text of one option at each of the forks, from the first one on. The
   option taken is the one all of whose steps agree with the choices made: [state, indices among its legal tokens that
   take the option on, ...]. It also says which fork is next.
4. The confidence of a field is the product of the probabilities of the choices made in it: each is a softmax over the
   logits of the legal tokens, divided by the field's temperature. A field without a choice has confidence 1.
5. An option makes choices of the schema: [number of the choice, number of its value]. With 'full', the probability of
   each value comes from those of the options of the fork, see value_probabilities.
6. Some values are copied from the text. The logits of the vocabulary (V,) then go on: V + 1 + t is token t of the text.
   Two decisions choose the first and the last token of a value, see distil/places.py; the numbers V + 1 + 2 t and
   V + 2 + 2 t are read for them, and in `text` and in the options a character from U+100000 on stands for the value.
"""
import argparse
import json
import math
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == '__main__':  # Ctrl-C ends it without a traceback while the next lines, and the student, are loaded
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from distil.places import Page, Source  # distil/ is in this folder

BATCH = 32  # texts that one core reads together


def softmax(x, temperature):
    e = np.exp((x.astype(float) - x.max()) / temperature)
    return e / e.sum()


def pad(rows, dtype, value):
    """B rows of different lengths -> an array (B, T, ...), at least two long, with this value on padding."""
    padded = np.full((len(rows), max(2, *map(len, rows)), *np.shape(rows[0])[1:]), value, dtype)
    for n, row in enumerate(rows):
        padded[n, :len(row)] = row
    return padded


def inner_text(value):
    """a copied value as JSON, a string without its quotes, which the text around it has."""
    written = json.dumps(value, ensure_ascii=False)
    return written[1:-1] if isinstance(value, str) else written


class Decision(NamedTuple):
    """answer: the answer before it; option: which of the legal tokens was chosen, or their number for a place; logits:
    of the legal tokens, then of the legal places; chosen: which of these."""
    answer: list
    option: int
    logits: np.ndarray
    chosen: int


class Text:
    """a text that is being answered. ids: as the network reads it; states (T, C): what an encoder has read; page: where
    its values can stand, None if nothing is copied. copied: [(part, first token, last token)] of the values written; a
    part is one of Student.copied; first: the first token of the value that is begun, or None."""

    def __init__(self, ids, page):
        self.ids, self.states, self.page, self.copied, self.first = ids, None, page, [], None

    def places(self, part):
        """the tokens that may be chosen now, in a decision on a copied value."""
        if self.first is not None:
            return self.page.lasts(part, self.first)
        return self.page.firsts(part, [first for other, first, _ in self.copied if other.list == part.list is not None])

    def point(self, part, token):
        """chooses the first or the last token of a value."""
        if self.first is None:
            self.first = token
        else:
            self.copied.append((part, self.first, token))
            self.first = None

    def values(self):
        """its copied values, in the order of the answer."""
        return [self.page.span(*copied)[2] for copied in self.copied]


class Student:
    """Student(folder)(texts) -> a dict for each text, in their order. confidence, min_confidence: as above;
    confidence 'full' gives {choice of the schema: {value: probability}}, for the choices that the answer comes to, and
    of a list of values {field: {value: probability that it is in the list}}. SystemExit with a message if the folder is
    damaged, incomplete, or of another format."""

    def __init__(self, folder, confidence=False, min_confidence=0.0):
        if confidence not in (False, True, 'full'):
            raise ValueError(f'confidence is {confidence!r}; it must be False, True or \'full\'')
        folder, options = Path(folder), onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a batch for each core is faster than each batch on all cores
        self.pool = ThreadPoolExecutor(os.cpu_count())
        try:
            self.task = json.loads((folder / 'task.json').read_text(encoding='utf-8'))
            if self.task['format'] != 5:
                sys.exit(f'{folder} has format {self.task["format"]}, this run.py reads 5; export it again')
            self.tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
            for file, size in self.task['bytes'].items():
                assert (folder / file).stat().st_size == size, f'{file} is not from this export'
            load = lambda file: onnxruntime.InferenceSession(folder / file, options)
            self.session, self.reader = load('student.onnx'), None
            if 'reader.onnx' in self.task['bytes']:
                self.reader = load('reader.onnx')
        except Exception as error:  # onnxruntime and tokenizers raise nothing narrower
            newer = ', or install onnxruntime 1.24 or newer' if 'opset' in str(error) else ''
            reason = ' '.join(str(error).split())[:150]
            sys.exit(f'{folder} does not hold a complete student ({reason}); export it again{newer}')
        self.states, self.forks = self.task['states'], self.task['forks']
        self.copied = [SimpleNamespace(**part) for part in self.task['copied']]
        self.temperature = {leaf['path']: leaf['temperature'] for leaf in self.task['leaves']}
        self.confidence, self.min_confidence = confidence, min_confidence
        if min_confidence == 'target':
            self.min_confidence = self.task['min_confidence']
            if self.min_confidence is None:
                sys.exit('this student has no target; tools/evaluate.py --target_agreement sets one')

    def __call__(self, texts):
        assert not isinstance(texts, str), 'give a list of texts'
        return self.label(text.encode('utf-8', 'replace') for text in texts)

    def encode(self, lines):
        """lines of bytes -> (the texts, in which every run of whitespace counts as one space; their encodings)."""
        texts = [' '.join(line.decode('utf-8', 'replace').split()) for line in lines]
        return texts, self.tokenizer.encode_batch(texts, add_special_tokens=False)

    def open_text(self, text, encoding):
        """the Text of a string: as many of its tokens as fit, and what stands around them."""
        before, after, most = (self.task[key] for key in ('before', 'after', 'max_text'))
        part, page = slice(-most, None) if self.task['keep_end'] else slice(most), None
        if self.copied:
            locale = SimpleNamespace(locale=self.task['locale'], reference_date=self.task['reference_date'],
                                     has_options=False)
            nothing = [[(0, 0)] * len(ids) for ids in (before, after)]
            page = Page(Source(text, locale), [*nothing[0], *encoding.offsets[part], *nothing[1]])
        return Text([*before, *encoding.ids[part], *after], page)

    def read(self, texts):
        """lets the encoder, if there is one, read the Texts, in one forward pass."""
        if self.reader:
            all_states, = self.reader.run(None, {'text': pad([text.ids for text in texts], np.int64, -1)})  # (B, T, C)
            for text, states in zip(texts, all_states):
                text.states = states[:len(text.ids)]

    def compute_logits(self, texts, answers):
        """B Texts, and the B answers so far -> (B, V) logits of the next token of each, in one forward pass;
        (B, V + 1 + T) if values are copied."""
        feed = {'text': pad([text.ids for text in texts], np.int64, -1), 'answer': pad(answers, np.int64, -1)}
        if self.reader:
            feed['states'] = pad([text.states for text in texts], np.float32, 0)
        return self.session.run(None, feed)[0]

    def decide(self, texts):
        """a list of Texts -> for each {state: Decision}."""
        answers, state = [self.task['start']] * len(texts), [0] * len(texts)
        decisions = [{} for _ in texts]
        while unfinished := [n for n, s in enumerate(state) if s >= 0]:
            all_logits = self.compute_logits([texts[n] for n in unfinished], [answers[n] for n in unfinished])
            for n, row in zip(unfinished, all_logits):
                choices = self.states[state[n]]
                logits, places = self.legal_logits(choices, row, texts[n])
                n_tokens = len(choices['rows'])
                chosen = self.choose(logits, n_tokens)
                option = min(chosen, n_tokens)
                decisions[n][state[n]] = Decision(answers[n], option, logits, chosen)
                if option < n_tokens:
                    read = choices['read'][option]  # the token chosen and the forced ones after it
                else:
                    token = places[chosen - n_tokens]
                    texts[n].point(self.copied[choices['copies']], token)
                    read = [self.task['first_place'] + 2 * token + (texts[n].first is None)]
                answers[n] = answers[n] + read
                state[n] = choices['next'][option]  # -1: the answer is complete
        return decisions

    def choose(self, logits, n_tokens):
        """the number of the likeliest of these tokens; of the likeliest place, if the places behind them are together
        likelier: whether a value is copied is one decision, where is another."""
        tokens, places = logits[:n_tokens], logits[n_tokens:]
        if len(places) and np.logaddexp.reduce(places) > tokens.max(initial=-np.inf):
            return n_tokens + int(places.argmax())
        return int(tokens.argmax())

    def legal_logits(self, choices, row, text):
        """(the logits of a decision's legal tokens, then of its legal places; these places). row: all logits. A number
        or a date is written only if the text has one, unless nothing else is legal: then it is null."""
        logits, places = row[choices['rows']], []  # of V only the legal ones
        if 'copies' in choices:
            places = text.places(self.copied[choices['copies']]) or [0] * (not len(logits))
            logits = np.concatenate((logits, row[self.task['first_place']:][places])) if places else logits
        elif 'needs' in choices:
            lacking = np.array([not all(map(text.page.spans, kinds)) for kinds in choices['needs']])
            logits = logits if lacking.all() else np.where(lacking, -np.inf, logits)
        return logits, places

    def probabilities(self, state, logits):
        """the probabilities of the legal tokens of a state, and of its legal places."""
        return softmax(logits, self.temperature[self.states[state]['field']])

    def option_probabilities(self, state, logits):
        """the same, those of all places being one."""
        p, n_tokens = self.probabilities(state, logits), len(self.states[state]['rows'])
        return np.append(p[:n_tokens], p[n_tokens:].sum()) if 'copies' in self.states[state] else p

    def walk(self, decisions):
        """the decisions of an answer -> [(options of a fork, the one taken)], in the order of the answer."""
        walked, n = [], 0 if self.forks else -1
        while n >= 0:
            taken = next(option for option in self.forks[n] if all(
                state in decisions and decisions[state].option in rows for state, rows, _ in option['steps']))
            walked.append((self.forks[n], taken))
            n = taken['next']  # -1: the answer is complete
        return walked

    def value_probabilities(self, text, decisions, walked):
        """{number of a choice: probabilities of its values}, for a Text, of the choices that the answer comes
        to, given its own answers before. The probability of an option is the product, along its steps, of the share of
        the tokens that take it on among the possible ones. That of a value is the sum over the options that make this
        choice, among those that agree with the answer in the choices before. Decisions that are not on the answer's own
        path cost one more forward pass."""
        known = {state: self.option_probabilities(state, made.logits) for state, made in decisions.items()}
        missing = {}  # for each decision that the answer did not meet: the answer before it
        for option in (option for options, _ in walked for option in options):
            answer = decisions[option['steps'][0][0]].answer  # all options of a fork start at the same decision
            for state, rows, _ in option['steps']:
                if state not in known:
                    missing[state] = answer
                if rows[0] < len(self.states[state]['read']):  # else it is a place, behind which an option has no step
                    answer = answer + self.states[state]['read'][rows[0]]
        if missing:
            for state, row in zip(missing, self.compute_logits([text] * len(missing), list(missing.values()))):
                places = np.flatnonzero(text.page.begins) if 'copies' in self.states[state] else []
                rows = [*self.states[state]['rows'], *(self.task['first_place'] + place for place in places)]
                known[state] = self.option_probabilities(state, row[rows])
        result = {n: [1.0] for n, choice in enumerate(self.task['choices']) if len(choice['names']) == 1}
        for options, taken in walked:
            p = [math.prod(known[state][rows].sum() / (1 if possible is None else known[state][possible].sum())
                           for state, rows, possible in option['steps']) for option in options]
            for i, (choice, _) in enumerate(taken['made']):
                sums = [0.0] * len(self.task['choices'][choice]['names'])
                for option, q in zip(options, p):
                    if option['made'][:i] == taken['made'][:i]:
                        sums[option['made'][i][1]] += float(q)
                result[choice] = [q / sum(sums) for q in sums]
        return result

    def show_values(self, p_values):
        """what value_probabilities returns, as the record has it."""
        shown = {}
        for n, choice in enumerate(self.task['choices']):
            if n in p_values and choice['of']:
                path, value = choice['of']
                shown.setdefault(path, {})[value] = round(p_values[n][1], 4)
            elif n in p_values:
                shown[choice['path']] = {name: round(p, 4) for name, p in zip(choice['names'], p_values[n])}
        return shown

    def make_record(self, text, decisions):
        """a Text and its decisions -> its answer, a dict."""
        walked, values = self.walk(decisions), iter(text.values())
        written = self.task['text'] + ''.join(taken['text'] for _, taken in walked)
        if self.copied:
            written = re.sub('[\U00100000-\U0010ffff]', lambda _: inner_text(next(values)), written)
        answer = json.loads(written.strip().removeprefix('```json').removesuffix('```'))
        confidence = dict.fromkeys(self.temperature, 1.0)
        if self.confidence or self.min_confidence:
            for state, made in decisions.items():
                confidence[self.states[state]['field']] *= float(self.probabilities(state, made.logits)[made.chosen])
        if self.confidence == 'full':
            answer['_confidence'] = self.show_values(self.value_probabilities(text, decisions, walked))
        elif self.confidence:
            answer['_confidence'] = {path: round(p, 4) for path, p in confidence.items()}
        return answer | ({'_defer': True} if min(confidence.values()) < self.min_confidence else {})

    def label(self, lines):
        """lines of bytes -> records, in their order. Texts of similar length are read together."""
        texts, encodings = self.encode(lines)
        problem = '_error' if 'error' in self.temperature else 'error'
        records = [None if text else {problem: 'empty text'} for text in texts]
        order = sorted((n for n, text in enumerate(texts) if text), key=lambda n: len(encodings[n].ids))

        def label_batch(batch):
            opened = [self.open_text(texts[n], encodings[n]) for n in batch]
            self.read(opened)
            for n, text, decisions in zip(batch, opened, self.decide(opened)):
                records[n] = self.make_record(text, decisions)
        list(self.pool.map(label_batch, (order[at:at + BATCH] for at in range(0, len(order), BATCH))))
        self.n_cut = sum(len(encoding.ids) > self.task['max_text'] for encoding in encodings)
        return records


def read_arrived(file):
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
        parts = read_arrived(sys.stdin.buffer)
    else:
        try:
            parts = read_arrived(open(args.file, 'rb'))
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
              'the rest of them was ignored', file=sys.stderr)
