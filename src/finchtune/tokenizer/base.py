"""What every tokenizer offers, and the one of raw bytes."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from finchtune.errors import UserError

END_OF_DOCUMENT = 0
BYTES_VOCAB_SIZE = 256


def lone_surrogate(error: UnicodeEncodeError) -> UserError:
    """What to say of a text that cannot be UTF-8."""
    return UserError(
        f"the text holds a lone surrogate at character {error.start}, "
        "which no UTF-8 text can contain; repair or drop it"
    )


def encoded(texts: Sequence[str]) -> list[bytes]:
    """The texts in UTF-8; UserError for a lone surrogate."""
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise lone_surrogate(error) from None


class Tokenizer:
    """What every tokenizer offers. Ids lie in [0, vocab_size); 0 ends a document.

    `name` is the specification that `load_tokenizer` turns into this tokenizer again. `separate`:
    a text is its tokens' bytes joined, whatever stands next to each other.
    """

    name: str
    vocab_size: int
    separate = True

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added. UserError if it holds a lone surrogate."""
        try:
            return [id for part in self._parts(text) for id in self._encode(part)]
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from None

    def encode_array(self, text: str, dtype: np.dtype) -> np.ndarray:
        """`encode`, as an array (n,)."""
        return self.encode_many([text], [False], dtype)[0]

    def encode_many(
        self, texts: Sequence[str], closed: Sequence[bool], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """All texts' ids end to end, token 0 after those that are `closed`; how many each has."""
        arrays, sizes = [np.empty(0, dtype)], np.zeros(len(texts), np.int64)
        for i, (text, close) in enumerate(zip(texts, closed, strict=True)):
            try:
                parts = [np.array(self._encode(part), dtype) for part in self._parts(text)]
            except UnicodeEncodeError as error:
                raise lone_surrogate(error) from None
            parts += [np.array([END_OF_DOCUMENT], dtype)] * close
            arrays += parts
            sizes[i] = sum(map(len, parts))
        return np.concatenate(arrays), sizes

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _parts(self, text: str) -> Iterable[str]:
        """The text in pieces that have the ids that it has as a whole."""
        return (text,)

    @property
    def sha256(self) -> str:
        """Of the vocabulary, in hexadecimal; equal where all texts have the same ids."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def take_unknown(self) -> Counter[str]:
        """The characters without a token in what was encoded since the last call."""
        return Counter()

    def last_cut(self, raw: bytes) -> int:
        """The last place inside UTF-8 text at which no token and no character is divided, whatever
        the text continues with; 0 if none is known.
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

    def encode_many(
        self, texts: Sequence[str], closed: Sequence[bool], dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray]:
        """As in the base class, without a list of ids."""
        raw = encoded(texts)
        ends = [bytes([END_OF_DOCUMENT]) * close for close in closed]
        sizes = np.array([len(a) + len(b) for a, b in zip(raw, ends, strict=True)], np.int64)
        joined = b"".join(part for pair in zip(raw, ends, strict=True) for part in pair)
        del raw
        return np.frombuffer(joined, np.uint8).astype(dtype), sizes

    def last_cut(self, raw: bytes) -> int:
        """As in the base class."""
        return next((i for i in reversed(range(1, len(raw))) if raw[i] >> 6 != 0b10), 0)

    def id_bytes(self, id: int) -> bytes:
        self.check_id(id)
        return bytes((id,))
