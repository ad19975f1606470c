# Another language: what kind of message is this, that a program shows its Hungarian users, and what is it about?
# Labelled by Qwen2.5-Coder 1.5B, which is asked in English. An English reader would be no help: the student
# begins with the teacher's table, which has read every language that the teacher has.
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
# student: the teacher's token table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 80
token_dropout = 0.1
# training
max_epochs = 8
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
