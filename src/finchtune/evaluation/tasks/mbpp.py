"""MBPP (Austin et al. 2021): write a Python function that passes the asserts shown with it.

The prompt is the paper's, as is `[DONE]` at the end of an answer; it is meant to be asked with
three examples. Records are those of the full or of the sanitised file.
"""

from finchtune.data.values import BadRecord, text_of
from finchtune.evaluation.programs import ProgramTask, fenced
from finchtune.evaluation.task import Record, cut

ASK = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n"
)


class MBPP(ProgramTask):
    """`text` (or `prompt`), `code`, `test_list`, and `test_setup_code` or `test_imports`."""

    fields = ("text", "code")
    own_stops = ("[DONE]",)

    def prompt(self, record: Record, answers: object = ()) -> str:
        """The task and its tests, in words."""
        name = self.fields[0] if self.fields[0] in record else "prompt"
        asked = ASK.format(text=text_of(record, name), tests="\n".join(lines(record, "test_list")))
        return self.template.prompt(asked) if self.template else f"{asked}[BEGIN]\n"

    def example(self, record: Record) -> str:
        """As in the base class."""
        return self.answered(record, f"{self.gold(record)}\n[DONE]")

    def code(self, completion: str) -> str:
        """The fenced block, if there is one, or all up to `[DONE]`."""
        ended = cut(completion, self.own_stops)
        block = fenced(ended)
        return ended if block is None else block

    def program(self, record: Record, code: str) -> str:
        """The code, then what the tests need, then the tests."""
        setup = record.get("test_setup_code") or "\n".join(lines(record, "test_imports", []))
        return "\n".join([code, setup, *lines(record, "test_list")])


def lines(record: Record, name: str, default: list[str] | None = None) -> list[str]:
    """A field that must be a list of texts; BadRecord if it is not."""
    found = record.get(name, default)
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise BadRecord(f"the field {name!r} must be a list of strings")
    return found
