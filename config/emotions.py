# A list of choices, labelled by people: which of 27 emotions does a comment express? None, one or several. No teacher
# runs; the model named here provides the tokenizer of the answer.
name = 'emotions'
dataset = 'goemotions'  # python data/goemotions/prepare.py train.tsv dev.tsv makes its input.jsonl
labels = 'data/goemotions/input.jsonl'
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-0.5b
fields = {'emotions': {'type': 'array', 'items': {'enum': [
    'admiration', 'amusement', 'anger', 'annoyance', 'approval', 'caring', 'confusion', 'curiosity', 'desire',
    'disappointment', 'disapproval', 'disgust', 'embarrassment', 'excitement', 'fear', 'gratitude', 'grief', 'joy', 'love',
    'nervousness', 'optimism', 'pride', 'realization', 'relief', 'remorse', 'sadness', 'surprise']}}}
max_text = 64          # tokens
too_long = 'cut'
output_vocab = 128     # the tokens of the answer, and few others: nothing else is ever likely
max_records = 10000    # the 5,408 held-out ones and a part of 43,190, for minutes on two cores; 0: all
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 176       # tokens of the encoder, and those of the longest answer
# training: the labels are certain
kl_start = 0.0
kl_end = 0.0
kd_temperature = 1.0
max_epochs = 3
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
