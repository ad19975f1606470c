"""What the four scripts are made of, in the order data flows:

schema.py          a task's schema: what a field is, and how an answer is written
automaton.py       which token of an answer may come next
space.py           a schema as an automaton over tokens, and the output vocabulary
prompts.py         a prompt as chat messages, a schema as a request
teacher.py         model and tokenizer of the teacher, its prompt, a slow check of what is stored
engine.py          the teacher asked about many texts at a time
calibrate.py       the teacher's bias, measured and subtracted
labels.py          labels that exist already, in place of a teacher
shares.py          probabilities of values as logits of tokens
server.py          a teacher behind a URL
keys.py            the keys of servers, read and kept out of sight
replies.py         what a reply of such a server is: an answer, a refusal, a reason to wait
answers.py         what it answers, as probabilities of values
extraction.py      settings, shard and totals of extract.py
teacher_report.py  is this teacher worth copying?
start.py           a student at the start of its training
encoder.py         the pre-trained encoder that reads the text for a student: BERT or MPNet
reader.py          loading it, its tokens
trim.py            a smaller table for one of many languages
split.py           which records are held out: those that people name, or a tenth
records.py         the records a student is trained on, opened and checked
decode.py          greedy decoding of the student, many texts at a time
confidence.py      how sure it is: of its values, of all values, of places of the text
labeler.py         a student as a function from texts to records
cascade.py         the teacher that answers what the student is not sure of
checkpoint.py      the file of a student
resume.py          a training under way, and how it continues
agreement.py       agreement, truth, baselines, reliability of confidence
report.py          the picture of a training
"""
