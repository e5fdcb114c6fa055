"""A conversation of many turns with a model, which reads each of them once."""

from collections.abc import Iterator, Sequence
from typing import Any

from finchtune.data.templates import Piece, Template
from finchtune.errors import UserError
from finchtune.inference.engine import Engine, Request, Row
from finchtune.inference.sampling import Sampling
from finchtune.inference.states import State
from finchtune.tokenizer import Tokenizer

FORMAT = "finchtune chat 1"


def encode_turns(tokenizer: Tokenizer, turns: Sequence[Piece]) -> list[int]:
    """Token ids of a template's pieces, tokenised one by one as in training."""
    return [id for text, _ in turns for id in tokenizer.encode(text)]


class AnswerText:
    """What an answer says, as it is written: without what the template puts around it.

    The end may lack what a stop string cut off. Without a template the text passes as it is.
    """

    def __init__(self, template: Template | None):
        form = template.answer if template else "{answer}"
        self.before, _, self.after = form.partition("{answer}")
        self.held = ""

    def feed(self, text: str) -> str:
        """More of the answer -> more of what it says, possibly empty."""
        self.held += text
        if len(self.held) < len(self.before) and self.before.startswith(self.held):
            return ""
        said, self.before = self.held.removeprefix(self.before), ""
        tail = next((n for n in range(len(self.after), 0, -1) if said.endswith(self.after[:n])), 0)
        end = len(said) - tail
        self.held = said[end:]
        return said[:end]

    def finish(self) -> str:
        """What is left at the end: what only began like the text before an answer."""
        return self.held if self.before else ""


def content_of(template: Template, text: str) -> str:
    """What a whole answer says."""
    stream = AnswerText(template)
    return stream.feed(text) + stream.finish()


class Conversation:
    """Messages, and the model's state after those that it has read.

    The state is from before the last answer, so that a retry reads nothing twice but the question,
    and an answer is read again as the template writes it.
    """

    def __init__(
        self,
        engine: Engine,
        template: Template,
        sampling: Sampling,
        max_tokens: int,
        system: str = "",
    ):
        assert engine.tokenizer is not None
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.template, self.sampling = template, sampling
        self.max_tokens, self.system = max_tokens, system
        self.messages: list[dict[str, str]] = []
        self.read: list[Piece] = []
        self.state: State | None = None
        self.before: tuple[list[Piece], State | None] = ([], None)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._forget()

    def ask(self, question: str) -> Iterator[str]:
        """Put a question; yields the answer as it is written. Closing the iterator ends it."""
        self.messages.append({"role": "user", "content": question})
        return self._answer()

    def retry(self) -> Iterator[str]:
        """Answer the last question again. Raises UserError if there is none."""
        if not any(message["role"] == "user" for message in self.messages):
            raise UserError("there is no question to answer again yet")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            self.read, self.state = self.before
        return self._answer()

    def record(self) -> dict[str, Any]:
        """All of the conversation as JSON values; the state follows from them."""
        return {"format": FORMAT, "messages": [dict(message) for message in self.messages]}

    def restore(self, record: Any, where: str) -> None:
        """Continue from what `record` gave; UserError, beginning with `where`, if it is none."""
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise UserError(f"{where}: not a conversation saved by finchtune chat")
        messages = record.get("messages")
        roles = ("system", "user", "assistant")
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and m.get("role") in roles and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise UserError(f"{where}: its messages need a role and a content each")
        self.messages = [{key: m[key] for key in ("role", "content")} for m in messages]
        self._forget()

    def _forget(self) -> None:
        self.read, self.state = [], None
        self.before = self.read, self.state

    def _answer(self) -> Iterator[str]:
        turns = self.template.turns(self.messages, ask=True)
        if turns[: len(self.read)] != self.read:
            self._forget()
        request = Request(
            encode_turns(self.tokenizer, turns[len(self.read) :]),
            self.max_tokens,
            self.sampling,
            stop_strings=self.template.stop,
            state=self.state,
            keep_state=True,
        )
        return self._write(self.engine.submit(request), turns)

    def _write(self, row: Row, turns: list[Piece]) -> Iterator[str]:
        try:
            while row.finish_reason is None:
                for _, text in self.engine.step():
                    yield text
        finally:  # also where the reader has enough
            self.engine.cancel(row)
            self.before = self.read, self.state
            if row.prompt_state is not None:
                self.read, self.state = turns, row.prompt_state
            content = content_of(self.template, row.text)
            self.messages.append({"role": "assistant", "content": content})
