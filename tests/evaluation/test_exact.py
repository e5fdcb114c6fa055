"""The last number of an answer."""

import pytest

from finchtune.data.values import BadRecord
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks.exact import Exact, final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [("a 3 b 1,234.", "1234"), ("is -7.", "-7"), ("2.50 each", "2.50"), ("none", None), ("", None)],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_answers_without_a_number():
    task = Exact(Choices())
    record = {"question": "1+1?", "answer": "It is 2."}
    assert [task.score(record, text)["correct"] for text in ("2", "two", "")] == [
        True,
        False,
        False,
    ]
    with pytest.raises(BadRecord, match="'answer' holds no number"):
        task.check(record | {"answer": "two"})
