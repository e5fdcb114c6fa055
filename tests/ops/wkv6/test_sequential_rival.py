"""The sequential kernels that scripts/bench/wkv.py compares with compute the right thing."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from finchtune.ops.wkv6.reference import wkv6_reference
from finchtune.ops.wkv6.sequential import sequential_form

ROOT = Path(__file__).parents[3]
EMULATION = Path(__file__).parent / "emulation"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """sequential_wkv6.cu, compiled for the CPU."""
    library = tmp_path_factory.mktemp("sequential") / "libsequential.so"
    command = ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing"]
    command += [f"-I{EMULATION}", f"-I{ROOT / 'cuda' / 'gpu'}", "-o", library]
    source = ROOT / "scripts" / "bench" / "sequential_wkv6.cu"
    subprocess.run([*command, "-x", "c++", source], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str
)
def test_outputs_and_gradients(emulated, dtype, tolerance):
    torch.manual_seed(0)
    B, T, H, N = 2, 21, 2, 64
    r, k, v, dy = torch.randn(4, B, T, H, N).to(dtype).unbind()
    w = (torch.linspace(-6, 1, N) + 0.5 * torch.randn(B, T, H, N)).to(dtype)
    inputs = [r, k, v, w, torch.randn(H, N), torch.zeros(B, H, N, N)]
    form = sequential_form(emulated)

    def outputs_of(form, dtype=None):
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
        y, _ = form(*leaves)
        gradients = torch.autograd.grad(y, leaves[:5], dy.to(y.dtype))
        return [x.double() for x in (y.detach(), *gradients)]

    exact = outputs_of(wkv6_reference, torch.float64)
    names = ("y", "dr", "dk", "dv", "dw", "du")
    for name, a, b in zip(names, outputs_of(form), exact, strict=True):
        assert ((a - b).norm() / b.norm()).item() <= tolerance, name
