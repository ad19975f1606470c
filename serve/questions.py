"""Typed questions: OpenAI's decisions and TypeSafe's System One. Each question is matched to one of the
student's fields, and answered with the probabilities of all its options. A question that matches no field goes to the
property whose options come with a text (distil/options.py), if the student has one: its options stand behind the text.
Else it is refused by its name."""
import math
from dataclasses import dataclass

from distil.kinds import Maybe
from distil.labeler import option_probabilities
from distil.options import tidy, write_options
from distil.values import PRESENT, value_name, value_names
from serve.completions import count_tokens
from serve.prompts import read_turns
from serve.request import Plan, Refusal, read_state, require
from serve.trees import lists, option_parts, scalars


@dataclass
class Question:
    """a question that the student can answer. kind: 'choice', 'yes-or-no' or 'score'."""
    name: str       # the caller's, or None
    kind: str
    options: list   # in the caller's order and words; of a score, lowest first; of a yes-or-no, []
    field: str      # path of a choice; '' if its options stand behind the text
    numbers: list   # for each option the number of the field's value; of a yes-or-no only that of yes
    given: list = () # what then stands there, in the order of the options, see distil/options.py

    def probabilities(self, rows):
        """list of the options' probabilities. rows: {field, or number of the question: [probability of each value]}."""
        return [rows[self.field][n] for n in self.numbers]


def given_question(space, name, kind, options, abouts, instructions, where):
    """the Question about the property whose options come with a text. abouts: what each option means, or None;
    instructions: of the question, or None. None if the student has no such property, or more than one."""
    if len(option_parts(space.schema)) != 1:
        return None
    if kind == 'yes-or-no':                                     # yes is what the question says
        options, abouts = ['yes', 'no'], [instructions, None]
    if not options or None in options:                          # a level that is null; others may be of any structure
        return None
    given = [{'value': value_name(option), 'description': about if isinstance(about, str) else ''}
             for option, about in zip(options, abouts)]
    if len({tidy(one['value']) for one in given} - {''}) < len(given):
        raise Refusal(422, f'the options of the {kind} question {name or where[-1]!r} must be different texts', *where)
    if kind == 'yes-or-no':
        return Question(name, kind, [], '', [0], given)
    return Question(name, kind, options, '', [*range(len(given))], given)


def given_probabilities(labeler, question, answer):
    """[probability of each] of the options of a Question that stand behind the text of an Answer."""
    part, = option_parts(labeler.space.schema).values()
    part = part.part if isinstance(part, Maybe) else part
    if not answer.decisions:                                    # upstream's answer
        return [float(part.get(answer.record) == tidy(one['value'])) for one in question.given]
    p = option_probabilities(labeler.student, labeler.space, part, answer.ids, answer.outs, answer.decisions,
                             labeler.temperature)
    return [p.get(tidy(one['value']), 0.0) for one in question.given]


def rows_of(schema, answer):
    """{path: [probability of each value]} of all choices: those of an Answer; one that it leaves open no more, such as
    a value of a list that is full, is certain."""
    numbers = schema.numbers(schema.with_examples(answer.record))
    certain = {choice.path: [float(n == numbers.get(choice.path, 0)) for n in range(len(choice))]
               for choice in schema.choices}
    return certain | answer.probabilities


# -----------------------------------------------------------------------------
# questions in


def askable(schema):
    """the choices that a question can be about: one of some constants in every answer, or whether a value is in a
    list."""
    several = [part.part if isinstance(part, Maybe) else part for part in lists(schema)]
    return [*scalars(schema).values(), *(choice for part in several for choice in part.choices)]


def match_question(space, name, kind, options, true_value, ordered, where):
    """the Question about the field of that name or, if there is none, about the only field with these options
    (in any order). If the field is named, the levels of a score may also be the caller's words, lowest first. A name
    such as customer.mood or labels.bug may be its last part alone, if no other field has it.

    name: or None. kind: see Question. options: strings, booleans or parsed JSON. true_value: {field: the
    value that means yes}; booleans need none. ordered: fields whose values are a scale, lowest first;
    integers always are one. Refusal if no field matches, or more than one.
    """
    option_names = value_names(options)
    matches, leaves = {}, askable(space.schema)                 # {field: numbers}, see Question
    named = [leaf.path for leaf in leaves if leaf.path == name]
    named = named or [leaf.path for leaf in leaves if leaf.keys[-1] == name]
    for leaf in leaves:
        field, of_list = leaf.path, PRESENT in leaf.values      # of_list: is this value in a list?
        names = ['no', 'yes'] if of_list else leaf.names
        yes = 'yes' if of_list else value_name(true_value.get(field, True))
        integers = all(type(value) is int for value in leaf.values)
        scale = integers or field in ordered
        if not of_list and sorted(option_names) == sorted(names) and (kind == 'choice' or kind == 'score' and scale):
            matches[field] = [names.index(option) for option in option_names]
        elif kind == 'score' and scale:
            own_words = not set(option_names) & set(names)
            if field in named and len(option_names) == len(names) and own_words:
                matches[field] = sorted(range(len(names)), key=leaf.values.__getitem__ if integers else None)
        elif len(names) == 2 and yes in names:
            yes_and_no = [names.index(yes), 1 - names.index(yes)]
            lower = [option.lower() for option in option_names]
            if kind == 'yes-or-no' and (field in named or name == yes and not of_list):
                matches[field] = yes_and_no[:1]
            elif kind == 'choice' and field in named and sorted(lower) in (['no', 'yes'], ['false', 'true']):
                matches[field] = [yes_and_no[option in ('no', 'false')] for option in lower]
    of_name = [field for field in matches if field in named]
    if len(of_name) == 1:
        return Question(name, kind, options, of_name[0], matches[of_name[0]])
    if len(matches) == 1 and name not in space.schema.paths:
        field, numbers = matches.popitem()
        return Question(name, kind, options, field, numbers)
    why = f'its fields are: {space.schema.describe()}'
    if len(matches) > 1:
        why = f'several fields match; name the question after one of them: {", ".join(matches)}'
    raise Refusal(422, f'the student cannot answer the {kind} question {name or where[-1]!r}; {why}', *where)


def pick_question(space, name, kind, options, true_value, ordered, where, abouts, instructions):
    """match_question, and given_question where it refuses."""
    try:
        return match_question(space, name, kind, options, true_value, ordered, where)
    except Refusal:
        if question := given_question(space, name, kind, options, abouts, instructions, where):
            return question
        raise


def read_decisions(body, space, true_value, ordered):
    """the body of /v1/decisions -> list of Questions, in their order."""
    given = require(body.get('questions'), list, 'a list of 1 to 400 questions', 'questions')
    if not 1 <= len(given) <= 400:
        raise Refusal(422, f'there are {len(given)} questions; 1 to 400 are allowed', 'questions')
    questions = []
    for n, question in enumerate(given):
        where = 'questions', n
        kind = require(question, dict, 'an object', *where).get('type')
        name, options, listed = question.get('name'), [], []
        if name is not None:
            require(name, str, 'a string', *where, 'name')
        if kind in ('choice', 'score'):
            part, key = ('choices', 'value') if kind == 'choice' else ('levels', 'label')
            listed = require(question.get(part), list, 'a list', *where, part)
            options = [require(option, dict, 'an object', *where, part, k).get(key)
                       for k, option in enumerate(listed)]
            if not all(isinstance(option, (str, bool)) for option in options):
                raise Refusal(422, f'each of {part} needs a {key}, a string or boolean', *where, part)
        elif kind != 'predicate':
            raise Refusal(422, f'question {name or n!r}: its type must be choice, predicate or score',
                          *where, 'type')
        kind = 'yes-or-no' if kind == 'predicate' else kind
        abouts = [option.get('description') for option in listed] if options else []
        questions.append(pick_question(space, name, kind, options, true_value, ordered, where, abouts,
                                       question.get('instructions')))
    return questions


def read_system_one(body, space, true_value, ordered):
    """the body of /v1/systemone -> list of Questions."""
    given = require(body.get('questions'), dict, 'an object of questions', 'questions')
    if not given:
        raise Refusal(422, 'questions is empty', 'questions')
    questions = []
    for name, question in given.items():
        where = 'questions', name
        kind, criteria = require(question, dict, 'an object', *where).get('type'), question.get('criteria')
        if kind == 'choice':
            options = list(require(criteria, dict, 'an object of options', *where, 'criteria'))
        elif kind == 'score':
            options = require(criteria, list, 'a list of levels', *where, 'criteria')
        elif kind == 'noul':
            kind, options = 'yes-or-no', []
        else:
            raise Refusal(422, f'question {name!r}: its type must be choice, noul or score', *where, 'type')
        abouts = list(criteria.values()) if isinstance(criteria, dict) else [None] * len(options)
        questions.append(pick_question(space, name, kind, options, true_value, ordered, where, abouts,
                                       question.get('instructions')))
    return questions


# -----------------------------------------------------------------------------
# answers out


def choice_confidence(p):
    """confidence of a choice with probabilities p: 0 if all are equal, 1 if one is 1."""
    return max(0.0, (max(p) - 1 / len(p)) / (1 - 1 / len(p))) if len(p) > 1 else 1.0


def score_confidence(p):
    """confidence of a score with probabilities p: 1 - mean distance from the likeliest level / mean distance
    from the middle if all levels are equally likely."""
    mode, n = p.index(max(p)), len(p)
    uniform = sum(abs(i - (n - 1) / 2) for i in range(n)) / n
    return max(0.0, 1 - sum(q * abs(i - mode) for i, q in enumerate(p)) / uniform) if n > 1 else 1.0


def expected_score(p):
    return math.fsum(i * q for i, q in enumerate(p))


def decisions_answers(questions, rows):
    """the answers of /v1/decisions. rows: {field: [probability of each value]}."""
    answers = []
    for question in questions:
        p, options = question.probabilities(rows), question.options
        if question.kind == 'yes-or-no':
            answers.append({'type': 'predicate', 'name': question.name, 'probability': p[0]})
        elif question.kind == 'choice':
            answers.append({'type': 'choice', 'name': question.name, 'choice': options[p.index(max(p))],
                            'confidence': choice_confidence(p),
                            'probabilities': [{'value': v, 'probability': q} for v, q in zip(options, p)]})
        else:
            answers.append({'type': 'score', 'name': question.name, 'score': expected_score(p),
                            'confidence': score_confidence(p),
                            'probabilities': [{'label': label, 'value': i, 'probability': q}
                                              for i, (label, q) in enumerate(zip(options, p))]})
    return answers


def system_one_answers(questions, rows):
    """the answers of /v1/systemone, see decisions_answers."""
    answers = {}
    for question in questions:
        p, options = question.probabilities(rows), question.options
        if question.kind == 'yes-or-no':
            answer = {'type': 'noul', 'noul': p[0]}
        elif question.kind == 'choice':
            answer = {'type': 'choice', 'choice': options[p.index(max(p))],
                      'confidence': choice_confidence(p), 'probabilities': dict(zip(options, p))}
        else:
            numbers = list(map(str, range(len(p))))
            answer = {'type': 'score', 'score': expected_score(p), 'confidence': score_confidence(p),
                      'legend': dict(zip(numbers, options)), 'probabilities': dict(zip(numbers, p))}
        answers[question.name] = answer
    return answers


# -----------------------------------------------------------------------------
# the routes


def is_system_one(path, body):
    """True if the questions have System One's form. Some gateways send it to /v1/decisions, or the other way
    round, so the form counts before the path."""
    questions = body.get('questions')
    return isinstance(questions, dict) or path == '/v1/systemone' and not isinstance(questions, list)


def read_questions(student, body, path):
    """the Plan of POST /v1/decisions and /v1/systemone."""
    system_one, ignored = is_system_one(path, body), []
    read = read_system_one if system_one else read_decisions
    questions = read(body, student.space, student.true_value, student.ordered)
    if system_one:
        if body.get('state') is None:
            raise Refusal(422, 'state is missing', 'state')
        text = read_state(body['state'])
        text = student.prompts.unwrap(text) or text
    elif not isinstance(body.get('input'), (str, list)):
        raise Refusal(422, 'input must be a string or a list of messages', 'input')
    else:
        given = body['input']
        messages = [{'role': 'user', 'content': given}] if isinstance(given, str) else given
        text, ignored, _ = student.prompts.find_text(read_turns(messages, 'input'), 'input')

    given = [question for question in questions if question.given]
    asks_fields = len(given) < len(questions)
    needed = [kind.partition(':')[2] for kind in student.space.needs[0] if kind.startswith('option:')]
    # the fields are the same whatever else is asked
    texts = [write_options(text, {name: ['none'] for name in needed}) if needed else text] * asks_fields
    of = next((copied.of for copied in student.space.schema.copied if copied.is_option), '')
    texts += [write_options(text, {of: question.given}) for question in given]  # each has its own

    def reply(answers):
        n_in, n_out = map(sum, zip(*map(count_tokens, answers)))
        usage = {'input_tokens': n_in, 'output_tokens': n_out}
        if not system_one:
            usage |= {'input_tokens_details': {'cache_write_tokens': 0, 'cached_tokens': 0},
                      'output_tokens_details': {'reasoning_tokens': 0}, 'total_tokens': n_in + n_out}
        write = system_one_answers if system_one else decisions_answers
        rows = rows_of(student.space.schema, answers[0]) if asks_fields else {}
        for n, (question, answer) in enumerate(zip(given, answers[len(answers) - len(given):])):
            question.field, rows[n] = n, given_probabilities(student.service.labeler, question, answer)
        return {'model': student.name, 'answers': write(questions, rows), 'usage': usage}
    return Plan(texts, ('state' if system_one else 'input',), reply, full=True, ignored=ignored,
                refuse_long=student.refuses_long(not system_one))
