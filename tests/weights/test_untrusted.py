"""Base files that are no base: every command refuses what the loader refuses, in one line."""

import pytest
import torch
from helpers.adapted import make_adapter
from helpers.support import small_model

from finchtune.errors import UserError
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.tensors import write_tensors
from finchtune.weights.unmerging import unmerge_files

KEY = "blocks.0.att.key.weight"


def with_nan(weight):
    return torch.where(torch.arange(weight.numel()).view_as(weight) == 7, torch.nan, weight)


BAD = {
    "integers": ({KEY: lambda w: w.to(torch.int8)}, f"{KEY} is a tensor of int8"),
    "complex": ({KEY: lambda w: w.to(torch.complex64)}, f"{KEY} is a tensor of complex64"),
    "sparse": ({KEY: lambda w: w.to_sparse()}, f"{KEY} is a sparse tensor of float32"),
    "NaN": ({KEY: with_nan}, f"{KEY} holds NaN or infinity"),
    "infinity": ({KEY: lambda w: w * torch.inf}, f"{KEY} holds NaN or infinity"),
    "a missing tensor": ({KEY: lambda w: None}, f"{KEY} is missing"),
    "another shape": ({KEY: lambda w: w[:8]}, f"{KEY} is [8, 64] instead of [64, 64]"),
    "a state": (
        {"blocks.0.att.time_state": torch.zeros(8, 8, 8)},
        "blocks.1.att.time_state is missing",
    ),
    "a far layer": (
        {f"blocks.1{'0' * 30}.att.key.weight": torch.zeros(2)},
        "has 3 layers, one of them numbered '10000000000000000000'",
    ),
    "a nameless layer": ({"blocks.x.att.key.weight": torch.zeros(2)}, "one of them numbered 'x'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_load_does_not_merge(tmp_path, kind):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8}, record=False)
    weights, (changes, message) = torch.load(base), BAD[kind]
    for name, change in changes.items():
        weights[name] = change(weights[name]) if callable(change) else change
    torch.save({name: t for name, t in weights.items() if t is not None}, base)
    with pytest.raises(UserError) as error:
        load_model(base)
    assert message in str(error.value)
    assert "base.pth" in str(error.value)
    with pytest.raises(UserError) as error:
        merge_files(base, adapter, tmp_path / "merged.pth", stated={"quant": "none"})
    assert message in str(error.value)
    assert not (tmp_path / "merged.pth").exists()


def test_numbers_that_do_not_fit_the_precision_are_named(tmp_path):
    weights = small_model().state_dict()
    weights[KEY][0, 0] = 1e5
    write_tensors(weights, tmp_path / "base.pth")
    load_model(tmp_path / "base.pth")
    with pytest.raises(UserError, match=rf"{KEY} holds NaN or infinity \(as float16\)"):
        load_model(tmp_path / "base.pth", torch.float16)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("around", [None, "state_dict", "model"])
def test_wrappers_are_taken_off_bases_and_adapters_alike(tmp_path, prefix, around):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8}, record=False)
    stated = {"quant": "none"}
    merge_files(base, adapter, tmp_path / "expected.pth", stated=stated)
    for path in (base, adapter):
        wrapped = {prefix + name: tensor for name, tensor in torch.load(path).items()}
        torch.save({around: wrapped} if around else wrapped, path)
    load_model(base)
    merge_files(base, adapter, tmp_path / "found.pth", stated=stated)
    expected, found = (torch.load(tmp_path / f"{n}.pth") for n in ("expected", "found"))
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_transposed_expanded_and_shared_tensors_load_and_train(tmp_path):
    weights = small_model(vocab_size=64).state_dict()
    weights["head.weight"] = weights["head.weight"].T.contiguous().T
    weights["ln_out.weight"] = torch.ones(1).expand(64)
    weights["blocks.0.ln1.weight"] = weights["blocks.0.ln2.weight"]
    torch.save(weights, tmp_path / "odd.pth")
    model = load_model(tmp_path / "odd.pth")
    found = model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert all(tensor.is_contiguous() for tensor in found.values())
    with torch.no_grad():
        model.ln_out.weight[0] = 5
        model.blocks[0].ln1.weight.zero_()
    assert model.ln_out.weight[1] == 1
    assert model.blocks[0].ln2.weight.any()


def test_an_adapter_with_nan_is_named(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8}, record=False)
    tensors = torch.load(adapter)
    tensors["blocks.1.ffn.key.bone"][3, 3] = torch.inf
    torch.save(tensors, adapter)
    with pytest.raises(UserError, match=r"rwkv-0.pth: blocks.1.ffn.key.bone holds NaN or inf"):
        merge_files(base, adapter, tmp_path / "merged.pth", stated={"quant": "none"})


def test_safetensors_are_written_and_read_again_everywhere(tmp_path):
    from safetensors.torch import load_file

    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    merge_files(base, adapter, tmp_path / "m.pth")
    merge_files(base, adapter, tmp_path / "m2.safetensors")
    expected, found = torch.load(tmp_path / "m.pth"), load_file(tmp_path / "m2.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    unmerge_files(tmp_path / "m2.safetensors", adapter, tmp_path / "back.safetensors")
    back = load_model(tmp_path / "back.safetensors").state_dict()
    for name, tensor in torch.load(base).items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-5)
