"""CUDA kernels compiled for a CPU by tests/ops/wkv6/emulation, and guarded memory for them."""

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "ops" / "wkv6" / "emulation"
CUDA = ROOT / "cuda" / "gpu"
ORDERS = ("forward", "reverse", "random", "warp by warp", "warp by warp, reversed")
GUARD = 64  # elements of NaN around every tensor


def compile_emulated(source: str, library: Path) -> ctypes.CDLL:
    """A file of cuda/gpu, or of this path, as a plain shared library of what it exports.

    Instrumented for a thread sanitizer, whose part races.cpp plays.
    """
    command = ["g++", "-O2", "-std=c++17", "-fPIC", "-fno-strict-aliasing", f"-I{EMULATION}"]
    instrumented = ["-fsanitize=thread", "-Wno-tsan", f"-I{CUDA}", f'-DSOURCE="{source}"', "-c"]
    compiled = library.with_suffix(".o")
    subprocess.run([*command, *instrumented, EMULATION / "host.cpp", "-o", compiled], check=True)
    races = EMULATION / "races.cpp"
    subprocess.run([*command, "-shared", compiled, races, "-o", library], check=True)
    return ctypes.CDLL(str(library))


class Guarded:
    """A tensor between two stretches of NaN, so that reads and writes beyond it show."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, values: Tensor | None = None):
        size = torch.Size(shape).numel()
        fill = torch.nan if dtype.is_floating_point else 99
        self.buffer = torch.full((size + 2 * GUARD,), fill, dtype=dtype)
        self.tensor = self.buffer[GUARD : GUARD + size].view(shape)
        if values is not None:
            self.tensor.copy_(values)

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.tensor.data_ptr())

    def check(self, name: str) -> None:
        guards = torch.cat([self.buffer[:GUARD], self.buffer[-GUARD:]])
        whole = guards.isnan() if guards.is_floating_point() else guards == 99
        assert whole.all(), f"the kernel wrote beyond {name}"
