# Chat messages, labelled by Qwen2.5-Coder 0.5B. Small enough for two CPU cores: text to student in minutes.
name = 'demo'
dataset = 'chitchat'   # python data/chitchat/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-0.5b
chat = True            # the teacher follows an instruction
indent = None          # one line and no fence: half the tokens of the reference style
fence = False
fields = {
    'sentiment': ['neutral', 'positive', 'negative'],
    'topic': ['people', 'food', 'school', 'work', 'music', 'movies', 'games', 'animals', 'places', 'other'],
}
prompt = '''Classify the message below. Answer with one JSON object and nothing else, like these two:
{"sentiment":"neutral","topic":"other"}
{"sentiment":"positive","topic":"other"}
sentiment is positive, negative or neutral. A question, a fact or a remark without feeling is neutral. Thanks, praise, joy, love, hope and amusement are positive. Anger, sadness, fear, disgust and disappointment are negative.
topic is what the message is about: people, food, school, work, music, movies, games, animals, places, or other where it is none of these or too short to tell.
Message: {text}
'''
# without calibration the teacher labels almost no message negative, and a third of them food
calibrate = 256
# the texts were selected by words of feeling, so more than a third of them are positive
prior = {'sentiment': {'neutral': 0.3, 'positive': 0.4}, 'topic': {'other': 0.22}}
max_records = 2000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 64        # tokens of the encoder, and 15 of the answer
# training
max_epochs = 6
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
