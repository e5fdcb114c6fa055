"""GSM8K (Cobbe et al. 2021): grade-school problems whose answer is an integer.

The parity score is that of MetaMath's evaluation (Yu et al. 2023), which the DiSHA paper uses: the
first number after the last `The answer is: `, rounded. It stops at words that a right answer may
hold, and reads `1,234,567` as 1,234 and `3 1/2` as 3. The repaired score reads whole numbers and
compares them exactly. Both take `#### N`, GSM8K's own form, where there is no such sentence.
"""

import re
from fractions import Fraction

from finchtune.data.values import BadRecord, text_of
from finchtune.evaluation.task import Record, Row, Task, after_last

SPEAKERS = ("Question", "USER", "ASSISTANT", "Instruction", "Response")
PARITY_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
SENTENCE = re.compile(r"The answer is: ")
HASHES = re.compile(r"#### ?")
ANY_MARKER = re.compile(r"[Tt]he (?:final )?answer is:?|####|\\boxed")
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-+]\s*)?"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<numerator>\d+)\s*/\s*(?P<denominator>\d+)"
    r"|(?P<decimal>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+))"
)
MARKS = re.compile(r"<<[^<>]*>>")


class GSM8K(Task):
    """`question`, and `answer` with its number after `#### `."""

    parity_stops = SPEAKERS

    def gold(self, record: Record) -> str:
        """The integer after `#### `."""
        tail = after_last(text_of(record, self.fields[1]), HASHES)
        try:
            return str(int((tail or "").replace(",", "")))
        except ValueError:
            raise BadRecord(
                f"{self.fields[1]!r} does not end with '#### ' and an integer"
            ) from None

    def example(self, record: Record) -> str:
        """The working without calculator marks, then the sentence that is looked for."""
        working = MARKS.sub("", text_of(record, self.fields[1])).rpartition("####")[0].strip()
        return self.answered(record, f"{working}\nThe answer is: {self.gold(record)}")

    def score(self, record: Record, completion: str) -> Row:
        """As in the base class."""
        gold = self.gold(record)
        as_paper = parity_number(self.as_stopped(completion))
        found = repaired_number(completion)
        parity = as_paper, as_paper is not None and float(as_paper) == float(gold)
        return self.either(gold, parity, (found, found == Fraction(gold)))


def parity_number(text: str) -> int | None:
    """The answer as MetaMath's evaluation reads it; None if it finds none."""
    tail = after_last(text, SENTENCE)
    tail = after_last(text, HASHES) if tail is None else tail
    match = PARITY_NUMBER.search(tail or "")
    if not match:
        return None
    numerator, slash, denominator = match[0].replace(",", "").partition("/")
    if slash and not numerator.strip("+-"):
        return None
    try:
        value = float(Fraction(int(numerator), int(denominator))) if slash else float(numerator)
        return round(value)
    except ZeroDivisionError:
        return round(float(numerator))
    except (ValueError, OverflowError):
        return None


def repaired_number(text: str) -> Fraction | None:
    """The number that an answer gives: thousands, decimals, fractions and mixed numbers whole."""
    tail = after_last(text, ANY_MARKER)
    if tail is None:
        return None
    tail = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2", tail)
    match = NUMBER.search(re.sub(r"\{,\}", ",", re.sub(r"\\[!,]|\\?\$", "", tail)))
    return value_of(match) if match else None


def value_of(match: re.Match[str]) -> Fraction | None:
    """The number of a match of NUMBER; None where it divides by zero or has too many digits."""
    try:
        if match["decimal"]:
            value = Fraction(match["decimal"].replace(",", ""))
        else:
            value = Fraction(int(match["numerator"]), int(match["denominator"]))
            value += int(match["whole"] or 0)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if (match["sign"] or "").startswith("-") else value
