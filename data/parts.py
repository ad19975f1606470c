"""The files that a path means, and to which part of a data set each belongs: to train on, or to test.

    set/train/data-00000-of-00001.arrow         # saved by save_to_disk of Hugging Face datasets
    set/data/test-00000-of-00001.parquet        # as on the Hub ...
    set/default/validation/0000.parquet         # ... or converted there

The innermost name of a path that has such a word decides (the words are those of Hugging Face).
"""
import json
import os
import re
import sys
from pathlib import Path

WORDS = dict.fromkeys(('train', 'training'), 'train') | dict.fromkeys(
    ('test', 'testing', 'eval', 'evaluation', 'validation', 'valid', 'val', 'dev'), 'test')
TABLE = re.compile(r'\.(parquet|arrow|csv|tsv|jsonl|ndjson|xlsx)(\.gz)?$')
CACHE = re.compile(r'cache-\w+\.arrow')  # what a map() of Hugging Face datasets has left there


def find_part(path):
    """'train' or 'test' if a path, relative to its data set, says so; else ''."""
    words = (word for name in reversed(Path(path).parts) for word in re.split(r'[\W\d_]+', name.lower()))
    return next((WORDS[word] for word in words if word in WORDS), '')


def find_saved(folder):
    """the files of the data sets in a folder that save_to_disk wrote. Exits with a message if one
    is damaged."""
    files = []
    for state in sorted(folder.rglob('state.json')):
        try:
            names = [file['filename'] for file in json.loads(state.read_text(encoding='utf-8'))['_data_files']]
        except (ValueError, LookupError, TypeError):
            sys.exit(f'{state} is damaged, or not of a Hugging Face data set; name the .arrow files')
        files += [state.parent / name for name in names]
    return files


def find_files(path):
    """{file: its part, '' if unknown} of what a path means: itself, or, of a folder, the files of a
    saved data set, else all .parquet, else all .arrow files. Exits with a message if there are
    none."""
    if path == '-' or not os.path.isdir(path):
        if path != '-' and not os.path.exists(path):
            sys.exit(f'{path} does not exist')
        return {path: find_part(os.path.basename(path))}
    folder = Path(path)
    tables = sorted(file for file in folder.rglob('*') if TABLE.search(file.name) and not CACHE.match(file.name))
    files = find_saved(folder)
    files = files or [file for file in tables if file.suffix == '.parquet']
    files = files or [file for file in tables if file.suffix == '.arrow']
    if not files:
        sys.exit(f'{path} is a directory without .parquet or .arrow files; name the files in it')
    if others := [str(file) for file in tables if file not in files]:
        print(f'{path}: not read are {list_files(others)}; to read other files too, name them all')
    is_part = (folder / 'state.json').exists()                  # then its own name says which
    return {str(file): find_part(file.relative_to(folder.parent if is_part else folder)) for file in files}


def split_files(parts):
    """{file: 'train' or 'test'} of {file: its part, or ''} if there are files of both parts, else
    {}: then a tenth of the texts is held out. Prints which files are held out, and those whose name
    does not say it."""
    if {'train', 'test'} - {*parts.values()}:
        return {}
    held_out = [file for file, part in parts.items() if part == 'test']
    unnamed = [file for file, part in parts.items() if not part]
    print(f'held out, as the names of the files say: {list_files(held_out)} (rename them if they do not mean it)')
    if unnamed:
        print(f'trained on, though no name says so: {list_files(unnamed)}; to leave them out, name the others')
    return {file: part or 'train' for file, part in parts.items()}


def list_files(files):
    """the first names of some files in a few words."""
    return ', '.join(files[:4]) + (f' and {len(files) - 4} more' if len(files) > 4 else '')
