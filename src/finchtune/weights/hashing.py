"""What weights are known by: sha256 of files and folders, also while a file is written."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import BinaryIO

from finchtune.files import sha256

AHEAD = 2**26  # bytes that are written before the disk is set to work
PART = 2**21  # bytes
QUEUE = 4  # parts
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def weights_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file; of a folder, that of its weight files' names and sha256."""
    path = Path(path)
    if not path.is_dir():
        return sha256(path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(sha256, files))
    lines = [f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hashing(path: str | Path) -> Future[str]:
    """`weights_sha256` of a file or folder, which a thread computes from now on.

    It does not hold the process up where nobody waits for it.
    """
    digest: Future[str] = Future()

    def work() -> None:
        try:
            digest.set_result(weights_sha256(path))
        except Exception as error:  # whoever waits gets it, whatever it is
            digest.set_exception(error)

    Thread(target=work, daemon=True).start()
    return digest


def in_parts(content: memoryview) -> Iterator[memoryview]:
    """The same bytes in parts that stay in a processor's cache while several things are done."""
    return (content[begin : begin + PART] for begin in range(0, len(content), PART))


def begin_writeback(descriptor: int, begin: int, n_bytes: int) -> None:
    """Have the system begin to write out a part of a file, so that syncing it is short later.

    What it is asked for is to drop the pages, and it begins to write those that it cannot drop.
    """
    if hasattr(os, "posix_fadvise"):  # on Linux
        os.posix_fadvise(descriptor, begin, n_bytes, os.POSIX_FADV_DONTNEED)


class HashingWriter:
    """A binary file gone through once, in order, whose sha256 another thread computes meanwhile.

    At most QUEUE parts wait to be hashed; they must not change, and are held in memory.
    """

    def __init__(self, file: BinaryIO):
        self.file, self._sha256 = file, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._ahead = 0

    def write(self, content: bytes | memoryview) -> None:
        """Write over as many bytes."""
        for part in in_parts(memoryview(content)):
            self._hash(part)
            self.file.write(part)
            self._ahead += len(part)
            if self._ahead > AHEAD:
                begin_writeback(self.file.fileno(), self.file.tell() - self._ahead, self._ahead)
                self._ahead = 0

    def keep(self, n_bytes: int = -1) -> bytes:
        """Leave so many bytes as they are, -1 for all that are left; returns them."""
        content = self.file.read(n_bytes)
        self._hash(content)
        return content

    def _hash(self, content: bytes | memoryview) -> None:
        self._wait(QUEUE - 1)
        self._pending.append(self._thread.submit(self._sha256.update, content))

    def _wait(self, left: int = 0) -> None:
        while len(self._pending) > left:
            self._pending.popleft().result()

    def sha256(self) -> str:
        """Hexadecimal sha256 of everything so far."""
        self._wait()
        return self._sha256.hexdigest()

    def __enter__(self) -> "HashingWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self.file.close()
