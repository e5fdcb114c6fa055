"""Files, globs and folders -> blocks of records, read one after the other in bounded memory."""

import codecs
import glob
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finchtune.data.arrays import elements
from finchtune.data.compressed import BLOCK_BYTES, SUFFIXES, open_data
from finchtune.data.encodings import SAMPLE_BYTES, conversion_hint
from finchtune.data.records import BOM, NotUTF8, parse_line
from finchtune.data.tables import DELIMITERS, csv_rows, parquet_rows
from finchtune.data.values import BadRecord
from finchtune.errors import DataError

LINES = (".jsonl", ".ndjson", ".json")
TEXT = (".txt",)
TABLE = (*DELIMITERS, ".parquet")
COMPRESSED = SUFFIXES
MAX_RECORD = 256 << 20


@dataclass(frozen=True)
class Block:
    """Some consecutive records of one file: JSON lines, or values already parsed (None is none).

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

    @property
    def size(self) -> int:
        """Bytes of its lines."""
        return len(self.lines) if self.span is None else self.span[1] - self.span[0]

    def records(self) -> Iterator[tuple[str, Any]]:
        """Each record, or the BadRecord that says why it is none, after its `file:line`."""
        for number, row in enumerate(self.rows, self.first):
            if row is not None:
                yield f"{self.path}:{number}", row
        content = self.lines if self.span is None else _read_span(self.path, *self.span)
        begin = content[:SAMPLE_BYTES]
        lines = content.split(b"\n")
        # A line may be very long: nothing of it is to be held twice.
        del content
        lines.reverse()
        number = self.first - 1
        while lines:
            number += 1
            line = lines.pop()
            if number == 1:
                line = line.removeprefix(BOM)
            if not line or line.isspace():
                continue
            record = self._parse(line, begin)
            del line
            yield f"{self.path}:{number}", record
            del record

    def _parse(self, line: bytes, begin: bytes) -> Any:
        try:
            return parse_line(line)
        except BadRecord as error:
            other = isinstance(error, NotUTF8) or b"\0" in line
            return BadRecord(f"{error}{conversion_hint(self.path, begin)}") if other else error


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
            raise DataError(f"{pattern}: {what}")
        found |= dict.fromkeys(matches)
    for path in found:
        if not path.is_file():
            raise DataError(f"{path}: not a regular file")
        if not _kind(path):
            known = ", ".join(LINES + TEXT + TABLE)
            raise DataError(f"{path}: unknown kind of file; known are {known}, and .gz or .zst")
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
            yield from _read_table(path, kind)
        elif kind in TEXT:
            yield from _read_text(path, text_field, last_cut)
        else:
            yield from _read_lines(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {reason}") from None


def _kind(path: Path) -> str:
    """The suffix that says how to read the file, that of the compression aside; "" if unknown."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in LINES + TEXT + tuple(DELIMITERS) else ""
    return suffix if suffix in LINES + TEXT + TABLE else ""


def _read_lines(path: Path) -> Iterator[Block]:
    with open_data(path) as (content, stored):
        if _is_array(content):
            yield from _read_array(path, content, stored)
            return
        number, position = 1, 0
        while block := content.read(BLOCK_BYTES):
            lines = block.count(b"\n")
            rest = content.readline(MAX_RECORD)
            if len(rest) == MAX_RECORD:
                raise DataError(
                    f"{path}:{number + lines}: a line longer than {MAX_RECORD:,} bytes; split it"
                )
            lines += rest.count(b"\n")
            read = stored.tell() - position
            if content is stored:  # whoever encodes it reads it again, from the system's cache
                del block, rest
                span = (position, position + read)
                yield Block(str(path), number, span=span, read_bytes=read)
            else:
                block += rest
                del rest
                yield Block(str(path), number, lines=block, read_bytes=read)
            number += lines
            position += read


def _is_array(content: io.BufferedReader) -> bool:
    """Whether the stream, which is not moved, begins with `[`."""
    return content.peek(len(BOM) + 64).removeprefix(BOM).lstrip()[:1] == b"["


def _read_array(path: Path, content: Any, stored: io.BufferedReader) -> Iterator[Block]:
    """The elements of an array as lines, numbered from 1."""
    lines: list[bytes] = []
    number, position, size = 1, 0, 0

    def block() -> Block:
        nonlocal number, position, lines
        first, number = number, number + len(lines)
        before, position = position, stored.tell()
        taken, lines = lines, []
        return Block(str(path), first, lines=b"\n".join(taken), read_bytes=position - before)

    try:
        for element in elements(content, BLOCK_BYTES, MAX_RECORD):
            # A long element is a block of its own, since joining copies.
            size += len(element)
            if lines and size > BLOCK_BYTES:
                yield block()
                size = len(element)
            # No string holds a line feed, so those that there are mean nothing. An element that is
            # missing must not pass as a blank line.
            lines.append(element.replace(b"\n", b" ") if element.strip() else b",")
            del element
    except BadRecord as error:
        raise DataError(f"{path}: {error}") from None
    yield block()


def _read_span(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _read_text(path: Path, field: str, last_cut: Callable[[bytes], int]) -> Iterator[Block]:
    # Before the first piece is given away, since a bad text is left out as a whole.
    if bad := _not_utf8(path):
        yield Block(str(path), 1, rows=(bad,), read_bytes=path.stat().st_size)
        return
    with open_data(path) as (content, stored):
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
    with open_data(path) as (content, _):
        try:
            while piece := content.read(BLOCK_BYTES):
                decoder.decode(piece)
                start += len(piece)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            place = start - len(decoder.getstate()[0]) + error.start
            hint = conversion_hint(str(path), piece[max(0, error.start - SAMPLE_BYTES // 2) :])
            byte = error.object[error.start]
            return BadRecord(f"byte 0x{byte:02x} at {place} is not UTF-8{hint}")
    return None


def _read_table(path: Path, kind: str) -> Iterator[Block]:
    number = 2 if kind in DELIMITERS else 1  # below the line of names
    for rows, read in csv_rows(path, kind) if kind in DELIMITERS else parquet_rows(path):
        yield Block(str(path), number, rows=rows, read_bytes=read)
        number += len(rows)
