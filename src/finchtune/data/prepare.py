"""Text files -> a .bin/.idx pair, in several processes and bounded memory."""

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from finchtune.data.binidx import BinIdxWriter, file_paths, strip_extension
from finchtune.data.documents import MASK_SUFFIX, Encoded, encode_records, is_held_out
from finchtune.data.inputs import Block, find_inputs, no_cut, read_blocks
from finchtune.data.records import BadRecords
from finchtune.data.render import Layout
from finchtune.errors import UserError
from finchtune.files import FileSet
from finchtune.tokenizer import Tokenizer, load_tokenizer

VALIDATION_SUFFIX = "_val"
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
    """A block's documents for each file to write (two where some are held out), and bad records."""

    parts: list[Encoded]
    goes_on: bool
    read_bytes: int
    skipped: int
    first_bad: str


def encode_block(block: Block, recipe: Recipe, tokenizer: Tokenizer) -> EncodedBlock:
    """Tokenise a block. UserError at its first bad record unless these are skipped."""
    bad = BadRecords(recipe.on_bad)
    dtype = np.dtype(recipe.dtype)
    end = recipe.end and not block.goes_on
    encoded = encode_records(block.records(), recipe.layout, tokenizer, bad, dtype, end)
    parts = _divide(encoded, recipe.val_split) if recipe.val_split else [encoded]
    return EncodedBlock(parts, block.goes_on, block.read_bytes, bad.count, bad.first)


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


class _Output:
    """One .bin/.idx pair, and its mask from the first token on that is not to be trained on."""

    def __init__(self, prefix: str, dtype: str, files: FileSet, stack: ExitStack):
        self.prefix, self._files, self._stack = prefix, files, stack
        self.tokens = stack.enter_context(BinIdxWriter(prefix, dtype, files))
        self.mask: BinIdxWriter | None = None
        self.masked_tokens = 0

    def add(self, encoded: Encoded, goes_on: bool) -> None:
        """Append documents; `goes_on`: more of the last one comes in the next call."""
        if encoded.trained is not None:
            if self.mask is None:
                self._begin_mask()
            self.masked_tokens += int((encoded.trained == 0).sum())
        if self.mask is not None:
            self.mask.extend(encoded.flags(), encoded.sizes, goes_on)
        self.tokens.extend(encoded.tokens, encoded.sizes, goes_on)

    def _begin_mask(self) -> None:
        """A mask file in which all earlier documents are trained on."""
        prefix = self.prefix + MASK_SUFFIX
        self.mask = self._stack.enter_context(BinIdxWriter(prefix, "u1", self._files))
        for sizes in self.tokens.sizes:
            self.mask.extend(np.ones(sizes.sum(), np.uint8), sizes)

    def drop_old_mask(self) -> None:
        """Have the mask of an earlier data set removed where this one has none."""
        for path in file_paths(self.prefix + MASK_SUFFIX) if self.mask is None else ():
            self._files.drop(path)


def prepare(
    inputs: Sequence[str],
    output: str,
    recipe: Recipe,
    workers: int = 1,
    progress: Callable[[Totals], None] = lambda totals: None,
    files: FileSet | None = None,
) -> Totals:
    """Write OUTPUT.bin and .idx; OUTPUT.mask.bin and .idx where a part is not to be trained on;
    and the same under OUTPUT_val where documents are held out.

    All of them appear at the end, or none does; with `files` when that set does. UserError for bad
    input or an empty result.
    """
    paths = find_inputs(inputs)
    output = strip_extension(output)
    # Encoding once makes the tables here, which workers that are forked then share.
    tokenizer = load_tokenizer(recipe.tokenizer)
    tokenizer.encode_array("", np.dtype(recipe.dtype))
    # Where a document goes, or what in it is trained on, may depend on all of its text.
    whole = recipe.val_split or recipe.layout.qa
    last_cut = no_cut if whole else tokenizer.last_cut
    totals = Totals()
    prefixes = [output] + ([output + VALIDATION_SUFFIX] if recipe.val_split else [])
    with ExitStack() as stack:
        files = files or stack.enter_context(FileSet())
        outputs = [_Output(prefix, recipe.dtype, files, stack) for prefix in prefixes]
        field = recipe.layout.fields[0]
        blocks = (block for path in paths for block in read_blocks(path, field, last_cut))
        for block in _encode_all(blocks, recipe, workers):
            for target, part in zip(outputs, block.parts, strict=True):
                target.add(part, block.goes_on)
            _count(totals, block)
            totals.masked_tokens = sum(target.masked_tokens for target in outputs)
            progress(totals)
        _check(outputs, totals, inputs)
        for target in outputs:
            target.drop_old_mask()
    return totals


def _count(totals: Totals, block: EncodedBlock) -> None:
    totals.documents += sum(len(part.sizes) for part in block.parts) - block.goes_on
    totals.held_out += sum(len(part.sizes) for part in block.parts[1:])
    totals.tokens += sum(len(part.tokens) for part in block.parts)
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
