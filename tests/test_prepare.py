"""data/*/prepare.py: whatever the source, input.jsonl comes out."""
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile

from conftest import ROOT


def prepared(folder, name, *args):
    """the texts that a copy of data/<name>/prepare.py writes in folder."""
    (folder / name).mkdir(exist_ok=True)
    shutil.copy(ROOT / 'data' / name / 'prepare.py', folder / name)
    done = subprocess.run([sys.executable, f'{name}/prepare.py', *args], cwd=folder, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / name / 'input.jsonl').open(encoding='utf-8')]


def test_a_file_of_any_kind_becomes_texts(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'one, two\n\n  three \none, two\n\xff bad\n')
    (tmp_path / 'a.csv').write_text('id,text\n1,"one, two"\n2,three\n3\n')
    (tmp_path / 'a.tsv').write_text('one, two\t1\nthree "\t2\n')
    (tmp_path /
     'a.jsonl').write_text('{"text": "one, two"}\n{"no": 1}\nnot json\n{"text": 3}\n{"text": "three"}\n')
    texts = {
        kind: [r['text'] for r in prepared(tmp_path, 'reddit', f'--input={tmp_path}/a.{kind}')]
        for kind in ('txt', 'csv', 'tsv', 'jsonl')
    }
    assert texts == dict(txt=['one, two', 'three', '\ufffd bad'], csv=['one, two', 'three'],
                         tsv=['one, two', 'three "'], jsonl=['one, two', 'three'])
    for wrong in ('--input', '--input=nowhere.txt', 'a.txt'):
        done = subprocess.run([sys.executable, 'reddit/prepare.py', wrong], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


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
    assert {r['text']
            for r in prepared(tmp_path, 'mail')
            } >= {'lunch. I will be there at noon, see', 'été. Buy this & that now or never'}
