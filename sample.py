"""Turn text into JSON with the student, greedily.

    python sample.py config/demo.py --text="you are great"      # one JSON line
    python sample.py config/demo.py --input=texts.txt           # one JSON line per input line, in order; or a .jsonl
    cat texts.txt | python sample.py config/demo.py --confidence=True | jq ._confidence.topic
    python sample.py config/demo.py                             # on a terminal: asks for texts
    python sample.py config/demo.py --input=texts.txt --min_confidence=0.4 --ask_teacher=True

Needs only out/<name>/ (best.pt or ckpt.pt, and tokenizer.json), neither the teacher nor data/. JSON goes to
stdout, everything else to stderr. tools/evaluate.py measures how good the answers are.
"""
import json
import os
import stat
import sys
from pathlib import Path

from config import configure, json_line, next_command, stop  # before torch, see config/machine.py
from config.machine import pick_device
import torch

from distil.checkpoint import warn_changed_task
from distil.decode import Row, choose, mask_illegal, pad_rows
from distil.labeler import Labeler
from distil.options import read_text, write_options
from distil.places import place_input
from distil.reader import read_pages

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
# texts
text = None          # None or text; one text to label, which may be empty
options = {}         # {'folder': ['Invoices', 'Travel']}; of texts that come without: see docs/schema.md
input = ''           # file; one text per line; or a .jsonl, {"text": ...} per line
too_long = 'cut'     # 'cut' or 'refuse'; what happens to texts longer than the student reads
constrain = True     # answers are held to the schema, so that they always parse; False: free decoding
sample_batch = 128   # 1..; texts decoded together; 128 was the fastest of 16 to 512 on 2 CPU cores
# deferral
confidence = False   # False, True or 'full'; add "_confidence": {field: probability that the teacher would
                     # say the same}, or with 'full' {field: {value: probability}} of all values, and of
                     # the five likeliest ones of the text
min_confidence = 0.0  # 0..1 or 'target'; a record with a field below it gets "_defer": true ... 'target': the
                      # threshold that tools/evaluate.py --target_agreement= found
ask_teacher = False  # ... or, with this, the teacher's answer and "_teacher": true
teacher = ''         # file; where the teacher to ask is now, or its URL; '': where it was for extract.py
price_in = 0.0       # 0..; of a teacher behind a URL: per million tokens read ...
price_out = 0.0      # 0..; ... and written
max_cost = 0.0       # 0..; it is asked no more before it costs more: "_defer" again; 0: no limit
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; of the layers of a student with many weights; auto:
                     # bfloat16 or, where next to no answer changes, int8, if that is faster (docs/students.md)
# of the config file, to warn if the student was trained with others
fields = {}
prompt = ''          # text or messages
config = configure(globals())

# -----------------------------------------------------------------------------
# greedy decoding


@torch.no_grad()
def answer_text(student, space, ids):
    """the greedy answer of a student to a text, one token after another. ids: the text in the teacher's tokens.
    Returns (output indices, end token included; decisions: [(field, logits (V,), -inf where illegal, choice)]).

    The automaton of the schema says which tokens are legal next. If it is only one, the token is forced, and the
    student need not be asked. distil/decode.py gives the same answers to many texts at once, reading each token once.
    """
    device, state, decisions = student.lm_head.weight.device, 0, []
    text, page = read_pages(student, space, [ids])
    row = Row(0, text[0], [student.config.output_vocab], [], [], page[0])  # feed begins with the start token
    while state != space.done:
        out = chosen = next(iter(space.transitions[state]))     # an output index
        if space.decides[state]:
            logits = student(pad_rows(text, device), torch.tensor([row.feed], device=device), only_last=True)  # (1, V)
            legal = space.next_state[[state]].to(device) >= 0
            allowed = mask_illegal(logits.float(), legal, space, [(row, state)])[0].cpu()
            chosen = out = int(choose(allowed[None], space.V))
            decisions.append((space.leaf_at[state], allowed, chosen))
            if chosen > space.V:                                # a place of the text, see distil/places.py
                row.places.append(chosen - space.V - 1)
                chosen = place_input(space.V, row.places[-1], len(row.places) % 2 == 0)
                out = space.place_symbol(state)
        if space.decides[state] or not row.page:                # a student that copies values reads decisions alone
            row.feed.append(chosen)
        row.outs.append(out)
        state = space.transitions[state][out]
    return row.answer(space), decisions


# -----------------------------------------------------------------------------
# main


def print_note(line):
    """prints prose to stderr: stdout is JSON alone."""
    print(line, file=sys.stderr, flush=True)


def label_text(labeler, text):
    """[(record, number of its tokens that were cut off)] of one text, which is decoded by answer_text."""
    ids, error, n_cut = labeler.encode(text)
    answer = ([], []) if error else answer_text(labeler.student, labeler.space, ids)
    return labeler.finish([(ids, error, n_cut, *answer)])


def print_labels(results):
    """prints a JSON line per record. Stops without complaint when the reader goes away (| head -1). results: (record,
    number of the text's tokens that were cut off) each."""
    n_cut_texts = 0                                             # texts, not tokens
    try:
        for record, n_cut in results:
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


def read_input(path):
    """yields the lines of a file as bytes, or of a .jsonl their texts; '' for a line without one."""
    for line in open(path, 'rb'):
        if path.lower().endswith(('.jsonl', '.ndjson')):
            try:
                record = json.loads(line)
                line = read_text(record) if isinstance(record['text'], str) else record['text']
            except (ValueError, LookupError, TypeError, RecursionError):
                line = ''
        yield line


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
    try:
        write_options('', options)
    except ValueError as error:
        stop(f'options: {error}')
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
                      min_confidence, ask_teacher, teacher, dtype,
                      {'price_in': price_in, 'price_out': price_out, 'max_cost': max_cost})
    warn_changed_task(labeler.task, fields, prompt)
    labeler.options = options
    try:
        if input or piped and text is None:
            print_labels(labeler.stream(read_input(input) if input else open(0, 'rb')))
        else:                                                   # one text, or those that are typed
            one = label_text if constrain else lambda labeler, text: labeler.stream([text])
            for line in [text] if text is not None else typed_lines():
                print_labels(one(labeler, line))
    except KeyboardInterrupt:                                   # at the prompt it is a normal end
        sys.exit(130 if text is not None or input or piped else 0)
