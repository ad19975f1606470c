"""The schema as the runners read it: task.json of an exported folder. No settings, no files.

A student's OutputSpace (distil/space.py) is an automaton over tokens, and forks between the texts that an answer is
made of. The runners know neither the schema nor the tokens' texts. They get the decisions, and at each fork its
options.
"""
from distil.reader import encode_texts, text_room

FORMAT = 5  # of the folder; task.json has it, and the runners check it


def make_task(name, checkpoint, space, student):
    """the content of task.json, a dict: the automaton, reduced to its decisions. device/run.py uses it.

    states: for each decision the leaf that it belongs to (field), its legal tokens (rows: of the logits), what to read
    of the answer after each choice (read: the token itself and the forced tokens after it), and the next decision
    (next: -1 if the answer is complete). leaves: of the schema, with their temperatures. choices: of the schema, with
    the names of their values; of: null, or [path of a list of values, value] if it says whether the value is in the
    list. text and forks spell the answer, see make_forks. A text is: before, its ids, after, which are an encoder's
    special tokens; an answer begins with start.

    copied: the values that are copied from the text, in the order of the schema: path; field, its leaf; kind, see
    distil/kinds.py; list: a number that the items of one list share, else null. first_place: where the logits of the
    text's tokens begin. A state in which the first or the last place of a value may be chosen has its number there
    (copies), and this choice is the last one, after those of the tokens. A student that copies reads decisions alone:
    read has no forced tokens then. needs: for each token of another state the kinds that the text must have, if there
    are any. locale, reference_date: how these are read, see distil/candidates.py.
    """
    task, numbers, copied = checkpoint['task'], {}, space.schema.copied
    prefix, first = space.forced_runs[0]
    todo, states = [first], []
    while todo:
        state = todo.pop(0)
        if state in numbers:
            continue
        numbers[state] = len(numbers)
        states.append((state, list(space.transitions[state].items())))
        following = [space.forced_runs[after][1] for _, after in states[-1][1]]
        todo += [state for state in following if state != space.done]
    numbers[space.done] = -1
    before, after, max_text = [], [], task['max_text']
    if student.encoder:  # its special tokens around the text, and room for them
        room = min(text_room(student, space), student.encoder.config.n_pos)
        cls, sep = encode_texts(student.encoder, [''], room)[0]
        before, after, max_text = [cls], [sep], room - 2
    table = []
    for state, moves in states:
        tokens = [(out, after) for out, after in moves if out < space.V]
        table.append({'field': space.leaf_at[state], 'rows': [out for out, _ in tokens],
                      'read': [[out, *([] if copied else space.forced_runs[after][0])] for out, after in tokens],
                      'next': [numbers[space.forced_runs[after][1]] for _, after in moves]})
        if state in space.copy_at:
            table[-1]['copies'] = space.copy_at[state].number
        elif any(space.needs[after] for _, after in tokens):
            table[-1]['needs'] = [sorted(space.needs[after]) for _, after in tokens]
    leaves = [{'path': leaf.path, 'temperature': checkpoint['per_field'][leaf.path]['temperature']}
              for leaf in space.schema.leaves]
    choices = []
    for choice in space.schema.choices:
        leaf = space.schema.leaf(choice.group)
        is_member = leaf.is_list and leaf.values and choice.path.startswith(f'{leaf.path}.')
        choices.append({'path': choice.path, 'names': choice.names,
                        'of': [leaf.path, choice.path[len(leaf.path) + 1:]] if is_member else None})
    return {'format': FORMAT, 'name': name, 'leaves': leaves, 'choices': choices,
            'max_text': max_text, 'keep_end': bool(task.get('keep_end')), 'before': before, 'after': after,
            'start': [student.config.output_vocab, *([] if copied else prefix)], 'states': table,
            'copied': describe_copied(copied), 'first_place': student.config.output_vocab + 1,
            'locale': space.locale, 'reference_date': space.reference_date,
            'text': space.start_text, 'forks': make_forks(space, numbers),
            'min_confidence': (checkpoint.get('target') or {}).get('min_confidence')}


def describe_copied(copied):
    """`copied` of task.json. copied: the copied.Copied of a schema."""
    lists = {}
    return [{'path': part.path, 'field': part.group, 'kind': part.kind,
             'list': lists.setdefault(part.keys[:-1], len(lists)) if isinstance(part.keys[-1], int) else None}
            for part in copied]


def make_forks(space, numbers):
    """for each fork of space.entries, the first one first, a list of its options. text: what is written; made: the
    choices it makes, [number of the choice, number of its value] each; next: the fork that follows, -1 at the end.

    steps: the decisions that lead to it, in order, [state, the indices among its legal tokens that take the option on,
    those that are possible at this fork, or null if all are]. numbers: {state of the space: number of the decision}.
    """
    of_choice = {choice.path: n for n, choice in enumerate(space.schema.choices)}
    of_entry = {entry: n for n, entry in enumerate(space.entries)}
    order = [{out: n for n, out in enumerate(row)} for row in space.transitions]  # of a state's legal tokens
    forks = []
    for k, entry in space.entries:
        options = []
        for way, steps in zip(space.forks[k], space.steps(k, entry)):
            options.append({
                'text': way.text, 'made': [[of_choice[path], n] for path, n in way.made],
                'steps': [[numbers[state], [order[state][out] for out in taken],
                           None if len(possible) == len(order[state]) else [order[state][out] for out in possible]]
                          for state, taken, possible, _ in steps],
                'next': -1 if way.following is None else of_entry[way.following, space.state_after(way.tokens, entry)]})
        forks.append(options)
    return forks
