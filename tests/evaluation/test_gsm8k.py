"""GSM8K's two scorers: what both read, and the listed cases in which they differ."""

import random
from fractions import Fraction

import pytest

from finchtune.data.values import BadRecord
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks.gsm8k import GSM8K, parity_number, repaired_number

SAME = {
    "18": 18,
    "18.": 18,
    "-5": -5,
    "+5": 5,
    "$1,234.": 1234,
    "1,234.00": 1234,
    "5 apples and 3 pears": 5,
    "12%": 12,
    "x = 7": 7,
    r"\boxed{9}": 9,
    "007": 7,
    "none": None,
}
DIFFERENT = {
    "1,234,567": (1234, 1234567),
    "3 1/2": (3, Fraction(7, 2)),
    "1/2": (0, Fraction(1, 2)),
    "17.6": (18, Fraction("17.6")),
    "- 5": (5, -5),
    "-$5": (5, -5),
    "10x-5": (10, 10),
    "x-5": (-5, 5),
    "5/0": (5, None),
    r"\frac{3}{4}": (3, Fraction(3, 4)),
    "1{,}234": (1, 1234),
}
RECORDS = [
    {
        "question": f"How many are {i} and {i}?",
        "answer": f"It is {i}+{i}=<<{i}+{i}={n}>>{n}.\n#### {n:,}",
    }
    for i in range(0, 900_000, 9001)
    for n in [2 * i]
]


@pytest.mark.parametrize("text", SAME)
def test_both_scorers_read_an_answer(text):
    written = f"So 1 + 1.\nThe answer is: {text}"
    assert (parity_number(written), repaired_number(written)) == (SAME[text], SAME[text])


@pytest.mark.parametrize("text", DIFFERENT)
def test_scorers_differ_where_listed(text):
    written = f"The answer is: {text}"
    assert (parity_number(written), repaired_number(written)) == DIFFERENT[text]


def test_last_sentence_counts_and_hashes_are_an_answer():
    for read in (parity_number, repaired_number):
        assert read("The answer is: 3. No. The answer is: 4") == 4
        assert read("It is <<1+1=2>>2.\n#### 2") == 2
        assert read("It is 5.") is None
        assert read("The answer is: " + "9" * 5000) is None or read is repaired_number
    assert repaired_number("the answer is 12.") == 12
    assert parity_number("the answer is 12.") is None


def rates(choices: Choices, answers: list[str]) -> dict[str, float]:
    task = GSM8K(choices)
    summary = task.summary(task.scores(RECORDS, answers))
    return {name: part["rate"] for name, part in summary.items()}


def test_gold_answers_are_right_and_others_wrong():
    answers = [record["answer"] for record in RECORDS]
    # The paper's scorer fails at the one number of a million.
    big = sum(record["answer"].count(",") == 2 for record in RECORDS)
    expected = {"correct": 1.0, "parity": 1 - big / len(RECORDS), "repaired": 1.0}
    assert big == 44
    assert rates(Choices(given=True), answers) == expected
    strict = rates(Choices(strict_parity=True, given=True), answers)
    assert strict == expected | {"correct": expected["parity"]}
    random.Random(0).shuffle(answers)
    assert rates(Choices(given=True), answers)["correct"] < 0.03


def test_protocols_stop_strings_count_for_parity_only():
    """A model that was allowed past `Response` is scored as if it had been stopped there."""
    written = ["The Response is 2.\nThe answer is: 0"]
    lenient, strict = GSM8K(Choices()), GSM8K(Choices(strict_parity=True))
    found = lenient.score(RECORDS[0], written[0])
    assert (found["correct"], found["parity"], found["repaired"]) == (True, False, True)
    assert "Response" in strict.stops
    assert "Response" not in lenient.stops
    assert "\nUser:" in lenient.stops


def test_examples_are_worked_in_the_form_that_is_looked_for():
    task = GSM8K(Choices())
    task.show(RECORDS[1:2])
    assert task.shown.endswith("It is 9001+9001=18002.\nThe answer is: 18002\n\n")
    assert task.shown.count("### Instruction:\nHow many are 9001 and 9001?") == 1


@pytest.mark.parametrize("answer", ["5", "#### five", "#### "])
def test_gold_without_a_number_is_refused(answer):
    with pytest.raises(BadRecord, match="does not end with '#### ' and an integer"):
        GSM8K(Choices()).check({"question": "?", "answer": answer})
