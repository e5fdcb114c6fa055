"""The loss on held-out data during training: how it stands, and when to stop."""

from typing import Any

from finchtune.config import TrainConfig
from finchtune.data import Data
from finchtune.training.engine import Engine
from finchtune.training.schedule import Schedule


class Validation:
    """Takes the loss on `data` now and then; does nothing where that is None.

    `history` holds (step, loss) of every time so far; a checkpoint keeps it, so that a resumed
    run knows its best and when to stop. The same on all ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        data: Data | None,
        schedule: Schedule,
        manifest: dict[str, Any],
    ):
        self.engine, self.data, self.micro_bsz = engine, data, config.micro_bsz
        self.schedule, self.patience = schedule, config.early_stop
        self.history = [(step, loss) for step, loss in manifest.get("validation", [])]

    def loss(self, step: int) -> float | None:
        """Mean loss per held-out token after `step` steps, where it is time for one; else None.

        A collective call.
        """
        if self.data is None or not self.schedule.validates(step):
            return None
        loss = self.engine.evaluate(self.data, self.micro_bsz)
        self.history.append((step, loss))
        return loss

    @property
    def best(self) -> tuple[int, float]:
        """(step, loss) of the lowest loss so far, the earliest of equals."""
        return min(self.history, key=lambda entry: (entry[1], entry[0]))

    def is_best(self, step: int) -> bool:
        """Whether the loss after `step` is the lowest so far."""
        return bool(self.history) and self.best[0] == step

    @property
    def exhausted(self) -> bool:
        """Whether the last --early_stop losses all brought nothing."""
        if not self.patience or not self.history:
            return False
        since = [step for step, _ in self.history].index(self.best[0])
        return len(self.history) - 1 - since >= self.patience
