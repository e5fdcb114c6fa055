"""The emulated CUDA kernels on tensors of more than 2^31 elements, of which little is touched."""

import ctypes
import tempfile

import pytest
import torch
from helpers.wkv6_emulator import Case, Emulator, make_case
from torch import Tensor

from finchtune.ops.wkv6.sequential import Wkv6Problem

BEGIN, LENGTH, N = 2**25 + 5, 70, 64  # the sequence: the last tokens of very many
ROWS = ("r", "k", "v", "w", "dy")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("offsets"))


def sparse(dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros of a file, which take memory only where they are read or written."""
    size = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile() as file:
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def run(emulator: Emulator, case: Case, begin: int) -> dict[str, Tensor]:
    """Forward and backward of a sequence that begins at this token of a longer tensor."""
    T, H = begin + LENGTH, 1
    bounds = torch.tensor([begin, T], dtype=torch.int32)
    # So long that a segment, half of it, would reach beyond the sequence's begin.
    problem = Wkv6Problem(1, 3 * T, H, N, 1, 1, bounds.data_ptr())

    def of_rows() -> Tensor:
        return sparse(torch.bfloat16, 1, T, H, N)

    inputs = {name: of_rows() for name in ROWS}
    inputs |= {"u": case.u, "state_in": case.state, "dstate": case.dstate}
    for name in ROWS:
        inputs[name][:, begin:] = getattr(case, name)
    outputs = {name: of_rows() for name in ("y", "dr", "dk", "dv", "dw")}
    outputs |= {"state": torch.empty(1, H, N, N), "dstate_in": torch.empty(1, H, N, N)}
    outputs["du"] = torch.empty(H, N)
    library, size = emulator.library, ctypes.byref(problem)
    for name in ("checkpoint", "forward_scratch", "backward_scratch"):
        bytes_of = getattr(library, f"wkv6_{name}_bytes")
        outputs[name] = sparse(torch.uint8, max(bytes_of(size), 1))

    def launch(name: str, *order: str) -> None:
        pointers = [ctypes.c_void_p((inputs | outputs)[x].data_ptr()) for x in order]
        emulator.launch(name, problem, *pointers)

    given = ("r", "k", "v", "w", "u")
    launch("wkv6_forward", *given, "state_in", "y", "state", "checkpoint", "forward_scratch")
    gradients = ("dr", "dk", "dv", "dw", "du", "dstate_in")
    launch("wkv6_backward", *given, "dy", "dstate", "checkpoint", *gradients, "backward_scratch")
    return {n: x[:, begin:] if x.dim() == 4 and len(x[0]) == T else x for n, x in outputs.items()}


@pytest.mark.parametrize("capability", [7, 8], ids=["scan", "tensor cores"])
def test_offsets_of_more_than_32_bits(emulator, capability):
    """The same bits as where the sequence stands alone."""
    case = make_case("mixed", T=LENGTH)
    emulator.library.emulation_configure(0, False, 1, capability)
    far, near = (run(emulator, case, begin) for begin in (BEGIN, 0))
    assert BEGIN * N > 2**31
    for name in ("y", "state", "dr", "dk", "dv", "dw", "du", "dstate_in"):
        assert near[name].isfinite().all()
        assert near[name].any()
        assert torch.equal(far[name], near[name]), name
