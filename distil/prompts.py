"""The prompt as chat messages, and the request that holds an LLM server to the schema."""


def prompt_messages(prompt, text='{text}'):
    """the chat messages of a prompt with a text in place of {text}. prompt: a text, which is the user's
    message, or a list of {'role': ..., 'content': ...}."""
    messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    return [message | {'content': message['content'].replace('{text}', text)} for message in messages]


def prompt_text(prompt):
    """all of a prompt as one text: its messages, one below the other."""
    return '\n'.join(message['content'] for message in prompt_messages(prompt))


def answer_format(fields):
    """the response_format of the OpenAI API that allows answers of the schema and nothing else. fields: {name:
    values}."""
    schema = {'type': 'object', 'properties': {name: {'enum': values} for name, values in fields.items()},
              'required': list(fields), 'additionalProperties': False}
    return {'type': 'json_schema', 'json_schema': {'name': 'answer', 'schema': schema, 'strict': True}}
