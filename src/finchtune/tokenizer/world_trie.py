"""The World vocabulary's greedy longest match in C++ (world_trie.cpp), compiled on first use.

The trie of a vocabulary is kept beside the compiled code, since making it takes longer than
tokenising a million tokens.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from finchtune.errors import UserError
from finchtune.files import (
    FileSet,
    atomic_path,
    cache_folder,
    check_sums,
    finish_interrupted,
    make_private,
    require_private,
    sha256,
    sums_text,
)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC"]
DIGEST_BYTES = 16


class WorldTrie:
    """UTF-8 bytes -> token ids, by the states that `build_states` makes."""

    def __init__(self, library: ctypes.CDLL, states: np.ndarray):
        self._encode, self._states = library.world_encode, states

    def encode(
        self, texts: Sequence[bytes], closed: Sequence[bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """All texts' ids end to end (n,) uint16, 0 after those that are `closed`; and how many
        each has, (texts,) int64. UserError for a byte that no token begins with.
        """
        stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
        joined, n_texts = b"".join(texts), len(texts)
        del texts  # as long as `joined`
        closing = np.array(closed, np.uint8)
        ids, sizes = np.empty(len(joined) + n_texts, np.uint16), np.empty_like(stops)
        tables = (stops.ctypes.data, closing.ctypes.data, n_texts)
        n = self._encode(
            self._states.ctypes.data, joined, *tables, ids.ctypes.data, sizes.ctypes.data
        )
        if n < 0:
            place = -1 - n
            start = stops[stops <= place].max(initial=0)
            raise UserError(
                f"no token of the vocabulary begins with byte 0x{joined[place]:02x} at "
                f"{place - start}"
            )
        return ids[:n], sizes


def build_states(library: ctypes.CDLL, table: list[bytes]) -> np.ndarray:
    """The trie of a vocabulary, as bytes (n,). `table` holds the bytes of each id, or b""."""
    tokens = sorted({token: id for id, token in enumerate(table) if token}.items())
    ends = np.cumsum([len(token) for token, _ in tokens], dtype=np.int64)
    ids = np.array([id for _, id in tokens], np.int32)
    joined = b"".join(token for token, _ in tokens)
    trie = library.world_build(joined, ends.ctypes.data, ids.ctypes.data, len(ids))
    states = np.empty(library.world_bytes(trie), np.uint8)
    library.world_take(trie, states.ctypes.data)
    return states


def kept_states(
    library: ctypes.CDLL, vocab_file: Path, table: Callable[[], list[bytes]]
) -> np.ndarray:
    """`build_states` of a vocabulary file, from an earlier run where it is kept intact."""
    key = _digest(vocab_file.read_bytes() + SOURCE.read_bytes()).hex()
    path = cache_folder() / f"finchtune_world_states_{key}.bin"
    with suppress(OSError, UserError):
        require_private(path)
        kept = path.read_bytes()
        if _digest(kept[DIGEST_BYTES:]) == kept[:DIGEST_BYTES]:
            return np.frombuffer(kept, np.uint8, offset=DIGEST_BYTES)
    states = build_states(library, table())
    with suppress(OSError, UserError), atomic_path(path) as temporary:
        temporary.write_bytes(_digest(states.tobytes()) + states.tobytes())
    return states


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled world_trie.cpp; None, with a warning, where it cannot be compiled."""
    key = _digest(SOURCE.read_bytes() + platform.machine().encode()).hex()
    library = cache_folder() / f"finchtune_world_trie_{key}.so"
    compiler = os.environ.get("CXX", "c++")
    try:
        make_private(library.parent)
        if not _is_whole(library):
            _compile(compiler, library)
        return _declare(ctypes.CDLL(str(library)))
    except (OSError, UserError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"tokenising takes twice as long without g++: {reason}", stacklevel=2)
        return None


def _is_whole(library: Path) -> bool:
    """Whether a library of an earlier run is what was written; UserError if others can write it."""
    finish_interrupted(library.parent)
    if not library.exists():
        return False
    require_private(library)
    with suppress(UserError):
        check_sums(library.with_suffix(".sha256"), {library.name})
        return True
    return False


def _compile(compiler: str, library: Path) -> None:
    """Compile, and publish the library together with its sha256."""
    with tempfile.TemporaryDirectory() as folder, FileSet() as files:
        made = Path(folder, library.name)
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        shutil.copyfile(made, files.add(library))
        sums = sums_text({library.name: sha256(made)})
        files.add(library.with_suffix(".sha256")).write_text(sums)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    for name, result, arguments in (
        ("world_build", pointer, [text, pointer, pointer, number]),
        ("world_bytes", number, [pointer]),
        ("world_take", None, [pointer, pointer]),
        ("world_encode", number, [pointer, text, pointer, pointer, number, pointer, pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
