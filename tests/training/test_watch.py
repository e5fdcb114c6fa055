"""Steps that were skipped or had nothing to learn: written down, told, and stopped at last."""

import dataclasses
import json

import pytest

from finchtune.config import TrainConfig
from finchtune.errors import NOT_FINITE, NotFinite
from finchtune.training.engine import StepResult
from finchtune.training.schedule import Schedule
from finchtune.training.watch import StepWatch


def watch_of(folder, start=0, total=100, **changes):
    config = TrainConfig(load_model="m", data_file="d", epoch_steps=total, epoch_count=1, **changes)
    return StepWatch(config, folder, FiveDocuments(), Schedule(config, 4, 0), start)


class FiveDocuments:
    """Stands in for Data: which documents a step draws."""

    def document_ids(self, step, rank, world, micro_bsz, accumulate):
        return [step, accumulate]


def result(**changes):
    plain = StepResult(2.0, 1.0, tokens=8, targets=8, skipped=False, stopping=False)
    return dataclasses.replace(plain, **changes)


BAD = result(loss=float("nan"), grad_norm=float("inf"), skipped=True)


def test_skipped_steps_are_written_down_and_stop_a_run_at_last(tmp_path, capsys):
    first = watch_of(tmp_path)
    for step, step_result in enumerate((result(), BAD, result(), BAD, BAD)):
        first.check(step, step_result)
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[0] == {"step": 2, "loss": "nan", "documents": [1, 4]}
    assert "step 4 is skipped: its loss is nan" in capsys.readouterr().out
    with pytest.raises(NotFinite, match="3 steps in a row"):
        watch_of(tmp_path, 5).check(5, BAD)
    # Gone back: rows of later steps are dropped and written anew.
    watch_of(tmp_path, 4).check(4, BAD)
    assert (tmp_path / "skipped.jsonl").read_text().count("\n") == 3
    watch_of(tmp_path, 5).check(5, result())


def test_a_run_that_ends_in_skipped_steps_does_not_end_well(tmp_path, capsys):
    watch = watch_of(tmp_path, total=2)
    watch.check(0, result())
    assert watch.status() == 0
    watch.check(1, BAD)
    assert watch.status() == NOT_FINITE
    assert "the last 1 of 2 steps were skipped" in capsys.readouterr().out
    nothing_learnt = watch_of(tmp_path, total=1)
    with pytest.raises(NotFinite, match="1 steps in a row"):
        nothing_learnt.check(0, BAD)


def test_a_masked_batch_is_warned_of(tmp_path, capsys):
    watch = watch_of(tmp_path)
    watch.check(0, result(loss=0.0, targets=0))
    assert "step 1: every label is masked" in capsys.readouterr().out


def test_fp16_may_search_its_loss_scale(tmp_path):
    watch = watch_of(tmp_path, precision="fp16")
    for step in range(9):
        watch.check(step, result(skipped=True, grad_norm=float("inf")))
    assert not (tmp_path / "skipped.jsonl").exists()
    watch.check(9, BAD)
    watch.check(10, BAD)
    with pytest.raises(NotFinite):
        watch.check(11, BAD)
