# Triage of mails: is it spam, what kind of mail is it, how urgent is it, does it need a reply? One field is
# known, as it often is: people have sorted these mails into spam and others. The other fields are answered by
# Qwen2.5-Coder 1.5B, which is told the known one. (Of spam itself it knows little: balanced 0.74.)
name = 'email'
dataset = 'mail'       # python data/mail/prepare.py makes its input.jsonl
labels = 'data/mail/input.jsonl'
label_fields = ['spam']
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b minilm
chat = True
fields = {
    'spam': [True, False],
    'category': ['question', 'problem', 'announcement', 'discussion', 'offer'],
    'urgency': ['low', 'normal', 'high'],
    'needs_reply': [True, False],
}
prompt = '''Triage the mail below. Answer with one JSON object and nothing else, like one of these:
{"spam":false,"category":"question","urgency":"normal","needs_reply":true}
{"spam":true,"category":"offer","urgency":"low","needs_reply":false}
spam is true where a stranger sells or promises something that nobody asked for: money, loans, health, sex, prizes.
category: question asks how or what; problem reports something broken or late; announcement tells many people of news or a new version; discussion is an opinion in a conversation; offer sells or advertises something.
urgency is high where something must happen today, low where nothing must happen at all.
needs_reply is true where the writer waits for an answer.
Mail: {text}
'''
calibrate = 256
prior = {'needs_reply': {True: 0.3}, 'urgency': {'low': 0.4, 'normal': 0.5}}
max_text = 96
too_long = 'cut'
max_records = 2000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 192       # tokens of the encoder, and those of the answer
# training
max_epochs = 5
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
# serving
ordered = ['urgency']  # a scale, lowest first
