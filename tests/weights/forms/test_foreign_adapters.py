"""Adapters of other software: merged, continued, and described."""

import pytest
import torch
from helpers.adapted import make_adapter
from helpers.support import metrics, train

from finchtune.tokenizer import load_tokenizer
from finchtune.weights.adapter_files import adapter_record, read_adapter
from finchtune.weights.exporting import export_adapter, export_model
from finchtune.weights.forms import FORMS, Settings
from finchtune.weights.merging import merge_files

SIZES = {"n_layer": 4, "n_embd": 64, "head_size": 16}
ADAPTERS = [form.name for form in FORMS.values() if form.read_adapter]


def exported(folder, name, method="lora", hyperparameters=None, **settings):
    base, _, adapter = make_adapter(folder, method, hyperparameters or {"r": 4, "alpha": 12.0},
                                    sizes=SIZES)  # fmt: skip
    form = FORMS[name]
    dtype = "fp32" if "fp32" in form.dtypes else "fp16"
    output = folder / f"there{form.suffix}"
    asked = Settings(dtype, "small", load_tokenizer("bytes"), **settings)
    export_adapter(base, adapter, output, form, asked)
    return base, adapter, output


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_lora_there_and_back_gives_the_same_bits(name, tmp_path):
    _, adapter, output = exported(tmp_path, name)
    before, after = read_adapter(adapter), read_adapter(output)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        rounded = tensor.half() if name == "web-rwkv" else tensor
        assert torch.equal(after[key], rounded)
    assert (
        adapter_record(output)["adapter"].items() >= {"method": "lora", "r": 4, "alpha": 12}.items()
    )


@pytest.mark.parametrize("name", ADAPTERS)
def test_merging_takes_them(name, tmp_path):
    base, adapter, output = exported(tmp_path, name, "bone", {"r": 8}, layer_names="hf_rwkv6")
    merge_files(base, adapter, tmp_path / "ours.pth")
    receipt = merge_files(base, output, tmp_path / "theirs.pth")
    assert receipt["merged"] == 32
    ours, theirs = torch.load(tmp_path / "ours.pth"), torch.load(tmp_path / "theirs.pth")
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_from_a_base_and_an_adapter_of_other_software(tmp_path):
    base, _, output = exported(tmp_path, "peft")
    export_model(base, tmp_path / "base.gguf", FORMS["gguf"],
                 Settings("fp32", "small", load_tokenizer("bytes")))  # fmt: skip
    (tmp_path / "data.jsonl").write_text('{"text": "one two three four"}\n' * 20)
    flags = {
        "load_model": tmp_path / "base.gguf",
        "peft_load": output,
        "proj_dir": tmp_path / "run",
        "data_file": tmp_path / "data.jsonl",
        **{"peft": "lora", "lora_r": 4, "lora_alpha": 12, "data_type": "jsonl", "ctx_len": 16},
        **{"micro_bsz": 2, "epoch_steps": 2, "epoch_count": 1, "tokenizer": "bytes"},
        **{"accelerator": "cpu", "precision": "fp32"},
    }
    train(*(word for flag, value in flags.items() for word in (f"--{flag}", value)))
    assert len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "rwkv-0.pth").exists() or list((tmp_path / "run").glob("rwkv-*.pth"))
