"""A method is one file: the example of docs/adapters.md, added to a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.support import REPOSITORY, save_model, small_model

from finchtune.weights.tensors import read_tensors

PARTS = ("src", "tests", "merge", "cuda", "train.py", "pyproject.toml")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with one more file."""
    folder = tmp_path_factory.mktemp("project")
    for name in PARTS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    text = (REPOSITORY / "docs" / "adapters.md").read_text()
    example = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "class Gain" in b)
    (folder / "src" / "finchtune" / "adapters" / "methods" / "gain.py").write_text(example)
    save_model(small_model(), folder / "base.pth")
    rows = [json.dumps({"text": f"{n} plus {n} is {n + n}"}) for n in range(40)]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def run(folder, *words):
    """Run Python in the copy; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_trains_resumes_and_merges(copy):
    assert "--gain_factor X" in run(copy, "train.py", "--help")
    flags = (
        *("--load_model", "base.pth", "--data_file", "data.jsonl", "--data_type", "jsonl"),
        *"--tokenizer bytes --ctx_len 32 --peft gain --gain_factor 1.5 --lr_init 1e-2".split(),
        *"--epoch_steps 4 --save_every 2 --accelerator cpu".split(),
    )
    run(copy, "train.py", *flags, "--proj_dir", "whole")
    run(copy, "train.py", *flags, "--proj_dir", "again")
    for path in (copy / "again").glob("rwkv-*"):
        path.unlink()
    shutil.rmtree(copy / "again" / "checkpoints" / "step-4")
    assert "at step 2 of 4" in run(
        copy, "train.py", *flags, "--proj_dir", "again", "--resume", "auto"
    )
    whole, again = (read_tensors(copy / name / "rwkv-0.pth") for name in ("whole", "again"))
    assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())
    gain = whole["blocks.0.att.key.gain"]
    assert not torch.equal(gain, torch.full_like(gain, 1.5)), "it learnt"
    files = ("--base_model", "base.pth", "--peft_checkpoint", "whole/rwkv-0.pth")
    run(copy, "merge/merge.py", *files, "--output", "merged.pth", "--verify", "2 plus 2 is 4")
    key = "blocks.0.att.key.weight"
    base, merged = (read_tensors(copy / name)[key] for name in ("base.pth", "merged.pth"))
    torch.testing.assert_close(merged, gain.unsqueeze(1) * base)


def test_the_contract_tests_know_it(copy):
    printed = run(copy, "-m", "pytest", "-k", "gain", "-v", "tests/adapters/test_contract.py")
    assert int(re.search(r"(\d+) passed", printed)[1]) > 10
