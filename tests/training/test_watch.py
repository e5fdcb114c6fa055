"""Steps that were skipped or had nothing to learn: written down, told, and stopped at last."""

import dataclasses
import json

import pytest

from finchtune.config import TrainConfig
from finchtune.errors import NOT_FINITE, NotFinite
from finchtune.training.engine import StepResult
from finchtune.training.watch import StepWatch


def config(folder, **changes):
    return TrainConfig(load_model="m", data_file="d", proj_dir=str(folder), **changes)


class FiveDocuments:
    """Stands in for Data: which documents a step draws."""

    def document_ids(self, step, rank, world, micro_bsz, accumulate):
        return [step, accumulate]


def result(**changes):
    plain = StepResult(2.0, 1.0, tokens=8, targets=8, skipped=False, stopping=False)
    return dataclasses.replace(plain, **changes)


BAD = result(loss=float("nan"), grad_norm=float("inf"), skipped=True)


def test_skipped_steps_are_written_down_and_stop_a_run_at_last(tmp_path, capsys):
    def watch(start):
        return StepWatch(config(tmp_path), tmp_path, FiveDocuments(), 4, start, 100)

    first = watch(0)
    for step, step_result in enumerate((result(), BAD, result(), BAD, BAD)):
        first.check(step, step_result)
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[0] == {"step": 2, "loss": "nan", "documents": [1, 4]}
    assert "step 4 is skipped: its loss is nan" in capsys.readouterr().out
    with pytest.raises(NotFinite, match="3 steps in a row"):
        watch(5).check(5, BAD)
    watch(4).check(4, BAD)  # gone back: rows of later steps are dropped and written anew
    assert (tmp_path / "skipped.jsonl").read_text().count("\n") == 3
    watch(5).check(5, result())


def test_a_run_that_ends_in_skipped_steps_does_not_end_well(tmp_path, capsys):
    watch = StepWatch(config(tmp_path), tmp_path, FiveDocuments(), 4, 0, 2)
    watch.check(0, result())
    assert watch.status() == 0
    watch.check(1, BAD)
    assert watch.status() == NOT_FINITE
    assert "the last 1 of 2 steps were skipped" in capsys.readouterr().out
    nothing_learnt = StepWatch(config(tmp_path), tmp_path, FiveDocuments(), 4, 0, 1)
    with pytest.raises(NotFinite, match="1 steps in a row"):
        nothing_learnt.check(0, BAD)


def test_a_masked_batch_is_warned_of(tmp_path, capsys):
    watch = StepWatch(config(tmp_path), tmp_path, FiveDocuments(), 4, 0, 100)
    watch.check(0, result(loss=0.0, targets=0))
    assert "step 1: every label is masked" in capsys.readouterr().out


def test_fp16_may_search_its_loss_scale(tmp_path):
    watch = StepWatch(config(tmp_path, precision="fp16"), tmp_path, FiveDocuments(), 4, 0, 100)
    for step in range(9):
        watch.check(step, result(skipped=True, grad_norm=float("inf")))
    assert not (tmp_path / "skipped.jsonl").exists()
    watch.check(9, BAD)
    watch.check(10, BAD)
    with pytest.raises(NotFinite):
        watch.check(11, BAD)
