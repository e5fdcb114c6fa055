"""Files above 4 GB, where zip changes its form (zip64) and offsets outgrow 32 bits."""

import zipfile

import pytest
import torch
from safetensors import safe_open

from finchtune.files import sha256
from finchtune.weights.forms.safetensors import read_safetensors, write_safetensors
from finchtune.weights.lazy import LazyTensors
from finchtune.weights.pth import read_record, write_pth
from finchtune.weights.tensors import read_tensors

ROWS, COLUMNS, PIECE = 34, 2**26, 2  # bytes in bf16: above 4 GB, written 256 MB at a time
LAYOUT = {
    "small": torch.empty(3, device="meta"),
    "large": torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="meta"),
    "last": torch.empty(5, device="meta"),
}


def pieces(name):
    """The rows of `large` hold their numbers; the other tensors are short."""
    if name == "large":
        piece = torch.empty(PIECE, COLUMNS, dtype=torch.bfloat16)
        for begin in range(0, ROWS, PIECE):
            yield piece.copy_(torch.arange(begin, begin + PIECE)[:, None]).clone()
    else:
        yield torch.arange(len(LAYOUT[name]), dtype=torch.float32)


def check(found):
    assert list(found) == list(LAYOUT)
    assert torch.equal(found["last"], torch.arange(5.0))
    for row in (0, 1, ROWS - 1):
        assert torch.equal(found["large"][row, :: COLUMNS // 4], torch.full((4,), row).bfloat16())


@pytest.fixture
def folder(tmp_path):
    """A folder of which nothing stays: pytest keeps those of several runs."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.slow
def test_a_pth_above_4_gb_is_one_for_torch_zip_and_us(folder):
    path = folder / "large.pth"
    record = {"format": "of a test"}
    digest = write_pth(LAYOUT, map(pieces, LAYOUT), path, record)
    assert path.stat().st_size > 2**32
    assert digest == sha256(path)
    check(read_tensors(path))
    check(torch.load(path, weights_only=True, mmap=True))
    assert read_record(path) == record
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.slow
def test_safetensors_above_4_gb_are_read_by_the_library(folder):
    path = folder / "large.safetensors"
    tensors = LazyTensors(LAYOUT, lambda name: torch.cat(list(pieces(name))), pieces)
    assert write_safetensors(tensors, path) == sha256(path)
    check(read_safetensors(path))
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_slice("large")[ROWS - 1, -3:], torch.full((3,), 33).bfloat16())
