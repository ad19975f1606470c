"""What a teacher writes before it decides: a reason, steps. It is left out of the student's answers.

    free = open_free(space, task)                               # None if there is nothing to write
    answer(engine, space, drafts, texts, after, free=free)      # distil/engine.py

A text that is left out and stands before what is answered is written freely by the teacher, greedily and from its whole
vocabulary, up to the closing quote. It reads it, and then decides; only the decisions are stored. So

    {"steps":"6x = 131 - 17 = 114, so x = 19","answer":19}      becomes a record of      {"answer":19}

What the student's answer begins with, up to its first decision, is not asked: its logits are those of certainty.
"""
import re
from itertools import takewhile

import numpy as np
import torch

from distil.copied import MARKS
from distil.json_schema import is_json_schema
from distil.shares import logits_of
from distil.written import Style

QUOTE = re.compile(r'(?<!\\)(?:\\\\)*("|[\n\r])')               # what ends a JSON text: a line break has no place in it


def free_names(fields, left_out):
    """the names of the texts that are left out and stand before the first property that is answered."""
    properties, names = fields.get('properties', {}) if is_json_schema(fields) else fields, []
    for name, part in properties.items():
        if name not in left_out:
            return names
        if isinstance(part, dict) and part.get('type') == 'string':
            names.append(name)
    return names


def open_free(space, task):
    """the FreeText of a task (settings, a meta.json or that of a checkpoint), or None."""
    n = task.get('free_tokens')
    names = free_names(task['fields'], task.get('left_out') or ()) if n else []
    return FreeText(space, names, n) if names else None


class FreeText:
    """names: of the texts, in order; most: tokens of each. ValueError if the tokens of the answer do not go on in the
    same way behind them.

    leads: lists of ids, what stands before each text; bridge: ids between the last one and the first decision."""

    def __init__(self, space, names, most):
        self.space, self.most = space, most
        self.encode = lambda text: space.tokenizer.encode(text, add_special_tokens=False)
        style, (self.outs, self.state) = Style(space.indent), space.forced_runs[0]
        opening = ('```json\n' if space.fence else '') + '{' + style.line(1)
        keys = [style.key(name) + '"' for name in names]
        self.leads = [self.encode((opening if not n else '",' + style.line(1)) + key).ids for n, key in enumerate(keys)]
        answer = space.schema.fill(lambda choice: 0)
        text, outs = space.text(answer), space.from_json(answer)[len(self.outs):]
        if space.end_id is not None:
            outs = outs[:-1]
        if space.schema.copied:                                 # up to the first value that is copied
            text = space.start_text + ''.join(space.forks[k][n].text for k, _, n in space.walk(answer))
            text = text[:next((n for n, char in enumerate(text) if ord(char) >= MARKS), len(text))]
            outs = [*takewhile(lambda out: out < space.V, outs)]
        begun = self.encode('x",' + style.line(1) + text[len(opening):])
        behind = [i for i, (begin, _) in zip(begun.ids, begun.offsets) if begin]  # behind the last letter
        rest = [space.output_ids[out] for out in outs]
        if behind[len(behind) - len(rest):] != rest:
            raise ValueError(f'behind {names[-1]!r} the answer has other tokens; set free_tokens = 0, or indent = 2')
        self.bridge = behind[:len(behind) - len(rest)]
        self.room = sum(map(len, self.leads)) + len(self.bridge) + len(names) * (most + 4)
        self.rows = [logits_of({out: 1.0}, len(space.output_ids)) for out in self.outs]

    def begin(self, results):
        """puts what the answers begin with into results, lists (outs, logits, lse)."""
        for outs, logits, lse in results:
            outs += self.outs
            logits += self.rows
            lse += [0.0] * len(self.outs)

    def end_of(self, ids):
        """the ids of a free text without its end, or None if it goes on. ids: what is written so far."""
        text = self.space.tokenizer.decode(ids)
        if found := QUOTE.search(text):
            kept = text[:found.start(1)]
            n = len(ids) - 1                                    # the last token may have begun before the quote
            head = self.space.tokenizer.decode(ids[:n])
            return ids[:n] + (self.encode(kept[len(head):]).ids if kept.startswith(head) else [])
        return ids if len(ids) >= self.most else None

    @torch.inference_mode()
    def write(self, teacher, unread, starts, rows=None):
        """lets a distil.engine.Teacher write the texts, and changes unread and starts to what it must read next, after
        the last of them. unread: of each text, ids that are not read yet; starts: how many are; rows: those to write,
        None for all. Returns the number of tokens read."""
        n_read, rows = 0, list(range(len(unread)) if rows is None else rows)
        stop = teacher.model.generation_config.eos_token_id
        stop = {stop} if isinstance(stop, int) else set(stop or ())
        for lead in self.leads:
            live, written = rows, [[] for _ in unread]
            for i in rows:
                unread[i] = unread[i] + lead
            while live:
                hidden = teacher.read(live, [unread[i] for i in live], [starts[i] for i in live])
                n_read += len(hidden)
                ends = np.cumsum([len(unread[i]) for i in live]) - 1
                last = hidden[torch.as_tensor(ends, device=hidden.device)]
                best = teacher.logits(last, teacher.head).argmax(-1).tolist()
                going = []
                for i, token in zip(live, best):
                    starts[i] += len(unread[i])
                    end = written[i] if token in stop else self.end_of(written[i] + [token])
                    n_same = len(written[i])
                    if end is None:
                        written[i].append(token)
                        unread[i] = [token]
                        going.append(i)
                    else:                                       # what is new of it is read with what follows
                        unread[i] = end[n_same:]
                live = going
        for i in rows:
            unread[i] = unread[i] + self.bridge
        return n_read

    @torch.inference_mode()
    def write_slowly(self, model, ids):
        """the same, one token and one whole forward pass after another: the ids of a text and all before it -> these,
        the free texts, and what follows up to the first decision. model: of transformers."""
        ids, stop = list(ids), model.generation_config.eos_token_id
        stop = {stop} if isinstance(stop, int) else set(stop or ())
        for lead in self.leads:
            ids, written = ids + lead, []
            while True:
                logits = model(torch.tensor([ids + written], device=model.device), logits_to_keep=1).logits[0, -1]
                token = int(logits.argmax())
                end = written if token in stop else self.end_of(written + [token])
                if end is not None:
                    break
                written.append(token)
            ids += end
        return ids + self.bridge
