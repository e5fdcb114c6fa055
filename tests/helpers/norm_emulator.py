"""The CUDA kernels of cuda/gpu/norm.h as operators."""

import ctypes
from typing import Any

import torch
from helpers.emulation import DTYPE_CODES, Call


class LayerNorm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


class NormOperators:
    """The operators as cuda/operators/norm_gpu.cpp calls the launchers."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def norm(self, x, eps: float) -> Any:
        C = x.shape[-1]
        return ctypes.byref(LayerNorm(x.numel() // C, C, eps, DTYPE_CODES[x.dtype]))

    def added_norm(self, x, y, weight, bias, eps):
        call = Call(self.library)
        total, p_total = call.made((0,) if y is None else x.shape, x.dtype)
        normed, p_normed = call.made(x.shape, x.dtype)
        moments, p_moments = call.made((x.numel() // x.shape[-1], 2), torch.float32)
        inputs = (call.given(one) for one in (x, y, weight, bias))
        results = None if y is None else p_total, p_normed, p_moments
        call.launch("added_norm", self.norm(x, eps), *inputs, *results)
        return total.clone(), normed.clone(), moments.clone()

    def added_norm_backward(self, dnormed, dtotal, total, moments, weight, of_weight):
        call, norm = Call(self.library), self.norm(total, 0)
        dx, p_dx = call.made(total.shape, total.dtype)
        both, p_both = call.made((2, total.shape[-1] if of_weight else 0), torch.float32)
        inputs = (call.given(one) for one in (total, moments, weight, dnormed, dtotal))
        scratch = call.scratch("added_norm", norm) if of_weight else None
        parameters = p_both if of_weight else None
        call.launch("added_norm_backward", norm, *inputs, p_dx, parameters, scratch)
        return dx.clone(), both[0].clone(), both[1].clone()
