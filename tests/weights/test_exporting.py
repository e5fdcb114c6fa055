"""Adapters by themselves in peft, and what cannot be exported."""

import peft
import pytest
import torch
from helpers.adapted import make_adapter
from helpers.support import rwkv_package_logits, save_model, small_model
from safetensors.torch import load_file

from finchtune.errors import UserError
from finchtune.files import read_json, sha256
from finchtune.weights.adapter_files import save_adapter
from finchtune.weights.base import load_model, read_base
from finchtune.weights.exporting import export_adapter, export_model, receipt_path
from finchtune.weights.forms import FORMS, Settings
from finchtune.weights.forms.base import n_layer_of
from finchtune.weights.merging import merge_files
from finchtune.weights.pth import read_record, write_pth

LORAS = {
    "bone": {"r": 24},
    "disha": {"r1": 24, "r2": 12},
    "lora": {"r": 4, "alpha": 16, "rslora": True},
    "pissa": {"r": 4},
    "olora": {"r": 4, "alpha": 8},
}
FP32 = Settings("fp32", "small")


@pytest.mark.parametrize("method", LORAS)
def test_peft_computes_the_same(method, tmp_path):
    base, model, adapter = make_adapter(tmp_path, method, LORAS[method])
    export_adapter(base, adapter, tmp_path / "peft", FORMS["peft"], FP32)
    theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "peft")
    tokens = torch.tensor([[1, 2, 3, 200, 7]])
    expected, plain = model(tokens)[0], load_model(base)(tokens)[0]
    torch.testing.assert_close(theirs(tokens)[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_a_record_inside_a_file_does_not_disturb_peft(tmp_path):
    """peft reads adapter_model.bin by torch.load; a .pth of ours holds its record as well."""
    base, model, adapter = make_adapter(tmp_path, "lora", LORAS["lora"])
    folder = tmp_path / "peft"
    export_adapter(base, adapter, folder, FORMS["peft"], FP32)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    record = {"format": "finchtune 1", "adapter": model.adapter_spec}
    write_pth(tensors, tensors.values(), folder / "adapter_model.bin", record)
    assert read_record(folder / "adapter_model.bin") == record
    theirs = peft.PeftModel.from_pretrained(load_model(base), folder)
    tokens = torch.tensor([[1, 2, 3, 200, 7]])
    torch.testing.assert_close(theirs(tokens)[0], model(tokens)[0], atol=1e-5, rtol=1e-5)


def test_layers_may_have_hugging_faces_names(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    settings = FP32._replace(layer_names="hf_rwkv6")
    export_adapter(base, adapter, tmp_path / "peft", FORMS["peft"], settings)
    names = read_json(tmp_path / "peft" / "adapter_config.json")["target_modules"]
    assert "rwkv.blocks.0.attention.key" in names


def test_the_rwkv_package_computes_the_same_from_a_pth(tmp_path):
    model = small_model(n_layer=2, n_embd=64, head_size=16)
    base = save_model(model, tmp_path / "base.pth")
    for name in ("fla", "gguf"):
        written = tmp_path / f"there{FORMS[name].suffix}"
        settings = FP32._replace(tokenizer=load_bytes())
        export_model(base, written, FORMS[name], settings)
        export_model(written, tmp_path / "back.pth", FORMS["pth"], FP32)
        tokens = [1, 2, 3, 200, 7]
        expected = model(torch.tensor([tokens]))[0][0].detach()
        found = rwkv_package_logits(tmp_path / "back.pth", tokens)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def load_bytes():
    from finchtune.tokenizer import load_tokenizer

    return load_tokenizer("bytes")


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.write_adapter])
def test_methods_that_are_no_lora_are_refused_with_the_command(name, tmp_path):
    form = FORMS[name]
    for method, settings in (("bat", {"r": 8}), ("dora", {"r": 4})):
        folder = tmp_path / method
        folder.mkdir()
        base, _, adapter = make_adapter(folder, method, settings)
        output = folder / f"out{form.suffix}"
        with pytest.raises(UserError, match=r"is no LoRA; merge it, with merge/merge\.py"):
            export_adapter(base, adapter, output, form, FP32)
        assert not output.exists()


def test_quantised_bases_and_trained_tensors_are_refused(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    record = read_json(adapter.with_suffix(".json"))
    tensors = torch.load(adapter)
    spec = record["adapter"] | {"quant": "nf4"}
    del record["sha256"]
    save_adapter(tensors, record | {"adapter": spec}, tmp_path / "quant.pth")
    with pytest.raises(UserError, match="was trained on a base in nf4, which no other runtime"):
        export_adapter(base, tmp_path / "quant.pth", tmp_path / "x", FORMS["peft"], FP32)
    more = tensors | {"ln_out.weight": torch.ones(64)}
    save_adapter(more, record, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"holds ln_out.weight, a trained tensor of the model"):
        export_adapter(base, tmp_path / "more.pth", tmp_path / "x", FORMS["peft"], FP32)


def test_receipts_tell_what_was_made_of_what(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    path = tmp_path / "adapter.st"
    receipt = export_adapter(base, adapter, path, FORMS["web-rwkv"], Settings("fp16", "small"))
    assert read_json(receipt_path(path)) == receipt
    assert receipt["output"] == {"file": "adapter.st", "sha256": sha256(path)}
    assert receipt["base"] == {"file": "base.pth", "sha256": sha256(base)}
    assert receipt["adapter"]["sha256"] == sha256(adapter)
    assert (receipt["form"], receipt["method"], receipt["alpha"]) == ("web-rwkv", "bone", 8)


def test_nothing_is_left_of_an_export_that_fails(tmp_path):
    model = small_model(n_layer=4)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    base = save_model(model, tmp_path / "base.pth")
    with pytest.raises(UserError, match=r"head.weight reaches 100000, above fp16's largest"):
        export_model(base, tmp_path / "x" / "out.st", FORMS["web-rwkv"], Settings("fp16", "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["base.pth"]
    assert read_base(base)["head.weight"][0, 0] == 1e5


def test_another_base_is_taken_only_when_asked_and_told_of(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    merge_files(base, adapter, first)
    with pytest.raises(UserError, match=r"first.pth is not the base of"):
        merge_files(first, adapter, second)
    receipt = merge_files(first, adapter, second, other_base=True)
    assert receipt["base"] == {"file": "first.pth", "sha256": sha256(first)}
    assert receipt["trained_on"] == {"file": "base.pth", "sha256": sha256(base)}
    plain, once, twice = (torch.load(path) for path in (base, first, second))
    name = "blocks.0.ffn.key.weight"
    torch.testing.assert_close(twice[name] - once[name], once[name] - plain[name])
    export_model(first, tmp_path / "on.safetensors", FORMS["safetensors"], FP32, adapter,
                 other_base=True)  # fmt: skip
    exported = read_base(tmp_path / "on.safetensors")
    assert all(torch.equal(exported[key], tensor) for key, tensor in twice.items())


def test_a_modelfile_of_the_users_is_not_written_over(tmp_path):
    base = save_model(small_model(), tmp_path / "base.pth")
    settings = FP32._replace(tokenizer=load_bytes())
    for _ in range(2):  # what we wrote ourselves gives way
        export_model(base, tmp_path / "m.gguf", FORMS["gguf"], settings)
    (tmp_path / "m.gguf.Modelfile").write_text("FROM mine")
    with pytest.raises(UserError, match=r"m\.gguf\.Modelfile is there, not as we write it"):
        export_model(base, tmp_path / "m.gguf", FORMS["gguf"], settings)
    assert (tmp_path / "m.gguf.Modelfile").read_text() == "FROM mine"


BAD_BASES = {
    "NaN": lambda w: {"emb.weight": torch.full_like(w["emb.weight"], torch.nan)},
    "an extra tensor": lambda w: {"blocks.0.odd": torch.zeros(2)},
    "another shape": lambda w: {"head.weight": w["head.weight"][:9]},
    "an unfolding tensor": lambda w: {"head.weight": torch.zeros(1).expand(2**40, 1)},
}


@pytest.mark.parametrize("kind", BAD_BASES)
def test_what_does_not_load_is_not_exported(kind, tmp_path):
    weights = small_model().state_dict()
    torch.save(weights | BAD_BASES[kind](weights), tmp_path / "base.pth")
    with pytest.raises(UserError, match=r"base\.pth"):
        export_model(tmp_path / "base.pth", tmp_path / "m.safetensors", FORMS["safetensors"], FP32)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_layer_of_a_billion_is_of_no_model():
    """Counting up to it would take for ever; the tensor is then one that no layer has."""
    numbers = ("3", "1000000000", "9" * 30, "\u0663", "03", "")
    assert n_layer_of([f"blocks.{number}.x" for number in numbers], "blocks.") == 4
