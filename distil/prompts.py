"""The prompt as chat messages, and the request that holds an LLM server to the schema."""


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


def answer_format(schema):
    """the response_format of the OpenAI API that allows answers of a Schema and nothing else."""
    return {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': schema.json_schema(), 'strict': True}}
