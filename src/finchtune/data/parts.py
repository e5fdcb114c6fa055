"""A process's part of a context that several processes share."""

import torch
import torch.nn.functional as F

from finchtune.data.batch import IGNORED, Batch


def part_of(batch: Batch, rank: int, size: int) -> tuple[Batch, bool]:
    """The rank-th of `size` equal parts of a batch, and whether its first sequence (all rows,
    unless they are packed) began further left.

    Where the tokens cannot be shared equally, padding that no label counts stands at the end.
    """
    T = batch.tokens.shape[1]
    length = -(-T // size)
    tokens = F.pad(batch.tokens, (0, length * size - T))
    labels = F.pad(batch.labels, (0, length * size - T), value=IGNORED)
    start, stop = rank * length, (rank + 1) * length
    part = Batch(tokens[:, start:stop], labels[:, start:stop])
    if batch.cu_seqlens is None:
        return part, rank > 0
    bounds = [*batch.cu_seqlens.tolist(), length * size]
    own = sorted({min(max(bound, start), stop) - start for bound in bounds})
    cu_seqlens = torch.tensor(own, dtype=torch.int32, device=batch.cu_seqlens.device)
    return part._replace(cu_seqlens=cu_seqlens), start not in bounds
