"""What is due after which step."""

import pytest

from finchtune.config import TrainConfig
from finchtune.training.schedule import Schedule

DUE = {
    "validates": ({"val_every": 4}, [4, 8, 9]),
    "samples": ({"sample_every": 5}, [5, 9]),
    "saves_checkpoint": ({"save_every": 2}, [2, 4, 6, 8, 9]),
    "saves_epoch": ({"epoch_save": 2}, [6, 9]),
}
BY_DEFAULT = {"saves_checkpoint": []}


@pytest.mark.parametrize("name", DUE)
def test_what_is_due_in_three_epochs_of_three_steps(name):
    changes, expected = DUE[name]
    for settings, steps in ((changes, expected), ({}, BY_DEFAULT.get(name, [3, 6, 9]))):
        config = TrainConfig(epoch_steps=3, epoch_count=3, **settings)
        due = getattr(Schedule(config, global_batch=1, n_rows=1), name)
        assert [done for done in range(1, 10) if due(done)] == steps


def test_an_epoch_is_one_pass_over_the_rows():
    schedule = Schedule(TrainConfig(epoch_count=2), global_batch=4, n_rows=10)
    assert schedule.total == 6
    assert [schedule.epoch(done) for done in range(1, 7)] == [0, 0, 0, 1, 1, 1]


def test_the_learning_rate_stays_unless_another_is_given_for_the_end():
    for settings, last in (({}, 1e-3), ({"lr_final": 1e-5}, 1e-5)):
        config = TrainConfig(epoch_steps=5, lr_init=1e-3, lr_schedule="linear", **settings)
        schedule = Schedule(config, global_batch=1, n_rows=1)
        assert schedule.learning_rate(0) == pytest.approx(1e-3)
        assert schedule.learning_rate(schedule.total - 1) == pytest.approx(last)
