"""The students of a server, and which of them answers a request."""
from dataclasses import dataclass, field

from serve.prompts import Prompts
from serve.request import Refusal
from serve.schemas import read_schema
from serve.service import Service


@dataclass(eq=False)
class ServedStudent:
    """a student and how requests are read for it. created: its time in seconds since 1970; the rest: as the
    settings of serve.py."""
    service: Service
    prompts: Prompts = None     # of its training prompt alone, unless there are more
    true_value: dict = field(default_factory=dict)
    ordered: tuple = ()
    too_long: str = 'auto'
    created: int = 0
    among_others: bool = False  # requests that are for an LLM come here too
    fill: dict = field(default_factory=dict)

    def __post_init__(self):
        self.name, self.space, self.task = self.service.name, self.service.space, self.service.labeler.task
        self.prompts = self.prompts or Prompts([self.task['prompt']])

    def refuses_long(self, by_default):
        """True if a text longer than it reads is refused. by_default: of this route."""
        return by_default if self.too_long == 'auto' else self.too_long == 'refuse'

    def shape_of(self, schema, *where):
        """the Shape of its answers to a JSON Schema, see read_schema."""
        return read_schema(schema, self.space, self.true_value, *where, fill=self.fill)

    def check_meant(self, body, known):
        """Refusal if requests for an LLM come here too, and nothing in this one says that it is for the
        student: neither a schema or a template (known), nor its name."""
        if self.among_others and not known and body.get('model') != self.name:
            raise Refusal(400, 'a message without a schema or a template is for the LLM, unless the model is '
                          f'{self.name!r}', 'model')

    async def answer(self, plan):
        """list of Answers to the texts of a Plan."""
        return await self.service.answer(plan.texts, plan.full, plan.offered, plan.where, plan.refuse_long,
                                         plan.each, plan.copies, plan.reference_date)

    def describe(self):
        """the entry of /v1/models."""
        return {'id': self.name, 'object': 'model', 'created': self.created, 'owned_by': 'you'}


def choose_student(students, read, body):
    """(ServedStudent, Plan) for the body of a request: of the students that `model` names, else of all, the only
    one that can answer it. read: function of a ServedStudent and the body that returns a Plan or raises a
    Refusal."""
    named = [student for student in students if student.name == body.get('model')]
    found, refusals = [], []
    for student in named or students:
        try:
            found.append((student, read(student, body)))
        except Refusal as refusal:
            refusals.append((student, refusal))
    if len(found) == 1:
        return found[0]
    if found:
        raise Refusal(400, 'several students can answer this; name one as the model: '
                      f'{", ".join(student.name for student, _ in found)}', 'model')
    first = refusals[0][1]
    if len(refusals) > 1 and len({str(refusal) for _, refusal in refusals}) > 1:
        raise Refusal(first.status, 'no student can answer this. ' + '; '.join(
            f'{student.name}: {refusal}' for student, refusal in refusals), *first.where)
    raise first
