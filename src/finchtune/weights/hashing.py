"""Files written and hashed at the same time."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO


class HashingWriter:
    """A binary file gone through once, in order, whose sha256 another thread computes meanwhile.

    At most one piece waits to be hashed, so that no more than two are held in memory.
    """

    def __init__(self, file: BinaryIO):
        self.file, self._sha256 = file, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(self, content: bytes | memoryview) -> None:
        """Write over as many bytes; `content` must not change until the next call."""
        self._hash(content)
        self.file.write(content)

    def keep(self, n_bytes: int = -1) -> bytes:
        """Leave so many bytes as they are, -1 for all that are left; returns them."""
        content = self.file.read(n_bytes)
        self._hash(content)
        return content

    def _hash(self, content: bytes | memoryview) -> None:
        self._wait()
        self._pending = self._thread.submit(self._sha256.update, content)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def sha256(self) -> str:
        """Hexadecimal sha256 of everything so far."""
        self._wait()
        return self._sha256.hexdigest()

    def __enter__(self) -> "HashingWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self.file.close()
