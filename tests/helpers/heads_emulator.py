"""The CUDA kernels of cuda/gpu/heads.h as operators."""

import ctypes

import torch
from helpers.emulation import DTYPE_CODES, Call, Pointer, array
from torch import Tensor


class Heads(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "size")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "n_rows", "n_weights", "n_out")),
        *((name, ctypes.POINTER(Pointer)) for name in ("rows", "weights", "out")),
    ]


class HeadOperators:
    """The operators as cuda/operators/heads_gpu.cpp calls the launchers."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def heads(self, name, rows, weights, heads, eps, n_out, backward=None) -> list[Tensor]:
        """One launch; `backward`: whether the gradients of weights are wanted, if it is one."""
        call, like = Call(self.library), rows[0]
        out = [call.made(like.shape, like.dtype) for _ in range(n_out)]
        tokens, channels = like.shape
        pointers = [[call.given(x) for x in given] for given in (rows, weights)]
        counts = len(rows), len(weights), n_out
        arrays = [array(some) for some in (*pointers, [pointer for _, pointer in out])]
        sizes = tokens, heads, channels // heads, eps, DTYPE_CODES[like.dtype]
        arguments = ctypes.byref(Heads(*sizes, *counts, *arrays))
        found = [x for x, _ in out]
        if backward is None:
            call.launch(name, arguments)
        elif backward:
            sums, pointer = call.made((len(weights), channels), torch.float32)
            call.launch(name, arguments, pointer, call.scratch("heads", arguments))
            found.append(sums)
        else:
            call.launch(name, arguments, None, None)
        return found

    def wkv7_inputs(self, rows, values, weights, heads, eps):
        given = *rows, *values
        return self.heads("wkv7_inputs", given, weights, heads, eps, 5 if values else 4)

    def wkv7_inputs_backward(self, douts, rows, values, weights, heads, eps, of_weights):
        given = *rows, *douts[:4], *values, *douts[4:]
        sizes = heads, eps, len(rows) + len(values)
        return self.heads("wkv7_inputs_backward", given, weights, *sizes, of_weights)

    def bonus_norm(self, rows, weights, heads, eps):
        return self.heads("bonus_norm", rows, weights, heads, eps, 1)[0]

    def bonus_norm_backward(self, dout, rows, weights, heads, eps, of_weights):
        sizes = heads, eps, len(rows)
        return self.heads("bonus_norm_backward", [*rows, dout], weights, *sizes, of_weights)
