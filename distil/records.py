"""The records a student is trained on: opened, and checked before the first step."""
import math

import numpy as np
import torch
import torch.nn.functional as F

from config import next_command, stop
from data import Shards, answers_from
from distil.agreement import field_texts, read_truth
from distil.schema import members, true_value
from distil.values import MISSING, json_text
from distil.split import count_near, hold_out_file, split_of

SEEN = 100  # so often a value should be seen in training, on average


def open_shards(dataset, name):
    """the Shards of a task. Exits with a message if there are none, or if they do not belong together."""
    try:
        return Shards(dataset, name)
    except FileNotFoundError as error:
        stop(f'{error}; run: {next_command("extract.py")}')
    except ValueError as error:
        stop(str(error))


def open_records(config):
    """(Shards, record numbers to train on, record numbers to evaluate on) of a task. Exits with a message if
    there are none, or if a split that people made leaves none to one of the two. config: the settings of
    train.py."""
    shards = open_shards(config['dataset'], config['name'])
    if config['held_out']:
        hold_out_file(config['held_out'], shards)
    train_rows, val_rows = shards.split()
    n_train, n_val = len(train_rows), len(val_rows)
    if shards.own_split is not None and not (n_train and n_val):
        stop(f'{len(shards)} records, none of them held out: the texts of the test part have no record yet; extract '
             'more' if n_train else f'all {n_val} records are held out, none is left to train on; extract more, or '
             'correct the split')
    most = config['max_records']
    if most and (n_left := int((train_rows >= most).sum())):
        print(f'max_records = {most}: {n_left} records after the first {most} are not trained on; --max_records=0 '
              'takes all')
    return shards, *choose_rows(shards, most, config['eval_records'], config['train_on'])


def choose_rows(shards, max_records, eval_records, train_on):
    """(record numbers to train on, record numbers to evaluate on). The arguments are settings of train.py."""
    train_rows, val_rows = shards.split()
    if max_records:
        train_rows = train_rows[train_rows < max_records]
    if train_on == 'right':
        n, train_rows = len(train_rows), find_right(shards, train_rows, shards.folder.parent / 'input.jsonl')
        print(f'train_on = right: {len(train_rows)} of {n} records; all held-out ones stay')
        if not len(train_rows):
            stop('the teacher is right in none of them')
    if eval_records:  # the same ones for every seed
        val_rows = val_rows[np.random.default_rng(0).permutation(len(val_rows))[:eval_records]]
    return train_rows, val_rows


def find_right(shards, rows, path):
    """those of the rows whose answer is known to be right: the truth of the text, in the .jsonl at path, has some
    fields, and the answer the same values in them. Exits with a message if there is no truth."""
    space = shards.open_space()
    if not path.is_file() or not (truth := read_truth(path, shards, rows)):
        stop(f'train_on = right needs texts with "truth" in {path}')
    right = []
    for n, known in truth.items():
        answer = space.to_json(shards.outs(rows[n]))
        told = [(leaf, value) for leaf in space.schema.leaves if (value := true_value(leaf, known)) is not MISSING]
        if told and all(json_text(leaf.get(answer)) == json_text(value) for leaf, value in told):
            right.append(n)
    return rows[sorted(right)]


def load_records(dataset, name, checkpoint):
    """the Shards that a finished student was trained on, with its split, or None if they are not here. Exits with a
    message if they belong to another one. checkpoint: the student's."""
    try:
        shards = Shards(dataset, name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        stop(str(error))
    if any(shards.meta[key] != checkpoint['task'][key] for key in ('tokenizer_hash', 'output_ids')):
        stop(f'{shards.folder} and this student have different tokenizers or output vocabularies; '
             'train again')
    shards.own_split = split_of(checkpoint)
    return shards


def check_sizes(config, meta, n_train, n_val):
    """exits with a message if there are too few records, or if they do not fit the student. config: the
    settings of train.py; meta: the meta.json of the records."""
    batch_size, block_size = config['batch_size'], config['block_size']
    if n_train < batch_size or not n_val:
        stop(f'{n_train} records to train on and {n_val} held out are too few for '
             f'batch_size = {batch_size}; extract more')
    needed = meta['max_text'] + meta['max_answer']
    if needed > block_size:
        stop(f'a text may have {meta["max_text"]} tokens, and its answer {meta["max_answer"]}; '
             f'set block_size = {needed} or more')


def check_data(shards, space, train_rows, val_rows, rng):
    """compares a sample of stored answers with the stored logits, and the two splits with each other. Returns
    the figures of the check line; exits with a message if the files do not belong together.

    teacher_ce is the cross-entropy of a student equal to its teacher, in nats per answer token.
    """
    n_wrong = n_steps = ce = 0
    for i in rng.permutation(train_rows)[:1000]:
        outs, logits = shards.answer(i).tolist(), torch.from_numpy(shards.logits(i))  # (n,), (n, V)
        states = space.states_before(outs)
        kept = [n for n, state in enumerate(states) if state not in space.copy_at]  # tokens, no places
        legal, logits, targets = space.next_state[states][kept] >= 0, logits[kept], torch.tensor(outs)[kept]
        best = logits.masked_fill(~legal, -math.inf).amax(-1)   # (n,)
        n_wrong += (best - logits.gather(1, targets[:, None])[:, 0] > 0.02).sum().item()  # precision of fp16
        ce += F.cross_entropy(logits, targets, reduction='sum').item()
        n_steps += len(kept)
    if n_wrong > 1e-3 * n_steps and answers_from(shards.meta) == 'teacher':
        stop(f'{n_wrong} of {n_steps} stored tokens are not the teacher\'s likeliest legal one; '
             f'the files of {shards.folder} do not belong together')
    texts = [{shards.ids(i).tobytes() for i in rows} for rows in (train_rows, val_rows)]
    overlap = len(texts[0] & texts[1])
    if overlap:
        stop(f'{overlap} held-out texts are also trained on; extract again')
    def answered(rows):                                         # a text and its answer each
        decoded = space.tokenizer.decode_batch([shards.ids(i).tolist() for i in rows])
        return [(text, shards.answer(i).tobytes()) for text, i in zip(decoded, rows)]
    near = count_near(answered(train_rows), answered(val_rows)) / len(val_rows)
    if near > 0.05:
        print(f'note: {near:.0%} of the held-out texts are also trained on, but for case, punctuation and numbers: the '
              'figures flatter')
    return {'stored_tokens': 1 - n_wrong / n_steps, 'teacher_ce': ce / n_steps, 'overlap': overlap,
            'near_overlap': near}


def note_rare_values(shards, space, train_rows, val_rows, max_epochs):
    """prints where a field has so many values, or the task so few records, that a training fails or its figures
    mean little: fewer than SEEN examples of a value in all epochs, values without a held-out record."""
    held_out = field_texts(space, [shards.outs(i) for i in val_rows])
    for leaf in space.schema.leaves:
        seen = len(train_rows) * max_epochs / max(1, len(leaf))
        if len(leaf) > 1 and seen < SEEN and not leaf.is_list:
            epochs = math.ceil(2 * SEEN * len(leaf) / len(train_rows))
            print(f'note: each of the {len(leaf)} values of {leaf.path} is seen about {seen:.0f} times in {max_epochs} '
                  f'epochs, which is few: --max_epochs={epochs}, or label more')
        found = {text for value in held_out[leaf.path] for text in (members(value) if leaf.is_list else [value])}
        if n := len({*leaf.texts} - found):
            print(f'note: {n} of {len(leaf)} values of {leaf.path} have no held-out record; the figures say nothing '
                  'of them')
