"""What extract.py does around the asking: checks of its settings, its shard and meta.json, the trial of
torch.compile, the totals it prints.
"""
import json
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tqdm import tqdm

from config import stop
from config.machine import WORLD, can_compile, whole_file
from data import FORMAT, Writer, read_meta, write_json
from distil.calibrate import find_priors
from distil.engine import peak_memory_gb
from distil.free import free_names
from distil.json_schema import is_json_schema, unwrap
from distil.prompts import prompt_text
from distil.candidates import read_locale
from distil.schema import Schema
from distil.server import URL
from distil.space import tokenizer_hash
from distil.teacher import fingerprint, load_tokenizer, verify_records

# -----------------------------------------------------------------------------
# checks of settings


def check_settings(config):
    """exits with a message if settings of extract.py do not fit together."""
    if not config['name'] or not config['dataset']:
        stop('no task; run: python extract.py config/demo.py')
    if config['schema']:
        config['fields'] = read_schema_file(config['schema'])
    try:
        Schema(config['fields'], config['left_out']).check()
    except ValueError as error:
        stop(f'fields: {error}')
    if not all(isinstance(string, str) for string in config['extra_vocab']):
        stop(f'extra_vocab is {config["extra_vocab"]!r}; it must be a list of texts')
    if config['score'] and config['labels']:
        stop('set score or labels, not both')
    if config['label_fields']:
        check_label_fields(config)
    elif config['verify'] and (config['labels'] or config['teacher'].startswith(URL)):
        stop('labels are not a teacher\'s logits: there is nothing to verify')


def read_schema_file(path):
    """the JSON Schema in a file. Exits with a message if there is none."""
    try:
        found = unwrap(json.loads(Path(path).read_text(encoding='utf-8')))
    except OSError as error:
        stop(f'{path} cannot be read: {error.strerror}')
    except (ValueError, RecursionError) as error:
        stop(f'{path} is not JSON: {error}')
    return found if is_json_schema(found) else stop(f'{path} is no JSON Schema of an object with properties')


def check_label_fields(config):
    """exits with a message if label_fields does not fit the other settings."""
    names = config['label_fields']
    if not config['labels']:
        stop('label_fields names the fields that labels give; set labels, too')
    try:
        schema = Schema(config['fields'], config['left_out'])
        schema.only(names)
    except ValueError as error:
        stop(f'label_fields: {error}')
    if all(name in names for name in schema.tree.properties):
        stop('label_fields leaves no field to ask the teacher about; leave it out')
    if not config['constrain'] or config['teacher'].startswith(URL):
        stop('label_fields needs a teacher that runs here, and constrain = True: the labels become part of its answer')


def check_source(given, dataset, prompt):
    """the path of the file of texts. Exits with a message if it is missing, or if the prompt does not hold
    {text} once. given: the setting score, or the first file of labels, '' for data/<dataset>/input.jsonl."""
    source = Path(given or Path('data', dataset, 'input.jsonl'))
    if not source.is_file():
        known = ', '.join(sorted(path.parent.name for path in Path('data').glob('*/prepare.py')))
        advice = f'; run: python data/prepare.py {dataset} FILE (or take a source in data/: {known})'
        if Path('data', dataset, 'prepare.py').is_file():
            advice = f'; run: python data/{dataset}/prepare.py'
        stop(f'{source} does not exist{"" if given else advice}')
    if (n := prompt_text(prompt).count('{text}')) != 1:
        stop(f'the prompt must hold {{text}} once, where the text goes, not {n} times')
    return source


def describe_task(config, server):
    """(what identifies the records of the settings, a dict for meta.json; {field: prior probabilities} of the fields to
    calibrate, or None). server: a Server, or None. Exits with a message if the settings do not fit together."""
    calibration, priors = check_calibration(config)
    keys = ('teacher', 'prompt', 'chat', 'fields', 'indent', 'fence', 'constrain', 'max_text', 'output_vocab',
            'extra_vocab')
    # score is True if answers are given, 'labels' if their probabilities are, see data.answers_from
    task = {key: config[key] for key in keys} | {'score': bool(config['score']), 'calibrate': calibration,
                                                'label_fields': config['label_fields'] or None,
                                                'keep_end': config['keep_end'] or None,
                                                'left_out': config['left_out'] or None, 'free_tokens': None}
    task |= reading_of(config)
    if free_names(config['fields'], config['left_out']) and not (config['labels'] or config['score']):
        task['free_tokens'] = config['free_tokens'] or None
    if config['labels'] and not config['label_fields']:         # serve.py finds a text by the prompt
        task |= {'prompt': config['prompt'] or '{text}', 'chat': False, 'score': 'labels'}
    if server:                                                  # the tokenizer is that of another model
        task |= {'teacher': config['tokenizer'], 'chat': False, 'score': 'labels', 'server': server.identity}
    return task, priors


def reading_of(config):
    """{locale, reference_date} for meta.json: how numbers and dates of a text are read, None without any. Exits with a
    message if that is not known, or if other settings do not go with copied values."""
    try:
        copied = Schema(config['fields'], config['left_out']).copied
    except ValueError as error:
        stop(f'fields: {error}')
    for key, wanted in ('constrain', True), ('score', ''):
        if copied and config[key] != wanted:
            stop(f'{key} = {config[key]} does not go with values that are copied from the text ({copied[0].group}): '
                 f'set {key} = {wanted!r}, or leave them out: left_out = [{copied[0].group!r}]')
    for part in copied:
        if part.keys[0] in config['label_fields']:
            stop(f'label_fields = {config["label_fields"]}: {part.group} is copied from the text, and only fields that '
                 'are chosen can have labels beside a teacher: take it out')
    try:
        kinds = {part.kind for part in copied if not part.is_option} - {'text'}
        if not kinds:
            return {'locale': None, 'reference_date': None}
        if config['reference_date']:
            date.fromisoformat(config['reference_date'])
        return {'locale': read_locale(config['locale']), 'reference_date': config['reference_date'] or None}
    except ValueError as error:
        stop(f'locale = {config["locale"]}, reference_date = {config["reference_date"]}: {error}')
    except ImportError:
        stop('numbers and dates of a text need the package babel, which knows how a locale writes them; run: '
             'pip install babel')


def check_calibration(config):
    """({texts, fields, prior} for meta.json, {field: prior probabilities}) of the settings, or (None, None)
    without calibration. Exits with a message if the settings do not fit together. Given answers and labels
    are never calibrated."""
    if not config['calibrate'] or config['score'] or config['labels'] and not config['label_fields']:
        return None, None
    if not config['constrain']:
        stop('calibrate needs constrain = True: a free answer is not chosen among the values')
    only, prior = config['calibrate_fields'], config['prior']
    try:
        schema = Schema(config['fields'], config['left_out'])
    except ValueError as error:
        stop(f'fields: {error}')
    if config['label_fields']:
        only = only or [path for path, leaf in schema.by_path.items() if leaf.keys[0] not in config['label_fields']
                        and not (leaf.is_list and leaf.choices[0].path != path)]
        if labelled := [name for name in [*only, *prior] if name in config['label_fields']]:
            stop(f'{labelled[0]} has labels, which are not calibrated; take it out of calibrate_fields and prior')
    try:
        priors = find_priors(schema, prior, only)
    except ValueError as error:
        stop(f'prior: {error}')
    return {'texts': config['calibrate'], 'fields': only, 'prior': prior}, priors


# -----------------------------------------------------------------------------
# the shard


def read_task(folder, task):
    """(meta, tokenizers.Tokenizer) of a shard that extract.py has written. Exits with a message if the shard
    belongs to another task. task: dict of the settings that define one."""
    try:
        meta = read_meta(folder)
    except ValueError as error:
        sys.exit(str(error))
    differ = [key for key in task if json.dumps(task[key]) != json.dumps(meta.get(key))]
    if differ or meta['format'] != FORMAT:
        sys.exit(f'{folder} was extracted with another {", ".join(differ) or "format"}; '
                 'choose another name or remove the folder')
    return meta, Tokenizer.from_file(str(folder / 'tokenizer.json'))


def open_writer(folder, space):
    """the Writer of this process's shard, for the answers of an OutputSpace. Exits with a message if another run has it
    or it cannot be written."""
    try:
        return Writer(folder, len(space.output_ids), bool(space.schema.copied))
    except BlockingIOError:
        sys.exit(f'another run is writing to {folder}; wait for it or choose another name')
    except OSError as error:
        sys.exit(f'cannot write to {folder}: {error.strerror}')


def write_meta(folder, meta, model, tokenizer, ask_again=False):
    """writes meta.json and tokenizer.json before the first record. Returns meta with this model's fingerprint
    and the shard's counts so far. Exits with a message if the shard has records of another teacher.

    model: the teacher, None where labels are given; tokenizer: as a JSON text; ask_again: the counts of dropped
    answers start at 0, as all of these texts are asked about again.
    """
    teacher, path, old = meta['teacher'], folder / 'meta.json', {}
    weights = fingerprint(model) if model else 'labels'
    if 'fingerprint' in meta:                                   # the shard has records
        now = weights, tokenizer_hash(load_tokenizer(teacher).backend_tokenizer)
        if now != (meta['fingerprint'], meta['tokenizer_hash']):
            stop(f'{folder} was extracted with other weights or another tokenizer of {teacher}; '
                 'choose another name or remove the folder')
    if path.exists():
        old = read_meta(folder)
    counts = {key: Counter(old.get(key, {})) for key in ('dropped', 'missing', 'timed')}
    meta = {**meta, 'fingerprint': weights, **counts}
    if ask_again:
        meta['dropped'] = Counter()
    with whole_file(folder / 'tokenizer.json', 'make room, and the same command continues') as tmp:
        tmp.write_text(tokenizer, encoding='utf-8')
    write_json(path, meta)
    return meta


# -----------------------------------------------------------------------------
# figures and speed


def try_compiling(engine, costs, n_left):
    """measures whether torch.compile pays off: compiles the teacher's layers after the fourth group if two
    minutes of work are left, and undoes it after the ninth if the sixth to ninth were no faster.

    costs: seconds per token of each group so far; n_left: tokens still to be read.
    """
    if len(costs) == 4 and np.median(costs) * n_left > 120 and can_compile():
        engine.compile()
    elif len(costs) == 9 and engine.compiled:
        before, after = np.median(costs[:4]), np.median(costs[5:])
        engine.compile(after < before)
        tqdm.write(f'compiled: {before / after:.2f} times as fast{"" if engine.compiled else "; undone"}')


def print_filter(counts, task):
    """prints the filter line, and advice if texts are lost because they are equal once cut. counts: of read_groups."""
    refused = [f'{reason}={n}' for reason, n in sorted(counts.items()) if reason != 'kept']
    print(f'filter read={counts.total()} kept={counts["kept"]}', *refused)
    if n := counts['equal_once_cut']:
        which, other = ('last', 'beginnings') if task['keep_end'] else ('first', 'ends')
        print(f'equal_once_cut: {n} texts are left out, because they equal another one in their {which} '
              f'{task["max_text"]} tokens, which are all that is read; raise max_text, or set keep_end = '
              f'{not task["keep_end"]} to read their {other}')


def print_plan(totals, V, n_todo, seconds, server):
    """prints what the whole run will take, by its first texts. totals: of these; V: size of the output vocabulary;
    seconds: they took; server: a Server, or None."""
    gb = n_todo * totals['steps'] / totals['records'] * (2 * V + 10) / 1e9  # of a step: V logits, two floats, an index
    hours = n_todo / totals['records'] / WORLD * seconds / 3600
    memory = peak_memory_gb('cuda' if torch.cuda.is_initialized() else 'cpu')
    cost = f' cost={server.cost_of(n_todo):.4g}' if server else ''
    tqdm.write(f'plan records={n_todo} hours={hours:.3f} disk_gb={gb:.3f} memory_gb={memory:.2f}{cost}')


def check_records(model, shards, space, n):
    """compares n stored records with plain forward passes of the teacher, prints how they differ, and exits: with
    status 1 if they do."""
    rows = np.random.default_rng().choice(len(shards), min(n, len(shards)), replace=False)
    equal, line = verify_records(model, shards, space, rows)
    print(line)
    sys.exit(not equal)


def print_totals(totals):
    """prints the extract line of all processes together. totals: the Counter that extract() returns."""
    parts = [totals]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, totals)
    totals, seconds = sum(parts, Counter()), max(part['seconds'] for part in parts)
    dropped = {key: n for key, n in sorted(totals.items()) if key.startswith('dropped_')}
    print(f'extract records={totals["records"]} rec_s={totals["records"] / seconds:.2f} '
          f'passes={totals["read"] / max(1, totals["needed"]):.3f} '
          f'teacher={totals["asking"] / totals["seconds"]:.2f}', *(f'{k}={n}' for k, n in dropped.items()))
