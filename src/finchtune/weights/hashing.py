"""What weights are known by: sha256 of files and folders, also while a file is written."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from finchtune.files import sha256

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
