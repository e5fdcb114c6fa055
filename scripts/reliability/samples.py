"""Good files of every kind that finchtune reads, in one folder, small."""

import json
import shutil
from pathlib import Path

import torch
from harness import run_verb
from helpers.adapted import make_adapter
from helpers.byte_level_bpe import write_byte_level_bpe

from finchtune.data import templates
from finchtune.data.binidx import BinIdxWriter
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.adapter_files import read_adapter
from finchtune.weights.base import read_base
from finchtune.weights.forms import FORMS, Settings
from finchtune.weights.merging import merge_files
from finchtune.weights.tensors import write_tensors

SIZES = {"n_layer": 4, "n_embd": 32, "head_size": 8}  # web-rwkv takes no fewer layers
LORA = {"r": 4, "alpha": 16.0}
TRAIN = (
    *("train", "--load_model", "base.pth", "--data_file", "text.jsonl", "--data_type", "jsonl"),
    *("--peft", "bone", "--bone_r", "8", "--ctx_len", "32", "--micro_bsz", "2", "--save_every"),
    *("1", "--epoch_steps", "3", "--lr_init", "1e-3", "--accelerator", "cpu", "--proj_dir", "run"),
)
"""A run of three steps with a checkpoint at each."""


def make_samples(folder: Path) -> Path:
    """Write every file; returns the folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    make_adapter(folder, "lora", LORA, sizes=SIZES)  # base.pth, rwkv-0.pth, rwkv-0.json
    shutil.copy(folder / "rwkv-0.pth", folder / "recorded.pth")  # its record is in it
    write_tensors(read_adapter(folder / "rwkv-0.pth"), folder / "bare.pth")
    write_forms(folder)
    merge_files(folder / "base.pth", folder / "rwkv-0.pth", folder / "merged.pth")
    write_text(folder)
    write_data(folder)
    end = run_verb(TRAIN, folder)
    assert end.status == 0, end.err
    for name in ("rwkv-0.pth", "rwkv-0.json"):  # what is resumed writes it again
        (folder / "run" / name).unlink()
    shutil.rmtree(folder / "run/checkpoints/step-3")
    return folder


def write_forms(folder: Path) -> None:
    """The base in every form, and the adapter in those that have adapters by themselves."""
    tokenizer, template = load_tokenizer("bytes"), templates.get("chat")
    for form in FORMS.values():
        dtype = "fp32" if "fp32" in form.dtypes else "fp16"
        settings = Settings(dtype, "small", tokenizer, template)
        if form.write and form.name != "pth":
            path = folder / f"{form.name}{form.suffix}"
            if not form.suffix:
                path.mkdir()
            form.write(read_base(folder / "base.pth"), path, settings)
        if form.write_adapter:
            words = ("export", "--model", "base.pth", "--peft_checkpoint", "rwkv-0.pth")
            words += ("--adapter_only", "1", "--to", form.name, "--dtype", dtype)
            end = run_verb((*words, "--output", f"lora-{form.name}{form.suffix}"), folder)
            assert end.status == 0, end.err


def write_text(folder: Path) -> None:
    """Records, a configuration, answers."""
    rows = [{"text": f"{a} plus {b} is {a + b}."} for a in range(4) for b in range(4)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"What is {a} plus 1?", "answer": f"#### {a + 1}"} for a in range(6)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"load_model": "base.pth", "data_file": "text.jsonl", "data_type": "jsonl"}
    config |= {"ctx_len": 32, "peft": "lora", "lora_r": 4, "lr_init": 0.001, "train_parts": ["ln"]}
    (folder / "flags.yaml").write_text(json.dumps(config, indent=0))


def write_data(folder: Path) -> None:
    """A pair with a mask and a note of its tokenizer, a pair without, and a tokenizer.json."""
    words = ("prepare", "--input", "qa.jsonl", "--output", "data", "--tokenizer", "bytes")
    end = run_verb((*words, "--sft_field", "question", "answer", "--loss_mask", "qa"), folder)
    assert end.status == 0, end.err
    with BinIdxWriter(folder / "bare", "<u2") as writer:
        for document in ([5, 6, 7, 0], [], [200, 0], [1]):
            writer.add(document)
    write_byte_level_bpe(folder / "tokenizer.json", 262, "two plus two is four\n" * 5)
