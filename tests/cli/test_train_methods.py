"""train.py with every method and precision of the base, in full, and on mixed data."""

import json
import shutil

import pytest
import torch
from helpers.additions import flags, losses, make_folder
from helpers.support import relative_error, train

from finchtune.adapters import METHODS, attach
from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.weights.adapter_files import load_adapter
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.unmerging import unmerge_files
from finchtune.weights.verifying import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_tuning_in_two_processes_gives_the_losses_of_one(folder, stage):
    for devices, micro_bsz in ((1, 8), (2, 4)):
        words = f"--micro_bsz {micro_bsz} --epoch_steps 6 --devices {devices}".split()
        words += ["--strategy", f"deepspeed_stage_{stage}", "--overwrite", "1"]
        train(*flags(folder, folder / f"full-{devices}", *words))
    assert losses(folder / "full-2") == pytest.approx(losses(folder / "full-1"), rel=1e-5)
    tensors = torch.load(folder / "full-2" / "rwkv-0.pth", weights_only=True)
    assert list(tensors) == list(torch.load(folder / "base.pth"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_tuning_goes_on_with_another_number_of_processes(folder, stage):
    """1 -> 2 -> 1 -> 3 processes, two steps each, end as one process does alone."""
    words = f"--epoch_steps 8 --save_every 2 --weight_decay 0.1 --strategy deepspeed_stage_{stage}"

    def run(processes, *more):
        proj = folder / f"full-{stage}-{len(list(folder.glob(f'full-{stage}-*')))}"
        rows = ["--devices", processes, "--micro_bsz", 6 // processes]
        train(*flags(folder, proj, *words.split(), *rows, *more))
        return proj

    whole = earlier = run(1)
    expected = torch.load(whole / "checkpoints/step-8/state.pth")
    for step, processes in ((2, 2), (4, 1), (6, 3)):
        earlier = run(processes, "--resume", earlier / f"checkpoints/step-{step}")
        assert losses(earlier) == pytest.approx(losses(whole)[step:], rel=1e-5)
        state = torch.load(earlier / "checkpoints/step-8/state.pth")
        assert state["adam_step"] == 8
        for part in ("trained", "exp_avg", "exp_avg_sq"):
            for name, tensor in state[part].items():
                assert relative_error(tensor, expected[part][name]) < 1e-3, (part, name)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "bone"])
def test_every_method_trains_and_merges(folder, tmp_path, method):
    rank = {"bat": "--bat_r 8", "pissa": "--pissa_r 4", "disha": "--disha_r1 8 --disha_r2 8"}
    rank |= dict.fromkeys(("lora", "olora", "dora", "lora_ga"), "--lora_r 4")
    words = f"--peft {method} {rank.get(method, '')} --micro_bsz 8 --epoch_steps 4".split()
    words += ["--lr_init", "2e-3"]
    train(*flags(folder, tmp_path / "run", *words))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    adapter, merged = tmp_path / "run" / "rwkv-0.pth", tmp_path / "merged.pth"
    merge_files(folder / "base.pth", adapter, merged)
    spec = json.loads(adapter.with_suffix(".json").read_text())["adapter"]
    model = attach(load_model(folder / "base.pth"), init=False, **spec)
    load_adapter(model, adapter)
    tokens = torch.randint(1, 256, (1, 30))
    assert relative_error(load_model(merged)(tokens)[0], model(tokens)[0]) < 1e-4


@pytest.mark.parametrize("stage", [1, 3])
def test_lora_ga_starts_alike_in_one_process_and_in_two(folder, tmp_path, stage):
    for devices, micro_bsz in ((1, 4), (2, 4)):
        words = f"--peft lora_ga --lora_r 4 --micro_bsz {micro_bsz} --epoch_steps 3".split()
        words += f"--accumulate_grad_batches {2 // devices} --devices {devices}".split()
        words += ["--strategy", f"deepspeed_stage_{stage}", "--lora_plus_ratio", "4"]
        train(*flags(folder, tmp_path / str(devices), *words))
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_two_processes_train_on_a_packed_mixture_of_text_from_one_cache(folder, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text((folder / "text.jsonl").read_text() + '{"question": 1}\n')
    words = [
        *("--data_file", f"{folder / 'text.jsonl'}:0.7,{pairs}:0.3", "--data_type", "sft"),
        *"--sft_field question answer --loss_mask qa --dataload pack --on_bad skip".split(),
        *"--sft_split train --data_shuffle 1 --peft bone --bone_r 8 --devices 2".split(),
        *("--micro_bsz 2 --ctx_len 512 --epoch_steps 4 --data_cache".split()),
        tmp_path / "cache",
    ]
    train(*flags(folder, tmp_path / "first", *words))
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(entries) == 10
    train(*flags(folder, tmp_path / "second", *words))
    assert entries == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert losses(tmp_path / "first")[-1] < losses(tmp_path / "first")[0]
    record = json.loads((tmp_path / "first" / "rwkv-0.json").read_text())
    assert record["data"]["skipped_records"] == 1
    assert record["data"]["padding_waste"] < 0.3


QUANT = "--peft pissa --pissa_r 4 --micro_bsz 4 --epoch_steps 4 --save_every 2 --quant nf4".split()


def test_a_quantised_base_resumes_exactly_and_merges(folder, tmp_path):
    proj, merged = tmp_path / "run", tmp_path / "merged.pth"
    train(*flags(folder, proj, *QUANT))
    final = sha256(proj / "rwkv-0.pth"), sha256(proj / "checkpoints/step-4/state.pth")
    shutil.rmtree(proj / "checkpoints/step-4")
    (proj / "rwkv-0.pth").unlink()
    train(*flags(folder, proj, *QUANT, "--resume", "auto"))
    assert (
        sha256(proj / "rwkv-0.pth"),
        sha256(proj / "checkpoints/step-4/state.pth"),
    ) == final
    spec = json.loads((proj / "rwkv-0.json").read_text())["adapter"]
    assert spec["quant"] == "nf4"
    frozen = torch.load(proj / "checkpoints/step-4/state.pth")["frozen"]
    assert all(".adapter.init_lora_" in name for name in frozen), "the base's codes are not in it"

    def check(path, spec):
        print(verify(folder / "base.pth", torch.load(proj / "rwkv-0.pth"), spec, path, "A text."))

    merge_files(folder / "base.pth", proj / "rwkv-0.pth", merged, check=check)
    plain = attach(load_model(folder / "base.pth"), init=False, **(spec | {"quant": None}))
    load_adapter(plain, proj / "rwkv-0.pth")
    tokens = torch.randint(1, 256, (1, 30))
    assert relative_error(load_model(merged)(tokens)[0], plain(tokens)[0]) > 1e-3
    with pytest.raises(UserError, match="was made of a quantised base"):
        unmerge_files(merged, proj / "rwkv-0.pth", tmp_path / "back.pth")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_quantised_base_under_every_stage(folder, tmp_path, stage):
    for devices, accumulate in ((1, 2), (2, 1)):
        words = [*QUANT, "--devices", devices, "--accumulate_grad_batches", accumulate]
        words += ["--strategy", f"deepspeed_stage_{stage}"]
        train(*flags(folder, tmp_path / str(devices), *words))
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
