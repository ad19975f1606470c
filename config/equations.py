# A teacher that thinks before it answers: 6x + 7 = 55. Asked for the answer alone, Qwen2.5-Coder 1.5B is right in 0.23
# of 128 equations (with numbers up to 20); if it may write its steps first, in all. The steps are left out: they are
# not stored, and the student learns the conclusion. Labels are slow: without AVX-512 or a GPU, seconds each.
from config import write_examples

name = 'equations'
dataset = 'equations'  # python data/equations/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b
chat = True
fields = {'steps': {'type': 'string'}, 'ax': list(range(1, 101)), 'x': list(range(1, 21))}
left_out = ['steps']
free_tokens = 60
_example = '3x + 4 = 19', '3x = 19 - 4 = 15, x = 15 / 3 = 5', 15, 5
prompt = ('Solve the equation. Answer with one JSON object and nothing else.\n'
          + write_examples('Equation: {}\n{}\n', fields, [_example]) + 'Equation: {text}\n')
output_vocab = 64      # digits, signs and the rest of the answer
# student: four small layers, and a token table of its own: it has to know digits, no words
n_layer = 4
n_head = 4
n_embd = 128
n_mlp = 512
block_size = 48
# training
kl_start = 0.0         # the labels are nearly certain
kl_end = 0.0
kd_temperature = 1.0
max_epochs = 110       # few labels: long, with a strong decay
batch_size = 32
learning_rate = 2e-3
min_lr = 1e-5
weight_decay = 1.0
eval_records = 0       # 0: all held-out records
