"""Turn text into JSON with the student, greedily.

    python sample.py config/demo.py --text="you are great"      # one JSON line
    python sample.py config/demo.py --input=texts.txt           # one JSON line per input line, in order; or a .jsonl
    cat texts.txt | python sample.py config/demo.py --confidence=True | jq ._confidence.topic
    python sample.py config/demo.py                             # on a terminal: asks for texts
    python sample.py config/demo.py --input=texts.txt --min_confidence=0.4 --ask_teacher=True

Needs only out/<name>/ (best.pt or ckpt.pt, and tokenizer.json), neither the teacher nor data/. JSON goes to
stdout, everything else to stderr. tools/evaluate.py measures how good the answers are.
"""
import os
import queue
import stat
import sys
from collections import deque
from pathlib import Path

from config import configure, json_line, next_command, stop  # before torch, see config/machine.py
from config.machine import pick_device
import torch

from distil.checkpoint import find_threshold, load_checkpoint, problem_key, warn_changed_task
from distil.decode import confidence_of, count_cut, decode, read_ahead, read_lines, value_probabilities
from distil.space import clean, value_names

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
# texts
text = None          # None or text; one text to label, which may be empty
input = ''           # file; one text per line; or a .jsonl, {"text": ...} per line
too_long = 'cut'     # 'cut' or 'refuse'; what happens to texts longer than the student reads
constrain = True     # answers are held to the schema, so that they always parse; False: free decoding
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
# deferral
confidence = False   # False, True or 'full'; add "_confidence": {field: probability that the teacher would
                     # say the same}, or with 'full' {field: {value: probability}} of all values
min_confidence = 0.0  # 0..1 or 'target'; a record with a field below it gets "_defer": true ... 'target': the
                      # threshold that tools/evaluate.py --target_agreement= found
ask_teacher = False  # ... or, with this, the teacher's answer and "_teacher": true
teacher = ''         # file; where the teacher to ask is now, or its URL; '': where it was for extract.py
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of the layers of a student with many weights; auto:
                     # bfloat16 where that is faster
# of the config file, to warn if the student was trained with others
fields = {}
prompt = ''          # text or messages
config = configure(globals())

os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # torch's threads do not survive a fork

# -----------------------------------------------------------------------------
# text in, JSON out


def load_teacher_to_ask(teacher, task, space, device):
    """a function from lists of ids to the teacher's answers, lists of output indices. Exits with a message if
    this is not the teacher that the student learned from."""
    try:                                                        # it may be missing beside a copied student
        from distil.cascade import load_answerer
    except ImportError as error:
        stop(f'ask_teacher needs distil/cascade.py and transformers here ({error})')
    return load_answerer(teacher, task, space, device)


class Labeler:
    """A student, from Python: Labeler('out/demo')(['text', ...]) -> [{'sentiment': 'positive', ...,
    '_confidence': {'sentiment': 0.93, ...}}, ...].

    folder: of a training run. confidence, which, dtype, teacher: as the settings. too_long: 'cut', or 'refuse'
    for {'error': ...} in place of an answer, or what problem_key says. min_confidence: records with a field below
    it get '_defer': True, or, with ask_teacher, the teacher's answer and '_teacher': True. SystemExit if it cannot be
    loaded. It can be pickled (the copy loads the folder again), and used in a forked process (on one thread).
    """

    def __init__(self, folder, device='auto', which='best', batch_size=64, constrain=True, too_long='cut',
                 confidence=True, min_confidence=0.0, ask_teacher=False, teacher='', dtype='auto'):
        self.arguments = (Path(folder).absolute(), device, which, batch_size, constrain, too_long, confidence,
                          min_confidence, ask_teacher, teacher, dtype)
        assert confidence in (False, True, 'full'), f'confidence is {confidence!r}; it is False, True or \'full\''
        if ask_teacher and not min_confidence:
            stop('ask_teacher needs a min_confidence: the teacher answers the records with a field below it')
        device = pick_device(device)
        self.checkpoint, self.student, self.space = load_checkpoint(folder, device, which, dtype)
        self.task = self.checkpoint['task']                     # fields, prompt, max_text, ... of meta.json
        self.batch_size, self.constrain = batch_size, constrain
        self.too_long, self.confidence, self.problem = too_long, confidence, problem_key(self.space.fields)
        self.min_confidence = find_threshold(self.checkpoint, min_confidence)
        self.temperature = {name: of_field['temperature']       # fitted on held-out records
                            for name, of_field in (self.checkpoint['per_field'] or {}).items()}
        self.ask = load_teacher_to_ask(teacher, self.task, self.space, device) if ask_teacher else None

    def __reduce__(self):                                       # for pickle: spawned processes, joblib
        return Labeler, self.arguments

    def __call__(self, texts):
        """a dict for each of an iterable of texts, in their order; {'error': ...} for what is no text, such as
        a nan. TypeError if texts is one text. What the iterable raises is raised here."""
        if isinstance(texts, (str, bytes)):                     # its letters would be answered
            raise TypeError('a Labeler takes a list of texts, not one text')
        return [record for record, _ in self.stream(texts)]

    def encode(self, text):
        """a text (str, or bytes in UTF-8) -> (ids the student reads, reason why there is no answer or '',
        number of ids cut off)."""
        if not isinstance(text, (str, bytes)):
            return [], f'not a text but {type(text).__name__}', 0
        line = text if isinstance(text, bytes) else text.encode('utf-8', 'replace')  # no lone surrogates
        string = clean(line.decode('utf-8', 'replace'))         # as the teacher's texts were
        ids = self.space.tokenizer.encode(string, add_special_tokens=False).ids  # of the whole vocabulary
        max_text = self.task['max_text']
        n_cut = count_cut(self.student, self.space, ids, max_text)
        if not string:
            return [], 'empty text', 0
        if n_cut and self.too_long == 'refuse':
            return [], f'text has {len(ids)} tokens, {n_cut} more than the student reads', 0
        return ids[:max_text], '', n_cut

    def stream(self, texts):
        """yields (record, number of the text's tokens that were cut off) for each text, in order, as soon as
        it is known. What the iterable raises is raised after the answers to the texts before it."""
        ahead, results, end = read_ahead(texts), [], None
        waiting = deque()                                       # encoded texts without an answer yet
        drained = False                                         # no text was there when the decoder last asked

        def encoded():
            nonlocal drained, end
            while True:
                try:
                    text, end = ahead.get(block=not waiting)    # wait only if nothing is being decoded
                except queue.Empty:
                    drained = True
                    yield None                                  # tells the decoder to go on without a new text
                    continue
                if end:                                         # no text follows
                    return
                drained = False
                waiting.append(self.encode(text))
                yield waiting[-1][0]                            # [] for a text without answer: keeps the order

        # answers in the order of the texts: output indices, and decisions [(field, logits (V,), choice)]
        for answer in decode(self.student, self.space, encoded(), self.batch_size, self.constrain):
            results.append((*waiting.popleft(), *answer))
            # the teacher is faster on many at once, so results are collected while more texts are coming
            if not self.ask or drained or not waiting or len(results) >= self.batch_size:
                yield from self.finish(results)
                results = []
        yield from self.finish(results)                         # those of the last texts
        if not isinstance(end, StopIteration):
            raise end                                           # the caller's own exception

    def confidence_in(self, ids, outs, decisions):
        """({field: probability of its value}, what the record shows of it)."""
        p_chosen = confidence_of(self.space.fields, decisions, self.temperature)  # {field: 0..1}
        if self.confidence != 'full':
            return p_chosen, {name: round(p, 4) for name, p in p_chosen.items()}
        # one more forward pass for the other values, from the token at which they differ from the answer
        p_values = value_probabilities(self.student, self.space, ids, outs, decisions, self.temperature)
        return p_chosen, {name: dict(zip(value_names(self.space.fields[name]), (round(p, 4) for p in row)))
                          for name, row in p_values.items()}

    def finish(self, results):
        """[(record, n_cut)] of results, (ids, error, n_cut, outs, decisions) each. Records below
        min_confidence are marked, or answered by the teacher."""
        records, below = [], {}                                 # below: {number in results: ids}
        for n, (ids, error, n_cut, outs, decisions) in enumerate(results):
            answer = None if error else self.space.to_json(outs)  # dict, or None if it breaks the schema
            if error:                                           # no text, or too long
                record = {self.problem: error}
            elif answer is None:                                # only without constrain
                raw = self.space.tokenizer.decode([self.space.output_ids[o] for o in outs],
                                                  skip_special_tokens=True)
                record = {self.problem: 'answer breaks the schema', 'answer': raw}
                if self.min_confidence:
                    below[n] = ids                              # surely not what the teacher says
            else:
                record = dict(answer)
                if self.confidence or self.min_confidence:      # costs time, so only if it is used
                    p_chosen, shown = self.confidence_in(ids, outs, decisions)
                    record |= {'_confidence': shown} if self.confidence else {}
                    if min(p_chosen.values()) < self.min_confidence:
                        below[n] = ids
            records.append((record, n_cut))                     # in the order of the texts
        teacher_outs = self.ask(list(below.values())) if self.ask and below else [None] * len(below)
        for n, outs in zip(below, teacher_outs):
            record, n_cut = records[n]
            if outs is not None:                                # the confidence shown is still the student's
                shown = {'_confidence': record['_confidence']} if '_confidence' in record else {}
                record = self.space.to_json(outs) | shown
            records[n] = record | {'_defer' if outs is None else '_teacher': True}, n_cut
        return records


# -----------------------------------------------------------------------------
# main


def print_note(line):
    """prints prose to stderr: stdout is JSON alone."""
    print(line, file=sys.stderr, flush=True)


def print_labels(labeler, texts):
    """prints a JSON line per text. Stops without complaint when the reader goes away (| head -1)."""
    n_cut_texts = 0                                             # texts, not tokens
    try:
        for record, n_cut in labeler.stream(texts):
            n_cut_texts += n_cut > 0                            # told once, at the end
            try:
                print(json_line(record), flush=True)  # a pipe may wait for this line
            except OSError as error:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
                if not isinstance(error, BrokenPipeError):
                    stop(f'cannot write the answers: {error.strerror}')
                return
    except OSError as error:                                    # the texts before it are answered
        stop(f'cannot read the texts: {error.strerror}')
    if n_cut_texts:
        print_note(f'{n_cut_texts} texts were longer than what the student reads; the rest of them was ignored')


def typed_lines():
    """yields the lines a person types, until Ctrl-D."""
    while True:
        print_note('a text to label (Ctrl-D ends):')
        if not (line := sys.stdin.buffer.readline()):           # Ctrl-D
            return
        yield line                                              # labelled before the next one is asked for


if __name__ == '__main__':
    if not name and not run:
        stop('no task; run: python sample.py config/demo.py')
    device = pick_device(device)
    if input and (Path(input).is_dir() or not Path(input).exists()):
        stop(f'{input} is a directory' if Path(input).is_dir() else f'{input} does not exist')
    if Path(input).suffix.lower() in ('.csv', '.tsv', '.json', '.xlsx', '.parquet', '.gz'):
        stop(f'{input} is not one text per line; python data/prepare.py NAME {input} writes data/NAME/input.jsonl')
    if input and text is not None:
        stop('set text or input, not both')
    piped = terminal = False
    if sys.stdin and not sys.stdin.closed:                      # a service may have none
        mode, terminal = os.fstat(0).st_mode, sys.stdin.isatty()
        piped = stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)  # but not /dev/null
    if not (text is not None or input or piped or terminal):
        stop(f'no text; give one: {next_command("sample.py")} --text="...", --input=FILE, or a pipe')
    labeler = Labeler(Path('out', run or name), device, which, sample_batch, constrain, too_long, confidence,
                      min_confidence, ask_teacher, teacher, dtype)
    warn_changed_task(labeler.task, fields, prompt)
    try:
        if text is not None:
            print_labels(labeler, [text])
        elif input or piped:
            print_labels(labeler, read_lines(input) if input else open(0, 'rb'))
        else:
            for line in typed_lines():
                print_labels(labeler, [line])
    except KeyboardInterrupt:                                   # at the prompt it is a normal end
        sys.exit(130 if text is not None or input or piped else 0)
