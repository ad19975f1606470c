"""Turn text into JSON with the student, and say how well it agrees with the teacher.

    python sample.py config/demo.py                         # held-out texts side by side, then the report
    python sample.py config/demo.py --text="you are great"  # one JSON line
    python sample.py config/demo.py --input=texts.txt       # one JSON line per input line, in order
    cat texts.txt | python sample.py config/demo.py | jq .tone

Needs only out/<name>/ (ckpt.pt and tokenizer.json): neither the teacher nor data/. JSON goes to stdout, the rest to
stderr. On a terminal, the first form ends in a prompt loop.
"""
import json
import math
import os
import pickle
import stat
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from config import configure
from data import Shards, clean, tokenizer_hash
from model import Student, StudentConfig, generate, pick_device
from space import OutputSpace

name = ''            # data/<dataset>/<name>-* has the held-out records of the report
dataset = ''
run = ''             # out/<run> is the student; '': out/<name>
text = ''            # one text to label
input = ''           # a file with a text on each line
constrain = True     # hold answers to the schema, so that they always parse; False shows the student running free
sample_batch = 64    # texts decoded together
examples = 5         # held-out texts shown before the report
which = 'best'       # the epoch to use: 'best' by train.py's best_by, or 'last'
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
config = configure(globals())

# -----------------------------------------------------------------------------
# checkpoint


def load_checkpoint(folder, device, which='best'):
    """folder of a training run -> checkpoint dict, Student, OutputSpace. SystemExit with one line where it will not do.
    which: the 'best' epoch's, or the 'last' one's."""
    path = Path(folder, 'best.pt')
    if which == 'last' or not path.is_file():
        path = Path(folder, 'ckpt.pt')
    if not path.is_file():
        sys.exit(f'{path} does not exist; run: python train.py config/{Path(folder).name}.py')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
        with torch.device('meta'):
            model = Student(StudentConfig(**checkpoint['student']))
        model.load_state_dict(checkpoint['model'], assign=True)  # as stored: a frozen table is in half precision
        model.to(device)
        tokenizer = Tokenizer.from_file(str(Path(folder, 'tokenizer.json')))
        task = checkpoint['task']
        if checkpoint['format'] != 2:
            raise KeyError
        space = OutputSpace(tokenizer, task['fields'], task['indent'], task['fence'], task['end_id'], task['output_ids'])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        sys.exit(f'{path} is not a whole checkpoint of this version ({type(error).__name__}); train again')
    except Exception as error:  # tokenizers raises nothing narrower
        sys.exit(f'{folder}/tokenizer.json cannot be used: {error}; copy it from where the student was trained')
    if tokenizer_hash(tokenizer) != task['tokenizer_hash'] or space.output_ids != task['output_ids']:
        sys.exit(f'{folder}/tokenizer.json is not the tokenizer {path} was trained with; copy the right one beside it')
    return checkpoint, model.eval(), space


# -----------------------------------------------------------------------------
# evaluation


def agreement(ours, theirs):
    """two equally long lists of values of one field -> agreement, majority, macro f1, Cohen's kappa (0 to 1; kappa below).

    majority: share of the commonest value among theirs. f1 averages over the values that either side uses.
    kappa: (agreement - chance) / (1 - chance), Cohen 1960, https://doi.org/10.1177/001316446002000104
    """
    ours, theirs = ([json.dumps(v) for v in values] for values in (ours, theirs))
    values, n = sorted({*ours, *theirs}), len(theirs)
    table = np.zeros((len(values), len(values)))  # [teacher, student]
    np.add.at(table, ([values.index(v) for v in theirs], [values.index(v) for v in ours]), 1)
    hit, rows, columns = table.diagonal(), table.sum(1), table.sum(0)
    chance = (rows * columns).sum() / n ** 2
    agree = hit.sum() / n
    figures = {'agree': agree, 'majority': rows.max() / n, 'f1': (2 * hit / (rows + columns)).mean(),
               'kappa': (agree - chance) / (1 - chance) if chance < 1 else 1.0}
    return {key: float(value) for key, value in figures.items()}  # plain numbers: they go into checkpoints


@torch.no_grad()
def evaluate(model, space, shards, rows, batch_size=64):
    """How well the student agrees with the teacher on records `rows` of shards (words: README.md).

    Returns (figures, per field figures, the student's free-running answers as output indices). An answer that breaks the
    schema agrees in no field.
    """
    training, device = model.training, model.lm_head.weight.device
    model.eval()
    kl = ce = hits = steps = 0
    answers = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(shards.ids(rows[i])))  # texts of like length pad little
    for start in range(0, len(rows), batch_size):
        batch = order[start:start + batch_size]
        idx, targets, teacher_logits = (x.to(device) for x in shards.batch([rows[i] for i in batch], model.config.start_id))
        logits, targets = model(idx, targets).float(), targets[targets >= 0]
        log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        ce += F.nll_loss(log_q, targets, reduction='sum').item()
        hits += (logits.argmax(-1) == targets).sum().item()
        steps += len(targets)
        for i, outs in zip(batch, generate(model, space, [shards.ids(rows[i]).tolist() for i in batch], constrain=False)):
            answers[i] = outs
    model.train(training)

    targets = [shards.answer(i).tolist() for i in rows]
    ours, theirs = [space.to_json(a) for a in answers], [space.to_json(t) for t in targets]
    per_field = {f: agreement([o and o[f] for o in ours], [t[f] for t in theirs]) for f in space.fields}
    field, majority = (float(np.mean([v[key] for v in per_field.values()])) for key in ('agree', 'majority'))
    figures = {
        'records': len(rows), 'kl': kl / steps, 'ce': ce / steps, 'teacher_forced': hits / steps,
        'student_only': sum(a == b for x, y in zip(answers, targets) for a, b in zip(x, y)) / steps,
        'exact': sum(o == t for o, t in zip(ours, theirs)) / len(rows),
        'field': field, 'majority': majority, 'closed': (field - majority) / (1 - majority) if majority < 1 else math.nan,
        'valid': sum(o is not None for o in ours) / len(rows)}
    return figures, per_field, answers


def linear_baseline(shards, space, train_rows, rows):
    """What a linear model learns from the same records, as the yardstick of whether a student is worth it: TF-IDF of words and
    pairs of words, logistic regression per field. {} where scikit-learn is missing, else field, exact and fields: {name: agreement}."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        return {}
    texts, held = ([space.tokenizer.decode(shards.ids(i).tolist()) for i in r] for r in (train_rows, rows))
    labels, truth = ([space.to_json(shards.answer(i).tolist()) for i in r] for r in (train_rows, rows))
    right = {}
    for field in space.fields:
        known = [json.dumps(a[field]) for a in labels]
        guess = known[:1] * len(held)
        if len(set(known)) > 1:
            pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r'\S+'), LogisticRegression(max_iter=1000))
            guess = pipeline.fit(texts, known).predict(held)
        right[field] = np.array([g == json.dumps(a[field]) for g, a in zip(guess, truth)])
    return {'field': float(np.mean([r.mean() for r in right.values()])), 'exact': float(np.all(list(right.values()), axis=0).mean()),
            'fields': {field: float(r.mean()) for field, r in right.items()}}


def report_lines(step, figures, per_field, linear):
    """yields (tag, figures) of the val line and of a line per field, the linear baseline in each."""
    yield 'val', {'step': step} | figures | {f'linear_{key}': linear[key] for key in ('field', 'exact') if linear}
    for field, values in per_field.items():
        yield 'field', {'name': field} | values | ({'linear': linear['fields'][field]} if linear else {})


def data_line(tag, figures):
    """<tag> key=value ...; floats to four figures."""
    return ' '.join([tag, *(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in figures.items())])


# -----------------------------------------------------------------------------
# text in, JSON out


def label(texts, model, space, task, batch_size=64, constrain=True):
    """yields (JSON line, number of its text's tokens that were cut off) for every text, in order and batch by batch."""
    for batch in iter(lambda: list(islice(texts, batch_size)), []):
        batch = [clean(t.encode('utf-8', 'replace').decode()) for t in batch]
        ids = [e.ids for e in space.tokenizer.encode_batch(batch, add_special_tokens=False)]
        answers = generate(model, space, [i[:task['max_text']] for i in ids], constrain)
        for t, i, outs in zip(batch, ids, answers):
            answer = space.to_json(outs)
            if not t:
                answer = {'error': 'empty text'}
            elif answer is None:
                raw = space.tokenizer.decode([space.output_ids[o] for o in outs], skip_special_tokens=True)
                answer = {'error': 'answer breaks the schema', 'answer': raw}
            yield json.dumps(answer, ensure_ascii=False), max(0, len(i) - task['max_text'])


def label_stream(texts, *args):
    """prints a JSON line per text; a reader that goes away (| head -1) ends it quietly."""
    cut = 0
    try:
        for line, n_cut in label(iter(texts), *args):
            print(line, flush=True)
            cut += n_cut > 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains on its way out
    if cut:
        say(f'{cut} texts were longer than the {args[2]["max_text"]} tokens the student reads; their ends were ignored')


def say(line):
    """prose and data lines go to stderr: stdout is JSON alone."""
    print(line, file=sys.stderr, flush=True)


if __name__ == '__main__':
    if not name:
        sys.exit('no task; run: python sample.py config/demo.py')
    piped = not sys.stdin.closed and (stat.S_ISFIFO(mode := os.fstat(0).st_mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode))
    if input and not Path(input).is_file():
        sys.exit(f'{input} does not exist')
    checkpoint, model, space = load_checkpoint(Path('out', run or name), pick_device(device), which)
    task = checkpoint['task']
    args = model, space, task, sample_batch, constrain
    try:
        if text:
            label_stream([text], *args)
        elif input or piped:
            with open(input or 0, 'rb') as file:
                label_stream((line.decode('utf-8', 'replace') for line in file), *args)
        else:
            try:
                shards = Shards(dataset, name)
                if shards.meta['tokenizer_hash'] != task['tokenizer_hash'] or shards.meta['output_ids'] != task['output_ids']:
                    sys.exit(f'{shards.folder} and out/{run or name} have different tokenizers or output vocabularies; train again')
                held = shards.split()[1]
                figures, per_field, answers = evaluate(model, space, shards, held, sample_batch)
                for i, outs in list(zip(held, answers))[:examples]:
                    say(space.tokenizer.decode(shards.ids(i).tolist()))
                    say(f'  teacher {json.dumps(space.to_json(shards.answer(i).tolist()), ensure_ascii=False)}')
                    ours = space.to_json(outs)
                    say(f'  student {"an answer outside the schema" if ours is None else json.dumps(ours, ensure_ascii=False)}')
            except FileNotFoundError:
                say('no held-out records here; these figures are from the end of training')
                figures, per_field = checkpoint['figures'], checkpoint['per_field']
            for line in report_lines(checkpoint['step'], figures, per_field, checkpoint['linear']):
                say(data_line(*line))
            while sys.stdin.isatty():
                say('a text to label (Ctrl-D ends):')
                label_stream([next(sys.stdin)], *args)
    except (KeyboardInterrupt, StopIteration):
        pass
