"""Merged files: loaded by the independent `rwkv` package they give the adapted model's logits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.adapted import METHODS, make_adapter
from helpers.support import (
    assert_one_error_line,
    every_generation,
    relative_error,
    run_script,
    rwkv_package_logits,
    save_model,
    small_model,
)

from finchtune.adapters import merge
from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.models import meta_model
from finchtune.models.rwkv6 import ModelConfig
from finchtune.weights import changing
from finchtune.weights.base import load_model, read_base
from finchtune.weights.merging import merge_files
from finchtune.weights.tensors import write_tensors

PLAIN = {"quant": "none"}  # said of files without a record


@every_generation
@pytest.mark.parametrize("method", METHODS)
def test_merged_file_gives_the_adapted_logits_elsewhere(tmp_path, method, generation):
    sizes = {"generation": generation}
    base, model, adapter = make_adapter(tmp_path, method, METHODS[method], sizes=sizes)
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
    paths = (tmp_path / f"{name}.pth" for name in ("base", "rwkv-0", "merged"))
    merge_files(*paths, stated=PLAIN)
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
    stated = PLAIN | ({"mode": "row"} if method == "bat" else {})
    merge_files(base, adapter, tmp_path / "merged.pth", stated=stated)
    found = load_model(tmp_path / "merged.pth").state_dict()
    expected = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pissa_of_other_software_has_a_second_file(tmp_path):
    base, model, adapter = make_adapter(tmp_path, "pissa", {"r": 4}, record=False)
    tensors = torch.load(adapter)
    initial = {f"model.{k}": t for k, t in tensors.items() if "init_" in k}
    write_tensors(initial, tmp_path / "init.pth")
    write_tensors({k: t for k, t in tensors.items() if "init_" not in k}, adapter)
    initial = tmp_path / "init.pth"
    merge_files(base, adapter, tmp_path / "merged.pth", stated=PLAIN, initial=initial)
    found = load_model(tmp_path / "merged.pth").state_dict()
    expected = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lora_without_json_needs_its_alpha(tmp_path):
    base, model, adapter = make_adapter(tmp_path, "lora", METHODS["lora"], record=False)
    with pytest.raises(UserError, match="give `lora_alpha`"):
        merge_files(base, adapter, tmp_path / "merged.pth")
    stated = PLAIN | {"alpha": 16.0, "rslora": False}
    merge_files(base, adapter, tmp_path / "merged.pth", stated=stated)
    found = load_model(tmp_path / "merged.pth").state_dict()
    expected = merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_extra_trained_tensors_replace_the_base(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8}, record=False)
    trained = torch.randn(64)
    write_tensors(torch.load(adapter) | {"ln_out.weight": trained}, adapter)
    counts = merge_files(base, adapter, tmp_path / "merged.pth", stated=PLAIN)
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
    with pytest.raises(UserError, match=r"other.pth is not the base of"):
        merge_files(other, adapter, tmp_path / "merged.pth")
    write_tensors(torch.load(adapter), adapter)  # without its record
    shallow = save_model(small_model(n_layer=1), tmp_path / "shallow.pth")
    with pytest.raises(UserError, match="belongs to no tensor of the base; wrong base model"):
        merge_files(shallow, adapter, tmp_path / "merged.pth", stated=PLAIN)
    wide = save_model(small_model(n_embd=128), tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"the adapter holds .* bone needs"):
        merge_files(wide, adapter, tmp_path / "merged.pth", stated=PLAIN)
    assert not (tmp_path / "merged.pth").exists()


def test_leftover_keys_and_nan_are_refused(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bone", {"r": 8}, record=False)
    tensors = torch.load(adapter)
    write_tensors(tensors | {"blocks.0.att.key.lora_A": torch.zeros(4, 64)}, adapter)
    with pytest.raises(UserError, match="bone needs"):
        merge_files(base, adapter, tmp_path / "merged.pth", stated=PLAIN)
    tensors["blocks.0.att.key.bone"][0, 0] = torch.nan
    write_tensors(tensors, adapter)
    with pytest.raises(UserError, match=r"rwkv-0.pth: blocks.0.att.key.bone holds NaN"):
        merge_files(base, adapter, tmp_path / "merged.pth", stated=PLAIN)
    tensors["blocks.0.att.key.bone"][0, 0] = 3e38
    weights = torch.load(base)
    weights["blocks.0.att.key.weight"][0, 0] = 3e38
    write_tensors(weights, base)
    write_tensors(tensors, adapter)
    with pytest.raises(UserError, match=r"blocks.0.att.key.weight would hold NaN"):
        merge_files(base, adapter, tmp_path / "merged.pth", stated=PLAIN)
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


def test_the_receipt_tells_what_was_done(tmp_path):
    base, model, adapter = make_adapter(tmp_path, "bone", METHODS["bone"])
    merged = tmp_path / "merged.pth"
    merge_files(base, adapter, merged)
    receipt = json.loads((tmp_path / "merged.merge.json").read_text())
    for name, path in (("base", base), ("adapter", adapter), ("output", merged)):
        assert receipt[name] == {"file": path.name, "sha256": sha256(path)}
    assert receipt["method"] == "bone"
    assert len(receipt["largest_change"]) == receipt["merged"] == 16
    D = model.blocks[1].ffn.key.adapter.bone.detach()
    found = receipt["largest_change"]["blocks.1.ffn.key.weight"]
    assert found == pytest.approx(D.abs().max().item(), rel=1e-4)


MEMORY = """
import sys, threading
from pathlib import Path
import torch
from finchtune.weights.pth import write_pth
from finchtune.weights.verifying import verify
from finchtune.weights.merging import merge_files

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

base, adapter, output = sys.argv[1:]
stated = {"quant": "none"} | ({"method": "pissa"} if "pissa" in adapter else {})
# Libraries keep some memory from their first use on.
merge_files(base, adapter, output, stated=stated)
done, peak, before = threading.Event(), 0, anonymous()
thread = threading.Thread(target=watch)
thread.start()
merge_files(base, adapter, output, stated=stated)
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["bone", "pissa"])
def test_merging_needs_the_memory_of_a_few_tensors(tmp_path, method):
    """250 MB of bfloat16 weights, the largest of 16.8 MB, each 33.6 MB in float32."""
    sizes = ModelConfig(3, 2048, 256, dim_ffn=4096)
    weights = {
        name: torch.randn(tensor.shape).bfloat16()
        for name, tensor in meta_model(sizes).state_dict().items()
    }
    write_tensors(weights, tmp_path / "base.pth")
    names = [f"blocks.{i}.ffn.key" for i in range(3)]
    weight = weights[f"{names[-1]}.weight"]
    parts = {
        "bone": {"bone": torch.randn(64, 4096)},
        "bat": {"bone": torch.randn(64, 64, 64)},
        "pissa": {k: torch.randn(32, 2048) for k in ("lora_A", "init_lora_A")}
        | {k: torch.randn(4096, 32) for k in ("lora_B", "init_lora_B")},
    }[method]
    adapter = {f"{name}.{part}": t * 0.01 for name in names for part, t in parts.items()}
    write_tensors(adapter, tmp_path / f"{method}.pth")
    paths = [str(tmp_path / f"{name}.pth") for name in ("base", method, "merged")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout) / (2048 * 4096 * 4)
    print(f"{method}: {used:.2f} tensors in float32")
    assert 0.05 < used < 2
    merged = torch.load(paths[2], mmap=True)
    assert not torch.equal(merged[f"{names[-1]}.weight"], weight)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_merging_some_rows_at_a_time_is_merging_at_once(tmp_path, monkeypatch, suffix):
    base, model, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    monkeypatch.setattr(changing, "CHUNK", 300)  # 4 of 64 columns; the last rows are fewer
    receipt = merge_files(base, adapter, tmp_path / f"m{suffix}")
    assert receipt["output"]["sha256"] == sha256(tmp_path / f"m{suffix}")
    found, expected = read_base(tmp_path / f"m{suffix}"), merge(model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    weights = read_base(base)
    gaps = {name: float((expected[name] - weights[name]).abs().max()) for name in expected}
    assert receipt["largest_change"] == {name: gap for name, gap in gaps.items() if gap}


def test_a_wrong_base_is_named_whatever_else_is_wrong(tmp_path):
    _, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    other = save_model(small_model(n_embd=128), tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not the base of"):
        merge_files(other, adapter, tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"none.pth: no such file"):
        merge_files(tmp_path / "none.pth", adapter, tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()


def test_a_pipe_is_no_base_and_is_not_waited_for(tmp_path):
    _, _, adapter = make_adapter(tmp_path, "bone", {"r": 8})
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match=r"pipe\.pth: no such file"):
        merge_files(tmp_path / "pipe.pth", adapter, tmp_path / "merged.pth")
