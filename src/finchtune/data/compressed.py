"""Files, compressed or not, as streams of bytes that unfold to no more than is plausible."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finchtune.errors import DataError

SUFFIXES = (".gz", ".zst")
BLOCK_BYTES = 1 << 20
# A compressed block of 4 bytes may stand for 128 KiB.
ZST_STEP = 2 << 10
# Text becomes three to ten times smaller, what repeats itself much perhaps a hundred times.
MOST_TIMES = 250
ALWAYS_ALLOWED = 256 << 20


@contextmanager
def open_data(path: Path) -> Iterator[tuple[io.BufferedReader, io.BufferedReader]]:
    """The file's content, decompressed, and the stored file below it."""
    with path.open("rb") as stored:
        if path.suffix.lower() == ".gz":
            yield _bounded(path, gzip.GzipFile(fileobj=stored), stored), stored
        elif path.suffix.lower() == ".zst":
            yield _bounded(path, _zst_reader(path, stored), stored), stored
        else:
            yield stored, stored


def _bounded(path: Path, content: Any, stored: io.BufferedReader) -> io.BufferedReader:
    return io.BufferedReader(_Bounded(path, content, stored), BLOCK_BYTES)


class _Bounded(io.RawIOBase):
    """A decompressed stream that ends in UserError where little has become very much."""

    def __init__(self, path: Path, content: Any, stored: io.BufferedReader):
        self._path, self._content, self._stored = path, content, stored
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._content.readinto(buffer)
        self._read += n
        if self._read > max(ALWAYS_ALLOWED, MOST_TIMES * self._stored.tell()):
            raise DataError(
                f"{self._path}: unfolds to more than {MOST_TIMES} times its size; if that is "
                "meant, decompress it first"
            )
        return n


def _zst_reader(path: Path, stored: io.BufferedReader) -> io.RawIOBase:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs `pip install zstandard`") from None
    return _ZstReader(zstandard, stored)


class _ZstReader(io.RawIOBase):
    """Frame after frame, with an error at a frame cut short, which the library's reader ignores."""

    def __init__(self, zstandard: Any, stored: io.BufferedReader):
        self._zstandard, self._stored = zstandard, stored
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._stored.read(ZST_STEP)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame; it is truncated")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._zstandard.ZstdError as error:
                raise OSError(f"damaged: {error}") from None
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n
