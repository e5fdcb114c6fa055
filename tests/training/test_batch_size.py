"""--global_bsz and --micro_bsz auto: how a step is cut, and that the cut changes no loss."""

import json

import pytest
import torch
from helpers.support import metrics, save_model, small_model, train

from finchtune.cli.flags import parse_train_flags
from finchtune.config import TrainConfig
from finchtune.errors import UserError
from finchtune.memory.estimate import estimate
from finchtune.training import batch_size
from finchtune.training.batch_size import resolve_batch_size, rows_per_process, split, trial
from finchtune.training.setup import model_plan

CPU = torch.device("cpu")


def extra_bytes(config, model):
    """What a step takes beside the weights."""
    found = estimate(config, model_plan(config, model.config, torch.float32))
    return found.total - found.parts["weights"]


def config_of(micro_bsz, global_bsz=12, **more):
    return TrainConfig(micro_bsz=micro_bsz, global_bsz=global_bsz, ctx_len=64, **more)


def test_auto_takes_the_most_rows_that_fit_and_keeps_the_global_batch(monkeypatch):
    model = small_model()
    for rows in (4,):
        need = extra_bytes(config_of(rows, accumulate_grad_batches=12 // rows), model)
        monkeypatch.setattr(batch_size, "free_memory", lambda *_, n=need: int(n / 0.9) + 9)
        chosen = resolve_batch_size(config_of(0), model, CPU, 64)
        assert (chosen.micro_bsz, chosen.accumulate_grad_batches) == (rows, 12 // rows)
    monkeypatch.setattr(batch_size, "free_memory", lambda *_: 1000)
    with pytest.raises(UserError, match="not even one row fits"):
        resolve_batch_size(config_of(0), model, CPU, 64)


def test_only_takes_one_row_at_a_time():
    chosen = resolve_batch_size(config_of(0, dataload="only"), small_model(), CPU, 64)
    assert (chosen.micro_bsz, chosen.accumulate_grad_batches) == (1, 12)


def test_a_given_micro_batch_sets_the_accumulation():
    assert resolve_batch_size(config_of(4), small_model(), CPU, 64).accumulate_grad_batches == 3
    untouched = TrainConfig(micro_bsz=5, accumulate_grad_batches=2)
    assert resolve_batch_size(untouched, small_model(), CPU, 64) is untouched


def test_what_does_not_divide_is_refused_with_what_does():
    with pytest.raises(UserError, match="`micro_bsz` 5 does not divide; choose one of 12, 6, 4"):
        split(config_of(5), 12, 5)
    with pytest.raises(UserError, match="choose a multiple of 5"):
        rows_per_process(config_of(4), 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--micro_bsz auto", "needs `global_bsz`"),
        ("--global_bsz 8 --accumulate_grad_batches 2", "drop `accumulate_grad_batches`"),
        ("--micro_bsz 0", "must be at least 1, or auto"),
        ("--micro_bsz many", "takes a whole number"),
    ],
)
def test_flags_that_contradict_each_other(words, message):
    with pytest.raises(UserError, match=message):
        parse_train_flags(["--load_model", "a", "--data_file", "b", *words.split()])


def test_the_trial_leaves_nothing_behind():
    model, config = small_model(), config_of(2)
    assert trial(config, model, estimate(config, model_plan(config, model.config, torch.float32)))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_losses_are_those_of_another_split(tmp_path):
    save_model(small_model(head_size=16), tmp_path / "base.pth")
    with (tmp_path / "text.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"text": f"{i} and {i * i} " * (1 + i % 5)}) + "\n")
    words = ["--load_model", tmp_path / "base.pth", "--data_file", tmp_path / "text.jsonl",
             "--data_type", "jsonl", "--ctx_len", 64, "--lr_init", 1e-2, "--peft", "bone",
             "--bone_r", 8, "--epoch_steps", 5]  # fmt: skip
    auto = ["--global_bsz", 8, "--micro_bsz", "auto"]
    hand = ["--micro_bsz", 2, "--accumulate_grad_batches", 4]
    for name, more in (("auto", auto), ("hand", hand)):
        done = train(*words, *more, "--proj_dir", tmp_path / name)
        assert ("micro batch: 8 x 1" in done.stdout) == (name == "auto")
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("auto", "hand")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
