# Chat messages, labelled by Qwen2.5-Coder 0.5B. Small enough for two CPU cores: text to student in minutes.
from config import write_examples

name = 'demo'
dataset = 'chitchat'   # python data/chitchat/prepare.py makes its input.jsonl
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-0.5b
chat = True            # the teacher follows an instruction
indent = None          # one line and no fence: half the tokens of the reference style
fence = False
fields = {
    'sentiment': ['neutral', 'positive', 'negative'],
    'topic': ['people', 'food', 'school', 'music', 'movies', 'animals', 'places', 'other'],
}
_examples = [          # without examples this teacher calls thanks neutral, and what was great, food
    ('Thank you so much, you too!', 'positive', 'other'),
    ('My cat ate my pizza and I hate it', 'negative', 'animals'),
    ('it was great', 'positive', 'other'),
    ('Have you been to Italy?', 'neutral', 'places'),
    ('that soup was amazing', 'positive', 'food'),
    ('you are fake and rude', 'negative', 'people'),
    ('Do you have homework today?', 'neutral', 'school'),
    ('I really do not know', 'neutral', 'other'),
    ('I lost my job, it is awful', 'negative', 'other'),
    ('I love this song!', 'positive', 'music'),
    ('Is the last Batman any good?', 'neutral', 'movies'),
    ('I got a high score in Mario Kart', 'positive', 'other'),
    ('Painting is so much fun, I want to learn it', 'positive', 'other'),
    ('I broke my arm last week', 'negative', 'other'),
    ('He told her a joke and she laughed', 'positive', 'people'),
    ('Do you have a car?', 'neutral', 'other'),
]
prompt = '''Classify the message below. Answer with one JSON object and nothing else.
sentiment is positive for thanks, praise, joy, love, hope and amusement; negative for anger, sadness, fear, disgust and disappointment; neutral for a question, a fact or a remark without feeling.
topic is what the message is about: people, food, school, music, movies, animals, places, or other where it is none of these or too short to tell.
Examples:
''' + write_examples('Message: {}\n{}\n', fields, _examples) + '''Now this one.
Message: {text}
'''
# without calibration the teacher knows no animals, and a third of the messages are about people or places
calibrate = 256
# guesses, made after reading a hundred messages: most are cheerful, and about nothing in this list
prior = {'sentiment': {'positive': 0.47, 'neutral': 0.27},
         'topic': {'other': 0.5, 'people': 0.1, 'food': 0.1, 'places': 0.08}}
max_records = 2000
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 64        # tokens of the encoder, and 15 of the answer
# training
max_epochs = 4
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
