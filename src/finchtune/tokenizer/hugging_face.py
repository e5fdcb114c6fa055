"""Tokenizers of the Hugging Face `tokenizers` library, such as the Pile's."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from finchtune.errors import UserError
from finchtune.files import sha256
from finchtune.tokenizer.base import END_OF_DOCUMENT, Tokenizer

# A pattern that searches for ever does so in what repeats itself; a sound one takes microseconds.
PROBES = tuple(part * 200 + "!" for part in ("a", " ", "0", "\n", "a ", "aA", "é", "-", "三"))
PROBE_SECONDS = 2.0
# Long texts are tokenised in pieces of so many characters, cut where that changes nothing.
PIECE = 1 << 16
AROUND = 200
CUTS_TRIED = 1000
BLANK = re.compile(r"\S\s")


class HFTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library, such as the Pile's.

    Truncation, padding and dropout that the file asks for are switched off: a document is to be
    tokenised whole, without additions, and always alike.
    """

    separate = False

    def __init__(self, path: str):
        import tokenizers

        self.name = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path}: not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        end = self._tokenizer.get_added_tokens_decoder().get(END_OF_DOCUMENT)
        if end is None or not end.special:
            token = self._tokenizer.id_to_token(END_OF_DOCUMENT)
            raise UserError(
                f"{path}: token {END_OF_DOCUMENT} must be a special token, since RWKV models end "
                f"every document with it, but it is {token!r}"
            )
        self._unknown: Counter[str] = Counter()
        self._has_token: dict[str, bool] = {}
        self._probe()

    @cached_property
    def sha256(self) -> str:
        """As in the base class: of the whole file."""
        return sha256(self.name)

    def take_unknown(self) -> Counter[str]:
        """As in the base class."""
        taken, self._unknown = self._unknown, Counter()
        return taken

    def _parts(self, text: str) -> Iterator[str]:
        """As in the base class: the library takes a hundred bytes and more for each of a text."""
        text.encode()  # the library raises a TypeError that does not say where
        start = 0
        while len(text) - start > 2 * PIECE:
            cut = self._safe_cut(text, start + PIECE)
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _safe_cut(self, text: str, place: int) -> int:
        """The next place before a blank around which both sides have the ids that they have
        together; the end of the text where none of the next ones is such a place.
        """
        blanks = islice(BLANK.finditer(text, place), CUTS_TRIED)
        for cut in (match.start() + 1 for match in blanks):
            before, behind = text[cut - AROUND : cut], text[cut : cut + AROUND]
            apart = self._run(before).ids + self._run(behind).ids
            if self._run(before + behind).ids == apart:
                return cut
        return len(text)

    def _encode(self, text: str) -> list[int]:
        encoding = self._run(text)
        ids = encoding.ids
        if self._unknown_id is not None:
            if self._unknown_id in ids:
                self._count_unknown(text, ids, encoding.offsets)
        elif self._drops:
            self._count_dropped(text)
        return ids

    def _run(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, which derives from no Exception
                raise
            raise UserError(f"{self.name}: its pattern gives up on a text: {error}") from None

    def _probe(self) -> None:
        """UserError for a pattern that takes very long."""
        for text in PROBES:
            began = time.perf_counter()
            self._run(text)
            seconds = time.perf_counter() - began
            if seconds > PROBE_SECONDS:
                raise UserError(
                    f"{self.name}: its pattern takes {seconds:.0f} s for {len(text)} characters; "
                    "it would take for ever on a corpus"
                )

    @cached_property
    def _unknown_id(self) -> int | None:
        model = self._tokenizer.model
        token = getattr(model, "unk_token", None)
        if token is not None:
            return self._tokenizer.token_to_id(token)
        return json.loads(self._tokenizer.to_str())["model"].get("unk_id")  # Unigram's

    @cached_property
    def _drops(self) -> bool:
        """Whether the model leaves out what it does not know."""
        return not getattr(self._tokenizer.model, "byte_fallback", False)

    def _count_unknown(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        pairs = zip(ids, offsets, strict=True)
        self._unknown.update(text[a:b] for id, (a, b) in pairs if id == self._unknown_id)

    def _count_dropped(self, text: str) -> None:
        """Count characters that alone have no token at all, blanks aside."""
        for character in set(text):
            if character not in self._has_token:
                self._has_token[character] = character.isspace() or bool(self._run(character).ids)
            if not self._has_token[character]:
                self._unknown[character] += text.count(character)

    def id_bytes(self, id: int) -> bytes:
        return self.decode([id]).encode()

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        for id in ids:
            self.check_id(id)
        return self._tokenizer.decode(ids, skip_special_tokens=True)
