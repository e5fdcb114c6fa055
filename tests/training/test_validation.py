"""Held-out loss, best model, early stop and samples, in real runs."""

import json
import random
import shutil

import pytest
import torch
from helpers.support import (
    assert_one_error_line,
    metrics,
    run_script,
    save_model,
    small_model,
    train,
)

from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.config.checks import validate
from finchtune.data import load_data
from finchtune.errors import UserError
from finchtune.files import read_json, sha256
from finchtune.inference.generate import generate
from finchtune.tokenizer import load_tokenizer
from finchtune.training.schedule import Schedule
from finchtune.training.validation import Validation
from finchtune.weights.adapter_files import load_adapter
from finchtune.weights.base import load_model

WORDS = "--peft bone --bone_r 8 --micro_bsz 4 --epoch_steps 8 --save_every 4".split()
SAMPLES = ["--sample_prompt", "What is", "--sample_every", 4, "--sample_tokens", 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("validation")
    save_model(small_model(head_size=16), path / "base.pth")
    rng = random.Random(0)
    for name, n in (("text", 40), ("held", 11)):
        with (path / f"{name}.jsonl").open("w") as file:
            for _ in range(n):
                a, b = rng.randrange(99), rng.randrange(99)
                file.write(json.dumps({"text": f"What is {a} plus {b}? It is {a + b}."}) + "\n")
    return path


def plain_flags(folder, proj, *more):
    return ["--load_model", folder / "base.pth", "--data_file", folder / "text.jsonl",
            "--data_type", "jsonl", "--ctx_len", 48, "--lr_init", 1e-2, "--proj_dir", proj,
            *WORDS, *more]  # fmt: skip


def flags(folder, proj, *more):
    held_out = ["--val_file", folder / "held.jsonl", "--val_every", 2]
    return plain_flags(folder, proj, *held_out, *more)


@pytest.fixture(scope="module")
def run(folder):
    proj = folder / "run"
    train(*flags(folder, proj, *SAMPLES))
    return proj


def held_losses(proj):
    return {row["step"]: row["val_loss"] for row in metrics(proj) if "val_loss" in row}


@torch.no_grad()
def plain_loss(folder, adapter):
    """The mean loss over held.jsonl, document by document."""
    model = attach(load_model(folder / "base.pth"), "bone", r=8)
    load_adapter(model, adapter)
    total = count = 0
    for line in (folder / "held.jsonl").read_text().splitlines():
        ids = [*load_tokenizer("bytes").encode(json.loads(line)["text"]), 0][:49]
        tokens = torch.tensor([ids])
        total += model.loss(tokens[:, :-1], tokens[:, 1:])[0].item()
        count += len(ids) - 1
    return total / count


def test_the_held_out_loss_is_the_mean_over_all_its_tokens(folder, run):
    losses = held_losses(run)
    assert list(losses) == [2, 4, 6, 8]
    assert losses[8] == pytest.approx(plain_loss(folder, run / "rwkv-0.pth"), rel=1e-5)


def test_the_best_model_is_kept_and_says_what_it_is(folder, run):
    losses, record = held_losses(run), read_json(run / "rwkv-best.json")
    best = min(losses, key=losses.__getitem__)
    assert (record["step"], record["val_loss"]) == (best, losses[best])
    assert record["sha256"] == sha256(run / "rwkv-best.pth")
    assert losses[best] == pytest.approx(plain_loss(folder, run / "rwkv-best.pth"), rel=1e-5)


def test_samples_are_what_the_model_then_says(folder, run):
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    model = attach(load_model(folder / "base.pth"), "bone", r=8)
    load_adapter(model, run / "rwkv-0.pth")
    tokenizer = load_tokenizer("bytes")
    expected = list(generate(model, tokenizer.encode("What is"), 12, temperature=0))
    assert rows[-1]["text"] == tokenizer.decode(expected)


@pytest.mark.slow
def test_validation_and_samples_change_nothing_in_training(folder, run):
    proj = folder / "without"
    train(*plain_flags(folder, proj))
    assert sha256(proj / "rwkv-0.pth") == sha256(run / "rwkv-0.pth")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_give_the_held_out_losses_and_samples_of_one(folder, run, stage):
    proj = folder / f"two-{stage}"
    words = flags(folder, proj, *SAMPLES, "--devices", 2, "--strategy", f"deepspeed_stage_{stage}")
    words[words.index("--micro_bsz") + 1] = 2
    train(*words)
    assert held_losses(proj) == pytest.approx(held_losses(run), rel=1e-5)
    assert (proj / "samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


@pytest.mark.slow
def test_early_stop_outlives_an_interruption(folder, tmp_path):
    # A learning rate that grows until the model breaks: the best comes early.
    growing = ["--lr_schedule", "exp", "--lr_final", 1000, "--early_stop", 2]
    done = train(*flags(folder, tmp_path / "whole", *growing))
    losses = held_losses(tmp_path / "whole")
    best = min(losses, key=losses.__getitem__)
    assert f"no better validation loss than step {best}'s" in done.stdout
    assert max(losses) == best + 4 < 8
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    done = train(*flags(folder, resumed, *growing, "--resume", "auto"))
    assert "at step 4" in done.stdout
    assert held_losses(resumed) == losses


def test_early_stop_counts_from_the_best():
    config = TrainConfig(early_stop=2)
    validation = Validation(config, None, None, Schedule(config, 1, 5), {})
    states = []
    for step, loss in enumerate([3.0, 2.0, 2.5, 2.0, 1.0, 1.5, 1.2], start=1):
        validation.history.append((step, loss))
        states.append((validation.is_best(step), validation.exhausted))
    assert [best for best, _ in states] == [True, True, False, False, True, False, False]
    assert [stop for _, stop in states] == [False, False, False, True, False, False, True]


@pytest.mark.parametrize("dataload", ["pad", "pack", "get"])
@pytest.mark.parametrize(("world", "micro_bsz"), [(1, 1), (2, 3), (4, 5)])
def test_every_row_is_read_once_by_any_number_of_ranks(folder, dataload, world, micro_bsz):
    data = load_data(str(folder / "held.jsonl"), "jsonl", dataload, 48,
                     tokenizer=load_tokenizer("bytes"), vocab_size=256)  # fmt: skip
    found = [list(data.every_row(rank, world, micro_bsz)) for rank in range(world)]
    assert len({len(batches) for batches in found}) == 1
    labels = torch.cat([b.labels.flatten() for batches in found for b in batches])
    assert int((labels != -100).sum()) == data.describe()["trained_tokens"]
    whole = torch.cat([b.labels.flatten() for b in data.every_row(0, 1, data.n_rows)])
    assert torch.equal(labels[labels != -100].sort()[0], whole[whole != -100].sort()[0])


def test_flags_that_need_held_out_data_say_so():
    config = {"load_model": "a", "data_file": "b"}
    with pytest.raises(UserError, match="`val_every` needs held-out data"):
        validate(TrainConfig(**config, val_every=3))
    with pytest.raises(UserError, match="choose one"):
        validate(TrainConfig(**config, val_file="c", val_split=0.1))


@pytest.mark.slow
def test_a_missing_validation_file_is_one_line(folder, tmp_path):
    words = flags(folder, tmp_path / "none")
    words[words.index("--val_file") + 1] = tmp_path / "nothing.jsonl"
    assert_one_error_line(run_script("train.py", *words), "nothing.jsonl")
