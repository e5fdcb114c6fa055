"""Context parallel: the processes that share one context, each with its part of the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from finchtune.distributed.identity import rank, world_size


class ContextGroup:
    """`size` processes, of which the one of `rank` has the rank-th part of every context.

    `goes_on` says, while the model reads such parts, whether this process's first sequence (all
    its rows, unless they are packed) began further left; None: the model reads something else.
    A context that continues from a given state does so on every process. `bytes_sent` counts what
    this process gave to the others.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int):
        self.group, self.rank, self.size = group, rank, size
        self.goes_on: bool | None = None
        self.bytes_sent = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within, the caller sets `goes_on` for each part before its forward."""
        try:
            yield
        finally:
            self.goes_on = None

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors, of one shape and dtype, of all processes of the group, by rank."""
        tensor = tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self.group)
        self.bytes_sent += tensor.nbytes
        return found


def context_group(size: int, timeout: timedelta) -> ContextGroup:
    """This process's group: `size` neighbouring ranks share a context. A collective call."""
    assert world_size() % size == 0
    mine = None
    for first in range(0, world_size(), size):
        group = dist.new_group(list(range(first, first + size)), timeout=timeout)
        mine = group if first <= rank() < first + size else mine
    assert mine is not None
    return ContextGroup(mine, rank() % size, size)
