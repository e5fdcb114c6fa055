"""HumanEval (Chen et al. 2021): complete a Python function, which is then tested.

The prompt is the beginning of the function, and a completion ends where the function does. With a
template the model is asked in words; then the fenced block of its answer is run after the prompt.
"""

from finchtune.data.values import text_of
from finchtune.evaluation.programs import ProgramTask, fenced
from finchtune.evaluation.task import Record, cut


class HumanEval(ProgramTask):
    """`prompt`, `canonical_solution`, `test` and `entry_point`."""

    fields = ("prompt", "canonical_solution")
    own_stops = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    @property
    def stops(self) -> tuple[str, ...]:
        """Those of a function's body, or of an answer in words."""
        return self.own_stops if self.template is None else super().stops[len(self.own_stops) :]

    def code(self, completion: str) -> str:
        """The function's body; an answer in words may hold a whole function."""
        block = fenced(completion) if self.template else None
        return cut(completion, self.stops) if block is None else block

    def program(self, record: Record, code: str) -> str:
        """The prompt with its completion, then the tests of the function."""
        prompt, test, name = (text_of(record, key) for key in ("prompt", "test", "entry_point"))
        return f"{prompt}{code}\n{test}\ncheck({name})\n"
