"""The text in a conversation: the prompts around it (templates), and which of several turns it is in.

The rule, for a student that reads one text:
1. A user message that matches a template, or the student's training prompt, holds the text; alone, after the
   system messages, or joined with the user messages right beside it. Of several the last counts.
2. Else the text is the only user message. Messages in which a client complains of a wrong answer (RETRIES) do
   not count. A message that looks like a prompt is refused, unless '{text}' is a template.
3. Several user messages without a template are refused, unless `turns` says which one counts.
4. A tool's result after the text asks for the next step, which a student cannot take: refused, unless it is
   such a complaint, the only tool must be called again, or turns is 'first'.
"""
import re
from dataclasses import dataclass

from data.templates import split_template, text_between
from serve.request import Refusal, read_content, require

ROLES = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant', 'tool': 'tool',
         'function': 'tool'}
RETRIES = re.compile('|'.join((  # how clients ask again after an answer that they did not accept
    'Recall the function correctly, fix the errors', 'Correct your JSON (ONLY )?RESPONSE',  # instructor
    'Validation Errors? (found|due)',
    '<pyai:retry_feedback>', 'Fix the errors and try again',    # pydantic-ai
    '^Please (return text|include your response)',
    'Please fix your mistakes', 'did not satisfy the constraints given in the Prompt')), re.I)  # LangChain
PROMPTS = re.compile('|'.join((  # what instructions around a text look like
    r'^\W*(please )?(now )?(classify|categori[sz]e|label|analy[sz]e|extract|determine|identify|detect|decide|'
    r'assess|evaluate|judge|read)\b[^.!?:\n]{0,150}[:\n]',
    r'^\W*(you are an? [^.\n]{0,60}(classifier|assistant|expert|analyst|model)\b|your (task|job) is\b)',
    r'\b(answer|respond|reply|return|output|format(ted)?|write|produce)\b[^.!?\n]{0,60}\bjson\b',
    r'\bjson (schema|object|instance)\b',
    r'\b(answer|respond|reply) (only )?(with|using) (only|exactly|one of|a single)\b')), re.I)
HINT = ("if a prompt is around the text, name it: --template='... {text} ...' (docs/serve.md); if the whole "
        "message is the text, --template='{text}' says so")


@dataclass
class Turn:
    """one message of a conversation. role: system, user, assistant or tool; where: the keys that lead to
    it."""
    role: str
    text: str
    where: tuple


def read_turns(messages, where):
    """list of Turns from the messages of a chat, or the input items of a response. where: their key."""
    turns = []
    for n, message in enumerate(require(messages, list, 'a list of messages', where, status=400)):
        require(message, dict, 'an object with role and content', where, n, status=400)
        kind = message.get('type', 'message')
        role = ROLES.get(message.get('role')) if kind == 'message' else None
        content = message.get('content')
        if kind in ('function_call', 'reasoning') or role == 'assistant':
            role, content = 'assistant', ''                     # what was answered before is not read
        elif kind == 'function_call_output':
            role, content = 'tool', message.get('output')
        elif role is None:
            raise Refusal(400, f'there is no role {str(message.get("role"))[:40]!r}' if kind == 'message' else
                          f'the student reads messages, not {str(kind)[:40]!r}', where, n)
        turns.append(Turn(role, read_content(content, (where, n, 'content')), (where, n)))
    return turns


class Prompts:
    """finds the text in a conversation, as the top of this file says.

    templates: strings with {text} in them (of several the last), the training prompt among them; {*} stands for what
    is not read, such as a date. turns: 'refuse', 'first' or 'last', the user message that counts if there are several
    without a template."""

    def __init__(self, templates, turns='refuse'):
        words = {template: ''.join(sum(split_template(template), [])) for template in templates}
        self.templates = sorted((template for template in words if words[template]),
                                key=lambda template: -len(words[template]))
        self.bare, self.turns = len(self.templates) < len(words), turns

    def unwrap(self, string):
        """the text in a prompt, or None if no template matches. Whitespace may differ; of several templates
        the one with most words counts."""
        found = (text_between(string, template) for template in self.templates)
        return next((text for text in found if text is not None), None)

    def find_text(self, turns, where, again=False):
        """(text, keys of the messages that were not read, True if a template says that this is the text).
        turns: list of Turns. again: True if the reply must call the only tool, whatever it returned."""
        users = [n for n, turn in enumerate(turns) if turn.role == 'user']
        if not users:
            raise Refusal(400, 'there is no message with the role user', where)
        system = ' '.join(turn.text for turn in turns if turn.role == 'system')
        matched = self.match_template(turns, users, system)
        text, read = matched or self.pick_bare(turns, users, where)
        for turn in turns[max(read):]:
            if turn.role == 'tool' and not again and self.turns != 'first' and not RETRIES.search(turn.text):
                raise Refusal(400, 'the conversation goes on after the result of a tool, which the student '
                              'does not read; if that is a repeated question, --turns=first says so',
                              *turn.where)
        ignored = ['.'.join(map(str, turn.where)) for n, turn in enumerate(turns)
                   if n not in read and (turn.text or turn.role == 'user')]
        return text, ignored, bool(matched) or self.bare

    def match_template(self, turns, users, system):
        """(text, numbers of the turns read) of the last user message that matches a template, or None."""
        systems = [n for n, turn in enumerate(turns) if turn.role == 'system']
        runs = []                                               # each with the user messages right before it
        for n in users:
            runs.append([*runs[-1], n] if runs and turns[n - 1].role == 'user' else [n])
        for read in [[n] for n in reversed(users)] + [run for run in reversed(runs) if len(run) > 1]:
            string = ' '.join(turns[n].text for n in read)
            for before in ([], systems) if systems else ([],):
                if (text := self.unwrap(f'{system} {string}' if before else string)) is not None:
                    return text, {*before, *read}
        return None

    def pick_bare(self, turns, users, where):
        """(text, numbers of the turns read) of the user message that is a text itself."""
        texts = [n for n in users if not RETRIES.search(turns[n].text)] or users
        if len(texts) > 1 and self.turns == 'refuse':
            raise Refusal(400, f'there are {len(texts)} user messages, and the student reads one text; say '
                          'which counts with --turns=first or --turns=last, or name the prompt around it: '
                          "--template='... {text} ...' (docs/serve.md)", where)
        n = texts[-1 if self.turns == 'last' else 0]
        if not self.bare and PROMPTS.search(turns[n].text):
            raise Refusal(400, f'the message looks like a prompt that is none of the templates; {HINT}',
                          *turns[n].where)
        return turns[n].text, {n}
