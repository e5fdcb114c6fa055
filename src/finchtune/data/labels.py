"""What is lost of the documents: trained tokens by a row's length, characters without a token."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finchtune.data.documents import Documents

SHARE = 0.95


@dataclass(frozen=True)
class Labels:
    """What becomes of the trained tokens of some documents, or windows, in rows of `ctx_len`.

    `needed` (n,) int64: the inputs up to the last trained token of each, 0 where none is trained.
    `untrained` have no trained token, `emptied` lose all of theirs by the cut, `cut` are longer
    than a row, by `lost_tokens` in all, `lost_targets` of which are trained. `too_short` have
    fewer than two tokens, and are in no row.
    """

    unit: str
    ctx_len: int
    needed: np.ndarray
    emptied: int = 0
    cut: int = 0
    lost_tokens: int = 0
    lost_targets: int = 0
    too_short: int = 0

    @property
    def untrained(self) -> int:
        return int((self.needed == 0).sum())

    def ctx_len_for(self, share: float) -> int:
        """The least ctx_len at which this share of those that are trained on lose nothing."""
        needed = np.sort(self.needed[self.needed > 0])
        return int(needed[math.ceil(share * len(needed)) - 1]) if len(needed) else 0

    def lines(self) -> Iterator[tuple[str, str]]:
        """What to tell before training: a subject and a sentence, for each."""
        n, without = len(self.needed), self.untrained + self.emptied
        if without:
            yield (
                "labels",
                (
                    f"{without:,} of {n:,} {self.unit} train nothing: {self.untrained:,} have no "
                    f"trained token, {self.emptied:,} lose theirs to ctx_len {self.ctx_len}"
                ),
            )
        else:
            yield "labels", f"each of {n:,} {self.unit} has a trained token"
        if self.too_short:
            yield "left out", f"{self.too_short:,} documents of fewer than two tokens"
        if self.unit == "windows":
            return
        yield (
            "cut off",
            (
                f"{self.lost_tokens:,} tokens of {self.cut:,} documents longer than ctx_len "
                f"{self.ctx_len}, {self.lost_targets:,} of them trained"
            ),
        )
        yield (
            "ctx_len",
            (
                f"{self.ctx_len_for(SHARE):,} keeps all trained tokens of {SHARE:.0%} of the "
                f"documents, {self.ctx_len_for(1):,} of all"
            ),
        )

    def numbers(self) -> dict[str, int]:
        """The same for a record."""
        return {
            "untrained_documents": self.untrained,
            "emptied_documents": self.emptied,
            "truncated_documents": self.cut,
            "truncated_tokens": self.lost_tokens,
            "truncated_targets": self.lost_targets,
            "too_short_documents": self.too_short,
        }


def of_documents(documents: Documents, chosen: np.ndarray, ctx_len: int) -> Labels:
    """Labels where a row begins with each of these documents' first token and is cut."""
    starts, sizes = documents.offsets[chosen], documents.sizes[chosen]
    inputs = np.minimum(sizes - 1, ctx_len)
    targets = count_targets(documents, starts, sizes - 1)
    kept = count_targets(documents, starts, inputs)
    return Labels(
        "documents",
        ctx_len,
        _needed(documents, chosen, targets),
        emptied=int(((targets > 0) & (kept == 0)).sum()),
        cut=int((sizes - 1 > ctx_len).sum()),
        lost_tokens=int((sizes - 1 - inputs).sum()),
        lost_targets=int((targets - kept).sum()),
        too_short=int((documents.sizes < 2).sum()),
    )


def of_windows(documents: Documents, n_rows: int, ctx_len: int) -> Labels:
    """Labels where a row is a window of the stream."""
    starts = np.arange(n_rows) * ctx_len
    targets = count_targets(documents, starts, np.full(n_rows, ctx_len))
    return Labels("windows", ctx_len, np.where(targets > 0, ctx_len, 0))


def together(parts: Sequence[Labels]) -> Labels:
    """Labels of several data sets in one."""
    summed = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("emptied", "cut", "lost_tokens", "lost_targets", "too_short")
    }
    needed = np.concatenate([part.needed for part in parts])
    return Labels(parts[0].unit, parts[0].ctx_len, needed, **summed)


def count_targets(documents: Documents, starts: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """How many of the `inputs` tokens after each start token are trained on, (n,) int64.

    `inputs` are at least 1.
    """
    if documents.trained is None or not len(starts):
        return inputs
    # reduceat sums from each bound to the next, or the end; every second is a document's.
    bounds = np.stack([starts + 1, starts + 1 + inputs], axis=1).ravel()
    bounds = bounds[bounds < documents.n_tokens]
    return np.add.reduceat(documents.trained, bounds, dtype=np.int64)[::2]


def _needed(documents: Documents, chosen: np.ndarray, targets: np.ndarray) -> np.ndarray:
    needed = np.where(targets > 0, documents.sizes[chosen] - 1, 0)
    if documents.trained is None:
        return needed
    starts, ends = documents.offsets[chosen], documents.offsets[chosen + 1]
    # Most documents end with a trained token; the others are searched.
    for i in np.flatnonzero((targets > 0) & (documents.trained[ends - 1] == 0)):
        needed[i] = np.flatnonzero(documents.trained[starts[i] : ends[i]])[-1]
    return needed


def unknown_characters(unknown: Mapping[str, int]) -> str:
    """A sentence about characters that have no token."""
    most = sorted(unknown, key=lambda character: -unknown[character])[:5]
    shown = ", ".join(f"{character!a} ({unknown[character]:,})" for character in most)
    more = f" and {len(unknown) - len(most):,} others" if len(unknown) > len(most) else ""
    return f"{sum(unknown.values()):,} characters have no token in this tokenizer: {shown}{more}"
