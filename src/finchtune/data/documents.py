"""Documents as one stream of token ids, where each ends, and which tokens count for the loss."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finchtune.data.binidx import BinIdx, exists, token_dtype
from finchtune.data.inputs import find_inputs, read_blocks
from finchtune.data.records import Findings
from finchtune.data.render import Layout
from finchtune.data.templates import Piece, Template
from finchtune.data.values import BadRecord
from finchtune.errors import DataError, UserError
from finchtune.tokenizer import Tokenizer

MASK_SUFFIX = ".mask"
DIGEST_BLOCK = 1 << 24
Pieces = list[Piece] | ValueError
"""A record's document, or why there is none (a BadRecord or UserError)."""


@dataclass(frozen=True)
class Documents:
    """Document i is tokens[offsets[i]:offsets[i + 1]].

    `tokens` (n_tokens,) of an integer dtype, `offsets` (documents + 1,) int64, `trained`
    (n_tokens,) uint8, 1 where the token counts as a target; None where every token does.
    `source` names the data in messages; `skipped` counts bad records that were left out.
    `template` is the one that some were made by; `unknown` counts characters without a token.
    """

    source: str
    tokens: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray | None = None
    skipped: int = 0
    template: Template | None = None
    unknown: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return np.diff(self.offsets)

    def digest(self) -> bytes:
        """A hash of the tokens, where documents end, and what is trained on. Reads everything."""
        digest = blake2b(str(self.tokens.dtype).encode(), digest_size=16)
        for part in (self.offsets, self.tokens, self.trained):
            content = b"all" if part is None else np.ascontiguousarray(part).data.cast("B")
            digest.update(len(content).to_bytes(8, "little"))
            for start in range(0, len(content), DIGEST_BLOCK):
                digest.update(content[start : start + DIGEST_BLOCK])
        return digest.digest()


class Encoded(NamedTuple):
    """Documents end to end: `tokens` (n,), `sizes` (documents,) int64, `trained` (n,) uint8.

    `trained` is None where every token is to be trained on.
    """

    tokens: np.ndarray
    sizes: np.ndarray
    trained: np.ndarray | None

    def flags(self) -> np.ndarray:
        """`trained`, written out where it is None."""
        return np.ones(len(self.tokens), np.uint8) if self.trained is None else self.trained

    def untrained(self) -> int:
        """How many documents have no trained token."""
        if self.trained is None or not len(self.sizes):
            return 0
        starts = (np.cumsum(self.sizes) - self.sizes)[self.sizes > 0]
        return int((np.add.reduceat(self.trained, starts, dtype=np.int64) == 0).sum())


def encode_records(
    records: Iterable[tuple[str, Any]],
    layout: Layout,
    tokenizer: Tokenizer,
    found: Findings,
    dtype: np.dtype,
    end: bool = True,
) -> Encoded:
    """Tokenise records, each after its `file:line`.

    With `end`, token 0 closes each document, trained on where the last piece is. An empty plain
    text gives no document. What is met, and bad records, goes to `found`.
    """
    rows = [(where, _rendered(record, layout, found)) for where, record in records]
    try:
        encoded = _encode([pieces for _, pieces in rows], tokenizer, dtype, end)
    except UserError:  # of a text that the tokenizer cannot take; whose is it?
        rows = [(where, _encodable(pieces, tokenizer, dtype)) for where, pieces in rows]
        tokenizer.take_unknown()
        encoded = _encode([pieces for _, pieces in rows], tokenizer, dtype, end)
    for where, pieces in rows:
        if isinstance(pieces, ValueError):
            found.add(where, str(pieces))
    found.unknown += tokenizer.take_unknown()
    return encoded


def _rendered(record: Any, layout: Layout, found: Findings) -> Pieces:
    if isinstance(record, BadRecord):
        return record
    try:
        pieces = layout.pieces(record)
    except BadRecord as error:
        return error
    found.templated = found.templated or layout.is_templated(record)
    return pieces


def _encodable(pieces: Pieces, tokenizer: Tokenizer, dtype: np.dtype) -> Pieces:
    try:
        _encode([pieces], tokenizer, dtype, end=False)
    except UserError as error:
        return error
    return pieces


def _encode(rows: list[Pieces], tokenizer: Tokenizer, dtype: np.dtype, end: bool) -> Encoded:
    """Tokenise what holds pieces, all in one call."""
    documents = [pieces for pieces in rows if isinstance(pieces, list) and pieces]
    texts = [text for pieces in documents for text, _ in pieces]
    flags = [train for pieces in documents for _, train in pieces]
    counts = np.array([len(pieces) for pieces in documents], np.int64)
    closed = np.zeros(len(texts), bool)
    closed[np.cumsum(counts) - 1] = end
    tokens, sizes = tokenizer.encode_many(texts, closed.tolist(), dtype)
    trained = None if all(flags) else np.repeat(np.array(flags, np.uint8), sizes)
    if documents:
        sizes = np.add.reduceat(sizes, np.cumsum(counts) - counts)
    return Encoded(tokens, sizes, trained)


def read_records(
    source: str, layout: Layout, tokenizer: Tokenizer, on_bad: str = "fail"
) -> Documents:
    """Tokenise a file, glob or folder of records into memory."""
    found = Findings(on_bad)
    dtype = token_dtype(tokenizer.vocab_size)
    blocks = [
        encode_records(block.records(), layout, tokenizer, found, dtype)
        for path in find_inputs([source])
        for block in read_blocks(path, layout.fields[0])
    ]
    tokens = np.concatenate([np.empty(0, dtype), *(block.tokens for block in blocks)])
    trained = np.concatenate([np.empty(0, np.uint8), *(block.flags() for block in blocks)])
    sizes = np.concatenate([[0], *(block.sizes for block in blocks)])
    mask = None if trained.all() else trained
    template = layout.chosen_template if found.templated else None
    return Documents(
        source, tokens, np.cumsum(sizes), mask, found.count, template, dict(found.unknown)
    )


def is_held_out(ids: np.ndarray, fraction: float) -> bool:
    """Whether a document belongs to the validation split; depends on its token ids alone."""
    digest = blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def held_out(documents: Documents, chosen: np.ndarray, fraction: float) -> np.ndarray:
    """`is_held_out` for the documents of these numbers, (chosen,) bool."""
    bounds = zip(documents.offsets[chosen], documents.offsets[chosen + 1], strict=True)
    return np.array([is_held_out(documents.tokens[a:b], fraction) for a, b in bounds], bool)


def read_binidx(prefix: str | Path, vocab_size: int, loss_mask: str) -> Documents:
    """Map a .bin/.idx pair, every token id checked; under `qa` with the mask files beside it."""
    data = BinIdx(prefix)
    data.check_tokens(vocab_size)
    trained = _read_mask(data) if loss_mask == "qa" else None
    return Documents(data.prefix, data.tokens, data.offsets, trained)


def _read_mask(data: BinIdx) -> np.ndarray:
    prefix = data.prefix + MASK_SUFFIX
    if not exists(prefix):
        raise UserError(
            f"`loss_mask` qa needs {prefix}.bin and .idx, which say what to train on; make them "
            "by running scripts/prepare_data.py again with `sft_field`, or `loss_mask` qa for text"
        )
    mask = BinIdx(prefix)
    if mask.dtype != np.uint8 or not np.array_equal(mask.sizes, data.sizes):
        raise DataError(
            f"{prefix}.idx does not match {data.prefix}.idx; run scripts/prepare_data.py again"
        )
    mask.check_tokens(2)
    return mask.tokens
