"""Text files -> a .bin/.idx pair, in several processes and bounded memory."""

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from finchtune.binidx import BinIdxWriter, remove, strip_extension
from finchtune.data.documents import MASK_SUFFIX, Encoded, encode_records, is_held_out
from finchtune.data.inputs import Block, find_inputs, read_blocks
from finchtune.data.records import BadRecords
from finchtune.data.render import Layout
from finchtune.errors import UserError
from finchtune.tokenizer import Tokenizer, load_tokenizer

VALIDATION_SUFFIX = "_val"


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


@dataclass
class Totals:
    """What has been read and written so far. `first_bad` is the first skipped record's message."""

    documents: int = 0
    tokens: int = 0
    held_out: int = 0
    masked_tokens: int = 0
    read_bytes: int = 0
    skipped: int = 0
    first_bad: str = ""


class EncodedBlock(NamedTuple):
    """A block's documents, which of them are held out (documents,) bool, and the bad records."""

    encoded: Encoded
    held_out: np.ndarray
    read_bytes: int
    skipped: int
    first_bad: str


def encode_block(block: Block, recipe: Recipe, tokenizer: Tokenizer) -> EncodedBlock:
    """Tokenise a block. UserError at its first bad record unless these are skipped."""
    bad = BadRecords(recipe.on_bad)
    dtype = np.dtype(recipe.dtype)
    encoded = encode_records(block.records(), recipe.layout, tokenizer, bad, dtype, recipe.end)
    held_out = np.zeros(len(encoded.sizes), bool)
    if recipe.val_split:
        documents = np.split(encoded.tokens, np.cumsum(encoded.sizes)[:-1])
        held_out[:] = [is_held_out(ids, recipe.val_split) for ids in documents[: len(held_out)]]
    return EncodedBlock(encoded, held_out, block.read_bytes, bad.count, bad.first)


class _Worker:
    """A process that encodes one block at a time. `older` are the workers started before it."""

    def __init__(self, recipe: Recipe, older: list["_Worker"]):
        # Forking spares every worker the imports; elsewhere than on Linux it is not safe.
        context = get_context("fork") if sys.platform == "linux" else get_context("spawn")
        self.connection, theirs = context.Pipe()
        ours = [self.connection, *(worker.connection for worker in older)]
        self.process = context.Process(target=_serve, args=(theirs, ours, recipe), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, block: Block) -> None:
        """Hand over a block; the worker must have nothing else to do."""
        try:
            self.connection.send(block)
        except OSError:
            raise self._death() from None

    def receive(self) -> EncodedBlock:
        """Wait for the block handed over. UserError for a bad record, or if the worker died."""
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
            "of memory, lower --workers"
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


def _encode_all(blocks: Iterator[Block], recipe: Recipe, workers: int) -> Iterator[EncodedBlock]:
    """The blocks' documents in order. Every worker holds one block, block i is worker i % n's."""
    if workers == 1:
        tokenizer = load_tokenizer(recipe.tokenizer)
        yield from (encode_block(block, recipe, tokenizer) for block in blocks)
        return
    pool: list[_Worker] = []
    busy: deque[_Worker] = deque()
    try:
        for block in blocks:
            if len(pool) < workers:
                pool.append(_Worker(recipe, pool))
                pool[-1].send(block)
                busy.append(pool[-1])
            else:
                worker = busy.popleft()
                encoded = worker.receive()
                worker.send(block)
                busy.append(worker)
                yield encoded
        while busy:
            yield busy.popleft().receive()
    finally:
        for worker in pool:
            worker.connection.close()
            worker.process.terminate()
            worker.process.join()


class _Output:
    """One .bin/.idx pair and its mask."""

    def __init__(self, prefix: str, dtype: str, stack: ExitStack):
        self.prefix = prefix
        self.tokens = stack.enter_context(BinIdxWriter(prefix, dtype))
        self.mask = stack.enter_context(BinIdxWriter(prefix + MASK_SUFFIX, "u1"))
        self.masked_tokens = 0

    def add(self, encoded: Encoded, chosen: np.ndarray) -> None:
        """Append the documents that `chosen` (documents,) bool picks."""
        picked = np.repeat(chosen, encoded.sizes)
        trained = encoded.trained[picked]
        self.tokens.extend(encoded.tokens[picked], encoded.sizes[chosen])
        self.mask.extend(trained, encoded.sizes[chosen])
        self.masked_tokens += int((trained == 0).sum())


def prepare(
    inputs: Sequence[str],
    output: str,
    recipe: Recipe,
    workers: int = 1,
    progress: Callable[[Totals], None] = lambda totals: None,
) -> Totals:
    """Write OUTPUT.bin and .idx; OUTPUT.mask.bin and .idx where a part is not to be trained on;
    and the same under OUTPUT_val where documents are held out.

    All of them appear at the end, or none does. UserError for bad input or an empty result.
    """
    paths = find_inputs(inputs)
    output = strip_extension(output)
    load_tokenizer(recipe.tokenizer)
    totals = Totals()
    prefixes = [output] + ([output + VALIDATION_SUFFIX] if recipe.val_split else [])
    with ExitStack() as stack:
        outputs = [_Output(prefix, recipe.dtype, stack) for prefix in prefixes]
        blocks = (block for path in paths for block in read_blocks(path, recipe.layout.fields[0]))
        for block in _encode_all(blocks, recipe, workers):
            for held_out, target in enumerate(outputs):
                target.add(block.encoded, block.held_out == held_out)
            _count(totals, block)
            progress(totals)
        _check(outputs, totals, inputs)
    for target in outputs:
        if not target.masked_tokens:
            remove(target.prefix + MASK_SUFFIX)
    return totals


def _count(totals: Totals, block: EncodedBlock) -> None:
    totals.documents += len(block.held_out)
    totals.held_out += int(block.held_out.sum())
    totals.tokens += len(block.encoded.tokens)
    totals.masked_tokens += int((block.encoded.trained == 0).sum())
    totals.read_bytes += block.read_bytes
    totals.skipped += block.skipped
    totals.first_bad = totals.first_bad or block.first_bad


def _check(outputs: list[_Output], totals: Totals, inputs: Sequence[str]) -> None:
    if not totals.documents:
        skipped = f" ({totals.skipped} bad records skipped)" if totals.skipped else ""
        raise UserError(f"{' '.join(inputs)}: there are no documents in it{skipped}")
    for target in outputs:
        if not target.tokens.n_documents:
            raise UserError(
                f"no document would go to {target.prefix} of {totals.documents} in all; "
                "choose another --val_split"
            )
