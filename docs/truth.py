"""How often are teachers, students, a word list, a linear model and a general decision model right? Their
sentiment beside that given by people for the same texts. The tables of docs/results.md.

    pip install vaderSentiment sparrow-decider==0.2.0           # a package that is missing is left out
    python docs/truth.py --dataset=tweets --runs=tweets
    python docs/truth.py --dataset=reddit_truth --teachers=reddit_270m --runs=reddit_270m

Measured on the texts of data/<dataset>/input.jsonl that have a truth, that each of the teachers has answered,
and that none of the runs was trained on.
"""
import importlib.util
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, data_line, stop

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from data import Shards
from data.lines import read_texts, text_hash
from distil.agreement import linear_models
from distil.records import load_records
from distil.labeler import Labeler

dataset = 'tweets'     # data/<dataset>/input.jsonl has the texts
runs = ''              # folders in out/, separated by commas: students
teachers = ''          # names of extractions in data/<dataset>, separated by commas
config = configure(globals())

VALUES = 'positive', 'neutral', 'negative'


def load_vader():
    """a function texts -> values: VADER with its own thresholds, the word list that the tweets were rated for
    (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    score = SentimentIntensityAnalyzer().polarity_scores

    def label(text):
        mood = score(text)['compound']
        return 'positive' if mood >= 0.05 else 'negative' if mood <= -0.05 else 'neutral'
    return lambda texts: [label(text) for text in texts]


def load_sparrow():
    """a function texts -> values: a decision model for any question, with one about sentiment (numpy only,
    2 MB)."""
    from sparrow_decider import Decider
    question = {'sentiment': {
        'type': 'choice', 'instructions': 'What is the sentiment of this text?',
        'criteria': {'positive': 'thanks, praise, joy, love, hope or amusement',
                     'neutral': 'a question, a fact or a remark without feeling',
                     'negative': 'anger, sadness, fear, disgust or disappointment'}}}
    decider = Decider.load()
    return lambda texts: [decider.ask(text, question)['sentiment']['choice'] for text in texts]


def answer_by_word_counts(texts, truth, fold, wanted):
    """word counts' answers to the wanted texts, each by a model trained on the truth of the other
    nine folds, and the seconds without the training. texts, truth: N strings; fold (N,) 0 to 9; wanted (N,)
    bool."""
    texts, truth, answers, seconds = np.array(texts, object), np.array(truth), {}, 0.0
    for k in range(10):
        if not len(in_fold := np.flatnonzero(wanted & (fold == k))):
            continue
        model = make_pipeline(linear_models()['words'], LogisticRegression(max_iter=1000))
        model.fit(texts[fold != k], truth[fold != k])
        start = time.perf_counter()
        answers |= dict(zip(in_fold, model.predict(texts[in_fold])))
        seconds += time.perf_counter() - start
    return [answers[n] for n in sorted(answers)], seconds


def print_accuracy(source, answers, truth, rec_s):
    """prints the share of right answers, over all texts and averaged over the values, and the speed."""
    right, truth = np.array(answers) == truth, np.array(truth)
    balanced = float(np.mean([right[truth == value].mean() for value in VALUES]))
    print(data_line('truth', {'who': source, 'records': len(right), 'right': float(right.mean()),
                              'balanced': balanced, 'rec_s': rec_s}), flush=True)


if __name__ == '__main__':
    path = Path('data', dataset, 'input.jsonl')
    if not path.is_file():
        stop(f'{path} does not exist; run: python data/{dataset}/prepare.py')
    known = {}
    for text, truth, _ in read_texts(path, 'truth'):
        if isinstance(truth, dict) and truth.get('sentiment') in VALUES:
            known[text_hash(text)] = text, truth['sentiment']
    if not known:
        stop(f'no text of {path} has a true sentiment; add "truth": {{"sentiment": ...}} to its lines')
    hashes = np.array(list(known), np.uint64)
    texts, truth = zip(*known.values())
    wanted, extractions, students = np.ones(len(texts), bool), {}, []
    for name in filter(None, teachers.split(',')):
        shards = Shards(dataset, name)
        space = shards.open_space()
        extractions[name] = shards, space, dict(zip(shards.hashes.tolist(), range(len(shards))))
        wanted &= np.isin(hashes, shards.hashes)
    for run in filter(None, runs.split(',')):
        labeler = Labeler(Path('out', run), 'cpu', confidence=False)
        task = labeler.checkpoint['config']
        records = load_records(task['dataset'], task['name'], labeler.checkpoint)
        if not records:
            stop(f'out/{run}: its records are not here, so nobody knows which texts it was trained on')
        wanted &= ~np.isin(hashes, records.hashes[records.split()[0]])
        students.append((run, labeler))
    chosen = np.flatnonzero(wanted)
    if not len(chosen):
        stop('every text was trained on, or lacks the answer of a teacher; choose other --runs or --teachers')
    test_texts, test_truth = [texts[n] for n in chosen], np.array([truth[n] for n in chosen])
    for value in VALUES:
        print(data_line('truth', {'value': value, 'share': f'{np.mean(test_truth == value):.3f}'}))

    for package, make in (('vaderSentiment', load_vader), ('sparrow_decider', load_sparrow)):
        if importlib.util.find_spec(package):
            answer = make()
            answer(test_texts[:20])                             # warm
            start = time.perf_counter()
            answers = answer(test_texts)
            print_accuracy(package, answers, test_truth, len(test_texts) / (time.perf_counter() - start))
    if importlib.util.find_spec('sklearn'):
        answers, seconds = answer_by_word_counts(texts, truth, hashes % 10, wanted)
        print_accuracy('linear_on_truth', answers, test_truth, len(test_texts) / seconds)
    for name, (shards, space, number) in extractions.items():
        answers = [space.to_json(shards.outs(number[int(hashes[n])]))['sentiment'] for n in chosen]
        timed = shards.meta['timed']
        print_accuracy(f'teacher_{name}', answers, test_truth, timed['records'] / timed['seconds'])
    for run, labeler in students:
        labeler(test_texts[:200])                               # warm
        start = time.perf_counter()
        answers = [record['sentiment'] for record in labeler(test_texts)]
        print_accuracy(f'student_{run}', answers, test_truth, len(test_texts) / (time.perf_counter() - start))
