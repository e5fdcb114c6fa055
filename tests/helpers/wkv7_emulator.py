"""WKV7's CUDA kernels run on the CPU."""

import ctypes
from pathlib import Path

import torch
from helpers.emulation import DTYPE_CODES, ORDERS, Guarded, array, compile_emulated
from torch import Tensor

from finchtune.ops.wkv6.sequential import Wkv6Problem

ROWS = ("r", "k", "v", "w", "a", "b")


def pointers(guarded: list[Guarded]) -> ctypes.Array:
    """Addresses one after another, as a launcher takes them."""
    return array([x.pointer for x in guarded])


class Emulator:
    """The launchers of cuda/gpu/wkv7.h. Raises CalledProcessError where they do not compile."""

    def __init__(self, folder: Path):
        self.library = compile_emulated("wkv7.cu", folder / "libwkv7_emulated.so")
        self.library.wkv7_error_string.restype = ctypes.c_char_p
        for name in ("checkpoint", "backward_scratch"):
            getattr(self.library, f"wkv7_{name}_bytes").restype = ctypes.c_size_t

    def buffer(self, name: str, problem: Wkv6Problem) -> Guarded:
        """As many bytes as the library asks for."""
        count = getattr(self.library, f"wkv7_{name}_bytes")(ctypes.byref(problem))
        return Guarded((count // 4,), torch.float32)

    def launch(self, name: str, problem: Wkv6Problem, *arguments) -> None:
        error = getattr(self.library, name)(ctypes.byref(problem), *arguments, None)
        assert error == 0, self.library.wkv7_error_string(error).decode()

    def run(
        self,
        inputs: list[Tensor | None],
        cu_seqlens: Tensor | None = None,
        order: str = "forward",
        eager: bool = False,
        capability: int = 8,
    ) -> list[Tensor]:
        """Of r, k, v, w, a, b, state, grad_y and grad_state: y, the state, all gradients.

        The states may be None.
        """
        self.library.emulation_configure(ORDERS.index(order), eager, 1, capability)
        *rows, state, grad_y, grad_state = inputs
        r = rows[0]
        n_seq = len(r) if cu_seqlens is None else len(cu_seqlens) - 1
        bounds = None if cu_seqlens is None else cu_seqlens.data_ptr()
        problem = Wkv6Problem(*r.shape, DTYPE_CODES[r.dtype], n_seq, bounds)
        given = [Guarded(x.shape, x.dtype, x) for x in rows]
        dy = Guarded(r.shape, r.dtype, grad_y)
        states = [None if x is None else Guarded(x.shape, x.dtype, x) for x in (state, grad_state)]
        before, dstate = (None if x is None else x.pointer for x in states)
        y, *gradients = (Guarded(r.shape, r.dtype) for _ in range(7))
        shape = (n_seq, *r.shape[2:], r.shape[3])
        after, of_state = (Guarded(shape, torch.float32) for _ in range(2))
        saved, scratch = (self.buffer(x, problem) for x in ("checkpoint", "backward_scratch"))
        results = y.pointer, after.pointer, saved.pointer
        self.launch("wkv7_forward", problem, pointers(given), before, *results)
        of_rows = pointers(gradients), of_state.pointer, scratch.pointer
        self.launch(
            "wkv7_backward", problem, pointers(given), dy.pointer, dstate, saved.pointer, *of_rows
        )
        outputs = [y, after, *gradients, of_state]
        for i, guarded in enumerate([*outputs, saved, scratch]):
            guarded.check(f"output {i}")
        return [x.tensor for x in outputs]
