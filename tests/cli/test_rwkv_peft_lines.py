"""RWKV-PEFT's published command lines for states and long contexts, run."""

import pytest
import torch
from helpers.additions import losses, make_folder
from helpers.rwkv_peft_lines import (
    DESTRUCTIVE,
    INFCTX,
    OLD_STATES,
    STATES,
    small_line,
    whole_line,
)
from helpers.support import train

from finchtune.cli.flags import parse_train_flags
from finchtune.data.binidx import BinIdxWriter
from finchtune.errors import ConfigurationError
from finchtune.weights.tensors import read_tensors

RUN = STATES | INFCTX | OLD_STATES
FAST = ("e07c091", "5b8aac9", "e07c091 infctx")  # nf4, RWKV-7, PiSSA in chunks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bases of both generations, and tokenised documents."""
    made = make_folder(tmp_path_factory.mktemp("lines"))
    (made / "x070").mkdir()
    make_folder(made / "x070", generation=7)
    with BinIdxWriter(made / "tokens", "uint16") as writer:
        for i in range(8):
            writer.add(torch.randint(1, 256, (40 + 30 * i,)).numpy())
    return made


def test_there_are_22_with_train_type_and_one_would_destroy_a_model():
    assert len(STATES | INFCTX) == 21
    for line in RUN.values():
        config = parse_train_flags(whole_line(line))
        assert config.trains_state != config.chunked
        assert not config.trains_all
    with pytest.raises(ConfigurationError, match="`lr_init` 1 would destroy a model"):
        parse_train_flags(whole_line(DESTRUCTIVE))


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUN]
)
def test_they_train(folder, tmp_path, name):
    """Small, and on a CPU; all other flags and values are as published."""
    base = folder / ("x070/base.pth" if "x070" in RUN[name] else "base.pth")
    line = small_line(RUN[name], base, folder / "tokens", tmp_path / "out")
    train(*line, WANDB_MODE="offline")
    assert len(losses(tmp_path / "out")) == 2
    kinds = {key.rpartition(".")[2] for key in read_tensors(tmp_path / "out/rwkv-0.pth")}
    if name in INFCTX:
        assert {"lora_A", "lora_B"} < kinds
        assert any(kind.startswith("time_") for kind in kinds)
    else:
        assert kinds == {"time_state"}


COMPAT = (
    "--n_layer 2 --n_embd 64 --vocab_size 256 --ctx_len 64 --micro_bsz 2 --epoch_steps 2 "
    "--epoch_count 1 --epoch_begin 0 --epoch_save 1 --warmup_steps 10 --beta1 0.9 --beta2 0.99 "
    "--adam_eps 1e-8 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 "
    "--grad_cp 1 --compat rwkv-peft"
)
OLD = "--data_type binidx --pre_ffn 0 --head_qk 0 --my_testing x060 --dataload pad"
STATE = "--lr_init 1 --lr_final 1e-2"
BONE_CONFIG = '--bone_config {"bone_mode":"bone","bone_load":"","bone_r":16}'
CHUNKED = "--train_type infctx --chunk_ctx 32 --lr_init 2e-5 --lr_final 2e-5"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (f"{OLD} --loss_mask pad --train_type state {STATE}", {"time_state"}),
        (f"{OLD} --loss_mask pad --state_tune --fla {STATE}", {"time_state"}),
        (
            f"--data_type sft --sft_field question answer --sft_split train --data_shuffle 0 "
            f"--ctx_len 256 --op fla --train_type state {STATE}",
            {"time_state"},
        ),
        (f"{OLD} {CHUNKED} --train_parts [] --peft bone {BONE_CONFIG}", {"bone"}),
        (f"{OLD} {CHUNKED} --peft bone {BONE_CONFIG} --strategy deepspeed_stage_2", {"bone", "ln"}),
        (
            f"{OLD} {CHUNKED} --train_parts [] --lora --lora_r 8 --lora_alpha 128 --lora_dropout "
            "0.01 --lora_parts=att,ffn --lora_load rwkv-0",
            {"lora_A", "lora_B"},
        ),
        (f"{OLD} {CHUNKED}", {"emb"}),
    ],
)
def test_they_train_with_the_meanings_that_they_have_there(folder, tmp_path, words, kinds):
    data, out = folder / ("tokens" if "binidx" in words else "text.jsonl"), tmp_path / "out"
    common = ("--load_model", folder / "base.pth", "--proj_dir", out, "--data_file", data)
    done = train(*common, *COMPAT.split(), *words.split())
    assert "meanings and defaults" in done.stdout
    found = {part for name in read_tensors(out / "rwkv-0.pth") for part in name.split(".")}
    assert {kind for kind in kinds if any(kind in part for part in found)} == kinds
    assert ("time_state" in found) == ("time_state" in kinds)
    assert len(losses(out)) == 2
