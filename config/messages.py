# Another language: what kind of message is this, that a program shows its Hungarian users, and what is it about?
# Labelled by Qwen2.5-Coder 1.5B, which is asked in English. The reader knows a hundred languages; its table is cut to the
# tokens of this one (docs/students.md).
name = 'messages'
dataset = 'messages'   # python data/messages/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b
chat = True
fields = {
    'kind': ['error', 'success', 'question', 'instruction', 'description'],
    'about': ['account', 'money', 'document', 'translation', 'website', 'system'],
}
prompt = '''Classify the Hungarian message of a computer program below. Answer with one JSON object and nothing else, like one of these:
{"kind":"error","about":"account"}
{"kind":"description","about":"system"}
kind: error says that something is wrong, missing or not allowed; success says that something was done; question asks the user for a decision; instruction tells the user to do something; description says what something is or does.
about: account for users, passwords and permissions; money for orders, tickets and payments; document for files, pages and images; translation for languages and texts to translate; website for addresses, links and mails; system for all other settings.
Message: {text}
'''
calibrate = 256
max_text = 64
max_records = 2500
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/e5'  # python data/teachers/prepare.py e5
reader_tokens = 24576
reader_lr = 0.05
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 160       # tokens of the encoder, and those of the answer
# training
max_epochs = 8
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
