# Tiny equations: 3x + 4 = 19 -> {"ax":15,"x":5}. No teacher runs: a solver is right, and Qwen2.5-Coder 1.5B in six
# of ten. The model named here provides the tokenizer of the answer. A field that is worked out on the way, ax,
# comes before the one that is wanted: the student writes down one step and then the next.
name = 'math'
dataset = 'math'       # python data/math/prepare.py makes its input.jsonl
labels = 'data/math/input.jsonl'
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-0.5b
fields = {'ax': list(range(-495, 496)), 'x': list(range(-99, 100))}
output_vocab = 64      # digits, signs and the rest of the answer; nothing else is ever likely
# student: four small layers, and a token table of its own: it has to know digits, no words
n_layer = 4
n_head = 4
n_embd = 128
n_mlp = 512
block_size = 40
# training: the labels are certain, so there are no probabilities to learn, and the cross-entropy is enough
kl_start = 0.0
kl_end = 0.0
kd_temperature = 1.0
max_epochs = 8
batch_size = 64
learning_rate = 1e-3
min_lr = 1e-5
eval_records = 0       # 0: all held-out records
