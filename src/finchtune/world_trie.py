"""The World vocabulary's greedy longest match in C++ (world_trie.cpp), compiled on first use."""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finchtune.errors import UserError
from finchtune.files import atomic_path, cache_folder

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC"]


class WorldTrie:
    """UTF-8 bytes -> token ids. `table` holds the bytes of each id, empty where it has none."""

    def __init__(self, library: ctypes.CDLL, table: list[bytes]):
        tokens = sorted({token: id for id, token in enumerate(table) if token}.items())
        ends = np.cumsum([len(token) for token, _ in tokens], dtype=np.int64)
        ids = np.array([id for _, id in tokens], np.int32)
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
        build, self._encode = library.world_trie, library.world_encode
        build.restype, build.argtypes = pointer, [text, pointer, pointer, number]
        self._encode.restype, self._encode.argtypes = (
            number,
            [*(pointer, text, pointer, pointer, number, pointer, pointer)],
        )
        joined = b"".join(token for token, _ in tokens)
        self._trie = build(joined, ends.ctypes.data, ids.ctypes.data, len(ids))

    def encode(
        self, texts: Sequence[bytes], closed: Sequence[bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        """All texts' ids end to end (n,) uint16, 0 after those that are `closed`; and how many
        each has, (texts,) int64. UserError for a byte that no token begins with.
        """
        joined = b"".join(texts)
        stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
        closing = np.array(closed, np.uint8)
        ids, sizes = np.empty(len(joined) + len(texts), np.uint16), np.empty_like(stops)
        tables = (stops.ctypes.data, closing.ctypes.data, len(texts))
        n = self._encode(self._trie, joined, *tables, ids.ctypes.data, sizes.ctypes.data)
        if n < 0:
            place = -1 - n
            start = stops[stops <= place].max(initial=0)
            raise UserError(
                f"no token of the vocabulary begins with byte 0x{joined[place]:02x} at "
                f"{place - start}"
            )
        return ids[:n], sizes


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled world_trie.cpp; None, with a warning, where it cannot be compiled."""
    key = hashlib.sha256(SOURCE.read_bytes() + platform.machine().encode()).hexdigest()[:16]
    library = cache_folder() / f"finchtune_world_trie_{key}.so"
    compiler = os.environ.get("CXX", "c++")
    try:
        if not library.exists():
            with atomic_path(library) as temporary:
                command = [compiler, *FLAGS, "-o", str(temporary), str(SOURCE)]
                subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library))
    except (OSError, UserError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"tokenising takes twice as long without g++: {reason}", stacklevel=2)
        return None
