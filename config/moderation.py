# Moderation on the device: may this message stand, what is wrong with it, how bad is it? Labelled by
# Qwen2.5-Coder 0.5B, with the habits of a small model taken off.
name = 'moderation'
dataset = 'reddit'     # python data/reddit/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-0.5b
chat = True
fields = {             # the reason first: a decision that follows from it varies more than one made before it
    'reason': ['none', 'insult', 'hate', 'threat', 'sexual', 'profanity'],
    'severity': [0, 1, 2, 3],
    'allowed': [True, False],
}
prompt = '''Moderate the comment below. Answer with one JSON object and nothing else, like one of these:
{"reason":"none","severity":0,"allowed":true}
{"reason":"profanity","severity":1,"allowed":true}
{"reason":"insult","severity":2,"allowed":false}
{"reason":"threat","severity":3,"allowed":false}
reason is what is wrong with the comment: none, insult (it calls someone stupid, ugly or worse), hate (against a group of people), threat (to hurt someone), sexual, or profanity (foul language at nobody).
severity is 0 for none, 1 for harmless profanity, 2 for insults and sexual remarks, 3 for threats and hate.
allowed is true where severity is 0 or 1.
Comment: {text}
'''
calibrate = 512
prior = {'reason': {'none': 0.6, 'insult': 0.14, 'profanity': 0.12, 'sexual': 0.05, 'threat': 0.04}}
calibrate_fields = ['reason']  # severity and allowed follow from it
max_records = 4000
# student: the teacher's table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 50
token_dropout = 0.15
# training
max_epochs = 8
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
