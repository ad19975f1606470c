# A small, fast student for any task that a config describes; typed after that config:
#     python train.py config/demo.py config/small.py --run=small
# It reads with the teacher's token table, frozen, and four small layers of 1 M parameters: three times as many
# texts a second as one with a pre-trained encoder, and it agrees less with its teacher (docs/students.md).
reader = ''
init_from = 'teacher'
n_layer = 4
n_head = 4
n_embd = 128
n_mlp = 512
block_size = 110
token_dropout = 0.15
max_epochs = 14
