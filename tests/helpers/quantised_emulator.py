"""The CUDA kernels of cuda/gpu/quantised.h as operators."""

import ctypes

import torch
from helpers.emulation import DTYPE_CODES, Call, integers


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
