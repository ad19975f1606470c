"""Values that are copied from the text: the schema, the places, teacher and student beside one token at a time."""
import json
import random

import numpy as np
import pytest
import torch

from data import Record, Shards, Writer
from distil.calibrate import find_priors, learn_bias
from distil.candidates import read_locale
from distil.copying import Value, answer_slowly, token_bytes
from distil.confidence import all_probabilities, confidence_of, span_probabilities, value_probabilities
from distil.decode import choose, decode
from distil.drafts import Drafts, Forced
from distil.engine import Teacher, answer
from distil.free import open_free
from distil.places import HIDDEN, Source, find_edges
from distil.reader import load_encoder
from distil.schema import Schema
from distil.shares import NotInText, record_from_label
from distil.space import Outs, OutputSpace
from distil.teacher import encode_prompt
from model import Student, StudentConfig
from sample import answer_text
from tests.conftest import PROMPT, clone_task, load_teacher, one_line, run
from tests.test_reader import bert  # noqa: F401
from tools.baselines import stepwise

FIELDS = {'tone': ['calm', 'angry'],
          'name': {'type': ['string', 'null']},
          'amount': {'type': ['number', 'null']},
          'people': {'type': 'array', 'maxItems': 3, 'items': {'type': 'string'}},
          'lines': {'type': 'array', 'maxItems': 2, 'items': {'type': 'object', 'properties': {
              'item': {'type': 'string'}, 'qty': {'type': 'integer'}}, 'required': ['item', 'qty']}}}
LOCALE = read_locale('en_US')
TEXTS = ['Anna sent 3 cups and 12 plates', 'x', 'say "no" \\ to Bob "Bob"', '日本 の 猫 😀 ok', '7', 'a a a a a', '"""',
         'no numbers here, Eve.', 'Anna Smith, Anna']


def open_space(tokenizer, fields=FIELDS, indent=None, end_id=None):
    return OutputSpace(tokenizer, fields, indent, False, end_id, range(4, 200), locale=LOCALE)


def test_the_schema_knows_what_is_copied():
    schema = Schema({**FIELDS, 'due': {'type': 'string', 'format': 'date'},
                     'mail': {'type': 'string', 'format': 'email'}, 'price': {'type': 'number', 'minimum': 0},
                     'stars': {'type': 'integer', 'minimum': 1, 'maximum': 5}})
    kinds = {part.path: part.kind for part in schema.copied}
    assert kinds == {'name': 'text', 'amount': 'number', 'people[0]': 'text', 'people[1]': 'text', 'people[2]': 'text',
                     'lines[0].item': 'text', 'lines[0].qty': 'integer', 'lines[1].item': 'text',
                     'lines[1].qty': 'integer', 'due': 'date', 'mail': 'text', 'price': 'number'}
    assert 'stars' in schema.by_choice and schema.by_path['people[]'].is_list
    given = {'tone': 'calm', 'name': '', 'amount': 2.0, 'people': [' A  b '], 'lines': [], 'due': '2026-01-01',
             'mail': 'a@b.c', 'price': 1.5, 'stars': 3}
    assert schema.canonical(given) == {**given, 'name': None, 'amount': 2, 'people': ['A b']}
    for path, value in (('due', 3), ('price', 'x'), ('people', [1]), ('mail', ''), ('price', True)):
        with pytest.raises(ValueError, match=path):
            schema.canonical({**given, path: value})


@pytest.mark.parametrize('text, edges', [
    ('ab c', '10111'), ("Anna's", '1000111'), ('日本ab', '11101'), ('e\u0301a', '1001'), ('', '1')])
def test_values_begin_and_end_at_words(text, edges):
    assert ''.join(map(str, map(int, find_edges(text)))) == edges


def test_a_value_is_found_where_it_stands(tokenizer):
    space = open_space(tokenizer)
    text, amount = space.schema.copied[0], space.schema.copied[1]
    find = lambda words, value, part=text: Source(words, space).find(part, value)
    assert find('Anna and anna and Annabel', 'Anna') == [(0, 4)]
    assert find('ANNA and anna', 'Anna') == [(0, 4), (9, 13)]    # in another case only if it is nowhere as written
    assert find('aa a aa', 'aa') == [(0, 2), (5, 7)] and find('Annabel', 'Anna') == [] and find('x', 'y') == []
    assert find('for $1,080.00 and 2', 1080, amount) == [(5, 13)] and find('for 2', 3, amount) == []


@pytest.mark.parametrize('family, indent', [('gemma', None), pytest.param('qwen', 2, marks=pytest.mark.slow)])
def test_the_engine_copies_as_one_pass_after_another(teachers, family, indent):
    wrapped, model = load_teacher(teachers[family])
    before, after, end_id = encode_prompt(wrapped, PROMPT, chat=False)
    space = open_space(wrapped.backend_tokenizer, indent=indent, end_id=end_id)
    encode = lambda text: wrapped.backend_tokenizer.encode(text, add_special_tokens=False).ids
    texts = [encode(text) for text in TEXTS]
    engine, drafts = Teacher(model, before, space.output_ids), Drafts(space)
    for _ in range(2):                                          # the second time with drafts
        answers, _ = answer(engine, space, drafts, texts, after)
        for ids, found in zip(texts, answers):
            slow = answer_slowly(model, space, before, ids, after)
            if isinstance(slow, str):
                assert found == slow
                continue
            assert found[0] == slow[0] and (found[3] == slow[3]).all()
            np.testing.assert_allclose(found[1], slow[1], atol=1e-3)
            np.testing.assert_allclose(np.exp(found[4].astype(float)), np.exp(slow[4].astype(float)), atol=2e-3)
            drafts.add(found[0])
    assert sum(not isinstance(found, str) for found in answers) > 4
    assert any(out >= space.V for found in answers if not isinstance(found, str) for out in found[0])


@pytest.mark.slow
def test_a_reason_first_calibration_and_labels_beside_copied_values(teachers):
    wrapped, model = load_teacher(teachers['gemma'])
    before, after, end_id = encode_prompt(wrapped, PROMPT, chat=False)
    fields = {'why': {'type': 'string'}, 'name': {'type': 'string'}, 'tone': ['calm', 'angry'],
              'amount': {'type': ['number', 'null']}, 'mood': ['good', 'bad', 'odd']}
    task = {'fields': fields, 'left_out': ['why'], 'free_tokens': 5}
    space = OutputSpace(wrapped.backend_tokenizer, fields, None, False, end_id, range(4, 200), left_out=['why'],
                        locale=LOCALE)
    texts = [wrapped.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    engine, free = Teacher(model, before, space.output_ids), open_free(space, task)
    assert free.state in space.copy_at                          # a copied value is the first that is answered
    bias, _ = learn_bias(engine, space, texts, after, find_priors(space.schema, {}, []), 3, 1, free=free)
    slow = [answer_slowly(model, space, before, ids, after, free) for ids in texts]
    reached = {}                                                # {state: raw logits there of all texts}
    for outs, logits, *_ in slow:
        for state, row in zip(space.states_before(outs), logits):
            reached.setdefault(state, []).append(torch.tensor(row).double())
    assert {space.leaf_at[state] for state in bias} == {'tone', 'mood'} and not {*bias} & {*space.copy_at}
    for state, row in bias.items():
        p = torch.stack([logits[[*row]].softmax(-1) for logits in reached[state]]).mean(0)
        assert [*row.values()] == pytest.approx((p * len(row)).log().tolist(), abs=2e-3)
    labels = {state: torch.tensor([-30.0 + 9 * (o in space.transitions[state]) + o / 99 for o in range(space.V)])
              for state in bias if space.leaf_at[state] == 'tone'}
    for known in None, [labels] * len(texts):
        answers, _ = answer(engine, space, Drafts(space), texts, after, free=free, known=known)
        for ids, found in zip(texts, answers):
            slow = answer_slowly(model, space, before, ids, after, free,
                                 {state: row.numpy() for state, row in labels.items()} if known else ())
            assert found[0] == slow[0] and (found[3] == slow[3]).all()
            np.testing.assert_allclose(found[1], slow[1], atol=1e-3)


def test_the_tokens_of_a_tokenizer_as_bytes(teachers):
    for family in ('gemma', 'qwen'):
        tokenizer = load_teacher(teachers[family])[0].backend_tokenizer
        known = token_bytes(tokenizer)
        for text in ('say "no" \\ to', 'a b  c', 'Anna'):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            spelled = {i: b for b, i in known.items()}
            assert b''.join(spelled[i] for i in ids).strip() == text.encode()


def test_the_probability_of_a_place_is_that_of_all_that_begins_there(tokenizer):
    """the sum over all values, by enumeration, of a teacher whose logits depend on nothing."""
    space = open_space(tokenizer)
    vocabulary = {b'a': 0, b'b': 1, b' ': 2, b'ab': 3, b' b': 4}
    logits, closing = np.array([0.3, -0.2, 0.5, 1.0, 0.1]), {7: 0.9, 8: -1.0}
    source = Source('ab a b', space)
    value = Value(source, space.schema.copied[0], vocabulary)
    while not isinstance(value.step(logits, closing, {}), tuple):
        pass
    total = sum(value.starts.values())
    assert total == pytest.approx(1) and value.span == (0, 2)
    # 'ab' only begins at 0; 'a' at 0 and 3, 'b' at 5 ... of the first token
    p = np.exp([1.0, 0.3, -0.2])
    p /= p.sum()
    assert value.starts[0] == pytest.approx(p[0] + p[1] / 2, abs=1e-6)
    assert value.starts[5] == pytest.approx(p[2], abs=1e-6)
    places, weights = value.rows()[0]
    assert places[0] == 0 and np.exp(weights[:3].astype(float)).sum() == pytest.approx(1, abs=1e-2)


# -----------------------------------------------------------------------------
# records


LABEL = {'tone': 'calm', 'name': 'Anna', 'amount': 12, 'people': ['Anna', 'Anna'],
         'lines': [{'item': 'cups', 'qty': 3}]}
WORDS = 'Anna sent Anna 3 cups and 12 plates'


def test_a_label_is_stored_and_read_again(tokenizer, tmp_path):
    space = open_space(tokenizer)
    outs, logits, places, weights = record_from_label(space, {'answer': LABEL}, WORDS)
    steps = [n for n, out in enumerate(outs) if out >= space.V]
    assert [tuple(places[n, :2]) for n in steps[:2]] == [(0, 10), (4, 0)]  # both Annas share the probability
    np.testing.assert_allclose(np.exp(weights[steps[0], :3].astype(float)), [0.5, 0.5, 0], atol=1e-3)
    firsts = [int(places[n, 0]) for n in steps[::2]]
    assert firsts == [0, 26, 0, 10, 17, 15]                     # the second item of a list is another place
    ids, V = tokenizer.encode(WORDS, add_special_tokens=False).ids, len(space.output_ids)
    assert space.to_json(Outs(outs, [(0, 0, value) for value in space.write_outs(LABEL)[1]])) == LABEL
    with pytest.raises(NotInText) as error:
        record_from_label(space, {'answer': {**LABEL, 'name': 'Eve'}}, WORDS)
    assert (error.value.path, error.value.value) == ('name', 'Eve')
    assert record_from_label(space, {'answer': {**LABEL, 'tone': 'x'}}, WORDS) is None

    folder = tmp_path / 'data' / 'd' / 't-00'
    writer = Writer(folder, V, has_places=True)
    writer.append([Record(1, ids, outs, logits, np.full(len(outs), np.nan), places, weights), Record.dropped(2, V)])
    writer.append([Record(3, ids, outs, logits, np.full(len(outs), np.nan), places, weights)])
    writer.close()
    with open(folder / 'places.bin', 'ab') as file:             # what a killed run has not committed
        file.write(b'x' * 5)
    Writer(folder, V, has_places=True).close()
    meta = {'format': 1, 'output_ids': space.output_ids, 'fields': FIELDS, 'locale': LOCALE}
    (folder / 'meta.json').write_text(json.dumps(meta))
    tokenizer.save(str(folder / 'tokenizer.json'))
    shards = Shards('d', 't', tmp_path / 'data')
    assert len(shards) == 2 and shards.outs(1) == shards.outs(0) and space.to_json(shards.outs(1)) == LABEL
    assert [WORDS[start:end] for start, end, _ in shards.outs(0).spans] == ['Anna', '12', 'Anna', 'Anna', 'cups', '3']

    # as a student reads it: a token for each word, between two special ones
    starts = [-1] + [n for n in range(len(WORDS)) if n == 0 or WORDS[n - 1] == ' '] + [-1]
    ends = [-1] + [WORDS.find(' ', n) if ' ' in WORDS[n:] else len(WORDS) for n in starts[1:-1]] + [-1]
    for i in (0, 1):
        shards.encoded[i], shards.pages[i] = list(range(10)), (np.array(starts), np.array(ends))
    text, answer_, targets, teacher = shards.batch([0, 1])
    decided = [n for n, state in enumerate(space.states_before(outs)) if space.decides[state]]
    assert teacher.shape == (2 * len(decided), V + 1 + 10) and shards.steps(0).tolist() == decided
    steps = [decided.index(n) for n in steps]                   # the student reads decisions alone
    pointed = [targets[0, n].item() - V - 1 for n in steps]
    assert pointed == [1, 1, 7, 7, 1, 1, 3, 3, 5, 5, 4, 4]
    assert answer_[0, [n + 1 for n in steps[:4]]].tolist() == [V + 3, V + 4, V + 15, V + 16]
    row = teacher[steps[0]].exp()
    assert (teacher[steps[0], :V] < -20).all() and row[V + 2] == pytest.approx(0.5, abs=1e-3) == row[V + 4].item()
    assert (teacher[0, V:] == HIDDEN).all()                     # the tone: no place may come
    amount = teacher[steps[2]].exp()                            # a number or null, and it is no null
    assert amount[:V].sum() < 1e-4 and amount[V + 1 + 7] == pytest.approx(1, abs=1e-2)
    label = {'answer': {**LABEL, 'amount': None}}
    outs, logits, places, weights = record_from_label(space, label, WORDS)
    null = next(n for n, state in enumerate(space.states_before(outs)) if state in space.copy_at and outs[n] < space.V)
    assert np.exp(logits[null]).argmax() == outs[null] and not (weights[null] > -np.inf).any()


# -----------------------------------------------------------------------------
# the student


@pytest.fixture
def pointing(bert, tokenizer):
    torch.manual_seed(1)
    space = open_space(tokenizer)
    encoder, V = load_encoder(str(bert)), len(space.output_ids)
    student = Student(StudentConfig(vocab_size=V + 3, output_vocab=V, block_size=160, n_layer=2, n_head=4, n_kv_head=2,
                                    n_embd=16, n_mlp=32, start_id=V, encoder=vars(encoder.config), places=True),
                      encoder)
    for name, p in student.named_parameters():
        p.data *= 1 if name.startswith('encoder.') else 4    # decisions that are not near ties
    return student.eval(), space


@pytest.fixture
def texts(tokenizer, words):
    rng = random.Random(0)
    strings = [' '.join(rng.choices([*words, '3', '12', '4.50'], k=rng.randint(1, 12))) for _ in range(12)] + TEXTS
    return [tokenizer.encode(string, add_special_tokens=False).ids for string in strings]


def test_decoding_equals_one_by_one_without_cache(pointing, texts):
    student, space = pointing
    count = {'spans': 0}
    drafted = [None, Forced(space)]                             # with the drafts of all answers, and without
    for drafts in drafted:
        found = list(decode(student, space, texts, 5, drafts=drafts))
        for ids, (outs, decisions), slow in zip(texts, found, stepwise(student, space, texts)):
            plain, of_plain = answer_text(student, space, ids)
            assert outs == plain == slow and outs.spans == plain.spans == slow.spans
            assert [d[2] for d in decisions] == [d[2] for d in of_plain]
            for (_, row, _), (_, other, _) in zip(decisions, of_plain):
                n = min(len(row), len(other))                   # rows of a batch are wider
                torch.testing.assert_close(row[:n], other[:n], atol=1e-3, rtol=1e-3)
            words, answer = space.tokenizer.decode(ids), space.to_json(outs)
            for start, end, value in outs.spans:
                assert value is None or str(value) in words or words[start:end]
                count['spans'] += value is not None
            members = [span[:2] for part, span in zip(parts_of(space, outs), outs.spans)
                       if part.path.startswith('people')]
            firsts = [first for first, _ in members]
            assert len({*firsts}) == len(firsts) or len({*firsts}) == len(words.split())
            assert space.schema.is_answer(answer) or None in [value for *_, value in outs.spans]
    assert count['spans'] > 30
    free = list(decode(student, space, texts, 5, constrain=False))
    assert len(free) == len(texts)


def parts_of(space, outs):
    return [space.copy_at[state] for state, out in zip(space.states_before(outs), outs) if out >= space.V][::2]


def test_the_student_reads_what_it_points_to(pointing, texts):
    """the states of the tokens that an answer points to, and their gradient, by a plain loop."""
    student, space = pointing
    V = space.V
    text = torch.tensor([[7, 9, 11, 13], [8, 10, -1, -1]])
    answer_ = torch.tensor([[V, 3, V + 1 + 2 * 2, V + 2 + 2 * 3], [V, V + 1 + 2 * 1, -1, -1]])
    logits = student(text, answer_)
    assert logits.shape == (6, V + 1 + 4) and (logits[4:, V + 3:] == -1e4).all() and (logits[:, V] == -1e4).all()
    for b, n_text, n_answer, rows in ((0, 4, 4, slice(0, 4)), (1, 2, 2, slice(4, 6))):
        states = student.encoder_proj(student.encoder(text[b:b + 1, :n_text]))[0]
        written = [states[(a - V - 1) // 2] + student.wte.weight[V + 1 + (a - V - 1) % 2] if a > V else
                   student.wte.weight[a] for a in answer_[b, :n_answer].tolist()]
        x = torch.cat((states, torch.stack(written)))[None]
        angle = torch.arange(x.size(1))[:, None] * student.rope_freq
        angle = torch.cat((angle, angle), -1)[None, None]
        for block in student.h:
            x = block(x, angle.cos(), angle.sin())
        x = student.norm_f(x)[0, n_text:]
        query, key = student.point_query(x).view(n_answer, 2, -1), student.point_key(states).view(n_text, 2, -1)
        asked = [int(a > V and (a - V - 1) % 2 == 0) for a in answer_[b, :n_answer].tolist()]  # 1: for the last place
        scores = torch.stack([key[:, k] @ q[k] for k, q in zip(asked, query)]) / x.size(-1) ** 0.5
        torch.testing.assert_close(logits[rows, :V], student.lm_head(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[rows, V + 1:V + 1 + n_text], scores, atol=1e-4, rtol=1e-4)
    logits[2, V + 1:].logsumexp(0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (
        student.point_query.weight, student.point_key.weight, student.encoder.wte.weight))


def test_probabilities_of_values_and_spans(pointing, texts):
    student, space = pointing
    answers = [(ids, *answer) for ids, answer in zip(texts, decode(student, space, texts))]
    many = all_probabilities(student, space, answers)           # all at once as each alone
    for answer, values in zip(answers, many):
        alone = value_probabilities(student, space, *answer)
        assert alone.keys() == values.keys() and all(
            values[path] == pytest.approx(alone[path], abs=1e-5) for path in alone)
    for ids in texts[:8]:
        (outs, decisions), = decode(student, space, [ids])
        p_chosen = confidence_of(space.schema.paths, decisions)
        values = value_probabilities(student, space, ids, outs, decisions)
        answer = space.to_json(outs)
        numbers = space.schema.numbers(answer) if space.schema.is_answer(answer) else {}
        for path, p in values.items():
            assert sum(p) == pytest.approx(1, abs=1e-4)
        spans = span_probabilities(student, space, ids, outs, decisions)
        assert {*spans} == {part.path for part in parts_of(space, outs)}
        for part, span in zip(parts_of(space, outs), outs.spans):
            chosen = [p for *other, p in spans[part.path] if tuple(other) == tuple(span)]
            assert len(chosen) == 1 and all(0 <= p <= 1.0001 for *_, p in spans[part.path])
        if 'name' in spans and numbers:
            known = next(p for *other, p in spans['name'] if other[2] == answer['name'])
            assert known == pytest.approx(p_chosen['name'], rel=1e-3)


@pytest.mark.slow
def test_from_a_teacher_to_json(project, bert, tmp_path):
    root = clone_task(project, tmp_path)
    fields = {'tone': ['neutral', 'friendly'], 'name': {'type': ['string', 'null']},
              'amount': {'type': ['number', 'null']},
              'words': {'type': 'array', 'maxItems': 2, 'items': {'type': 'string'}}}
    written = {'why': {'type': 'string'}, **fields}
    task = [f'--fields={written}', "--left_out=['why']", '--free_tokens=4', '--name=copied', '--calibrate=9',
            '--max_records=60']
    for wrong, message in (('--constrain=False', 'constrain = False does not go with values that are copied'),
                           ("--label_fields=['name'] --labels=data/toy/input.jsonl", 'name is copied'),
                           ('--locale=xx', 'locale = xx')):
        assert message in one_line(run(root, 'extract.py', *task, '--calibrate=0', *wrong.split(' ')))
    done = run(root, 'extract.py', *task)
    assert done.returncode == 0 and 'extract records=60' in done.stdout, done.stdout + done.stderr
    assert 'equal=1.0000' in run(root, 'extract.py', *task, '--verify=6').stdout
    assert 'without a reader' in one_line(run(root, 'train.py', '--name=copied', '--reader=', '--init_from=scratch'))
    done = run(root, 'train.py', '--name=copied', f'--reader={bert}', '--init_from=scratch', '--max_epochs=2',
               '--batch_size=8', '--block_size=80')
    assert done.returncode == 0 and 'token_f1' in done.stdout, done.stdout + done.stderr
    done = run(root, 'sample.py', '--name=copied', '--text=my friend paid 12 or 13', '--confidence=full')
    answer = json.loads(done.stdout)
    assert {*answer} == {*fields, '_confidence'} and answer['amount'] in (12, 13, None), answer
    assert all(word in 'my friend paid 12 or 13' for word in [*answer['words'], answer['name'] or ''])
    done = run(root, 'sample.py', '--name=copied', '--text=no number', '--min_confidence=1', '--ask_teacher=True')
    assert json.loads(done.stdout)['amount'] is None and '"_teacher": true' in done.stdout, done.stderr
    done = run(root, 'tools/evaluate.py', '--name=copied', '--baselines=encoder')
    assert done.returncode == 0 and 'encoder_micro_f1_words' in done.stdout, done.stderr


def test_labels_that_are_not_in_the_text_are_counted_and_shown(project, tmp_path):
    root = clone_task(project, tmp_path)
    lines = [{'text': f'{name} is here, number {n}', 'answer': {'name': name if n % 3 else 'Nobody', 'n': n}}
             for n, name in enumerate(['Anna', 'Bob', 'Eve'] * 8)]
    (root / 'labels.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    fields = {'name': {'type': 'string'}, 'n': {'type': 'integer'}}
    done = run(root, 'extract.py', f'--fields={fields}', '--name=told', '--calibrate=0', '--labels=labels.jsonl')
    assert ('dropped_not_in_text=8' in done.stdout
            and 'not_in_text: 8 labels say what is not in the text at name' in done.stdout)
    assert '  "Nobody" of: Anna is here, number 0' in done.stdout, done.stdout + done.stderr
    shards = Shards('toy', 'told', root / 'data')
    assert len(shards) == 16 and shards.task_space.to_json(shards.outs(0)) == {'name': 'Bob', 'n': 1}


def test_whether_a_value_is_copied_is_decided_before_where():
    rows = torch.tensor([[0.0, 1.0, -np.inf, 0.5, 0.6], [0.0, 1.0, -np.inf, -1.0, -1.2],
                         [-np.inf, -np.inf, -np.inf, 0.1, 0.0], [0.0, 1.0, -np.inf, -np.inf, -np.inf]])
    assert choose(rows, 2).tolist() == [4, 1, 3, 1]  # two places at 0.5 and 0.6 are together likelier than 1.0
    assert choose(rows[:, :2], 2).tolist() == [1, 1, 0, 1]
