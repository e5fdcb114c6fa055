"""train.py --target: adapters on some linears, planned, resumed, and continued from."""

import json
import re

import pytest
import torch
from helpers.additions import flags, make_folder
from helpers.support import assert_one_error_line, run_script, small_model, train

from finchtune.config import TrainConfig
from finchtune.files import sha256
from finchtune.training.setup import planned_model
from finchtune.weights.adapter_files import read_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("targets"))


WORDS = "--peft bone --bone_r 8 --micro_bsz 4 --save_every 2 --target att.key ffn".split()


@pytest.mark.slow
def test_a_run_with_targets_resumes_exactly_and_is_gone_on_from(folder, tmp_path):
    proj = tmp_path / "run"
    train(*flags(folder, proj, *WORDS, "--epoch_steps", 4))
    record = json.loads((proj / "rwkv-0.json").read_text())["adapter"]
    chosen = ("att.key", "ffn.key", "ffn.receptance", "ffn.value")
    pattern = "|".join(r"blocks\.\d+\." + re.escape(name) for name in chosen)
    assert record["targets"] == rf"(.+\.)?({pattern})"
    keys = {key.split(".", 2)[2] for key in read_adapter(proj / "rwkv-0.pth")}
    assert keys == {f"{name}.bone" for name in chosen}
    whole = sha256(proj / "rwkv-0.pth")
    (proj / "rwkv-0.pth").unlink()
    resumed = [*WORDS, "--epoch_steps", 4, "--resume", proj / "checkpoints/step-2"]
    train(*flags(folder, tmp_path / "resumed", *resumed))
    assert sha256(tmp_path / "resumed/rwkv-0.pth") == whole
    start = ["--peft_load", tmp_path / "resumed/rwkv-0.pth", "--epoch_steps", 1]
    train(*flags(folder, tmp_path / "more", *WORDS, *start))
    without = [word for word in WORDS if word not in ("--target", "att.key", "ffn")]
    done = run_script("train.py", *flags(folder, tmp_path / "less", *without, *start))
    assert_one_error_line(done, "adapters on other linears; give --target att.key ffn.key ffn.rec")


def test_planning_counts_what_is_chosen():
    config = TrainConfig(load_model="base.pth", peft="bone", bone_r=8, target=["att"])
    planned = planned_model(config, small_model().config, torch.float32)
    trained = [tuple(p.shape) for p in planned.parameters() if p.requires_grad]
    assert trained == [(8, 64)] * 5 * 2


def test_targets_without_an_adapter_are_refused(folder):
    done = run_script("train.py", *flags(folder, folder / "p", "--target", "att"))
    assert_one_error_line(done, "--target needs --peft")
