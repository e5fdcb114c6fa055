"""merge/convert_adapter.py: between our adapter files and Hugging Face peft's."""

import pytest
import torch
from helpers.support import REPOSITORY, save_model, small_model

from finchtune.adapters import attach
from finchtune.files import read_json, sha256
from finchtune.weights.adapter_files import adapter_keys, adapter_record, save_adapter
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.tensors import write_tensors

SCRIPT = REPOSITORY / "merge/convert_adapter.py"


@pytest.fixture
def base(tmp_path):
    return save_model(small_model(), tmp_path / "base.pth")


def adapter_file(base, method, record=True, **settings):
    """An adapter of `base` as train.py leaves it, or without its JSON."""
    model = attach(load_model(base), method, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {key: model.state_dict()[name] for name, key in adapter_keys(model).items()}
    path = base.with_name("rwkv-0.pth")
    if record:
        spec = {"adapter": model.adapter_spec, "base": {"file": base.name, "sha256": sha256(base)}}
        save_adapter(tensors, spec, path)
    else:
        write_tensors(tensors, path)
    return path


def test_there_and_back_in_the_names_of_hugging_faces_rwkv6(base, tmp_path, run):
    adapter = adapter_file(base, "bone", r=8)
    names, folder = ("--layer_names", "hf_rwkv6"), tmp_path / "peft"
    assert run("--input", adapter, "--output", folder, *names)[0] == 0
    modules = read_json(folder / "adapter_config.json")["target_modules"]
    assert len(modules) == 16
    assert "rwkv.blocks.1.feed_forward.value" in modules
    back = ("--input", folder, "--output", tmp_path / "back.pth")
    assert "give --base_model" in run(*back, *names)[2]
    assert "belongs to no layer of" in run(*back, "--base_model", base)[2]
    assert run(*back, "--base_model", base, *names)[0] == 0
    before, after = torch.load(adapter), torch.load(tmp_path / "back.pth")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert adapter_record(tmp_path / "back.pth")["adapter"] == {"method": "bone", "r": 8}
    merge_files(base, adapter, tmp_path / "a.pth")
    merge_files(base, tmp_path / "back.pth", tmp_path / "b.pth")
    one, two = torch.load(tmp_path / "a.pth"), torch.load(tmp_path / "b.pth")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "exists already" in run(*back, "--base_model", base, *names)[2]


def test_files_of_other_software_are_converted_when_alpha_is_given(base, tmp_path, run):
    adapter = adapter_file(base, "lora", record=False, r=4, alpha=12)
    words = ("--input", adapter, "--output", tmp_path / "peft")
    status, _, error = run(*words)
    assert status == 2
    assert "give --lora_alpha" in error
    assert run(*words, "--lora_alpha", 12, "--rslora", 0, "--quant", "none")[0] == 0
    config = read_json(tmp_path / "peft" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (4, 12)


def test_whole_models_and_row_mode_are_refused(base, tmp_path, run):
    status, _, error = run("--input", base, "--output", tmp_path / "peft")
    assert status == 2
    assert "a fully fine-tuned model, not an adapter" in error
    bat = adapter_file(base, "bat", r=8)
    status, _, error = run("--input", bat, "--output", tmp_path / "peft")
    assert status == 2
    assert "peft has no form for bat in row mode; merge the adapter instead" in error
    assert not (tmp_path / "peft").exists()
