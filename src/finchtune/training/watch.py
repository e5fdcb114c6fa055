"""Looks at every step: what was skipped is recorded, what goes wrong is stopped."""

import json
from pathlib import Path
from typing import Any

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.data import Data
from finchtune.errors import NOT_FINITE, NotFinite
from finchtune.training.engine import StepResult
from finchtune.training.metrics import rewind
from finchtune.training.schedule import Schedule

SKIPPED = "skipped.jsonl"


class StepWatch:
    """Looks at every step's result: writes down what was skipped, and stops what goes wrong.

    Rows of skipped.jsonl: step (1-based), loss ("nan", "inf" or a number), documents (their
    numbers in the data set). `start` is the step that a run resumes from; rows of later steps are
    dropped, and bad steps in a row just before it still count.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, data: Data, schedule: Schedule, start: int
    ):
        self.config, self.path, self.data = config, folder / SKIPPED, data
        self.schedule = schedule
        rows = distributed.run_on_rank_zero(lambda: self._earlier(start))
        steps = {row["step"] for row in rows}
        self.in_a_row = 0
        while start - self.in_a_row in steps:
            self.in_a_row += 1

    def _earlier(self, start: int) -> list[dict[str, Any]]:
        return rewind(self.path, start) if self.path.exists() else []

    def check(self, step: int, result: StepResult) -> None:
        """Warn of a step (0-based) without targets, record a skipped one.

        Raises NotFinite on every rank after --max_skips skipped steps in a row, and where all the
        run's steps were. A collective call.
        """
        if not result.targets:
            distributed.print_rank_zero(
                f"warning: step {step + 1}: every label is masked; nothing was learnt"
            )
        # fp16 finds its loss scale by trial: a finite loss with an infinite gradient is usual.
        searching = self.config.precision == "fp16" and abs(result.loss) < float("inf")
        if not result.skipped or searching:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        distributed.run_on_rank_zero(lambda: self._record(step, result))

    def status(self) -> int:
        """The exit status of a run that is over: not 0 if its last steps were skipped."""
        if not self.in_a_row:
            return 0
        distributed.print_rank_zero(
            f"warning: the last {self.in_a_row} of {self.schedule.total} steps were skipped; the "
            "weights are those from before them"
        )
        return NOT_FINITE

    def _record(self, step: int, result: StepResult) -> None:
        documents = self.data.document_ids(step, 0, 1, 1, self.schedule.global_batch)
        row = {"step": step + 1, "loss": str(result.loss), "documents": documents}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
        distributed.print_rank_zero(
            f"warning: step {step + 1} is skipped: its loss is {result.loss}, its gradient's norm "
            f"{result.grad_norm}; documents {shown} (see {self.path})"
        )
        if self.in_a_row >= min(self.config.max_skips, self.schedule.total):
            raise NotFinite(
                f"{self.in_a_row} steps in a row had NaN or infinity, the last of them step "
                f"{step + 1}; checkpoints from before are good; look at the documents named in "
                f"{self.path}, or resume from an earlier checkpoint with a lower `lr_init`, more "
                "`warmup_steps`, or `precision` fp32"
            )
