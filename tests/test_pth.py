"""Files written tensor by tensor are read as those of torch.save."""

import zipfile

import pytest
import torch

from finchtune.pth import write_pth

TENSORS = {
    "matrix": torch.randn(100, 70).bfloat16(),
    "turned": torch.randn(5, 4).half().T,
    "part": torch.randn(10, 10)[2:4, 3:],
    "number": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "whole numbers": torch.arange(5),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "float8": torch.randn(6).to(torch.float8_e4m3fn),
    "trained": torch.nn.Parameter(torch.randn(3)),
    "row": torch.randn(1, 1, 5),
}


@pytest.mark.parametrize("mmap", [True, False])
def test_files_are_read_by_torch_and_by_zip(tmp_path, mmap):
    path = tmp_path / "a.pth"
    write_pth(TENSORS, TENSORS.__getitem__, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "every checksum is right"
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].float(), tensor.float()), name
        assert type(found[name]) is torch.Tensor
        assert found[name].is_contiguous()
        assert found[name].untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert found[name].data_ptr() % 64 == 0


def test_tensors_are_asked_for_one_by_one(tmp_path):
    asked = []

    def tensor_of(name):
        asked.append((name, (tmp_path / "a.pth").exists()))
        return TENSORS[name]

    write_pth(TENSORS, tensor_of, tmp_path / "a.pth")
    assert asked == [(name, True) for name in TENSORS]
