"""The CUDA kernels of cuda/gpu/elementwise.h, run on the CPU in place of the CPU's operators."""

import contextlib
import ctypes
import functools
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers.emulation import (
    DTYPE_CODES,
    GUARD,
    Call,
    Pointer,
    array,
    compile_emulated,
    integers,
)
from helpers.heads_emulator import HeadOperators
from helpers.norm_emulator import NormOperators
from helpers.quantised_emulator import QuantisedOperators
from helpers.support import cpu_path_in_use
from torch import Tensor


class Shift(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "channels", "n_seq", "length")),
        ("cu_seqlens", Pointer),
        ("dtype", ctypes.c_int32),
    ]


class GatedNorm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "groups", "size")),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        *((name, Pointer) for name in ("y", "gate", "weight", "bias")),
    ]


class Operators:
    """The leaf operators as cuda/operators/*_gpu.cpp call the launchers."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def shift(self, x: Tensor, cu_seqlens: Tensor | None) -> Any:
        B, T, C = x.shape
        self.bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
        n_seq = B if self.bounds is None else len(self.bounds) - 1
        pointer = None if self.bounds is None else self.bounds.data_ptr()
        return ctypes.byref(Shift(B * T, C, n_seq, T, pointer, DTYPE_CODES[x.dtype]))

    def mix(self, x: Tensor, before: Any, cu: Any, maa: Tensor, blends: list[Tensor]):
        call, shape = Call(self.library), x.flatten(0, 1).shape
        out = [call.made(shape, x.dtype) for _ in maa]
        inputs = call.given(x), call.given(before), call.given(maa)
        own = array([call.given(blend) for blend in blends])
        results = array([pointer for _, pointer in out])
        call.launch("token_mix", self.shift(x, cu), len(maa), *inputs, own, results)
        return [y for y, _ in out]

    def token_mix(self, x: Tensor, before: Any, cu: Any, maa: Tensor) -> list[Tensor]:
        return self.mix(x, before, cu, maa, [])

    def token_mix_(self, blends: list[Tensor], x: Tensor, before: Any, cu: Any, maa: Tensor):
        for blend, y in zip(blends, self.mix(x, before, cu, maa, blends), strict=True):
            blend.copy_(y)

    def token_mix_backward(self, douts, x, before, cu, maa, blends, of_maa):
        call, shape, n = Call(self.library), x.flatten(0, 1).shape, len(maa)
        (total, p_total), (blended, p_blended) = (call.made(shape, x.dtype) for _ in range(2))
        dmaa, p_dmaa = call.made((n if of_maa else 0, shape[1]), torch.float32)
        inputs = call.given(x), call.given(before), call.given(maa)
        dout, own = [call.given(d) for d in douts], [call.made(shape, x.dtype) for _ in blends]
        for (mine, _), blend in zip(own, blends, strict=True):
            mine.copy_(blend)
        shift = self.shift(x, cu)
        scratch = call.scratch("token_mix", shift, n) if of_maa else None
        call.launch(
            "token_mix_backward",
            *(shift, n, *inputs, array(dout), array([pointer for _, pointer in own])),
            *(p_total, p_blended, p_dmaa if of_maa else None, scratch),
        )
        for (mine, _), blend in zip(own, blends, strict=True):
            blend.copy_(mine)
        return total, blended, dmaa

    def shift_backward(self, total, blended, more, x, cu, maa, of_before):
        call = Call(self.library)
        dx, p_dx = call.made(x.shape, x.dtype)
        n_seq = len(x) if cu is None else len(cu) - 1
        before, p_before = call.made((n_seq if of_before else 0, x.shape[2]), x.dtype)
        before.zero_()
        parts = (call.given(part) for part in (total, blended, more, maa))
        call.launch(
            "shift_backward", self.shift(x, cu), *parts, p_dx, p_before if of_before else None
        )
        return dx, before

    def norm(self, call: Call, y, gate, weight, bias, groups, eps) -> Any:
        inputs = (call.given(x) for x in (y, gate, weight, bias))
        size = y.shape[1] // groups
        norm = GatedNorm(len(y), groups, size, eps, DTYPE_CODES[y.dtype], *inputs)
        return ctypes.byref(norm)

    def gated_norm(self, y, gate, weight, bias, groups, eps):
        call = Call(self.library)
        out, pointer = call.made(y.shape, y.dtype)
        call.launch("gated_norm", self.norm(call, y, gate, weight, bias, groups, eps), pointer)
        return out

    def gated_norm_backward(self, dout, y, gate, weight, bias, groups, eps, of_weight):
        call = Call(self.library)
        norm = self.norm(call, y, gate, weight, bias, groups, eps)
        (dy, p_dy), (dgate, p_dgate) = (call.made(y.shape, y.dtype) for _ in range(2))
        both, p_both = call.made((2, y.shape[1] if of_weight else 0), torch.float32)
        scratch = call.scratch("gated_norm", norm) if of_weight else None
        parameters = p_both if of_weight else None
        call.launch(
            "gated_norm_backward", norm, call.given(dout), p_dy, p_dgate, parameters, scratch
        )
        return dy, dgate, both[0].clone(), both[1].clone()

    def elements(self, name: str, inputs: Sequence[Tensor], n_outputs: int) -> list[Tensor]:
        call, like = Call(self.library), inputs[0]
        out = [call.made(like.shape, like.dtype) for _ in range(n_outputs)]
        pointers = [call.given(x) for x in inputs] + [pointer for _, pointer in out]
        call.launch(name, DTYPE_CODES[like.dtype], *integers(like.numel()), *pointers)
        return [y for y, _ in out]

    def squared_relu(self, x):
        return self.elements("squared_relu", [x], 1)[0]

    def squared_relu_backward(self, dy, y):
        return self.elements("squared_relu_backward", [dy, y], 1)[0]

    def sigmoid_gate(self, gate, y):
        return self.elements("sigmoid_gate", [gate, y], 1)[0]

    def sigmoid_gate_backward(self, dout, gate, y):
        return tuple(self.elements("sigmoid_gate_backward", [dout, gate, y], 2))

    def shard_sums(self, x, r, dtype):
        call = Call(self.library)
        sums, pointer = call.made((len(x), r), dtype)
        codes = DTYPE_CODES[x.dtype], DTYPE_CODES[dtype]
        call.launch("shard_sums", *codes, *integers(*x.shape, r), call.given(x), pointer)
        return sums

    def add_to_shards_(self, x, s):
        call = Call(self.library)
        mine, pointer = call.made(x.shape, x.dtype)
        mine.copy_(x)
        codes = DTYPE_CODES[x.dtype], DTYPE_CODES[s.dtype]
        sizes = integers(*x.shape, s.shape[1])
        call.launch("add_to_shards", *codes, *sizes, pointer, call.given(s))
        x.copy_(mine)

    def bat_row_forward(self, x, D):
        u = torch.bmm(x.unflatten(1, D.shape[:2]).transpose(0, 1), D.mT)
        call, (n, r) = Call(self.library), D.shape[:2]
        moved, p_moved = call.made(x.shape, x.dtype)
        sums, p_sums = call.made((len(x), r), torch.float32)
        sizes, inputs = integers(len(x), n, r), (call.given(x), call.given(u))
        call.launch("move_shards", DTYPE_CODES[x.dtype], *sizes, *inputs, p_moved, p_sums)
        return moved, sums

    def bat_row_backward_(self, dx, x, D, sums):
        call, (n, r) = Call(self.library), D.shape[:2]
        q, p_q = call.made((n, len(x), r), x.dtype)
        sizes, inputs = integers(len(x), n, r), (call.given(dx), call.given(sums))
        call.launch("gather_shards", DTYPE_CODES[x.dtype], *sizes, *inputs, p_q)
        shards = dx.unflatten(1, (n, r)).transpose(0, 1)
        shards.baddbmm_(q, D)
        return torch.bmm(q.mT, x.unflatten(1, (n, r)).transpose(0, 1))

    def unpack(self, codes, scales, table, rows, columns, dtype):
        call = Call(self.library)
        kind = 0 if table else 1 if codes.dtype == torch.int8 else 2
        values = (ctypes.c_float * 16)(*table)
        out, pointer = call.made((rows, columns), dtype)
        inputs = call.given(codes), call.given(scales.view(torch.float32))
        call.launch(
            "unpack",
            *(DTYPE_CODES[dtype], kind, ctypes.byref(values), *integers(rows * columns)),
            *(*inputs, pointer),
        )
        return out

    def cross_entropy_(self, logits, labels, l2wrap):
        call = Call(self.library)
        mine, pointer = call.made(logits.shape, logits.dtype)
        mine.copy_(logits)
        losses, p_losses = call.made(labels.shape, torch.float32)
        call.launch(
            "cross_entropy",
            *(DTYPE_CODES[logits.dtype], *integers(*logits.shape), pointer),
            *(Pointer(labels.data_ptr()), ctypes.c_float(l2wrap), p_losses),
        )
        logits.copy_(mine)
        return losses


HELPERS = ("shift", "mix", "norm", "elements", "heads")
USUAL = {"elementwise.cu": Operators, "heads.cu": HeadOperators}
SOURCES = {**USUAL, "norm.cu": NormOperators, "quantised.cu": QuantisedOperators}


@functools.cache
def emulated_library(source: str) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp("elementwise"))
    return compile_emulated(source, folder / f"{source}.so")


def emulation_configure(*settings: int) -> None:
    """For the usual libraries, what tests/ops/wkv6/emulation/host.cpp names."""
    for source in USUAL:
        emulated_library(source).emulation_configure(*settings)


@contextlib.contextmanager
def cuda_kernels_in_place(*sources: str) -> Iterator[None]:
    """Within, CPU tensors go through the CUDA kernels, by way of the same operators.

    Those of the files named, else of the usual ones.
    """
    library = torch.library.Library("finchtune", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that others are overridden
        for source in sources or USUAL:
            kind = SOURCES[source]
            operators = kind(emulated_library(source))
            for name in vars(kind):
                if name not in HELPERS and not name.startswith("__"):
                    library.impl(name, getattr(operators, name), "CPU")
    try:
        yield
    finally:
        library._destroy()


EMULATED = "cuda emulated"


def kernels_in_use(name: str) -> contextlib.AbstractContextManager[None]:
    """One of the CPU's forms by name, or the CUDA kernels emulated."""
    return cuda_kernels_in_place() if name == EMULATED else cpu_path_in_use(name)


assert GUARD % 8 == 0  # so that vectors of 16 bytes begin where they may
