"""Is this teacher worth copying? What extract.py prints at the end of a run: how much of what the teacher
wants to say is kept, what hangs on a near tie, how often each value is the answer. No settings."""
import json
import random
from collections import Counter

import numpy as np
import torch

from config import data_line, stop
from data import Shards
from distil.agreement import read_truth, truth_lines

# two logits nearer than this may change places when they are computed in another way
TIE = {'float32': 0.01, 'float16': 0.05, 'bfloat16': 0.25}


def print_coverage(shards, space, min_coverage):
    """prints how much of the teacher's probability lies on the output vocabulary, per field, and what is
    missing."""
    mass = {}
    for i in range(len(shards))[:2000]:
        outs, (top, lse) = shards.answer(i).tolist(), shards.answer(i, 'stats').T
        if not np.isnan(lse).any():
            raw = shards.answer(i, 'logits').astype(np.float32)  # (n, V) below top (n,)
            kept = np.exp(raw + (top - lse)[:, None]).sum(1)    # (n,) probability
            for state, p in zip(space.states_before(outs), kept):
                mass.setdefault(space.field[state] or 'json', []).append(p)
    if not mass:
        return
    steps = sum(map(len, mass.values()))
    mean, means = sum(map(sum, mass.values())) / steps, {field: sum(m) / len(m) for field, m in mass.items()}
    worst = min(means, key=lambda field: (means[field], field))
    dropped, missing = Counter(), Counter()
    for meta in shards.metas:
        dropped.update(meta.get('dropped', {}))
        missing.update(meta.get('missing', {}))
    print(f'coverage mass={mean:.4f} worst_field={worst} worst_mass={means[worst]:.4f} steps={steps} '
          f'dropped_invalid={dropped["invalid"]} dropped_vocab={dropped["vocab"]}')
    if means[worst] < min_coverage and missing:
        print(f'the teacher would rather say something else at {1 - means[worst]:.1%} of {worst}; '
              'most wanted of the tokens that are not kept, of all fields:')
        likely = {space.tokenizer.decode([int(i)], skip_special_tokens=False): p / missing.total()
                  for i, p in missing.most_common(12)}
        print(' ', ', '.join(f'{token!r} {share:.0%}' for token, share in likely.items()))
        print(f'  to keep them: extra_vocab = {list(likely)} and another name; '
              'where they are only other spacing or quotes, show that form in the prompt')


def print_ties(shards, space):
    """prints the share of records whose answer hangs on less than the rounding of the teacher's logits, which
    no student can learn; and of those it would also write if it were not held to the schema, as a student
    will that runs free."""
    below, hang, free, rather = TIE[shards.meta['dtype']], [], [], Counter()
    for i in np.linspace(0, len(shards) - 1, min(len(shards), 5000)).astype(int):
        outs, logits = shards.answer(i).tolist(), torch.from_numpy(shards.logits(i))  # (n,), (n, V)
        states, best = space.states_before(outs), logits.argmax(-1).tolist()
        choices = [n for n, state in enumerate(states) if len(space.transitions[state]) > 1]
        legal = space.next_state[[states[n] for n in choices]] >= 0
        two = logits[choices].masked_fill(~legal, -np.inf).topk(2).values  # (decisions, 2)
        hang.append((two[:, 0] - two[:, 1]).min().item() < below)
        other = next((n for n, state in enumerate(states) if best[n] not in space.transitions[state]), None)
        free.append(other is None)
        if other is not None:
            rather[outs[other], best[other]] += 1
    print(f'near_ties records={len(hang)} share={np.mean(hang):.4f} below={below} free={np.mean(free):.4f}')
    if np.mean(free) < 0.9:
        due, said = (space.tokenizer.decode([space.output_ids[o]]) for o in rather.most_common(1)[0][0])
        print(f'left to itself the teacher would break the schema in {1 - np.mean(free):.0%} of the answers, '
              f'mostly with {said!r} where {due!r} is due; a student that runs free learns that too: show the '
              'form of the answer in the prompt')


def print_answers(shards, space, examples):
    """prints how often each value was the answer, and some texts with theirs."""
    shown = lambda value: json.dumps(value, ensure_ascii=False)
    some = np.linspace(0, len(shards) - 1, min(len(shards), 10000)).astype(int)
    answers = [space.to_json(shards.answer(i).tolist()) for i in some]
    for field in space.fields:
        tally = Counter(shown(answer[field]) for answer in answers).most_common(12)
        print(f'{field}:', ', '.join(f'{value} {n / len(answers):.2f}' for value, n in tally))
        if tally[0][1] > 0.9 * len(answers) and len(space.fields[field]) > 1:
            print(f'  {field} is nearly always {tally[0][0]}, so there is nothing in it to learn: try other '
                  'examples in the prompt, another order of them, or other values')
    for i in random.Random(0).sample(range(len(shards)), min(examples, len(shards))):
        print(space.tokenizer.decode(shards.ids(i).tolist()))
        print(f'  teacher {shown(space.to_json(shards.answer(i).tolist()))}')


def print_teacher_report(dataset, name, space, source, min_coverage, examples, given):
    """all of it, of the records of a task; ends in one line where there are none. source: the file of texts;
    given: the answers came with them."""
    try:
        shards = Shards(dataset, name)
    except FileNotFoundError:
        stop('no answer obeys the schema; look at the dropped counts, and '
             + ('at the values of fields' if given else 'try constrain = True or another prompt'))
    print_coverage(shards, space, min_coverage)
    if not shards.meta['score']:
        print_ties(shards, space)
    truth = read_truth(source, shards, range(len(shards)))
    for line in truth_lines(space, truth, {'teacher': [shards.answer(i).tolist() for i in truth]}):
        print(data_line(*line))
    print_answers(shards, space, examples)
