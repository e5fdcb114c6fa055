"""Merged files: loaded by the independent `rwkv` package they give the adapted model's logits."""

import json

import pytest
import torch
from support import (
    assert_one_error_line,
    relative_error,
    run_script,
    rwkv_package_logits,
    save_model,
    small_model,
)

from finchtune.adapters import attach, merge
from finchtune.checkpoint import adapter_keys, load_model, save_adapter, write_tensors
from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.merging import merge_files

METHODS = {
    "bone": {"r": 8},
    "bat": {"r": 8, "mode": "row"},
    "lora": {"r": 4, "alpha": 16},
    "pissa": {"r": 4},
}


def make_adapter(folder, method, hyperparameters, record=True):
    """A base file, a model adapted with random tensors, and the adapter's file."""
    base = save_model(small_model(), folder / "base.pth")
    model = attach(load_model(base), method, **hyperparameters)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {key: model.state_dict()[name] for name, key in adapter_keys(model).items()}
    path = folder / "rwkv-0.pth"
    if record:
        spec = {"adapter": model.adapter_spec, "base": {"file": base.name, "sha256": sha256(base)}}
        save_adapter(tensors, spec, path)
    else:
        write_tensors(tensors, path)
    return base, model, path


@pytest.mark.parametrize("method", METHODS)
def test_merged_file_gives_the_adapted_logits_elsewhere(tmp_path, method):
    base, model, adapter = make_adapter(tmp_path, method, METHODS[method])
    merge_files(base, adapter, tmp_path / "merged.pth")
    tokens = torch.randint(1, 256, (1, 40))
    adapted, _ = model(tokens)
    merged = rwkv_package_logits(tmp_path / "merged.pth", tokens[0].tolist())
    assert relative_error(merged, adapted[0]) < 1e-4
    plain, _ = load_model(base)(tokens)
    assert relative_error(plain, adapted) > 1e-2, "the adapter must change something"


def test_merging_in_memory_equals_merging_files(tmp_path):
    base, model, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    merge_files(base, adapter, tmp_path / "merged.pth")
    merged, found = merge(model).state_dict(), load_model(tmp_path / "merged.pth").state_dict()
    assert list(merged) == list(found)
    assert all(torch.equal(merged[name], found[name]) for name in merged)


def test_keys_keep_the_base_file_order_and_dtype(tmp_path):
    weights = {n: t.bfloat16() for n, t in small_model().state_dict().items()}
    write_tensors(weights, tmp_path / "base.pth")
    key = "blocks.0.att.key.bone"
    write_tensors({key: torch.randn(8, 64)}, tmp_path / "rwkv-0.pth")
    merge_files(tmp_path / "base.pth", tmp_path / "rwkv-0.pth", tmp_path / "merged.pth")
    merged = torch.load(tmp_path / "merged.pth")
    assert list(merged) == list(weights)
    changed = [name for name in merged if not torch.equal(merged[name], weights[name])]
    assert changed == ["blocks.0.att.key.weight"]
    assert all(t.dtype == torch.bfloat16 for t in merged.values())


@pytest.mark.parametrize(("method", "suffix"), [("bone", ".disha"), ("bat", ".bone")])
def test_files_of_other_software_carry_no_json(tmp_path, method, suffix):
    base, model, adapter = make_adapter(tmp_path, method, METHODS[method], record=False)
    tensors = torch.load(adapter)
    write_tensors({k.replace(".bone", suffix): t for k, t in tensors.items()}, adapter)
    merge_files(base, adapter, tmp_path / "merged.pth")
    found = load_model(tmp_path / "merged.pth").state_dict()
    expected = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pissa_of_other_software_has_a_second_file(tmp_path):
    base, model, adapter = make_adapter(tmp_path, "pissa", {"r": 4}, record=False)
    tensors = torch.load(adapter)
    initial = {f"model.{k}": t for k, t in tensors.items() if "init_" in k}
    write_tensors(initial, tmp_path / "init.pth")
    write_tensors({k: t for k, t in tensors.items() if "init_" not in k}, adapter)
    merge_files(base, adapter, tmp_path / "merged.pth", initial=tmp_path / "init.pth")
    found = load_model(tmp_path / "merged.pth").state_dict()
    expected = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lora_without_json_needs_its_alpha(tmp_path):
    base, model, adapter = make_adapter(tmp_path, "lora", METHODS["lora"], record=False)
    with pytest.raises(UserError, match="give --lora_alpha"):
        merge_files(base, adapter, tmp_path / "merged.pth")
    merge_files(base, adapter, tmp_path / "merged.pth", alpha=16)
    found = load_model(tmp_path / "merged.pth").state_dict()
    expected = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_extra_trained_tensors_replace_the_base(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8}, record=False)
    trained = torch.randn(64)
    write_tensors(torch.load(adapter) | {"ln_out.weight": trained}, adapter)
    counts = merge_files(base, adapter, tmp_path / "merged.pth")
    assert torch.equal(torch.load(tmp_path / "merged.pth")["ln_out.weight"], trained)
    assert counts["merged"] == 16
    assert counts["replaced"] == 1


def test_scripts_merge_and_refuse_what_is_not_theirs(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    flags = ["--base_model", base, "--lora_checkpoint", adapter, "--output", tmp_path / "m.pth"]
    done = run_script("merge/merge_lora.py", *flags)
    assert_one_error_line(done, "is bone, not lora", "use merge/merge.py")
    assert not (tmp_path / "m.pth").exists()
    done = run_script("merge/merge_bone.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "16 tensors merged" in done.stdout
    assert load_model(tmp_path / "m.pth")


def test_wrong_bases_are_refused_and_nothing_is_written(tmp_path):
    _, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    other = save_model(small_model(seed=7), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth is not the base of .*trained on base.pth"):
        merge_files(other, adapter, tmp_path / "merged.pth")
    adapter.with_suffix(".json").unlink()
    shallow = save_model(small_model(n_layer=1), tmp_path / "shallow.pth")
    with pytest.raises(UserError, match="belongs to no tensor of the base; wrong base model"):
        merge_files(shallow, adapter, tmp_path / "merged.pth")
    wide = save_model(small_model(n_embd=128), tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"the adapter holds .* bone needs"):
        merge_files(wide, adapter, tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


def test_leftover_keys_and_nan_are_refused(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8}, record=False)
    tensors = torch.load(adapter)
    write_tensors(tensors | {"blocks.0.att.key.lora_A": torch.zeros(4, 64)}, adapter)
    with pytest.raises(UserError, match="bone needs"):
        merge_files(base, adapter, tmp_path / "merged.pth")
    tensors["blocks.0.att.key.bone"][0, 0] = torch.nan
    write_tensors(tensors, adapter)
    with pytest.raises(UserError, match=r"blocks.0.att.key.weight would hold NaN"):
        merge_files(base, adapter, tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


def test_output_may_not_be_an_input(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    before = base.read_bytes()
    flags = ["--base_model", base, "--peft_checkpoint", adapter, "--output", base]
    assert_one_error_line(run_script("merge/merge.py", *flags), "would overwrite an input")
    assert base.read_bytes() == before


def test_record_names_method_and_base(tmp_path):
    _, _, adapter = make_adapter(tmp_path, "bat", METHODS["bat"])
    record = json.loads(adapter.with_suffix(".json").read_text())
    assert record["adapter"]["method"] == "bat"
    assert record["adapter"]["mode"] == "row"
    assert record["sha256"] == sha256(adapter)
