"""Exports a student as one folder that answers without torch: on a phone, on an edge box or in a browser.

    python device/export.py config/demo.py                      # out/demo/device
    python device/export.py config/demo.py --check=texts.txt    # measures what it loses on these texts
    python device/export.py config/demo.py --keep_tokens=0      # the teacher's whole vocabulary, for any text
    python device/export.py config/demo.py --int8=False --keep_tokens=0    # and weights in float32
    python out/demo/device/run.py --text="you are great"        # needs numpy, onnxruntime and tokenizers

It reads out/<name>/, counts the tokens of data/<dataset>/input.jsonl, and measures on the held-out ones of
those texts, or on the texts of --check, what the export loses. It needs requirements-device.txt.
"""
import copy
import fcntl
import importlib.util
import json
import logging
import shutil
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before torch, see config/machine.py
from config import configure, data_line, stop
from config.machine import on_stop, stop_anyway

import torch
import torch.nn as nn

from data import held_out, write_json
from data.lines import read_texts, text_hash
from device.shrink import choose_tokens, fold_table, round_to_int8, trim_student, trim_tokenizer
from device.task import make_task
from distil.agreement import field_texts, same_values, teacher_forced_sums
from distil.checkpoint import load_checkpoint
from distil.decode import generate
from distil.prompts import prompt_text
from distil.records import load_records
from distil.split import split_of
from distil.space import clean, kept_part
from distil.values import said

name = ''            # word; out/<name> is the student ...
run = ''             # word; ... or out/<run>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
dataset = ''         # word; data/<dataset> has texts like those that the student will read
keep_tokens = 65536  # 0..; tokens that stay in the table, see docs/device.md; 0: all
int8 = True          # table and matrices in 8 bits; False: in float32
corpus_texts = 200_000  # 1..; texts whose tokens are counted
check_texts = 2000   # 0..; texts on which the answers before and after are compared
check = ''           # file; it has these texts, one per line or a .jsonl; empty: held-out ones of the dataset
config = configure(globals())

HERE = Path(__file__).resolve().parent
CHECK_PASSES = 8000  # forward passes, about, in which the runner's answers are compared with the student's
RUNNERS = 'run.py', 'student.js', 'places.js', 'candidates.js', 'index.html', 'worker.js', 'package.json'
SHARED = 'places.py', 'candidates.py', 'options.py', 'values.py'  # of distil/, which run.py imports


def copy_runners(folder):
    """puts the programs that need no torch into a folder."""
    for file in RUNNERS:
        shutil.copy(HERE / file, folder)
    (folder / 'distil').mkdir()
    for file in SHARED:
        shutil.copy(HERE.parent / 'distil' / file, folder / 'distil')

# -----------------------------------------------------------------------------
# the graph


class Given(nn.Module):
    """in the place of a student's encoder: states (B, T, C) that it has read before."""

    def __init__(self):
        super().__init__()
        self.states = []

    def forward(self, text):
        return self.states.pop()


class Reader(nn.Module):
    """the part of a student that reads the text: text (B, T) -> states (B, T, C)."""

    def __init__(self, student):
        super().__init__()
        self.encoder, self.encoder_proj = student.encoder, student.encoder_proj

    def forward(self, text):
        return self.encoder_proj(self.encoder(text))


class Writer(nn.Module):
    """the part of a student that writes the answer: text (B, T), answer (B, T) and, if it has an encoder, states
    (B, T, C) -> logits (B, V), or (B, V + 1 + T) if it can point to the text."""

    def __init__(self, student):
        super().__init__()
        self.student = copy.copy(student)
        if student.encoder:
            self.student._modules = {**student._modules, 'encoder': Given(), 'encoder_proj': nn.Identity()}

    def forward(self, text, answer, states=None):
        if states is not None:
            self.student.encoder.states.append(states)
        return self.student(text, answer, only_last=True)


def write_onnx(student, path):
    """writes a student's forward pass as ONNX graphs: student.onnx, a Writer, and for an encoder reader.onnx, a Reader,
    so that each text is read once, not before each decision. path: of student.onnx; the other one is beside it. Returns
    the names of the files. -1 pads text and answer, which are at least two tokens wide."""
    path = Path(path)
    B, T, A = (torch.export.Dim(name, min=least, max=most) for name, least, most in (
        ('B', 1, 65536), ('T', 2, student.config.block_size), ('A', 2, student.config.block_size)))
    text, answer = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
    inputs = {'text': (text, {0: B, 1: T}), 'answer': (answer, {0: B, 1: A})}
    if student.encoder:
        write_graph(Reader(student), {'text': inputs['text']}, 'states', path.with_name('reader.onnx'))
        inputs['states'] = torch.zeros(3, 7, student.config.n_embd), {0: B, 1: T}
    write_graph(Writer(student), inputs, 'logits', path)
    return [path.name, 'reader.onnx'][:1 + bool(student.encoder)]


def write_graph(module, inputs, output, path):
    """writes a module as an ONNX graph. inputs: {name: (example, {dimension: torch.export.Dim})}; output: its name.
    All operators are standard ones, so every runtime computes the same. 8-bit weights are stored as int8; Cast and Mul
    turn them into float32 when the graph is loaded or a row is looked up. Activations are never rounded, since runtimes
    differ in how they do it. Operator set 23 has attention and RMSNorm as one operator each, an eighth faster than set
    20's."""
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with stop_anyway():
            program = torch.onnx.export(
                module.eval(), kwargs={name: example for name, (example, _) in inputs.items()},
                dynamic_shapes={name: dims for name, (_, dims) in inputs.items()}, opset_version=23, optimize=False,
                verbose=False, input_names=[*inputs], output_names=[output], dynamo=True, external_data=False)
            program.optimize()  # folds small constants; the 8-bit matrices stay
    model = program.model_proto
    del model.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:  # the source lines and paths that it came from: a megabyte
        del node.metadata_props[:]
        node.ClearField('doc_string')
    path.write_bytes(model.SerializeToString())


@contextmanager
def new_folder(path):
    """context: an empty folder to write to, which is removed if an error or a signal ends it. Exits with a message if
    a file cannot be written."""
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        yield
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            stop(f'cannot write {error.filename or path}: {error.strerror or error}; an earlier export is kept')
        raise


# -----------------------------------------------------------------------------
# what the export loses


def read_corpus(path, n, own_split=None):
    """the first n texts of an input.jsonl, as (texts to count, held-out texts). own_split: see data.held_out."""
    texts = list(islice((text for text, _, _ in read_texts(path) if text), n))
    is_held_out = held_out([text_hash(text) for text in texts], own_split)
    return tuple([text for text, held in zip(texts, is_held_out) if held == part] for part in (False, True))


def read_check(path, counted, n):
    """the first n texts of a file that are not among those counted. A .jsonl has {"text": ...} per line, any
    other file a text. Exits with a message if the file has no such text."""
    try:
        with open(path, 'rb') as file:
            texts = (text for text, _, _ in read_texts(path)) if path.endswith('.jsonl') else (
                clean(line.decode('utf-8', 'replace')) for line in file)
            skipped = {'', *counted}
            checked = list(islice((text for text in texts if text not in skipped), n))
    except OSError as error:
        stop(f'{path} cannot be read: {error.strerror}')
    if not checked and n:
        stop(f'{path} has no text to check that was not counted; give it one text per line, or end its name '
             'in .jsonl and give it one {"text": ...} per line')
    return checked


def cut_texts(tokenizer, texts, part):
    """a list of ids for each text, cut to this part (a slice; None: not cut)."""
    return [e.ids[part or slice(None)] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def label_texts(student, space, texts, part):
    """{field: [the value for each text, as a JSON text]}."""
    return field_texts(space, generate(student, space, cut_texts(space.tokenizer, texts, part)))


def measure_kl(student, space, shards):
    """mean KL(teacher || student) per answer token of the held-out records, in nats."""
    with torch.no_grad():
        kl, _, _, steps = teacher_forced_sums(student, space, shards, shards.split()[1].tolist(), 64)
    return kl / steps


def shrink_student(student, space, texts, check, part, keep_tokens, int8, shards=None):
    """(the student with keep_tokens tokens, in 8 bits if int8; its OutputSpace; figures of what that cost, on
    the texts `check`). The tokens of `texts` are counted. ValueError if keep_tokens is too small."""
    figures = {'texts': len(check)}
    if student.encoder:                                         # its vocabulary is small: nothing to trim
        small = round_to_int8(student) if int8 else student
        if shards and int8:
            figures |= {'kl_float32': measure_kl(student, space, shards),
                        'kl_int8': measure_kl(small, space, shards)}
        if check:
            before, after = (label_texts(model, space, check, None) for model in (student, small))
            figures['fields_same'] = float(same_values(before, after).mean())
        return small, space, figures
    encode = lambda texts: cut_texts(space.tokenizer, texts, part)
    counts = Counter(i for ids in encode(texts) for i in ids)
    always = {*space.output_ids[:space.n_required], student.config.start_id}
    kept = choose_tokens(space.tokenizer, keep_tokens, counts, always)
    folded = fold_table(student)
    rounded = round_to_int8(folded) if int8 else folded
    if shards and int8:
        figures |= {'kl_float32': measure_kl(folded, space, shards),
                    'kl_int8': measure_kl(rounded, space, shards)}
    tokenizer = trim_tokenizer(space.tokenizer, kept)
    small, small_space = trim_student(rounded, space, kept, tokenizer)
    if check:
        before = label_texts(student, space, check, part)
        trimmed = label_texts(*trim_student(folded, space, kept, tokenizer), check, part)
        after = label_texts(small, small_space, check, part)
        encodings = zip(encode(check), cut_texts(tokenizer, check, part))
        figures |= {'ids_changed': sum(a != [kept[i] for i in b] for a, b in encodings) / len(check),
                    'fields_trimmed': float(same_values(before, trimmed).mean()),
                    'fields_int8': float(same_values(trimmed, after).mean()),
                    'fields_same': float(same_values(before, after).mean())}
    return small, small_space, figures


# -----------------------------------------------------------------------------
# the model card


CARD = '''# {name}: a student

It turns a text into JSON with {n_fields}. It replaces `{teacher}`,
its teacher, whose answers it was trained on.

| field | values | agreement with the teacher | majority baseline |
|---|---|---|---|
{fields}

The agreement was measured before the export, on {records} held-out texts (whole answers: {exact:.3f}). The
majority baseline always answers the commonest value. The student was trained on {trained} texts. Where the
teacher is wrong, the student is wrong too. `_confidence` is the probability that its answer equals the
teacher's, calibrated on held-out records. It is not reliable for texts unlike those it was trained on. The
student reads the {which} {max_text} tokens of a text and ignores the rest (a token is about three quarters of
an English word).

The export kept {keep_tokens} of {vocab} tokens, and the weights in {bits}. {loss}

    pip install numpy "onnxruntime>=1.24" tokenizers
    python run.py --text="a text"     # or a file with one text per line, or a pipe; --confidence

| file | bytes | |
|---|---|---|
{files}

The licences of the teacher and of the training texts also apply to the student. The prompt that it replaces:

{prompt}
'''


def describe_values(leaf, copied=''):
    """the values of a leaf in the table of the card. copied: what kind of copied value it is, in words."""
    values = copied or ', '.join(map(said, leaf.values))
    if leaf.is_list:
        return f'a list of {values}' if values else f'a list of up to {len(leaf.choices)} items'
    return values


def write_card(folder, checkpoint, figures, source, space, n_tokens, vocab):
    """writes the model card, README.md of the folder. figures: those of shrink_student. source: the texts
    that they were measured on, in words. n_tokens, vocab: number of tokens after and before the export."""
    task, per_field = checkpoint['task'], checkpoint['per_field']
    max_text = json.loads((folder / 'task.json').read_text(encoding='utf-8'))['max_text']
    purpose = {'student.onnx': 'the network and its weights', 'reader.onnx': 'the part of it that reads the text',
               'task.json': 'the fields, as an automaton', 'tokenizer.json': 'cuts a text into tokens',
               'run.py': 'answers, in Python', **{f'distil/{file}': 'a part of run.py' for file in SHARED},
               'student.js': 'answers, in a browser or in Node', 'places.js': 'a part of student.js',
               'candidates.js': 'another part', 'index.html': 'a page to try it',
               'worker.js': 'stores the page, so that it works without a network',
               'package.json': 'declares student.js as a module, for Node'}
    copied = {part.group: part.describe() for part in space.schema.copied}
    lines = [f'| `{leaf.path}` | {describe_values(leaf, copied.get(leaf.path, ""))} | '
             f'{per_field[leaf.path]["agree"]:.3f} | {per_field[leaf.path]["majority"]:.3f} |'
             for leaf in space.schema.leaves]
    files = [f'| `{file}` | {(folder / file).stat().st_size:,} | {text} |' for file, text in purpose.items()
             if (folder / file).is_file()]
    loss = 'What that changes was not measured: there were no texts to check.'
    if 'fields_same' in figures:
        cut = ''
        if 'ids_changed' in figures:  # an encoder's tokens are all kept
            cut = f'a share of {figures["ids_changed"]:.3f} of them is cut into other tokens,\nand '
        loss = (f'This was measured\non {source}: {cut}{figures["fields_same"]:.4f} of their fields are '
                'unchanged. Texts from elsewhere may lose more:\n'
                '`python device/export.py --check=FILE` measures it on yours.')
    best = checkpoint['figures']
    card = CARD.format(name=run or name, n_fields=f'{len(space.schema.leaves)} fields', teacher=task['teacher'],
                       fields='\n'.join(lines), records=best['records'], exact=best['exact'],
                       trained=f'{checkpoint["n_train"]:,}', max_text=max_text, loss=loss,
                       which='last' if task.get('keep_end') else 'first',
                       keep_tokens=f'{n_tokens:,}', vocab=f'{vocab:,}',
                       bits='8 bits' if int8 else 'float32', files='\n'.join(files),
                       prompt='\n'.join('    ' + line for line in prompt_text(task['prompt']).splitlines()))
    (folder / 'README.md').write_text(card, encoding='utf-8')


if __name__ == '__main__':
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        if importlib.util.find_spec(package) is None:
            stop(f'the package {package} is missing; run: pip install -r requirements-device.txt')
    if not name and not run:
        stop('no task; run: python device/export.py config/demo.py')
    out = Path('out', run or name)
    checkpoint, student, space = load_checkpoint(out, 'cpu', which)
    if space.has_options:
        stop('options of each text are read by sample.py and serve/ alone: a folder for devices cannot have them yet')
    try:
        lock = open(out / 'export.lock', 'w')  # until the program ends: both would write the same folder
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f'another export is writing to {out}/device; wait for it')
    except OSError as error:
        stop(f'cannot write to {out}: {error.strerror}')
    corpus = Path('data', dataset, 'input.jsonl')
    if not corpus.is_file() and keep_tokens and not student.encoder:
        stop(f'{corpus} does not exist; its tokens are the ones to keep: add it, or set --keep_tokens=0')
    texts, checked = read_corpus(corpus, corpus_texts, split_of(checkpoint)) if corpus.is_file() else ([], [])
    checked = read_check(check, texts, check_texts) if check else checked[:check_texts]
    # a path within the project, else only the file's name: the card may be published
    path = Path(check).absolute()
    file = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
    source = f'{len(checked):,} texts of {file}' if check else f'{len(checked):,} held-out texts of {corpus}'
    shards = load_records(dataset, name, checkpoint)  # None if they are not here
    encoder = student.encoder  # it cuts the texts, by its own tokens
    part = None if encoder else kept_part(checkpoint['task'])
    vocab = encoder.config.vocab_size if encoder else student.config.vocab_size
    try:
        small, small_space, figures = shrink_student(student, space, texts, checked, part, keep_tokens,
                                                     int8, shards)
    except ValueError as error:
        stop(str(error))
    n_tokens = vocab if encoder else small.config.vocab_size
    print(data_line('shrink', {'tokens': n_tokens, 'of': vocab, **figures}))
    if checked:
        print(f'measured on {source}; texts from elsewhere may lose more: --check=FILE measures it on yours'
              + ('' if encoder else ', --keep_tokens=0 loses least'))

    folder, tmp = out / 'device', out / 'device.tmp'
    with new_folder(tmp):
        graphs = write_onnx(small, tmp / 'student.onnx')
        tokenizer = encoder.tokenizer if encoder else small_space.tokenizer
        tokenizer.no_truncation()  # the runners cut
        (tmp / 'tokenizer.json').write_text(tokenizer.to_str(), encoding='utf-8')
        sizes = {file: (tmp / file).stat().st_size for file in (*graphs, 'tokenizer.json')}
        task = make_task(run or name, checkpoint, small_space, small) | {'bytes': sizes}
        write_json(tmp / 'task.json', task)
        copy_runners(tmp)
        write_card(tmp, checkpoint, figures, source, small_space, n_tokens, vocab)

        from device.run import Student
        runner, probe = Student(tmp), checked or ['one text', 'another']
        # it reads a text again for each decision: of answers with many of them fewer texts are compared
        probe = probe[:max(100, CHECK_PASSES // max(1, small_space.n_decisions))]
        ids = cut_texts(small_space.tokenizer, probe, part)
        expected = [small_space.to_json(outs) for outs in generate(small, small_space, ids)]
        same = sum(json.dumps(a) == json.dumps(b) for a, b in zip(runner(probe), expected, strict=True))
        print(data_line('onnx', {'texts': len(probe), 'same_records': same / len(probe)}))
    if same < 0.99 * len(probe):
        stop(f'the graph and the student give different answers; the export is left in {tmp}')
    on_stop(lambda *_: None)                                    # the moves take no time: they are finished
    if (folder / 'npm').is_dir():
        (folder / 'npm').rename(tmp / 'npm')
    shutil.rmtree(folder, ignore_errors=True)
    tmp.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob('*') if file.is_file() and 'npm' not in file.parts)
    print(data_line('device', {'folder': folder, 'bytes': size}))
    print(f'try it: python {folder}/run.py --text="a text"')
