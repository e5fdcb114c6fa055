"""CUDA kernels compiled for a CPU by tests/ops/wkv6/emulation, and guarded memory for them."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "ops" / "wkv6" / "emulation"
CUDA = ROOT / "cuda" / "gpu"
ORDERS = ("forward", "reverse", "random", "warp by warp", "warp by warp, reversed")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GUARD = 64  # elements of NaN around every tensor
Pointer = ctypes.c_void_p


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


class Call:
    """The guarded memory of one call of a launcher; after it the guards are looked at."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.guarded: list[Guarded] = []

    def given(self, x: Tensor | None) -> Pointer | None:
        """A copy of an input."""
        return None if x is None else self._keep(Guarded(x.shape, x.dtype, x))

    def made(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Pointer]:
        """Memory for an output."""
        pointer = self._keep(Guarded(tuple(shape), dtype))
        return self.guarded[-1].tensor, pointer

    def scratch(self, name: str, *arguments: Any) -> Pointer:
        bytes_of = getattr(self.library, f"finchtune_{name}_scratch_bytes")
        bytes_of.restype = ctypes.c_size_t
        return self.made((bytes_of(*arguments) // 4,), torch.float32)[1]

    def _keep(self, guarded: Guarded) -> Pointer:
        self.guarded.append(guarded)
        return guarded.pointer

    def launch(self, name: str, *arguments: Any) -> None:
        error = getattr(self.library, f"finchtune_{name}")(*arguments, None)
        assert error == 0, f"{name}: error {error}"
        for guarded in self.guarded:
            guarded.check(name)


def array(pointers: list[Pointer]) -> Any:
    return (Pointer * len(pointers))(*pointers) if pointers else None


def integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]
