"""web-rwkv's .st in web-rwkv itself, on the processor through Vulkan's lavapipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapted import make_adapter
from helpers.support import save_model, small_model
from safetensors.torch import load_file

from finchtune.weights.base import load_model
from finchtune.weights.exporting import export_adapter, export_model
from finchtune.weights.forms import FORMS, Settings
from finchtune.weights.merging import merge_files

WEB_RWKV = FORMS["web-rwkv"]
SIZES = {"n_layer": 4, "n_embd": 128, "vocab_size": 256, "head_size": 64}
TOKENS = [3, 77, 200, 5, 91]
DRIVERS = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
RUN = """
import json, os, sys, web_rwkv_py
logits = web_rwkv_py.Model(sys.argv[1]).run(json.loads(sys.argv[2]))
print(json.dumps(logits), flush=True)
os._exit(0)  # lavapipe may abort while it is taken down
"""


def web_rwkv_logits(path: Path) -> torch.Tensor:
    """Logits (V,) of web-rwkv after TOKENS, in a process of its own."""
    if not DRIVERS:
        pytest.fail(
            "no Vulkan driver for processors; apt-get install mesa-vulkan-drivers libvulkan1"
        )
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), json.dumps(TOKENS)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VK_ICD_FILENAMES": str(DRIVERS[0])},
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout))


@pytest.mark.slow
def test_web_rwkv_computes_the_same(tmp_path):
    base = save_model(small_model(**SIZES), tmp_path / "base.pth")
    export_model(base, tmp_path / "model.st", WEB_RWKV, Settings("fp16", "small"))
    found = web_rwkv_logits(tmp_path / "model.st")
    expected = load_model(base)(torch.tensor([TOKENS]))[0][0, -1].detach()
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_a_rwkv_7_has_the_shapes_that_its_loader_reads(tmp_path):
    """src/runtime/loader.rs and v7.rs of web-rwkv 0.10; web-rwkv-py 0.2.3 has an older one."""
    ranks = {"w": 8, "a": 12, "v": 20, "g": 40}
    sizes = {f"dim_{part}_lora": n for part, n in zip(("decay", "rate", "value", "gate"),
             ranks.values(), strict=True)}  # fmt: skip
    model = small_model(**SIZES, generation=7, **sizes, dim_unused_lora=3)
    base = save_model(model, tmp_path / "base.pth")
    export_model(base, tmp_path / "model.st", WEB_RWKV, Settings("fp16", "small"))
    found, weights = load_file(tmp_path / "model.st"), model.state_dict()
    assert "blocks.0.att.v1" not in found
    for layer in range(4):
        for part, rank in ranks.items() if layer else list(ranks.items())[:2]:
            first, second = (f"blocks.{layer}.att.{part}{i}" for i in (1, 2))
            assert found[first].shape == (rank, 128)
            assert found[second].shape == (128, rank)
            assert torch.equal(found[first], weights[first].half().T)
        assert found[f"blocks.{layer}.att.r_k"].shape == (2, 64)
        assert found[f"blocks.{layer}.ffn.key.weight"].shape == (512, 128)


@pytest.mark.parametrize(
    ("method", "hyperparameters"),
    [("bone", {"r": 24}), ("disha", {"r1": 24, "r2": 12}), ("lora", {"r": 4, "alpha": 16}),
     ("pissa", {"r": 4})],
)  # fmt: skip
def test_an_adapter_alone_adds_what_merging_does(method, hyperparameters, tmp_path):
    """As web-rwkv's loader has it: W += alpha / rank B A, with lora.0 = A^T and lora.1 = B."""
    base, _, adapter = make_adapter(tmp_path, method, hyperparameters, sizes=SIZES)
    path = tmp_path / "adapter.st"
    receipt = export_adapter(base, adapter, path, WEB_RWKV, Settings("fp16", "small"))
    merge_files(base, adapter, tmp_path / "merged.pth")
    plain, merged = torch.load(base), torch.load(tmp_path / "merged.pth")
    found = load_file(path)
    layers = {name.removesuffix(".lora.0") for name in found if name.endswith(".lora.0")}
    assert len(layers) == 4 * 8
    for layer in layers:
        A, B = found[f"{layer}.lora.0"].float(), found[f"{layer}.lora.1"].float()
        change = receipt["alpha"] / A.shape[1] * B @ A.T
        expected = merged[f"{layer}.weight"] - plain[f"{layer}.weight"]
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(change, expected, atol=2e-3, rtol=2e-3)
