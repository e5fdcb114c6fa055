"""Blocks of records -> their tokens, in several processes, in order."""

import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from finchtune.data.documents import Encoded, encode_records, is_held_out
from finchtune.data.inputs import Block
from finchtune.data.records import Findings
from finchtune.data.render import Layout
from finchtune.errors import UserError
from finchtune.tokenizer import Tokenizer, load_tokenizer

LONG_BLOCK = 16 << 20


@dataclass(frozen=True)
class Recipe:
    """How records become documents. `dtype` is the token file's; `end` appends token 0.

    A document whose hash falls into the first `val_split` of all hashes is for validation.
    """

    layout: Layout
    tokenizer: str
    dtype: str
    end: bool = True
    on_bad: str = "fail"
    val_split: float = 0.0


class EncodedBlock(NamedTuple):
    """A block's documents for each file to write (two where some are held out), and bad records."""

    parts: list[Encoded]
    goes_on: bool
    read_bytes: int
    found: Findings


def encode_block(block: Block, recipe: Recipe, tokenizer: Tokenizer) -> EncodedBlock:
    """Tokenise a block. UserError at its first bad record unless these are skipped."""
    found = Findings(recipe.on_bad)
    dtype = np.dtype(recipe.dtype)
    end = recipe.end and not block.goes_on
    encoded = encode_records(block.records(), recipe.layout, tokenizer, found, dtype, end)
    parts = _divide(encoded, recipe.val_split) if recipe.val_split else [encoded]
    return EncodedBlock(parts, block.goes_on, block.read_bytes, found)


def _divide(encoded: Encoded, val_split: float) -> list[Encoded]:
    """The documents to train on, and those held out."""
    bounds = pairwise(np.concatenate([[0], np.cumsum(encoded.sizes)]))
    held_out = np.array([is_held_out(encoded.tokens[a:b], val_split) for a, b in bounds], bool)
    parts = []
    for chosen in (~held_out, held_out):
        picked = np.repeat(chosen, encoded.sizes)
        trained = encoded.flags()[picked]
        masked = None if trained.all() else trained
        parts.append(Encoded(encoded.tokens[picked], encoded.sizes[chosen], masked))
    return parts


class _Worker:
    """A process that encodes blocks in turn. `older` are the workers started before it."""

    def __init__(self, recipe: Recipe, older: list["_Worker"]):
        # Forking spares every worker the imports; elsewhere than on Linux it is not safe.
        context = get_context("fork") if sys.platform == "linux" else get_context("spawn")
        self.connection, theirs = context.Pipe()
        ours = [self.connection, *(worker.connection for worker in older)]
        self.process = context.Process(target=_serve, args=(theirs, ours, recipe), daemon=True)
        self.process.start()
        theirs.close()
        self.pending = 0

    def takes(self, block: Block) -> bool:
        """Whether to hand over this block now: one that says where its lines stand may wait for
        another to be done, but both sides would wait forever if they sent much at once.
        """
        return self.pending < (1 if block.span is None else 2)

    def send(self, block: Block) -> None:
        """Hand over a block."""
        assert self.takes(block)
        self.pending += 1
        try:
            self.connection.send(block)
        except OSError:
            raise self._death() from None

    def receive(self) -> EncodedBlock:
        """Wait for the oldest block handed over. UserError for a bad record, or a worker's end."""
        self.pending -= 1
        try:
            result = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if isinstance(result, UserError):
            raise result
        return result

    def _death(self) -> UserError:
        self.process.join()
        return UserError(
            f"a worker process died with exit code {self.process.exitcode}; if that was for want "
            "of memory, lower `workers`"
        )


def _serve(connection: Connection, ours: list[Connection], recipe: Recipe) -> None:
    """What a worker does, until the main process closes its end or is gone."""
    # A copy of the main process's ends kept here would hide that it is gone.
    for end in ours:
        end.close()
    # Stopping is the main process's business, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tokenizer = load_tokenizer(recipe.tokenizer)
    while True:
        try:
            block = connection.recv()
        except EOFError:
            return
        try:
            connection.send(encode_block(block, recipe, tokenizer))
        except UserError as error:
            connection.send(error)


def encode_all(blocks: Iterator[Block], recipe: Recipe, workers: int) -> Iterator[EncodedBlock]:
    """The blocks' documents in order. Of those that are not long, i is worker i % workers's."""
    if workers == 1:
        tokenizer = load_tokenizer(recipe.tokenizer)
        yield from (encode_block(block, recipe, tokenizer) for block in blocks)
        return
    pool: list[_Worker] = []
    busy: deque[_Worker] = deque()
    try:
        i = 0
        for block in blocks:
            if block.size > LONG_BLOCK:  # what goes from process to process is held by both
                while busy:
                    yield busy.popleft().receive()
                yield encode_block(block, recipe, load_tokenizer(recipe.tokenizer))
                continue
            if len(pool) < workers:
                pool.append(_Worker(recipe, pool))
            worker = pool[i % workers]
            i += 1
            while not worker.takes(block):
                yield busy.popleft().receive()
            worker.send(block)
            busy.append(worker)
        while busy:
            yield busy.popleft().receive()
    finally:
        for worker in pool:
            worker.connection.close()
            worker.process.terminate()
            worker.process.join()
