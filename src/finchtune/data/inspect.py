"""What a .bin/.idx pair holds, for a person to look at before training on it."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from finchtune.data.binidx import SCAN_TOKENS
from finchtune.data.documents import Documents
from finchtune.data.sampling import DocumentRows, PackedRows, generator
from finchtune.tokenizer import END_OF_DOCUMENT, Decoder, Tokenizer

BAR = 40
TRAINED, MASKED, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def overview(documents: Documents) -> Iterator[str]:
    """Lines: documents, tokens, how they end, what is trained on, and their lengths."""
    sizes = documents.sizes
    last = documents.tokens[documents.offsets[1:][sizes > 0] - 1]
    yield f"documents       {len(documents):,}"
    yield f"tokens          {documents.n_tokens:,}"
    yield f"token dtype     {documents.tokens.dtype.name}"
    ended = int((last == END_OF_DOCUMENT).sum())
    yield f"ending in 0     {ended:,} of {len(documents):,} documents"
    if documents.trained is not None:
        share = documents.trained.mean() if documents.n_tokens else 0.0
        yield f"trained on      {share:.1%} of the tokens under loss_mask qa"
    if len(documents):
        p50, p90, p99 = np.percentile(sizes, [50, 90, 99], method="lower")
        yield (
            f"document length mean {sizes.mean():,.1f}, min {sizes.min():,}, median {p50:,}, "
            f"90% {p90:,}, 99% {p99:,}, max {sizes.max():,}"
        )


def length_histogram(sizes: np.ndarray) -> Iterator[str]:
    """Lines: how many documents have 0, 1, 2 to 3, 4 to 7, ... tokens, from the shortest on."""
    bins = np.zeros(len(sizes), np.int64)
    bins[sizes > 0] = np.floor(np.log2(sizes[sizes > 0])).astype(np.int64) + 1
    counts = np.bincount(bins)
    for k in range(int(bins.min(initial=len(counts))), len(counts)):
        n = counts[k]
        low, high = (2 ** (k - 1), 2**k - 1) if k else (0, 0)
        label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        yield f"{label:>24}  {n:>10,}  {'#' * round(BAR * n / counts.max())}".rstrip()


def vocabulary_use(documents: Documents, vocab_size: int) -> np.ndarray:
    """How often each id stands in the data, (vocab_size,) int64."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, documents.n_tokens, SCAN_TOKENS):
        chunk = documents.tokens[start : start + SCAN_TOKENS]
        counts += np.bincount(chunk, minlength=vocab_size)
    return counts


def rows_at(documents: Documents, ctx_len: int, seed: int) -> Iterator[str]:
    """Lines: rows and padding at this ctx_len, for `pad` and `pack`, and what is lost there."""
    chosen = np.flatnonzero(documents.sizes >= 2)
    if not len(chosen):
        return
    for name, kind in (("pad", DocumentRows), ("pack", PackedRows)):
        rows = kind(documents, chosen, ctx_len, seed)
        counts = rows.counts()
        waste = 1 - counts.inputs / (rows.n_rows * ctx_len)
        yield f"{f'{name} at {ctx_len:,}':<16}{rows.n_rows:,} rows, {waste:.1%} padding"
    for name, text in rows.labels().lines():
        yield f"{name:<16}{text}"


def sample(documents: Documents, n: int, seed: int) -> list[int]:
    """Numbers of n documents drawn by `seed`, in order."""
    drawn = generator(seed).permutation(len(documents))[:n]
    return sorted(int(i) for i in drawn)


def marked_text(documents: Documents, i: int, tokenizer: Tokenizer, colour: bool) -> str:
    """Document i as text. What is trained on is green, or else stands in guillemets; the end of
    the document is shown as a word. Control characters are written out.
    """
    start, stop = int(documents.offsets[i]), int(documents.offsets[i + 1])
    trained = documents.trained
    flags = [1] * (stop - start) if trained is None else trained[start:stop].tolist()
    decoder = Decoder(tokenizer)
    parts = [
        (bool(flag), "<end>" if id == END_OF_DOCUMENT else _visible(decoder.feed(id)))
        for id, flag in zip(documents.tokens[start:stop].tolist(), flags, strict=True)
    ]
    marks = {True: (TRAINED, RESET), False: (MASKED, RESET)}
    if not colour:
        marks = {True: ("«", "»"), False: ("", "")}
    runs = groupby(parts, lambda part: part[0])
    return "".join(
        marks[flag][0] + "".join(text for _, text in run) + marks[flag][1] for flag, run in runs
    )


def _visible(text: str) -> str:
    """`text` with control characters other than the line feed written out, such as \\x1b."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
