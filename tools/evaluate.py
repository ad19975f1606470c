"""How well a student agrees with its teacher on held-out records, how reliable its confidence is, and what it
costs.

    python tools/evaluate.py config/demo.py  # figures, cost, examples side by side, a picture
    python tools/evaluate.py config/demo.py --examples=40
    python tools/evaluate.py --compare=out/demo,out/other  # a table of students, and out/compare.png

Reads out/<name>/ and the held-out records of data/<dataset>/<name>-*. Writes out/<name>/report.png if
matplotlib is installed. README.md and docs/results.md define the words, distil/agreement.py computes the
figures.
"""
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, stop
from config.machine import pick_device

import numpy as np

from data import answers_from
from distil.agreement import (calibration_error, evaluate, field_texts, read_truth, report_lines,
                              same_values, truth_lines)
from distil.checkpoint import (checkpoint_path, load_checkpoint, read_checkpoint, read_work, save_checkpoint,
                               warn_changed_task)
from distil.confidence import confidence_of
from distil.decode import decode, generate
from distil.records import choose_rows, load_records
from distil.report import draw_report, save_picture, start_drawing, store_int8
from distil.resume import lock_folder

name = ''            # word; data/<dataset>/<name>-* has the held-out records
dataset = ''         # word
run = ''             # word; out/<run> is the student; '': out/<name>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
examples = 8         # 0..; held-out texts shown
baselines = ''       # '', 'encoder'; also fine-tune the student's reader, else data/teachers/minilm, with a linear
                     # head per field on the teacher's values: what people do without this project
# deferral
target_agreement = 0.0  # 0..1; find the lowest min_confidence at which at least this share of the kept
                        # answers is the teacher's as a whole, with 95 % certainty, and store it in the
                        # student. 0: do not
# savings
hour_price = 1.0     # 0..; of the machine that runs teacher and student, in any currency
teacher_price = 0.0  # 0..; of a million calls, if it is bought by the call; 0: what its hours cost
calls_per_day = 100_000  # 1..
# a comparison instead
compare = ''         # folders of runs, separated by commas: a table of them, and out/compare.png
# machine
device = 'auto'      # auto: cuda, mps or cpu, the fastest there is
dtype = 'auto'       # 'auto', 'float32', 'bfloat16', 'int8'; of a large student's layers, as in sample.py
# of the config file, to warn if the student was trained with others
fields = {}
prompt = ''          # text or messages
config = configure(globals())

# -----------------------------------------------------------------------------
# confidence, deferral and cost


def simulate_cascade(confidence, hits, shares=(0, 0.05, 0.1, 0.2, 0.3, 0.5)):
    """yields, for each share of records deferred to the teacher, {deferred, min_confidence, field, exact,
    kept_field}. A record is deferred by the confidence of its least confident field. confidence, hits (N,
    fields). field, exact: agreement over all records; kept_field: over those that the student keeps."""
    lowest = confidence.min(1)                                  # (N,)
    order = np.argsort(lowest, kind='stable')
    for share in shares:
        n = round(share * len(order))
        mixed, kept = hits.copy(), order[n:]
        mixed[order[:n]] = True
        yield {'deferred': n / len(order), 'min_confidence': float(lowest[kept[0]]) if len(kept) else 1.0,
               'field': float(mixed.mean()), 'exact': float(mixed.all(1).mean()),
               'kept_field': float(hits[kept].mean()) if len(kept) else 1.0}


def compute_cost(work, student_rec_s, hour_price, teacher_price, calls_per_day):
    """the figures of the cost line: after how many calls a student has paid for itself. work: {extract_hours,
    train_hours, teacher_rec_s}. Prices are per million calls. break_even is in calls: inf if a call of the student
    saves nothing, nan if the teacher was not timed."""
    price_of_million = lambda rec_s: 1e6 / rec_s / 3600 * hour_price
    teacher_million = teacher_price or price_of_million(work['teacher_rec_s'])
    student_million = price_of_million(student_rec_s)
    hours = work['extract_hours'] + work['train_hours']
    spent = hours * hour_price
    saved = teacher_million - student_million
    calls = math.inf if saved <= 0 else spent / saved * 1e6     # nan stays nan
    return {**work, 'student_rec_s': student_rec_s, 'teacher_million': teacher_million,
            'student_million': student_million, 'spent': spent, 'break_even': calls,
            'days': calls / calls_per_day}


def known_line(tag, figures):
    """data_line of those figures that are known: not nan."""
    return data_line(tag, {key: value for key, value in figures.items() if not math.isnan(value)})


def print_confidence_and_cost(checkpoint, student, space, shards, rows, free_answers, batch_size, *prices):
    """prints how reliable the student's confidence is, the agreement of a cascade, and the cost.
    prices: the last arguments of compute_cost. Returns that cost, and of the odd records the student's
    confidence and its hits, (N, fields) each."""
    start = time.perf_counter()
    texts = (shards.ids(i).tolist() for i in rows)
    answers, decisions = zip(*decode(student, space, texts, batch_size))  # constrained
    cost = compute_cost(checkpoint['work'], len(rows) / (time.perf_counter() - start), *prices)
    odd = np.flatnonzero(shards.is_odd(rows))                   # temperatures are fitted on the even ones
    student_values = field_texts(space, [answers[n] for n in odd])
    teacher_values = field_texts(space, [shards.outs(rows[n]) for n in odd])
    hits = same_values(student_values, teacher_values)
    temperature = {field: figures['temperature'] for field, figures in checkpoint['per_field'].items()}
    raw, confidence = (
        np.array([list(confidence_of(space.schema.paths, decisions[n], t).values()) for n in odd])
        for t in (None, temperature))
    free_differs = float(np.mean([a != b for a, b in zip(answers, free_answers)]))
    print(data_line('reliability', {'records': len(odd), 'ece_before': calibration_error(raw, hits),
                                    'ece_after': calibration_error(confidence, hits),
                                    'free_differs': free_differs}))
    points = list(simulate_cascade(confidence, hits))
    for point in points:
        of_teacher = point['deferred'] and point['deferred'] * cost['teacher_million']  # 0 * nan is nan
        million = cost['student_million'] + of_teacher
        print(known_line('cascade', point | {'million': million}))
    if max(point['kept_field'] for point in points[1:]) <= points[0]['kept_field']:
        print('confident records agree no more often than all records: the confidence is of no use yet')
    print(known_line('cost', cost))
    if math.isnan(cost['teacher_million']):
        print('what a call of the LLM costs is not known; --teacher_price= says what a million cost')
    if cost['break_even'] == math.inf:
        print('at these prices a call of the student is no cheaper than one of the teacher: keep the teacher')
    return cost, confidence, hits


# -----------------------------------------------------------------------------
# a threshold for a target agreement


def share_lower_bound(hits, n, alpha=0.05):
    """the lower bound, at certainty 1 - alpha, of a probability that gave this number of hits in n trials:
    the one-sided interval of Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404"""
    low, high = 0.0, hits / n if n else 0.0
    k = np.arange(hits, n + 1)
    log_binomial = math.lgamma(n + 1) - np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in k])
    for _ in range(40):  # bisection: at `low` this many hits or more are rarer than alpha
        p = (low + high) / 2
        if not 0 < p < 1:
            break
        tail = np.exp(log_binomial + k * math.log(p) + (n - k) * math.log1p(-p)).sum()
        low, high = (p, high) if tail < alpha else (low, p)
    return low


def choose_threshold(confidence, hits, target):
    """the lowest threshold of confidence at which at least the share `target` of the kept records agrees as a
    whole, with 95 % certainty (share_lower_bound). Returns {agreement, min_confidence, kept, agree,
    at_least}, or None if there is no such threshold. confidence, hits (N, fields)."""
    lowest, whole = confidence.min(1), hits.all(1)              # (N,) each
    for threshold in np.unique(lowest):
        kept = lowest >= threshold
        bound = share_lower_bound(int(whole[kept].sum()), int(kept.sum()))
        if bound >= target:
            return {'agreement': target, 'min_confidence': float(threshold), 'kept': float(kept.mean()),
                    'agree': float(whole[kept].mean()), 'at_least': bound}
    return None


def store_target(folder, which, target):
    """writes the target (a dict, or None) into the checkpoint, whole or not at all."""
    path = checkpoint_path(folder, which)
    save_checkpoint(path, read_checkpoint(path, 'cpu') | {'target': target})


def set_target(folder, which, confidence, hits, target_agreement):
    """chooses, stores and prints the threshold for a target agreement; see choose_threshold."""
    lock = lock_folder(folder)                                  # a training could write the same file
    target = choose_threshold(confidence, hits, target_agreement)
    store_target(folder, which, target)
    if target:
        print(data_line('target', target))
        print('stored in the student: sample.py takes --min_confidence=target')
    else:
        print(f'no threshold reaches an agreement of {target_agreement:g} with 95 % certainty: more held-out '
              'records, a lower target or a better student')


def measure_again(folder, device):
    """what train.py measures at its end (report.store_int8), for a student that an earlier version trained."""
    checkpoint = read_checkpoint(checkpoint_path(folder), 'cpu')
    shards = 'int8' not in checkpoint and load_records(dataset, name, checkpoint)
    if shards:
        lock = lock_folder(folder)                              # a training could write the same file
        store_int8(folder, shards, shards.split()[1], device)


# -----------------------------------------------------------------------------
# examples and summary


def print_examples(space, shards, rows, answers, n, source):
    """prints n texts with the values of the source (teacher, or labels) and of the student below; < marks where they
    differ."""
    def shown(value):
        return json.dumps(value, ensure_ascii=False, default=repr)[:60] if isinstance(value, list) else str(value)

    def values_of(outs):
        answer = space.to_json(outs)
        return [shown(leaf.get(answer)) if answer else '(not JSON)' for leaf in space.schema.leaves]
    pairs = [(values_of(shards.outs(i)), values_of(outs)) for i, outs in zip(rows[:n], answers)]
    widths = [max(map(len, column)) for column in zip(space.schema.paths, *(row for pair in pairs for row in pair))]
    print(' ' * 10, *(name.ljust(width + 1) for name, width in zip(space.schema.paths, widths)))
    for i, (teacher_values, student_values) in zip(rows, pairs):
        print(space.tokenizer.decode(shards.ids(i).tolist()))
        print(f'   {source:<7}', *(value.ljust(width + 1) for value, width in zip(teacher_values, widths)))
        marked = [student + '<' * (student != teacher)
                  for student, teacher in zip(student_values, teacher_values)]
        print('   student', *(value.ljust(width + 1) for value, width in zip(marked, widths)))


def print_summary(figures, linear, cost, source):
    """prints in prose how often the student agrees, the majority and linear baselines, and the speed."""
    of_100 = lambda share: f'{100 * share:.0f}'
    line = (f'the student agrees with {"its teacher" if source == "teacher" else "the labels"} in '
            f'{of_100(figures["field"])} of 100 fields; the majority baseline agrees in {of_100(figures["majority"])}')
    if linear:
        line += (f', the linear baseline in {of_100(linear["field"])}. Whole answers: '
                 f'{of_100(figures["exact"])}, the linear baseline {of_100(linear["exact"])}')
    print(line)
    line = f'the student answers {cost["student_rec_s"]:,.0f} texts per second here'
    if cost['teacher_rec_s'] > 0:
        line += f', its teacher {cost["teacher_rec_s"]:,.0f}'
    print(line)


# -----------------------------------------------------------------------------
# students side by side


def time_students(students, rounds=5):
    """students: [(student, space, texts)] -> list of (seconds per text in batches of 64, seconds of a text
    alone), medians of alternating rounds."""
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for student, space, texts in students:
            for timed, batch_size in ((texts, 64), (texts[:32], 1)):
                start = time.perf_counter()
                generate(student, space, timed, True, batch_size)
                times[-1].append((time.perf_counter() - start) / len(timed))
    return np.median(times[1:], axis=0).reshape(-1, 2).tolist()  # the first round warms up


def draw_comparison(points):
    """writes out/compare.png: agreement against speed. points: [(label, records/s, field agreement)]."""
    if not (plt := start_drawing()):
        return
    fig, ax = plt.subplots(figsize=(7, 5))
    for label, rec_s, field in points:
        ax.scatter(rec_s, field)
        ax.annotate(label, (rec_s, field), xytext=(5, 5), textcoords='offset points')
    ax.set(xlabel='records/s in batches of 64', ylabel='field agreement with the teacher', xscale='log')
    save_picture(plt, fig, 'out/compare.png')
    print('out/compare.png shows the students')


def compare_runs(folders, device, dtype):
    """prints a table of students (a 'student' line each) and writes out/compare.png. The agreement is that of
    each training; the speed is measured now, on the same number of each student's own held-out texts."""
    checkpoints, students = [], []
    for folder in folders:
        checkpoint, student, space = load_checkpoint(folder, device, dtype=dtype)
        task = checkpoint['config']
        shards = load_records(task['dataset'], task['name'], checkpoint)
        if not shards:
            stop(f'{folder} cannot be timed: its held-out texts are not here')
        checkpoints.append(checkpoint)
        students.append((student, space, [shards.ids(i).tolist() for i in shards.split()[1][:128]]))
    points, times = [], time_students(students)
    for folder, checkpoint, (student, *_), seconds in zip(folders, checkpoints, students, times):
        params, figures, (in_batch, alone) = student.count_params(), checkpoint['figures'], seconds
        points.append((folder.name, 1 / in_batch, figures['field']))
        print(data_line('student', {
            'run': folder.name, 'params_m': params['total'] / 1e6,
            'without_embedding_m': (params['total'] - params['embedding']) / 1e6,
            **{key: figures[key] for key in ('records', 'field', 'majority', 'exact', 'kl')},
            'rec_s': 1 / in_batch, 'latency_ms': alone * 1e3,
            'disk_mb': checkpoint_path(folder).stat().st_size / 1e6}))
    draw_comparison(points)


# -----------------------------------------------------------------------------
# main


if __name__ == '__main__':
    if not name and not compare:
        stop('no task; run: python tools/evaluate.py config/demo.py')
    device = pick_device(device)
    if compare:
        sys.exit(compare_runs([Path(folder) for folder in compare.split(',')], device, dtype))
    out = Path('out', run or name)
    if dtype == 'int8':
        measure_again(out, device)
    checkpoint, student, space = load_checkpoint(out, device, which, dtype)
    warn_changed_task(checkpoint['task'], fields, prompt)
    shards = load_records(dataset, name, checkpoint)
    if not shards:
        print('no held-out records here; these figures are from the end of training')
        for line in report_lines(*(checkpoint[key] for key in ('step', 'figures', 'per_field', 'linear'))):
            print(data_line(*line))
        sys.exit()
    rows = shards.split()[1]
    checkpoint['work'] = read_work(out, checkpoint)
    figures, per_field, answers, _ = evaluate(student, space, shards, rows, sample_batch)
    for line in report_lines(checkpoint['step'], figures, per_field, checkpoint['linear']):
        print(data_line(*line))
    if baselines:
        from tools.baselines import encoder_baseline  # needs transformers
        settings = checkpoint['config']
        train_rows = choose_rows(shards, settings['max_records'], 0, settings.get('train_on', 'all'))[0]
        encoder = settings.get('reader') or 'data/teachers/minilm'
        print(data_line('encoder', encoder_baseline(shards, space, train_rows, rows, encoder, device, dtype)))
    source = 'labels' if answers_from(shards.meta) == 'labels' else 'teacher'
    texts = Path('data', dataset, 'input.jsonl')
    if texts.is_file():
        truth = read_truth(texts, shards, rows)
        outs_of = {source: [shards.outs(rows[n]) for n in truth],
                   'student': [answers[n] for n in truth]}
        for line in truth_lines(space, truth, outs_of):
            print(data_line(*line))
    cost, confidence, hits = print_confidence_and_cost(checkpoint, student, space, shards, rows, answers,
                                                       sample_batch, hour_price, teacher_price, calls_per_day)
    if target_agreement:
        set_target(out, which, confidence, hits, target_agreement)
    print_examples(space, shards, rows, answers, examples, source)
    print_summary(figures, checkpoint['linear'], cost, source)
    if picture := draw_report(out, shards, rows[:500], dtype, which):
        print(f'{picture} shows the training, the fields, the confidence and the confusions')
