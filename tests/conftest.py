"""Fixtures shared by all tests."""

import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers.byte_level_bpe import write_byte_level_bpe
from helpers.support import run_script, save_model, small_model
from hypothesis import settings

from finchtune.ops.kernels import has_kernels

# On a busy machine any example may take longer than hypothesis' 200 ms.
settings.register_profile("finchtune", deadline=None)
settings.load_profile("finchtune")


@pytest.fixture(autouse=True)
def reset_torch_state():
    """Every test starts from the same seed and dtype, and leaves no global setting behind."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def word_problems(tmp_path_factory) -> Path:
    """2,000 worked arithmetic problems: a JSON object a line with question, answer and text."""
    folder = tmp_path_factory.mktemp("problems")
    skills = ("--skills", "add", "subtract", "two_steps")
    done = run_script("scripts/make_problems.py", *skills, "--train", 2000, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def trained_model(word_problems, tmp_path_factory) -> Path:
    """A model (L3 C64 V256) that learnt the bytes of `word_problems`, as a file."""
    model = small_model(n_layer=3)
    text = "".join(json.loads(line)["text"] + "\n" for line in word_problems.open())
    stream = torch.tensor(list(text.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(60):
        rows = stream[step * 1032 :][:1032].view(8, 129)
        (model.loss(rows[:, :-1], rows[:, 1:])[0] / 1024).backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_model(model, tmp_path_factory.mktemp("trained") / "model.pth")


@pytest.fixture(scope="session")
def byte_level_bpe(tmp_path_factory) -> str:
    """A tokenizer.json like the Pile's: byte-level BPE, <|endoftext|> first."""
    text = "Finch 芬奇 🐦 def f(x): return x ** 2\n" * 5
    return str(write_byte_level_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json", 300, text))


@pytest.fixture
def kernels():
    """Skips where the compiled kernels cannot be had."""
    if not has_kernels("cpu"):
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def run(request, monkeypatch, capsys):
    """Run the SCRIPT of the test's class or module in this process, which spares starting Python.

    Called with its arguments it returns exit status, standard output and error.
    """
    script = str((request.cls or request.module).SCRIPT)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(script, run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)
