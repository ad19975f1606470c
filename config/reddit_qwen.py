# The benchmark: the reference fields on Reddit comments, labelled by Qwen2.5-Coder 1.5B, a chat model that
# follows an instruction.
#     python data/teachers/prepare.py qwen2.5-coder-1.5b
#     python data/reddit/prepare.py
name = 'reddit_qwen'
dataset = 'reddit'
teacher = 'data/teachers/qwen2.5-coder-1.5b.gguf'
chat = True
indent = None          # one line: half the tokens of the reference style, and labels as good
fence = False
fields = {
    'tone': ['neutral', 'friendly', 'aggressive', 'sarcastic'],
    'sentiment': ['neutral', 'positive', 'negative'],
    'safety': ['safe', 'harmful'],
    'toxicity': ['respectful', 'toxic'],
}
prompt = '''Classify the Reddit comment below. Answer with one JSON object and nothing else:
{"tone":"neutral"|"friendly"|"aggressive"|"sarcastic","sentiment":"neutral"|"positive"|"negative","safety":"safe"|"harmful","toxicity":"respectful"|"toxic"}
Comment: {text}
'''
# sentiment is right as it is, calibrated it gets worse; safety and toxicity would nearly always be the same
calibrate = 512
calibrate_fields = ['safety', 'toxicity']
prior = {'safety': {'harmful': 0.15}, 'toxicity': {'toxic': 0.2}}
max_records = 6000
# student: the teacher's table, frozen, and four small layers of its own
init_from = 'teacher'
teacher_layers = 'none'
n_layer = 4
n_head = 4
n_embd = 192
n_mlp = 768
block_size = 60
token_dropout = 0.15
# training
max_epochs = 6
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
