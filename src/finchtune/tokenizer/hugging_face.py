"""Tokenizers of the Hugging Face `tokenizers` library, such as the Pile's."""

from collections.abc import Iterable

from finchtune.errors import UserError
from finchtune.tokenizer.base import END_OF_DOCUMENT, Tokenizer


class HFTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library, such as the Pile's."""

    separate = False

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
