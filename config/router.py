# An agent's decision point: which tool answers this question? Labelled by Qwen2.5-Coder 1.5B. (The 0.5B model
# takes the weather for a place.)
from config import write_examples

name = 'router'
dataset = 'questions'  # python data/questions/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b
chat = True
fields = {
    'tool': ['weather', 'calendar', 'music', 'movies', 'recipes', 'travel', 'search', 'none'],
}
_examples = [          # without examples this teacher chooses search for three questions in four
    ('Will it snow this weekend?', 'weather'),
    ('When is your birthday?', 'calendar'),
    ('Who sings that song?', 'music'),
    ('Did you see the last Star Wars?', 'movies'),
    ('How do you make pancakes?', 'recipes'),
    ('Have you ever been to Paris?', 'travel'),
    ('How tall is Mount Everest?', 'search'),
    ('How are you?', 'none'),
    ('What are you doing tonight?', 'calendar'),
    ('Do you like living in Utah?', 'travel'),
    ('What is your favorite food?', 'recipes'),
    ('Is it hot where you are?', 'weather'),
    ('Do you have any pets?', 'none'),
    ('Who invented the telephone?', 'search'),
    ('Do you play the piano?', 'music'),
    ('Why do you say that?', 'none'),
]
prompt = '''Route the question below to a tool. Answer with one JSON object and nothing else.
tool: weather for rain, sun and heat; calendar for dates, plans and appointments; music for songs, bands and instruments; movies for films and shows; recipes for food and cooking; travel for places, trips and flights; search for facts about the world; none for small talk about oneself, such as how are you.
Examples:
''' + write_examples('Question: {}\n{}\n', fields, _examples) + '''Now this one.
Question: {text}
'''
calibrate = 256
prior = {'tool': {'none': 0.6, 'search': 0.08}}
max_records = 4000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 64        # tokens of the encoder, and those of the answer
# training
max_epochs = 4
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
