# The benchmark: the reference fields on Reddit comments, labelled by Qwen2.5-Coder 1.5B, a chat model that
# follows an instruction. First run:
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
# Each field is explained. Sentiment comes after tone: as the first field it was right in 0.57 to 0.63 of the
# comments, after tone in 0.66.
prompt = '''Classify the Reddit comment below. Answer with one JSON object and nothing else:
{"tone":"neutral"|"friendly"|"aggressive"|"sarcastic","sentiment":"neutral"|"positive"|"negative","safety":"safe"|"harmful","toxicity":"respectful"|"toxic"}
tone: neutral is plain talk, friendly is kind, thankful or praising, aggressive attacks or insults, sarcastic mocks by saying the opposite.
sentiment: a question, a fact or a remark without feeling is neutral. Thanks, praise, joy, love, hope and amusement are positive. Anger, sadness, fear, disgust and disappointment are negative.
safety: threats, hate and calls to hurt someone are harmful.
toxicity: insults, contempt and foul language against people are toxic.
Comment: {text}
'''
# without calibration the teacher finds feeling where people find none, and little harm. The prior of
# sentiment is about the share that people gave in GoEmotions. The priors of safety and toxicity leave the
# student something to learn. If tone is calibrated too, sentiment is right in 0.63, not in 0.66
calibrate = 512        # with 256, sentiment was right in 0.65 to 0.66, depending on which texts were drawn
calibrate_fields = ['sentiment', 'safety', 'toxicity']
prior = {'sentiment': {'negative': 0.28}, 'safety': {'harmful': 0.3}, 'toxicity': {'toxic': 0.3}}
max_records = 6000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 96        # tokens of the encoder, and those of the answer
# training
max_epochs = 4
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
# serving
true_value = {'safety': 'harmful', 'toxicity': 'toxic'}  # the value that means yes
