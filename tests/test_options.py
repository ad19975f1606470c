"""Options that come with each text: how they stand behind it, and teacher and student that point at one of them."""
import json
import random

import numpy as np
import pytest
import torch

from data.lines import cut_text
from distil.copying import answer_slowly
from distil.confidence import begin_row, read_rows
from distil.decode import decode, pad_rows
from distil.drafts import Drafts
from distil.engine import Teacher, answer
from distil.options import (check_options, find_options, read_text, split_options, text_end, thin_options, tidy,
                            write_options)
from distil.labeler import narrow
from distil.labels import Labels
from distil.places import Source
from distil.prompts import answer_format, offer
from distil.reader import count_unread, cut_row, encode_pages, keep_options_apart, load_encoder, read_pages
from distil.schema import Schema
from distil.space import OutputSpace
from distil.teacher import encode_prompt
from model import Student, StudentConfig
from sample import answer_text
from tests.conftest import PROMPT, clone_task, load_teacher, run
from tests.test_prepare import run_prepare
from tests.test_reader import bert  # noqa: F401

OPTION = {'type': 'string', 'x-options': True}
FIELDS = {'tone': ['calm', 'angry'], 'folder': OPTION, 'name': {'type': ['string', 'null']},
          'tags': {'type': 'array', 'maxItems': 2, 'items': OPTION}}
OPTIONS = {'folder': ['Invoices', {'value': 'my "Travel"', 'description': 'tickets, hotels'}, 'Invoices'],
           'tags': ['urgent', 'later', 'old stuff']}
TEXT = 'my train ¶ leaves • at 9'


def test_options_stand_behind_the_text_and_are_found_there():
    text = write_options(TEXT, OPTIONS)
    assert text == ('my train leaves · at 9 ¶ folder • Invoices • my "Travel" — tickets, hotels ¶ '
                    'tags • urgent • later • old stuff')
    assert [text[start:end] for start, end, _ in find_options(text, 'folder')] == ['Invoices', 'my "Travel"']
    assert [value for *_, value in find_options(text, 'tags')] == ['urgent', 'later', 'old stuff']
    assert find_options(text, 'other') == [] == find_options('plain', 'folder') and text_end('plain') == 5
    assert text[:text_end(text)] == tidy(TEXT) and read_text({'text': TEXT}) == TEXT  # without options nothing changes
    assert find_options(write_options('', {'a': ['x']}), 'a')[0][2] == 'x'
    for wrong in ({'folder': 'x'}, {'folder': ['']}, {'folder': [3]}, {'folder': [{'description': 'x'}]}, ['x']):
        with pytest.raises(ValueError, match='option'):
            write_options('x', wrong)


def test_some_options_are_left_out_and_never_the_right_one():
    text, seen = write_options(TEXT, OPTIONS), set()
    chosen = text.index('later')
    for seed in range(50):
        other, parts = thin_options(text, random.Random(seed), [chosen])
        assert all(other[start:end] == text[there:there + end - start] for start, end, there in parts)
        names = [name for name, _ in split_options(other)]
        options = [value for *_, value in find_options(other, 'tags')]
        assert names == ['folder', 'tags'] and 'later' in options and {*options} <= {'urgent', 'later', 'old stuff'}
        seen.add(tuple(options))
    assert len(seen) == 4                                       # either of two is there or not


def test_what_is_copied_is_not_copied_from_the_options(tokenizer):
    schema = Schema(FIELDS)
    assert [part.kind for part in schema.copied] == ['option:folder', 'text', 'option:tags', 'option:tags']
    assert schema.canonical({'tone': 'calm', 'folder': ' a  • b', 'name': None, 'tags': []})['folder'] == 'a · b'
    space = OutputSpace(tokenizer, FIELDS)
    source, (folder, name, tag, _) = Source(
        write_options('Anna is late', {'tags': ['Anna', 'late']}), space), schema.copied
    assert (source.find(name, 'Anna') == [(0, 4)] and source.find(tag, 'Anna') == [(22, 26)]
            and not source.find(folder, 'x'))
    assert source.value(tag, 22, 26) == 'Anna' and not any(source.begins(at) for at in range(13, len(source.text)))


def test_a_long_text_is_cut_and_its_options_stay(bert, tokenizer):
    space, encoder = OutputSpace(tokenizer, FIELDS), load_encoder(str(bert))
    text = write_options('the cat sat on the mat ' * 9, {'folder': ['the cat', 'the mat'], 'tags': []})
    (whole,), _ = encode_pages(encoder, space, [text], 500)
    (cut,), (page,) = encode_pages(encoder, space, [text], 30)
    assert len(whole) > 40 and len(cut) == 30 and cut[:8] == whole[:8] and cut[-8:] == whole[-8:]
    assert [value for *_, value in page.spans('option:folder')] == ['the cat', 'the mat']
    ids, shorter = cut_text(text, tokenizer, {'max_text': 40})  # as extract.py cuts it
    assert len(ids) == 40 and shorter.endswith(text[text_end(text):]) and shorter.startswith('the cat sat')
    assert (len(shorter) < len(text) and find_options(shorter, 'folder')
            and cut_text('a b ' * 40, tokenizer, {'max_text': 5}))
    assert cut_row(encoder, list(range(40)), 10, 40) == [*range(9), 39]  # more options than it can read


@pytest.mark.parametrize('family', ['gemma', pytest.param('qwen', marks=pytest.mark.slow)])
def test_the_engine_points_at_options_as_one_pass_after_another(teachers, family):
    wrapped, model = load_teacher(teachers[family])
    before, after, end_id = encode_prompt(wrapped, PROMPT, chat=False)
    space = OutputSpace(wrapped.backend_tokenizer, FIELDS, None, False, end_id, range(4, 200))
    texts = [write_options(text, OPTIONS | {'folder': folders}) for text, folders in (
        ('the cat', ['one', 'two']), ('x', ['on', 'one', 'one more', '"', '日本']), ('the mat', []))]
    ids = [wrapped.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    answers, _ = answer(Teacher(model, before, space.output_ids), space, Drafts(space), ids, after)
    assert answers[2] == 'not_in_text'                          # there is no folder
    for text, of_text, found in zip(texts, ids, answers[:2]):
        slow = answer_slowly(model, space, before, of_text, after)
        assert found[0] == slow[0] and (found[3] == slow[3]).all()
        np.testing.assert_allclose(found[1], slow[1], atol=1e-3)
        starts = {start: value for start, _, value in find_options(text, 'folder')}
        step = next(n for n, out in enumerate(found[0]) if out >= space.V)
        known = found[4][step] > -np.inf
        assert {*found[3][step][known].tolist()} <= {*starts} and np.exp(found[4][step][known].astype(float)).sum() == \
            pytest.approx(1, abs=1e-2)


def test_a_student_decodes_options_as_one_by_one(bert, tokenizer, words):
    torch.manual_seed(1)
    space, encoder = OutputSpace(tokenizer, FIELDS), load_encoder(str(bert))
    keep_options_apart(encoder)
    V, rng = len(space.output_ids), random.Random(0)
    student = Student(StudentConfig(vocab_size=V + 3, output_vocab=V, block_size=160, n_layer=1, n_head=4, n_embd=16,
                                    n_mlp=32, n_kv_head=4, start_id=V, encoder=vars(encoder.config), places=True),
                      encoder)
    for name, p in student.eval().named_parameters():
        p.data *= 1 if name.startswith('encoder.') else 4
    some = lambda: [' '.join(rng.choices(words, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 5))]
    texts = [write_options(' '.join(rng.choices(words, k=5)), {'folder': some(), 'tags': some()}) for _ in range(12)]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for text, of_text, (outs, _) in zip(texts, ids, decode(student, space, ids, 5)):
        assert outs == answer_text(student, space, of_text)[0]
        (read,), (page,) = read_pages(student, space, [of_text])  # rows that begin with this text, which is read once
        fed = [begin_row(space, page, outs, outs[:n]) for n in (0, 1, 0, *range(2, len(outs)))]
        with torch.no_grad():
            slow = student(pad_rows([read] * len(fed), 'cpu'), pad_rows(fed, 'cpu'), only_last=True)
            torch.testing.assert_close(read_rows(student, read, fed), slow, atol=1e-4, rtol=1e-4)
        found, shown = space.to_json(outs), space.tokenizer.decode(of_text)
        assert found['folder'] in [value for *_, value in find_options(shown, 'folder')]
        tags = [value for *_, value in find_options(shown, 'tags')]
        assert {*found['tags']} <= {*tags} and (len(found['tags']) < 2 or len(tags) == 1 or len({*found['tags']}) == 2)


def test_the_order_of_options_changes_nothing(bert, tokenizer, words):
    """neither the states that are pointed at nor an answer."""
    torch.manual_seed(3)
    space, encoder, rng = OutputSpace(tokenizer, FIELDS), load_encoder(str(bert)), random.Random(1)
    keep_options_apart(encoder)
    V = len(space.output_ids)
    student = Student(StudentConfig(vocab_size=V + 3, output_vocab=V, block_size=160, n_layer=2, n_head=4, n_embd=16,
                                    n_mlp=32, n_kv_head=4, start_id=V, encoder=vars(encoder.config), places=True),
                      encoder)
    for name, p in student.eval().named_parameters():
        p.data *= 1 if name.startswith('encoder.') else 4

    def read(options):
        (ids,), (page,) = encode_pages(encoder, space, [write_options('the cat sat', options)], 140)
        states, text = encoder(torch.tensor([ids]))[0], page.source.text
        spans = {(name, text[a:b]): (a, b) for name, items in split_options(text) for a, b in items}
        return ids, {key: states[(page.starts >= a) & (page.ends <= b) & (page.starts >= 0)]
                     for key, (a, b) in ({'text': (0, 11)} | spans).items()}
    names = [' '.join(pair) for pair in zip(words[:10], words[10:20])]
    answers = []
    for _ in range(6):
        folders, tags = rng.sample(names, 10), rng.sample(names, 10)  # each is in both
        ids, states = read({'folder': folders, 'tags': tags} if rng.random() < 0.5 else
                           {'tags': tags, 'folder': folders})
        if answers:
            assert ids != before_ids
            for part, state in before.items():
                torch.testing.assert_close(states[part], state, atol=1e-5, rtol=1e-4)
        before, before_ids = states, ids
        teacher_ids = tokenizer.encode(write_options('the cat sat', {'folder': folders, 'tags': tags}),
                                       add_special_tokens=False).ids
        answers.append(space.to_json(next(decode(student, space, [teacher_ids]))[0]))
    assert answers == answers[:1] * 6
    assert (len(states) == 21
            and (states['folder', f'• {names[0]}'] - states['tags', f'• {names[0]}']).abs().max() > 0.01)
    assert (states['text'] - read({'folder': names[:3]})[1]['text']).abs().max() > 0.01  # the text sees all


def test_options_are_read_whole_where_their_positions_begin_anew(bert, tokenizer, words):
    space, encoder = OutputSpace(tokenizer, {'folder': OPTION}), load_encoder(str(bert))  # of 48 positions
    text = write_options('the cat', {'folder': [f'{a} {b}' for a in words[:6] for b in words[6:12]]})
    assert count_unread(encoder, text, 200) > 50
    keep_options_apart(encoder)
    (ids,), (page,) = encode_pages(encoder, space, [text], 200)
    assert count_unread(encoder, text, 200) == 0 and len(ids) > 100 and len(page.spans('option:folder')) == 36
    encoder(torch.tensor([ids]))


def test_more_options_than_it_reads_are_asked_about_in_groups(bert, tokenizer, words):
    torch.manual_seed(2)
    space, encoder = OutputSpace(tokenizer, {'folder': OPTION}), load_encoder(str(bert))
    keep_options_apart(encoder)
    V, rng = len(space.output_ids), random.Random(0)
    student = Student(StudentConfig(vocab_size=V + 3, output_vocab=V, block_size=60, n_layer=1, n_head=4, n_embd=16,
                                    n_mlp=32, n_kv_head=4, start_id=V, encoder=vars(encoder.config), places=True),
                      encoder).eval()
    names = [*dict.fromkeys(' '.join(rng.choices(words, k=2)) for _ in range(60))]
    text = write_options('the cat', {'folder': names})
    shorter = narrow(student, space, text)
    kept = [value for *_, value in find_options(shorter, 'folder')]
    assert 0 < len(kept) < len(names) and {*kept} <= {*names} and shorter.startswith('the cat ¶ folder • ')
    assert len(encoder.tokenizer.encode(shorter).ids) <= 60 and narrow(student, space, shorter) == shorter
    few = write_options('the cat', {'folder': names[:3]})
    assert narrow(student, space, few) == few


@pytest.mark.slow
def test_from_labels_with_options_to_json(project, bert, tmp_path):
    root, rng = clone_task(project, tmp_path), random.Random(0)
    lines = [{'text': f'file the {word} now', 'options': {'folder': rng.sample([word, 'cat', 'hat', 'mat'][:3], 3)},
              'answer': {'folder': word}} for word in ['house', 'friend', 'table'] * 30 for _ in 'ab']
    lines = [{**line, 'text': f'{line["text"]} {n}'} for n, line in enumerate(lines)]
    (root / 'labels.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    task = [f'--fields={ {"folder": OPTION} }', '--name=opts', '--calibrate=0', '--max_text=60']
    done = run(root, 'extract.py', *task, '--labels=labels.jsonl')
    assert done.returncode == 0 and '¶ folder •' in done.stdout, done.stdout + done.stderr
    done = run(root, 'train.py', '--name=opts', f'--reader={bert}', '--init_from=scratch', '--max_epochs=2',
               '--block_size=90', '--learning_rate=0.01', '--batch_size=16')
    assert done.returncode == 0, done.stderr
    (root / 'data/asked').mkdir()
    (root / 'data/asked/input.jsonl').write_text(''.join(json.dumps(
        {'text': line['text'], 'options': line['options'], 'truth': line['answer']}) + '\n' for line in lines[:12]))
    done = run(root, 'extract.py', *task, '--dataset=asked')    # a teacher, and nothing but options to choose
    assert done.returncode == 0 and 'truth name=folder records=12' in done.stdout, done.stdout + done.stderr
    assert 'equal=1.0000' in run(root, 'extract.py', *task, '--dataset=asked', '--verify=4').stdout
    ask = ['sample.py', '--name=opts', '--text=file the house now']
    assert 'the text comes without options for folder' in run(root, *ask).stdout
    assert 'options: the options of folder are a list' in run(root, *ask, "--options={'folder': 'x'}").stderr
    done = run(root, *ask, "--options={'folder': ['a house', 'a boat']}", '--confidence=full')
    found = json.loads(done.stdout)
    assert (found['folder'] in ('a house', 'a boat')
            and {*found['_confidence']['folder']} == {'a house', 'a boat'}), done.stderr
    (root / 'in.jsonl').write_text(json.dumps({'text': 'the table', 'options': {'folder': ['x y']}}) + '\n')
    assert json.loads(run(root, 'sample.py', '--name=opts', '--input=in.jsonl').stdout)['folder'] == 'x y'


def test_a_log_whose_enums_change_becomes_a_task_with_options(tmp_path):
    rng, path = random.Random(0), tmp_path / 'log.jsonl'
    lines = []
    for n in range(40):
        folders = rng.sample(['Bills', 'Travel', 'Family', 'Work', 'News'], 3)
        part = {'$ref': '#/$defs/Folder'} if n % 2 else {'anyOf': [
            {'const': name, 'description': f'about {name}'} for name in folders[:2]] + [{'const': folders[2]}]}
        schema = {'type': 'object', 'properties': {'folder': part, 'urgent': {'type': 'boolean'}},
                  'required': ['folder', 'urgent'],
                  '$defs': {'Folder': {'enum': folders, 'type': 'string'}, 'Other': {'enum': ['x']}}}
        lines.append({'request': {'messages': [{'role': 'user', 'content': f'File this mail: the mail number {n}'}],
                                  'response_format': {'type': 'json_schema',
                                                      'json_schema': {'name': 'x', 'schema': schema}}},
                      'response': {'choices': [{'message': {'content': json.dumps(
                          {'folder': folders[n % 3], 'urgent': n % 4 == 0})}}]}})
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    done, _ = run_prepare(tmp_path, str(path))
    printed = done.stdout.decode() if isinstance(done.stdout, bytes) else done.stdout
    assert "'folder': {'type': 'string', 'x-options': True}" in printed, printed
    assert "the values of 'folder' change from request to request: they are its options" in printed
    schema = {'folder': OPTION, 'urgent': [True, False]}
    labels = Labels([path], Schema(schema))
    texts = [(text, label) for text, label, reason in labels if not reason]
    assert len(texts) == 40
    for line, (text, label) in zip(lines, texts):
        answer = json.loads(line['response']['choices'][0]['message']['content'])
        found = [value for *_, value in find_options(text, 'folder')]
        assert label['answer']['folder'] == answer['folder'] and answer['folder'] in found and len(found) == 3
    assert '— about' in texts[0][0] and '—' not in texts[1][0]


def test_a_server_is_asked_with_the_options_of_each_text():
    text = write_options('x', OPTIONS)
    form = offer(answer_format(Schema(FIELDS)), text)['json_schema']['schema']['properties']
    assert form['folder'] == {'type': 'string', 'enum': ['Invoices', 'my "Travel"']}
    assert form['tags']['items'] == {'type': 'string', 'enum': ['urgent', 'later', 'old stuff']}
    assert 'enum' not in json.dumps(form['name']) and form['tone']['enum'] == ['calm', 'angry']
    nullable = Schema({'type': 'object', 'properties': {'folder': {'type': ['string', 'null'], 'x-options': True},
                                                        'tone': {'enum': ['a', 'b']}}})
    assert offer(nullable.json_schema(), text)['properties']['folder']['enum'] == ['Invoices', 'my "Travel"', None]
    check_options(nullable, {'folder': 'Invoices'}, text), check_options(nullable, {'folder': None}, text)
    with pytest.raises(ValueError, match='not among its options'):
        check_options(nullable, {'folder': 'urgent'}, text)


def test_a_file_with_options_becomes_a_task(tmp_path):
    lines = [{'text': f'mail {n % 20}', 'options': {'folder': [f'folder {n}', f'other {n}'], 'tags': ['a', 'b']},
              'answer': {'folder': f'folder {n}', 'tags': ['a'] * (n % 2), 'urgent': n % 3 == 0}} for n in range(40)]
    (tmp_path / 'mails.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    done, records = run_prepare(tmp_path, 'mails.jsonl')
    assert [record['options'] for record in records] == [line['options'] for line in lines]  # of equal texts, too
    printed = done.stdout.decode()
    assert "'folder': {'type': 'string', 'x-options': True}" in printed and "'urgent': [" in printed, printed
    assert "'tags': {'type': 'array', 'items': {'type': 'string', 'x-options': True}}" in printed
    # such options are not ours
    assert read_text({'text': 'a', 'options': {'A': 'x'}}) == read_text({'text': 'a', 'options': ['x']}) == 'a'
