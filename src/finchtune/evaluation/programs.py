"""Tasks whose answers are programs, right if they pass their tests in the sandbox."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from finchtune.evaluation.sandbox import require_sandbox, run_programs
from finchtune.evaluation.summary import pass_at, wilson
from finchtune.evaluation.task import Record, Row, Task

FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
KS = (1, 10, 100)


class ProgramTask(Task):
    """A task that says by `program` what is to be run."""

    default_template = None
    sampled = True

    def require(self) -> None:
        """Raise UserError on a machine that cannot isolate programs."""
        require_sandbox()

    def check(self, record: Record) -> None:
        """As in the base class."""
        super().check(record)
        self.program(record, "")

    def program(self, record: Record, code: str) -> str:
        """The program that ends normally if `code` is right."""
        raise NotImplementedError

    def code(self, completion: str) -> str:
        """What of a completion is run."""
        raise NotImplementedError

    def scores(self, records: Sequence[Record], completions: Sequence[str]) -> list[Row]:
        """As in the base class."""
        codes = [self.code(completion) for completion in completions]
        outcomes = run_programs(list(map(self.program, records, codes)))
        return [
            {
                "extracted": code,
                "gold": self.gold(record),
                "outcome": outcome,
                "correct": outcome == "passed",
            }
            for record, code, outcome in zip(records, codes, outcomes, strict=True)
        ]

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """As in the base class; with several answers to each question pass@k instead."""
        n = self.choices.samples
        if n == 1:
            return super().summary(rows)
        right: dict[int, int] = defaultdict(int)
        for row in rows:
            right[row["index"]] += row["correct"]
        rates = {
            f"pass@{k}": sum(pass_at(k, n, count) for count in right.values()) / len(right)
            for k in KS
            if k <= n
        }
        low, high = wilson(rates["pass@1"], len(right))
        return {"of": len(right), "samples": n, "low": low, "high": high, **rates}

    def line(self, summary: dict[str, Any]) -> str:
        """As in the base class."""
        if self.choices.samples == 1:
            return super().line(summary)
        rates = ", ".join(f"{k} {v:.1%}" for k, v in summary.items() if k.startswith("pass@"))
        interval = f"95% interval of pass@1 {summary['low']:.1%} to {summary['high']:.1%}"
        return f"{summary['of']} problems, {summary['samples']} answers each: {rates} ({interval})"


def fenced(completion: str) -> str | None:
    """The first fenced block of an answer in Markdown; None without one."""
    match = FENCE.search(completion)
    return match[1] if match else None
