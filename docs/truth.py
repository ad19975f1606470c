"""Who is right? Teachers, students, a word list, a linear model and a general decision model, beside what
people said of the same texts' sentiment. The tables of docs/results.md.

    pip install vaderSentiment sparrow-decider==0.2.0           # those that are missing are left out
    python docs/truth.py --dataset=tweets --runs=tweets
    python docs/truth.py --dataset=reddit_truth --teachers=reddit_270m --runs=reddit_270m

Measured on the texts of data/<dataset>/input.jsonl that carry the truth, that each of the teachers has
answered, and that none of the runs was trained on.
"""
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
from config import configure, data_line, stop
from data import Shards, held_out, read_texts, text_hash
from distil.agreement import linear_model
from distil.space import OutputSpace
from sample import Labeler

dataset = 'tweets'     # data/<dataset>/input.jsonl has the texts
runs = ''              # folders in out/, parted by commas: students
teachers = ''          # names of extractions in data/<dataset>, parted by commas
config = configure(globals())

VALUES = 'positive', 'neutral', 'negative'


def by_vader():
    """the word list that the tweets were rated for; Hutto and Gilbert 2014. Its own thresholds."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    score = SentimentIntensityAnalyzer().polarity_scores

    def label(text):
        mood = score(text)['compound']
        return 'positive' if mood >= 0.05 else 'negative' if mood <= -0.05 else 'neutral'
    return lambda texts: [label(text) for text in texts]


def by_sparrow():
    """a decision model that answers any question put to it, asked this one; numpy only, 2 MB."""
    from sparrow_decider import Decider
    question = {'sentiment': {
        'type': 'choice', 'instructions': 'What is the sentiment of this text?',
        'criteria': {'positive': 'thanks, praise, joy, love, hope or amusement',
                     'neutral': 'a question, a fact or a remark without feeling',
                     'negative': 'anger, sadness, fear, disgust or disappointment'}}}
    decider = Decider.load()
    return lambda texts: [decider.ask(text, question)['sentiment']['choice'] for text in texts]


def linear_answers(texts, truth, fold, wanted):
    """answers of word counts to the wanted texts, each by a model trained on the truth of the other nine
    folds; and the seconds that took without the training."""
    texts, truth, answers, seconds = np.array(texts, object), np.array(truth), {}, 0.0
    for k in range(10):
        if not len(mine := np.flatnonzero(wanted & (fold == k))):
            continue
        model = linear_model().fit(texts[fold != k], truth[fold != k])
        start = time.perf_counter()
        answers |= dict(zip(mine, model.predict(texts[mine])))
        seconds += time.perf_counter() - start
    return [answers[n] for n in sorted(answers)], seconds


def show(who, answers, truth, rec_s):
    """prints how often the answers are right, in all and on average over the values, and how fast."""
    right, truth = np.array(answers) == truth, np.array(truth)
    balanced = float(np.mean([right[truth == value].mean() for value in VALUES]))
    print(data_line('truth', {'who': who, 'records': len(right), 'right': float(right.mean()),
                              'balanced': balanced, 'rec_s': rec_s}), flush=True)


if __name__ == '__main__':
    source = Path('data', dataset, 'input.jsonl')
    if not source.is_file():
        stop(f'{source} does not exist; run: python data/{dataset}/prepare.py')
    known = {}
    for text, truth, _ in read_texts(source, 'truth'):
        if isinstance(truth, dict) and truth.get('sentiment') in VALUES:
            known[text_hash(text)] = text, truth['sentiment']
    if not known:
        stop(f'no text of {source} carries the truth of its sentiment')
    hashes = np.array(list(known), np.uint64)
    texts, truth = zip(*known.values())
    wanted, said, students = np.ones(len(texts), bool), {}, []
    for name in filter(None, teachers.split(',')):
        shards = Shards(dataset, name)
        space = OutputSpace.from_task(Tokenizer.from_file(str(shards.folder / 'tokenizer.json')), shards.meta)
        said[name] = shards, space, dict(zip(shards.hashes.tolist(), range(len(shards))))
        wanted &= np.isin(hashes, shards.hashes)
    for run in filter(None, runs.split(',')):
        labeler = Labeler(Path('out', run), 'cpu', confidence=False)
        task = labeler.checkpoint['config']
        trained = Shards(task['dataset'], task['name']).hashes
        wanted &= ~np.isin(hashes, trained[~held_out(trained)])
        students.append((run, labeler))
    some = np.flatnonzero(wanted)
    if not len(some):
        stop('no text is left that all of them can be measured on')
    asked, due = [texts[n] for n in some], np.array([truth[n] for n in some])
    for value in VALUES:
        print(f'truth value={value} share={np.mean(due == value):.3f}')

    for package, make in (('vaderSentiment', by_vader), ('sparrow_decider', by_sparrow)):
        if importlib.util.find_spec(package):
            answer = make()
            answer(asked[:20])                                  # warm
            start = time.perf_counter()
            answers = answer(asked)
            show(package, answers, due, len(asked) / (time.perf_counter() - start))
    if importlib.util.find_spec('sklearn'):
        answers, seconds = linear_answers(texts, truth, hashes % 10, wanted)
        show('linear_on_truth', answers, due, len(asked) / seconds)
    for name, (shards, space, number) in said.items():
        answers = [space.to_json(shards.answer(number[int(hashes[n])]).tolist())['sentiment'] for n in some]
        timed = shards.meta['timed']
        show(f'teacher_{name}', answers, due, timed['records'] / timed['seconds'])
    for run, labeler in students:
        labeler(asked[:200])                                    # warm
        start = time.perf_counter()
        answers = [record['sentiment'] for record in labeler(asked)]
        show(f'student_{run}', answers, due, len(asked) / (time.perf_counter() - start))
