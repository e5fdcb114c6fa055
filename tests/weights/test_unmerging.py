"""Merged files checked against the base and its adapter, and turned back into the base."""

import json

import pytest
import torch
from helpers.adapted import METHODS, make_adapter
from helpers.support import run_script, save_model, small_model

from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.weights.merging import merge_files
from finchtune.weights.tensors import write_tensors
from finchtune.weights.unmerging import unmerge_files
from finchtune.weights.verifying import verify


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dora"])
def test_unmerging_gives_the_base_up_to_rounding(tmp_path, method):
    base, _, adapter = make_adapter(tmp_path, method, METHODS[method])
    merged, back = tmp_path / "merged.pth", tmp_path / "back.pth"
    merge_files(base, adapter, merged)
    found = unmerge_files(merged, adapter, back, base)
    assert found["base_sha256"] == sha256(base)
    assert found["exact"] is False
    assert 0 < found["largest_difference"] < 1e-5
    original = torch.load(base)
    gap = max((t - original[n]).abs().max().item() for n, t in torch.load(back).items())
    assert gap == pytest.approx(found["largest_difference"])


def test_unmerging_an_untrained_adapter_is_exact(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bat", {"r": 8, "mode": "col"}, scale=0)
    merge_files(base, adapter, tmp_path / "merged.pth")
    found = unmerge_files(tmp_path / "merged.pth", adapter, tmp_path / "back.pth", base)
    assert found["exact"] is True
    assert found["largest_difference"] == 0
    assert sha256(tmp_path / "back.pth") == sha256(base)


def test_unmerging_col_solves_for_the_base(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bat", {"r": 8, "mode": "col"})
    merge_files(base, adapter, tmp_path / "merged.pth")
    found = unmerge_files(tmp_path / "merged.pth", adapter, tmp_path / "back.pth", base)
    assert found["largest_difference"] < 1e-5


def test_what_cannot_be_unmerged_is_refused(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "dora", METHODS["dora"])
    merged, back = tmp_path / "merged.pth", tmp_path / "back.pth"
    merge_files(base, adapter, merged)
    with pytest.raises(UserError, match="dora cannot be unmerged"):
        unmerge_files(merged, adapter, back)
    other = save_model(small_model(n_layer=3), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth holds other tensors than .*merged.pth"):
        unmerge_files(merged, adapter, back, other)
    base, _, adapter = make_adapter(tmp_path, "bone", METHODS["bone"])
    with pytest.raises(UserError, match="was merged from another adapter"):
        unmerge_files(merged, adapter, back)
    merged.write_bytes(base.read_bytes())
    with pytest.raises(UserError, match=r"is not the file that .*merge\.json tells of"):
        unmerge_files(merged, adapter, back)
    adapter.with_suffix(".json").unlink()
    write_tensors(torch.load(adapter) | {"ln_out.weight": torch.ones(64)}, adapter)
    merge_files(base, adapter, merged, stated={"quant": "none"})
    with pytest.raises(UserError, match=r"replaced ln_out.weight: the base's own is in neither"):
        unmerge_files(merged, adapter, back)
    assert not back.exists()


def test_verifying_compares_logits_and_undoes_what_is_wrong(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "bat", METHODS["bat"])
    spec = json.loads(adapter.with_suffix(".json").read_text())["adapter"]
    (tmp_path / "text").write_text("In a file. " * 100)

    def check(text, **changed):
        return lambda merged, spec: print(
            verify(base, torch.load(adapter), spec | changed, merged, text)
        )

    merge_files(base, adapter, tmp_path / "m.pth", check=check("The text itself."))
    assert "verified on 16 tokens" in verify(
        base, torch.load(adapter), spec, tmp_path / "m.pth", "The text itself."
    )
    line = verify(base, torch.load(adapter), spec, tmp_path / "m.pth", str(tmp_path / "text"))
    assert "verified on 512 tokens" in line
    assert "agrees at 100.0%" in line
    other = save_model(small_model(seed=7), tmp_path / "other.pth")
    adapter.with_suffix(".json").unlink()
    write_tensors(torch.load(adapter), adapter)  # without its record
    stated = {"mode": "row", "quant": "none"}
    with pytest.raises(UserError, match=r"logits differ .* too much for torch.float32"):
        merge_files(other, adapter, tmp_path / "wrong.pth", stated=stated, check=check("Text"))
    assert not list(tmp_path.glob("*wrong*"))


@pytest.mark.slow
def test_scripts_verify_and_unmerge(tmp_path):
    base, _, adapter = make_adapter(tmp_path, "lora", METHODS["lora"])
    merged, back = tmp_path / "m.pth", tmp_path / "back.pth"
    done = run_script(
        "merge/merge.py",
        *("--base_model", base, "--peft_checkpoint", adapter, "--output", merged),
        *("--verify", "Some text."),
    )
    assert done.returncode == 0, done.stderr
    assert "verified on 10 tokens: logits differ by at most" in done.stdout
    done = run_script(
        "merge/unmerge.py",
        *("--merged_model", merged, "--peft_checkpoint", adapter, "--output", back),
        *("--base_model", base),
    )
    assert done.returncode == 0, done.stderr
    assert "it is the base up to rounding" in done.stdout
    assert "largest difference from" in done.stdout
