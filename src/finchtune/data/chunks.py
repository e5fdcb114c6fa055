"""A micro batch cut into chunks of tokens, which a model reads one after another."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from finchtune.data.batch import IGNORED, LENGTH_MULTIPLE, Batch


class Chunk(NamedTuple):
    """A piece of a micro batch.

    `carried` (k,) int64 names the sequences of the chunk before that continue in this one, where
    they are the first; the others begin here.
    """

    batch: Batch
    carried: Tensor


def cut(batch: Batch, length: int) -> list[Chunk]:
    """The chunks of at most `length` tokens that a micro batch is made of, at least one.

    What no counted label depends on is left out: rows from the chunk after their last label on.
    """
    counted = (batch.labels != IGNORED).nonzero()
    last = int(counted[:, 1].max()) + 1 if len(counted) else 1
    n_tokens = min(batch.tokens.shape[1], -(-last // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    # No chunk begins after the last label: it would hold nothing but the rounding.
    places = [(start, min(start + length, n_tokens)) for start in range(0, last, length)]
    if batch.cu_seqlens is None:
        return _rows(batch, places)
    return [_packed(batch, start, stop) for start, stop in places]


def empty_chunk() -> Chunk:
    """A chunk that no label counts and that nothing is carried into."""
    tokens = torch.zeros(1, LENGTH_MULTIPLE, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    return Chunk(Batch(tokens, labels), torch.zeros(0, dtype=torch.int64))


def _rows(batch: Batch, places: list[tuple[int, int]]) -> list[Chunk]:
    chunks = []
    reading = torch.arange(len(batch.tokens))
    for start, stop in places:
        needed = (batch.labels[reading, start:] != IGNORED).any(1)
        if start == 0:
            needed[:] = True
        carried = needed.nonzero().flatten()
        reading = reading[carried]
        piece = Batch(batch.tokens[reading, start:stop], batch.labels[reading, start:stop])
        chunks.append(Chunk(piece, carried if start else carried[:0]))
    return chunks


def _packed(batch: Batch, start: int, stop: int) -> Chunk:
    assert batch.cu_seqlens is not None
    bounds = sorted({min(max(bound, start), stop) for bound in batch.cu_seqlens.tolist()})
    begins = start in batch.cu_seqlens.tolist()
    # The sequence that continues is the last of the chunk before.
    carried = torch.tensor([] if begins else [-1], dtype=torch.int64)
    cu_seqlens = torch.tensor(bounds, dtype=batch.cu_seqlens.dtype) - start
    piece = Batch(batch.tokens[:, start:stop], batch.labels[:, start:stop], cu_seqlens)
    assert all(b > a for a, b in pairwise(bounds))
    return Chunk(piece, carried)
