"""Trained initial states by themselves: web-rwkv's .st, and the .pth of RWKV-Runner."""

import json
import struct

import numpy as np
import pytest
import torch
from helpers.support import (
    assert_one_error_line,
    relative_error,
    run_script,
    save_model,
    small_model,
)

from finchtune.errors import UserError
from finchtune.files import read_json, sha256
from finchtune.weights.adapter_files import read_adapter, save_adapter
from finchtune.weights.base import load_model
from finchtune.weights.description import describe
from finchtune.weights.exporting import export_model
from finchtune.weights.forms import FORMS, Settings
from finchtune.weights.merging import merge_files
from finchtune.weights.state_files import set_states

N_LAYER, HEADS, SIZE = 4, 2, 32


@pytest.fixture
def files(tmp_path):
    """A base, and states as training writes them."""
    sizes = {"n_layer": N_LAYER, "n_embd": HEADS * SIZE, "head_size": SIZE}
    base = save_model(small_model(**sizes), tmp_path / "base.pth")
    states = {f"blocks.{i}.att.time_state": torch.randn(HEADS, SIZE, SIZE) for i in range(N_LAYER)}
    record = {"format": "finchtune 1", "adapter": {}, "base": {"file": "b", "sha256": sha256(base)}}
    save_adapter(states, record, tmp_path / "states.pth")
    return base, tmp_path / "states.pth", states


def export(base, states, output, *more):
    to = "web-rwkv" if output.suffix == ".st" else "pth"
    words = ["--model", base, "--peft_checkpoint", states, "--adapter_only", "1", "--to", to]
    return run_script("scripts/export.py", *words, "--output", output, *more)


def web_rwkv_state(path):
    """What web-rwkv makes of a file: (layer, row, C), row j for key j of every head.

    Its load of safetensors turns shapes round: [x, y, z] for (z, y, x); read_state (src/runtime/
    v6.rs) swaps y and z and takes x and z as one dimension of C.
    """
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    layers = []
    for layer in range(N_LAYER):
        entry = header[f"blocks.{layer}.att.time_state"]
        assert entry["dtype"] == "F16"
        x, y, z = reversed(entry["shape"])
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = np.frombuffer(content[begin:end], np.float16)
        swapped = [flat[i * x + k * x * y :][:x] for i in range(y) for k in range(z)]
        layers.append(np.concatenate(swapped).reshape(y, x * z))
    return torch.from_numpy(np.stack(layers)).float()


def test_web_rwkv_finds_row_j_of_the_key_and_column_i_of_the_value(files, tmp_path):
    """Its kernel (time_mix_v6.wgsl) adds r[j] * state[j][h N + i] to y[h N + i]."""
    base, path, states = files
    done = export(base, path, tmp_path / "there.st")
    assert done.returncode == 0, done.stderr
    found = web_rwkv_state(tmp_path / "there.st")
    r = torch.randn(HEADS, SIZE)
    for layer in range(N_LAYER):
        state = states[f"blocks.{layer}.att.time_state"].half().float()
        expected = torch.einsum("hik,hk->hi", state, r)
        rows = found[layer].view(SIZE, HEADS, SIZE)
        torch.testing.assert_close(torch.einsum("khi,hk->hi", rows, r), expected)
    receipt = read_json(tmp_path / "there.st.export.json")
    assert receipt["states"] == {"file": "states.pth", "sha256": sha256(path)}


@pytest.mark.parametrize("name", ["there.st", "there.pth"])
def test_states_come_back_and_are_taken_everywhere(files, tmp_path, name):
    base, path, states = files
    output = tmp_path / name
    assert export(base, path, output).returncode == 0
    back = read_adapter(output)
    assert list(back) == list(states)
    for key, tensor in states.items():
        assert back[key].dtype == torch.float32
        assert torch.equal(back[key], tensor.half().float() if name == "there.st" else tensor)
    assert merge_files(base, output, tmp_path / "merged.pth")["method"] == "state"
    tokens = torch.randint(0, 256, (1, 20))
    ours, theirs = load_model(base), load_model(base)
    set_states(ours, path)
    set_states(theirs, output)
    expected = ours(tokens)[0]
    assert relative_error(theirs(tokens)[0], expected) < 2e-3
    assert relative_error(load_model(tmp_path / "merged.pth")(tokens)[0], expected) < 2e-3
    assert relative_error(load_model(base)(tokens)[0], expected) > 1e-2
    assert "trained initial states" in describe(output)["what"]


def test_states_of_a_merged_model_are_taken_out(files, tmp_path):
    base, path, states = files
    merge_files(base, path, tmp_path / "merged.pth")
    done = export(base, tmp_path / "merged.pth", tmp_path / "out.pth")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pth")
    assert list(found) == list(states)
    assert all(torch.equal(found[name], tensor) for name, tensor in states.items())
    with pytest.raises(UserError, match="give the base, and the states with `adapter_only` 1"):
        export_model(tmp_path / "merged.pth", tmp_path / "m.st", FORMS["web-rwkv"],
                     Settings("fp16", "m"))  # fmt: skip


def test_what_cannot_be_written_ends_in_a_line(files, tmp_path):
    base, path, states = files
    words = ["--model", base, "--peft_checkpoint", path, "--adapter_only", "1", "--to", "gguf"]
    done = run_script("scripts/export.py", *words, "--output", tmp_path / "out.gguf")
    assert_one_error_line(done, "--to gguf has no initial states by themselves; pth, web-rwkv have")
    other = save_model(small_model(n_layer=5, n_embd=64, head_size=32), tmp_path / "other.pth")
    done = export(other, path, tmp_path / "out.st", "--other_base", "1")
    assert_one_error_line(done, "blocks.4.att.time_state is missing")
    done = export(other, path, tmp_path / "out.st")
    assert_one_error_line(done, "is not the base of")
    states["blocks.0.att.time_state"][0, 0, 0] = 1e5
    save_adapter(states, {"format": "finchtune 1", "adapter": {}}, tmp_path / "large.pth")
    done = export(base, tmp_path / "large.pth", tmp_path / "out.st")
    assert_one_error_line(done, "blocks.0.att.time_state reaches 100000")
    assert not (tmp_path / "out.st").exists()
