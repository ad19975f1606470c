"""What all tests share: a real tokenizer trained on a page of text, tiny teachers that use it, a project in
which extract.py and train.py have run, and the summary of skipped tests. No network."""
import fcntl
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import socket
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

os.environ.setdefault('GOMP_SPINCOUNT', '2000')  # before torch, as in config/machine.py
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from distil.schema import write_object
from distil.space import OutputSpace
from model import Student, StudentConfig

torch.set_num_threads(1)  # tiny models gain nothing from more
os.environ['OMP_NUM_THREADS'] = '1'
ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / 'config').glob('*.py')
                 if path.name not in ('__init__.py', 'machine.py', 'small.py'))  # small.py: typed after another
PROGRAMS = 'extract.py', 'train.py', 'sample.py', 'tools/evaluate.py', 'tools/bench.py'
FIELDS = {'tone': ['neutral', 'friendly'], 'spam': [True, False]}
SCHEMAS = [  # every kind of value; prefixes of each other; tokens that merge with the quotes around them
    (FIELDS, None, False),
    ({'n': list(range(-12, 13)), 'ok': [True, False, None]}, None, False),
    ({'a': ['a', 'ab', 'abc', ''], 'b': [[1, 2], [1], 'x'], 'c': ['"', 'é日', "it's"]}, 2, True),
    ({'only': ['constant'], 'v': ['1', 1, '11', 11]}, 2, False)]
PROMPT = 'label\nhello there\n{"tone":"friendly","spam":false}\n{text}\n'

# -----------------------------------------------------------------------------
# a tokenizer, and teachers


@pytest.fixture(scope='session')
def words():
    return ('the cat sat on a mat and said hello to my friend who was not there so we went home early today '
            'because it rained neutral friendly spam tone true false null label good bad buy now').split()


@pytest.fixture(scope='session')
def teachers(tmp_path_factory, words):
    """{family: directory of a teacher}; each made by one of the processes of pytest for all of them."""
    worker, families = os.environ.get('PYTEST_XDIST_WORKER', 'gw0'), ['gemma', 'llama', 'qwen', 'plain']
    for block in (False, True):                                 # first those that no other one makes
        for family in families[::-1 if int(worker[2:]) % 2 else 1]:
            with suppress(BlockingIOError):
                make_once(tmp_path_factory, family, lambda folder: train_teacher(family, folder, words), block)
    return {family: make_once(tmp_path_factory, family) for family in families}


def make_once(tmp_path_factory, name, make=None, block=True):
    """a folder that all processes of pytest share. make: writes it, if no other process has done so. Raises
    BlockingIOError if another one is doing so now and block is False."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root
    (root / 'unfinished').mkdir(exist_ok=True)
    with open(root / f'lock_{name}', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
        if not (root / name).exists():
            make(root / 'unfinished' / name)
            (root / 'unfinished' / name).rename(root / name)
    return root / name


def train_teacher(family, folder, words):
    """trains a tiny teacher of a family and writes it to the folder; 'plain' is a Qwen whose tokenizer adds no begin
    token and has no chat template."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [' '.join(rng.choices(words, k=8))
            for _ in range(200)] + [json.dumps({'tone': w, 'n': -12}) for w in words]
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=500, special_tokens=['<pad>', '<bos>', '<eos>', '<turn>'],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single='<bos> $A', special_tokens=[('<bos>', 1)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<bos>',
                                                   eos_token='<eos>', pad_token='<pad>')
    wrapped.chat_template = ("{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<turn>"
                             "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    sizes = dict(vocab_size=len(wrapped), hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                 initializer_range=0.1)
    if family == 'plain':                                       # adds no begin token, as the tokenizer of Qwen
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<eos>',
                                                       pad_token='<pad>')
    cls, cfg = {
        'gemma': (transformers.Gemma3ForCausalLM, lambda: transformers.Gemma3TextConfig(
            **sizes, head_dim=8, sliding_window=24, query_pre_attn_scalar=8,
            layer_types=['sliding_attention', 'sliding_attention', 'full_attention'])),
        'llama': (transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**sizes))
    }.get(family, (transformers.Qwen2ForCausalLM, lambda: transformers.Qwen2Config(**sizes)))
    torch.manual_seed(1)
    model = cls(cfg())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(200):  # then most answers have the right form, and labels that depend on the text
        rows = []
        for _ in range(16):
            text = rng.choices(words, k=rng.randint(3, 9))
            tone = 'friendly' if {'hello', 'friend', 'good'} & {*text} else 'neutral'
            answer = write_object({'tone': tone, 'spam': bool({'buy', 'spam'} & {*text})})
            rows.append(wrapped(PROMPT.replace('{text}', ' '.join(text)) + answer + '\n')['input_ids'])
        idx = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
        model(idx, labels=idx.masked_fill(idx == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    wrapped.save_pretrained(folder)


def save_bert(folder, words, letters, layers, n_pos):
    """writes a BERT with random weights, and its tokenizer: these words, the long ones in two pieces, and all
    strings of their letters and these. Always the same one: tokenizers never trains WordPiece twice alike."""
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    letters = sorted({*letters, *''.join(words)})
    pieces = dict.fromkeys(piece for word in words for piece in (word[:6], *(['##' + word[6:]] if word[6:] else [])))
    vocab = dict.fromkeys([*special, *letters, *('##' + letter for letter in letters), *pieces])
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token='[UNK]'))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=n_pos, initializer_range=0.2)).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token='[UNK]', pad_token='[PAD]', cls_token='[CLS]', sep_token='[SEP]',
        mask_token='[MASK]').save_pretrained(folder)


@pytest.fixture(scope='session')
def tokenizer(teachers):
    return Tokenizer.from_file(str(teachers['gemma'] / 'tokenizer.json'))


def load_teacher(folder):
    return (transformers.AutoTokenizer.from_pretrained(folder),
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())

# -----------------------------------------------------------------------------
# students, records


@pytest.fixture(scope='session')
def space(tokenizer):
    return OutputSpace(
        tokenizer, {'n': list(range(-12, 13)), 'tone': ['neutral', 'friendly', 'friend'], 'ok': [True, None]},
        auxiliary=range(4, 100))


def tiny_student(space, seed=0, **sizes):
    torch.manual_seed(seed)
    defaults = dict(vocab_size=600, output_vocab=len(space.output_ids), block_size=96, n_layer=2, n_head=4,
                    n_kv_head=2, n_embd=32, n_mlp=64, start_id=1, output_ids=space.output_ids)
    return Student(StudentConfig(**{**defaults, **sizes})).eval()


def random_records(n, V, seed=0, offset=0.0):
    """yields n records as Writer.append takes them; offset: the mean of their logits."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        steps = rng.integers(2, 6)
        yield (int(rng.integers(1 << 63)), rng.integers(0, 1 << 18, rng.integers(1, 9)),
               rng.integers(0, V, steps), (rng.normal(size=(steps, V)) * 3 + offset).astype(np.float32),
               rng.normal(size=steps).astype(np.float32))


def make_shards(root, records, V, names=('t-00',)):
    """writes records to the shards of these names in turn. Returns their Shards."""
    for k, name in enumerate(names):
        writer = data.Writer(root / 'd' / name, V)
        for record in records[k::len(names)]:
            writer.append([record])
        writer.close()
        data.write_json(root / 'd' / name / 'meta.json',
                        {'format': data.FORMAT, 'output_ids': list(range(100, 100 + V))})
    return data.Shards('d', 't', root)


def write_texts(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'input.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))

# -----------------------------------------------------------------------------
# a project, and programs that run in it as a user runs them


CHILDREN = multiprocessing.get_context('forkserver')  # a fork starts faster: torch is imported already
CHILDREN.set_forkserver_preload([  # modules that are not installed are skipped
    'torch._dynamo', 'tests.conftest', 'distil.engine', 'transformers.models.gemma3.modeling_gemma3',
    'transformers.models.llama.modeling_llama', 'transformers.models.qwen2.modeling_qwen2',
    'sklearn.linear_model', 'sklearn.pipeline',
    'sklearn.feature_extraction.text', 'matplotlib.pyplot', 'torch.onnx._internal.exporter._core', 'onnxscript',
    'onnxruntime'])


def run_script(root, script, args, files, file_limit):
    """the target of a child process: runs a script as a user does, with its standard streams in files."""
    os.chdir(root)
    for stream, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [script, 'config/toy.py', *args]
    try:
        runpy.run_path(script, run_name='__main__')
    finally:
        sys.stdout.flush()


def run(root, script, *args, stdin=b'', file_limit=0):
    """runs a script as a user does. Returns an object with returncode, stdout, stderr."""
    with tempfile.TemporaryDirectory() as folder:
        files = [os.devnull if not stdin else f'{folder}/0', f'{folder}/1', f'{folder}/2']
        if stdin:
            Path(files[0]).write_bytes(stdin)
        process = CHILDREN.Process(target=run_script, args=(root, script, args, files, file_limit))
        process.start()
        process.join(100)
        assert process.exitcode is not None, f'{script} {args} hangs'
        return SimpleNamespace(returncode=process.exitcode, stdout=Path(files[1]).read_text(),
                               stderr=Path(files[2]).read_text())


def free_port():
    """a port that nobody listens on"""
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def torchrun(ranks):
    """the beginning of a command that starts so many processes of a script, on a port of its own choosing"""
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--local_addr=127.0.0.1',
            f'--nproc_per_node={ranks}']


def one_line(done):
    """the message of a failed run. Its stderr must have no other line but changed settings and progress
    bars."""
    lines = []
    for line in done.stderr.replace('\r', '\n').splitlines():
        bar = line.startswith(('filter:', 'extract:', 'train:', 'answer:', 'verify:', 'bench:', 'batch:'))
        bar = bar or 'it/s' in line
        if line.strip() and not bar and ' (command line; was' not in line and ' (config/' not in line:
            lines.append(line)
    assert done.returncode == 1 and len(lines) == 1, (done.returncode, done.stderr)
    return lines[0]


@pytest.fixture(scope='session')
def project(tmp_path_factory, teachers, words):
    """a folder with the programs, a small task, and the results of extract.py and train.py."""
    return make_project(tmp_path_factory.getbasetemp() / 'project', teachers['gemma'], tuple(words))


@cache  # test_smoke.py imports the fixture `project`, and pytest then calls it twice
def make_project(root, teacher, words):
    """makes the folder of the fixture `project`."""
    (root / 'config').mkdir(parents=True)
    for path in ('extract.py', 'model.py', 'train.py', 'sample.py', 'distil', 'tools', 'serve', 'device',
                 'config/__init__.py', 'config/machine.py'):
        os.symlink(ROOT / path, root / path)
    rng = random.Random(3)
    write_texts(root / 'data/toy', [' '.join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(400)])
    settings = dict(name='toy', dataset='toy', teacher=str(teacher), chat=False, fields=FIELDS,
                    calibrate=64, prior={'tone': {'friendly': 0.4}},
                    prompt=PROMPT, output_vocab=64, full_lse=8, block_size=60, n_layer=2, n_head=2, n_embd=32,
                    n_mlp=64, max_epochs=5, batch_size=16, learning_rate=1e-2, device='cpu', dtype='float32')
    (root / 'config/toy.py').write_text(''.join(f'{k} = {v!r}\n' for k, v in settings.items()))
    for script in ('extract.py', 'train.py'):
        done = run(root, script)
        assert done.returncode == 0, done.stderr
        (root / f'{script}.stdout').write_text(done.stdout)
    return root


def clone_task(project, tmp_path, *keep):
    """copies the project with its texts. keep: the results to copy too, of 'toy-00' and 'out'."""
    shutil.copytree(project, tmp_path / 'p', symlinks=True,
                    ignore=lambda folder, names: {'toy-00', 'out'} - {*keep})
    return tmp_path / 'p'


def weights(root):
    return torch.load(root / 'out/toy/ckpt.pt', weights_only=True)['model']

# -----------------------------------------------------------------------------
# skipped tests


INSTALL = {'Chromium': 'apt install chromium', 'Node.js': 'apt install nodejs npm',
           'curl': 'apt install curl'}


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: several processes, or several seconds; `make slow` runs them')


def describe_skips(skips):
    """one line per reason: how many tests were skipped, why, in which files, and how to get what is missing.

    skips: list of (id of a test, or of a file whose tests were all skipped; reason).
    """
    groups = defaultdict(list)
    for test_id, reason in skips:
        reason = reason.removeprefix('Skipped: ')
        missing = [name for name in INSTALL if name.lower() in reason.lower()]
        if package := re.search(r"could not import '(\w+)", reason):  # of pytest.importorskip
            reason = f'the Python package {package[1]} is missing (pip install -r requirements.txt)'
        elif missing:
            reason = f'{missing[0]} is missing ({INSTALL[missing[0]]})'
        groups['test' if '::' in test_id else 'whole file', reason].append(test_id)
    lines = []
    for (kind, reason), ids in groups.items():
        files = ', '.join(sorted({test_id.partition('::')[0] for test_id in ids}))
        lines.append(f'{len(ids)} {kind}{"s" * (len(ids) > 1)} skipped: {reason}, in {files}')
    return lines


def pytest_terminal_summary(terminalreporter, config):
    """prints which tests were skipped, below pytest's own last line."""
    reports = terminalreporter.stats.get('skipped', [])
    lines = describe_skips([(report.nodeid, report.longrepr[2]) for report in reports])
    config.add_cleanup(lambda: [terminalreporter.write_line(line) for line in lines])
