# Moderation on the device: is this message allowed, and what is wrong with it? Labelled by Qwen2.5-Coder
# 1.5B; the 0.5B model finds nothing wrong in any message.
name = 'moderation'
dataset = 'reddit'     # python data/reddit/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b
chat = True
fields = {             # the reason first: the decision that follows from it is better
    'reason': ['none', 'insult', 'hate', 'threat', 'sexual', 'profanity'],
    'allowed': [True, False],
}
prompt = '''Moderate the comment below. Answer with one JSON object and nothing else, like one of these:
{"reason":"none","allowed":true}
{"reason":"profanity","allowed":true}
{"reason":"insult","allowed":false}
reason: insult calls someone stupid, ugly or worse; hate is against a group of people; threat is to hurt someone; sexual speaks of sex or bodies; profanity is foul language at nobody; none is all else, also where a comment is sad, critical or angry about a thing.
allowed: true for none and for profanity, else false.
Comment: {text}
'''
calibrate = 256
# without calibration the teacher labels two comments in three as insults. The prior is a guess, made after
# reading a hundred comments
calibrate_fields = ['reason']  # `allowed` follows from it
prior = {'reason': {'none': 0.6, 'insult': 0.15, 'profanity': 0.1, 'sexual': 0.05, 'threat': 0.05}}
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
