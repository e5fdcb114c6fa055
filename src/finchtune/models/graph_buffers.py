"""The memory between graphs of blocks, which all blocks and all shapes share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Buffers:
    """Memory at fixed addresses, shared by all graphs: for each use and dtype as much as the
    largest tensor takes. `outgrown` is called with one that a larger one will replace.
    """

    def __init__(self, outgrown: Callable[[Tensor], None]) -> None:
        self.made: dict[tuple[Any, ...], Tensor] = {}
        self.outgrown = outgrown

    def like(self, use: str, x: Tensor) -> Tensor:
        """The buffer for values such as x, at the beginning of its memory. Zero at first."""
        key = use, x.dtype, x.device
        if key in self.made and self.made[key].numel() < x.numel():
            self.outgrown(self.made[key])
            del self.made[key]  # before the larger one is made
        if key not in self.made:
            self.made[key] = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
        return self.made[key][: x.numel()].view(x.shape)

    def filled(self, use: str, x: Tensor) -> Tensor:
        """The same, with a copy of x in it."""
        return self.like(use, x).copy_(x)
