"""Files, globs and folders -> blocks of records, read one after the other in bounded memory."""

import codecs
import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finchtune.data.records import BOM, parse_line
from finchtune.data.values import BadRecord
from finchtune.errors import UserError

LINES = (".jsonl", ".ndjson", ".json")
TEXT = (".txt",)
TABLE = (".parquet",)
COMPRESSED = (".gz", ".zst")
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Some consecutive records of one file: JSON lines, or values already parsed.

    The lines are `lines`, or what stands in the file between the bytes `span`. `first` is the
    number of its first line or row, from 1; `read_bytes` counts what it took of the file as
    stored, for the progress line. `goes_on`: the next block has more of the last record's text.
    """

    path: str
    first: int
    lines: bytes = b""
    span: tuple[int, int] | None = None
    rows: tuple[Any, ...] = ()
    read_bytes: int = 0
    goes_on: bool = False

    def records(self) -> Iterator[tuple[str, Any]]:
        """Each record, or the BadRecord that says why it is none, after its `file:line`."""
        for number, row in enumerate(self.rows, self.first):
            yield f"{self.path}:{number}", row
        lines = self.lines if self.span is None else _read_span(self.path, *self.span)
        for number, line in enumerate(lines.split(b"\n"), self.first):
            if number == 1:
                line = line.removeprefix(BOM)
            if not line or line.isspace():
                continue
            try:
                record = parse_line(line)
            except BadRecord as error:
                record = error
            yield f"{self.path}:{number}", record


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files behind paths, globs and folders, each once. UserError for a pattern without any."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [file for file in sorted(path.rglob("*")) if _kind(file) and file.is_file()]
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
        matches = [match for match in matches if match.exists() and not match.is_dir()]
        if not matches:
            what = "no data files in this folder" if path.is_dir() else "no such file"
            raise UserError(f"{pattern}: {what}")
        found |= dict.fromkeys(matches)
    for path in found:
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if not _kind(path):
            known = ", ".join(LINES + TEXT + TABLE)
            raise UserError(f"{path}: unknown kind of file; known are {known}, and .gz or .zst")
    return list(found)


def no_cut(raw: bytes) -> int:
    """For `read_blocks`: each text in one piece."""
    return 0


def read_blocks(
    path: Path, text_field: str, last_cut: Callable[[bytes], int] = no_cut
) -> Iterator[Block]:
    """The file's records in order. A .txt file is one record with the field `text_field`, over
    several blocks if `last_cut` finds a place inside what is read of it.

    UserError naming the file where it cannot be read or decompressed.
    """
    kind = _kind(path)
    try:
        if kind in TABLE:
            yield from _read_table(path)
        elif kind in TEXT:
            yield from _read_text(path, text_field, last_cut)
        else:
            yield from _read_lines(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}") from None


def _kind(path: Path) -> str:
    """The suffix that says how to read the file, that of the compression aside; "" if unknown."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in LINES + TEXT else ""
    return suffix if suffix in LINES + TEXT + TABLE else ""


@contextmanager
def _open(path: Path) -> Iterator[tuple[io.BufferedReader, io.BufferedReader]]:
    """The file's content, decompressed, and the stored file below it."""
    with path.open("rb") as stored:
        if path.suffix.lower() == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=stored), BLOCK_BYTES), stored
        elif path.suffix.lower() == ".zst":
            yield _open_zst(path, stored), stored
        else:
            yield stored, stored


def _open_zst(path: Path, stored: io.BufferedReader) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: reading .zst needs `pip install zstandard`") from None
    return io.BufferedReader(_ZstReader(zstandard, stored), BLOCK_BYTES)


class _ZstReader(io.RawIOBase):
    """Frame after frame, with an error at a frame cut short, which the library's reader ignores."""

    def __init__(self, zstandard: Any, stored: io.BufferedReader):
        self._zstandard, self._stored = zstandard, stored
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._stored.read(BLOCK_BYTES // 8)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame; it is truncated")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._zstandard.ZstdError as error:
                raise OSError(f"damaged: {error}") from None
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


def _read_lines(path: Path) -> Iterator[Block]:
    with _open(path) as (content, stored):
        number, position = 1, 0
        while block := content.read(BLOCK_BYTES):
            block += content.readline()
            if number == 1 and block.removeprefix(BOM).lstrip()[:1] == b"[":
                raise UserError(f"{path}: a JSON array; write one object per line instead (.jsonl)")
            read = stored.tell() - position
            if content is stored:  # whoever encodes it reads it again, from the system's cache
                span = (position, position + read)
                yield Block(str(path), number, span=span, read_bytes=read)
            else:
                yield Block(str(path), number, lines=block, read_bytes=read)
            number += block.count(b"\n")
            position += read


def _read_span(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _read_text(path: Path, field: str, last_cut: Callable[[bytes], int]) -> Iterator[Block]:
    # Before the first piece is given away, since a bad text is left out as a whole.
    if bad := _not_utf8(path):
        yield Block(str(path), 1, rows=(bad,), read_bytes=path.stat().st_size)
        return
    with _open(path) as (content, stored):
        held = [content.read(len(BOM)).removeprefix(BOM)]
        position = 0
        while piece := content.read(BLOCK_BYTES):
            held.append(piece)
            # A piece is searched with what it may complete, not again with all that is held.
            cut = last_cut(piece)
            if not cut:
                continue
            held[-1], rest = piece[:cut], piece[cut:]
            read = stored.tell() - position
            yield _text_block(path, field, held, read, goes_on=True)
            held = [rest]
            position += read
        yield _text_block(path, field, held, stored.tell() - position)


def _text_block(
    path: Path, field: str, pieces: list[bytes], read: int, goes_on: bool = False
) -> Block:
    row = {field: b"".join(pieces).decode()}
    return Block(str(path), 1, rows=(row,), read_bytes=read, goes_on=goes_on)


def _not_utf8(path: Path) -> BadRecord | None:
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path) as (content, _):
        try:
            while piece := content.read(BLOCK_BYTES):
                decoder.decode(piece)
                start += len(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            place = start - len(decoder.getstate()[0]) + error.start
            return BadRecord(f"byte 0x{error.object[error.start]:02x} at {place} is not UTF-8")
    return None


def _read_table(path: Path) -> Iterator[Block]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs `pip install pyarrow`") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        number, size = 1, path.stat().st_size
        for batch in table.iter_batches(batch_size=1024):
            rows = tuple(batch.to_pylist())
            read = size * len(rows) // max(table.metadata.num_rows, 1)
            yield Block(str(path), number, rows=rows, read_bytes=read)
            number += len(rows)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable .parquet: {error}") from None
