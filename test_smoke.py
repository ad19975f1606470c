"""Behaviour tests, one promise each: tiny random teachers, no network, in three minutes or so.    pytest -q"""
import fcntl
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import config as configure_module
import data
import extract
import teacher as engine_module
import train
from model import Cache, Student, StudentConfig, confidence, decode, generate
from bench import stepwise
from evaluate import agreement, calibration_error, cascade, evaluate, fit_temperature, truth_lines
from sample import cost, load_checkpoint
from space import OutputSpace

torch.set_num_threads(1)  # tiny models gain nothing from more
os.environ['OMP_NUM_THREADS'] = '1'
settings_of_hypothesis = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
ROOT = Path(__file__).resolve().parent
FIELDS = {'tone': ['neutral', 'friendly'], 'spam': [True, False]}
SCHEMAS = [  # every kind of value; prefixes of each other; tokens that merge with the quotes around them
    (FIELDS, None, False),
    ({'n': list(range(-12, 13)), 'ok': [True, False, None]}, None, False),
    ({'a': ['a', 'ab', 'abc', ''], 'b': [[1, 2], [1], 'x'], 'c': ['"', 'é日', "it's"]}, 2, True),
    ({'only': ['constant'], 'v': ['1', 1, '11', 11]}, 2, False)]
PROMPT = 'label\nhello there\n{"tone":"friendly","spam":false}\n{text}\n'

# -----------------------------------------------------------------------------
# fixtures: a real tokenizer, trained on a page of text, and random teachers that read it


@pytest.fixture(scope='session')
def words():
    return ('the cat sat on a mat and said hello to my friend who was not there so we went home early today because it rained '
            'neutral friendly spam tone true false null label good bad buy now').split()


@pytest.fixture(scope='session')
def teachers(tmp_path_factory, words):
    """{family: directory of a teacher}"""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [' '.join(rng.choices(words, k=8)) for _ in range(200)] + [json.dumps({'tone': w, 'n': -12}) for w in words]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=500, special_tokens=['<pad>', '<bos>', '<eos>', '<turn>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single='<bos> $A', special_tokens=[('<bos>', 1)])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<bos>', eos_token='<eos>', pad_token='<pad>')
    wrapped.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<turn>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    sizes = dict(vocab_size=len(wrapped), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                 bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1)
    gemma = transformers.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=24, query_pre_attn_scalar=8,
                                          layer_types=['sliding_attention', 'sliding_attention', 'full_attention'])
    folders, json_style = {}, SimpleNamespace(fields=FIELDS, indent=None, fence=False, end_id=None)
    for family, cls, cfg in (('gemma', transformers.Gemma3ForCausalLM, gemma), ('llama', transformers.LlamaForCausalLM, transformers.LlamaConfig(**sizes))):
        torch.manual_seed(1)
        folders[family] = tmp_path_factory.mktemp(family)
        model = cls(cfg)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(200):  # mostly in the form asked for, with labels that depend on the text
            rows = []
            for _ in range(16):
                text = rng.choices(words, k=rng.randint(3, 9))
                answer = OutputSpace.text(json_style, [['neutral', 'friendly']['hello' in text or 'friend' in text or 'good' in text], 'buy' in text or 'spam' in text])
                rows.append(wrapped(PROMPT.replace('{text}', ' '.join(text)) + answer)['input_ids'])
            idx = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
            model(idx, labels=idx.masked_fill(idx == 0, -100)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(folders[family])
        wrapped.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope='session')
def tokenizer(teachers):
    return Tokenizer.from_file(str(teachers['gemma'] / 'tokenizer.json'))


def load_teacher(folder):
    return (transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def tiny_student(space, seed=0, **sizes):
    torch.manual_seed(seed)
    return Student(StudentConfig(**{**dict(vocab_size=600, output_vocab=len(space.output_ids), block_size=96, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                                            n_mlp=64, start_id=1), **sizes})).eval()


def write_texts(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'input.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))


@pytest.fixture(scope='session')
def project(tmp_path_factory, teachers, words):
    """a copy of the scripts with a small task, extracted and trained: what the four commands leave behind."""
    root = tmp_path_factory.mktemp('project')
    for path in ('config', 'data', 'extract.py', 'teacher.py', 'model.py', 'space.py', 'train.py', 'evaluate.py', 'sample.py', 'report.py', 'bench.py'):
        os.symlink(ROOT / path, root / path) if path.endswith('.py') else (root / path).mkdir()
    os.symlink(ROOT / 'config/__init__.py', root / 'config/__init__.py')
    os.symlink(ROOT / 'data/__init__.py', root / 'data/__init__.py')
    rng = random.Random(3)
    write_texts(root / 'data/toy', [' '.join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(400)])
    settings = dict(name='toy', dataset='toy', teacher=str(teachers['gemma']), chat=False, fields=FIELDS, prompt=PROMPT, output_vocab=64, full_lse=8,
                    block_size=60, n_layer=2, n_head=2, n_embd=32, n_mlp=64, max_epochs=5, batch_size=16, learning_rate=1e-2, device='cpu', dtype='float32')
    (root / 'config/toy.py').write_text(''.join(f'{k} = {v!r}\n' for k, v in settings.items()))
    for script in ('extract.py', 'train.py'):
        done = run(root, script)
        assert done.returncode == 0, done.stderr
        (root / f'{script}.stdout').write_text(done.stdout)
    return root


CHILDREN = multiprocessing.get_context('forkserver')  # children of a process that has imported torch already: a run costs no import
CHILDREN.set_forkserver_preload(['torch', 'transformers', 'test_smoke'])


def run_script(root, script, args, files, file_limit):
    """the target of a child process: a script as a user runs it, its standard streams in files."""
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
    """a script as a user runs it -> object with returncode, stdout, stderr."""
    with tempfile.TemporaryDirectory() as folder:
        files = [os.devnull if not stdin else f'{folder}/0', f'{folder}/1', f'{folder}/2']
        if stdin:
            Path(files[0]).write_bytes(stdin)
        process = CHILDREN.Process(target=run_script, args=(root, script, args, files, file_limit))
        process.start()
        process.join(100)
        assert process.exitcode is not None, f'{script} {args} hangs'
        return SimpleNamespace(returncode=process.exitcode, stdout=Path(files[1]).read_text(), stderr=Path(files[2]).read_text())


def one_line(done):
    """stderr of a failed run must be one line and no traceback, apart from what changed and the progress bars."""
    lines = [line for line in done.stderr.replace('\r', '\n').splitlines() if line.strip() and ' (command line; was' not in line and ' (config/' not in line and 'it/s' not in line
             and not line.startswith(('filter:', 'extract:', 'train:'))]
    assert done.returncode == 1 and len(lines) == 1, (done.returncode, done.stderr)
    return lines[0]


# -----------------------------------------------------------------------------
# config


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """settings(script text, config text, *arguments) -> globals of the script after configure()."""
    def call(arguments, config_text='', script="a = 1\nb = 2.0\nc = 'x'\nd = True\ne = None\nf = {}\n"):
        (tmp_path / 'extract.py').write_text(f"'''doc'''\n{script}config = configure(globals())\nafter = 5\n")
        (tmp_path / 'my.py').write_text(config_text)
        monkeypatch.setattr(sys, 'argv', ['extract.py', *arguments])
        g = dict(__file__=str(tmp_path / 'extract.py'), __name__='__main__', __doc__='doc', configure=configure_module.configure)
        exec((tmp_path / 'extract.py').read_text(), g)
        return g
    call.file = str(tmp_path / 'my.py')
    return call


def test_command_line_beats_file_beats_default_in_any_order(settings):
    for arguments in (['--a=3', settings.file], [settings.file, '--a=3']):
        g = settings(arguments, 'a = 2\nb = 5\n')
        assert (g['a'], g['b'], g['c']) == (3, 5.0, 'x') and type(g['b']) is float
        assert g['config'] == {k: g[k] for k in 'abcdef'}


def test_values_keep_the_type_of_their_default(settings):
    g = settings(['--a=7', '--b=1', '--c=1=2', '--d=false', '--e=2', "--f={'k': [1, None]}"])
    assert [g[k] for k in 'abcdef'] == [7, 1.0, '1=2', False, 2, {'k': [1, None]}]
    for wrong in ('--a=1.5', '--a=x', '--b=x', '--d=1', '--f=[1]'):
        with pytest.raises(SystemExit, match=f'command line: {wrong[2]} is'):
            settings([wrong])


def test_unknown_keys_stop_with_a_hint(settings):
    assert settings([settings.file], 'learning_rate = 1.0\n_private = 3\nimport os\n')['a'] == 1  # train.py's key is skipped in a file ...
    with pytest.raises(SystemExit, match="it belongs to train.py"):
        settings(['--learning-rate=1'])                                                            # ... but typed, it names its owner
    with pytest.raises(SystemExit, match="no setting 'learning_rat'; did you mean 'learning_rate'"):
        settings([settings.file], 'learning_rat = 1.0\n')
    for wrong in ('--a', 'a=1', 'nowhere.py'):
        with pytest.raises(SystemExit, match='cannot read|does not exist'):
            settings([wrong])


def test_help_prints_the_settings_block(settings, capsys):
    with pytest.raises(SystemExit):
        settings(['-h'], script='a = 1  # why\n')
    assert 'a = 1  # why' in capsys.readouterr().out


@pytest.mark.parametrize('script', configure_module.SCRIPTS)
def test_shipped_configs_fit_every_script(script, monkeypatch):
    names, _ = configure_module.settings_block(ROOT / script)
    for path in sorted((ROOT / 'config').glob('[!_]*.py')):
        g = dict(runpy.run_path(str(ROOT / script), run_name='imported'), __name__='__main__', __file__=str(ROOT / script))
        monkeypatch.setattr(sys, 'argv', [script, str(path)])
        assert configure_module.configure(g)['name'] == path.stem


def test_commands_that_are_shown_name_files_and_settings_that_exist():
    documents = [ROOT / 'README.md', *(ROOT / script for script in configure_module.SCRIPTS), *(ROOT / 'config').glob('*.py')]
    text = '\n'.join(document.read_text() for document in documents)
    commands = re.findall(r'(?:python|torchrun \S+) ([\w/]+\.py)((?: +(?:--\w+=(?:"[^"]*"|[^\s`]*)|config/\w+\.py))*)', text)
    assert len(commands) > 50
    for script, arguments in commands:
        assert (ROOT / script).is_file() or 'mine' in script, script
        for argument in re.findall(r'config/\w+\.py|--\w+', arguments):
            if argument.startswith('config/'):
                assert (ROOT / argument).is_file() or 'mine' in argument, (script, argument)
            elif script in configure_module.SCRIPTS:
                assert argument[2:] in configure_module.settings_block(ROOT / script)[0], (script, argument)


def prepared(folder, name, *args):
    """the texts that a copy of data/<name>/prepare.py writes in folder."""
    (folder / name).mkdir(exist_ok=True)
    shutil.copy(ROOT / 'data' / name / 'prepare.py', folder / name)
    done = subprocess.run([sys.executable, f'{name}/prepare.py', *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / name / 'input.jsonl').open(encoding='utf-8')]


def test_a_file_of_any_kind_becomes_texts(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'one, two\n\n  three \none, two\n\xff bad\n')
    (tmp_path / 'a.csv').write_text('id,text\n1,"one, two"\n2,three\n3\n')
    (tmp_path / 'a.tsv').write_text('one, two\t1\nthree "\t2\n')
    (tmp_path / 'a.jsonl').write_text('{"text": "one, two"}\n{"no": 1}\nnot json\n{"text": 3}\n{"text": "three"}\n')
    texts = {kind: [r['text'] for r in prepared(tmp_path, 'reddit', f'--input={tmp_path}/a.{kind}')] for kind in ('txt', 'csv', 'tsv', 'jsonl')}
    assert texts == dict(txt=['one, two', 'three', '\ufffd bad'], csv=['one, two', 'three'], tsv=['one, two', 'three "'], jsonl=['one, two', 'three'])
    for wrong in ('--input', '--input=nowhere.txt', 'a.txt'):
        done = subprocess.run([sys.executable, 'reddit/prepare.py', wrong], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_equations_have_the_solution_they_claim(tmp_path):
    records = prepared(tmp_path, 'math')
    for text, x in ((r['text'], r['truth']['x']) for r in records):
        left, right = re.sub(r'(\d)x', r'\1*x', text).split('=')
        assert eval(left, {'x': x}) == eval(right, {'x': x}) and -99 <= x <= 99
    assert len(records) > 5000 and records == prepared(tmp_path, 'math')


def test_mails_are_read_whatever_their_form(tmp_path):
    mails = ['Subject: Re: [list] lunch\n\nOn Monday, Bob wrote:\n> are you there\nI will be there at noon, see http://a.org\n',
             'Subject: =?utf-8?b?w6l0w6k=?=\nContent-Type: text/html\n\n<style>x</style><b>Buy</b> this &amp; that now or never\n',
             'Subject: bad\nContent-Type: text/plain; charset=nobody-knows\n\none two three four five six\n', 'no headers', '']
    (tmp_path / 'mail').mkdir()
    with tarfile.open(tmp_path / 'mail/stdlib-x.tgz', 'w:gz') as package:
        for n, mail in enumerate(mails):
            content = json.dumps({'text': mail}).encode()
            member = tarfile.TarInfo(f'package/data/spam-1/{n}.json')
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    assert {r['text'] for r in prepared(tmp_path, 'mail')} >= {'lunch. I will be there at noon, see', 'été. Buy this & that now or never'}


# -----------------------------------------------------------------------------
# output space


@pytest.mark.parametrize('fields, indent, fence', SCHEMAS)
@pytest.mark.parametrize('end_id', [None, 3])
def test_the_automaton_accepts_exactly_the_valid_answers(tokenizer, fields, indent, fence, end_id):
    space = OutputSpace(tokenizer, fields, indent, fence, end_id, auxiliary=range(4, 60))
    rng = random.Random(0)
    for values in product(*fields.values()):
        outs = [space.output_index[i] for i in space.encode(values)]
        assert space.walk(outs) == space.done and len(outs) <= space.max_answer and max(outs) < space.n_required
        assert json.dumps(space.to_json(outs)) == json.dumps(dict(zip(fields, values)))  # 1, '1' and True stay apart
        wrong = list(outs)
        wrong[rng.randrange(len(outs))] = rng.randrange(len(space.output_ids))
        if space.walk(wrong) == space.done:  # then it is another valid answer
            assert space.encode(space.to_json(wrong).values()) == [space.output_ids[o] for o in wrong]
        assert space.to_json(outs[:-1]) is None


def test_examples_that_are_not_in_the_form_of_the_answer_are_named(tokenizer):
    space = OutputSpace(tokenizer, FIELDS)
    good = space.text(['neutral', True])
    assert not list(space.misfits(good + 'say {text} or {x: y}\n{"tone": "neutral" | "friendly"}\n'))
    wrong = good.replace(',', ', '), good.replace('neutral', 'angry'), '{"spam":true,"tone":"neutral"}', '{"tone":"neutral"}'
    assert [m.split('} ')[1][:16] for m in space.misfits(' '.join(wrong))] == ['will have to be ', 'is no answer of ', 'will have to be ', 'is no answer of ']
    for path in (ROOT / 'config').glob('[!_]*.py'):
        task = runpy.run_path(str(path))
        style = SimpleNamespace(fields=task['fields'], indent=task.get('indent'), fence=task.get('fence'), end_id=1, text=None, from_json=None)
        style.text, style.from_json = (lambda values: OutputSpace.text(style, values)), lambda answer: answer if all(
            answer[f] in values for f, values in task['fields'].items()) else None
        assert not list(OutputSpace.misfits(style, task['prompt'])), path


def test_output_vocabulary_is_required_then_auxiliary(tokenizer):
    space = OutputSpace(tokenizer, FIELDS, auxiliary=[50, 51, 50])
    assert space.output_ids[-2:] == [50, 51] and len(set(space.output_ids)) == len(space.output_ids) == space.n_required + 2
    used = {i for values in product(*FIELDS.values()) for i in space.encode(values)}
    assert set(space.output_ids[:space.n_required]) == used
    again = OutputSpace(tokenizer, FIELDS, auxiliary=space.output_ids)  # as sample.py rebuilds it
    assert again.output_ids == space.output_ids and again.moves == space.moves
    assert all((space.forced[s] >= 0) == (len(m) == 1) for s, m in enumerate(space.moves))


def test_schemas_that_cannot_work_are_refused(tokenizer):
    for fields in ({}, {'a': []}, {'a': [1, 1]}, {'a': True, 'b': [1, 2]}, {'a': 'yes'}):
        with pytest.raises(ValueError):
            OutputSpace(tokenizer, fields)


# -----------------------------------------------------------------------------
# extraction


def step_by_step(model, space, ids, constrain):
    """the slow twin of extract.answer: whole sequence, whole head, no cache, one token at a time."""
    outs, logits, lses, state = [], [], [], 0
    while state != space.done:
        row = model(torch.tensor([ids + [space.output_ids[o] for o in outs]])).logits[0, -1].float()
        kept = row[space.output_ids]
        if constrain:
            out = kept.masked_fill(space.next_state[state] < 0, -math.inf).argmax().item()
        else:
            out = space.output_index.get(row.argmax().item(), -1)
        if out not in space.moves[state]:
            return 'vocab' if out < 0 else 'invalid'
        outs.append(out), logits.append(kept), lses.append(row.logsumexp(-1))
        state = space.moves[state][out]
    return outs, torch.stack(logits), torch.stack(lses)


@pytest.mark.parametrize('family', ['gemma', 'llama'])
@pytest.mark.parametrize('fields, indent, fence', SCHEMAS)
def test_drafting_equals_step_by_step_decoding(teachers, family, fields, indent, fence):
    tokenizer, model = load_teacher(teachers[family])
    before, after, end_id = engine_module.encode_prompt(tokenizer, 'the cat and the mat were there ' * 3 + '{text}\n', chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, fields, indent, fence, end_id, auxiliary=range(4, 300))
    engine, drafts = engine_module.Teacher(model, before, space.output_ids), engine_module.Drafts(space)
    rng = np.random.default_rng(0)
    for _ in range(2):  # the second time the drafts have learned
        texts = [rng.integers(4, len(tokenizer), n) for n in (7, 1, 12, 7, 3)]
        answers, computed = engine_module.answer(engine, space, drafts, texts, after, whole=True)
        with torch.no_grad():
            for text, (outs, logits, lse) in zip(texts, answers):
                slow_outs, slow_logits, slow_lse = step_by_step(model, space, before + text.tolist() + after, constrain=True)
                assert outs == slow_outs
                torch.testing.assert_close(torch.tensor(logits), slow_logits, atol=2e-4, rtol=1e-4)
                torch.testing.assert_close(torch.tensor(lse), slow_lse, atol=2e-4, rtol=1e-4)
                drafts.add(outs)
        assert computed <= sum(len(t) + len(after) + space.max_answer ** 2 for t in texts)


@pytest.mark.parametrize('family', ['gemma', 'llama'])
def test_free_drafting_equals_free_step_by_step_decoding(teachers, words, family):
    tokenizer, model = load_teacher(teachers[family])
    before, after, end_id = engine_module.encode_prompt(tokenizer, PROMPT, chat=False)
    texts = [tokenizer.backend_tokenizer.encode(' '.join(random.Random(i).choices(words, k=4)), add_special_tokens=False).ids for i in range(40)]
    kinds = set()
    for fields, n_auxiliary in ((FIELDS, 300), ({**FIELDS, 'more': [1, 2]}, 300), ({'tone': ['neutral'], 'spam': [True, False]}, 0)):
        space = OutputSpace(tokenizer.backend_tokenizer, fields, None, False, end_id, auxiliary=range(4, 4 + n_auxiliary))
        engine, drafts = engine_module.Teacher(model, before, space.output_ids), engine_module.Drafts(space)
        with torch.no_grad():
            for text in texts:
                fast = engine_module.answer(engine, space, drafts, [text, text], after, constrain=False)[0][1]
                slow = step_by_step(model, space, before + text + after, constrain=False)
                kinds.add(slow if isinstance(slow, str) else 'valid')
                assert (fast if isinstance(fast, str) else fast[0]) == (slow if isinstance(slow, str) else slow[0])
    assert kinds == {'valid', 'invalid', 'vocab'}


def test_prompts_are_cut_at_the_text(teachers):
    tokenizer, _ = load_teacher(teachers['gemma'])
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    before, after, end_id = engine_module.encode_prompt(tokenizer, 'say {text} !', chat=False)
    assert (decode(before), decode(after), end_id) == ('<bos>say ', ' !', None)
    before, after, end_id = engine_module.encode_prompt(tokenizer, 'say {text} !', chat=True)
    assert (decode(before), decode(after), decode([end_id])) == ('<bos>user:say ', ' !<turn>assistant:', '<turn>')


def test_texts_are_filtered_and_counted_whatever_they_hold(tokenizer, tmp_path):
    good = ['the cat sat on a mat', 'hello \0 there \x1b[0m', '😀 😀 été 日本', 'a  cat\n sat on']
    lines = [json.dumps({'text': t}).encode() for t in good + [good[0] + ' ', 'cat', 'see www.cat.org now', 'the <b>cat</b> sat', 'a <eos> b c', 'x' * 4000, '', ' ']]
    lines += [b'', b'not json', b'{"text": 3}', b'[]', b'{"text": "\xff\xfe"}', b'{"text": "\\ud800 a b"}', b'[' * 100000]
    (tmp_path / 'input.jsonl').write_bytes(b'\n'.join(lines))
    counts = Counter()
    read = lambda size, **limits: list(extract.read_groups(data.read_texts(tmp_path / 'input.jsonl'), tokenizer, size, 3, 60, **limits))
    groups = read(3, counts=counts)
    assert counts == dict(kept=4, duplicate=1, short=1, url=1, tag=2, long=1, empty=3, bad_json=4, bad_utf8=2) and [len(g) for g in groups] == [3, 1]
    assert [tokenizer.decode(ids.tolist()) for group in groups for _, ids, _ in group] == [data.clean(t) for t in good] and groups[0][0][0] == data.text_hash(good[0])
    assert [len(g) for g in read(9, limit=2)] == [2] and [len(g) for g in read(2, limit=4)] == [2, 2]
    extract_special = [('<turn>' 'cat sat', None, '')]
    assert list(extract.read_groups(extract_special, tokenizer, 4, 1, 60)) == []
    assert list(extract.fetch_ahead(iter(range(5)))) == list(range(5))


def test_long_texts_are_cut_as_the_student_will_cut_them(tokenizer):
    long = ['the cat sat on a mat', 'the cat sat on a mat and said hello to my friend', 'the cat sat on a dog', 'été 日本 😀 été 日本 😀', 'a cat ' * 3000]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    for max_text in range(1, 12):
        (group,) = extract.read_groups([(text, None, '') for text in long], tokenizer, 9, 1, max_text, cut=True, counts=(counts := Counter()))
        assert [ids.tolist() for _, ids, _ in group] == list(map(list, dict.fromkeys(tuple(encode(text)[:max_text]) for text in long))) and not counts['long']
    assert counts['kept'] + counts['duplicate'] == len(long)
    text = 'the cat sat'
    ((hash_, ids, _),), = extract.read_groups([(f'{text} on www.cat.org', None, '')], tokenizer, 9, 1, len(encode(text)), cut=True)
    assert hash_ == data.text_hash(text) and ids.tolist() == encode(text)  # what is cut off does not count


def test_pip_teachers_are_found_without_running_their_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for module, source in (('wheel_a', 'import not_installed_anywhere\n'), ('wheel_b', 'def assemble():\n    return __path__[0] + "/sub/b.gguf"\n')):
        (tmp_path / module / 'sub').mkdir(parents=True)
        (tmp_path / module / '__init__.py').write_text(source)
        (tmp_path / module / 'sub' / f'{module[-1]}.gguf').touch()
        assert engine_module.locate(f'pip:{module}') == {'pretrained_model_name_or_path': str(tmp_path / module / 'sub'), 'gguf_file': f'{module[-1]}.gguf'}
    (tmp_path / 'wheel_a' / 'two.gguf').touch()
    for teacher, message in (('pip:wheel_a', '2 .gguf files'), ('pip:no_such_wheel', 'pip install no-such-wheel'), ('none.gguf', 'does not exist')):
        with pytest.raises(SystemExit, match=message):
            engine_module.locate(teacher)


def test_stored_records_are_what_the_teacher_says(project, teachers):
    """the saved file against a plain forward pass: ids, answers, raw logits before the constraint, logsumexp."""
    tokenizer, model = load_teacher(teachers['gemma'])
    shards = data.Shards('toy', 'toy', project / 'data')
    meta = shards.meta
    space = OutputSpace(tokenizer.backend_tokenizer, meta['fields'], meta['indent'], meta['fence'], meta['end_id'], meta['output_ids'])
    texts = {data.text_hash(t): t for t in (data.clean(json.loads(line)['text']) for line in open(project / 'data/toy/input.jsonl'))}
    known = 0
    for i in range(0, len(shards), 17):
        ids = shards.ids(i).tolist()
        assert ids == tokenizer.encode(texts[int(shards.hashes[i])], add_special_tokens=False)
        with torch.no_grad():
            outs, logits, lse = step_by_step(model, space, meta['before'] + ids + meta['after'], constrain=True)
        assert shards.answer(i).tolist() == outs
        top, stored_lse = shards.answer(i, 'stats').T
        np.testing.assert_allclose(shards.answer(i, 'logits').astype(np.float32) + top[:, None], logits, atol=0.02, rtol=1e-3)
        if not np.isnan(stored_lse).any():
            np.testing.assert_allclose(stored_lse, lse, rtol=1e-4)
            known += 1
    sizes = {name: (shards.folder / f'{name}.bin').stat().st_size for name in data.DTYPES}
    n_input, n_output = sizes['input'] // 4, sizes['output'] // 2
    assert sizes == {'input': n_input * 4, 'output': n_output * 2, 'logits': n_output * 64 * 2, 'stats': n_output * 8, 'index': len(shards) * 24}
    assert known  # at least the first record has its logsumexp


def test_what_extract_prints_parses(project):
    lines = {line.split()[0]: dict(f.split('=') for f in line.split()[1:]) for line in (project / 'extract.py.stdout').read_text().splitlines()
             if line.split()[0] in ('filter', 'vocab', 'plan', 'extract', 'coverage')}
    assert int(lines['vocab']['required']) + int(lines['vocab']['auxiliary']) == int(lines['vocab']['total']) == 64
    assert int(lines['filter']['kept']) == int(lines['plan']['records']) == int(lines['extract']['records'])
    assert 0 < float(lines['coverage']['mass']) <= 1.0001


def clone_task(project, tmp_path, *keep):
    """the project with its texts, and of the results only what is in keep."""
    shutil.copytree(project, tmp_path / 'p', symlinks=True, ignore=lambda folder, names: {n for n in names if n in {'toy-00', 'out'} - {*keep}})
    return tmp_path / 'p'


@pytest.mark.parametrize('moment', ['records', 'anywhere'])
def test_a_killed_extraction_goes_on_to_identical_files(project, tmp_path, moment):
    """ten SIGKILLs once a few more records are there, ten at any moment of a run."""
    root, kills, rng = clone_task(project, tmp_path), 0, random.Random(moment)
    folder, whole = root / 'data/toy/toy-00', project / 'data/toy/toy-00'
    records, n_whole = lambda: (folder / 'index.bin').stat().st_size // 24 if (folder / 'index.bin').exists() else 0, (whole / 'index.bin').stat().st_size // 24
    while kills < 10:
        process = CHILDREN.Process(target=run_script, args=(root, 'extract.py', (), [os.devnull] * 3, 0))
        process.start()
        stop, at = records() + rng.randint(1, 30), time.time() + rng.uniform(0.2, 1.2)
        while process.is_alive() and (records() < stop if moment == 'records' else time.time() < at):
            time.sleep(0.0005)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if records() == n_whole:
            shutil.rmtree(folder)  # all of it is there: from the start again
    if folder.exists():
        (folder / 'logits.bin').open('ab').write(b'torn')  # and a write that was cut short
    assert run(root, 'extract.py').returncode == 0
    for name in data.DTYPES:
        assert (folder / f'{name}.bin').read_bytes() == (whole / f'{name}.bin').read_bytes(), name
    again = run(root, 'extract.py')
    assert again.returncode == 0 and ', 0 are to do' in again.stdout and 'loading' not in again.stdout


def test_a_full_disk_ends_in_one_line_and_loses_nothing(project, tmp_path):
    root = clone_task(project, tmp_path)
    assert 'records are safe' in one_line(run(root, 'extract.py', file_limit=300000))
    kept, whole = (data.Shards('toy', 'toy', r / 'data') for r in (root, project))
    assert 0 < len(kept) < len(whole) and kept.meta['missing']  # what coverage advises with is kept too
    writer = data.Writer(root / 'data/toy/toy-00', 64)  # what the next run does first
    writer.close()
    for name in data.DTYPES:
        content = (root / f'data/toy/toy-00/{name}.bin').read_bytes()
        assert content and (project / f'data/toy/toy-00/{name}.bin').read_bytes().startswith(content)


def test_two_ranks_killed_then_three_then_one_extract_every_text_once(project, tmp_path):
    root = clone_task(project, tmp_path)
    ranks = lambda n: [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={n}', f'--master_port={random.randint(20000, 60000)}', 'extract.py',
                       'config/toy.py', '--extract_batch=8']
    stored = lambda: [len(data.read_index(folder, 64)) for folder in data.shard_folders('toy', 'toy', root / 'data')]
    env = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(random.randint(20000, 60000)))  # as torchrun does, whose death they survive
    pair = [subprocess.Popen([sys.executable, 'extract.py', 'config/toy.py', '--extract_batch=1'], cwd=root, env={**env, 'RANK': str(r)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for r in range(2)]
    while pair[0].poll() is None and not (len(stored()) == 2 and min(stored()) > 16):
        time.sleep(0.001)
    for process in pair:
        process.kill()
        process.wait()
    before, whole = stored(), data.Shards('toy', 'toy', project / 'data')
    assert len(before) == 2 and 0 < sum(before) < len(whole), before
    done = subprocess.run(ranks(3), cwd=root, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    assert f'holds {sum(before)} texts, {len(whole) - sum(before)} are to do' in done.stdout.decode()
    shards = data.Shards('toy', 'toy', root / 'data')
    assert len(stored()) == 3 and sorted(shards.hashes) == sorted(whole.hashes)  # none is missing, none is there twice
    assert ', 0 are to do' in run(root, 'extract.py').stdout
    order = {int(h): i for i, h in enumerate(whole.hashes)}
    for i in range(0, len(shards), 7):
        j = order[int(shards.hashes[i])]
        assert shards.ids(i).tolist() == whole.ids(j).tolist() and shards.answer(i).tolist() == whole.answer(j).tolist()
        np.testing.assert_allclose(shards.answer(i, 'logits').astype(np.float32), whole.answer(j, 'logits'), atol=0.05)


def test_verify_passes_good_records_and_fails_changed_ones(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'extract.py', '--verify=40')
    figures = dict(f.split('=') for f in done.stdout.splitlines()[-1].split()[1:])
    assert done.returncode == 0 and figures['equal'] == '1.0000' and float(figures['max_diff']) < 0.05
    for name, kind in (('logits', '<f2'), ('output', '<u2')):
        content = np.fromfile(root / f'data/toy/toy-00/{name}.bin', kind)
        changed = content.copy()
        changed[3::7 if name == 'logits' else 5] = changed[3] + 1 if name == 'logits' else content[0]
        changed.tofile(root / f'data/toy/toy-00/{name}.bin')
        if name == 'logits':
            assert run(root, 'extract.py', '--verify=40').returncode == 1
        content.tofile(root / f'data/toy/toy-00/{name}.bin')
    assert run(root, 'extract.py', '--verify=40').returncode == 0


def test_given_answers_are_scored_and_stored_in_the_same_format(project, tmp_path, teachers):
    root, rng = clone_task(project, tmp_path), random.Random(0)
    texts = [json.loads(line)['text'] for line in open(root / 'data/toy/input.jsonl')][:50]
    given = {data.text_hash(data.clean(t)): dict(tone=rng.choice(FIELDS['tone']), spam=rng.choice(FIELDS['spam'])) for t in texts}
    lines = [{'text': t, 'answer': given[data.text_hash(data.clean(t))]} for t in texts]
    lines += [{'text': 'the cat sat there', 'answer': a} for a in (None,)] + [{'text': 'the dog sat there', 'answer': {'tone': 'rude', 'spam': 1}}]
    (root / 'scored.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    done = run(root, 'extract.py', '--score=scored.jsonl')
    assert done.returncode == 0 and 'dropped_invalid=2' in done.stdout, done.stderr
    shards = data.Shards('toy', 'toy', root / 'data')
    tokenizer, model = load_teacher(teachers['gemma'])
    meta = shards.meta
    space = OutputSpace(tokenizer.backend_tokenizer, meta['fields'], meta['indent'], meta['fence'], meta['end_id'], meta['output_ids'])
    assert len(shards) == len(given)
    for i in range(len(shards)):
        outs = shards.answer(i).tolist()
        assert space.to_json(outs) == given[int(shards.hashes[i])]
        with torch.no_grad():
            logits = model(torch.tensor([meta['before'] + shards.ids(i).tolist() + meta['after'] + [space.output_ids[o] for o in outs[:-1]]])).logits
        kept = logits[0, -len(outs):][:, space.output_ids]
        np.testing.assert_allclose(shards.answer(i, 'logits').astype(np.float32) + shards.answer(i, 'stats')[:, :1], kept, atol=0.02, rtol=1e-3)
    assert run(root, 'extract.py', '--score=scored.jsonl', '--verify=9').returncode == 0
    assert 'another score' in one_line(run(root, 'extract.py'))  # own and given answers do not mix in one folder
    assert ', 0 are to do' in run(root, 'extract.py', '--score=scored.jsonl').stdout


def test_free_answers_that_break_the_schema_are_dropped_counted_and_not_asked_again(project, tmp_path):
    root = clone_task(project, tmp_path)
    args = ("--fields={'tone': ['neutral', 'bad'], 'spam': [True]}", '--constrain=False')
    done = run(root, 'extract.py', *args)
    figures = {line.split()[0]: dict(f.split('=') for f in line.split()[1:]) for line in done.stdout.splitlines() if line.startswith(('extract ', 'coverage '))}
    shards, n = data.Shards('toy', 'toy', root / 'data'), int(figures['extract']['records'])
    dropped = int(figures['coverage']['dropped_invalid']) + int(figures['coverage']['dropped_vocab'])
    assert 0 < dropped == n - len(shards) < n
    again = run(root, 'extract.py', *args)
    assert ', 0 are to do' in again.stdout and f'dropped_invalid={figures["coverage"]["dropped_invalid"]} ' in again.stdout


def test_a_vocabulary_that_misses_what_the_teacher_says_is_reported_and_can_be_widened(project, tmp_path):
    root = clone_task(project, tmp_path)
    fields = "--fields={'tone': ['neutral', 'friendly'], 'spam': [1, None]}"  # the teacher has learned to say true or false, friendly or neutral
    done = run(root, 'extract.py', fields, '--output_vocab=24', '--min_coverage=0.9')
    advice = [line for line in done.stdout.splitlines() if 'extra_vocab = ' in line]
    assert done.returncode == 0 and advice, done.stdout
    extra = advice[0].split('extra_vocab = ')[1].split(' and another name')[0]
    mass = lambda text: float(text.split('coverage mass=')[1].split()[0])
    wide = run(root, 'extract.py', fields, '--output_vocab=64', '--name=wide', f'--extra_vocab={extra}')
    assert mass(wide.stdout) > mass(done.stdout) + 0.05


def test_a_batch_that_does_not_fit_is_halved(teachers):
    tokenizer, model = load_teacher(teachers['gemma'])
    before, after, end_id = engine_module.encode_prompt(tokenizer, PROMPT, chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, FIELDS, end_id=end_id)
    engine, sizes = engine_module.Teacher(model, before, space.output_ids), []
    plain_start = engine.start

    def start(B, S):
        sizes.append(B)
        if B > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        plain_start(B, S)
    texts, drafts = [np.arange(5, 9 + i) for i in range(10)], engine_module.Drafts(space)
    expected, _ = engine_module.answer(engine, space, drafts, texts, after)
    engine.start = start
    answers, _ = engine_module.answer_fitting(engine, space, drafts, texts, after)
    assert sizes == [10, 5, 2, 2, 2, 2, 2] and [a[0] for a in answers] == [e[0] for e in expected]
    engine.start = lambda B, S: 1 / 0  # other errors are not hidden
    with pytest.raises(ZeroDivisionError):
        engine_module.answer_fitting(engine, space, drafts, texts, after)


def test_the_bench_compares_the_same_answers(project):
    done = run(project, 'extract.py', '--bench=True', '--extract_batch=24')
    figures = dict(f.split('=') for f in done.stdout.splitlines()[-1].split()[1:])
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith('bench '), done.stderr
    assert float(figures['identical']) >= 0.97 and 1 <= float(figures['passes']) < 2 and float(figures['ratio']) > 1


def test_a_set_of_hashes_in_eight_bytes_each():
    rng = np.random.default_rng(0)
    some, more = (rng.integers(0, 1 << 64, 300000, np.uint64).tolist() for _ in range(2))
    hashes, twin = data.Hashes(some), set(some)
    for h in more:
        hashes.add(h)
    assert len(hashes) == len(twin | set(more)) and len(hashes.sorted) > 500000  # the recent ones were merged
    assert all(h in hashes for h in some[:1000] + more[-1000:]) and not any(h in hashes for h in rng.integers(0, 1 << 64, 1000, np.uint64).tolist())


def test_another_task_or_a_second_run_does_not_touch_a_folder(project):
    before = (project / 'data/toy/toy-00/index.bin').read_bytes()
    assert 'another prompt, fields' in one_line(run(project, 'extract.py', '--prompt=other {text}', "--fields={'a': [1, 2]}"))
    with open(project / 'data/toy/toy-00/index.bin', 'ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert 'another run is writing' in one_line(run(project, 'extract.py'))
    assert 'prepare.py' in one_line(run(project, 'extract.py', '--dataset=nowhere'))
    assert 'hold {text} once' in one_line(run(project, 'extract.py', '--prompt=say', '--name=other'))
    assert 'nothing to verify' in one_line(run(project, 'extract.py', '--verify=3', '--name=other'))
    assert (project / 'data/toy/toy-00/index.bin').read_bytes() == before


# -----------------------------------------------------------------------------
# data


def random_records(n, V, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        steps = rng.integers(2, 6)
        yield (int(rng.integers(1 << 63)), rng.integers(0, 1 << 18, rng.integers(1, 9)), rng.integers(0, V, steps),
               (rng.normal(size=(steps, V)) * 3 + offset).astype(np.float32), rng.normal(size=steps).astype(np.float32))


def make_shards(root, records, V, names=('t-00',)):
    for k, name in enumerate(names):
        writer = data.Writer(root / 'd' / name, V)
        for at in range(k, len(records), len(names)):
            writer.append([records[at]])
        writer.close()
        data.write_json(root / 'd' / name / 'meta.json', {'format': data.FORMAT, 'output_ids': list(range(100, 100 + V))})
    return data.Shards('d', 't', root)


def test_fp16_below_the_maximum_keeps_every_decision(tmp_path):
    records = list(random_records(50, 500, offset=25))  # raw logits near 25, where fp16 is 0.016 apart
    for r in records:
        r[3][:, 7] = r[3].max(1) + 0.004  # a close decision
    assert any((r[3].astype(np.float16).argmax(1) != 7).any() for r in records)  # plain fp16 would lose some
    shards = make_shards(tmp_path, records, 500)
    for i, (_, ids, outs, logits, lse) in enumerate(records):
        assert shards.ids(i).tolist() == ids.tolist() and shards.answer(i).tolist() == outs.tolist()
        assert (shards.answer(i, 'logits').argmax(1) == 7).all()
        np.testing.assert_array_equal(shards.answer(i, 'stats'), np.stack((logits.max(1), lse), 1))


def test_the_writer_cuts_off_what_was_not_committed(tmp_path):
    records = list(random_records(9, 8))
    make_shards(tmp_path, records[:6], 8)
    for name in data.DTYPES:
        with open(tmp_path / f'd/t-00/{name}.bin', 'ab') as file:
            file.write(b'x' * 13)
    writer = data.Writer(tmp_path / 'd/t-00', 8)
    assert writer.n_records == 6
    with pytest.raises(BlockingIOError):
        data.Writer(tmp_path / 'd/t-00', 8)
    writer.append(records[6:])
    writer.close()
    shards = data.Shards('d', 't', tmp_path)
    assert [shards.answer(i).tolist() for i in range(9)] == [r[2].tolist() for r in records]
    os.truncate(tmp_path / 'd/t-00/logits.bin', 100)  # a file that lost its end takes its records along
    assert len(data.read_index(tmp_path / 'd/t-00', 8)) < 9


def test_the_split_follows_the_text_not_its_place(tmp_path):
    records = list(random_records(300, 4))
    one, two = make_shards(tmp_path / 'a', records, 4), make_shards(tmp_path / 'b', records[::-1], 4, ('t-00', 't-01'))
    held = [{int(s.hashes[i]) for i in s.split()[1]} for s in (one, two)]
    assert held[0] == held[1] and 10 < len(held[0]) < 60 and not held[0] & {int(one.hashes[i]) for i in one.split()[0]}


def test_batches_align_inputs_targets_and_logits(tmp_path):
    records = list(random_records(5, 8))
    idx, targets, teacher_logits = make_shards(tmp_path, records, 8).batch([3, 0], start_id=9)
    row = 0
    for b, (_, ids, outs, logits, _) in enumerate([records[3], records[0]]):
        n, m = len(ids), len(outs)
        assert idx[b, :n + m].tolist() == [*ids, 9, *(100 + outs[:-1])] and targets[b].tolist() == [-1] * n + outs.tolist() + [-1] * (idx.size(1) - n - m)
        np.testing.assert_allclose(teacher_logits[row:row + m], logits - logits.max(1, keepdims=True), atol=0.01)
        row += m
    assert row == len(teacher_logits) == (targets >= 0).sum()


def test_an_epoch_is_a_fixed_order_of_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(20, 64, 1000)
    epochs = [data.batches(lengths, 32, 1, epoch) for epoch in (0, 1)]
    for order in epochs:
        assert sorted(np.concatenate(order)) == list(range(1000)) and len(order) == math.ceil(1000 / 32)
        assert lengths.sum() / sum(lengths[b].max() * len(b) for b in order) > 0.93
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    assert all(np.array_equal(a, b) for a, b in zip(epochs[1], data.batches(lengths, 32, 1, 1)))
    firsts = [lengths[data.batches(lengths, 32, seed, 0)[0]].mean() for seed in range(50)]  # no length comes first
    assert abs(np.mean(firsts) - lengths.mean()) < 5


# -----------------------------------------------------------------------------
# student


@pytest.fixture(scope='session')
def space(tokenizer):
    return OutputSpace(tokenizer, {'n': list(range(-12, 13)), 'tone': ['neutral', 'friendly', 'friend'], 'ok': [True, None]}, auxiliary=range(4, 100))


def test_the_reference_student_has_537_million_parameters():
    with torch.device('meta'):
        counts = Student(StudentConfig()).count_params()
    assert {k: round(n / 1e6, 1) for k, n in counts.items()} == dict(total=537.4, embedding=268.4, attention=67.1, mlp=201.3, head=0.5)


def test_every_parameter_is_initialised_and_optimised_once(space):
    model = tiny_student(space)
    groups = [p for group in model.param_groups(0.1) for p in group['params']]
    assert len(groups) == len({id(p) for p in groups}) == len(list(model.parameters()))
    assert {id(p) for p in model.param_groups(0.1)[0]['params']} == {id(p) for n, p in model.named_parameters() if p.dim() == 2 and n != 'wte.weight'}
    for name, p in model.named_parameters():
        expected = 1.0 if p.dim() == 1 else 0.02 / 2 if name.endswith('c_proj.weight') else 0.02
        assert abs((p.mean() if p.dim() == 1 else p.std()).item() / expected - 1) < 0.15, name


def test_cached_batched_decoding_equals_one_by_one_without_cache(space):
    rng, model = random.Random(0), tiny_student(space)
    for p in model.parameters():
        p.data *= 4  # decisions that are not near ties
    texts = [[rng.randrange(4, 500) for _ in range(rng.randint(1, 20))] for _ in range(9)]
    for constrain in (True, False):
        for text, fast in zip(texts, generate(model, space, texts, constrain)):
            outs, state = [], 0
            while state not in (-1, space.done) and len(text) + len(outs) < model.config.block_size:
                logits = model(torch.tensor([text + [1] + [space.output_ids[o] for o in outs]]))[0, -1]
                outs.append((logits.masked_fill(space.next_state[state] < 0, -math.inf) if constrain else logits).argmax().item())
                state = space.moves[state].get(outs[-1], -1)
            assert fast == outs


def as_stream(texts):
    texts = iter(texts)
    return lambda wait: next(texts)


@settings_of_hypothesis
@hypothesis.given(hypothesis.strategies.data())
def test_any_schema_and_student_gives_valid_answers_equal_to_one_token_at_a_time(tokenizer, data):
    st = hypothesis.strategies
    constants = st.one_of(st.integers(-99, 99), st.booleans(), st.none(), st.text(max_size=6), st.lists(st.integers(0, 9), max_size=2))
    values = st.lists(constants, min_size=1, max_size=5, unique_by=json.dumps)
    fields = data.draw(st.dictionaries(st.text('abcdefgh', min_size=1, max_size=5), values, min_size=1, max_size=4))
    try:
        space = OutputSpace(tokenizer, fields, data.draw(st.sampled_from([None, 2])), data.draw(st.booleans()), data.draw(st.sampled_from([None, 2])), range(4, 60))
    except ValueError:
        hypothesis.reject()
    texts = data.draw(st.lists(st.lists(st.integers(4, 499), max_size=20), min_size=1, max_size=7))
    model = tiny_student(space, data.draw(st.integers(0, 9)), block_size=20 + space.max_answer, n_kv_head=data.draw(st.sampled_from([1, 4])))
    for p in model.parameters():
        p.data *= 4  # decisions that are not near ties
    batch_size = data.draw(st.integers(1, 4))
    for constrain in (True, False):
        answers = list(decode(model, space, as_stream(texts), batch_size, constrain))
        assert [outs for outs, _ in answers] == stepwise(model, space, texts, constrain)
        for outs, decisions in answers:
            sure = confidence(fields, decisions)
            assert all(0 < p <= 1 + 1e-6 for p in sure.values()) and list(sure) == list(fields)
            if constrain:
                assert [json.dumps(v) for v in space.to_json(outs).values()] == [json.dumps(v) for v in json.loads(space.text(list(space.to_json(outs).values())).strip().removeprefix('```json').removesuffix('```')).values()]
                assert space.from_json(space.to_json(outs)) == outs if space.end_id is None else space.walk(outs) == space.done


def test_a_record_costs_a_pass_per_decision_and_no_row_waits(space):
    rng, model, calls = random.Random(0), tiny_student(space), []
    texts = [[rng.randrange(4, 500) for _ in range(rng.randint(1, 20))] for _ in range(40)]
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].numel()))
    decisions = [sum(space.forced[s] < 0 for s in space.states(outs)).item() for outs in generate(model, space, texts)]
    for constrain in (True, False):
        calls.clear()
        for text, n_decisions in zip(texts, decisions):
            calls.clear()
            outs = generate(model, space, [text], constrain)[0]
            if space.walk(outs) == space.done:
                assert len(calls) <= n_decisions + (not constrain) and sum(calls) <= len(text) + len(outs)  # nothing is read twice
    calls.clear()
    generate(model, space, texts, batch_size=8)
    assert len(calls) <= sum(decisions) / 8 + max(decisions) + 1  # the eight places are always taken, until the end


def test_confidence_is_the_probability_of_the_value_among_all_allowed_ones(space):
    model, text = tiny_student(space), [5, 9, 77, 300]
    for p in model.parameters():
        p.data *= 3
    for temperature in (1.0, 2.5):
        (outs, decisions), = decode(model, space, as_stream([text]))
        sure, chosen = confidence(space.fields, decisions, dict.fromkeys(space.fields, temperature)), space.to_json(outs)
        for field, values in space.fields.items():
            posterior = []
            for value in values:  # each value's whole path, the fields before as they were chosen
                path = space.from_json({**chosen, field: value})
                logits = model(torch.tensor([text + [1] + [space.output_ids[o] for o in path[:-1]]]))[0, len(text):]
                states = space.states(path)
                log_p = (logits.masked_fill(space.next_state[states] < 0, -math.inf) / temperature).log_softmax(-1)
                posterior.append(sum(log_p[i, o].item() for i, (s, o) in enumerate(zip(states, path)) if space.field[s] == field))
            posterior = np.exp(posterior)
            assert posterior.sum() == pytest.approx(1, rel=1e-4)
            assert sure[field] == pytest.approx(posterior[[json.dumps(v) for v in values].index(json.dumps(chosen[field]))], rel=1e-3)


def test_constrained_answers_are_always_valid(space):
    rng = random.Random(0)
    for seed in range(5):
        texts = [[rng.randrange(4, 500) for _ in range(rng.randint(0, 30))] for _ in range(20)]
        for outs in generate(tiny_student(space, seed), space, texts):
            answer = space.to_json(outs)
            assert list(answer) == list(space.fields) and all(json.dumps(v) in map(json.dumps, space.fields[f]) for f, v in answer.items())


def test_no_token_sees_the_future_or_the_padding(space):
    model, idx = tiny_student(space), torch.randint(4, 500, (2, 12))
    out, idx[:, 8:] = model(idx), 0
    torch.testing.assert_close(model(idx)[:, :8], out[:, :8])
    targets = torch.where(torch.arange(12) % 3 == 0, 1, -1).expand(2, -1)
    torch.testing.assert_close(model(idx, targets), model(idx)[targets >= 0])


# -----------------------------------------------------------------------------
# training


def test_loss_of_a_hand_computed_case():
    p, q = (torch.tensor([[a, 1 - a]], dtype=torch.float64).log() for a in (0.1, 0.9))
    for a, b in ((p, q), (q, p)):
        loss, kl, ce, n = train.distill_loss(b, a, torch.tensor([1]), 0.75)
        assert kl.item() == pytest.approx(0.8 * math.log(9), rel=1e-5) and n == 1
        assert ce.item() == pytest.approx(-b[0, 1].item(), rel=1e-5) and loss.item() == pytest.approx(0.75 * kl.item() + 0.25 * ce.item(), rel=1e-5)


@pytest.mark.parametrize('divergence', ['forward', 'reverse', 'jsd'])
def test_a_perfect_student_has_no_divergence_and_no_gradient(divergence):
    logits = torch.randn(5, 7, requires_grad=True)
    loss, kl, _, _ = train.distill_loss(logits, logits.detach() + 3, torch.tensor([0, 1, 2, -1, 3]), 1.0, divergence=divergence)
    loss.backward()
    assert abs(kl.item()) < 1e-6 and logits.grad.abs().max() < 1e-6


def test_each_divergence_of_a_hand_computed_case():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    kl = lambda a, b: (a * np.log(a / b)).sum()
    m = 0.3 * p + 0.7 * q
    for divergence, expected in (('forward', kl(p, q)), ('reverse', kl(q, p)), ('jsd', 0.3 * kl(p, m) + 0.7 * kl(q, m))):
        got = train.distill_loss(torch.tensor(q).log()[None], torch.tensor(p).log()[None], torch.tensor([0]), 1.0, divergence=divergence, jsd_beta=0.3)[1]
        assert got.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_that_of_the_whole_vocabulary_where_the_teacher_gives_the_rest_nothing():
    kept, teacher, student = [3, 17, 40], torch.full((4, 64), -math.inf), torch.randn(4, 64)
    teacher[:, kept] = torch.randn(4, 3)
    student[:, [i for i in range(64) if i not in kept]] = -math.inf
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    whole = torch.where(p > 0, p * (p.clamp(min=1e-30).log() - log_q), torch.zeros(())).sum()
    kl = train.distill_loss(student[:, kept], teacher[:, kept], torch.zeros(4, dtype=torch.long), 1.0)[1]
    torch.testing.assert_close(kl, whole)


def test_both_terms_have_gradients_of_comparable_size():
    torch.manual_seed(0)
    teacher, norms = torch.randn(64, 30) * 2, []
    for kl_weight in (1.0, 0.0):
        logits = torch.zeros(64, 30, requires_grad=True)
        train.distill_loss(logits, teacher, teacher.argmax(-1), kl_weight)[0].backward()
        norms.append(logits.grad.norm().item())
    assert 0.2 < norms[0] / norms[1] < 1


def test_ignored_positions_have_no_gradient_and_temperature_scales_by_its_square():
    logits, teacher, targets = torch.randn(2, 3, 7) * 1e-2, torch.randn(2, 3, 7) * 1e-2, torch.tensor([[-1, 2, 0], [-1, -1, 4]])
    results = []
    for tau in (1.0, 5.0):
        x = logits.clone().requires_grad_()
        loss, kl, ce, n = train.distill_loss(x, teacher, targets, 1.0, tau)
        loss.backward()
        assert n == 3 and (x.grad[targets < 0] == 0).all() and (x.grad[targets >= 0] != 0).all()
        results.append((loss.item(), kl.item(), x.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.05) and results[1][1] * 25 == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0.1, atol=1e-5)


def test_both_terms_are_always_in_the_gradient_and_the_schedule_ends_where_it_should():
    at = lambda step: train.schedule(step, 100, 1.0, 0.1, 0.1, 0.9, 0.1, 1.0, False)
    assert at(0) == (pytest.approx(0.1), pytest.approx(0.9), 1) and at(99) == (pytest.approx(0.1), pytest.approx(0.1), 1)
    assert at(9)[0] == pytest.approx(1.0) and at(10)[0] == pytest.approx(1.0)
    assert all(0.1 <= at(s)[1] <= 0.9 for s in range(100)) and all(at(s)[0] >= at(s + 1)[0] for s in range(10, 99))
    tau = lambda step, anneal: train.schedule(step, 101, 1.0, 0.1, 0.1, 1.0, 1.0, 0.1, anneal)[2]
    assert [tau(step, True) for step in (0, 50, 100)] == pytest.approx([0.1, 0.55, 1.0]) and tau(0, False) == tau(100, False) == 0.1


def test_a_low_temperature_gives_near_ties_a_larger_share_of_the_gradient():
    def share(tau):
        """of the gradient: a near tie, beside a clear decision whose confidence alone is off."""
        logits = torch.tensor([[0.0, 0.0], [2.0, -2.0]], requires_grad=True)
        train.distill_loss(logits, torch.tensor([[0.1, -0.1], [1.5, -1.5]]), torch.tensor([0, 0]), 1.0, tau)[0].backward()
        tie, clear = logits.grad.norm(dim=1)
        return (tie / (tie + clear)).item()
    # by hand, two classes: tau (sigmoid(student's difference / tau) - sigmoid(teacher's / tau)) for both, here at tau = 1
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    tie, clear = abs(sigmoid(0) - sigmoid(0.2)), abs(sigmoid(4) - sigmoid(3))
    assert share(1.0) == pytest.approx(tie / (tie + clear), rel=1e-4) and share(0.1) > 0.99 > share(1.0)


def test_micro_batches_give_the_gradient_of_the_whole_batch(space, tmp_path):
    records = [(h, i % 500, o, l, e) for h, i, o, l, e in random_records(8, len(space.output_ids))]
    shards, model, grads = make_shards(tmp_path, records, len(space.output_ids)), tiny_student(space), []
    n_tokens = sum(len(r[2]) for r in records)
    for n_parts in (1, 3):
        model.zero_grad()
        for part in np.array_split(np.arange(8), n_parts):
            idx, targets, teacher_logits = shards.batch(part, 1)
            loss, *_ = train.distill_loss(model(idx, targets), teacher_logits, targets[targets >= 0], 0.5)
            (loss / n_tokens).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('family', ['gemma', 'llama'])
def test_a_student_of_all_layers_is_the_teacher(teachers, family):
    _, model = load_teacher(teachers[family])
    for name, p in model.named_parameters():
        p.data += 0.1 * torch.randn_like(p) if 'norm' in name else 0.0  # norm weights that are not all alike
    shape, types = engine_module.student_shape(model.config)
    kinds, output_ids = sorted(set(types)), list(range(5, 50))
    config = StudentConfig(vocab_size=model.config.vocab_size, output_vocab=45, block_size=64, n_layer=len(types), rope_of_layer=tuple(kinds.index(t) for t in types), **shape)
    student, idx = Student(config).eval(), torch.randint(4, 300, (3, 22))  # within the sliding window
    engine_module.copy_layers(student, model, output_ids, range(len(types)))
    with torch.no_grad():
        torch.testing.assert_close(student(idx), model(idx).logits[..., output_ids], atol=1e-5, rtol=1e-5)
        cache, parts = Cache(student), []
        for start, stop in ((0, 9), (9, 10), (10, 22)):
            pos, keep = cache.place([0, 1, 2], [start] * 3, [stop - start] * 3, [stop - start] * 3)
            parts.append(student(idx[:, start:stop].reshape(1, -1), cache=cache, pos=pos, keep=keep).view(3, stop - start, -1))
        torch.testing.assert_close(torch.cat(parts, 1), student(idx), atol=1e-5, rtol=1e-5)


def test_training_only_the_rows_seen_is_dense_adamw(space):
    idx, targets = torch.randint(4, 60, (6, 12)), torch.randint(0, 20, (6, 12))
    results = []
    for cut in (False, True):
        model = tiny_student(space).train()
        seen = train.SeenRows(model, np.unique(idx)) if cut else None
        if cut:
            seen.cut()
        optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-2)
        for part in (idx[:2], idx[2:]) * 3:  # rows without a gradient in a step still move by momentum
            F.cross_entropy(model(seen.lookup[part] if cut else part).flatten(0, 1), targets[:len(part)].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        if cut:
            seen.restore()
        results.append(model.state_dict())
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_a_teacher_start_trains_and_samples(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    for kind, frozen in (('first', True), ('even', False), ('none', True)):
        args = ('--init_from=teacher', f'--teacher_layers={kind}', f'--freeze_table={frozen}', '--n_layer=2', '--max_epochs=1', '--learning_rate=1e-3', '--overwrite=True')
        done = run(root, 'train.py', *args)
        assert done.returncode == 0, done.stderr
        state = torch.load(root / 'out/toy/best.pt', weights_only=True)
        assert (state['model']['wte.weight'].dtype == torch.float16) == frozen and state['student']['qk_norm'] == (kind != 'none')
        assert list(json.loads(run(root, 'sample.py', '--text=hello my friend').stdout)) == list(FIELDS)
        assert 'trained already' in run(root, 'train.py', *args[:-1]).stdout


def test_two_processes_train_the_same_student(project, tmp_path):
    root, one = (clone_task(project, tmp_path / name, 'toy-00') for name in 'ab')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={random.randint(20000, 60000)}', 'train.py', 'config/toy.py']
    args = ['--max_epochs=2', '--save_steps=5']
    assert run(one, 'train.py', *args).returncode == 0
    for want, how in (('train step=7 ', signal.SIGTERM), ('train step=27 ', signal.SIGKILL)):  # what was saved goes on
        process = subprocess.Popen([*launch, *args, '--log_steps=1'], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and not ((root / 'out/toy/log.txt').exists() and want in (root / 'out/toy/log.txt').read_text()):
            time.sleep(0.01)
        process.send_signal(how) if how == signal.SIGTERM else os.killpg(process.pid, how)  # torchrun passes the first on
        process.wait()
        assert 0 < torch.load(root / 'out/toy/ckpt.pt', weights_only=True)['step'] < 46
    done = subprocess.run([*launch, *args], cwd=root, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    a, b = weights(root), weights(one)
    for key in b:
        torch.testing.assert_close(a[key], b[key], atol=2e-3, rtol=1e-2)


def test_the_best_epoch_is_kept_and_patience_ends_a_run(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'train.py', '--max_epochs=40', '--patience=2', '--best_by=kl', '--learning_rate=3e-2')
    assert done.returncode == 0 and 'that is enough' in done.stdout, done.stdout
    kl = [float(line.split(' kl=')[1].split()[0]) for line in done.stdout.splitlines() if line.startswith('val ')]
    best, last = (torch.load(root / f'out/toy/{f}.pt', weights_only=True) for f in ('best', 'ckpt'))
    assert best['best']['step'] == best['step'] < last['step'] and best['figures']['kl'] == pytest.approx(min(kl), rel=1e-3) and last['figures']['kl'] == pytest.approx(kl[-1], rel=1e-3)
    assert kl.index(min(kl)) == len(kl) - 3 and len(kl) < 40 and last['finished']
    shown = run(root, 'sample.py').stderr, run(root, 'sample.py', '--which=last').stderr
    assert f'val step={best["step"]} ' in shown[0] and f'val step={last["step"]} ' in shown[1]
    assert 'trained already' in run(root, 'train.py', '--max_epochs=40', '--patience=2', '--best_by=kl', '--learning_rate=3e-2').stdout


def test_files_that_do_not_belong_together_are_found_at_the_start(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    path = root / 'data/toy/toy-00/logits.bin'
    np.fromfile(path, '<f2').reshape(-1, 64)[::-1].tofile(path)
    assert 'do not belong together' in one_line(run(root, 'train.py'))
    for wrong in ('--init_from=nowhere', '--divergence=x', '--best_by=luck'):
        assert 'must be one of' in one_line(run(root, 'train.py', wrong))


def test_the_training_bench_and_a_tracker(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'train.py', '--bench=True')
    figures = dict(f.split('=') for f in done.stdout.splitlines()[-1].split()[1:])
    assert done.returncode == 0 and float(figures['ratio']) > 1 and 0 < float(figures['mfu']) < 1.5, done.stderr
    assert not (root / 'out').exists()
    (root / 'trackio' / '__init__.py').parent.mkdir()
    (root / 'trackio' / '__init__.py').write_text('lines = []\ninit = lambda **k: print("init", k["name"])\nlog = lambda f: print("logged", *f)\nfinish = lambda: print("finished")\n')
    done = subprocess.run([sys.executable, 'train.py', 'config/toy.py', '--tracker=trackio', '--max_epochs=1'], cwd=root, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(root)}, timeout=100)
    assert 'init toy' in done.stdout and 'logged train/step' in done.stdout and 'logged val/step' in done.stdout and 'finished' in done.stdout
    assert 'pip install wandb' in one_line(run(root, 'train.py', '--tracker=wandb'))


def test_hidden_text_tokens_are_text_tokens_only(project, tmp_path):
    root = clone_task(project, tmp_path, 'toy-00')
    done = run(root, 'train.py', '--token_dropout=1.0', '--max_epochs=1')  # nothing of the text is left
    plain = run(root, 'train.py', '--max_epochs=1', '--overwrite=True')
    kl = [float(out.stdout.split(' kl=')[1].split()[0]) for out in (done, plain)]
    assert done.returncode == 0 and kl[0] != kl[1]


def weights(root):
    return torch.load(root / 'out/toy/ckpt.pt', weights_only=True)['model']


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_training_resumes_bit_for_bit(project, tmp_path, how):
    root = clone_task(project, tmp_path, 'toy-00')
    log = root / 'out/toy/log.txt'
    settings = ['--dropout=0.1', f'--grad_accum={1 if how == signal.SIGINT else 3}']
    process = subprocess.Popen([sys.executable, 'train.py', 'config/toy.py', '--log_steps=1', *settings], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    want = 'val step=23' if how == signal.SIGKILL else 'train step=5'  # a kill costs what came after the last epoch
    while process.poll() is None and not (log.exists() and want in log.read_text() and (how != signal.SIGKILL or (root / 'out/toy/ckpt.pt').exists())):
        time.sleep(0.005)
    process.send_signal(how)
    stdout = process.communicate()[0].decode()
    if how != signal.SIGKILL:
        assert process.returncode == 0 and 'the same command goes on' in stdout
    step = torch.load(root / 'out/toy/ckpt.pt', weights_only=True)['step']
    assert 0 < step < 115
    done = run(root, 'train.py', *settings, '--init_from=resume')
    assert done.returncode == 0 and f'from_step={step}' in done.stdout, done.stderr
    straight = clone_task(project, tmp_path / 'straight', 'toy-00')
    assert run(straight, 'train.py', *settings).returncode == 0
    a, b = weights(root), weights(straight)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_the_student_learns_what_the_teacher_does(project):
    log = [line for line in (project / 'train.py.stdout').read_text().splitlines() if line.startswith(('train ', 'val ', 'field ', 'plan ', 'model '))]
    lines = [(line.split()[0], dict(f.split('=') for f in line.split()[1:])) for line in log]
    val = [f for tag, f in lines if tag == 'val']
    assert len(val) == 5 and float(val[-1]['kl']) < float(val[0]['kl']) and float(val[-1]['valid']) > 0.9
    assert float(val[-1]['field']) > float(val[-1]['majority'])
    assert [f['name'] for tag, f in lines if tag == 'field'][:2] == list(FIELDS)
    assert (project / 'out/toy/log.txt').read_text().splitlines() == [line for line in log if not line.startswith('model')]


def test_a_finished_or_foreign_checkpoint_is_not_overwritten(project, tmp_path):
    assert 'trained already' in run(project, 'train.py').stdout
    before = (project / 'out/toy/ckpt.pt').read_bytes()
    assert 'n_layer 2 there, 3 here' in one_line(run(project, 'train.py', '--n_layer=3'))
    shards = data.Shards('toy', 'toy', project / 'data')
    needs = shards.meta['max_text'] + shards.meta['max_answer']  # more than any record here has, but not than a text may have
    assert f'set block_size = {needs} or more' in one_line(run(project, 'train.py', f'--block_size={needs - 1}', '--run=small'))
    assert (project / 'out/toy/ckpt.pt').read_bytes() == before
    root = clone_task(project, tmp_path, 'toy-00', 'out')
    for content in (before[:1000], b'', b'\x80\x04\x95cos\nsystem\n(S"touch hacked"\ntR.'):
        (root / 'out/toy/ckpt.pt').write_bytes(content)
        assert 'not a whole checkpoint' in one_line(run(root, 'sample.py', '--text=hi', '--which=last'))
    assert not (root / 'hacked').exists()


# -----------------------------------------------------------------------------
# sampling and evaluation


def test_agreement_figures_of_a_hand_computed_case():
    figures = agreement(['a', 'a', 'b', 'b'], ['a', 'b', 'b', 'b'])
    assert figures == pytest.approx(dict(agree=0.75, majority=0.75, f1=(2 / 3 + 4 / 5) / 2, kappa=0.5))
    assert agreement([True, None], [1, 1])['agree'] == 0  # true is not 1, a missing answer agrees with nothing


def test_evaluate_matches_a_slow_twin(project):
    shards = data.Shards('toy', 'toy', project / 'data')
    _, model, space = load_checkpoint(project / 'out/toy', 'cpu')
    rows = shards.split()[1]
    figures, per_field, answers = evaluate(model, space, shards, rows, batch_size=7)
    kl = hits = steps = same = exact = valid = fields = 0
    for i, got in zip(rows, answers):
        (free,), target = generate(model, space, [shards.ids(i).tolist()], constrain=False), shards.answer(i).tolist()
        assert free == got
        idx, targets, teacher_logits = shards.batch([i], model.config.start_id)
        q, p = model(idx)[0][targets[0] >= 0].log_softmax(-1), teacher_logits.log_softmax(-1)
        kl, hits, steps = kl + (p.exp() * (p - q)).sum().item(), hits + (q.argmax(-1) == targets[targets >= 0]).sum().item(), steps + len(target)
        same += sum(a == b for a, b in zip(free, target))
        exact, valid = exact + (free == target), valid + (space.walk(free) == space.done)
        fields += np.mean([(space.to_json(free) or {}).get(f) == v for f, v in space.to_json(target).items()])
    n = len(rows)
    expected = dict(records=n, kl=kl / steps, teacher_forced=hits / steps, student_only=same / steps, exact=exact / n, valid=valid / n, field=fields / n)
    assert {k: figures[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert figures['majority'] == pytest.approx(np.mean([f['majority'] for f in per_field.values()]))


def test_teacher_and_student_are_shown_against_the_truth_where_there_is_one(project, tmp_path):
    shards = data.Shards('toy', 'toy', project / 'data')
    _, model, space = load_checkpoint(project / 'out/toy', 'cpu')
    rows = shards.split()[1]
    answers = generate(model, space, [shards.ids(i).tolist() for i in rows])
    records, expected = [{'text': 'of another split', 'truth': {'spam': True}}, {'text': 'no truth'}, {'text': 'bad', 'truth': 3}], []
    for n, i in enumerate(rows):
        truth = {'spam': n % 3 == 0} | ({'tone': 'friendly'} if n % 2 else {})
        records.append({'text': space.tokenizer.decode(shards.ids(i).tolist()), 'truth': truth})
        expected += [(f, space.to_json(shards.answer(i).tolist())[f] == v, space.to_json(answers[n])[f] == v) for f, v in truth.items()]
    (tmp_path / 'input.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    lines = {line['name']: line for _, line in truth_lines(tmp_path / 'input.jsonl', space, shards, rows, answers)}
    for field in FIELDS:
        mine = [pair[1:] for pair in expected if pair[0] == field]
        assert [lines[field][k] for k in ('records', 'teacher', 'student')] == pytest.approx([len(mine), *np.mean(mine, axis=0)])
    assert not list(truth_lines(project / 'data/toy/input.jsonl', space, shards, rows, answers))


def test_each_line_in_is_one_json_line_out_in_order(project, tmp_path):
    texts = ['hello my friend', '', 'the cat ' * 2000, '😀 été 日本', 'buy \0 now', 'مرحبا', 'hello my friend']
    content = '\n'.join(texts).encode() + b'\n\xff\xfe bad bytes'
    (tmp_path / 'texts.txt').write_bytes(content)
    piped, filed = run(project, 'sample.py', '--sample_batch=3', stdin=content), run(project, 'sample.py', f'--input={tmp_path}/texts.txt')
    answers = [json.loads(line) for line in piped.stdout.splitlines()]
    assert piped.stdout == filed.stdout and len(answers) == 8 and answers[0] == answers[6] and answers[1] == {'error': 'empty text'}
    assert all(list(a) == list(FIELDS) for a in answers[:1] + answers[2:])
    assert '1 texts were longer' in piped.stderr


def test_too_long_texts_can_be_refused_and_confidence_is_added(project):
    content = ('hello my friend\n' + 'the cat ' * 50 + '\nbuy now\n').encode()
    done = run(project, 'sample.py', '--too_long=refuse', '--confidence=True', stdin=content)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert second['error'].startswith('text has 1') and len(second) == 1
    assert list(first['_confidence']) == list(FIELDS) and all(0 < p <= 1 for p in third['_confidence'].values())
    assert 'must be one of' in one_line(run(project, 'sample.py', '--too_long=drop'))


def test_records_the_student_is_unsure_of_are_marked_or_answered_by_the_teacher(project, teachers):
    shards = data.Shards('toy', 'toy', project / 'data')
    checkpoint, model, space = load_checkpoint(project / 'out/toy', 'cpu')
    rows = shards.split()[1]
    content = '\n'.join(space.tokenizer.decode(shards.ids(i).tolist()) for i in rows).encode()
    sure = [json.loads(line)['_confidence'] for line in run(project, 'sample.py', '--confidence=True', stdin=content).stdout.splitlines()]
    least = np.unique([min(s.values()) for s in sure])
    gap = np.diff(least).argmax()
    limit = float(least[gap:gap + 2].mean())
    marked = [json.loads(line) for line in run(project, 'sample.py', f'--min_confidence={limit}', stdin=content).stdout.splitlines()]
    assert [m.get('_defer', False) for m in marked] == [min(s.values()) < limit for s in sure] and 0 < sum('_defer' in m for m in marked) < len(rows)
    done = run(project, 'sample.py', f'--min_confidence={limit}', f'--teacher={teachers["gemma"]}', '--sample_batch=7', stdin=content)
    for i, before, after in zip(rows, marked, map(json.loads, done.stdout.splitlines()), strict=True):
        expected = space.to_json(shards.answer(i).tolist()) | {'_teacher': True} if '_defer' in before else before
        assert after == expected
    assert 'is not the teacher' in done.stderr or done.returncode == 0
    assert 'is not the teacher this student learned from' in run(project, 'sample.py', '--min_confidence=1', f'--teacher={teachers["llama"]}', stdin=content).stderr


def test_a_line_of_a_slow_pipe_is_answered_at_once(project):
    with subprocess.Popen([sys.executable, 'sample.py', 'config/toy.py'], cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for line in (b'hello my friend\n', b'\n', b'buy now\n'):
            process.stdin.write(line)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())  # before the next line is written
        process.stdin.close()
        assert process.wait(60) == 0 and process.stdout.read() == b''


def test_temperature_calibration_error_cascade_and_cost_on_cases_done_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(4000, 3)
    held, choice = torch.cat((logits, torch.full((4000, 2), -math.inf)), 1), logits.argmax(-1)
    targets = torch.multinomial((logits / 2).softmax(-1), 1)[:, 0]  # the teacher is half as sure as the student
    for scale in (1, 3):
        decisions = [[('f', z * scale, c)] for z, c in zip(held, choice)]
        assert fit_temperature(decisions, (choice == targets).tolist()) == pytest.approx(2 * scale, rel=0.1)
    two_steps = [[('f', z, c), ('f', z, c)] for z, c in zip(held, choice)]  # a value of two tokens
    both = (choice == targets) & (choice == torch.multinomial((logits / 2).softmax(-1), 1)[:, 0])
    assert fit_temperature(two_steps, both.tolist()) == pytest.approx(2, rel=0.1) and fit_temperature([[], []], [True, False]) == 1
    assert calibration_error([0.95, 0.95, 0.55, 0.55], [True, False, True, False]) == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    sure, right = np.array([[0.9, 0.9], [0.4, 0.9], [0.8, 0.3], [0.7, 0.7]]), np.array([[1, 1], [0, 1], [1, 0], [1, 0]], bool)
    assert list(cascade(sure, right, (0, 0.5, 1))) == [
        {'deferred': 0, 'min_confidence': 0.3, 'field': 5 / 8, 'exact': 1 / 4, 'kept_field': 5 / 8},
        {'deferred': 0.5, 'min_confidence': 0.7, 'field': 7 / 8, 'exact': 3 / 4, 'kept_field': 3 / 4},
        {'deferred': 1, 'min_confidence': 1.0, 'field': 1, 'exact': 1, 'kept_field': 1.0}]
    work = {'extract_hours': 1.0, 'train_hours': 0.5, 'teacher_rec_s': 10.0}
    money = cost(work, 1000.0, 3.6, 0.0, 1000)
    assert money['teacher_million'] == pytest.approx(100) and money['student_million'] == pytest.approx(1) and money['spent'] == pytest.approx(5.4)
    assert money['break_even'] == pytest.approx(5.4 / 99 * 1e6) and money['days'] == pytest.approx(5.4 / 99 * 1e3)
    assert cost(work, 1000.0, 3.6, 0.5, 1000)['break_even'] == math.inf  # a teacher that costs less than the student


def test_students_are_compared_in_a_table_and_a_picture(project):
    pytest.importorskip('matplotlib')
    done = run(project, 'sample.py', '--compare=out/toy,out/toy')
    figures = [dict(f.split('=') for f in line.split()[1:]) for line in done.stderr.splitlines() if line.startswith('student ')]
    assert [f['run'] for f in figures] == ['toy', 'toy'] and all(float(f['rec_s']) > 0 and float(f['latency_ms']) > 0 for f in figures), done.stderr
    assert (project / 'out/compare.png').stat().st_size > 1000
    assert 'does not exist' in one_line(run(project, 'sample.py', '--compare=out/toy,out/nobody'))


def test_the_bench_of_decoding_finds_its_twins_identical(project):
    done = run(project, 'sample.py', '--bench=True')
    lines = [dict(f.split('=') for f in line.split()[1:]) for line in done.stderr.splitlines() if line.startswith('bench ') and ' (' not in line]
    assert len(lines) == 6, done.stderr
    for line in lines[:4]:
        assert line['identical'] == '1' and float(line['passes']) <= len(FIELDS) + 1
    assert float(lines[4]['p99_ms']) >= float(lines[4]['median_ms']) > 0 and float(lines[5]['of_engine']) > 0


def test_sampling_needs_only_the_folder_of_the_run(project, tmp_path):
    root = clone_task(project, tmp_path, 'out')
    shutil.rmtree(root / 'data/toy')
    done = run(root, 'sample.py', '--text=hello my friend')
    assert list(json.loads(done.stdout)) == list(FIELDS) and done.stdout.count('\n') == 1
    few = tmp_path / 'elsewhere'
    for path in ('sample.py', 'evaluate.py', 'model.py', 'space.py', 'config/__init__.py', 'data/__init__.py', 'out/toy/best.pt', 'out/toy/tokenizer.json'):
        (few / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, few / path)
    alone = subprocess.run([sys.executable, 'sample.py', '--name=toy', '--device=cpu', '--text=hello my friend'], cwd=few, capture_output=True)
    assert alone.stdout.decode() == done.stdout, alone.stderr.decode()
    report = run(root, 'sample.py', '--which=last')
    assert 'val step=115' in report.stderr and report.stdout == '' and report.returncode == 0
    assert 'does not exist; run: python train.py' in one_line(run(root, 'sample.py', '--name=other'))


def test_the_report_shows_teacher_and_student_side_by_side(project):
    done = run(project, 'sample.py', '--examples=2')
    assert done.stderr.count('  teacher {') == done.stderr.count('  student {') == 2
    (shown,) = [line for line in done.stderr.splitlines() if line.startswith('val ')]
    assert shown in (project / 'train.py.stdout').read_text().splitlines()
    tags = [line.split()[0] for line in done.stderr.splitlines() if '=' in line]
    assert tags.count('calibration') == tags.count('cost') == 1 and tags.count('cascade') == 6


def test_a_reader_that_goes_away_ends_it_quietly(project):
    done = subprocess.run(f'yes hello my friend | head -5000 | {sys.executable} sample.py config/toy.py 2>err.txt | head -1', shell=True, cwd=project,
                          capture_output=True, timeout=100)
    assert json.loads(done.stdout) and 'Error' not in (project / 'err.txt').read_text()
