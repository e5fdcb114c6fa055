"""MATH's two scorers: spellings of one answer, and the listed cases in which they differ."""

import random

import pytest

from finchtune.data.values import BadRecord
from finchtune.evaluation.latex import last_boxed, normalised
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks.math import MATH, parity_answer, repaired_answer

pytest.importorskip("math_verify")

GOLD = [
    "2",
    "-17",
    r"\frac{1}{2}",
    r"\frac{7}{5} + \frac{1}{5} i.",
    r"2\sqrt{3}",
    r"[0,\infty)",
    r"(-\infty, -2) \cup (-2, 5]",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"\text{Tuesday}",
    r"x^2 + 2x + 1",
    r"90^\circ",
    r"\$18.90",
    "1,2,3",
    "10101_2",
    r"3\frac{1}{4}",
    r"\text{(B)}",
    "0.5",
    "50\\%",
]
SAME_STRING = {
    r"\frac{1}{2}": ["1/2", "0.5", r"\dfrac12", r"\tfrac{1}{2}", r"\frac 1 2", "x = 1/2"],
    "90": [r"90^\circ", r"90^{\circ}", r"90\text{ degrees}", r"\$90", r"90\%", " 90"],
    r"\sqrt{3}": [r"\sqrt3", r"\left\sqrt{3}\right"],
    "0.75": [".75"],
    "(1,2)": [r"\left( 1, 2 \right)", "(1,\\!2)"],
}
DIFFERENT = {
    # (gold, answer): (parity, repaired)
    ("2", "$2$"): (False, True),
    ("2", r"\boxed{2}"): (False, True),
    ("2", "4/2"): (False, True),
    ("0.25", r"\frac{1}{4}"): (False, True),
    (r"x^2+2x+1", r"(x+1)^2"): (False, True),
    (r"2\sqrt{3}", r"\sqrt{12}"): (False, True),
    ("2", "3"): (False, False),
    (r"\text{Tuesday}", r"\text{Monday}"): (False, False),
    ("1,2", "2,3"): (False, False),
}


@pytest.mark.parametrize("gold", SAME_STRING)
def test_spellings_are_one(gold):
    assert {normalised(text) for text in SAME_STRING[gold]} == {normalised(gold)}


def test_boxes():
    assert last_boxed(r"\boxed{1} and $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert last_boxed(r"thus $\boxed 4$.") == "4"
    assert last_boxed(r"\fbox{a}") == "a"
    assert last_boxed(r"\boxed{never closed") is None
    assert last_boxed("none") is None


def score(gold: str, completion: str, **choices) -> tuple[bool, bool]:
    record = {"problem": "?", "solution": f"So $\\boxed{{{gold}}}$."}
    row = MATH(Choices(**choices)).score(record, completion)
    return row["parity"], row["repaired"]


@pytest.mark.parametrize("gold", GOLD)
def test_gold_is_right_by_both_scorers(gold):
    assert score(gold, f"It follows that $\\boxed{{{gold}}}$.") == (True, True)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_scorers_differ_where_listed(gold, answer):
    assert score(gold, f"The answer is: {answer}.\n") == DIFFERENT[gold, answer]


def test_other_problems_answers_are_wrong():
    shuffled = GOLD[1:] + GOLD[:1]
    random.Random(0).shuffle(shuffled)
    pairs = [(a, b) for a, b in zip(GOLD, shuffled, strict=True) if normalised(a) != normalised(b)]
    assert [score(a, f"$\\boxed{{{b}}}$") for a, b in pairs] == [(False, False)] * len(pairs)


def test_sentence_ends_at_the_line():
    assert parity_answer("The answer is: 5.\nSo x.") == "5"
    assert repaired_answer("The answer is: $5$.\nSo x.") == "5"
    assert repaired_answer("The final answer is negative, as seen: \\boxed{7}") == "7"
    assert repaired_answer("The final answer is 12.") == "12"
    assert repaired_answer("no answer") is parity_answer("no answer") is None


def test_solution_without_a_box_is_refused():
    with pytest.raises(BadRecord, match="has no"):
        MATH(Choices()).check({"problem": "?", "solution": "5"})
