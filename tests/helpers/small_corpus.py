"""A small corpus whose every token tells where it belongs, and batches read back as sequences."""

from itertools import pairwise
from pathlib import Path

from finchtune.data import load_data
from finchtune.data.binidx import BinIdxWriter

CTX_LEN = 24
SIZES = [2, 40, 17, 1, 25, 24, 0, 9, 33, 5, 12]


def document(i: int) -> list[int]:
    """Tokens that tell document and position, for documents of up to 50 tokens."""
    return [1 + 50 * i + j for j in range(SIZES[i])]


def write_corpus(folder: Path) -> str:
    """A .bin/.idx pair whose documents have SIZES tokens, all of them different."""
    prefix = str(folder / "corpus")
    with BinIdxWriter(prefix, "<u2") as writer:
        for i in range(len(SIZES)):
            writer.add(document(i))
    return prefix


def load(prefix, dataload, seed=1, ctx_len=CTX_LEN):
    return load_data(prefix, "binidx", dataload, ctx_len, seed=seed)


def epoch_of(data, epoch=0, micro_bsz=1):
    """The micro batches of one epoch."""
    steps = range(epoch * data.n_rows // micro_bsz, (epoch + 1) * data.n_rows // micro_bsz)
    return [data.rows(step, 0, 1, micro_bsz, 1)[0] for step in steps]


def sequences(batch):
    """Each row of a batch, or each packed sequence, as its inputs and counted (place, target)s."""
    if batch.cu_seqlens is None:
        rows = zip(batch.tokens, batch.labels, strict=True)
    else:
        bounds = list(pairwise(batch.cu_seqlens.tolist()))
        rows = [(batch.tokens[0, a:b], batch.labels[0, a:b]) for a, b in bounds]
    for tokens, labels in rows:
        targets = [(t, int(label)) for t, label in enumerate(labels) if label != -100]
        yield tokens.tolist(), targets
