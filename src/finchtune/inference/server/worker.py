"""The thread that owns the engines: requests in from the event loop, text out to it."""

import asyncio
import atexit
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from finchtune.data.templates import Template
from finchtune.errors import UserError
from finchtune.inference.engine import Engine, NoText, Request, Row
from finchtune.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Busy(UserError):
    """Too many requests wait."""


@dataclass(frozen=True)
class Served:
    """A model by one name: the base, or the base with an adapter."""

    model: Any
    tokenizer: Tokenizer
    template: Template
    max_rows: int

    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer, self.max_rows)


@dataclass(frozen=True)
class News:
    """What happened to one text of an HTTP request: `text` more of it, then its `row` or `error`.

    `index` says which of the HTTP request's texts.
    """

    index: int
    text: str = ""
    row: Row | None = None
    error: Exception | None = None


class Inbox:
    """Where the worker's thread puts the news for one HTTP request, in whose loop it is made.

    It never waits for the reader; what it holds is bounded by the tokens asked for.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[News] = asyncio.Queue()

    def put(self, news: News) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody reads any more
            self.loop.call_soon_threadsafe(self.queue.put_nowait, news)


@dataclass(eq=False)
class Ticket:
    """One text that is asked for."""

    name: str
    request: Request
    inbox: Inbox
    index: int
    row: Row | None = None


class Worker:
    """Writes the texts of all tickets, each model's in one batch, in a thread of its own."""

    def __init__(self, served: dict[str, Served], max_waiting: int = 1024):
        self.served, self.max_waiting = served, max_waiting
        self.engines = {name: one.engine() for name, one in served.items()}
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tickets: dict[Row, Ticket] = {}
        self.open = 0  # tickets not yet done; changed by the event loop alone
        self.thread = threading.Thread(target=self._run, name="finchtune worker", daemon=True)

    def start(self) -> None:
        self.thread.start()
        atexit.register(self.stop)  # for who ends the process at once: see data/prefetch.py

    def stop(self) -> None:
        """End the thread after its current step; what is not done is dropped."""
        atexit.unregister(self.stop)
        self.commands.put(None)
        self.thread.join()

    def check(self, name: str, requests: list[Request]) -> None:
        """Raise UserError for requests that cannot be done. Any thread may call this."""
        for request in requests:
            self.engines[name].check(request)

    def submit(self, name: str, requests: list[Request], inbox: Inbox) -> list[Ticket]:
        """Ask for texts. Called in the event loop, as are `cancel` and `done`.

        They must have passed `check`. Raises Busy where too many wait.
        """
        if self.open + len(requests) > self.max_waiting:
            raise Busy(f"{self.open} texts wait already; try again later")
        self.open += len(requests)
        tickets = [Ticket(name, request, inbox, i) for i, request in enumerate(requests)]
        for ticket in tickets:
            self.commands.put(partial(self._submit, ticket))
        return tickets

    def close(self, tickets: list[Ticket]) -> None:
        """Nobody waits for these any more, done or not."""
        self.open -= len(tickets)
        for ticket in tickets:
            self.commands.put(partial(self._cancel, ticket))

    def _run(self) -> None:
        while True:
            busy = any(not engine.idle for engine in self.engines.values())
            while not busy or not self.commands.empty():
                command = self.commands.get()
                if command is None:
                    return
                command()
                busy = any(not engine.idle for engine in self.engines.values())
            for name, engine in self.engines.items():
                if not engine.idle:
                    self._step(name, engine)

    def _step(self, name: str, engine: Engine) -> None:
        try:
            advanced = engine.advance()
        except Exception as error:  # whatever it was, the other models and later requests continue
            logger.exception("writing with %s failed", name)
            self._fail(name, error)
            return
        for row, text in advanced:
            ticket = self.tickets[row]
            done = row.finish_reason is not None
            if done:
                del self.tickets[row]
            if row.finish_reason == "failed":
                logger.error("writing with %s: %s", name, NoText())
                ticket.inbox.put(News(ticket.index, error=NoText()))
            elif text or done:
                ticket.inbox.put(News(ticket.index, text, row if done else None))

    def _fail(self, name: str, error: Exception) -> None:
        self.engines[name] = self.served[name].engine()
        for row, ticket in list(self.tickets.items()):
            if ticket.name == name:
                del self.tickets[row]
                ticket.inbox.put(News(ticket.index, error=error))

    def _submit(self, ticket: Ticket) -> None:
        ticket.row = self.engines[ticket.name].submit(ticket.request)
        self.tickets[ticket.row] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.row is not None and ticket.row in self.tickets:
            del self.tickets[ticket.row]
            self.engines[ticket.name].cancel(ticket.row)
