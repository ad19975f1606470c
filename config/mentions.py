# What a request says: what it is about, who and what is named in it, when, and a number; read out of the text by
# Qwen2.5-Coder 1.5B. The values of names, when and number are copied from the request (docs/schema.md).
from config import write_examples

name = 'mentions'
dataset = 'snips'      # python data/snips/prepare.py 2017-06-custom-intent-engines makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b minilm
chat = True
fields = {
    'about': ['music', 'restaurant', 'weather', 'book', 'film'],
    'names': {'type': 'array', 'maxItems': 3, 'items': {'type': 'string'}},
    'when': {'type': ['string', 'null']},
    'number': {'type': ['number', 'null']},
}
_examples = [
    ('Book a table for 6 at Mario\'s Diner in Lyon next Friday', 'restaurant', ["Mario's Diner", 'Lyon'], 'next Friday', 6),
    ('Is it going to rain?', 'weather', [], None, None),
    ('play some Miles Davis from 1959', 'music', ['Miles Davis'], '1959', None),
    ('I give The Old Man and the Sea 4 of 5 stars', 'book', ['The Old Man and the Sea'], None, 4),
    ('when is Blade Runner on at the Odeon tonight', 'film', ['Blade Runner', 'Odeon'], 'tonight', None),
]
prompt = '''Say what the request below is about and what it says. Answer with one JSON object and nothing else.
names: the names of people, places, songs, books, films, restaurants in it, word for word; when: the words that say a time; number: how many people, or how many stars; null where there is none.
Examples:
''' + write_examples('Request: {}\n{}\n', fields, _examples) + '''Now this one.
Request: {text}
'''
max_text = 48
max_records = 2000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 128
# training
max_epochs = 8
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
