"""device/ with copied values: run.py answers like sample.py, student.js like run.py; what is written twice agrees."""
import json
import random
import shutil
import string
import subprocess
import sys
import unicodedata

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers

for package in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(package)  # optional: requirements-device.txt
import onnxruntime

from data import write_json
from device.export import Reader, copy_runners, describe_values, write_onnx
from device.run import Student as Runner
from device.shrink import round_to_int8
from device.task import make_task
from distil.candidates import find_candidates, fold, read_locale
from distil.checkpoint import CHECKPOINT
from distil.places import find_edges, is_word
from distil.reader import load_encoder
from distil.space import OutputSpace, tokenizer_hash
from model import Student, StudentConfig
from sample import Labeler, label_text
from tests import test_candidates as tables
from tests.conftest import PROMPT, ROOT
from tests.test_copied import FIELDS
from tests.test_device import Students, as_lines, npm, page, same_records  # noqa: F401
from tests.test_reader import bert  # noqa: F401

DATED = {'title': {'type': 'string'}, 'due': {'type': 'string', 'format': 'date'},
         'mood': {'enum': ['good', 'bad']}, 'sums': {'type': 'array', 'maxItems': 2, 'items': {'type': 'number'}},
         'at': {'type': ['string', 'null'], 'format': 'time'}, 'n': {'type': 'integer'}}
ONLY = {'a "key"': {'type': 'string'}, 'sent': {'type': 'string', 'format': 'date-time'}}
TASKS = [(FIELDS, 'en_US', None), (DATED, 'de', '2026-05-20'), (ONLY, 'en_US', None)]
PARTS = ('3 12 4.50 $1,080.00 1.080,00 -7 5/3/2026 3.5.2026 2026-05-03 May 3. Mai 2026 10:00 14 Uhr 2 pm morgen am '
         "\"no\" \\ \\n {\"a\": Bob's (Anna) 😀 👩‍👩‍👧 日本 の 猫 한국 café e\u0301te\u0301 İstanbul Straße 𝟏𝟐 ١٢ "
         "A4711 x_5 … ’s").split(' ')


def make_texts(words):
    rng = random.Random(0)
    texts = [' '.join(rng.choices([*words, *PARTS], k=rng.randint(1, 14))) for _ in range(48)]
    long = ' '.join(rng.choices([*words, *PARTS], k=1200))[:4000]
    return [*texts, '', ' \t', 'x', '7', '"', '\\', '\\"', '😀', '日本の猫', '\u200b', 'a\x01b', '[SEP] a [MASK]',
            'a' * 4000, long, 'am 3. Mai 2026 um 10:00 für 1.080,50 €',
            'on May 3 2026 at 10:00 for $1,080.50', '3 ' * 40, '"Bob" "Bob"']


def make_student(folder, bert, tokenizer, fields, locale, today, int8=False):
    """writes a random student that copies values as train.py does, and its export. Returns the folder."""
    locale, encoder = read_locale(locale), load_encoder(str(bert))
    space = OutputSpace(tokenizer, fields, None, False, 2, range(4, 200), locale=locale, reference_date=today)
    V = len(space.output_ids)
    torch.manual_seed(3)
    student = Student(StudentConfig(
        vocab_size=V + 3, output_vocab=V, block_size=160, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_mlp=32,
        start_id=V, encoder=vars(encoder.config), places=True), encoder).eval()
    for name, p in student.named_parameters():
        p.data *= 1 if name.startswith('encoder.') else 4    # decisions that are not near ties
    task = {'fields': fields, 'indent': None, 'fence': False, 'end_id': 2, 'output_ids': space.output_ids,
            'tokenizer_hash': tokenizer_hash(tokenizer), 'prompt': PROMPT, 'max_text': 9000, 'teacher': 'a/teacher',
            'fingerprint': '', 'left_out': (), 'locale': locale, 'reference_date': today}
    per_field = {path: {'temperature': 0.7 + n / 3} for n, path in enumerate(space.schema.paths)}
    checkpoint = {'format': CHECKPOINT, 'student': vars(student.config), 'model': student.state_dict(),
                  'task': task, 'per_field': per_field}
    folder.mkdir()
    tokenizer.save(str(folder / 'tokenizer.json'))
    encoder.tokenizer.save(str(folder / 'reader.json'))
    torch.save(checkpoint, folder / 'best.pt')
    device = folder / 'device'
    device.mkdir()
    graphs = write_onnx(round_to_int8(student) if int8 else student, device / 'student.onnx')
    shutil.copy(folder / 'reader.json', device / 'tokenizer.json')
    sizes = {file: (device / file).stat().st_size for file in (*graphs, 'tokenizer.json')}
    write_json(device / 'task.json', make_task('toy', checkpoint, space, student) | {'bytes': sizes})
    copy_runners(device)
    return folder


@pytest.fixture(scope='module')
def students(tmp_path_factory, bert, tokenizer):
    return Students(tmp_path_factory, 'copying', lambda folder, n: make_student(folder, bert, tokenizer, *TASKS[n]))


@pytest.mark.slow
@pytest.mark.parametrize('n', range(len(TASKS)))
def test_run_py_gives_the_answers_of_answer_text(students, words, n):
    texts, confidence = make_texts(words), ('full', True, False)[n]
    assert len(texts) > 60
    least = 0.3141  # no confidence of these students is as near to it as processors differ
    labeler = Labeler(students[n], 'cpu', confidence=confidence, min_confidence=least, dtype='float32')
    expected = [record for text in texts for record, _ in label_text(labeler, text)]
    records = Runner(students[n] / 'device', confidence, least)(texts)
    for text, record, other in zip(texts, records, expected, strict=True):
        if confidence == 'full' and '_confidence' in record:    # on a device it shows choices alone
            other['_confidence'] = {k: v for k, v in other['_confidence'].items() if k in record['_confidence']}
        assert same_records(record, other), (text, record, other)
    assert len({json.dumps(record) for record in records}) > 40  # they are not all equal


@pytest.mark.slow
@pytest.mark.parametrize('n', range(len(TASKS)))
def test_student_js_gives_the_answers_of_run_py(students, npm, words, n):
    device, texts = students[n] / 'device', make_texts(words)
    shutil.copytree(npm, device / 'npm', dirs_exist_ok=True)
    for confidence, flag in ((True, '--confidence'), ('full', '--confidence=full')):
        done = subprocess.run(['node', device / 'student.js', flag], input=as_lines(texts), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        records = [json.loads(line) for line in done.stdout.splitlines()]
        for text, record, other in zip(texts, records, Runner(device, confidence)(texts), strict=True):
            assert same_records(record, other), (text, record, other)


@pytest.mark.slow
def test_of_the_same_weights_in_8_bits_the_graph_gives_the_answers(tmp_path, bert, tokenizer, words):
    folder = make_student(tmp_path / 'small', bert, tokenizer, *TASKS[0], int8=True)
    labeler, texts = Labeler(folder, 'cpu', confidence=False, dtype=None), make_texts(words)[::3]
    labeler.student = round_to_int8(labeler.student)
    names = {name for name, part in labeler.student.named_modules() if type(part).__name__ == 'Int8Linear'}
    assert {'point_query', 'point_key', 'encoder_proj'} <= names
    assert Runner(folder / 'device')(texts) == labeler(texts)


@pytest.mark.slow
@pytest.mark.parametrize('B, T, A', [(1, 2, 2), (3, 7, 5), (9, 20, 2)])
def test_the_graphs_compute_the_students_logits(students, B, T, A):
    labeler = Labeler(students[0], 'cpu', dtype='float32')
    student, V = labeler.student, labeler.space.V
    reader, writer = (onnxruntime.InferenceSession(students[0] / 'device' / file)
                      for file in ('reader.onnx', 'student.onnx'))
    rng = torch.Generator().manual_seed(0)
    draw = lambda least, most, *shape: torch.randint(least, most, shape, generator=rng)
    text, answer = draw(0, 60, B, T), draw(0, V, B, A)
    answer[:, 1:] = torch.where(draw(0, 2, B, A - 1) > 0, draw(V + 1, V + 3, B, A - 1), answer[:, 1:])  # places, too
    answer[:, 0] = V
    text[torch.arange(T) >= draw(2, T + 1, B, 1)] = answer[torch.arange(A) >= draw(1, A + 1, B, 1)] = -1
    with torch.no_grad():
        expected = student(text, answer, only_last=True)
        states = Reader(student)(text)
    feed = {'text': text.numpy(), 'answer': answer.numpy()}
    read, = reader.run(None, {'text': feed['text']})
    used = text.numpy() >= 0
    assert abs(read - states.numpy())[used].max() < 1e-4
    logits, = writer.run(None, {**feed, 'states': read})
    assert logits.shape == (B, V + 1 + T) and abs(logits - expected.numpy()).max() < 2e-3


def test_run_py_answers_without_torch_and_babel(students, tmp_path):
    program = '''import sys
for name in 'torch', 'babel', 'transformers':
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from run import Student
import distil.places
assert distil.places.__file__.startswith(sys.argv[1])
print(Student(sys.argv[1])(['Bob is here']))'''
    done = subprocess.run([sys.executable, '-c', program, students[0] / 'device'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "'people'" in done.stdout, done.stderr


def test_the_card_says_what_is_copied(students):
    schema = Labeler(students[0], 'cpu').space.schema
    copied = {part.group: part.describe() for part in schema.copied}
    shown = {leaf.path: describe_values(leaf, copied.get(leaf.path, '')) for leaf in schema.leaves}
    assert shown['people[]'] == 'a list of words of the text' and shown['tone'] == '"calm", "angry"'
    assert shown['lines[].qty'] == 'a list of an integer in the text' and shown['lines'] == 'a list of up to 2 items'


# -----------------------------------------------------------------------------
# what is written twice, in Python and in JavaScript


@pytest.fixture(scope='module')
def node(tmp_path_factory):
    """function of JavaScript, with the names that candidates.js and places.js export, and a JSON value: what it returns
    for this value, `given`."""
    if not shutil.which('node'):
        pytest.skip('Node.js is not installed')

    def run_node(program, given):
        path = tmp_path_factory.mktemp('given') / 'given.json'
        path.write_text(json.dumps(given))
        modules = [(ROOT / 'device' / file).as_uri() for file in ('candidates.js', 'places.js')]
        source = f'''import {{ readFileSync }} from 'node:fs';
            import {{ fold, findCandidates }} from {json.dumps(modules[0])};
            import {{ findEdges, WordPiece }} from {json.dumps(modules[1])};
            const given = JSON.parse(readFileSync({json.dumps(str(path))}));
            process.stdout.write(JSON.stringify(({program})(given)));'''
        done = subprocess.run(['node', '--input-type=module'], input=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    return run_node


def table_texts():
    """the texts in the tables of test_candidates.py."""
    texts = set()
    for function in (getattr(tables, name) for name in dir(tables) if name.startswith('test_')):
        for mark in getattr(function, 'pytestmark', ()):
            if mark.name == 'parametrize' and 'text' in (names := mark.args[0].split(', ')):
                texts |= {row[names.index('text')] for row in mark.args[1]}
    return sorted(texts)


def test_candidates_js_finds_what_candidates_py_finds(node):
    rng, texts = random.Random(0), table_texts()
    assert len(texts) > 100
    pieces = [*tables.PARTS.replace('\ud800', '').split(' '), ' ', *sum((text.split() for text in texts), [])]
    texts += [''.join(rng.choices(pieces, k=rng.randint(1, 20))) for _ in range(300)]
    texts += [' '.join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(300)]
    cases = [(kind, text, name, today) for name in tables.LOCALES for text in texts
             for kind, today in (('number', None), ('integer', None), ('date', None), ('date', tables.TODAY),
                                 ('time', None), ('date-time', tables.TODAY))]
    found = node('''({ cases, locales }) => cases.map(([kind, text, name, today]) =>
        findCandidates(kind, text, locales[name], today).map(({ start, end, value }) => [start, end, value]))''',
                 {'cases': cases, 'locales': tables.LOCALES})
    total = 0
    for (kind, text, name, today), of_js in zip(cases, found, strict=True):
        of_py = [list(candidate) for candidate in find_candidates(kind, text, tables.LOCALES[name], today)]
        assert of_js == of_py, (kind, text, name, today)
        total += len(of_py)
    assert total > 5000


def test_characters_are_folded_and_joined_to_words_alike(node):
    chars = [chr(code) for code in range(1, 0x32000) if unicodedata.category(chr(code)) not in ('Cs', 'Cn')]
    folded, edges = node('''(chars) => [chars.map(fold), chars.map((char) => findEdges(['a', char])[1])]''', chars)
    assert len(folded) == len(chars) > 100_000
    assert [char for char, of_js in zip(chars, folded) if fold(char) != of_js] == []
    assert [char for char, of_js in zip(chars, edges) if find_edges('a' + char)[1] != of_js] == []
    assert is_word('é') and not is_word('-')


@pytest.mark.parametrize('setting', [{}, {'lowercase': False}, {'strip_accents': True, 'lowercase': False},
                                     {'handle_chinese_chars': False}])
def test_word_piece_cuts_as_tokenizers_does(node, bert, words, setting):
    tokenizer = Tokenizer.from_file(str(bert / 'tokenizer.json'))
    tokenizer.normalizer = normalizers.BertNormalizer(**setting)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rng = random.Random(0)
    letters = [*string.printable, *'éÉİıßΣσςÅ한가日本の猫😀١𝟏²½ªﬁ“”’…$€+~`^|<>=\u0301\u200b\u200d\u00ad\ufe0f\U00020001'
               'ก็ไ𐐀Ａ［］']
    texts = [''.join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(400)]
    pieces = [*words, *letters, ' ', '[SEP]', '[MASK]', '[sep]']
    texts += [''.join(rng.choices(pieces, k=rng.randint(1, 20))) for _ in range(400)]
    texts = [' '.join(text.split()) for text in [*texts, *make_texts(words), 'a' * 100, 'a' * 101]]
    found = node('''({ json, texts }) => { const tokenizer = new WordPiece(json);
        return texts.map((text) => tokenizer.encode(text)); }''',
                 {'json': json.loads(tokenizer.to_str()), 'texts': texts})
    for text, of_js in zip(texts, found, strict=True):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert (of_js['ids'], list(map(tuple, of_js['offsets']))) == (encoding.ids, encoding.offsets), repr(text)


# -----------------------------------------------------------------------------
# the page


@pytest.mark.slow
def test_the_page_marks_the_copied_values(page, students):
    page, _ = page
    expect = pytest.importorskip('playwright.sync_api').expect
    text = 'Anna 😀 sent 3 cups to "Bob" <b>'
    record, = Labeler(students[0], 'cpu', confidence=False, dtype='float32')([text])
    page.fill('#text', text)
    expect(page.locator('.marked')).to_have_text(text)
    marks = page.evaluate('[...document.querySelectorAll("mark")].map((mark) => [mark.textContent, mark.title])')
    assert marks and record['name'] is None or any('name' in title for _, title in marks)
    spelled = {}
    for part, title in marks:
        for path in title.split(', '):
            spelled[path] = spelled.get(path, '') + part
    values = {f'people[{n}]': value for n, value in enumerate(record['people'])}
    assert values.items() <= spelled.items()
    shown = page.evaluate('''Object.fromEntries([...document.querySelectorAll("section")].map((section) => [
        section.querySelector("h2").textContent, section.querySelector("bdi").textContent]))''')
    assert values.items() <= shown.items()
