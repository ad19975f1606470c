# Moderation on the device: is this message allowed, and what is wrong with it? Labelled by Qwen2.5-Coder
# 1.5B; the 0.5B model finds nothing wrong in any message.
from config import write_examples

name = 'moderation'
dataset = 'reddit'     # python data/reddit/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b
chat = True
fields = {             # the reason first: the decision that follows from it is better
    'reason': ['none', 'insult', 'hate', 'threat', 'sexual', 'profanity'],
    'allowed': [True, False],
}
_examples = [          # without examples this teacher calls two comments in five an insult
    ('I hope you get well soon', 'none', True),
    ('You are an idiot and nobody likes you', 'insult', False),
    ('This movie was terrible, what a waste of money', 'none', True),
    ('Holy shit, that goal was amazing', 'profanity', True),
    ('Those people are vermin, send them all back', 'hate', False),
    ('I will find you and break your legs', 'threat', False),
    ('I am so sad, my dog died', 'none', True),
    ('She has huge tits, I want to see her naked', 'sexual', False),
    ('The government lies to us every day', 'none', True),
    ('Shut up, you fat loser', 'insult', False),
    ('Damn, I missed the bus again', 'profanity', True),
    ('I do not agree with you at all', 'none', True),
]
prompt = '''Moderate the comment below. Answer with one JSON object and nothing else.
reason: insult calls someone stupid, ugly or worse; hate is against a group of people; threat is to hurt someone; sexual speaks of sex or bodies; profanity is foul language at nobody; none is all else, also where a comment is sad, critical or angry about a thing.
allowed: true for none and for profanity, else false.
Examples:
''' + write_examples('Comment: {}\n{}\n', fields, _examples) + '''Now this one.
Comment: {text}
'''
calibrate = 256
# the prior is a guess, made after reading two hundred comments
calibrate_fields = ['reason']  # `allowed` follows from it
prior = {'reason': {'none': 0.8, 'insult': 0.07, 'profanity': 0.05}}
max_records = 3000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 80        # tokens of the encoder, and those of the answer
# training
max_epochs = 4
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
