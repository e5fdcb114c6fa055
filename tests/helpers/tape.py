"""Recording as a CUDA graph does, on a CPU: the operators that ran run again at their addresses."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
"""Operators that wait for a GPU, which no graph may do."""


class Tape(TorchDispatchMode):
    """Writes down operators while it is on. No Python of the work runs again, only they do.

    After each replay all memory that belongs to the tape is filled with NaN: what was not copied
    out is lost, as where another graph shares the memory. Tensors from elsewhere must lie where
    they lay when they were recorded.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.own, self.places, self.replays = [], {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for x in tensors((args, kwargs)):
            if storage(x) not in self.own:
                self.places[x] = x.data_ptr()
        before = {storage(x) for x in tensors((args, kwargs))}
        for x in tensors(result):
            if storage(x) not in before:
                self.own[storage(x)] = x
        self.calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for x, place in self.places.items():
            assert x.data_ptr() == place, "a tensor has moved since it was recorded"
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)
        for x in self.own.values():
            if x.is_floating_point():
                x.fill_(torch.nan)


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class TapeRecorder:
    """In place of `CudaRecorder`."""

    def __init__(self):
        self.tapes = []

    def __call__(self, work):
        work()
        tape = Tape()
        with tape:
            work()
        self.tapes.append(tape)
        return tape.replay

    @property
    def replays(self) -> int:
        return sum(tape.replays for tape in self.tapes)
