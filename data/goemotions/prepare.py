"""Reddit comments and the emotions that people saw in them, from the published files of GoEmotions ->
data/goemotions/input.jsonl

    python data/goemotions/prepare.py train.tsv dev.tsv         # the files of the paper, or those that end in .tsv

A line is a text, the numbers of its emotions with commas between them, and an id. Neutral is the empty list. Texts of
a file whose name begins with dev or test are held out. (Demszky et al. 2020, https://arxiv.org/abs/2005.00547;
CC BY 4.0; https://github.com/google-research/google-research/tree/master/goemotions/data)
"""
import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

EMOTIONS = ('admiration amusement anger annoyance approval caring confusion curiosity desire disappointment '
            'disapproval disgust embarrassment excitement fear gratitude grief joy love nervousness optimism '
            'pride realization relief remorse sadness surprise').split()  # 0 to 26; 27 is neutral


def read_tsv(path):
    """yields {"text", "answer", "split" of a held-out one} of the lines of a file. ValueError if one has another
    form."""
    part = {'split': 'test'} if Path(path).name.lower().startswith(('dev', 'test')) else {}
    with open(path, encoding='utf-8', newline='') as file:
        for n, row in enumerate(csv.reader(file, delimiter='\t', quoting=csv.QUOTE_NONE), 1):
            try:
                text, numbers = row[0], sorted(map(int, row[1].split(',')))
                assert 0 <= numbers[0] and numbers[-1] <= 27
            except (ValueError, IndexError, AssertionError):
                raise ValueError(f'{path}, line {n} is not a text, numbers from 0 to 27, and an id') from None
            yield {'text': text, 'answer': {'emotions': [EMOTIONS[k] for k in numbers if k < 27]}, **part}


if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()
if not sys.argv[1:]:
    sys.exit('run: python data/goemotions/prepare.py train.tsv dev.tsv (the files that the paper published)')
try:
    records = [record for path in sys.argv[1:] for record in read_tsv(path)]
    records.sort(key=lambda record: 'split' not in record)      # those held out first: max_records cuts the others
except (OSError, ValueError) as error:
    sys.exit(f'{error.filename}: {error.strerror}' if isinstance(error, OSError) else str(error))
target = Path(__file__).parent / 'input.jsonl'
write_lines(target, records)
held_out = sum('split' in record for record in records)
print(f'{os.path.relpath(target)}: {len(records)} texts, {held_out} of them held out')
