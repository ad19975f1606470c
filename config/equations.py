# A teacher that thinks before it answers: 6x + 17 = 131. Asked for the answer alone, Qwen2.5-Coder 1.5B is right in
# 0.23 of 128 equations; if it may write its steps first, in all of 384. The steps are left out: they are not stored, and
# the student learns the conclusion. Two cores label three equations in two seconds.
from config import write_examples

name = 'equations'
dataset = 'equations'  # python data/equations/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b
chat = True
fields = {'steps': {'type': 'string'}, 'ax': list(range(1, 201)), 'x': list(range(1, 51))}
left_out = ['steps']
free_tokens = 60
_example = '3x + 4 = 19', '3x + 4 = 19, so 3x = 19 - 4 = 15, so x = 15 / 3 = 5', 15, 5
prompt = ('Solve the equation. Answer with one JSON object and nothing else.\n'
          + write_examples('Equation: {}\n{}\n', fields, [_example]) + 'Equation: {text}\n')
output_vocab = 64      # digits, signs and the rest of the answer
max_records = 3000
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
max_epochs = 60
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-5
eval_records = 0       # 0: all held-out records
