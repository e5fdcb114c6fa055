"""train.py as people start it: alone, under several processes, interrupted and resumed."""

import json
import shutil

import pytest
import torch
from helpers.additions import flags, losses, make_folder
from helpers.support import (
    assert_one_error_line,
    metrics,
    relative_error,
    run_script,
    rwkv_package_logits,
    train,
)

from finchtune.adapters import attach
from finchtune.files import sha256
from finchtune.weights.adapter_files import load_adapter
from finchtune.weights.base import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def bone_run(folder):
    """A finished run with Bone: 6 steps of 8 rows, a checkpoint every 3."""
    proj = folder / "bone"
    words = "--peft bone --bone_r 8 --micro_bsz 8 --epoch_steps 6 --save_every 3".split()
    train(*flags(folder, proj, *words))
    return proj


def test_a_run_leaves_adapter_record_metrics_and_picture(folder, bone_run):
    rows = metrics(bone_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "lr", "grad_norm", "tokens", "tokens_per_s", "epoch", "memory_mb"):
        assert all(row[key] >= 0 for row in rows), key
    assert rows[-1]["loss"] < rows[0]["loss"]
    tensors = torch.load(bone_run / "rwkv-0.pth", weights_only=True)
    assert len(tensors) == 16
    assert tensors["blocks.1.ffn.value.bone"].shape == (8, 64)
    record = json.loads((bone_run / "rwkv-0.json").read_text())
    assert record["adapter"] == record["adapter"] | {"method": "bone", "r": 8}
    assert record["base"]["sha256"] == sha256(folder / "base.pth")
    assert record["step"] == 6
    assert (bone_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_merged_run_gives_the_trained_models_logits_elsewhere(folder, bone_run, tmp_path):
    done = run_script(
        "merge/merge_bone.py",
        *("--base_model", folder / "base.pth", "--peft_checkpoint", bone_run / "rwkv-0.pth"),
        *("--output", tmp_path / "merged.pth"),
    )
    assert done.returncode == 0, done.stderr
    model = attach(load_model(folder / "base.pth"), "bone", r=8)
    load_adapter(model, bone_run / "rwkv-0.pth")
    tokens = torch.randint(1, 256, (1, 30))
    expected = rwkv_package_logits(tmp_path / "merged.pth", tokens[0].tolist())
    assert relative_error(model(tokens)[0][0], expected) < 1e-4


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_two_processes_give_the_losses_of_one(folder, bone_run, stage):
    proj = folder / f"two-{stage}"
    words = "--peft bone --bone_r 8 --micro_bsz 4 --epoch_steps 6 --devices 2".split()
    train(*flags(folder, proj, *words, "--strategy", f"deepspeed_stage_{stage}"))
    assert losses(proj) == pytest.approx(losses(bone_run), rel=1e-5)


def test_resuming_repeats_the_uninterrupted_run_exactly(folder, bone_run):
    proj = folder / "resumed"
    shutil.copytree(bone_run, proj)
    final = sha256(proj / "rwkv-0.pth"), sha256(proj / "checkpoints/step-6/state.pth")
    shutil.rmtree(proj / "checkpoints/step-6")
    (proj / "rwkv-0.pth").unlink()
    words = "--peft bone --bone_r 8 --micro_bsz 8 --epoch_steps 6 --save_every 3".split()
    done = train(*flags(folder, proj, *words, "--resume", "auto"))
    assert "step-3 at step 3" in done.stdout
    assert (
        sha256(proj / "rwkv-0.pth"),
        sha256(proj / "checkpoints/step-6/state.pth"),
    ) == final
    assert losses(proj) == losses(bone_run)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("strategy", ["_1", "_2", "_3", "_2_offload", "_3_offload"])
def test_resuming_with_another_number_of_processes_and_stage(folder, bone_run, strategy, devices):
    proj = folder / f"other{strategy}-{devices}"
    words = f"--peft bone --bone_r 8 --micro_bsz {8 // devices} --devices {devices}".split()
    words += ["--epoch_steps", "6", "--strategy", f"deepspeed_stage{strategy}"]
    train(*flags(folder, proj, *words, "--resume", bone_run / "checkpoints/step-3"))
    assert losses(proj) == pytest.approx(losses(bone_run)[3:], rel=1e-5)


def test_resuming_another_configuration_is_refused_by_name(folder, bone_run):
    words = "--peft bone --bone_r 8 --micro_bsz 4 --epoch_steps 6 --resume auto".split()
    done = run_script("train.py", *flags(folder, bone_run, *words, "--ctx_len", 32))
    assert_one_error_line(done, "--ctx_len 64 -> 32", "global_batch 8 -> 4")


@pytest.mark.slow
def test_started_by_torchrun_and_by_deepspeed(folder, bone_run):
    words = "--peft bone --bone_r 8 --micro_bsz 4 --epoch_steps 6".split()
    for module, arguments in (
        ("torch.distributed.run", ["--standalone", "--nproc_per_node", "2"]),
        ("deepspeed.launcher.runner", ["--num_gpus", "2", "--master_port", "29677"]),
    ):
        proj = folder / module
        launcher = ["-m", module, *arguments]
        train(*flags(folder, proj, *words), launcher=launcher, DS_ACCELERATOR="cpu")
        assert losses(proj) == pytest.approx(losses(bone_run), rel=1e-5)


@pytest.mark.slow
def test_wandb_offline(folder):
    words = "--peft bone --bone_r 8 --micro_bsz 8 --epoch_steps 2 --wandb finch".split()
    train(*flags(folder, folder / "wandb", *words), WANDB_MODE="offline")
    assert list((folder / "wandb" / "wandb").glob("offline-run-*/*.wandb"))


def test_bf16_masks_parts_windows_and_epochs(folder):
    proj = folder / "mixed"
    words = "--peft bat --bat_r 8 --precision bf16 --dataload get --train_parts ln_out".split()
    words += "--epoch_steps 2 --epoch_count 5 --epoch_begin 5 --epoch_save 2".split()
    words += "--warmup_steps 2".split()
    words += "--accumulate_grad_batches 2 --strategy deepspeed_stage_2".split()
    train(*flags(folder, proj, *words))
    steps = {"rwkv-6": 4, "rwkv-8": 8, "rwkv-9": 10}  # every second epoch, and the last
    files = [f"{name}.{suffix}" for name in steps for suffix in ("json", "pth")]
    files += "config.yaml data_cache loss.png metrics.jsonl report.html run.json".split()
    assert sorted(path.name for path in proj.iterdir()) == sorted(files)
    for name, step in steps.items():
        record = json.loads((proj / f"{name}.json").read_text())
        assert (record["step"], record["sha256"]) == (step, sha256(proj / f"{name}.pth"))
    assert [row["epoch"] for row in metrics(proj)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    tensors = torch.load(proj / "rwkv-9.pth", weights_only=True)
    assert tensors["ln_out.weight"].shape == (64,)
    assert not torch.equal(tensors["ln_out.weight"], load_model(folder / "base.pth").ln_out.weight)
    assert metrics(proj)[0]["lr"] == pytest.approx(1e-4)


MISTAKES = {
    "no such model": (["--load_model", "missing.pth"], ["missing.pth: no such file"]),
    "no such data": (["--data_file", "missing.jsonl"], ["missing.jsonl"]),
    "unknown flag": (["--bone_rr", "8"], ["unknown flag --bone_rr; did you mean --bone_r?"]),
    "rank": (["--peft", "bat", "--bat_r", "48"], ["48", "64"]),
    "head size": (["--head_size_a", "64"], ["--head_size_a 64 contradicts", "16"]),
    "part, which both processes find": (
        ["--peft", "bone", "--train_parts", "nose", "--devices", "2"],
        ["--train_parts nose: no parameter"],
    ),
    "code": (["--load_model", "{folder}/evil.pth"], ["could run code"]),
    "existing run": (["--proj_dir", "{folder}/bone"], ["already holds a run", "--resume auto"]),
    "fp16": (["--precision", "fp16", "--accelerator", "cpu"], ["fp16 needs a GPU"]),
    "empty": (["--data_file", "{folder}/empty.jsonl"], ["empty.jsonl"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(folder, bone_run, name):
    (folder / "empty.jsonl").touch()
    torch.save({"emb.weight": print}, folder / "evil.pth")
    words, parts = MISTAKES[name]
    proj = folder / "untouched"
    words = [word.format(folder=folder) for word in words]
    assert_one_error_line(run_script("train.py", *flags(folder, proj, *words)), *parts)
    assert not proj.exists()


@pytest.mark.slow
def test_torchrun_shows_a_mistake_in_the_flags_once(folder):
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    done = run_script("train.py", *flags(folder, "x", "--bone_rr", 8), launcher=launcher)
    assert done.returncode
    assert done.stderr.count("error: unknown flag --bone_rr; did you mean --bone_r?") == 1
