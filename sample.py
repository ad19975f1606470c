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
import math
import os
import pickle
import queue
import stat
import sys
import threading
import zipfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from config import command, configure, pick_device, pick_dtype, stop
from data import clean
from model import Student, StudentConfig, attend
from space import OutputSpace, accepted, tokenizer_hash, value_name

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
# checkpoint

CHECKPOINT = 4  # version of the files that train.py writes


class NoInit(torch.overrides.TorchFunctionMode):
    """leaves out torch.nn.init, for weights that a file is about to give: memory that nobody writes to costs
    nothing. (The meta device would do it too, but loads torch._dynamo: most of a second.)"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', '') != 'torch.nn.init':
            return func(*args, **(kwargs or {}))


def checkpoint_path(folder, which='best'):
    path = Path(folder, 'best.pt')
    return Path(folder, 'ckpt.pt') if which == 'last' or not path.is_file() else path


def is_large(student):
    """whether products are most of what its decoding takes; else lower precision would gain nothing."""
    return sum(p.numel() for p in student.h.parameters()) > 1e7


def lower_precision(student, dtype):
    """lets the products of a large student's layers be made in this type, in place: as a setting, see
    pick_dtype. Norms, a cache's attention, the sum of the layers and the head stay in float32."""
    device = student.lm_head.weight.device.type
    if not is_large(student) or pick_dtype(dtype, device) != torch.bfloat16:
        return
    for module in student.h.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    student.forward = torch.autocast(device, torch.bfloat16)(student.forward)


def load_checkpoint(folder, device, which='best', dtype='float32'):
    """folder of a training run -> checkpoint dict, Student, OutputSpace. SystemExit with one line where it
    will not do. which: the 'best' epoch's, or the 'last' one's. dtype: see lower_precision."""
    path = checkpoint_path(folder, which)
    if not path.is_file():
        stop(f'{path} does not exist; run: {command("train.py")}')
    try:
        with zipfile.ZipFile(path) as file:  # torch keeps a checksum of each tensor, and does not look at it
            if damaged := file.testzip():
                stop(f'{path} is damaged at {damaged}; copy it again, or train again')
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
        if checkpoint['format'] != CHECKPOINT:
            stop(f'{path} has format {checkpoint["format"]}, this version reads {CHECKPOINT}; train again')
        with NoInit():
            student = Student(StudentConfig(**checkpoint['student']))
        student.load_state_dict(checkpoint.pop('model'), assign=True)  # a frozen table stays in half precision
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, TypeError) as error:
        stop(f'{path} is not a whole checkpoint ({type(error).__name__}); train again')
    task = checkpoint['task']
    try:
        tokenizer = Tokenizer.from_file(str(Path(folder, 'tokenizer.json')))
        space = OutputSpace.of(tokenizer, task)
    except Exception as error:  # tokenizers raises nothing narrower
        stop(f'{folder}/tokenizer.json cannot be used: {error}; copy it from where the student was trained')
    if tokenizer_hash(tokenizer) != task['tokenizer_hash'] or space.output_ids != task['output_ids']:
        stop(f'{folder}/tokenizer.json is not the tokenizer {path} was trained with; '
             'copy the right one beside it')
    lower_precision(student.to(device).eval(), dtype)
    return checkpoint, student, space


def note_changes(task, fields, prompt):
    """says so where the config file's fields or prompt are no longer those the student was trained with."""
    now = {'fields': fields, 'prompt': prompt}
    changed = [key for key, value in now.items() if value and json.dumps(value) != json.dumps(task[key])]
    if changed:
        said = ' and '.join(changed)
        say(f'note: {said} changed since the training; the student answers as it was trained')


# -----------------------------------------------------------------------------
# greedy decoding


class Cache:
    """keys and values of rows, and the attention of new tokens to them. A row is a slot that can be used
    again. Those of a prompt that the student keeps are the same for all rows."""

    def __init__(self, student):
        c, p = student.config, student.lm_head.weight
        sizes = c.n_layer, 2, 0, c.block_size, c.n_kv_head, student.h[0].attn.head_size
        self.store = torch.zeros(sizes, dtype=p.dtype, device=p.device)  # (n_layer, 2, B, S, n_kv_head, D)
        self.n_prompt, self.gqa = c.n_prompt, c.n_head != c.n_kv_head
        self.prompt = student.prompt if c.n_prompt else None    # (n_layer, 2, n_kv_head, P, D)
        self.fold = c.n_head // c.n_kv_head if c.n_prompt else 1

    def place(self, slots, starts, counts, asked):
        """where the coming N tokens go: for each of R rows its slot, the position of its first new token,
        their number, and for how many of the last of them an output is asked. Returns their positions (1, N),
        and which of the N are asked for (M,)."""
        device, B = self.store.device, max(slots) + 1
        if B > self.store.size(2):
            more = self.store.new_zeros(*self.store.shape[:2], B - self.store.size(2), *self.store.shape[3:])
            self.store = torch.cat((self.store, more), 2)
        ends, slot = np.cumsum(counts), np.repeat(slots, counts)  # (R,), (N,)
        pos = np.arange(len(slot)) + np.repeat(np.array(starts) - ends + counts, counts)  # (N,)
        keep = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, asked)])  # (M,)
        at = pos - self.n_prompt                                # (N,) where in its row
        self.B, self.S = B, int(at.max()) + 1
        self.all, self.kept = self.grid(slot, at, counts), self.grid(slot[keep], at[keep], asked)
        self.slot, self.at, pos, keep = (torch.from_numpy(x).to(device) for x in (slot, at, pos, keep))
        return pos[None], keep

    def grid(self, slot, at, counts):
        """for attention N tokens are padded to (B, T): the cell of each (N,), T, and what is added to the
        scores (B, 1, T, S), or of all H / n_kv_head heads that share a key (B, 1, H / n_kv_head * T, S)."""
        T, device = max(counts), self.store.device
        col = np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts, counts)  # (N,) which of its row's
        cell = slot * T + col
        padded = np.zeros(self.B * T, np.int64)
        padded[cell] = at
        until = torch.from_numpy(padded).to(device).view(self.B, 1, T, 1)
        hidden = torch.arange(self.S, device=device) > until    # (B, 1, T, S): it sees its row up to itself
        mask = torch.zeros(hidden.shape, dtype=self.store.dtype, device=device)
        mask = mask.masked_fill_(hidden, -math.inf).repeat(1, 1, self.fold, 1)
        return torch.from_numpy(cell).to(device), T, mask

    def attend(self, layer, q, k, v, kept):
        """k and v (1, n_kv_head, N, D) of the placed tokens; q (1, H, N, D) of all of them, or (1, H, M, D)
        of the kept ones, those asked for -> like q."""
        (H, n, D), n_kv_head = q.shape[1:], k.size(1)
        for store, new in zip(self.store[layer], (k, v)):
            store[self.slot, self.at] = new[0].transpose(0, 1).to(store.dtype)  # (N, n_kv_head, D)
        cell, T, mask = self.kept if kept else self.all
        k, v = self.store[layer, :, :self.B, :self.S].transpose(2, 3)  # (B, n_kv_head, S, D) each
        padded = q.new_zeros(self.B * T, H, D)
        padded[cell] = q[0].transpose(0, 1)
        padded = padded.view(self.B, T, H, D).transpose(1, 2)   # (B, H, T, D)
        to_rows = lambda y: y.transpose(1, 2).reshape(-1, *y.shape[1:2], *y.shape[3:])[cell]  # (n, H, ...)
        with torch.autocast(q.device.type, enabled=False):      # scores of bfloat16 are too coarse
            if self.prompt is None:
                y = to_rows(F.scaled_dot_product_attention(padded, k, v, attn_mask=mask, enable_gqa=self.gqa))
                return y.transpose(0, 1)[None]
            # the prompt is one product for all rows; the parts are put together as in teacher.py
            y, lse = attend(padded.reshape(self.B, n_kv_head, -1, D), k, v, mask, D ** -0.5)
            y, lse = to_rows(y.reshape(self.B, H, T, D)), to_rows(lse.reshape(self.B, H, T))
            prompt = self.prompt[layer, :, None]                # (2, 1, n_kv_head, P, D)
            y_prompt, lse_prompt = attend(q.reshape(1, n_kv_head, -1, D), *prompt, None, D ** -0.5)
            share = torch.sigmoid(lse_prompt.reshape(H, n) - lse.T)[..., None]
            return torch.lerp(y.transpose(0, 1), y_prompt.reshape(H, n, D), share)[None]


@dataclass
class Row:
    """a text whose answer is under way."""
    number: int      # of the text
    feed: list       # ids to read next; the last of them are the draft's
    draft: list      # output indices that the schema forces there
    state: int       # after the draft: a decision, or done
    n_read: int      # tokens read before
    outs: list = field(default_factory=list)
    decisions: list = field(default_factory=list)

    def take(self, space, pick, logits, constrain):
        """goes on with what the student chose at the asked positions; whether that was the end of the answer.
        pick: list of output indices; logits (V,) at the last of them, -inf where illegal."""
        stands = accepted(self.draft, self.draft + pick if constrain else pick)
        self.outs += stands
        if len(stands) <= len(self.draft):  # no decision: the draft ended the answer, or was not chosen
            return True
        state = space.moves[self.state].get(stands[-1], -1)
        if state < 0:                       # a free answer that leaves the schema
            return True
        self.decisions.append((space.field[self.state], logits, stands[-1]))
        self.draft, self.state = space.runs[state]
        if self.state == space.done and (constrain or not self.draft):  # nothing is left to ask
            self.outs += self.draft
            return True
        self.n_read += len(self.feed)
        ids = [space.output_ids[o] for o in (stands[-1], *self.draft)]
        self.feed = ids[:-1] if self.state == space.done else ids  # the end token itself need not be read
        return False


@torch.no_grad()
def decode(student, space, texts, batch_size=64, constrain=True):
    """Answers to a stream of texts, with one forward pass per decision: what the schema forces in between
    costs none.

    texts: iterable of lists of ids, in which None says that there is nothing yet: what is under way goes on,
    and then it is asked again. Yields in their order (output indices with the end token, decisions: see
    confidence_of).

    constrain: *guaranteed*: the student is asked only where the schema leaves a choice, and held to what is
    legal there. Else *lossless*: forced tokens are a draft which the student reads and must itself have
    chosen, so that the answer is its free greedy one, in float32 token for token; it ends with the first
    token outside the schema, if there is one. (Speculative decoding, https://arxiv.org/abs/2211.17192, with the schema as
    the draft.)

    A pass reads the new tokens of all rows as one long row; where an answer is complete, the next text takes
    its place.
    """
    device, start, n_prompt = student.lm_head.weight.device, student.config.start, student.config.n_prompt
    legal, texts, cache = space.next_state.to(device) >= 0, iter(texts), Cache(student)
    rows, done = {}, {}  # rows by slot; done: answers by number, held up by an earlier one
    n_in, n_out, more = 0, 0, True
    while more or rows:
        while more and len(rows) < batch_size:
            try:
                ids = next(texts)
            except StopIteration:
                more = False
                break
            if ids is None:
                break
            room = student.config.block_size - space.max_answer - len(start) + 1
            assert len(ids) <= room, f'{len(ids)} tokens of text leave no room for an answer: {room} would'
            draft, state = space.runs[0]
            feed = [*ids, *start, *(space.output_ids[o] for o in draft)]
            free = next(slot for slot in range(batch_size) if slot not in rows)
            rows[free] = Row(n_in, feed, draft, state, n_prompt)
            n_in += 1
        if not rows:
            continue
        live = list(rows.values())
        counts = [len(row.feed) for row in live]
        asked = [1] * len(live)                                 # how many of the last of each feed
        if not constrain:
            asked = [len(row.draft) + (row.state != space.done) for row in live]
        pos, keep = cache.place(list(rows), [row.n_read for row in live], counts, asked)
        idx = torch.tensor([[i for row in live for i in row.feed]], device=device)  # (1, N)
        logits = student(idx, cache=cache, pos=pos, keep=keep).float()  # (M, V)
        last = np.cumsum(asked) - 1                             # (R,) of the M
        held = logits[last].masked_fill(~legal[[row.state for row in live]], -math.inf)  # (R, V)
        picks = np.split((held if constrain else logits).argmax(-1).cpu().numpy(), last[:-1] + 1)
        for (slot, row), pick, row_logits in zip(list(rows.items()), picks, held.cpu()):
            if row.take(space, pick.tolist(), row_logits, constrain):
                done[row.number] = row.outs, row.decisions
                del rows[slot]
        while n_out in done:
            yield done.pop(n_out)
            n_out += 1


def generate(student, space, texts, constrain=True, batch_size=64):
    """texts: iterable of lists of ids -> list of lists of output indices, end token included; see decode."""
    return [outs for outs, _ in decode(student, space, texts, batch_size, constrain)]


def confidence_of(fields, decisions, temperature=None):
    """{field: probability of the value chosen}: of the student held to the schema, given the fields before.
    It is the product, along the value's tokens, of the softmax over the legal ones. decisions: of an answer,
    [(field, logits (V,), -inf where illegal, the choice)]. temperature: {field: what its logits are divided
    by}, see evaluate.py."""
    log_p = dict.fromkeys(fields, 0.0)
    for name, logits, choice in decisions:
        log_p[name] += (logits / (temperature or {}).get(name, 1.0)).log_softmax(-1)[choice].item()
    return {name: math.exp(p) for name, p in log_p.items()}


@torch.no_grad()
def values(student, space, ids, outs, decisions, temperature=None):
    """{field: [probability of each of its values, in their order]} for one answer: of the student held to the
    schema, given the fields before as it answered them. That of the value chosen is confidence_of's.

    ids: of the text; outs, decisions: what decode gave for it, held to the schema. A value's probability is
    the product along its tokens of the softmax over the legal ones, so those of a field sum to 1. Where
    values share their first tokens the decisions that are not on the answer's way are asked too, in one pass.
    """
    ways, states = space.ways, space.states(outs)
    chosen = [n for n, state in enumerate(states) if len(space.moves[state]) > 1]
    known = {states[n]: logits for n, (_, logits, _) in zip(chosen, decisions)}  # (V,) by state
    first = {}                                                  # of each field: where its first decision is
    for n in chosen:
        first.setdefault(space.field[states[n]], n)
    missing = {state: [*outs[:first[name]], *before] for name, of_values in ways.items()
               for way in of_values for state, _, before in way if state not in known}
    if missing:
        rows = [[*ids, *student.config.start, *(space.output_ids[o] for o in answer)]
                for answer in missing.values()]
        idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        asked = torch.full_like(idx, -1)
        for n, row in enumerate(rows):
            idx[n, :len(row)], asked[n, len(row) - 1] = torch.tensor(row), 0
        device = student.lm_head.weight.device
        logits = student(idx.to(device), asked.to(device)).float().cpu()  # (rows, V)
        legal = space.next_state[list(missing)] >= 0
        known |= dict(zip(missing, logits.masked_fill(~legal, -math.inf)))
    result = {name: [1.0] for name in space.fields}             # a constant is certain
    for name, of_values in ways.items():
        t = (temperature or {}).get(name, 1.0)
        log_p = {state: (known[state] / t).log_softmax(-1).tolist()
                 for state in {state for way in of_values for state, _, _ in way}}
        result[name] = [math.exp(sum(log_p[state][out] for state, out, _ in way)) for way in of_values]
    return result


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
