"""A student as a function from texts to records, one after another or many at a time.

    label = Labeler('out/demo', min_confidence=0.61)
    label(['you are great'])    # [{'sentiment': 'positive', ..., '_confidence': {'sentiment': 0.93, ...}}]

sample.py and tools/ label with it, serve/ answers requests with its parts.
"""
import os
import queue
import threading
from collections import deque
from pathlib import Path

from config import stop
from config.machine import pick_device
import torch

from distil.checkpoint import find_threshold, load_checkpoint, problem_key
from distil.confidence import all_probabilities, begin_row, confidence_of, read_rows, span_probabilities
from distil.decode import decode, generate
from distil.options import find_options, keep_options, split_options, text_end, write_options
from distil.reader import count_cut, read_pages, text_room
from distil.space import clean, kept_part
from distil.values import json_text, value_names

os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # torch's threads do not survive a fork


def read_ahead(items):
    """a queue of (item, None) for each item of an iterable, then (None, error): the exception that ended it,
    or a StopIteration. A thread fills it: a line from a slow pipe is answered at once, and memory does not
    grow with a fast one."""
    ahead = queue.Queue(1000)                                   # blocks the thread when it is full

    def read():
        error = None
        try:
            for item in items:
                ahead.put((item, None))
        except BaseException as raised:                         # belongs to the caller, not to this thread
            error = raised
        ahead.put((None, error or StopIteration()))             # the end
    threading.Thread(target=read, daemon=True).start()          # daemon: it must not keep the program alive
    return ahead


def load_teacher_to_ask(teacher, task, space, device, budget={}):
    """a function from lists of ids to the teacher's answers, lists of output indices. Exits with a message if
    this is not the teacher that the student learned from."""
    try:                                                        # it may be missing beside a copied student
        from distil.cascade import load_answerer
    except ImportError as error:
        stop(f'ask_teacher needs distil/cascade.py and transformers here ({error})')
    return load_answerer(teacher, task, space, device, budget)


# -----------------------------------------------------------------------------
# more options than a student can read

LEAST_TEXT = 32  # tokens of a text that options leave room for


def narrow(student, space, text):
    """a text with as many of its options as the student can read. If it has more, those of the property with the most
    of them are asked about in groups, and what is answered of each group stays."""
    count = lambda part: len(student.encoder.tokenizer.encode(part).ids) - 2  # without the special tokens
    while True:
        own = text[:text_end(text)]
        free = text_room(student, space) - 2 - min(count(own), LEAST_TEXT)
        if count(text[len(own):]) <= free:
            return text
        name, _ = max(split_options(text), key=lambda block: len(block[1]))
        values = [value for *_, value in find_options(text, name)]
        n_others = count(keep_options(text, name, ())[len(own):])  # tokens beside those of these options
        n_groups = -(-(count(text[len(own):]) - n_others) // max(1, free - n_others)) + 1
        size = len(values) // n_groups
        if size < 2:                                            # the others leave no room: the end of the text is cut
            return text
        groups = [keep_options(text, name, values[n:n + size]) for n in range(0, len(values), size)]
        ids = [space.tokenizer.encode(group, add_special_tokens=False).ids for group in groups]
        best = {value for outs in generate(student, space, ids) for *_, value in outs.spans}
        shorter = keep_options(text, name, best)
        if shorter == text:
            return text
        text = shorter


# -----------------------------------------------------------------------------
# copied values


def merge_spans(spans, own=None):
    """[(start, end, value, probability)] with each value once, the likeliest first: the probability of a value is the
    sum over its places. It stands at the likeliest of them, or at own, the (start, end, value) of the answer."""
    merged = {}
    for start, end, value, p in spans:
        key = json_text(value)
        other = merged.get(key, (start, end, value, 0.0))
        place = own[:2] if own and json_text(own[2]) == key else (start, end) if p > other[3] else other[:2]
        merged[key] = (*place, value, other[3] + p)
    return sorted(merged.values(), key=lambda span: -span[3])


def null_copies(space, outs):
    """yields (a copied.Copied that is null or missing in an answer, the output indices before it if it is not)."""
    copied, start = {f'{part.path}?': part for part in space.schema.copied}, len(space.start)
    for k, _, n in space.walk(space.to_json(outs)):
        made = space.forks[k][n].made
        for i, (path, number) in enumerate(made):
            if number and path in copied:
                way = next(way for way in space.forks[k] if way.made[:i + 1] == (*made[:i], (path, 0)))
                yield copied[path], [*outs[:start], *way.tokens[:way.tokens.index(space.V + copied[path].number)]]
        start += len(space.forks[k][n].tokens)


@torch.no_grad()
def copied_values(student, space, ids, outs, decisions, temperature=None, most=5):
    """{path of a copied value: [(start, end, value, probability)]} of one answer: its likeliest values if it is not
    null, given the student's own answer before. Also of those that are null in the answer, but for what is in an
    object or a list that is. start, end: characters of the text as the student reads it; the rest: as for
    span_probabilities."""
    tau, found, V = temperature or {}, {}, space.V
    states, own = space.states_before(outs), iter(outs.spans)
    logits_at = dict(zip([n for n, state in enumerate(states) if space.decides[state]], decisions))
    spans = span_probabilities(student, space, ids, outs, decisions, temperature, most)
    for n in [n for n, out in enumerate(outs) if out >= V][::2]:
        part, chosen = space.copy_at[states[n]], next(own)
        if chosen[2] in (None, ''):                             # the text has no number
            continue
        first, last = ((logits_at[m][1] / tau.get(part.group, 1.0)).softmax(-1) for m in (n, n + 1))
        others = [span for span in spans[part.path] if span[:3] != chosen]
        p = first[logits_at[n][2]] * last[logits_at[n + 1][2]]
        there = first[V:].sum().item()                          # null may be legal, too
        found[part.path] = merge_spans([(*span, p / there) for *span, p in [(*chosen, p.item()), *others]], chosen)
    nulls = list(null_copies(space, outs))
    if nulls:
        (text,), (page,) = read_pages(student, space, [ids])
        fed = [begin_row(space, page, outs, before) for _, before in nulls]
        begun = []                                              # (part, first token, its probability, what is read)
        for (part, _), row, logits in zip(nulls, fed, read_many(student, text, fed)):
            able = page.firsts(part)
            p = (logits[[V + 1 + first for first in able]] / tau.get(part.group, 1.0)).softmax(-1)
            begun += [(part, able[k], p[k].item(), [*row, V + 1 + able[k]])
                      for k in p.topk(min(most, len(able))).indices.tolist()]
        found |= {part.path: [] for part, _, _, _ in begun}
        for (part, first, p, _), logits in zip(begun, read_many(student, text, [row for *_, row in begun])):
            able = page.lasts(part, first)
            q = (logits[[V + 1 + last for last in able]] / tau.get(part.group, 1.0)).softmax(-1)
            found[part.path].append((*page.span(part, first, able[int(q.argmax())]), p * q.max().item()))
        found |= {part.path: merge_spans(found[part.path]) for part, _ in nulls if part.path in found}
    return found


def option_probabilities(student, space, part, ids, outs, decisions, temperature=None):
    """{option: probability} of all options of a text, of a property that is answered by one of them. part: its
    copied.Copied; ids, outs, decisions: as decode yields them for the text, with constrain."""
    (_,), (page,) = read_pages(student, space, [ids])
    states = space.states_before(outs)
    asked = [state for state in states if space.decides[state]]
    logits = next(decision[1] for state, decision in zip(asked, decisions) if space.copy_at.get(state) is part)
    p = (logits / (temperature or {}).get(part.group, 1.0)).softmax(-1)
    p_of = {value: p[space.V + 1 + first].item() for first, *_, value in page.spans(part.kind)}
    total = sum(p_of.values()) or 1.0                           # it may be null
    return {value: p / total for value, p in p_of.items()}


def read_many(student, text, fed, n=64):
    """yields the logits of read_rows, for n rows at a time."""
    for begin in range(0, len(fed), n):
        yield from read_rows(student, text, fed[begin:begin + n])


def show_copied(schema, found, p_values):
    """{path: {value as a text: probability}} of copied_values, the likeliest first; with that of null, or missing,
    where a value may be so. p_values: of value_probabilities."""
    shown = {}
    for part in schema.copied:
        maybe, row = schema.by_choice.get(f'{part.path}?'), p_values.get(f'{part.path}?', [1.0])
        if part.path in found or len(row) > 1:
            values = [(value, row[0] * p) for _, _, value, p in found.get(part.path, ())]
            values += [*zip(maybe.values, row)][1:] if len(row) > 1 else []
            values = sorted(values, key=lambda value: -value[1])
            shown[part.path] = dict(zip(value_names([value for value, _ in values]), [round(p, 4) for _, p in values]))
    return shown


class Labeler:
    """A student, from Python: Labeler('out/demo')(['text', ...]) -> [{'sentiment': 'positive', ...,
    '_confidence': {'sentiment': 0.93, ...}}, ...].

    folder: of a training run. confidence, which, dtype, teacher: as the settings of sample.py. too_long: 'cut', or
    'refuse' for {'error': ...} in place of an answer, or what problem_key says. min_confidence: records with a field
    below it get '_defer': True, or, with ask_teacher, the teacher's answer and '_teacher': True; budget: of a teacher
    behind a URL, {'price_in': ..., 'price_out': ..., 'max_cost': ...} as for extract.py. SystemExit if it
    cannot be loaded. It can be pickled (the copy loads the folder again), and used in a forked process (on one thread).
    """

    def __init__(self, folder, device='auto', which='best', batch_size=64, constrain=True, too_long='cut',
                 confidence=True, min_confidence=0.0, ask_teacher=False, teacher='', dtype='auto', budget={}):
        self.arguments = (Path(folder).absolute(), device, which, batch_size, constrain, too_long, confidence,
                          min_confidence, ask_teacher, teacher, dtype, budget)
        assert confidence in (False, True, 'full'), f'confidence is {confidence!r}; it is False, True or \'full\''
        if ask_teacher and not min_confidence:
            stop('ask_teacher needs a min_confidence: the teacher answers the records with a field below it')
        device = pick_device(device)
        self.checkpoint, self.student, self.space = load_checkpoint(folder, device, which, dtype)
        self.task = self.checkpoint['task']                     # fields, prompt, max_text, ... of meta.json
        self.batch_size, self.constrain = batch_size, constrain
        self.options = {}                                       # of texts that come without, see options.py
        self.too_long, self.confidence, self.problem = too_long, confidence, problem_key(self.space.schema)
        self.min_confidence = find_threshold(self.checkpoint, min_confidence)
        self.temperature = {name: of_field['temperature']       # fitted on held-out records
                            for name, of_field in (self.checkpoint['per_field'] or {}).items()}
        self.ask = load_teacher_to_ask(teacher, self.task, self.space, device, budget) if ask_teacher else None

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
        if self.options and string and text_end(string) == len(string):
            string = write_options(string, self.options)
        if self.space.has_options:
            string = narrow(self.student, self.space, string)
        ids = self.space.tokenizer.encode(string, add_special_tokens=False).ids  # of the whole vocabulary
        max_text = self.task['max_text']
        n_cut = count_cut(self.student, self.space, ids, max_text)
        if not string:
            return [], 'empty text', 0
        if n_cut and self.too_long == 'refuse':
            return [], f'text has {len(ids)} tokens, {n_cut} more than the student reads', 0
        if self.space.has_options:
            lacking = [part.of for part in self.space.schema.copied if part.is_option
                       and part.kind in self.space.needs[0] and not find_options(string, part.of)]
            if lacking:
                return [], f'the text comes without options for {lacking[0]}', 0
            if len(ids) > max_text:                             # the options stay
                own = self.space.tokenizer.encode(string[:text_end(string)], add_special_tokens=False).ids
                return own[:max(0, max_text - len(ids) + len(own))] + ids[len(own):], '', n_cut
        return ids[kept_part(self.task)], '', n_cut

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
            # many at once are faster for the teacher and for all probabilities: collect, while more texts are coming
            if not (self.ask or self.confidence == 'full') or drained or not waiting or len(results) >= self.batch_size:
                yield from self.finish(results)
                results = []
        yield from self.finish(results)                         # those of the last texts
        if not isinstance(end, StopIteration):
            raise end                                           # the caller's own exception

    def confidence_in(self, ids, outs, decisions, p_values):
        """({field: probability of its value}, what the record shows of it). p_values: of all_probabilities."""
        p_chosen = confidence_of(self.space.schema.paths, decisions, self.temperature)  # {field: 0..1}
        if self.confidence != 'full':
            return p_chosen, {name: round(p, 4) for name, p in p_chosen.items()}
        rounded = {path: [round(p, 4) for p in row] for path, row in p_values.items()}
        shown = self.space.schema.write_label(rounded)['probabilities']
        if self.space.schema.copied:
            found = copied_values(self.student, self.space, ids, outs, decisions, self.temperature)
            shown |= show_copied(self.space.schema, found, p_values)
        return p_chosen, shown

    def value_probabilities(self, results):
        """{number of a result: the probabilities of all values} of those that are answers."""
        known = [n for n, (_, error, _, outs, _) in enumerate(results)
                 if not error and self.space.to_json(outs) is not None]
        answers = [(results[n][0], *results[n][3:]) for n in known]
        return dict(zip(known, all_probabilities(self.student, self.space, answers, self.temperature)))

    def finish(self, results):
        """[(record, n_cut)] of results, (ids, error, n_cut, outs, decisions) each. Records below
        min_confidence are marked, or answered by the teacher."""
        records, below = [], {}                                 # below: {number in results: ids}
        p_values = self.value_probabilities(results) if self.confidence == 'full' else {}
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
                    p_chosen, shown = self.confidence_in(ids, outs, decisions, p_values.get(n))
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
