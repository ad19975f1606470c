"""The prompt as chat messages, and the request that holds an LLM server to the schema."""
from distil.options import find_options


def prompt_messages(prompt, text='{text}'):
    """the chat messages of a prompt with a text in place of {text}, and nothing in place of {*}: what differed there
    in a log (data/templates.py) is not known. prompt: a text, which is the user's message, or a list of
    {'role': ..., 'content': ...}."""
    fill = lambda content: content.replace('{*}', '').replace('{text}', text)
    return [message | {'content': fill(message['content'])} for message in as_messages(prompt)]


def as_messages(prompt):
    """a prompt as a list of messages."""
    return [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt


def prompt_text(prompt):
    """all of a prompt as one text: its messages, one below the other."""
    return '\n'.join(message['content'] for message in as_messages(prompt))


def offer(part, text, keys=()):
    """a JSON Schema, or a request that holds one, in which the options of a text are listed where one of them is the
    answer (options.py). keys: of the properties that lead to the part."""
    if isinstance(part, list):
        return [offer(inner, text, keys) for inner in part]
    if not isinstance(part, dict):
        return part
    if part.get('x-options') is True:
        values = [value for *_, value in find_options(text, '.'.join(keys))]
        enum = {'enum': [*values, *[None] * ('null' in (part.get('type') or ()))]} if values else {}
        return {key: value for key, value in part.items() if key != 'x-options'} | enum
    inside = {name: offer(inner, text, (*keys, name)) for name, inner in (part.get('properties') or {}).items()}
    return {key: inside if key == 'properties' else offer(inner, text, keys) for key, inner in part.items()}


def answer_format(schema):
    """the response_format of the OpenAI API that allows answers of a Schema and nothing else."""
    return {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': schema.json_schema(), 'strict': True}}
