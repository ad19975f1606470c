"""docs/tables.md: its programs run with the real packages, each where it is installed."""
import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from tests.conftest import ROOT

PAGE = (ROOT / 'docs/tables.md').read_text(encoding='utf-8')
PROGRAMS = re.findall(r'```python\n(.*?)```', PAGE, re.S)
PACKAGES = 'pandas', 'polars', 'duckdb', 'dask', 'pyspark', 'ray'


@pytest.mark.slow
@pytest.mark.parametrize('package', PACKAGES)
def test_a_program_of_the_page_answers_a_table(project, tmp_path, package):
    pytest.importorskip(package)
    if package == 'pyspark' and not shutil.which('java'):
        pytest.skip('Java is not installed')
    (program,) = [program for program in PROGRAMS if f'import {package}' in program or f'from {package}' in program
                  if package != 'pandas' or 'dask' not in program]
    texts = [f'hello my friend {n}' for n in range(20)] + ['the cat']
    pd.DataFrame({'id': range(21), 'body': texts}).to_parquet(tmp_path / 'messages.parquet')
    (tmp_path / 'out').symlink_to(project / 'out')
    program = program.replace('out/demo', 'out/toy').replace("('sentiment', 'topic')", "('tone', 'spam')")
    environment = {'PYTHONPATH': str(ROOT), 'PATH': f'{sys.prefix}/bin:/usr/bin:/bin', 'HOME': str(tmp_path),
                   'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob('labelled*')
    table = pd.read_parquet(written)
    answers = table['tone'] if 'tone' in table else table['answer'].map(
        lambda text: (json.loads(text) if text.startswith('{"') else eval(text))['tone'])
    assert len(table) == 21 and {*answers} <= {'neutral', 'friendly'} and sorted(table['body']) == sorted(texts)
