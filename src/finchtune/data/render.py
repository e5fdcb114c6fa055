"""A record of a data set -> the pieces of its document, each with whether it is trained on.

The pieces are tokenised one by one, so that a loss mask is known from the start and a prompt
has the same tokens in training as when it stands alone before generation.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from finchtune.data import templates
from finchtune.data.chat import messages_of
from finchtune.data.speakers import PAIRS, Pairs, split_turns
from finchtune.data.templates import Piece, Template, joined
from finchtune.data.values import BadRecord, kind, text_of

CHAT_KEYS = ("messages", "conversations")
ALPACA = ("instruction", "input", "output")


@dataclass(frozen=True)
class Layout:
    """Which fields of a record make its document, and how.

    One field is plain text; two are a question and its answer; three an instruction, its input
    (which may be empty, null or missing) and its output. A plain text field may hold a chat, a list
    of messages; without it `messages` or `conversations` are read instead. Questions and chats are
    put as `template` says, by default metamath for questions and chat for chats. `qa` cuts plain
    text at the marks of its `speakers` and trains on the answers; otherwise all of it is.
    """

    fields: tuple[str, ...] = ("text",)
    qa: bool = False
    template: Template | None = None
    speakers: Pairs = PAIRS

    def pieces(self, record: Any) -> list[Piece]:
        """The document's parts in order, empty for an empty plain text; BadRecord with a reason."""
        if not isinstance(record, dict):
            raise BadRecord(f"a JSON object is needed, but this is {kind(record)}")
        if len(self.fields) > 1:
            return self.chosen_template.turns(self._exchange(record))
        if key := self._chat_key(record):
            return self.chosen_template.turns(messages_of(record, key))
        return self._plain(_text(record, self.fields[0]))

    @property
    def chosen_template(self) -> Template:
        """How questions or chats are put, whichever these fields hold."""
        return self.template or templates.get("metamath" if len(self.fields) > 1 else "chat")

    def is_templated(self, record: Any) -> bool:
        """Whether a record's document is made by a template."""
        return len(self.fields) > 1 or (isinstance(record, dict) and bool(self._chat_key(record)))

    def _exchange(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The question and the answer of a record as messages."""
        asked, *more, answered = self.fields
        question, answer = text_of(record, asked), text_of(record, answered)
        given = _input(record, more[0]) if more else ""
        if not answer.strip():
            raise BadRecord(f"the field {answered!r} is empty")
        if not (question + given).strip():
            raise BadRecord(f"the field {asked!r} is empty")
        if not question:
            question, given = given, ""
        return [
            {"role": "user", "content": question, "input": given},
            {"role": "assistant", "content": answer},
        ]

    def _chat_key(self, record: dict[str, Any]) -> str | None:
        """The field that holds a chat, if one does."""
        name = self.fields[0]
        if name not in record:
            return next((key for key in CHAT_KEYS if key in record), None)
        is_chat = isinstance(record[name], list) and isinstance(next(iter(record[name]), 0), dict)
        return name if is_chat else None

    def _plain(self, text: str) -> list[Piece]:
        if not text:
            return []
        return joined(split_turns(text, self.speakers)) if self.qa else [(text, True)]


def _input(record: dict[str, Any], name: str) -> str:
    """An instruction's input, which need not be there; but one of another spelling is none."""
    if name not in record and (near := difflib.get_close_matches(name, record, n=1)):
        raise BadRecord(f"there is no field {name!r}; did you mean {near[0]!r}?")
    return "" if record.get(name) is None else text_of(record, name)


def _text(record: dict[str, Any], name: str) -> str:
    """A plain text field, with a hint where the record is of another kind."""
    if name not in record and ALPACA[0] in record and ALPACA[2] in record:
        raise BadRecord(f"there is no field {name!r}, but those of `sft_field` {' '.join(ALPACA)}")
    return text_of(record, name)
