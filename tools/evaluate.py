"""How well a student agrees with its teacher on held-out records, how well it knows that, and whether it is
worth it.

    python tools/evaluate.py config/demo.py  # examples side by side, figures, cost, a picture
    python tools/evaluate.py config/demo.py --examples=40
    python tools/evaluate.py --compare=out/demo,out/other  # students side by side: a table, and out/compare.png

Reads out/<name>/ and the held-out tenth of data/<dataset>/<name>-*; writes out/<name>/report.png where
matplotlib is installed. What the words mean: README.md and docs/results.md; how they are computed:
agreement.py.
"""
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, data_line, stop
from config.machine import pick_device
from distil.agreement import (calibration_error, evaluate, field_texts, read_truth, report_lines,
                              same_values, truth_lines)
from distil.checkpoint import (checkpoint_path, load_checkpoint, read_checkpoint, read_work, save_checkpoint,
                               warn_changed_task)
from distil.decode import confidence_of, decode, generate
from distil.records import load_records
from distil.report import draw_report, start_drawing

name = ''            # word; data/<dataset>/<name>-* has the held-out records
dataset = ''         # word
run = ''             # word; out/<run> is the student; '': out/<name>
which = 'best'       # 'best' or 'last'; the epoch to use: the best by train.py's best_by
sample_batch = 128   # 1..; texts decoded together; of 16 to 512 the fastest on 2 CPU cores
examples = 8         # 0..; held-out texts shown
# doubt
target_agreement = 0.0  # 0..1; find the lowest min_confidence at which the answers that are kept agree as a
                        # whole at least so often, with 95 % certainty, and store it in the student. 0: do not
# savings
hour_price = 1.0     # 0..; of the machine that runs teacher and student, in any currency
teacher_price = 0.0  # 0..; of a million calls, where it is bought by the call; 0: what its hours cost
calls_per_day = 100_000  # 1..
# instead
compare = ''         # folders of runs, parted by commas: a table of them, and out/compare.png
device = 'auto'      # auto: cuda, mps or cpu, whichever is there
dtype = 'auto'       # 'auto', 'float32', 'bfloat16'; of a large student's layers, as in sample.py
# of the config file, to say so where the student was trained with others
fields = {}
prompt = ''
config = configure(globals())

# -----------------------------------------------------------------------------
# doubt and cost


def cascade(sure, right, shares=(0, 0.05, 0.1, 0.2, 0.3, 0.5)):
    """what becomes of the agreement when the records with the least sure field go to the teacher: yields
    {deferred, min_confidence, field, exact, kept_field}. sure, right (N, fields); kept_field: of the
    student's own."""
    least = sure.min(1)                                         # (N,)
    order = np.argsort(least, kind='stable')
    for share in shares:
        n = round(share * len(order))
        mixed, kept = right.copy(), order[n:]
        mixed[order[:n]] = True
        yield {'deferred': n / len(order), 'min_confidence': float(least[kept[0]]) if len(kept) else 1.0,
               'field': float(mixed.mean()), 'exact': float(mixed.all(1).mean()),
               'kept_field': float(right[kept].mean()) if len(kept) else 1.0}


def at_least(hits, n, doubt=0.05):
    """the share of hits that n trials with so many hits show with 95 % certainty: the lower end of the
    one-sided interval of Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404"""
    low, high = 0.0, hits / n if n else 0.0
    k = np.arange(hits, n + 1)
    ways = math.lgamma(n + 1) - np.array([math.lgamma(i + 1) + math.lgamma(n - i + 1) for i in k])
    for _ in range(40):  # bisection: at `low` so many hits or more are too rare
        p = (low + high) / 2
        if not 0 < p < 1:
            break
        rare = np.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p)).sum() < doubt
        low, high = (p, high) if rare else (low, p)
    return low


def find_target(sure, right, target):
    """the lowest confidence at which the records that are kept agree as a whole in a share of `target`, for
    sure (see at_least): {agreement, min_confidence, kept, agree, at_least}, or None. sure, right (N,
    fields)."""
    least, whole = sure.min(1), right.all(1)                    # (N,) each
    for threshold in np.unique(least):
        kept = least >= threshold
        bound = at_least(int(whole[kept].sum()), int(kept.sum()))
        if bound >= target:
            return {'agreement': target, 'min_confidence': float(threshold), 'kept': float(kept.mean()),
                    'agree': float(whole[kept].mean()), 'at_least': bound}
    return None


def store_target(folder, which, target):
    """writes it into the checkpoint, which is whole before and after."""
    path = checkpoint_path(folder, which)
    save_checkpoint(path, read_checkpoint(path, 'cpu') | {'target': target})


def cost(work, student_rec_s, hour_price, teacher_price, calls_per_day):
    """when a student has paid for itself. work: {extract_hours, train_hours, teacher_rec_s}, and
    students_hours where it learned from others (ensemble.py). Prices are per million calls; break_even is in
    calls, inf where a call of the student saves nothing, nan where the teacher was not timed."""
    million = lambda rec_s: 1e6 / rec_s / 3600 * hour_price
    teacher_million, student_million = teacher_price or million(work['teacher_rec_s']), million(student_rec_s)
    hours = work['extract_hours'] + work.get('students_hours', 0.0) + work['train_hours']
    spent = hours * hour_price
    saved = teacher_million - student_million
    calls = spent / saved * 1e6 if saved > 0 else math.inf
    return {**work, 'student_rec_s': student_rec_s, 'teacher_million': teacher_million,
            'student_million': student_million, 'spent': spent, 'break_even': calls,
            'days': calls / calls_per_day}


# -----------------------------------------------------------------------------
# students side by side


def compare_runs(folders, device, dtype, rounds=5):
    """prints a table of students (one 'student' line each) and writes out/compare.png: agreement against
    speed. The figures are those of each one's training; the speed is measured now, in alternating rounds, on
    the same number of its own held-out texts."""
    runs, times = [], []
    for folder in folders:
        checkpoint, student, space = load_checkpoint(folder, device, dtype=dtype)
        task = checkpoint['config']
        shards = load_records(task['dataset'], task['name'], checkpoint['task'])
        if not shards:
            stop(f'{folder} cannot be timed: its held-out texts are not here')
        texts = [shards.ids(i).tolist() for i in shards.split()[1][:128]]
        runs.append((folder, checkpoint, student, space, texts))
    for _ in range(rounds + 1):
        times.append([])
        for *_, student, space, texts in runs:
            for some, batch_size in ((texts, 64), (texts[:32], 1)):
                start = time.perf_counter()
                generate(student, space, some, True, batch_size)
                times[-1].append((time.perf_counter() - start) / len(some))
    times = np.median(times[1:], axis=0).reshape(-1, 2).tolist()  # the first round warms up
    plt, points = start_drawing(), []
    for (folder, checkpoint, student, *_), (throughput, latency) in zip(runs, times):
        params, figures = student.count_params(), checkpoint['figures']
        path = checkpoint_path(folder)
        points.append((folder.name, 1 / throughput, figures['field']))
        print(data_line('student', {
            'run': folder.name, 'params_m': params['total'] / 1e6,
            'without_embedding_m': (params['total'] - params['embedding']) / 1e6,
            **{key: figures[key] for key in ('records', 'field', 'majority', 'exact', 'kl')},
            'rec_s': 1 / throughput, 'latency_ms': latency * 1e3, 'disk_mb': path.stat().st_size / 1e6}))
    if not plt:
        return
    fig, ax = plt.subplots(figsize=(7, 5))
    for label, rec_s, field in points:
        ax.scatter(rec_s, field)
        ax.annotate(label, (rec_s, field), xytext=(5, 5), textcoords='offset points')
    ax.set(xlabel='records/s in batches of 64', ylabel='field agreement with the teacher', xscale='log')
    fig.tight_layout()
    fig.savefig('out/compare.png', dpi=80)
    print('out/compare.png shows them')


# -----------------------------------------------------------------------------
# what is printed


def print_examples(space, shards, rows, answers, n):
    """prints n texts, the values of teacher and student side by side; < marks where they differ."""
    def values(outs):
        answer = space.to_json(outs)
        return [str(value) for value in answer.values()] if answer else ['(not JSON)'] * len(space.fields)
    some = list(zip(rows, answers))[:n]
    pairs = [(values(shards.answer(i).tolist()), values(outs)) for i, outs in some]
    widths = [max(map(len, column)) for column in zip(space.fields, *(row for pair in pairs for row in pair))]
    print(' ' * 10, *(name.ljust(width + 1) for name, width in zip(space.fields, widths)))
    for (i, _), (theirs, ours) in zip(some, pairs):
        print(space.tokenizer.decode(shards.ids(i).tolist()))
        print('   teacher', *(value.ljust(width + 1) for value, width in zip(theirs, widths)))
        marked = [value + '<' * (value != due) for value, due in zip(ours, theirs)]
        print('   student', *(value.ljust(width + 1) for value, width in zip(marked, widths)))


def print_in_words(figures, linear, money):
    """prints what the figures say: how often the student agrees, beside simpler ways, and how fast it is."""
    of_100 = lambda share: f'{100 * share:.0f}'
    line = (f'the student agrees with its teacher in {of_100(figures["field"])} of 100 fields; always saying '
            f'the commonest value would in {of_100(figures["majority"])}')
    if linear:
        line += (f', counting words in {of_100(linear["field"])}. Whole answers: {of_100(figures["exact"])}, '
                 f'counting words {of_100(linear["exact"])}')
    print(line)
    line = f'it answers {money["student_rec_s"]:,.0f} texts a second here'
    if money['teacher_rec_s'] > 0:
        line += f', its teacher {money["teacher_rec_s"]:,.0f}'
    print(line)


def print_doubt_and_cost(checkpoint, student, space, shards, rows, free_answers, batch_size, *prices):
    """prints how well the student knows what it does not know, what a cascade gives, and when it has paid for
    itself. prices: the last arguments of cost. Returns that cost, and of the odd records how sure the student
    is and whether its value is the teacher's, (N, fields) each."""
    start = time.perf_counter()
    held, decisions = zip(*decode(student, space, (shards.ids(i).tolist() for i in rows), batch_size))
    money = cost(checkpoint['work'], len(rows) / (time.perf_counter() - start), *prices)
    odd = [n for n, i in enumerate(rows) if i % 2]              # temperatures were fitted on the even ones
    ours = field_texts(space, [held[n] for n in odd])
    theirs = field_texts(space, [shards.answer(rows[n]).tolist() for n in odd])
    right = same_values(ours, theirs)
    temperature = {field: figures['temperature'] for field, figures in checkpoint['per_field'].items()}
    before, sure = (np.array([list(confidence_of(space.fields, decisions[n], t).values()) for n in odd])
                    for t in (None, temperature))
    differs = float(np.mean([a != b for a, b in zip(held, free_answers)]))
    print(data_line('calibration', {'records': len(odd), 'ece_before': calibration_error(before, right),
                                    'ece_after': calibration_error(sure, right), 'free_differs': differs}))
    points = list(cascade(sure, right))
    for point in points:
        million = money['student_million'] + point['deferred'] * money['teacher_million']
        print(data_line('cascade', point | {'million': million}))
    if max(point['kept_field'] for point in points[1:]) <= points[0]['kept_field']:
        print('where it is surest no more fields agree than anywhere: its confidence is of no use yet')
    print(data_line('cost', money))
    if money['break_even'] == math.inf:
        print('at these prices a call of the student is no cheaper than one of the teacher: keep the teacher')
    return money, sure, right


def set_target(folder, which, sure, right, target):
    """finds, prints and stores the threshold for an agreement; see find_target."""
    found = find_target(sure, right, target)
    store_target(folder, which, found)
    if found:
        print(data_line('target', found))
        print('stored in the student: sample.py takes --min_confidence=target')
    else:
        print(f'no threshold keeps records that agree in {target:g} for sure: more held-out records, a lower '
              'target or a better student')


# -----------------------------------------------------------------------------
# main


if __name__ == '__main__':
    if not name and not compare:
        stop('no task; run: python tools/evaluate.py config/demo.py')
    device = pick_device(device)
    if compare:
        sys.exit(compare_runs([Path(folder) for folder in compare.split(',')], device, dtype))
    out = Path('out', run or name)
    checkpoint, student, space = load_checkpoint(out, device, which, dtype)
    warn_changed_task(checkpoint['task'], fields, prompt)
    shards = load_records(dataset, name, checkpoint['task'])
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
    source = Path('data', dataset, 'input.jsonl')
    if source.is_file():
        truth = read_truth(source, shards, rows)
        theirs = [shards.answer(rows[n]).tolist() for n in truth]
        for line in truth_lines(space, truth, {'teacher': theirs, 'student': [answers[n] for n in truth]}):
            print(data_line(*line))
    money, sure, right = print_doubt_and_cost(checkpoint, student, space, shards, rows, answers, sample_batch,
                                              hour_price, teacher_price, calls_per_day)
    if target_agreement:
        set_target(out, which, sure, right, target_agreement)
    print_examples(space, shards, rows, answers, examples)
    print_in_words(figures, checkpoint['linear'], money)
    if picture := draw_report(out, shards, rows[:500], dtype, which):
        print(f'{picture} shows the training, the fields, the confidence and the confusions')
