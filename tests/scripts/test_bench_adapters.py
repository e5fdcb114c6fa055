"""The benchmark of the methods, and the example of a new method in the documentation."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.support import REPOSITORY, run_script
from torch import nn

from finchtune.adapters import METHODS, adapter_state, attach, merge


def test_the_benchmark_measures_what_it_is_asked_for(tmp_path):
    out = tmp_path / "bench.json"
    chosen = "--methods bone bat_row bat_row_built --layers value --dtypes fp32 --tokens 16"
    words = (*chosen.split(), "--n_embd", 64, "--repeats", 1, "--json", out)
    done = run_script("scripts/bench/adapters.py", *words)
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["frozen", "bone", "bat_row", "bat_row_built"]
    assert rows["frozen"]["relative"] == 1
    kept = {name: row["saved_mib"] * 2**20 / 4 for name, row in rows.items()}
    assert kept["frozen"] == 0
    assert kept["bone"] == 16 * 64
    assert kept["bat_row"] == 16 * 192
    assert kept["bat_row_built"] >= 64 * 192 + 16 * 192
    assert all(name in done.stdout for name in rows)


def test_the_benchmark_refuses_a_width_without_blocks():
    done = run_script("scripts/bench/adapters.py", "--n_embd", 100)
    assert done.returncode == 2
    assert done.stderr == "error: --n_embd must be multiples of 64, the rank of Bat's blocks\n"


@pytest.mark.slow
def test_whole_steps_cost_what_is_claimed():
    """Peak memory of a step of an RWKV6-3B, counted exactly: Bat next to LoRA and to Bone."""
    flags = "--n_layer 2 --n_embd 128 --vocab_size 256 --repeats 1 --dtypes bf16"
    done = run_script("scripts/bench/adapter_steps.py", *flags.split())
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +[\d,]+ .*\|\s*[\d,]+ +([\d.]+) +([\d.]+) \|", done.stdout, re.M)
    ratios = [(name, float(to_lora), float(to_bone)) for name, to_lora, to_bone in rows]
    plain = {name: to_lora for name, to_lora, _ in ratios[:4]}
    recomputed = {name: to_bone for name, _, to_bone in ratios[4:]}
    assert plain["bat_row"] <= 1.05
    assert plain["bat_col"] <= 1.15
    assert recomputed["bat_row"] <= 1.03
    assert recomputed["bat_col"] <= 1.10


def test_the_documented_example_is_a_whole_method(monkeypatch):
    text = (REPOSITORY / "docs" / "adapters.md").read_text()
    example = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "class Gain" in b)
    namespace: dict = {}
    exec(example, namespace)
    monkeypatch.setitem(METHODS, "gain", namespace["Gain"])
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 8)
    before = model(x)
    attach(model, "gain")
    torch.testing.assert_close(model(x), before)
    assert list(adapter_state(model)) == ["0.gain", "2.gain"]
    with torch.no_grad():
        model[0].adapter.gain.uniform_()
    trained = model(x)
    F.mse_loss(trained, torch.zeros(3, 4)).backward()
    assert model[0].adapter.gain.grad.any()
    torch.testing.assert_close(merge(model)(x), trained)


def test_every_method_is_documented():
    text = (REPOSITORY / "docs" / "adapters.md").read_text()
    assert all(f"| `{name}`" in text for name in METHODS)
