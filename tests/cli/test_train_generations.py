"""train.py on a base of the second generation: resumed, shared, in chunks, quantised, merged."""

import shutil

import pytest
import torch
from helpers.additions import flags, losses, make_folder
from helpers.support import relative_error, rwkv_package_logits, train

from finchtune.adapters import attach
from finchtune.files import sha256
from finchtune.weights.adapter_files import load_adapter
from finchtune.weights.base import load_model
from finchtune.weights.description import describe
from finchtune.weights.merging import merge_files
from finchtune.weights.state_files import set_states
from finchtune.weights.tensors import read_tensors

WORDS = "--my_testing x070 --peft bone --bone_r 8 --micro_bsz 8 --epoch_steps 6".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("seven"), 7, dim_unused_lora=3)


@pytest.fixture(scope="module")
def bone_run(folder):
    """A finished run with Bone: 6 steps of 8 rows, a checkpoint every 3."""
    train(*flags(folder, "bone", *WORDS, "--save_every", 3))
    return folder / "bone"


def test_a_run_learns_and_merges_into_what_other_runtimes_read(folder, bone_run):
    assert losses(bone_run)[-1] < losses(bone_run)[0]
    adapter, merged = bone_run / "rwkv-0.pth", folder / "merged.pth"
    assert len(read_tensors(adapter)) == 2 * 6
    assert describe(adapter)["method"] == "bone: r 8"  # on all linears that there are
    merge_files(folder / "base.pth", adapter, merged)
    assert list(read_tensors(merged)) == list(read_tensors(folder / "base.pth"))
    model = attach(load_model(folder / "base.pth"), "bone", r=8)
    load_adapter(model, adapter)
    tokens = torch.randint(1, 256, (1, 30))
    expected = rwkv_package_logits(merged, tokens[0].tolist())
    assert relative_error(model(tokens)[0][0], expected) < 1e-4


def test_resuming_repeats_the_uninterrupted_run_exactly(folder, bone_run):
    resumed = folder / "resumed"
    shutil.copytree(bone_run, resumed)
    final = sha256(resumed / "rwkv-0.pth")
    shutil.rmtree(resumed / "checkpoints/step-6")
    (resumed / "rwkv-0.pth").unlink()
    train(*flags(folder, "resumed", *WORDS, "--save_every", 3, "--resume", "auto"))
    assert sha256(resumed / "rwkv-0.pth") == final


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_3"])
def test_two_processes_and_shared_contexts_give_the_losses_of_one(folder, bone_run, strategy):
    common = [*WORDS, "--devices", 2, "--strategy", strategy]
    rows = common.copy()
    rows[rows.index("--micro_bsz") + 1] = "4"
    train(*flags(folder, f"rows-{strategy}", *rows))
    train(*flags(folder, f"contexts-{strategy}", *common, "--context_parallel", 2))
    for name in ("rows", "contexts"):
        found = losses(folder / f"{name}-{strategy}")
        assert found == pytest.approx(losses(bone_run), rel=1e-4)


@pytest.mark.slow
def test_chunks_train_as_the_whole_context_does(folder, bone_run):
    chunks = "--train_type infctx --chunk_ctx 16".split()
    train(*flags(folder, "chunks", *WORDS, *chunks))
    assert losses(folder / "chunks") == pytest.approx(losses(bone_run), rel=1e-4)


def test_states_are_trained_merged_and_used(folder):
    words = "--micro_bsz 8 --epoch_steps 6 --train_type state --lr_init 0.1".split()
    train(*flags(folder, "state", *words))
    assert losses(folder / "state")[-1] < losses(folder / "state")[0]
    path, merged = folder / "state/rwkv-0.pth", folder / "with-state.pth"
    merge_files(folder / "base.pth", path, merged, methods=("state",))
    model, plain = load_model(folder / "base.pth"), load_model(folder / "base.pth")
    set_states(model, path)
    tokens = torch.randint(1, 256, (1, 30))
    found = load_model(merged)(tokens)[0]
    assert torch.equal(found, model(tokens)[0])
    assert relative_error(found, plain(tokens)[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--peft none --lr_init 2e-3",
        "--peft bat --bat_r 8 --grad_cp 2 --dataload pack",
        "--peft lora --lora_r 4 --quant nf4 --grad_cp 1",
        "--peft pissa --pissa_r 4 --precision bf16",
        "--peft dora --lora_r 4",
    ],
)
def test_every_way_of_training_learns(folder, tmp_path, words):
    words = ["--micro_bsz", 8, "--epoch_steps", 6, *words.split()]
    train(*flags(folder, tmp_path / "run", *words))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    if "none" in words:
        tensors = read_tensors(tmp_path / "run/rwkv-0.pth")
        assert list(tensors) == list(read_tensors(folder / "base.pth"))
