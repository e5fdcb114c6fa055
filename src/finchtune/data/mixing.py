"""Several data sets in one: `a,b` row by row, `a:0.7,b:0.3` in these shares of the rows."""

import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from finchtune.data.binidx import exists
from finchtune.data.labels import Labels, together
from finchtune.data.sampling import Counts, DocumentRows, PackedRows, Segment, Shuffle, WindowRows
from finchtune.errors import UserError

SourceRows = DocumentRows | PackedRows | WindowRows
WEIGHTED = re.compile(r"(.+):([0-9]*\.?[0-9]+)")


def parse_sources(data_file: str) -> list[tuple[str, float | None]]:
    """The data sets that `--data_file` names, each with its weight or None.

    A path that is there is itself, whatever characters its name has.
    """
    if Path(data_file).exists() or exists(data_file):
        return [(data_file, None)]
    sources: list[tuple[str, float | None]] = []
    for part in data_file.split(","):
        match = WEIGHTED.fullmatch(part)
        sources.append((match[1], float(match[2])) if match else (part, None))
    weights = [weight for _, weight in sources]
    if not all(path for path, _ in sources):
        raise UserError(f"`data_file` {data_file}: a name is missing beside a comma")
    if None in weights and any(weight is not None for weight in weights):
        raise UserError(f"`data_file` {data_file}: give every data set a weight, or none of them")
    if 0 in weights:
        raise UserError(f"`data_file` {data_file}: weights must be above 0; leave the set out")
    return sources


class MixedRows:
    """Rows of several data sets, shuffled together.

    Documents are numbered through all sets. An epoch has as many rows as all sets together;
    without weights each set gives its own, with weights its share, going round in its own order
    where that is more than it has.
    """

    def __init__(self, sources: Sequence[SourceRows], weights: list[float | None], seed: int):
        self.sources = sources
        self.n_rows = sum(rows.n_rows for rows in sources)
        self.shares = _shares([rows.n_rows for rows in sources], weights)
        self._ends = list(accumulate(self.shares))
        self._first_document = [0, *accumulate(len(rows.documents) for rows in sources)]
        self._shuffle = Shuffle(self.n_rows, seed)

    def segments(self, index: int) -> list[Segment]:
        slot = self._shuffle(index)
        k = int(np.searchsorted(self._ends, slot, side="right"))
        place = slot - (self._ends[k] - self.shares[k])
        segments = self.sources[k].segments(index // self.n_rows * self.shares[k] + place)
        return [s._replace(document=s.document + self._first_document[k]) for s in segments]

    def counts(self) -> Counts:
        """Sums over the data sets; inputs and targets in proportion to the rows drawn."""
        total = np.zeros(4)
        for rows, share in zip(self.sources, self.shares, strict=True):
            c = rows.counts()
            drawn = share / rows.n_rows
            total += [c.documents, c.tokens, c.inputs * drawn, c.targets * drawn]
        return Counts(*(round(value) for value in total))

    def labels(self) -> Labels:
        """Of every data set once, whatever its share."""
        return together([rows.labels() for rows in self.sources])


def _shares(n_rows: list[int], weights: list[float | None]) -> list[int]:
    """Rows of an epoch for each data set, at least one; they add up to sum(n_rows)."""
    known = [weight for weight in weights if weight is not None]
    if len(known) < len(n_rows):
        return n_rows
    exact = np.array(known) / sum(known) * sum(n_rows)
    shares = np.maximum(np.floor(exact).astype(int), 1)
    while shares.sum() != sum(n_rows):
        # The largest remainder takes the next row; a minimum of one is paid by the largest share.
        step = 1 if shares.sum() < sum(n_rows) else -1
        shares[np.argmax(exact - shares) if step > 0 else np.argmax(shares)] += step
    return shares.tolist()
