"""Rows of tokens -> the tensors of a micro batch."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from finchtune.data.sampling import Segment

IGNORED = -100
LENGTH_MULTIPLE = 16


class Batch(NamedTuple):
    """A micro batch.

    `tokens` and `labels` (B, T) int64 on the CPU: labels[b, t] is the token after tokens[b, t],
    or -100 where that one does not count. Packed: B = 1, and `cu_seqlens` (S + 1,) int32 holds
    where each of the S sequences begins, then T; the state must start afresh at each. Otherwise
    `cu_seqlens` is None.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None = None

    def pinned(self) -> "Batch":
        """The batch in memory that a GPU copies from by itself, while the processor works."""
        bounds = None if self.cu_seqlens is None else self.cu_seqlens.pin_memory()
        return Batch(self.tokens.pin_memory(), self.labels.pin_memory(), bounds)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. One that is pinned is copied in its turn, and not waited for."""
        goes_on = device.type == "cuda" and self.tokens.is_pinned()
        bounds = self.cu_seqlens
        return Batch(
            self.tokens.to(device, non_blocking=goes_on),
            self.labels.to(device, non_blocking=goes_on),
            None if bounds is None else bounds.to(device, non_blocking=goes_on),
        )


def round_up(length: int) -> int:
    """The next multiple of 16, for which the kernels need no tail."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def padded(segments: list[Segment], length: int) -> Batch:
    """One segment per row, each filled up with token 0 to `length`, which no label counts."""
    tokens = np.zeros((len(segments), length), np.int64)
    labels = np.full((len(segments), length), IGNORED, np.int64)
    for b, segment in enumerate(segments):
        n = len(segment.ids) - 1
        tokens[b, :n] = segment.ids[:-1]
        _set_targets(labels[b, :n], segment)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels))


def packed(segments: list[Segment]) -> Batch:
    """The segments end to end; padding up to a multiple of 16 is a sequence of its own."""
    bounds = np.cumsum([0] + [len(segment.ids) - 1 for segment in segments])
    length = round_up(int(bounds[-1]))
    tokens = np.zeros((1, length), np.int64)
    labels = np.full((1, length), IGNORED, np.int64)
    for segment, start, stop in zip(segments, bounds[:-1], bounds[1:], strict=True):
        tokens[0, start:stop] = segment.ids[:-1]
        _set_targets(labels[0, start:stop], segment)
    if length > bounds[-1]:
        bounds = np.append(bounds, length)
    cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), cu_seqlens)


def _set_targets(labels: np.ndarray, segment: Segment) -> None:
    """Fill labels (L,) with the segment's targets, -100 where one does not count."""
    labels[:] = segment.ids[1:]
    if segment.trained is not None:
        labels[segment.trained[1:] == 0] = IGNORED
