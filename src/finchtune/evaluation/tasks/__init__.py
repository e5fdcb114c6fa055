"""The tasks by name. A new one is its own file and one entry here."""

from finchtune.evaluation.task import Task
from finchtune.evaluation.tasks.exact import Exact
from finchtune.evaluation.tasks.gsm8k import GSM8K
from finchtune.evaluation.tasks.humaneval import HumanEval
from finchtune.evaluation.tasks.loss import Loss
from finchtune.evaluation.tasks.math import MATH
from finchtune.evaluation.tasks.mbpp import MBPP
from finchtune.evaluation.tasks.mtbench import MTBench

TASKS: dict[str, type[Task]] = {
    "gsm8k": GSM8K,
    "math": MATH,
    "humaneval": HumanEval,
    "mbpp": MBPP,
    "mtbench": MTBench,
    "exact": Exact,
    "loss": Loss,
}
