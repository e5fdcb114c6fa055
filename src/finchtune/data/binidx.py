"""The .bin/.idx pair that RWKV trainers share: token arrays and the index of their documents.

Little-endian. PREFIX.idx: 9 bytes `MMIDIDX\\0\\0`, u64 version = 1, u8 dtype code, u64 documents n,
u64 m, then i32 sizes[n] (tokens), i64 starts[n] (bytes), i64 doc_idx[m]. PREFIX.bin: the token
arrays, one after the other. The format is Megatron-LM's "mmap" indexed data set.
"""

import os
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from finchtune.errors import DataError, UserError
from finchtune.files import FileSet, finish_interrupted

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
MAX_DOCUMENT = 2**31 - 1
SCAN_TOKENS = 1 << 24


def strip_extension(prefix: str | Path) -> str:
    """The prefix of a data set named with or without .bin or .idx."""
    prefix = str(prefix)
    return prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix


def exists(prefix: str | Path) -> bool:
    """Whether either half of the data set is there."""
    prefix = strip_extension(prefix)
    finish_interrupted(Path(prefix).parent)
    return os.path.lexists(f"{prefix}.bin") or os.path.lexists(f"{prefix}.idx")


def file_paths(prefix: str | Path) -> list[Path]:
    """Both files of a data set."""
    return [Path(strip_extension(prefix) + suffix) for suffix in (".bin", ".idx")]


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype that trainers read: uint16 where the vocabulary fits, else int32."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<i4")


class BinIdx:
    """A memory-mapped, fully checked .bin/.idx pair.

    `tokens` is the whole stream (n_tokens,), document i is tokens[offsets[i]:offsets[i + 1]],
    `sizes` (documents,) are their lengths in tokens, both int64.
    Raises UserError naming file, document and position for anything that does not fit together.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = strip_extension(prefix)
        bin_path, idx_path = file_paths(prefix)
        finish_interrupted(bin_path.parent)
        require_file(idx_path, self.prefix)
        require_file(bin_path, self.prefix)
        self.dtype, self.sizes, starts, doc_idx = _read_index(idx_path)
        _check_sizes(idx_path, self.sizes)
        self.offsets = np.concatenate(([0], np.cumsum(self.sizes)))
        _check_starts(idx_path, starts, self.offsets * self.dtype.itemsize)
        _check_doc_idx(idx_path, doc_idx, len(self.sizes))
        self.n_tokens = int(self.offsets[-1])
        self.tokens = _map_tokens(bin_path, self.dtype, self.n_tokens)

    def __len__(self) -> int:
        return len(self.sizes)

    def doc(self, i: int) -> np.ndarray:
        """The tokens of document `i`, a view of the file in its own dtype."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def check_tokens(self, vocab_size: int) -> None:
        """UserError naming the first token id outside [0, vocab_size). Reads the whole file."""
        info = np.iinfo(self.dtype)
        if info.min >= 0 and info.max < vocab_size:
            return
        for start in range(0, self.n_tokens, SCAN_TOKENS):
            chunk = self.tokens[start : start + SCAN_TOKENS]
            if chunk.min() >= 0 and chunk.max() < vocab_size:
                continue
            bad = start + int(np.flatnonzero((chunk < 0) | (chunk >= vocab_size))[0])
            doc = int(np.searchsorted(self.offsets, bad, side="right")) - 1
            raise DataError(
                f"{self.prefix}.bin: document {doc}, position {bad - self.offsets[doc]}: token id "
                f"{self.tokens[bad]} is not below the vocabulary size {vocab_size}; prepare the "
                "data with the model's tokenizer"
            )


def require_file(path: Path, prefix: str) -> None:
    """UserError unless a file of the pair `prefix` is there, and a file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        longer = f"{prefix}_text_document"
        hint = f"; did you mean {longer}?" if os.path.exists(f"{longer}.idx") else ""
        raise DataError(f"{path}: {error.strerror}{hint}") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, sizes, starts and doc_idx, once the header and the file's length agree."""
    try:
        raw = np.memmap(path, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if len(raw) < HEADER.size:
        raise DataError(
            f"{path}: {len(raw)} bytes, too short for the header of {HEADER.size}; "
            "the file is empty or truncated"
        )
    magic, version, code, n, m = HEADER.unpack(raw[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise DataError(f"{path}: starts with {magic!r}, not {MAGIC!r}; this is no .idx file")
    if version != VERSION:
        raise DataError(f"{path}: version {version}, but only version {VERSION} is known")
    dtype = np.dtype(DTYPES.get(code, "V1"))
    if dtype.kind not in "iu":
        raise DataError(
            f"{path}: dtype code {code} is not one of the integer codes 1, 2, 3, 4, 5, 8"
        )
    expected = HEADER.size + 12 * n + 8 * m
    if expected != len(raw):
        raise DataError(
            f"{path}: {len(raw)} bytes, but its header of {n} documents and {m} boundaries needs "
            f"{expected}; the file is truncated or damaged"
        )
    sizes = np.frombuffer(raw, "<i4", n, HEADER.size).astype(np.int64)
    starts = np.frombuffer(raw, "<i8", n, HEADER.size + 4 * n)
    return dtype, sizes, starts, np.frombuffer(raw, "<i8", m, HEADER.size + 12 * n)


def _check_sizes(path: Path, sizes: np.ndarray) -> None:
    negative = np.flatnonzero(sizes < 0)
    if len(negative):
        i = int(negative[0])
        raise DataError(f"{path}: document {i} has the negative size {sizes[i]}")


def _check_starts(path: Path, starts: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.flatnonzero(starts != expected[:-1])
    if len(wrong):
        i = int(wrong[0])
        raise DataError(
            f"{path}: document {i} starts at byte {starts[i]}, but the documents before it end at "
            f"byte {expected[i]}; the index is damaged"
        )


def _check_doc_idx(path: Path, doc_idx: np.ndarray, n: int) -> None:
    """The boundaries must rise from 0 to n; where several items share one, items are documents."""
    wrong = len(doc_idx) == 0 or doc_idx[0] != 0 or doc_idx[-1] != n or (np.diff(doc_idx) < 0).any()
    if wrong:
        raise DataError(f"{path}: the document boundaries do not rise from 0 to {n}")


def _map_tokens(path: Path, dtype: np.dtype, n_tokens: int) -> np.ndarray:
    size, expected = path.stat().st_size, n_tokens * dtype.itemsize
    if size != expected:
        raise DataError(
            f"{path}: {size} bytes, but its .idx describes {n_tokens} tokens of {dtype.itemsize} "
            f"bytes, {expected} in all; the two files do not belong together or one is truncated"
        )
    if size == 0:
        return np.empty(0, dtype)
    try:
        # As a plain array, whose slices cost a tenth of a memmap's.
        return np.memmap(path, dtype, mode="r").view(np.ndarray)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


class BinIdxWriter:
    """Writes PREFIX.bin and PREFIX.idx, which appear together with all of `files` at the end.

    A context manager: where its block raises, nothing is left and an older data set stays.
    Without `files` the pair is a set of its own. Raises UserError where the disk refuses.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | str, files: FileSet | None = None):
        self.prefix = strip_extension(prefix)
        self.dtype = np.dtype(dtype)
        self.n_documents = self.n_tokens = 0
        self.sizes: list[np.ndarray] = []  # of the documents of each `extend`
        self._goes_on = False
        self._files, self._own = files or FileSet(), files is None

    def __enter__(self) -> "BinIdxWriter":
        try:
            tokens, self._index_path = (self._files.add(path) for path in file_paths(self.prefix))
            self._file = open(tokens, "wb")
        except UserError as error:
            if self._own:
                self._files.close(error)
            raise
        return self

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document."""
        self.extend(np.asarray(ids, self.dtype), [len(ids)])

    def extend(
        self, tokens: np.ndarray, sizes: Sequence[int] | np.ndarray, goes_on: bool = False
    ) -> None:
        """Append several documents: their tokens in one array (sum(sizes),), then the sizes.

        `goes_on`: the last document is not complete; the next call begins with more of it.
        """
        lengths = np.array(sizes, np.int64)
        assert tokens.dtype == self.dtype
        assert len(tokens) == lengths.sum()
        if self._goes_on:
            lengths[0] += self.sizes[-1][-1]
            self.sizes[-1] = self.sizes[-1][:-1]
            self.n_documents -= 1
        if len(lengths) and lengths.max() > MAX_DOCUMENT:
            raise DataError(
                f"document {self.n_documents + int(lengths.argmax())} has {lengths.max()} tokens, "
                f"more than the {MAX_DOCUMENT} that the format can hold; split it"
            )
        try:
            self._file.write(np.ascontiguousarray(tokens).data)
        except OSError as error:
            raise DataError(f"cannot write {self.prefix}.bin: {error.strerror}") from None
        self.sizes.append(lengths.astype("<i4"))
        self.n_documents += len(lengths)
        self.n_tokens += len(tokens)
        self._goes_on = goes_on

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                self._index_path.write_bytes(self._index())
        except OSError as failure:
            error = UserError(f"cannot write {self.prefix}.bin: {failure.strerror}")
            raise error from None
        finally:
            with suppress(OSError):  # on a full disk closing fails a second time
                self._file.close()
            if self._own:
                self._files.close(error)

    def _index(self) -> bytes:
        sizes = np.concatenate([np.empty(0, "<i4"), *self.sizes])
        n = len(sizes)
        ends = np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
        starts = np.concatenate([np.zeros(min(n, 1), "<i8"), ends[:-1]])
        doc_idx = np.arange(n + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], n, n + 1)
        return b"".join([header, sizes.tobytes(), starts.tobytes(), doc_idx.tobytes()])
