"""Text that grows token by token."""

import codecs

from finchtune.tokenizer.base import Tokenizer


class Decoder:
    """Text as it grows: feed ids, get the characters they complete; `finish` gives the rest.

    What `feed` and `finish` return, joined, is `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._given = 0

    def feed(self, *ids: int) -> str:
        """The text that these ids complete, possibly empty."""
        if self._tokenizer.separate:
            return self._utf8.decode(b"".join(self._tokenizer.id_bytes(id) for id in ids))
        self._ids += ids
        return self._complete_text()

    def finish(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        if self._tokenizer.separate:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._ids)[self._given :]

    def _complete_text(self) -> str:
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = text[self._given :]
        self._given = len(text)
        return new
