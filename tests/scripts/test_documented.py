"""What the documents show does what they say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.support import REPOSITORY, save_model, small_model


def blocks(path: str, language: str) -> list[str]:
    """The code blocks of a document in one language."""
    text = (REPOSITORY / path).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the form and the task of CONTRIBUTING.md."""
    folder = tmp_path_factory.mktemp("copy")
    package = folder / "src" / "finchtune"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "src" / "finchtune", package, ignore=ignored)
    shutil.copytree(REPOSITORY / "cuda", folder / "cuda")
    form, task = blocks("CONTRIBUTING.md", "python")
    (package / "weights" / "forms" / "npz.py").write_text(form)
    (package / "evaluation" / "tasks" / "yesno.py").write_text(task)
    save_model(small_model(), folder / "base.pth")
    return folder


def run(copy: Path, *words) -> str:
    """Run Python with the copy's package; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(copy / "src")}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ROUND_TRIP = """
import torch
from pathlib import Path
from finchtune.weights.base import read_base
from finchtune.weights.forms import Settings, get_form

weights = read_base("base.pth")
get_form("npz").write(weights, Path("base.npz"), Settings("fp32", "a model"))
again = read_base("base.npz")
assert list(again) == list(weights)
assert all(torch.equal(again[name], weights[name]) for name in weights)
"""


def test_a_form_is_one_file(copy):
    run(copy, "-c", ROUND_TRIP)


def test_a_task_is_one_file(copy):
    rows = [{"question": "Is it?", "answer": "Yes."}, {"question": "Was it?", "answer": "No."}]
    (copy / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"completion": " yes, it is"}, {"completion": "Yes"}]
    (copy / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    words = "--task yesno --data data.jsonl --answers answers.jsonl --output scores"
    assert "1 of 2 right" in run(copy, "-m", "finchtune", "evaluate", *words.split())


@pytest.mark.slow
def test_the_first_fine_tuning_runs(tmp_path):
    """In order, in one folder, with the installed command."""
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    commands = "\n".join(["set -e", *blocks("docs/first-fine-tuning.md", "bash")])
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, words in {"python": "", "finchtune": "-m finchtune"}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tools / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    right = int(re.search(r"(\d+) of 100 right", done.stdout)[1])
    assert right >= 50, done.stdout
    assert (tmp_path / "merged.pth").exists()
