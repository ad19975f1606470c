# A nested answer: what a mail is about, what is to be done, and who wrote it in which mood. Labelled by Qwen2.5-Coder
# 1.5B. The fields are JSON Schema, as pydantic's model_json_schema() writes it.
import json

name = 'inbox'
dataset = 'mail'       # python data/mail/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-1.5b minilm
chat = True
_of = lambda **properties: {'type': 'object', 'properties': properties, 'required': list(properties)}
fields = _of(
    kind={'enum': ['question', 'problem', 'announcement', 'discussion', 'offer']},
    topics={'type': 'array', 'maxItems': 3, 'items': {'enum': [
        'software', 'hardware', 'network', 'security', 'money', 'health', 'politics', 'science', 'family', 'jobs']}},
    action=_of(needed={'type': 'boolean'}, urgency={'enum': ['low', 'normal', 'high']}),
    sender=_of(role={'enum': ['person', 'company', 'list']}, mood={'enum': ['calm', 'happy', 'angry', None]}),
)
_answers = [('How do I mount a second disk? The kernel says it finds none. Thanks for any hint.',
             'question', ['software', 'hardware'], True, 'normal', 'person', 'calm'),
            ('Lose weight now! Our pills work while you sleep. Order today and save $50.',
             'offer', ['money', 'health'], False, 'low', 'company', None),
            ('The mail server is down again and nobody answers the phone. Fix it today.',
             'problem', ['network'], True, 'high', 'person', 'angry'),
            ('I went to see my sister last weekend. We laughed a lot.',
             'discussion', ['family'], False, 'low', 'person', 'happy')]
_shown = ''.join('Mail: {}\n{}\n'.format(text, json.dumps({
    'kind': kind, 'topics': topics, 'action': {'needed': needed, 'urgency': urgency},
    'sender': {'role': role, 'mood': mood}}, separators=(',', ':')))
    for text, kind, topics, needed, urgency, role, mood in _answers)
prompt = '''Sort the mail below. Answer with one JSON object and nothing else.
topics: up to three of software, hardware, network, security, money, health, politics, science, family, jobs; none if it is about something else.
action.needed is true where the reader has to do or answer something. sender.mood is null where no person wrote.
Examples:
''' + _shown + '''Now this one.
Mail: {text}
'''
calibrate = 256
calibrate_fields = ['kind', 'action.needed', 'action.urgency', 'sender.mood']
prior = {'action.needed': {True: 0.3}, 'action.urgency': {'low': 0.4, 'normal': 0.5},
         'sender.mood': {'calm': 0.6, None: 0.15}, 'kind': {'discussion': 0.3}}
max_text = 96
too_long = 'cut'
max_records = 1024
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
