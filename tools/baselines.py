"""The usual ways of decoding, for comparison: transformers' generate for the teacher, one token per pass for
the student."""
import math

import torch
from transformers import LogitsProcessor

from distil.decode import Cache, answer_ids, input_ids


class SchemaProcessor(LogitsProcessor):
    """constrains generate to the schema, as the teacher's engine does."""

    def __init__(self, space, n_prompt):
        self.space, self.n_prompt = space, n_prompt

    def __call__(self, input_ids, scores):
        masked = torch.full_like(scores, -math.inf)             # (B, whole vocabulary)
        for r, ids in enumerate(input_ids[:, self.n_prompt:].tolist()):
            state = self.space.state_after([self.space.output_index.get(i, -1) for i in ids])
            legal = [self.space.output_ids[o] for o in self.space.transitions[state]] if state >= 0 else []
            legal = legal or [0]  # the answer is complete
            masked[r, legal] = scores[r, legal]
        return masked


@torch.inference_mode()
def generate_constrained(model, space, task, texts, constrain=True):
    """what people do without this project: model.generate with the whole prompt, on all texts (lists of ids)
    at once, constrained to the schema, with its logits kept. Returns lists of output indices, -1 for a token
    outside the output vocabulary. task: dict with the ids before and after the text."""
    end_ids, other_ids = set(), set()
    for row in space.transitions:
        for o, state in row.items():
            (end_ids if state == space.done else other_ids).add(space.output_ids[o])
    rows = [[*task['before'], *map(int, ids), *task['after']] for ids in texts]
    width = max(map(len, rows))
    padding = [[0] * (width - len(row)) for row in rows]  # on the left
    idx = torch.tensor([pad + row for pad, row in zip(padding, rows)], device=model.device)
    mask = torch.tensor([pad + [1] * len(row) for pad, row in zip(padding, rows)], device=model.device)
    out = model.generate(idx, attention_mask=mask, max_new_tokens=space.max_answer, do_sample=False,
                         output_logits=True, return_dict_in_generate=True, pad_token_id=0,
                         eos_token_id=list(end_ids - other_ids) or None,
                         logits_processor=[SchemaProcessor(space, width)] if constrain else None)
    return [[space.output_index.get(i, -1) for i in row] for row in out.sequences[:, width:].tolist()]


@torch.no_grad()
def stepwise(student, space, texts, constrain=True):
    """decodes with one forward pass per token, all texts in one batch until the last answer is complete.
    texts: lists of ids. Returns lists of output indices."""
    device = student.lm_head.weight.device
    legal, cache, live = space.next_state.to(device) >= 0, Cache(student), list(range(len(texts)))
    states, outs, at = [0] * len(texts), [[] for _ in texts], [student.config.n_prompt] * len(texts)
    id_of = answer_ids(student, space)
    feed = [[*text, *student.config.start] for text in input_ids(student, space, texts)]
    while live:
        counts = [len(feed[i]) for i in live]
        pos, keep = cache.place_tokens(live, [at[i] for i in live], counts, [1] * len(live))
        idx = torch.tensor([[token for i in live for token in feed[i]]], device=device)  # (1, N)
        logits = student(idx, cache=cache, pos=pos, keep=keep).float()  # (R, V)
        if constrain:
            logits = logits.masked_fill(~legal[[states[i] for i in live]], -math.inf)
        for i, out in zip(live, logits.argmax(-1).tolist()):
            outs[i].append(out)
            at[i] += len(feed[i])
            feed[i], states[i] = [id_of[out]], space.state_after([out], states[i])
        live = [i for i in live if states[i] not in (-1, space.done)]
    return outs
