"""The teacher that answers what its student is not sure of.

    answer_texts = load_answerer('', task, space, 'cpu')    # task: of the student's checkpoint
    answer_texts([[17, 4, 99], ...])                        # ids of texts -> output indices of their answers
"""
import sys
from contextlib import suppress
from functools import partial

import torch

from config import stop
from data import with_spans
from distil.calibrate import calibrate_label
from distil.drafts import Drafts
from distil.engine import Teacher, answer_batched
from distil.free import open_free
from distil.shares import NotInText, record_from_label
from distil.server import URL, Server, Stopped, check_budget, check_httpx
from distil.teacher import fingerprint, load_model


def load_answerer(name, task, space, device, budget={}):
    """a function from lists of ids to the answers, lists of output indices, of the teacher that a student
    learned from. name: where it is, '': where it was for extract.py; task: from the student's checkpoint; budget:
    price_in, price_out and max_cost of a Server. Exits with a message if it is another teacher."""
    if task.get('server'):                                      # a model behind a URL
        return ask_server(name, task, space, budget)
    if task['fingerprint'] == 'labels':                         # extract.py ran without a teacher
        sys.exit('this student learned from given labels: there is no teacher to ask')
    if task.get('label_fields'):
        sys.exit(f'this student learned {", ".join(task["label_fields"])} from given labels, which its teacher does '
                 'not know: there is none to ask')
    name = name or task['teacher']
    print(f'loading {name}', file=sys.stderr, flush=True)
    model = load_model(name, torch.float32 if device == 'cpu' else torch.bfloat16, device)
    if fingerprint(model) != task['fingerprint']:
        sys.exit(f'{name} is not the teacher this student learned from ({task["teacher"]})')
    teacher, drafts, free = Teacher(model, task['before'], space.output_ids), Drafts(space), open_free(space, task)

    def answer_texts(texts):
        answers = answer_batched(teacher, space, drafts, texts, task['after'], free=free)[0]
        answers = [None if isinstance(answer, str) else with_places(space, ids, *answer)
                   for ids, answer in zip(texts, answers)]
        for outs in filter(None, answers):
            drafts.add(outs)
        return answers
    return answer_texts


def with_places(space, ids, outs, logits, lse, places=None, weights=None):
    """the output indices of an answer, with the spans of its copied values if there are any (Outs). ids: of the
    text."""
    return outs if places is None else with_spans(space, space.tokenizer.decode(list(map(int, ids))), outs, places)


def ask_server(urls, task, space, budget={}):
    """a function from lists of ids to the answers, lists of output indices, of the server that a student
    learned from, now at these URLs; None for a text that it does not answer, or that would cost more than the budget.
    task: from the student's checkpoint. Exits with a message if there is no URL or no httpx."""
    check_httpx()
    check_budget(budget)
    if not urls.startswith(URL):
        stop(f'this student learned from {task["server"]} behind a URL; say where it is now: --teacher=URL')
    server = Server(urls.split(','), task['server'], space.schema, task['prompt'], patience=30,
                    show=partial(print, file=sys.stderr), **budget)  # stdout is JSON alone
    told = set()                                            # why it stopped, once each

    def answer_texts(texts):
        outs = [None] * len(texts)
        try:
            for group in server.answered([[(n, ids, None) for n, ids in enumerate(texts)]], space.tokenizer.decode):
                for n, _, label in group:
                    if isinstance(label, dict):             # not a reason
                        label = calibrate_label(label, task.get('value_bias') or {})
                        with suppress(NotInText):           # the student's answer stays
                            answer = record_from_label(space, label, space.tokenizer.decode(texts[n]))
                            outs[n] = with_places(space, texts[n], answer[0], None, None, *answer[2:])
        except Stopped as reason:                           # the student's answers stay
            if str(reason) not in told:
                print(reason, file=sys.stderr)
            told.add(str(reason))
        return outs
    return answer_texts
