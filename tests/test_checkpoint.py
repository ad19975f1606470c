"""The file of a student, and those of earlier versions."""
import pytest
import torch

from distil.checkpoint import CHECKPOINT, load_checkpoint
from distil.decode import generate
from distil.reader import load_encoder
from distil.space import tokenizer_hash
from model import Student, StudentConfig
from tests.conftest import tiny_student
from tests.test_reader import bert  # noqa: F401

TEXTS = [[5, 9, 77], [300, 8], [4, 4, 4, 9]]
# sizes that format 4 had and format 5 has not
GONE = dict(after=(), n_prompt=0, head_size=0, activation='gelu', qk_norm=False, qkv_bias=False, sandwich=False,
            norm_eps=1e-6, rope_of_layer=())


def write_student(folder, student, space, config, model, **more):
    task = {'fields': space.schema.fields, 'indent': None, 'fence': False, 'end_id': None,
            'output_ids': space.output_ids, 'tokenizer_hash': tokenizer_hash(space.tokenizer),
            'prompt': '{text}', 'max_text': 18}
    space.tokenizer.save(str(folder / 'tokenizer.json'))
    if student.encoder:
        student.encoder.tokenizer.save(str(folder / 'reader.json'))
    torch.save({'format': 4, 'student': config, 'model': model, 'task': task, 'per_field': None, **more},
               folder / 'best.pt')


def as_format_4(student):
    """(sizes, weights) of a student as format 4 had them."""
    config = {key: value for key, value in vars(student.config).items() if key not in ('output_ids', 'encoder')}
    model = {name.replace('encoder', 'reader'): weight for name, weight in student.state_dict().items()}
    return config | GONE | {'reader': student.config.encoder}, model | {'rope_freq': student.rope_freq[None]}


@pytest.mark.parametrize('has_encoder', [False, True])
def test_a_student_of_format_4_gives_the_same_answers(space, tmp_path, request, has_encoder):
    student = tiny_student(space, n_table=24)
    if has_encoder:
        encoder, V = load_encoder(str(request.getfixturevalue('bert'))), len(space.output_ids)
        sizes = dict(vocab_size=V + 1, output_vocab=V, start_id=V, block_size=96, n_layer=2, n_head=4, n_kv_head=2,
                     n_embd=16, n_mlp=32, encoder=vars(encoder.config))
        student = Student(StudentConfig(**sizes), encoder).eval()
    for p in student.parameters():
        p.data *= 4 if p.dim() == 2 else 1
    optimizer = {'state': {}, 'param_groups': [{'of_reader': False, 'lr': 1.0}, {'of_reader': True, 'lr': 0.1}]}
    write_student(tmp_path, student, space, *as_format_4(student), optimizer=optimizer)
    checkpoint, loaded, its_space = load_checkpoint(tmp_path, 'cpu')
    assert checkpoint['format'] == CHECKPOINT
    assert [group['of_encoder'] for group in checkpoint['optimizer']['param_groups']] == [False, True]
    assert generate(loaded, its_space, TEXTS) == generate(student, space, TEXTS)
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_a_student_with_layers_of_its_teacher_is_refused_by_a_sentence(space, tmp_path):
    student = tiny_student(space)
    config, model = as_format_4(student)
    write_student(tmp_path, student, space, config | {'rope_of_layer': (0, 0)}, model)
    with pytest.raises(SystemExit, match='with layers of its teacher, which this version does not read; train again'):
        load_checkpoint(tmp_path, 'cpu')
