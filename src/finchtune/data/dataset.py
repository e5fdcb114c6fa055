"""The rows of a data set, and the batches of every step made of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch

from finchtune.data.batch import IGNORED, Batch, packed, padded, round_up
from finchtune.data.documents import Documents
from finchtune.data.labels import Labels, unknown_characters
from finchtune.data.sampling import Rows, Segment
from finchtune.data.templates import Template
from finchtune.errors import UserError


class Data:
    """The rows of a data set. Row i of a run depends on (seed, i) alone.

    `ctx_len` is the most tokens in a row, above the flag's where documents are used whole;
    `n_rows` is their number in one epoch, `n_tokens` that of all tokens, `skipped` that of the
    bad records left out, `unknown` counts characters without a token; `template` is the one that
    the model is to be asked with, if any; `validation` is the part held out, None where none is.
    """

    def __init__(
        self,
        rows: Rows,
        dataload: str,
        ctx_len: int,
        sets: Sequence[Documents],
        template: Template | None,
    ):
        self.validation: Data | None = None
        self.dataload, self.ctx_len, self.template = dataload, ctx_len, template
        self.skipped = sum(documents.skipped for documents in sets)
        self.unknown = sum((Counter(documents.unknown) for documents in sets), Counter())
        self._rows, self._counts, self._sets = rows, rows.counts(), sets
        self.n_rows = rows.n_rows
        self.n_tokens = self._counts.tokens

    def content(self) -> str:
        """A hash of all that the rows are made of: documents in their order, and shares of sets.

        Reads everything, without holding Python's lock.
        """
        digest = blake2b(repr(getattr(self._rows, "shares", [])).encode(), digest_size=16)
        for documents in self._sets:
            digest.update(documents.digest())
        if self.validation:
            digest.update(b"validation" + self.validation.content().encode())
        return digest.hexdigest()

    def rows(
        self, step: int, rank: int, world: int, micro_bsz: int, accumulate: int
    ) -> list[Batch]:
        """The `accumulate` micro batches of this rank in an optimizer step, counted from 0.

        The rows of a step depend only on the step and on world * micro_bsz * accumulate.
        """
        return [
            self._batch([self._rows.segments(index) for index in indices])
            for indices in self._indices(step, rank, world, micro_bsz, accumulate)
        ]

    def every_row(self, rank: int, world: int, micro_bsz: int) -> Iterator[Batch]:
        """Each row of one epoch once, over all ranks together.

        Every rank gets as many batches; one that has no row left gets one that no label counts.
        """
        for first in range(0, self.n_rows, world * micro_bsz):
            start = first + rank * micro_bsz
            indices = range(start, min(start + micro_bsz, self.n_rows))
            batch = self._batch([self._rows.segments(index) for index in indices or [0]])
            unused = torch.full_like(batch.labels, IGNORED)
            yield batch if indices else batch._replace(labels=unused)

    def document_ids(
        self, step: int, rank: int, world: int, micro_bsz: int, accumulate: int
    ) -> list[int]:
        """Numbers of the documents in what `rows` gives for the same arguments."""
        return [
            segment.document
            for indices in self._indices(step, rank, world, micro_bsz, accumulate)
            for index in indices
            for segment in self._rows.segments(index)
        ]

    def _indices(
        self, step: int, rank: int, world: int, micro_bsz: int, accumulate: int
    ) -> list[range]:
        assert step >= 0
        assert 0 <= rank < world
        if self.dataload == "only" and micro_bsz != 1:
            raise UserError(f"`dataload` only takes `micro_bsz` 1, not {micro_bsz}")
        first = step * world * micro_bsz * accumulate + rank * micro_bsz
        starts = [first + i * world * micro_bsz for i in range(accumulate)]
        return [range(start, start + micro_bsz) for start in starts]

    def _batch(self, rows: list[list[Segment]]) -> Batch:
        if self.dataload == "pack":
            return packed([segment for row in rows for segment in row])
        longest = max(len(row[0].ids) - 1 for row in rows)
        if self.dataload == "pad":
            longest = min(round_up(longest), self.ctx_len)
        return padded([row[0] for row in rows], longest)

    @cached_property
    def labels(self) -> Labels:
        """What becomes of the trained tokens of one epoch's documents."""
        return self._rows.labels()

    def report(self) -> Iterator[tuple[str, str]]:
        """What to tell before training: a subject and a sentence, for each."""
        if self.template:
            yield "template", self.template.name
        yield from self.labels.lines()
        if self.unknown:
            yield "unknown", unknown_characters(self.unknown)

    def describe(self) -> dict[str, Any]:
        """Numbers about one epoch, for a log or a plan.

        `trained_tokens` counts the targets; `padding_waste` is the share of the inputs that
        would be padding if every row were ctx_len long.
        """
        counts = self._counts
        places = counts.inputs if self.dataload == "only" else self.n_rows * self.ctx_len
        return {
            "documents": counts.documents,
            "tokens": counts.tokens,
            "rows": self.n_rows,
            "trained_tokens": counts.targets,
            **self.labels.numbers(),
            "padding_waste": 1 - counts.inputs / places,
            "skipped_records": self.skipped,
            "unknown_characters": self.unknown.total(),
            "template": self.template.record() if self.template else None,
        }
