r"""MATH (Hendrycks et al. 2021): competition problems; the gold answer is a solution's last box.

The parity score is that of MetaMath's evaluation: what follows the last `The answer is: `, up to a
full stop at the end of a line, is the same string as the gold once both are normalised. The
repaired score also takes what math-verify finds equal to it. Both take the last `\boxed{}` where
there is no such sentence.
"""

import re

from finchtune.data.values import BadRecord, text_of
from finchtune.errors import UserError
from finchtune.evaluation.latex import BOX, last_boxed, normalised
from finchtune.evaluation.task import Record, Row, Task, after_last

SENTENCE = re.compile(r"The answer is: ")
ANY_SENTENCE = re.compile(r"[Tt]he (?:final )?answer is:?\s*")
TIMEOUT = 15  # seconds to parse or compare an answer: a busy machine should not decide
END_OF_SENTENCE = re.compile(r"\.\s*\n|\n\n|\.\s*\Z")


class MATH(Task):
    """`problem` and `solution`."""

    fields = ("problem", "solution")
    parity_stops = ("Question", "USER", "ASSISTANT", "Instruction", "Response")

    def require(self) -> None:
        """Raise UserError without math-verify."""
        same_value("1", "1")

    def gold(self, record: Record) -> str:
        """The content of the solution's last box."""
        found = last_boxed(text_of(record, self.fields[1]))
        if found is None:
            raise BadRecord(rf"{self.fields[1]!r} has no \boxed{{}}")
        return found

    def example(self, record: Record) -> str:
        """The solution, then the sentence that is looked for."""
        solution = text_of(record, self.fields[1])
        return self.answered(record, f"{solution}\nThe answer is: {self.gold(record)}")

    def score(self, record: Record, completion: str) -> Row:
        """As in the base class."""
        gold = self.gold(record)
        as_paper = parity_answer(self.as_stopped(completion))
        parity = as_paper, as_paper is not None and normalised(as_paper) == normalised(gold)
        found = repaired_answer(completion)
        equal = found is not None and same_answer(gold.removesuffix("."), found.removesuffix("."))
        return self.either(gold, parity, (found, equal))


def parity_answer(text: str) -> str | None:
    """The answer as MetaMath's evaluation reads it."""
    tail = after_last(text, SENTENCE)
    if tail is None:
        return last_boxed(text)
    return tail.split(".\n")[0].strip().removesuffix(".")


def repaired_answer(text: str) -> str | None:
    """The answer to the end of its sentence, taken out of its box and dollars.

    A box counts for more than a sentence that only resembles the one looked for.
    """
    tail = after_last(text, SENTENCE)
    if tail is None and BOX.search(text):
        return last_boxed(text)
    tail = after_last(text, ANY_SENTENCE) if tail is None else tail
    if tail is None:
        return None
    found = END_OF_SENTENCE.split(tail, maxsplit=1)[0].strip()
    boxed = last_boxed(found)
    found = found if boxed is None else boxed
    return re.sub(r"\A\$([^$]*)\$\Z", r"\1", found)


def same_answer(gold: str, answer: str) -> bool:
    """Whether an answer is the gold in another spelling, or equal to it."""
    return normalised(answer) == normalised(gold) or same_value(gold, answer)


def same_value(gold: str, answer: str) -> bool:
    """Whether math-verify finds an answer equal to the gold. UserError where it is missing."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError("the task math needs math-verify: pip install 'finchtune[eval]'") from error
    texts = (text if "$" in text else f"${text}$" for text in (gold, answer))
    parsed = (parse(text, parsing_timeout=TIMEOUT) for text in texts)
    return verify(*parsed, timeout_seconds=TIMEOUT)
