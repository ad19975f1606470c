"""The form of a reply: a JSON object, one word, or the call of a tool, as a request of chat completions or
responses asks for it. The parameters that other servers have for it are honoured or refused by name."""
import json
from dataclasses import dataclass
from functools import partial

from distil.schema import write_gaps, write_value
from distil.values import value_name
from serve.options import loose, match_options
from serve.request import Refusal, require
from serve.shapes import Part, Shape, whole_shape
from serve.trees import option_parts, scalars

# parameters that would change the answer, and that a student cannot follow
REFUSED = ('audio', 'guided_regex', 'guided_grammar', 'regex', 'ebnf', 'grammar', 'structural_tag',
           'continue_final_message', 'web_search_options', 'logit_bias', 'echo', 'suffix', 'conversation',
           'previous_response_id', 'background')


@dataclass
class Form:
    """the form of a reply. kind: 'text', 'tool', or 'function' for the older kind of tools."""
    shape: Shape
    kind: str = 'text'
    fence: bool = False         # a code fence around it, as the student was trained with
    tool: str = ''              # the name of the tool; '': the answer is the name
    named: bool = False         # the caller chose this tool
    forced: bool = False        # it must be called
    plain: bool = False         # the reply is a word, not JSON
    whole: bool = False         # the caller names no field or value

    def call(self, answer, space):
        """(name of the tool, pieces of its arguments), see pieces."""
        if self.tool:
            return self.tool, self.pieces(answer, space)
        (_, name, _, _), = self.shape.values(answer, space)
        return name, [('{}', 0.0, {})]

    def pieces(self, answer, space):
        """the reply in pieces [(text, log p, {text: log p} of all values allowed)]. A value is a piece, and
        so is what stands between two values, with 0 and {}. If one value begins with another one, the
        character after it belongs to the piece."""
        parts, pieces = self.shape.values(answer, space), []
        gaps = [''] * (len(parts) + 1)                          # before each value, and at the end
        if not self.shape.bare:
            gaps = write_gaps([part[0] for part in parts], space.indent, self.fence)
        write = value_name if self.plain else partial(write_value, indent=space.indent)
        for n, (_, value, log_p, others) in enumerate(parts):
            words = {write(json.loads(word)): p for word, p in others.items()}
            quoted = words and all(word[:1] == word[-1:] == '"' and len(word) > 1 for word in words)
            said = write(value)
            if quoted:
                said, words = said[1:-1], {word[1:-1]: p for word, p in words.items()}
                gaps[n], gaps[n + 1] = gaps[n] + '"', '"' + gaps[n + 1]
            if any(a != b and b.startswith(a) for a in words for b in words):
                said, words = (said + gaps[n + 1][:1],
                               {word + gaps[n + 1][:1]: p for word, p in words.items()})
                gaps[n + 1] = gaps[n + 1][1:]
            pieces += [(gaps[n], 0.0, {}), (said, log_p, words)]
        return [piece for piece in [*pieces, (gaps[-1], 0.0, {})] if piece[0]]


# -----------------------------------------------------------------------------
# formats


def read_format(form, student, *where):
    """the Form that a response_format, or the text.format of a response, asks for; None for plain text."""
    kind = require(form, dict, 'an object', *where, status=400).get('type')
    if kind == 'text':
        return None
    wrapped = form.get('json_schema') if kind == 'json_schema' and 'json_schema' in form else form
    schema = wrapped.get('schema') if isinstance(wrapped, dict) else None
    if kind not in ('json_object', 'json_schema') or kind == 'json_schema' and not isinstance(schema, dict):
        raise Refusal(400, f'{".".join(where)} must be text, json_object, or json_schema with a schema',
                      *where)
    if schema is None:
        return Form(whole_shape(student.space), whole=True)
    require(schema, dict, 'an object', *where, 'schema', status=400)
    return Form(student.shape_of(schema, *where))


def read_choice(options, student, *where):
    """the Form of a reply that is one of some words, as vLLM's guided_choice."""
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise Refusal(400, f'{".".join(where)} must be a list of strings', *where)
    shape = student.shape_of({'enum': options}, *where)
    return Form(shape, plain=True)


def read_json_of(schema, student, *where):
    """the Form of a JSON Schema, which may be written as a string."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise Refusal(400, f'{".".join(where)} is not JSON', *where) from None
    require(schema, dict, 'a JSON Schema', *where, status=400)
    return Form(student.shape_of(schema, *where))


def read_other_formats(body, student):
    """yields (parameter, Form) for each parameter of vLLM, SGLang, llama.cpp and Ollama that sets a form."""
    for key, read in (('guided_json', read_json_of), ('json_schema', read_json_of),
                      ('guided_choice', read_choice)):
        if body.get(key) is not None:
            yield key, read(body[key], student, key)
    if body.get('format') not in (None, '', 'text'):            # Ollama's: 'json', or a schema
        form = body['format']
        yield 'format', (Form(whole_shape(student.space), whole=True) if form == 'json' else
                         read_json_of(form, student, 'format'))
    if body.get('structured_outputs') is not None:              # vLLM's, since 0.11
        inner = require(body['structured_outputs'], dict, 'an object', 'structured_outputs', status=400)
        inner = {key: value for key, value in inner.items() if value not in (None, False)}
        if len(inner) != 1 or not inner.keys() <= {'json', 'choice', 'json_object'}:
            raise Refusal(400, 'structured_outputs: the student honours json, choice and json_object, not '
                          f'{", ".join(map(str, inner))[:80] or "an empty object"}', 'structured_outputs')
        (kind, value), = inner.items()
        yield 'structured_outputs', (
            read_choice(value, student, 'structured_outputs', 'choice') if kind == 'choice' else
            read_json_of(value, student, 'structured_outputs', 'json') if kind == 'json' else
            Form(whole_shape(student.space), whole=True))


# -----------------------------------------------------------------------------
# tools


def read_tools(body, is_response):
    """[(name, parameters, keys that lead to it)] of the functions in tools, or in the older functions. Those
    of a response have no wrapper around them."""
    key = 'tools' if body.get('tools') else 'functions'
    found = []
    for n, tool in enumerate(require(body.get(key) or [], list, 'a list', key, status=400)):
        require(tool, dict, 'an object', key, n, status=400)
        kind = 'function' if key == 'functions' else tool.get('type')
        if kind != 'function':
            raise Refusal(400, f'the student calls functions, not {str(kind)[:40]!r}', key, n, 'type')
        wrapped = key == 'tools' and not is_response
        where = (key, n, 'function') if wrapped else (key, n)
        function = require(tool.get('function') if wrapped else tool, dict, 'an object', *where, status=400)
        name = require(function.get('name'), str, 'a string', *where, 'name', status=400)
        parameters = require(function.get('parameters') or {}, dict, 'an object', *where, 'parameters',
                             status=400)
        found.append((name, parameters, (*where, 'parameters')))
    return found


def describe_tools(body):
    """[(name, description)] of the functions of a body that read_tools has read."""
    functions = [tool.get('function', tool) for tool in body.get('tools') or body['functions']]
    return [(function['name'], function.get('description') or '') for function in functions]


def read_tool_choice(body):
    """'none', 'auto', 'required', or a list with the name of the function that must be called."""
    key = 'tool_choice' if 'tool_choice' in body else 'function_call'
    choice = body.get(key)
    if choice in (None, 'auto', 'none', 'required', 'any'):
        return {None: 'auto', 'any': 'required'}.get(choice, choice)
    choice = require(choice, dict, 'a string or an object', key, status=400)
    function = choice.get('function') if isinstance(choice.get('function'), dict) else choice
    if choice.get('type', 'function') != 'function' or not isinstance(function.get('name'), str):
        raise Refusal(400, f'{key} must be none, auto, required, or name a function', key)
    return [function['name']]


def read_tool_form(body, student, is_response=False):
    """the Form of the tool call that a request asks for; None if it asks for none."""
    tools, choice = read_tools(body, is_response), read_tool_choice(body)
    key = 'tools' if body.get('tools') else 'functions'
    if not tools or choice == 'none':
        return None
    kind, named = 'tool' if key == 'tools' else 'function', isinstance(choice, list)
    if named:
        tools = [tool for tool in tools if tool[0] == choice[0]]
        if not tools:
            raise Refusal(400, f'tool_choice: there is no function {choice[0]!r} in {key}', 'tool_choice')
    if len(tools) == 1:
        (name, parameters, where), = tools
        shape = student.shape_of(parameters, *where)
        return Form(shape, kind, tool=name, named=named, forced=choice != 'auto')
    names, given = [name for name, _, _ in tools], option_parts(student.space.schema)
    if len(given) == 1 and choice == 'required':                # the tools of this call are the options
        known = [{'const': name, 'description': about} for name, about in describe_tools(body)]
        return Form(student.shape_of({'oneOf': known}, key), kind)
    fields = [(leaf, words) for leaf in scalars(student.space.schema).values()
              if len(words := match_options(names, leaf)) == len({*map(loose, names)}) == len(names)]
    if len(fields) != 1:
        raise Refusal(400, f'{key}: the student calls one function, or chooses one of several whose names '
                      f'are values of a field; no single field has {", ".join(names)[:200]}', key)
    (leaf, words), = fields
    if choice != 'required' and len(words) < len(leaf):
        raise Refusal(400, f'tool_choice must be required: the field {leaf.path} has values that are no '
                      'tool, and the student cannot write the message that an assistant would answer then',
                      'tool_choice')
    for name, parameters, where in tools:
        if parameters.get('required'):
            raise Refusal(400, f'the function {name!r} has required parameters; of several tools the student '
                          'can choose one, but not fill in its arguments', *where)
    return Form(Shape((Part('tool', 'field', leaf.path, tuple(sorted(words.items()))),), bare=True), kind)


def refuse_parameters(body, *more):
    """Refusal if a body has one of the parameters that a student cannot follow. more: further ones."""
    for key in (*REFUSED, *more):
        if body.get(key):
            raise Refusal(400, f'{key}: the student cannot follow it; it only answers what it was trained on',
                          key)


def read_form(body, student, turns):
    """the Form of the reply to the body of a chat completion. turns: its Turns. Refusal if the student has no
    such reply."""
    refuse_parameters(body)
    return pick_form(body, student, read_tool_form(body, student), turns, body.get('response_format'),
                     'response_format')


def pick_form(body, student, tool_form, turns, form, *where):
    """the Form of a reply: of the tool call, of the only format, of a JSON Schema in a system message, or of
    the whole answer as the student was trained. form: see read_format; where: keys that lead to it."""
    if tool_form and read_tool_choice(body) != 'auto':          # the reply is no message, so it has no format
        return tool_form
    asked = [('tools', tool_form), *read_other_formats(body, student)]
    asked += [(where[0], read_format(form, student, *where))] if form is not None else []
    asked = [(key, form) for key, form in asked if form]
    if len(asked) > 1:
        keys = [key for key, _ in asked]
        raise Refusal(400, f'{" and ".join(keys)} ask for different forms of the reply; send one of them',
                      keys[-1])
    if not asked or asked[0][1].whole:
        schema, where = find_schema_in_text(turns)
        if schema:
            return Form(student.shape_of(schema, *where))
    return asked[0][1] if asked else Form(whole_shape(student.space), fence=student.space.fence, whole=True)


def find_schema_in_text(turns):
    """(the last JSON Schema of an object in the system messages, keys that lead to it), or (None, ()).
    Clients write it there for servers that know no json_schema."""
    found, left = (None, ()), 200                               # objects that it tries to read
    for turn in turns:
        at = turn.text.find('{') if turn.role == 'system' and '"properties"' in turn.text else -1
        while at >= 0 and left:
            left -= 1
            try:
                part, end = json.JSONDecoder().raw_decode(turn.text, at)
                if isinstance(part, dict) and isinstance(part.get('properties'), dict):
                    found = part, turn.where
            except (ValueError, RecursionError):
                end = at + 1
            at = turn.text.find('{', end)
    return found
