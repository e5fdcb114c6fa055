"""The CUDA kernels of cuda/gpu/quantised.h, run on the CPU: see elementwise_emulator.py."""

import contextlib
import ctypes
import functools
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers.elementwise_emulator import (
    DTYPE_CODES,
    Call,
    cuda_kernels_in_place,
    integers,
)
from helpers.emulation import compile_emulated


class QuantisedOperators:
    """The operators as cuda/operators/quantised_gpu.cpp calls the launchers."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def coded_product(self, x, codes, scales, table, n_out, activation):
        assert activation == 0
        call = Call(self.library)
        small = table is not None and table.numel() == 16
        kind = 0 if small else 1 if codes.dtype == torch.int8 else 2
        values = (ctypes.c_float * 16)(*(table.tolist() if small else ()))
        y, pointer = call.made((len(x), n_out), x.dtype)
        inputs = call.given(x), call.given(codes), call.given(scales)
        call.launch(
            "coded_product",
            *(DTYPE_CODES[x.dtype], kind, ctypes.byref(values), *integers(*x.shape, n_out)),
            *(*inputs, pointer),
        )
        return y

    def fp8_rows(self, x, factors):
        call = Call(self.library)
        codes, p_codes = call.made(x.shape, torch.uint8)
        scales, p_scales = call.made((len(x), 1), torch.float32)
        inputs = call.given(x), call.given(factors)
        sizes = integers(*x.shape)
        call.launch("fp8_rows", DTYPE_CODES[x.dtype], *sizes, *inputs, p_codes, p_scales)
        return codes.view(torch.float8_e4m3fn), scales

    def turn_bytes(self, codes):
        call = Call(self.library)
        turned, pointer = call.made(codes.shape[::-1], codes.dtype)
        call.launch("turn_bytes", *integers(*codes.shape), call.given(codes), pointer)
        return turned


@functools.cache
def emulated_quantised() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp("quantised"))
    return compile_emulated("quantised.cu", folder / "libquantised_emulated.so")


@contextlib.contextmanager
def quantised_in_place() -> Iterator[None]:
    """As `cuda_kernels_in_place`, with these kernels too."""
    operators = QuantisedOperators(emulated_quantised())
    with cuda_kernels_in_place():
        library = torch.library.Library("finchtune", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that others are overridden
            for name in ("coded_product", "fp8_rows", "turn_bytes"):
                library.impl(name, getattr(operators, name), "CPU")
        try:
            yield
        finally:
            library._destroy()
