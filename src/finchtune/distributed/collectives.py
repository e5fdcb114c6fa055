"""What the processes of a run do together: sums, broadcasts, work that rank 0 does for all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finchtune.distributed.identity import rank, world_size

T = TypeVar("T")
Item = TypeVar("Item")


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums of `values` over all processes, in float64, by one collective."""
    return sum_in_place(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def sum_in_place(values: Tensor) -> Tensor:
    """A tensor summed over all processes, in place. Its values are not waited for."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_min(value: float, device: torch.device) -> float:
    """The smallest `value` of all processes, in float64."""
    least = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least.item()


def run_on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait; its result, or its failure, is everyone's."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # handed on to every rank below
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def stream_to_rank_zero(items: Iterator[Item], work: Callable[[Iterator[Item]], T]) -> T:
    """`run_on_rank_zero(work)`, with items that all ranks make together, one collective call each.

    Every rank makes all of them, whether `work` takes them all or fails half-way.
    """

    def take() -> T:
        try:
            return work(items)
        finally:
            exhaust(items)

    if rank() != 0:
        exhaust(items)
    return run_on_rank_zero(take)


def exhaust(items: Iterator[Any]) -> None:
    """Make all items, and keep none."""
    for _ in items:
        pass


def all_gather(value: T) -> list[T]:
    """What each process gives, by rank: any object that can be pickled. A collective call."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process rank 0's values of `tensors`, in place. A collective call."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
