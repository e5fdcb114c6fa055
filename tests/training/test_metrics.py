"""metrics.jsonl, the progress line and TensorBoard."""

import pytest

from finchtune.config import TrainConfig
from finchtune.config.checks import validate
from finchtune.errors import UserError
from finchtune.training.metrics import Metrics, read_metrics


def row(step):
    return {"step": step, "epoch": 0, "loss": 2.0 / step, "lr": 1e-4, "grad_norm": 0.5,
            "tokens": 64, "tokens_per_s": 640.0, "memory_mb": 700, "seconds": 0.1}  # fmt: skip


def test_a_plain_line_says_all_that_one_wants_to_know(tmp_path, capsys):
    log = Metrics(tmp_path, total=2, start=0, config={})
    for step in (1, 2):
        log.log(row(step))
    log.close()
    last = capsys.readouterr().out.splitlines()[-1]
    for part in ("step 2/2", "epoch 0", "loss 1.0000", "lr 1.00e-04", "640 tok/s", "700 MB",
                 "0:00 left"):  # fmt: skip
        assert part in last
    assert read_metrics(tmp_path / "metrics.jsonl") == [row(1), row(2)]


def test_tensorboard_gets_every_number_and_forgets_steps_that_come_again(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = Metrics(tmp_path, total=4, start=start, config={"tensorboard": True})
        for step in steps:
            log.log(row(step))
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == row(1).keys() - {"step"}
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([2, 1, 2 / 3, 0.5])


def test_a_logger_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("finchtune.config.checks.find_spec", lambda name: None)
    config = TrainConfig(load_model="a", data_file="b", tensorboard=True)
    with pytest.raises(UserError, match="pip install tensorboard"):
        validate(config)
