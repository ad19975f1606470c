"""What people do without this project, for comparison: decode the teacher with transformers' generate,
decode a student with one token per pass, fine-tune an encoder on the bare labels."""
import json
import math
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LogitsProcessor

from config.machine import pick_dtype
from data import batches
from distil.agreement import field_texts, measure_members, same_values
from distil.decode import Cache, Row, choose, mask_illegal, pad_rows
from distil.places import place_input
from distil.reader import encode_pages, encode_texts, load_encoder, read_pages
from distil.schema import members
from distil.values import json_text
from tools.tagger import Tags


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
    """what people do without this project: model.generate with the whole prompt, on all texts (lists of
    ids) at once, constrained to the schema, with its logits kept. Returns lists of output indices, -1 for
    a token outside the output vocabulary. task: dict with the ids before and after the text."""
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
    states, n_read, fed = [0] * len(texts), [0] * len(texts), [[student.config.output_vocab] for _ in texts]
    (unread, pages), V = read_pages(student, space, texts), student.config.output_vocab
    rows = [Row(i, [], [], [], [0], page) for i, page in enumerate(pages)]
    outs = [row.outs for row in rows]
    for i in live if space.schema.copied else ():               # such a student reads decisions alone
        outs[i] += space.forced_runs[0][0]
        states[i] = space.forced_runs[0][1]
    begun = False
    while live:
        cache.begin_pass(live, [n_read[i] for i in live])
        text, begun = pad_rows([] if begun else unread, device), True  # of all in the first pass, then of none
        answer = pad_rows([fed[i] for i in live], device)
        logits = student(text, answer, cache, only_last=True).float()  # (R, V), with places (R, V + 1 + T)
        if constrain:
            logits = mask_illegal(logits, legal[[states[i] for i in live]], space, [(rows[i], states[i]) for i in live])
        for i, out in zip(live, choose(logits, V).tolist()):
            n_read[i] += len(fed[i]) if n_read[i] else len(unread[i]) + 1
            fed[i] = [out]
            if out > V:
                rows[i].places.append(out - V - 1)
                fed[i] = [place_input(V, out - V - 1, len(rows[i].places) % 2 == 0)]
                out = space.place_symbol(states[i]) if states[i] in space.copy_at else -1
            outs[i].append(out)
            states[i] = space.state_after([out], states[i])
            if pages[i] and states[i] >= 0:
                run, states[i] = space.forced_runs[states[i]]
                outs[i] += run
        live = [i for i in live if states[i] not in (-1, space.done)]
    return [row.answer(space) for row in rows]


# -----------------------------------------------------------------------------
# an encoder on the bare labels


class Classifier(nn.Module):
    """an encoder (distil/reader.py), a linear head per field on the mean of its states, and one for tags on each"""

    def __init__(self, encoder, counts, n_tags):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.config.n_embd, n) for n in counts)
        self.tag = nn.Linear(encoder.config.n_embd, n_tags)

    def forward(self, rows):
        """rows: lists of the encoder's ids -> (logits of each field, (B, its number of values) each; of the tags, (all
        tokens, number of tags))"""
        text = pad_rows(rows, self.tag.weight.device)      # (B, T)
        states, used = self.encoder(text), text >= 0            # (B, T, C), (B, T)
        mean = (states * used[..., None]).sum(1) / used.sum(1, keepdim=True)  # (B, C)
        return [head(mean) for head in self.heads], self.tag(states[used])


def encoder_baseline(shards, space, train_rows, rows, name, device, dtype, max_epochs=6, batch_size=32, lr=1e-4,
                     seed=1337):
    """fine-tunes the encoder `name` with a linear head per field on the teacher's values in train_rows,
    and measures its agreement in rows; copied values by tags (tagger.py). Returns {field, exact, minutes}.

    The usual recipe (Devlin et al. 2019, https://arxiv.org/abs/1810.04805): all weights are trained with
    AdamW at a rate that rises for a tenth of the steps and then falls to 0; heads start from nothing, at
    ten times that rate. The last epoch counts.
    """
    torch.manual_seed(seed)
    start, encoder = time.perf_counter(), load_encoder(name)
    decoded = lambda split: space.tokenizer.decode_batch([shards.ids(i).tolist() for i in split])
    outs_of = lambda split: [shards.outs(i) for i in split]
    tags = Tags(space, outs_of(train_rows) if space.schema.copied else [])

    def encode(split):
        """(ids of each text, its tokens' starts and ends, and the text)"""
        texts = decoded(split)
        if not space.schema.copied:
            return encode_texts(encoder, texts, encoder.config.n_pos), [], [], texts
        ids, pages = encode_pages(encoder, space, texts, encoder.config.n_pos)
        return ids, [page.starts.tolist() for page in pages], [page.ends.tolist() for page in pages], texts
    values = lambda split: field_texts(space, outs_of(split))
    (texts, starts, ends, _), of_train = encode(train_rows), values(train_rows)
    tag_rows = [tags.label(*of_text) for of_text in zip(starts, ends, outs_of(train_rows))]
    kinds = {field: sorted(set(of_train[field])) for field in space.schema.paths if field not in tags.paths}
    # of a list one head against the rest for each member
    lists = {leaf.path for leaf in space.schema.leaves if leaf.is_list and leaf.path in kinds}
    kinds |= {field: sorted({member for text in of_train[field] for member in members(text)}) for field in lists}

    def label_of(field, value):
        if field in lists:
            return [float(member in members(value)) for member in kinds[field]]
        return kinds[field].index(value)
    labels = [torch.tensor([label_of(field, value) for value in of_train[field]], device=device)
              for field in kinds]                               # (N,) each, (N, members) of a list
    model = Classifier(encoder, map(len, kinds.values()), len(tags.tags)).to(device).train()
    optimizer = torch.optim.AdamW([{'params': model.encoder.parameters(), 'share': 1},
                                   {'params': [*model.heads.parameters(), *model.tag.parameters()], 'share': 10}],
                                  weight_decay=0.01, fused=True)
    lengths, n_steps = np.array([len(row) for row in texts]), max_epochs * math.ceil(len(texts) / batch_size)
    order = (part for epoch in range(max_epochs) for part in batches(lengths, batch_size, seed, epoch))
    autocast = torch.autocast(device, torch.bfloat16, enabled=pick_dtype(dtype, device) == torch.bfloat16)
    for step, part in enumerate(tqdm(order, total=n_steps, desc='encoder', unit='step')):
        for group in optimizer.param_groups:
            group['lr'] = lr * group['share'] * min((step + 1) / n_steps * 10, (n_steps - step) / n_steps / 0.9)
        with autocast:
            logits, of_tags = model([texts[i] for i in part])
        loss = sum(F.binary_cross_entropy_with_logits(of_field.float(), label[part]) if field in lists and kinds[field]
                   else F.cross_entropy(of_field.float(), label[part]) if field not in lists else 0.0
                   for field, of_field, label in zip(kinds, logits, labels))
        if tag_rows:
            loss = loss + F.cross_entropy(of_tags.float(), torch.tensor(
                [number for i in part for number in tag_rows[i]], device=device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    minutes = (time.perf_counter() - start) / 60
    found, model = {field: [] for field in kinds}, model.eval()
    with torch.no_grad():
        (texts, starts, ends, strings), told = encode(rows), []
        for first in range(0, len(texts), 128):
            of_fields, of_tags = model(texts[first:first + 128])
            told += of_tags.argmax(-1).tolist()
            for (field, of_field), logits in zip(kinds.items(), of_fields):
                if field in lists:
                    order = space.schema.leaf(field).texts or of_field
                    found[field] += [json_text([json.loads(member) for member in sorted(
                        (of_field[n] for n in row.nonzero()[:, 0].tolist()), key=order.index)]) for row in logits > 0]
                else:
                    found[field] += [of_field[n] for n in logits.argmax(-1).tolist()]
    if tags.paths:
        told = iter(told)
        found |= tags.answers(strings, starts, ends, [[next(told) for _ in row] for row in texts])
    theirs, lists = values(rows), {leaf.path for leaf in space.schema.leaves if leaf.is_list}
    hits = same_values(found, theirs)                           # (N, fields)
    micro_f1 = {f'encoder_micro_f1_{field}': measure_members(found[field], theirs[field])['micro_f1']
                for field in found if field in lists}
    return {'encoder_field': float(hits.mean()), 'encoder_exact': float(hits.all(1).mean()), 'minutes': minutes,
            **micro_f1}
