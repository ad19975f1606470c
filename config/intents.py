# Options that come with each call: up to fifty intents of CLINC150, of which one is right, named by their words. Learned
# from people's labels; 30 of the 150 intents are never seen. No teacher runs; the model named here provides the
# tokenizer of the answer.
name = 'intents'
dataset = 'intents'    # python data/intents/prepare.py makes its input.jsonl
labels = 'data/intents/input.jsonl'
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-0.5b
fields = {'intent': {'type': 'string', 'x-options': True}}
max_text = 700         # tokens, of the text and its options
# student: a pre-trained encoder reads text and options, one layer points at one of them
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 704       # tokens of the encoder, and those of the answer
# training
kd_temperature = 1.0
max_epochs = 3
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
eval_records = 0       # 0: all held-out records
