"""The input of a batch job: the texts of a task, to be labelled by an LLM at half the price.

    python tools/batch.py config/mine.py --out=requests.jsonl --teacher_model=NAME --price_in=0.4 --price_out=1.6
    # upload it (https://platform.openai.com/docs/guides/batch), wait, download the output. Then:
    python extract.py config/mine.py --labels=output.jsonl,requests.jsonl

Takes the texts that extract.py would label and that data/<dataset>/<name>-* does not have yet. A request is the
one that extract.py sends to a teacher behind a URL; the log probabilities that it asks for become soft labels.
"""
import json
import os
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import STARTED_IN, configure, data_line, next_command, stop

from tokenizers import Tokenizer
from tqdm import tqdm

from data import Hashes, read_meta, shard_folders, stored_hashes
from data.lines import read_texts
from data.texts import read_groups
from distil.extraction import check_source, read_schema_file
from distil.prompts import prompt_text
from distil.server import URL, Server
from distil.schema import Schema
from distil.teacher import load_tokenizer

name = ''            # word; texts that data/<dataset>/<name>-* has are left out
dataset = ''         # word; folder under data/ whose input.jsonl is read
fields = {}          # as in extract.py
schema = ''          # file
left_out = []        # properties
prompt = ''          # text or messages; of the user, {text} stands for the text
out = ''             # file; .jsonl that is written
teacher_model = ''   # text; its name at the provider
logprobs = True      # False for a model that refuses log probabilities and a temperature, as reasoning models do
teacher = ''         # as in extract.py; its tokenizer counts, or that of `tokenizer` if it is a URL
tokenizer = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # file
max_records = 0      # 0..; stop after so many texts; 0: all of them
min_text = -1        # -1..; tokens; -1: 3
max_text = 25        # 1..; tokens
too_long = 'refuse'  # 'refuse' or 'cut'; what happens to longer texts, as in extract.py
keep_end = False     # of texts that are cut
price_in = 0.0       # 0..; of a million tokens that are read, without the discount, in any currency ...
price_out = 0.0      # 0..; ... and written
config = configure(globals())

MOST = 50_000, 200e6  # requests, bytes: https://platform.openai.com/docs/guides/batch


def make_request(server, hash_, text):
    """a line of the file, as a dict. server: a distil.server.Server, for the body; hash_: of the text, by which
    its output finds it."""
    return {'custom_id': f'{hash_:016x}', 'method': 'POST', 'url': '/v1/chat/completions',
            'body': server.body(text, False)}


def choose_tokenizer():
    """the tokenizers.Tokenizer that counts the tokens of texts, and the Hashes of texts that have an answer."""
    folders = shard_folders(dataset, name)
    if folders:
        meta = read_meta(folders[0])
        return Tokenizer.from_file(str(folders[0] / 'tokenizer.json')), stored_hashes(folders, meta)
    counter = load_tokenizer(tokenizer if teacher.startswith(URL) or not teacher else teacher).backend_tokenizer
    counter.no_truncation()
    counter.no_padding()
    return counter, Hashes()


if __name__ == '__main__':
    if not name or not dataset or not out:
        stop('no task or no file; run: python tools/batch.py config/mine.py --out=requests.jsonl')
    if not teacher_model:
        stop('teacher_model is missing: the name of the model at the provider')
    try:
        schema = Schema(read_schema_file(schema) if schema else fields, left_out).check()
    except ValueError as error:
        stop(f'fields: {error}')
    source = check_source('', dataset, prompt)
    target = Path(STARTED_IN, out)                              # typed in the user's folder
    tmp = target.with_name(f'{target.name}.tmp')
    if target.exists() and target.samefile(source):
        stop(f'{out} holds the texts; choose another file')
    server = Server([], teacher_model, schema, prompt)
    if not logprobs:
        server.options |= {'logprobs': [None], 'temperature': [None]}
    try:
        counter, done = choose_tokenizer()
    except ValueError as error:                                 # a damaged meta.json
        stop(str(error))
    count = lambda text: len(counter.encode(text, add_special_tokens=False).ids)
    longest = schema.longest()
    n_around, n_answer = count(prompt_text(prompt)) - count('{text}'), count(json.dumps(longest))
    n = n_in = size = 0
    filters = (3 if min_text < 0 else min_text, max_text, 0,
               ('last' if keep_end else 'first') if too_long == 'cut' else '')
    groups = read_groups(read_texts(source), counter, 1024, *filters)
    texts = (text for group in groups for text in group if text[0] not in done)
    try:
        with open(tmp, 'w', encoding='utf-8') as file:
            for hash_, ids, _ in tqdm(islice(texts, max_records or None), desc='batch', unit=' texts'):
                line = json.dumps(make_request(server, hash_, counter.decode(ids.tolist()))) + '\n'
                file.write(line)
                n, n_in, size = n + 1, n_in + n_around + len(ids), size + len(line)
        if not n:
            stop(f'every text of {source} that passes the filter has an answer already')
        os.replace(tmp, target)
    except OSError as error:
        stop(f'cannot write {out}: {error.strerror}')
    finally:
        tmp.unlink(missing_ok=True)
    cost = (n_in * price_in + n * n_answer * price_out) / 1e6 / 2  # half the price
    print(data_line('batch', {'requests': n, 'tokens_in': n_in, 'tokens_out': n * n_answer, 'mb': size / 1e6,
                              'cost': cost}))
    print('an estimate: the prompt, the texts and the longest answer, in tokens of the student, at half the price')
    if n > MOST[0] or size > MOST[1]:
        print(f'OpenAI takes {MOST[0]:,} requests and {MOST[1] / 1e6:.0f} MB a file: split -l {MOST[0]} {out}')
    print(f'next, with what it returns: {next_command("extract.py")} --labels=OUTPUT.jsonl,{out}')
