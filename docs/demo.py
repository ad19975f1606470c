"""docs/demo.png, the picture of README.md: what `make demo` has made of held-out messages.

    make demo
    python docs/demo.py config/demo.py
"""
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure, stop

import numpy as np

from distil.checkpoint import load_checkpoint
from distil.decode import decode
from distil.records import load_records
from distil.report import start_drawing

name = ''      # word; data/<dataset>/<name>-* has the records, out/<name> is the student
dataset = ''   # word
seed = 0       # 0..; which messages are shown
config = configure(globals())

if __name__ == '__main__':
    if not (plt := start_drawing()):
        stop('the picture needs matplotlib')
    checkpoint, student, space = load_checkpoint(Path('out', name), 'cpu')
    shards = load_records(dataset, name, checkpoint)
    if not (shards and checkpoint['linear']):
        stop('the picture needs the records and scikit-learn; run: make demo')
    rows = np.random.default_rng(seed).permutation(shards.split()[1])
    short = [i for i in rows if 4 <= len(shards.ids(i)) <= 18][:8]
    answers = [space.to_json(outs) for outs, _ in decode(student, space, [shards.ids(i).tolist() for i in short])]
    figures, linear = checkpoint['figures'], checkpoint['linear']
    fig, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.4), width_ratios=(1, 2.8))
    bars = {'always the commonest': figures['majority'], 'word and letter counts': linear['field'],
            'the student': figures['field']}
    left.barh(range(3), bars.values(), 0.5, color=['#b0b0b0', '#7f9fbf', '#2f7f4f'])
    for y, (label, value) in enumerate(bars.items()):
        left.text(0, y - 0.34, label, fontsize=9)                # above its bar
        left.text(value + 0.02, y, f'{value:.2f}', va='center')
    left.set(xlim=(0, 1.12), ylim=(-0.7, 2.4), yticks=[],
             title=f'fields as the teacher says ({figures["records"]} held out)')
    left.title.set_size(10)
    left.invert_yaxis()
    right.axis('off')
    right.text(0, 1.04, 'a message that it has never seen', weight='bold')
    for n, leaf in enumerate(space.schema.leaves):
        right.text(0.56 + 0.23 * n, 1.04, leaf.path, weight='bold')
    for y, (i, answer) in enumerate(zip(short, answers)):
        teacher, top = space.to_json(shards.outs(i)), 0.93 - y / 8
        text = space.tokenizer.decode(shards.ids(i).tolist())
        right.text(0, top, textwrap.shorten(text, 58, placeholder=' …'), fontsize=9)
        for n, leaf in enumerate(space.schema.leaves):
            ours, theirs = leaf.get(answer), leaf.get(teacher)
            same = ours == theirs
            said = str(ours) if same else f'{ours} (teacher: {theirs})'
            right.text(0.56 + 0.23 * n, top, said, fontsize=9, color='#2f7f4f' if same else '#b03030')
    fig.tight_layout()
    target = Path(__file__).with_suffix('.png')
    fig.savefig(target, dpi=110)
    print(f'{target.name} is drawn')
