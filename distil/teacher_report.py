"""Is this teacher worth copying? The report at the end of extract.py: how much of the teacher's probability
is kept, how many answers depend on a near tie, how often each value is the answer. No settings.
"""
import random
from collections import Counter

import numpy as np
import torch

from config import data_line, stop
from data import Shards, answers_from
from distil.agreement import read_truth, truth_lines
from distil.values import said

# a near tie: logits closer than this may change their order if they are computed in another way
NEAR_TIE = {'float32': 0.01, 'float16': 0.05, 'bfloat16': 0.25}


def print_coverage(shards, space, min_coverage):
    """prints the coverage line: the share of the teacher's probability on the output vocabulary, on average
    and at the worst field. If the latter is below min_coverage, also the most probable of the other tokens.
    """
    mass, labelled = {}, space.schema.paths_in(shards.meta.get('label_fields') or ())  # {field: probabilities}
    for i in range(len(shards))[:2000]:
        outs, (top, lse) = shards.answer(i).tolist(), shards.answer(i, 'stats').T
        if not np.isnan(lse).any():
            raw = shards.answer(i, 'logits').astype(np.float32)  # (n, V) below top (n,)
            kept = np.exp(raw + (top - lse)[:, None]).sum(1)    # (n,) probability
            for state, p in zip(space.states_before(outs), kept):
                if space.leaf_at[state] in labelled:              # not the teacher's
                    continue
                mass.setdefault(space.leaf_at[state] or 'json', []).append(p)
    if not mass:
        return
    steps = sum(map(len, mass.values()))
    mean, means = sum(map(sum, mass.values())) / steps, {field: sum(m) / len(m) for field, m in mass.items()}
    worst = min(means, key=lambda field: (means[field], field))
    dropped, missing = Counter(), Counter()
    for meta in shards.metas:
        dropped.update(meta.get('dropped', {}))
        missing.update(meta.get('missing', {}))
    print(data_line('coverage', {
        'mass': f'{mean:.4f}', 'worst_field': worst, 'worst_mass': f'{means[worst]:.4f}', 'steps': steps,
        'dropped_invalid': dropped['invalid'], 'dropped_vocab': dropped['vocab']}))
    if means[worst] < min_coverage and missing:
        print(f'at {worst}, {1 - means[worst]:.1%} of the teacher\'s probability is on tokens that are not '
              'kept; the most probable of them, over all fields:')
        likely = {space.tokenizer.decode([int(i)], skip_special_tokens=False): p / missing.total()
                  for i, p in missing.most_common(12)}
        print(' ', ', '.join(f'{token!r} {share:.0%}' for token, share in likely.items()))
        print(f'  to keep them, set extra_vocab = {list(likely)} and choose another name; '
              'if they are only other spacing or quotes, show the form of the answer in the prompt')


def print_near_ties(shards, space):
    """prints the near_ties line: the share of records with a decision closer than the rounding of the
    teacher's logits, which no student can learn; and the share of records that the teacher would also write
    without the constraint, as a free-running student has to. If that is below 0.9, also the most frequent
    error."""
    below, near, free, errors = NEAR_TIE[shards.meta['dtype']], [], [], Counter()
    labelled = space.schema.paths_in(shards.meta.get('label_fields') or ())
    for i in np.linspace(0, len(shards) - 1, min(len(shards), 5000)).astype(int):
        outs, logits = shards.answer(i).tolist(), torch.from_numpy(shards.logits(i))  # (n,), (n, V)
        states, best = space.states_before(outs), logits.argmax(-1).tolist()
        decisions = [n for n, state in enumerate(states)
                     if len(space.transitions[state]) > 1 and space.leaf_at[state] not in labelled]  # no places
        legal = space.next_state[[states[n] for n in decisions]] >= 0
        top = logits[decisions].masked_fill(~legal, -np.inf).topk(2).values  # (decisions, 2)
        near.append(bool((top[:, 0] - top[:, 1] < below).any()))
        illegal = next((n for n, state in enumerate(states)
                        if state not in space.copy_at and best[n] not in space.transitions[state]), None)
        free.append(illegal is None)
        if illegal is not None:
            errors[outs[illegal], best[illegal]] += 1
    print(f'near_ties records={len(near)} share={np.mean(near):.4f} below={below} free={np.mean(free):.4f}')
    if np.mean(free) < 0.9:
        pair, _ = errors.most_common(1)[0]
        expected, written = (space.tokenizer.decode([space.output_ids[o]]) for o in pair)
        print(f'without the constraint the teacher would break the schema in {1 - np.mean(free):.0%} of the '
              f'answers, mostly with {written!r} in place of {expected!r}. A free-running student learns '
              'this too: show the form of the answer in the prompt')


def print_answers(shards, space, examples, given):
    """prints the share of each value among the answers, and a number of texts with their answers. given: whether
    they are labels."""
    shown, labelled = said, space.schema.paths_in(shards.meta.get('label_fields') or ())
    rows = np.linspace(0, len(shards) - 1, min(len(shards), 10000)).astype(int)
    answers = [space.to_json(shards.outs(i)) for i in rows]
    for leaf in space.schema.leaves:
        values = [leaf.get(answer) for answer in answers]
        if leaf.is_list:                                        # what is in it, and its commonest forms
            within = Counter(shown(member) for value in values for member in value).most_common(12)
            print(f'in {leaf.path}:', ', '.join(f'{member} {n / len(answers):.2f}' for member, n in within))
        counts = Counter(map(shown, values)).most_common(12)
        print(f'{leaf.path}:', ', '.join(f'{value} {n / len(answers):.2f}' for value, n in counts))
        if counts[0][1] > 0.9 * len(answers) and leaf in space.schema.decided:
            print(f'  {leaf.path} is nearly always {counts[0][0]}, so a student can learn nothing from it: '
                  + ('it needs texts with other labels' if given or leaf.path in labelled else
                     'try other examples in the prompt, another order of them, or other values'))
    for i in random.Random(0).sample(range(len(shards)), min(examples, len(shards))):
        print(space.tokenizer.decode(shards.ids(i).tolist()))
        print(f'  {"label" if given else "teacher"} {shown(space.to_json(shards.outs(i)))}')


def print_teacher_report(dataset, name, space, source, min_coverage, examples):
    """prints the whole report on the records of a task. Exits with a message if there are none. source: the
    file of texts."""
    try:
        shards = Shards(dataset, name)
    except FileNotFoundError:
        stop('no answer obeys the schema; look at the dropped counts, and '
             + 'at the values of fields, at constrain, or at the prompt')
    print_coverage(shards, space, min_coverage)
    given = answers_from(shards.meta) == 'labels'
    if answers_from(shards.meta) == 'teacher':
        print_near_ties(shards, space)
    truth = read_truth(source, shards, range(len(shards)))
    outs = [shards.outs(i) for i in truth]
    for line in truth_lines(space, truth, {'labels' if given else 'teacher': outs}):
        print(data_line(*line))
    print_answers(shards, space, examples, given)
