"""HumanEval and MBPP: which programs are made of answers, and which of them are right."""

import pytest

from finchtune.data import templates
from finchtune.data.values import BadRecord
from finchtune.errors import UserError
from finchtune.evaluation.sandbox import require_sandbox
from finchtune.evaluation.task import Choices
from finchtune.evaluation.tasks.humaneval import HumanEval
from finchtune.evaluation.tasks.mbpp import MBPP

DOUBLE = {
    "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
ADD = {
    "text": "Write a function add that adds two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_setup_code": "import math",
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.5, 0.5), 1)"],
}
SANITISED = {
    "prompt": ADD["text"],
    "code": ADD["code"],
    "test_imports": ["import math"],
    "test_list": ADD["test_list"],
}
IN_WORDS = "Here it is:\n```python\ndef double(x):\n    return x + x\n```\nprint it"


@pytest.fixture
def sandbox():
    try:
        require_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def outcomes(task, record, completions) -> list[str]:
    return [row["outcome"] for row in task.scores([record] * len(completions), completions)]


@pytest.mark.usefixtures("sandbox")
def test_functions_are_tested():
    answers = {
        DOUBLE["canonical_solution"]: "passed",
        "    return x + x\n\nprint(double(3))\nraise SystemExit": "passed",
        "    return x * x\n": "failed",
        "    while True:\n        pass\n": "out of time",
        "    import sys\n    sys.exit(0)\n": "failed",
        "": "failed",
    }
    assert outcomes(HumanEval(Choices()), DOUBLE, list(answers)) == list(answers.values())


@pytest.mark.usefixtures("sandbox")
def test_asked_in_words_the_fenced_block_is_run():
    asked = HumanEval(Choices(template=templates.get("chat")))
    assert outcomes(asked, DOUBLE, [IN_WORDS]) == ["passed"]
    assert outcomes(HumanEval(Choices()), DOUBLE, [IN_WORDS]) == ["failed"]
    assert asked.prompt(DOUBLE, []) == f"User: {DOUBLE['prompt']}\n\nAssistant:"
    assert "\ndef" not in asked.stops


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("record", [ADD, SANITISED])
def test_mbpp_runs_its_asserts(record):
    good, bad = f"{ADD['code']}\n[DONE]\nnonsense(", "def add(a, b):\n    return a - b"
    fenced = f"```python\n{ADD['code']}\n```"
    task = MBPP(Choices())
    task.check(record)
    assert outcomes(task, record, [good, bad, fenced]) == ["passed", "failed", "passed"]


def test_mbpp_shows_tests_and_examples():
    task = MBPP(Choices())
    task.show([ADD])
    assert task.prompt(ADD, []) == (
        "You are an expert Python programmer, and here is your task: Write a function add that "
        "adds two numbers. Your code should pass these tests:\n\nassert add(1, 2) == 3\n"
        "assert math.isclose(add(0.5, 0.5), 1)\n[BEGIN]\n"
    )
    assert task.shown == f"{task.prompt(ADD, [])}{ADD['code']}\n[DONE]\n\n"


def test_pass_at_k_of_several_answers():
    task = HumanEval(Choices(samples=10))
    right = {0: 10, 1: 5, 2: 0}
    rows = [{"index": i, "correct": s < n} for i, n in right.items() for s in range(10)]
    summary = task.summary(rows)
    assert summary["pass@1"] == pytest.approx(0.5)
    assert summary["pass@10"] == pytest.approx(2 / 3)
    assert "pass@100" not in summary
    assert task.line(summary).startswith("3 problems, 10 answers each: pass@1 50.0%, pass@10 66.7%")


@pytest.mark.parametrize("lost", ["prompt", "test", "entry_point", "canonical_solution"])
def test_records_that_are_no_problems_are_refused(lost):
    with pytest.raises(BadRecord, match=lost):
        HumanEval(Choices()).check({k: v for k, v in DOUBLE.items() if k != lost})
    with pytest.raises(BadRecord, match="'test_list' must be a list of strings"):
        MBPP(Choices()).check(ADD | {"test_list": "assert True"})
