"""`load_data`: a data file and its flags -> the batches of every step."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finchtune.data.batch import IGNORED, Batch, packed, padded, round_up
from finchtune.data.binidx import exists, strip_extension
from finchtune.data.cache import read_cached
from finchtune.data.documents import Documents, held_out, read_binidx, read_records
from finchtune.data.labels import Labels
from finchtune.data.mixing import MixedRows, SourceRows, parse_sources
from finchtune.data.render import Layout
from finchtune.data.sampling import DocumentRows, PackedRows, Rows, Segment, WindowRows
from finchtune.errors import UserError
from finchtune.tokenizer import Tokenizer

DATA_TYPES = ("binidx", "jsonl", "sft")
DATALOADS = ("pad", "get", "pack", "only")
LOSS_MASKS = ("none", "pad", "qa")


class Data:
    """The rows of a data set. Row i of a run depends on (seed, i) alone.

    `n_rows` is their number in one epoch, `n_tokens` that of all tokens, `skipped` that of the
    bad records left out; `validation` is the part held out, None where none is.
    """

    def __init__(self, rows: Rows, dataload: str, ctx_len: int, skipped: int):
        self.validation: Data | None = None
        self.dataload, self.ctx_len, self.skipped = dataload, ctx_len, skipped
        self._rows, self._counts = rows, rows.counts()
        self.n_rows = rows.n_rows
        self.n_tokens = self._counts.tokens

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
            raise UserError(f"--dataload only takes --micro_bsz 1, not {micro_bsz}")
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
        }


def load_data(
    data_file: str,
    data_type: str,
    dataload: str,
    ctx_len: int,
    loss_mask: str = "pad",
    sft_field: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 65536,
    seed: int = 42,
    on_bad: str = "fail",
    val_split: float = 0.0,
    cache_dir: str | Path | None = None,
) -> Data:
    """Read a data set and prepare its rows.

    `data_file` is a prefix for `binidx`; a file, glob or folder for `jsonl` (text, messages or
    conversations) and `sft` (the fields `sft_field`: question answer, or instruction input
    output). Several are joined by commas, with weights as `a:0.7,b:0.3`. `loss_mask` qa trains on
    answers and their end alone; none and pad on every token. `val_split` is the share of the
    documents to hold out, chosen by their hash: they are the result's `validation`. `cache_dir`
    keeps what was tokenised for the next time, in a file that all processes share; the call is
    then a collective one.
    Raises UserError for flags that do not fit together, bad data, and data without a target.
    """
    _check_choices(data_type=data_type, dataload=dataload, loss_mask=loss_mask)
    _check_numbers(ctx_len, val_split, dataload)
    layout = _layout(data_type, sft_field, loss_mask)
    _check_tokenizer(tokenizer, data_type, vocab_size)
    sources = parse_sources(data_file)

    def read(path: str) -> Documents:
        if data_type == "binidx":
            return _read_pair(path, vocab_size, loss_mask)
        assert tokenizer is not None
        if cache_dir:
            return read_cached(path, layout, tokenizer, on_bad, cache_dir)
        return read_records(path, layout, tokenizer, on_bad)

    sets = [read(path) for path, _ in sources]
    if loss_mask != "qa":
        sets = [replace(documents, trained=None) for documents in sets]
    chosen = [_split(documents, val_split) for documents in sets]

    def part(k: int) -> Data:
        parts = [_rows(d, c[k], dataload, ctx_len, seed) for d, c in zip(sets, chosen, strict=True)]
        weights = [weight for _, weight in sources]
        rows: Rows = MixedRows(parts, weights, seed) if len(parts) > 1 else parts[0]
        if not rows.counts().targets:
            raise UserError(
                f"{data_file}: --loss_mask {loss_mask} leaves no token to train on within "
                f"--ctx_len {ctx_len}; raise --ctx_len or choose another mask"
            )
        return Data(rows, dataload, ctx_len, sum(documents.skipped for documents in sets))

    data = part(0)
    data.validation = part(1) if val_split else None
    return data


def _check_choices(data_type: str, dataload: str, loss_mask: str) -> None:
    choices = [
        ("data_type", data_type, DATA_TYPES),
        ("dataload", dataload, DATALOADS),
        ("loss_mask", loss_mask, LOSS_MASKS),
    ]
    for flag, value, known in choices:
        if value not in known:
            raise UserError(f"--{flag} {value}: choose one of {', '.join(known)}")


def _check_numbers(ctx_len: int, val_split: float, dataload: str) -> None:
    if ctx_len < 1:
        raise UserError(f"--ctx_len {ctx_len} must be at least 1")
    if not 0 <= val_split < 1:
        raise UserError(f"--val_split {val_split} must be at least 0 and below 1")
    if val_split and dataload == "get":
        raise UserError(
            "--dataload get reads across documents, so it cannot hold some out; split the data "
            "with scripts/prepare_data.py --val_split"
        )


def _layout(data_type: str, sft_field: Sequence[str] | None, loss_mask: str) -> Layout:
    if data_type == "sft" and (sft_field is None or len(sft_field) not in (2, 3)):
        raise UserError(
            "--data_type sft needs --sft_field with two names (question answer) or three "
            f"(instruction input output), not {' '.join(sft_field or []) or 'none'}"
        )
    if data_type != "sft" and sft_field:
        raise UserError(f"--sft_field belongs to --data_type sft, not {data_type}")
    return Layout(tuple(sft_field or ("text",)), qa=loss_mask == "qa")


def _check_tokenizer(tokenizer: Tokenizer | None, data_type: str, vocab_size: int) -> None:
    if data_type != "binidx" and tokenizer is None:
        raise UserError(f"--data_type {data_type} needs a tokenizer; pass --tokenizer")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model only "
            f"{vocab_size}; pass --tokenizer with the model's own"
        )


def _read_pair(data_file: str, vocab_size: int, loss_mask: str) -> Documents:
    if Path(data_file).is_file() and not exists(data_file):
        raise UserError(
            f"--data_file {data_file} is no .bin/.idx pair; read it with --data_type jsonl or "
            "sft, or make a pair of it with scripts/prepare_data.py"
        )
    return read_binidx(strip_extension(data_file), vocab_size, loss_mask)


def _split(documents: Documents, val_split: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to train on and of those held out, each of two tokens or more."""
    if len(documents) == 0:
        raise UserError(f"{documents.source}: there are no documents in it")
    usable = np.flatnonzero(documents.sizes >= 2)
    if not val_split:
        return usable, usable[:0]
    held = held_out(documents, usable, val_split)
    for name, chosen in (("train on", ~held), ("hold out", held)):
        if not chosen.any():
            raise UserError(
                f"{documents.source}: --val_split {val_split} leaves no document to {name}"
            )
    return usable[~held], usable[held]


def _rows(
    documents: Documents, chosen: np.ndarray, dataload: str, ctx_len: int, seed: int
) -> SourceRows:
    if dataload == "get":
        if documents.n_tokens <= ctx_len:
            raise UserError(
                f"{documents.source}: {documents.n_tokens} tokens are too few for one window of "
                f"--ctx_len {ctx_len} and its last target; lower --ctx_len or use --dataload pad"
            )
        return WindowRows(documents, ctx_len, seed)
    if len(chosen) == 0:
        raise UserError(f"{documents.source}: no document has two tokens, so there is no target")
    kind = PackedRows if dataload == "pack" else DocumentRows
    return kind(documents, chosen, ctx_len, seed)
