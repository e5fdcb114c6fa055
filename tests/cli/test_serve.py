"""scripts/serve.py before it listens: what it refuses, and what it holds in memory."""

import socket
import sys

import pytest
import torch
from helpers.support import REPOSITORY, save_model, small_model

import finchtune
from finchtune.adapters import attach
from finchtune.weights.writing import share_weights

SCRIPT = REPOSITORY / "scripts" / "serve.py"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return save_model(small_model(), tmp_path_factory.mktemp("model") / "m.pth")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_rows", 0], "--max_rows must be at least 1"),
        (["--max_waiting", 0], "--max_waiting must be at least 1"),
        (["--port", 70000], "cannot listen at 127.0.0.1:70000"),
        (["--host", "256.0.0.1"], "cannot listen at 256.0.0.1:8000"),
        (["--peft_checkpoint", "a/x.pth", "b/x.pth"], "two models are called x"),
        (["--peft_checkpoint", "m=x.pth"], "two models are called m"),
        (["--peft_checkpoint", "x.pth"], "x.pth: no such file"),
        (["--template", "chatt"], "did you mean chat?"),
    ],
)
def test_bad_flags_fail_in_one_line(run, model_file, flags, message):
    status, out, error = run("--model", model_file, *flags)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert message in error


def test_a_port_in_use_is_told(run, model_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, error = run("--model", model_file, "--port", port)
    assert status == 2
    assert f"cannot listen at 127.0.0.1:{port}" in error


def test_missing_packages_are_named(run, model_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, error = run("--model", model_file)
    assert status == 2
    assert "finchtune serve needs uvicorn: pip install 'finchtune[serve]'" in error


def test_equal_weights_are_in_memory_once(model_file):
    base, adapted = (finchtune.load_model(model_file) for _ in range(2))
    with torch.no_grad():
        adapted.ln_out.weight += 1  # trained beside the adapter
    attach(adapted, "bone", r=8)
    tokens = torch.tensor([[1, 2, 3]])
    before = adapted(tokens)[0]
    share_weights(adapted, base)
    assert torch.equal(adapted(tokens)[0], before)
    kept = {p.data_ptr() for p in base.parameters()}
    own = [name for name, p in adapted.named_parameters() if p.data_ptr() not in kept]
    assert [name for name in own if ".adapter." not in name] == ["ln_out.weight"]
