"""Files written tensor by tensor are read as those of torch.save."""

import hashlib
import zipfile

import pytest
import torch

from finchtune.weights.pth import write_pth

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
    digest = write_pth(TENSORS, TENSORS.values(), path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
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


def test_dicts_in_the_dict_are_kept(tmp_path):
    state = {"a": {"x": torch.ones(3), "none": {}}, "step": 7, "b": {"y": {"z": torch.arange(2)}}}
    layout = {"a": {"x": torch.empty(3, device="meta"), "none": {}}, "step": 7, "b": state["b"]}
    write_pth(layout, [torch.ones(3), torch.arange(2)], tmp_path / "a.pth")
    found = torch.load(tmp_path / "a.pth", weights_only=True)
    assert str(found) == str(state)


def test_tensors_are_asked_for_one_by_one_and_must_be_those_of_the_layout(tmp_path):
    path, sizes = tmp_path / "a.pth", []

    def tensors():
        for tensor in TENSORS.values():
            sizes.append(path.stat().st_size)
            yield tensor

    write_pth(TENSORS, tensors(), path)
    assert len(sizes) == len(TENSORS)
    assert min(sizes) > 0
    with pytest.raises(ValueError, match="shorter"):
        write_pth(TENSORS, list(TENSORS.values())[:-1], path)
    with pytest.raises(AssertionError):
        write_pth(TENSORS, [TENSORS["row"]] * len(TENSORS), path)
