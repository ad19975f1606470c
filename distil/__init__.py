"""What the four scripts are made of, in the order data flows:

space.py           a schema as an automaton over tokens
prompts.py         a prompt as chat messages, a schema as a request
teacher.py         model and tokenizer of the teacher, its prompt, a slow check of what is stored
engine.py          the teacher asked about many texts at a time
calibrate.py       the teacher's bias, measured and subtracted
labels.py          labels that exist already, in place of a teacher
server.py          a teacher behind a URL
answers.py         what it answers, as probabilities of values
extraction.py      settings, shard and totals of extract.py
teacher_report.py  is this teacher worth copying?
start.py           a student at the start of its training, with parts of a teacher
reader.py          a pre-trained encoder that reads the text for the student
split.py           which records are held out: those that people name, or a tenth
records.py         the records a student is trained on, opened and checked
decode.py          greedy decoding of the student, and its confidence
cascade.py         the teacher that answers what the student is not sure of
checkpoint.py      the file of a student
resume.py          a training under way, and how it continues
agreement.py       agreement, truth, baselines, calibration of confidence
report.py          the picture of a training
"""
