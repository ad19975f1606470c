"""A student without torch: one folder with everything that a phone, an edge box or a browser needs to answer.

    python device/export.py config/demo.py                      # out/demo/device
    python device/export.py config/demo.py --keep_tokens=0      # the teacher's whole vocabulary, for any text
    python device/export.py config/demo.py --int8=False --keep_tokens=0    # and every bit of the weights
    python out/demo/device/run.py --text="you are great"        # wants numpy, onnxruntime and tokenizers

Reads out/<name>/, counts the tokens of data/<dataset>/input.jsonl, and measures what was lost on the tenth of
those texts that nothing was trained on. Needs requirements-device.txt.
"""
import importlib.util
import json
import logging
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, data_line, stop
from data import held_out, read_texts, text_hash, write_json
from device.shrink import choose_tokens, fold_table, round_to_int8, trim, trim_tokenizer
from distil.agreement import field_texts, same_values, teacher_forced_sums
from distil.checkpoint import load_checkpoint
from distil.decode import generate
from distil.records import load_records
from distil.space import value_name

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
dataset = ''         # word; data/<dataset> has texts like those it will read
keep_tokens = 40960  # 0..; tokens that stay in the table, see docs/device.md; 0: all
int8 = True          # table and matrices in 8 bits, else in float32
corpus_texts = 200_000  # 1..; texts whose tokens are counted
check_texts = 2000   # 0..; held-out texts on which the answers are compared
config = configure(globals())

HERE = Path(__file__).resolve().parent
RUNNERS = 'run.py', 'student.js', 'index.html', 'worker.js', 'package.json'
FORMAT = 1  # of the folder: the version in task.json that the runners look for

# -----------------------------------------------------------------------------
# the graph


def write_onnx(student, path):
    """the student's forward pass as an ONNX graph of standard operators, which compute the same in every runtime:
    ids (B, T) and which of the B * T positions are asked (M,) -> logits (M, V). 8-bit weights are stored as they
    are, Cast and Mul make numbers of them when the graph is loaded or a row is looked up; activations are never
    rounded, since runtimes differ in how. Operator set 23 has attention and RMSNorm as one operator each, an
    eighth faster than set 20's."""
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    dim = torch.export.Dim
    T = dim('T', min=2, max=student.config.block_size)
    shapes = {'idx': {0: dim('B', max=65536), 1: T}, 'keep': {0: dim('M', max=65536)}}
    example = {'idx': torch.zeros(3, 7, dtype=torch.long), 'keep': torch.tensor([6, 13, 16, 20])}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            student, kwargs=example, dynamic_shapes=shapes, opset_version=23, optimize=False, verbose=False,
            input_names=['ids', 'asked'], output_names=['logits'], dynamo=True, external_data=False)
        program.optimize()  # folds what is constant and small; the 8-bit matrices stay
    model = program.model_proto
    del model.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:  # where in which file of whose machine it came from: a megabyte
        del node.metadata_props[:]
        node.ClearField('doc_string')
    Path(path).write_bytes(model.SerializeToString())


# -----------------------------------------------------------------------------
# the schema, for a reader that has neither tokenizer tricks nor torch


def make_task(name, checkpoint, space, start):
    """what a runner must know, see device/run.py: the automaton with nothing left but its decisions.

    states: at each decision the rows of logits to choose among, what is to be read after each (ids), and the
    decision that comes next, -1 where the answer is complete. ways: for each value of a field the decisions
    that lead to it, [state, which of its choices].
    """
    task, numbers = checkpoint['task'], {}
    prefix, first = space.forced_runs[0]
    todo, states = [first], []
    while todo:
        state = todo.pop(0)
        if state in numbers:
            continue
        numbers[state] = len(numbers)
        states.append((state, list(space.transitions[state].items())))
        todo += [space.forced_runs[after][1] for _, after in states[-1][1] if space.forced_runs[after][1] != space.done]
    numbers[space.done] = -1
    ids = lambda outs: [space.output_ids[o] for o in outs]
    table = [{'field': space.field[state], 'rows': [out for out, _ in moves],
              'read': [ids([out, *space.forced_runs[after][0]]) for out, after in moves],
              'next': [numbers[space.forced_runs[after][1]] for _, after in moves]} for state, moves in states]
    ways = {field: [[[numbers[state], table[numbers[state]]['rows'].index(out)] for state, out, _ in way]
                    for way in of_values] for field, of_values in space.value_paths.items()}
    names = {field: [value_name(value) for value in values] for field, values in space.fields.items()}
    return {'format': FORMAT, 'name': name, 'fields': space.fields, 'names': names,
            'max_text': task['max_text'], 'start': [*start, *ids(prefix)], 'states': table, 'ways': ways,
            'temperature': {field: checkpoint['per_field'][field]['temperature'] for field in space.fields},
            'min_confidence': (checkpoint.get('target') or {}).get('min_confidence')}


# -----------------------------------------------------------------------------
# what was lost


def read_corpus(path, n):
    """the first n texts of an input.jsonl, as (those to count, those held out)."""
    texts = ([], [])
    for text, _, _ in read_texts(path):
        if text:
            texts[int(held_out(text_hash(text)))].append(text)
        if len(texts[0]) + len(texts[1]) == n:
            break
    return texts


def encode_all(tokenizer, texts, max_text):
    """lists of ids, cut to max_text."""
    return [e.ids[:max_text] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def answer_texts(student, space, texts, max_text):
    """{field: JSON text of its value for each text}."""
    return field_texts(space, generate(student, space, encode_all(space.tokenizer, texts, max_text)))


def kl_of(student, shards):
    """mean KL from the teacher, per answer token of the held-out records."""
    with torch.no_grad():
        kl, _, _, steps = teacher_forced_sums(student, shards, shards.split()[1].tolist(), 64)
    return kl / steps


def shrink(student, space, texts, check, max_text, keep_tokens, int8, shards=None):
    """the student in as few bytes as asked for, its OutputSpace, and what that cost: figures on the held-out
    texts of check. texts: those whose tokens are counted."""
    figures = {'texts': len(check)}
    encode = lambda texts: encode_all(space.tokenizer, texts, max_text)
    counts = Counter(i for ids in encode(texts) for i in ids)
    always = {*space.output_ids[:space.n_required], *student.config.start}
    kept = choose_tokens(space.tokenizer, keep_tokens, counts, always)
    folded = fold_table(student)
    rounded = round_to_int8(folded) if int8 else folded
    if shards and int8:
        figures |= {'kl_float32': kl_of(folded, shards), 'kl_int8': kl_of(rounded, shards)}
    tokenizer = trim_tokenizer(space.tokenizer, kept)
    small, small_space = trim(rounded, space, kept, tokenizer)
    if check:
        whole = answer_texts(student, space, check, max_text)
        trimmed = answer_texts(*trim(folded, space, kept, tokenizer), check, max_text)
        ours = answer_texts(small, small_space, check, max_text)
        cut = zip(encode(check), encode_all(tokenizer, check, max_text))
        figures |= {'ids_changed': sum(a != [kept[i] for i in b] for a, b in cut) / len(check),
                    'fields_trimmed': float(same_values(whole, trimmed).mean()),
                    'fields_int8': float(same_values(trimmed, ours).mean()),
                    'fields_same': float(same_values(whole, ours).mean())}
    return small, small_space, figures


# -----------------------------------------------------------------------------
# the card


CARD = '''# {name}: a student

It turns a text into JSON, {n_fields} of these values, in place of `{teacher}`,
whose answers it has learned.

| field | values | agrees with its teacher | always the commonest value would |
|---|---|---|---|
{fields}

Agreement is that of the student as trained, on {records} texts it was not trained on (whole answers:
{exact:.3f}); it was trained on {trained}. Where the teacher is wrong, so is the student. `_confidence` is the
probability that it says what its teacher would, made true on held-out records; it says nothing of texts
unlike those it was trained on. It reads {max_text} tokens (a token is about three quarters of an English word)
and overlooks the rest of a longer text.

What became of it on its way here: {keep_tokens} of {vocab} tokens kept, weights in {bits}; {check}

    pip install numpy "onnxruntime>=1.24" tokenizers
    python run.py --text="a text"     # or a file with a text on each line, or a pipe; --confidence

| file | bytes | |
|---|---|---|
{files}

The teacher's licence and those of the texts it was trained on hold for what was made of them. The prompt it replaces:

{prompt}
'''


def write_card(folder, checkpoint, figures, space, vocab):
    """README.md of the folder. figures: of shrink."""
    task, per_field = checkpoint['task'], checkpoint['per_field']
    what = {'student.onnx': 'its weights and what to do with them', 'task.json': 'its fields, as an automaton',
            'tokenizer.json': 'how a text is cut into tokens', 'run.py': 'answers, in Python',
            'student.js': 'answers, in a browser or in Node', 'index.html': 'a page to try it',
            'worker.js': 'keeps the page for when there is no network',
            'package.json': 'tells Node that student.js is a module'}
    lines = [f'| `{field}` | {", ".join(json.dumps(v, ensure_ascii=False) for v in values)} | '
             f'{per_field[field]["agree"]:.3f} | {per_field[field]["majority"]:.3f} |'
             for field, values in space.fields.items()]
    files = [f'| `{file}` | {(folder / file).stat().st_size:,} | {text} |' for file, text in what.items()]
    check = 'not measured: there were no held-out texts.'
    if 'fields_same' in figures:
        check = (f'on {figures["texts"]:,} held-out texts\n{figures["ids_changed"]:.3f} are cut into other '
                 f'tokens, and {figures["fields_same"]:.4f} of the fields are as before.')
    best = checkpoint['figures']
    card = CARD.format(name=run or name, n_fields=f'{len(space.fields)} fields', teacher=task['teacher'],
                       fields='\n'.join(lines), records=best['records'], exact=best['exact'],
                       trained=f'{checkpoint["n_train"]:,}', max_text=task['max_text'], check=check,
                       keep_tokens=f'{len(space.tokenizer.get_vocab()):,}', vocab=f'{vocab:,}',
                       bits='8 bits' if int8 else 'float32', files='\n'.join(files),
                       prompt='\n'.join('    ' + line for line in task['prompt'].splitlines()))
    (folder / 'README.md').write_text(card, encoding='utf-8')


if __name__ == '__main__':
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        if importlib.util.find_spec(package) is None:
            stop(f'the package {package} is missing; run: pip install -r requirements-device.txt')
    if not name and not run:
        stop('no task; run: python device/export.py config/demo.py')
    out = Path('out', run or name)
    checkpoint, student, space = load_checkpoint(out, 'cpu', which)
    corpus = Path('data', dataset, 'input.jsonl')
    if not corpus.is_file() and keep_tokens:
        stop(f'{corpus} does not exist, so nothing says which tokens to keep; bring it, or set --keep_tokens=0')
    texts, check = read_corpus(corpus, corpus_texts) if corpus.is_file() else ([], [])
    shards = load_records(dataset, name, checkpoint['task'])  # None: they stayed behind
    max_text, vocab = checkpoint['task']['max_text'], student.config.vocab_size
    try:
        small, small_space, figures = shrink(student, space, texts, check[:check_texts], max_text, keep_tokens,
                                             int8, shards)
    except ValueError as error:
        stop(str(error))
    print(data_line('shrink', {'tokens': small.config.vocab_size, 'of': vocab, **figures}))

    folder, tmp = out / 'device', out / 'device.tmp'
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    write_onnx(small, tmp / 'student.onnx')
    small_space.tokenizer.save(str(tmp / 'tokenizer.json'), pretty=False)
    sizes = {file: (tmp / file).stat().st_size for file in ('student.onnx', 'tokenizer.json')}
    task = make_task(run or name, checkpoint, small_space, small.config.start) | {'bytes': sizes}
    write_json(tmp / 'task.json', task)
    for file in RUNNERS:
        shutil.copy(HERE / file, tmp)
    write_card(tmp, checkpoint, figures, small_space, vocab)

    from device.run import Student
    runner, probe = Student(tmp), check[:check_texts] or ['one text', 'another']
    theirs = answer_texts(small, small_space, probe, max_text)
    same = sum(json.dumps(record) == json.dumps({field: json.loads(theirs[field][n]) for field in space.fields})
               for n, record in enumerate(runner(probe)))
    print(data_line('onnx', {'texts': len(probe), 'same_records': same / len(probe)}))
    if same < 0.99 * len(probe):
        stop(f'the graph does not compute what the student does; it is left in {tmp}')
    if (folder / 'npm').is_dir():
        (folder / 'npm').rename(tmp / 'npm')
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    print(data_line('device', {'folder': folder, 'bytes': size}))
    print(f'try it: python {folder}/run.py --text="a text"')
