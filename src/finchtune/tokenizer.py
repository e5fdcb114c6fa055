"""Text <-> token ids: the World vocabulary, raw bytes, or any Hugging Face tokenizer.json."""

import ast
import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from finchtune.errors import UserError
from finchtune.world_trie import WorldTrie, kept_states, load_library

END_OF_DOCUMENT = 0
WORLD_VOCAB_SIZE = 65536
BYTES_VOCAB_SIZE = 256
SEARCHED_BYTES = 1 << 16
PLAIN_LITERAL = re.compile(r"'[^'\\]*'")


def lone_surrogate(error: UnicodeEncodeError) -> UserError:
    """What to say of a text that cannot be UTF-8."""
    return UserError(
        f"the text holds a lone surrogate at character {error.start}, "
        "which no UTF-8 text can contain; repair or drop it"
    )


class Tokenizer:
    """What every tokenizer offers. Ids lie in [0, vocab_size); 0 ends a document.

    `name` is the specification that `load_tokenizer` turns into this tokenizer again.
    """

    name: str
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added. UserError if it holds a lone surrogate."""
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from None

    def encode_array(self, text: str, dtype: np.dtype) -> np.ndarray:
        """`encode`, as an array (n,)."""
        return self.encode_many([text], [False], dtype)[0]

    def encode_many(
        self, texts: Sequence[str], closed: Sequence[bool], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """All texts' ids end to end, token 0 after those that are `closed`; how many each has."""
        arrays = []
        for text, close in zip(texts, closed, strict=True):
            ids = self.encode(text) + [END_OF_DOCUMENT] * close
            arrays.append(np.fromiter(ids, dtype, len(ids)))
        sizes = np.array([len(array) for array in arrays], np.int64)
        return np.concatenate([np.empty(0, dtype), *arrays]), sizes

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def last_cut(self, raw: bytes) -> int:
        """The last place inside UTF-8 text at which no token and no character is divided, whatever
        the text goes on with; 0 if none is known.
        """
        return 0

    def id_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for, possibly a part of a character."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.id_bytes(id) for id in ids).decode("utf-8", errors="replace")

    def check_id(self, id: int) -> None:
        """UserError if `id` lies outside the vocabulary."""
        if not 0 <= id < self.vocab_size:
            raise UserError(
                f"token id {id} is outside the {self.name} vocabulary of {self.vocab_size} tokens"
            )


class BytesTokenizer(Tokenizer):
    """One token per UTF-8 byte. A NUL in the text reads as the end of the document."""

    name = "bytes"
    vocab_size = BYTES_VOCAB_SIZE

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def last_cut(self, raw: bytes) -> int:
        """As in the base class."""
        return next((i for i in reversed(range(1, len(raw))) if raw[i] >> 6 != 0b10), 0)

    def id_bytes(self, id: int) -> bytes:
        self.check_id(id)
        return bytes((id,))


class WorldTokenizer(Tokenizer):
    """The vocabulary of the released RWKV-6 models: greedy longest match over 65,529 strings.

    Single texts are encoded in Rust; arrays, which whole corpora become, in C++ at twice the speed
    where there is a compiler. Decoding joins the vocabulary's own bytes, since a token may end in
    the middle of a character. Ids 0 and 65530 to 65535 stand for no bytes.
    """

    vocab_size = WORLD_VOCAB_SIZE

    def __init__(self, vocab_file: str | None = None):
        import pyrwkv_tokenizer

        self.name = vocab_file or "world"
        shipped = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
        self._vocab_file = Path(vocab_file or shipped)

    @cached_property
    def _tokenizer(self) -> Any:
        import pyrwkv_tokenizer

        return pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(self._vocab_file))

    @cached_property
    def _trie(self) -> WorldTrie | None:
        library = load_library()
        if library is None:
            return None
        return WorldTrie(library, kept_states(library, self._vocab_file, lambda: self._bytes_of))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_many(
        self, texts: Sequence[str], closed: Sequence[bool], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """As in the base class, in one call."""
        if self._trie is None:
            return super().encode_many(texts, closed, dtype)
        try:
            raw = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from None
        ids, sizes = self._trie.encode(raw, closed)
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
    def _bytes_of(self) -> list[bytes]:
        return _read_world_vocabulary(self._vocab_file)

    def id_bytes(self, id: int) -> bytes:
        self.check_id(id)
        return self._bytes_of[id]


def _pairs(raw: bytes) -> np.ndarray:
    """Each byte with the one after it, (n - 1,) uint16: 256 times the first plus the second."""
    values = np.frombuffer(raw, np.uint8).astype(np.uint16)
    return values[:-1] << 8 | values[1:]


def _read_world_vocabulary(path: Path) -> list[bytes]:
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


class HFTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library, such as the Pile's."""

    def __init__(self, path: str):
        import tokenizers

        self.name = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer.json: {error}") from None
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        end = self._tokenizer.get_added_tokens_decoder().get(END_OF_DOCUMENT)
        if end is None or not end.special:
            token = self._tokenizer.id_to_token(END_OF_DOCUMENT)
            raise UserError(
                f"{path}: token {END_OF_DOCUMENT} must be a special token, since RWKV models end "
                f"every document with it, but it is {token!r}"
            )

    def _encode(self, text: str) -> list[int]:
        text.encode()  # the library raises a TypeError that does not say where
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def id_bytes(self, id: int) -> bytes:
        return self.decode([id]).encode()

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        for id in ids:
            self.check_id(id)
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class Decoder:
    """Text as it grows: feed ids, get the characters they complete; `finish` gives the rest.

    What `feed` and `finish` return, joined, is `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Elsewhere a token's text depends on its neighbours, so those are decoded together.
        self._together = isinstance(tokenizer, HFTokenizer)
        self._ids: list[int] = []
        self._given = 0

    def feed(self, *ids: int) -> str:
        """The text that these ids complete, possibly empty."""
        if not self._together:
            return self._utf8.decode(b"".join(self._tokenizer.id_bytes(id) for id in ids))
        self._ids += ids
        return self._complete_text()

    def finish(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        if not self._together:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._ids)[self._given :]

    def _complete_text(self) -> str:
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = text[self._given :]
        self._given = len(text)
        return new


def load_tokenizer(spec: str | None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer named by `spec`: "world", "bytes", or the path of a vocabulary file.

    A path ending in .txt is a vocabulary in World's format, any other a tokenizer.json. With
    `spec` None the model's `vocab_size` decides: 65536 is World, 256 is bytes.
    Raises UserError where that decides nothing, or where the tokenizer does not fit the model.
    """
    if spec is None:
        spec = {WORLD_VOCAB_SIZE: "world", BYTES_VOCAB_SIZE: "bytes"}.get(vocab_size or 0)
    if spec is None:
        raise UserError(
            f"no tokenizer is known for a vocabulary of {vocab_size}; "
            "pass --tokenizer with the path of its tokenizer.json"
        )
    tokenizer = _open_tokenizer(spec)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer {spec} has {tokenizer.vocab_size} tokens, but the model only "
            f"{vocab_size}; pass the tokenizer that the model was trained with"
        )
    return tokenizer


@lru_cache(maxsize=4)
def _open_tokenizer(spec: str) -> Tokenizer:
    if spec == "world":
        return WorldTokenizer()
    if spec == "bytes":
        return BytesTokenizer()
    if not Path(spec).is_file():
        raise UserError(
            f"--tokenizer {spec}: no such file; give world, bytes or the path of a tokenizer.json"
        )
    if spec.endswith(".txt"):
        _read_world_vocabulary(Path(spec))
        return WorldTokenizer(spec)
    return HFTokenizer(spec)
