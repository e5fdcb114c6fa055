"""Weights of which some are changed: checked, compared, and made some rows at a time.

Temporaries of a weight's size would take most of the time: their pages come from the system one by
one and go back to it, and no cache holds them.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from finchtune.adapters import Adapter
from finchtune.errors import CheckpointError
from finchtune.weights.lazy import LazyTensors, layout_of
from finchtune.weights.tensors import check_finite

CHUNK = 2**20  # elements changed or compared at a time: they stay in a cache

Changes = Mapping[str, dict[str, Tensor]]
"""Base name -> what changes it: {adapter tensor name: tensor}, or {"": the new weight}."""


def changed_weights(
    weights: Mapping[str, Tensor],
    changes: Changes,
    change_weight: Callable[[str, Tensor, dict[str, Tensor]], Iterator[Tensor]],
    source: str | Path,
) -> tuple[LazyTensors, dict[str, float]]:
    """`weights`, read from `source`, with `changes` made, and each one's largest change.

    `change_weight` yields a new weight in pieces, one below the other. The second result is filled
    as tensors are asked for. One that holds, or would hold, NaN or infinity raises CheckpointError.
    """
    largest: dict[str, float] = {}

    @torch.no_grad()
    def pieces_of(name: str) -> Iterator[Tensor]:
        old, change = weights[name], changes.get(name)
        if change is None:
            check_finite({name: old}, source)
            yield old
            return
        begin, largest[name] = 0, 0.0
        for new in change_weight(name, old, change):
            gap = largest_gap(new, old[begin : begin + len(new)])
            if not gap < float("inf"):
                check_finite({name: old}, source)
                raise CheckpointError(f"{name} would hold NaN or infinity; nothing is written")
            begin, largest[name] = begin + len(new), max(gap, largest[name])
            yield new

    layout = layout_of(weights)
    return LazyTensors(layout, lambda n: whole(layout[n], pieces_of(n)), pieces_of), largest


def by_rows(
    change: Callable[[Adapter, Tensor], Tensor], adapter: Adapter, W: Tensor, dtype: torch.dtype
) -> Iterator[Tensor]:
    """change(adapter, W) on the CPU, in `dtype`; in pieces where the method allows it."""
    if not adapter.output_dims:
        yield change(adapter, W).to(dtype).cpu()
        return
    step = max(1, CHUNK // W.shape[1])
    for begin in range(0, len(W), step):
        end = min(begin + step, len(W))
        yield change(adapter.of_outputs(begin, end), W[begin:end]).to(dtype).cpu()


def whole(like: Tensor, pieces: Iterator[Tensor]) -> Tensor:
    """A tensor shaped as `like` of its pieces; a single one is not copied."""
    first = next(pieces)
    if first.shape == like.shape:
        return first
    tensor, begin = torch.empty(like.shape, dtype=like.dtype), 0
    for piece in chain([first], pieces):
        tensor[begin : begin + len(piece)] = piece
        begin += len(piece)
    return tensor


def largest_gap(new: Tensor, old: Tensor) -> float:
    """The largest |new - old|, in float32; NaN or infinity if `new` holds them."""
    pairs = zip(new.flatten().split(CHUNK), old.flatten().split(CHUNK), strict=True)
    gaps = [torch.aminmax(a.to(torch.float32, copy=True).sub_(b)) for a, b in pairs if len(a)]
    return float(torch.stack([end for gap in gaps for end in gap]).abs().max()) if gaps else 0.0
