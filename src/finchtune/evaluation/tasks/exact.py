"""Any questions with a number for an answer: the last number of both must be the same."""

import re

from finchtune.data.values import BadRecord, text_of
from finchtune.evaluation.task import Record, Row, Task

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Exact(Task):
    """`question` and `answer`."""

    max_tokens = 256

    def gold(self, record: Record) -> str:
        """The last number of the answer."""
        found = final_number(text_of(record, self.fields[1]))
        if found is None:
            raise BadRecord(f"the field {self.fields[1]!r} holds no number")
        return found

    def example(self, record: Record) -> str:
        """As in the base class, with the whole answer."""
        return self.answered(record, text_of(record, self.fields[1]))

    def score(self, record: Record, completion: str) -> Row:
        """As in the base class."""
        gold, found = self.gold(record), final_number(completion)
        return {"extracted": found, "gold": gold, "correct": found == gold}


def final_number(text: str) -> str | None:
    """The last number in a text, without thousands separators; None if there is none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None
