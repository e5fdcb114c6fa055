"""A record of a data set -> the pieces of its document, each with whether it is trained on.

The pieces are tokenised one by one, so that a loss mask is known from the start and a prompt
has the same tokens in training as when it stands alone before generation.
"""

import re
from dataclasses import dataclass
from typing import Any

# The prompt of MetaMath (Yu et al. 2023, arXiv:2309.12284), with which Bone was evaluated.
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response: Let's think step by step."
)
CHAT_KEYS = ("messages", "conversations")
ROLES = {
    "system": "System",
    "user": "User",
    "human": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
}
ASSISTANT_TURN = re.compile(r"Assistant:(.*?)(?=User:|\Z)", re.DOTALL)

Piece = tuple[str, bool]


class BadRecord(ValueError):
    """Why a record cannot become a document."""


@dataclass(frozen=True)
class Layout:
    """Which fields of a record make its document.

    One field is plain text; two are a question and its answer; three an instruction, its input
    (which may be empty) and its output. A plain text field may hold a chat, a list of messages;
    without it `messages` or `conversations` are read instead. `split_turns` marks what follows
    `Assistant:` in plain text, up to the next `User:`, as the part to train on; otherwise all of a
    plain text is.
    """

    fields: tuple[str, ...] = ("text",)
    split_turns: bool = False

    def pieces(self, record: Any) -> list[Piece]:
        """The document's parts in order, empty for an empty plain text; BadRecord with a reason."""
        if not isinstance(record, dict):
            raise BadRecord(f"a JSON object is needed, but this is {_kind(record)}")
        if len(self.fields) == 1:
            key = self._chat_key(record)
            return _chat(record[key], key) if key else self._plain(_string(record, self.fields[0]))
        *parts, answer = [_string(record, name) for name in self.fields]
        if not answer.strip():
            raise BadRecord(f"the field {self.fields[-1]!r} is empty")
        question = "\n".join(part for part in parts if part)
        if not question.strip():
            raise BadRecord(f"the field {self.fields[0]!r} is empty")
        return [(PROMPT.format(question=question), False), (answer, True)]

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
        return _turns(text) if self.split_turns else [(text, True)]


def _string(record: dict[str, Any], name: str) -> str:
    if name not in record:
        have = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        raise BadRecord(f"there is no field {name!r}; the fields are {have}")
    if not isinstance(record[name], str):
        raise BadRecord(f"the field {name!r} must be a string, but it is {_kind(record[name])}")
    return record[name]


def _turns(text: str) -> list[Piece]:
    pieces, end = [], 0
    for turn in ASSISTANT_TURN.finditer(text):
        pieces += [(text[end : turn.start(1)], False), (turn.group(1), True)]
        end = turn.end()
    pieces.append((text[end:], False))
    return [piece for piece in pieces if piece[0]]


def _chat(messages: Any, key: str) -> list[Piece]:
    """`Role: content` and a blank line per message; what follows `Assistant:` is trained on."""
    if not isinstance(messages, list) or not messages:
        raise BadRecord(
            f"the field {key!r} must be a list of messages, but it is {_kind(messages)}"
        )
    pieces = []
    for i, message in enumerate(messages):
        where = f"{key}[{i}]"
        if not isinstance(message, dict):
            raise BadRecord(f"{where} must be an object, but it is {_kind(message)}")
        names = ("role", "content") if "role" in message else ("from", "value")
        try:
            role, content = (_string(message, name) for name in names)
        except BadRecord as error:
            raise BadRecord(f"{where}: {error}") from None
        if role.lower() not in ROLES:
            raise BadRecord(f"{where}: the role {role!r} is none of {', '.join(ROLES)}")
        speaker = ROLES[role.lower()]
        pieces += [(f"{speaker}:", False), (f" {content}\n\n", speaker == "Assistant")]
    return pieces


def _kind(value: Any) -> str:
    """A JSON value's type, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    if value == [] or value == "":
        return f"an empty {'list' if value == [] else 'string'}"
    return names.get(type(value), "a number")
