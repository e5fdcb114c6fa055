"""Batched recurrent generation: one engine for every program that has a model write.

Prompts are read through the model's parallel form, several packed into one call; their states, of
constant size, become rows of a batch that advances a token a step. A finished row leaves, and the
next prompt takes its place.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import UserError
from finchtune.inference.sampling import Sampler, Sampling
from finchtune.inference.states import State, join, select
from finchtune.inference.stopping import StoppingText
from finchtune.tokenizer import END_OF_DOCUMENT, Tokenizer

CHUNK = 64  # prompts are cut at multiples of it, so that the cuts change no rounding


class NoText(UserError):
    """The model computes no text."""

    def __init__(self) -> None:
        super().__init__(
            "the model computes NaN or infinity instead of a text: its weights are damaged, or do "
            "not fit the precision; try `dtype` fp32"
        )


@dataclass(frozen=True)
class Request:
    """What to write: up to `max_tokens` token ids that follow `prompt`.

    An empty prompt begins a document, unless there is a `state` (of one sequence) to continue from.
    Writing ends before one of `stop_tokens`, or before one of `stop_strings` in the text. With
    `keep_state` the row's `prompt_state` is the state after the prompt.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = (END_OF_DOCUMENT,)
    stop_strings: Sequence[str] = ()
    state: State | None = None
    keep_state: bool = False


class Row:
    """A request on its way, and its result.

    `tokens` are what was written so far, `text` what of it is sure to stay (empty where the engine
    has no tokenizer), `finish_reason` None until it ends: then "stop", "length", "cancelled" or,
    where the model computed NaN or infinity for it, "failed".
    A stop token or string, and what a string's last token brings with it, is in neither.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self.request = request
        self.unread = list(request.prompt)
        if not self.unread and request.state is None:
            self.unread = [END_OF_DOCUMENT]
        self.state = request.state
        self.prompt_state: State | None = None
        self.sampler = Sampler(request.sampling, request.prompt)
        self.stop_tokens = frozenset(request.stop_tokens)
        self.stream = None if tokenizer is None else StoppingText(tokenizer, request.stop_strings)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "" if self.stream is None else self.stream.text

    def take(self, token: int) -> str:
        """Append a drawn token, or end; returns the text that it releases."""
        released = ""
        if token in self.stop_tokens:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            released = self.stream.feed(token) if self.stream else ""
            if self.stream and self.stream.stopped:
                self.finish_reason = "stop"
                del self.tokens[self.stream.n_tokens :]
            elif len(self.tokens) >= self.request.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason and self.stream:
            released += self.stream.finish()
        return released


class Engine:
    """Writes what is submitted, many rows at once. Not to be shared between threads.

    `max_rows` rows advance together; prompts are read at most `prompt_tokens` tokens a call, which
    bounds memory. With a `tokenizer` rows have text, and ids that it does not know are not drawn.
    The model should be in evaluation mode.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        max_rows: int = 64,
        prompt_tokens: int = 1024,
    ):
        assert prompt_tokens >= CHUNK
        self.form, self.tokenizer = model.inference_form(), tokenizer
        self.max_rows, self.prompt_tokens = max_rows, prompt_tokens
        self.device = next(model.parameters()).device
        self.vocab_size = model.config.vocab_size
        self.waiting: deque[Row] = deque()
        self.reading: list[Row] = []  # admitted, their prompts not yet read to the end
        self.rows: list[Row] = []  # writing
        self.state: State | None = None  # of `rows`

    def submit(self, request: Request) -> Row:
        """Queue a request. Raises UserError for one that cannot be done."""
        self.check(request)
        row = Row(request, self.tokenizer)
        self.waiting.append(row)
        return row

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be done. Any thread may call this."""
        if request.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {request.max_tokens}")
        outside = [id for id in request.prompt if not 0 <= id < self.vocab_size]
        if outside:
            raise UserError(
                f"token id {outside[0]} lies outside the model's vocabulary of {self.vocab_size}"
            )
        if request.stop_strings and self.tokenizer is None:
            raise UserError("stop strings are matched on text: give the tokenizer too")
        if not request.prompt and request.state is not None:
            raise UserError("a state to continue from needs at least one token after it")

    def cancel(self, row: Row) -> None:
        """Drop a row, wherever it is; the others do not notice."""
        if row.finish_reason is None:
            row.finish_reason = "cancelled"
            self._drop_finished()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.reading or self.rows)

    def step(self) -> list[tuple[Row, str]]:
        """`advance`; raises NoText if a row failed."""
        advanced = self.advance()
        if any(row.finish_reason == "failed" for row, _ in advanced):
            raise NoText
        return advanced

    @torch.no_grad()
    def advance(self) -> list[tuple[Row, str]]:
        """Advance every row by a token; returns the rows that did and the text each released.

        Also reads the prompts of rows that found a place, up to `prompt_tokens` tokens. Where the
        model computes NaN or infinity for a row, that row fails, and the others do not notice.
        """
        advanced = self._write()
        while self.waiting and len(self.rows) + len(self.reading) < self.max_rows:
            self.reading.append(self.waiting.popleft())
        return advanced + self._read()

    def _write(self) -> list[tuple[Row, str]]:
        if not self.rows:
            return []
        tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
        last, self.state = self.form.advance(tokens, self.state)
        advanced = self._draw(self.rows, last)
        self._drop_finished()
        return advanced

    def _read(self) -> list[tuple[Row, str]]:
        pieces = self._next_pieces()
        if not pieces:
            return []
        rows = [row for row, _ in pieces]
        state = self._packed_state(rows)
        bounds = [0, *itertools.accumulate(n for _, n in pieces)]
        tokens = torch.tensor([[id for row, n in pieces for id in row.unread[:n]]])
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=self.device)
        last, state = self.form.advance(tokens.to(self.device), state, cu_seqlens)
        done = []
        for index, (row, n) in enumerate(pieces):
            del row.unread[:n]
            if row.unread:
                row.state = select(state, [index])
            else:
                row.state = None
                done.append(index)
        return self._begin_writing([rows[index] for index in done], done, last, state)

    def _next_pieces(self) -> list[tuple[Row, int]]:
        """Rows that read, and how many tokens of their prompts, within the bound in sum.

        Each has an equal share, so that a long prompt keeps no short one waiting; what the short
        ones leave goes to those that came first. Rows that continue from a state come first.
        """
        share = max(CHUNK, self.prompt_tokens // max(1, len(self.reading)) // CHUNK * CHUNK)
        sizes: dict[Row, int] = {}
        room = self.prompt_tokens
        for most in (share, self.prompt_tokens):
            for row in self.reading:
                had = sizes.get(row, 0)
                n = min(len(row.unread), most, had + room)
                if n < len(row.unread):
                    n = max(had, n // CHUNK * CHUNK)
                sizes[row] = n
                room -= n - had
        with_state = [row for row in self.reading if row.state is not None]
        fresh = [row for row in self.reading if row.state is None]
        return [(row, sizes[row]) for row in with_state + fresh if sizes[row]]

    @staticmethod
    def _packed_state(rows: list[Row]) -> State | None:
        states = [row.state for row in rows if row.state is not None]
        return join(states) if states else None

    def _begin_writing(
        self, rows: list[Row], places: list[int], last: Tensor, state: State
    ) -> list[tuple[Row, str]]:
        """Draw the first token of rows whose prompts are read; `places` are theirs in the call."""
        if not rows:
            return []
        own = select(state, places)
        for index, row in enumerate(rows):
            if row.request.keep_state:
                row.prompt_state = select(own, [index])
        self.reading = [row for row in self.reading if row not in rows]
        self.rows = self.rows + rows
        self.state = own if self.state is None else join([self.state, own])
        advanced = self._draw(rows, last[torch.tensor(places, device=self.device)])
        self._drop_finished()
        return advanced

    def _draw(self, rows: list[Row], last: Tensor) -> list[tuple[Row, str]]:
        """The next token of each row, from the last hidden states (rows, C)."""
        logits = self.form.logits(last)
        if self.tokenizer is not None:
            logits = logits.clone()  # ids that no text has, such as padding, are never drawn
            logits[:, self.tokenizer.vocab_size :] = -torch.inf
        largest, places = logits.max(-1)
        finite = largest.isfinite().tolist()
        greedy = [row.request.sampling.is_plain_greedy for row in rows]
        likeliest = places.tolist() if any(greedy) else []
        advanced = []
        for i, row in enumerate(rows):
            if not finite[i]:
                row.finish_reason = "failed"
                advanced.append((row, ""))
                continue
            drawn = likeliest[i] if greedy[i] else row.sampler.draw(logits[i].float().cpu().clone())
            advanced.append((row, row.take(drawn)))
        return advanced

    def _drop_finished(self) -> None:
        self.waiting = deque(row for row in self.waiting if row.finish_reason is None)
        self.reading = [row for row in self.reading if row.finish_reason is None]
        staying = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        if len(staying) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in staying]
        self.state = select(self.state, staying) if staying and self.state else None
