"""The World vocabulary of the released RWKV models."""

import ast
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.tokenizer.base import Tokenizer, encoded
from finchtune.tokenizer.world_trie import WorldTrie, kept_states, load_library

WORLD_VOCAB_SIZE = 65536
SEARCHED_BYTES = 1 << 16
PLAIN_LITERAL = re.compile(r"'[^'\\]*'")


class WorldTokenizer(Tokenizer):
    """The vocabulary of the released RWKV models: greedy longest match over 65,529 strings.

    Single texts are encoded in Rust; arrays, which whole corpora become, in C++ at twice the speed
    where there is a compiler. Decoding joins the vocabulary's own bytes, since a token may end in
    the middle of a character. Ids 0 and 65530 to 65535 stand for no bytes.
    """

    vocab_size = WORLD_VOCAB_SIZE

    def __init__(self, vocab_file: str | None = None):
        import pyrwkv_tokenizer

        self.name = vocab_file or "world"
        shipped = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
        self.vocab_file = Path(vocab_file or shipped)

    @cached_property
    def _tokenizer(self) -> Any:
        import pyrwkv_tokenizer

        return pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(self.vocab_file))

    @cached_property
    def _trie(self) -> WorldTrie | None:
        library = load_library()
        if library is None:
            return None
        return WorldTrie(library, kept_states(library, self.vocab_file, lambda: self._bytes_of))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_many(
        self, texts: Sequence[str], closed: Sequence[bool], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """As in the base class, in one call."""
        if self._trie is None:
            return super().encode_many(texts, closed, dtype)
        ids, sizes = self._trie.encode(encoded(texts), closed)
        return ids.astype(dtype, copy=False), sizes

    def last_cut(self, raw: bytes) -> int:
        """As in the base class: between two bytes that no token holds next to each other."""
        pairs = _pairs(raw[-SEARCHED_BYTES:])
        starts_character = (pairs & 0xC0) != 0x80
        places = np.flatnonzero(~self._held[pairs] & starts_character)
        return len(raw) - len(pairs) + int(places[-1]) if len(places) else 0

    @cached_property
    def _held(self) -> np.ndarray:
        """Which two bytes stand next to each other in a token, (65536,) bool."""
        held = np.zeros(1 << 16, bool)
        if not {bytes([byte]) for byte in range(256)} <= set(self._bytes_of):
            held[:] = True  # a text with an unknown byte must fail as a whole, so it stays whole
        for token in self._bytes_of:
            held[_pairs(token)] = True
        return held

    @cached_property
    def sha256(self) -> str:
        """As in the base class."""
        return sha256(self.vocab_file)

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        return read_world_vocabulary(self.vocab_file)

    def id_bytes(self, id: int) -> bytes:
        self.check_id(id)
        return self._bytes_of[id]


def _pairs(raw: bytes) -> np.ndarray:
    """Each byte with the one after it, (n - 1,) uint16: 256 times the first plus the second."""
    values = np.frombuffer(raw, np.uint8).astype(np.uint16)
    return values[:-1] << 8 | values[1:]


def read_world_vocabulary(path: Path) -> list[bytes]:
    """Bytes of each of the 65,536 ids. A line is: id, Python literal of str or bytes, length."""
    table = [b""] * WORLD_VOCAB_SIZE
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            id, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            if PLAIN_LITERAL.fullmatch(literal):
                token = literal[1:-1].encode()
            else:
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else token
            if len(token) != int(length):
                raise ValueError(f"token {id} has {len(token)} bytes, not {length}")
            table[int(id)] = token
    except (ValueError, SyntaxError, IndexError) as error:
        raise UserError(f"{path}: not a World vocabulary: {error}") from None
    return table
