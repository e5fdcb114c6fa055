"""How many steps a run has, their learning rates, and what is due after which of them."""

import math

from finchtune.config import TrainConfig
from finchtune.training.optim import learning_rate


class Schedule:
    """The optimizer steps of a run. `done` counts those that are finished, so it is 1 or more."""

    def __init__(self, config: TrainConfig, global_batch: int, n_rows: int):
        """`global_batch` rows make a step, `n_rows` are one pass over the data."""
        self.config, self.global_batch = config, global_batch
        self.epoch_steps = config.epoch_steps or math.ceil(n_rows / global_batch)
        self.total = self.epoch_steps * config.epoch_count

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        first, final = self.config.lr_init, self.config.lr_final
        return learning_rate(
            step,
            self.total,
            first,
            first if final is None else final,
            self.config.lr_schedule,
            self.config.warmup_steps,
        )

    def epoch(self, done: int) -> int:
        """The epoch, counted from 0, that the last of `done` steps belongs to."""
        return (done - 1) // self.epoch_steps

    def validates(self, done: int) -> bool:
        """Whether the held-out loss is due after `done` steps."""
        return self._every(self.config.val_every or self.epoch_steps, done)

    def samples(self, done: int) -> bool:
        """Whether samples are due after `done` steps."""
        return self._every(self.config.sample_every or self.epoch_steps, done)

    def saves_checkpoint(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps."""
        return bool(self.config.save_every) and self._every(self.config.save_every, done)

    def saves_epoch(self, done: int) -> bool:
        """Whether the weights of an epoch are due after `done` steps."""
        return self._every(self.config.epoch_save * self.epoch_steps, done)

    def _every(self, n_steps: int, done: int) -> bool:
        return done % n_steps == 0 or done == self.total
