"""The rows of tables: .csv and .tsv with a line of names, and .parquet."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finchtune.data.compressed import open_data
from finchtune.data.encodings import conversion_hint
from finchtune.data.values import BadRecord
from finchtune.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_CELL = 1 << 28
ROWS = 1024

Rows = Iterator[tuple[tuple[Any, ...], int]]
"""Some rows at a time, each a record or a BadRecord, and how many bytes of the file were read."""


def csv_rows(path: Path, kind: str) -> Rows:
    """The rows below the names in the first line. UserError for a table that cannot be read."""
    csv.field_size_limit(MAX_CELL)
    with open_data(path) as (content, stored):
        text = io.TextIOWrapper(content, "utf-8-sig", newline="")
        table = csv.reader(text, delimiter=DELIMITERS[kind], strict=True)
        position = 0
        try:
            names = _names(path, next(table, []))
            rows: list[Any] = []
            size = 0
            for row in table:
                rows.append(_record(names, row))
                size += sum(map(len, row))
                if len(rows) == ROWS or size >= 1 << 20:
                    yield tuple(rows), stored.tell() - position
                    rows, size, position = [], 0, stored.tell()
            yield tuple(rows), stored.tell() - position
        except csv.Error as error:
            raise DataError(f"{path}:{table.line_num}: not a readable table: {error}") from None
        except UnicodeDecodeError as error:
            hint = conversion_hint(str(path), error.object)
            raise DataError(f"{path}: the table is not UTF-8{hint}") from None


def _names(path: Path, names: list[str]) -> list[str]:
    if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise DataError(f"{path}:1: the first line must hold the names of the columns, each once")
    return names


def _record(names: list[str], row: list[str]) -> dict[str, str] | BadRecord | None:
    """None for an empty line."""
    if not row:
        return None
    if len(row) != len(names):
        return BadRecord(f"{len(row)} cells, but {len(names)} columns")
    return dict(zip(names, row, strict=True))


def parquet_rows(path: Path) -> Rows:
    """The rows of a .parquet. UserError for a file that cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading .parquet needs `pip install pyarrow`") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        size = path.stat().st_size
        for batch in table.iter_batches(batch_size=ROWS):
            rows = tuple(batch.to_pylist())
            yield rows, size * len(rows) // max(table.metadata.num_rows, 1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable .parquet: {error}") from None
