"""rwkv.cpp's file, read by a parser of its own written from rwkv.cpp's docs/FILE_FORMAT.md."""

import struct

import numpy as np
import pytest
import torch
from helpers.support import save_model, small_model

from finchtune.errors import UserError
from finchtune.weights.base import read_base
from finchtune.weights.exporting import export_model
from finchtune.weights.forms import FORMS, Settings

FORM = FORMS["rwkv.cpp"]


def parse(content: bytes) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """The header's six numbers, and the tensors in the order of torch's dimensions."""
    header, place = struct.unpack_from("<6I", content), 24
    tensors = {}
    while place < len(content):
        n_dims, n_name, kind = struct.unpack_from("<3I", content, place)
        shape = struct.unpack_from(f"<{n_dims}I", content, place + 12)
        place += 12 + 4 * n_dims
        name = content[place : place + n_name].decode()
        place += n_name
        dtype = [np.dtype("<f4"), np.dtype("<f2")][kind]
        count = int(np.prod(shape))
        tensors[name] = np.frombuffer(content, dtype, count, place).reshape(shape[::-1])
        place += count * dtype.itemsize
    return header, tensors


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_independent_parser_finds_all_tensors(dtype, tmp_path):
    model = small_model(n_layer=2, n_embd=64, head_size=16)
    path = tmp_path / "model.bin"
    base = save_model(model, tmp_path / "base.pth")
    export_model(base, path, FORM, Settings(dtype, "small"))
    header, found = parse(path.read_bytes())
    assert header == (0x67676D66, 101, 256, 64, 2, int(dtype == "fp16"))
    weights = model.state_dict()
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        small = ".time_" in name or tensor.dim() == 1
        assert found[name].dtype == (np.float32 if small or dtype == "fp32" else np.float16)
        expected = as_rwkv_cpp(name, tensor)
        assert found[name].shape == tuple(expected.shape), name
        assert np.array_equal(found[name], expected.numpy().astype(found[name].dtype)), name


def test_the_second_generation_has_its_own_names(tmp_path):
    """Blends in one tensor, low-rank matrices the other way round, small ones in fp32."""
    model = small_model(generation=7, n_layer=2, head_size=16, dim_gate_lora=9)
    base = save_model(model, tmp_path / "base.pth")
    export_model(base, tmp_path / "model.bin", FORM, Settings("fp16", "small"))
    _, found = parse((tmp_path / "model.bin").read_bytes())
    weights = model.state_dict()
    for layer in range(2):
        blends = [weights.pop(f"blocks.{layer}.att.x_{mixed}")[0] for mixed in "rwkvag"]
        expected = torch.stack(blends).numpy()
        assert np.array_equal(found.pop(f"blocks.{layer}.att.x_rwkvag"), expected)
    assert found.keys() == weights.keys()
    small = ("k_k", "k_a", "r_k", "x_k", "w0", "a0", "v0")
    for name, tensor in weights.items():
        low_rank = name.endswith(("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"))
        expected = (tensor.T if low_rank else tensor).numpy()
        precise = tensor.dim() == 1 or name.endswith(small)
        assert found[name].dtype == (np.float32 if precise else np.float16), name
        assert np.array_equal(found[name], expected.astype(found[name].dtype)), name


def as_rwkv_cpp(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith(("time_maa_w1", "time_decay_w1", "time_decay_w2")):
        return tensor.T
    if name.endswith("time_maa_w2"):
        return tensor.permute(0, 2, 1)
    if name.endswith("time_faaaa"):
        return tensor[:, :, None]
    if name.endswith("time_decay"):
        return tensor.reshape(4, 16, 1)
    return tensor.squeeze() if ".time_" in name else tensor


def test_a_round_trip_gives_the_same_bytes(tmp_path):
    base = save_model(small_model(), tmp_path / "base.pth")
    for number, source in enumerate((base, tmp_path / "0.bin")):
        export_model(source, tmp_path / f"{number}.bin", FORM, Settings("fp16", "small"))
    assert (tmp_path / "0.bin").read_bytes() == (tmp_path / "1.bin").read_bytes()


def test_other_versions_and_quantised_files_are_told(tmp_path):
    path = tmp_path / "model.bin"
    base = save_model(small_model(), tmp_path / "base.pth")
    export_model(base, path, FORM, Settings("fp16", "small"))
    content = bytearray(path.read_bytes())
    content[4] = 100
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"version 100 of rwkv\.cpp's form is not known"):
        read_base(path)
    content[4], content[32] = 101, 7
    path.write_bytes(content)
    with pytest.raises(UserError, match="is quantised; give the file it was made from"):
        read_base(path)
