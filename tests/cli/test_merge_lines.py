"""RWKV-PEFT's merge command lines: each runs, and gives what its own script computes."""

import pytest
import torch
from helpers.adapted import make_adapter
from helpers.support import run_script

from finchtune.adapters import QuantisedWeight
from finchtune.cli.merge import main
from finchtune.weights.base import load_model
from finchtune.weights.tensors import write_tensors

LAYER = "blocks.0.att.key"
SETTINGS = {"lora": {"r": 4, "alpha": 8}, "pissa": {"r": 4}, "bone": {"r": 8}, "bat": {"r": 8}}
SCRIPTS = {
    "merge.py": None,
    "merge_lora.py": ("lora",),
    "merge_pissa.py": ("pissa", "olora"),
    "merge_bone.py": ("bone", "bat"),
    "merge_disha.py": ("bone", "bat"),
    "merge_miss.py": ("bone", "bat"),
}
NAMED = "--base_model BASE --lora_checkpoint ADAPTER --output OUT"
LINES = [
    ("lora", "none", f"merge.py {NAMED} --type lora --lora_alpha 8"),
    ("lora", "none", f"merge.py {NAMED} --lora_init INIT --quant none --type lora --lora_alpha 8"),
    ("lora", "nf4", f"merge.py {NAMED} --quant nf4 --type lora --lora_alpha 8"),
    ("lora", "fp4", f"merge.py {NAMED} --quant fp4 --type lora --lora_alpha 8"),
    ("lora", "none", "merge_lora.py 8 BASE ADAPTER OUT"),
    ("pissa", "none", f"merge.py {NAMED} --lora_init INIT --type pissa"),
    ("pissa", "nf4", f"merge.py {NAMED} --lora_init INIT --quant nf4 --type pissa"),
    ("pissa", "none", "merge_pissa.py BASE INIT ADAPTER OUT"),
    ("bone", "none", f"merge_bone.py {NAMED}"),
    ("bone", "fp4", f"merge_bone.py {NAMED} --quant 4bit"),
    ("bone", "none", "merge_disha.py --base_model BASE --peft_checkpoint ADAPTER --output OUT"),
    ("bone", "int8", "merge_disha.py --base_model BASE --peft_checkpoint ADAPTER --output OUT "
     "--quant int8"),
    ("bone", "none", "merge_miss.py --base_model BASE --peft_checkpoint ADAPTER --output OUT"),
    ("bat", "none", f"merge_bone.py {NAMED}"),
]  # fmt: skip


def theirs(method, W, own, start, quant):
    """The merged weight, as RWKV-PEFT's scripts compute it."""

    def kept(weight):
        return weight if quant == "none" else QuantisedWeight(weight, quant).dense(torch.float32)

    if method == "lora":
        return kept(W) + own["lora_B"] @ own["lora_A"] * (8 / 4)
    if method == "pissa":
        return kept(W - start["init_lora_B"] @ start["init_lora_A"]) + own["lora_B"] @ own["lora_A"]
    W, bone = kept(W), own["bone"]
    if method == "bone":
        r = bone.shape[0]
        return (
            (W.view(-1, W.shape[1] // r, r).permute(1, 2, 0) + bone)
            .permute(2, 0, 1)
            .reshape(W.shape)
        )
    r = bone.shape[1]
    shards = W.view(W.shape[0] // r, r, W.shape[1] // r, r).transpose(1, 2)
    return (shards + shards @ bone + bone).transpose(1, 2).reshape(W.shape)


@pytest.mark.parametrize(("method", "quant", "line"), LINES, ids=[line for _, _, line in LINES])
def test_their_merge_lines_run(tmp_path, method, quant, line):
    base, _, adapter = make_adapter(tmp_path, method, SETTINGS[method], record=False)
    tensors = torch.load(adapter)
    start = {name: t for name, t in tensors.items() if ".init_" in name}
    write_tensors({n: t for n, t in tensors.items() if n not in start}, adapter)
    write_tensors({f"model.{n}": t for n, t in start.items()}, tmp_path / "init.pth")
    paths = {"BASE": base, "ADAPTER": adapter, "INIT": tmp_path / "init.pth"}
    paths["OUT"] = tmp_path / "merged.pth"
    script, *words = line.split()
    main([str(paths.get(word, word)) for word in words], methods=SCRIPTS[script])
    found = torch.load(tmp_path / "merged.pth")[f"{LAYER}.weight"]

    own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{LAYER}.")}
    W = load_model(base).state_dict()[f"{LAYER}.weight"]
    torch.testing.assert_close(found, theirs(method, W, own, own, quant), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, W, atol=1e-3)


@pytest.mark.parametrize("script", ["merge.py", "merge_lora.py", "merge/merge_disha.py"])
def test_their_scripts_lie_where_they_do_there(script):
    done = run_script(script, "--help")
    assert done.returncode == 0
    assert "--base_model" in done.stdout
