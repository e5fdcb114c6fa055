"""Text files -> a .bin/.idx pair, in several processes and bounded memory."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from finchtune.data.binidx import BinIdxWriter, file_paths, strip_extension
from finchtune.data.documents import MASK_SUFFIX, Encoded
from finchtune.data.inputs import find_inputs, no_cut, read_blocks
from finchtune.data.provenance import Provenance, info_path
from finchtune.data.templates import Template
from finchtune.data.workers import EncodedBlock, Recipe, encode_all
from finchtune.errors import DataError
from finchtune.files import FileSet
from finchtune.tokenizer import Tokenizer, load_tokenizer

VALIDATION_SUFFIX = "_val"


@dataclass
class Totals:
    """What has been read and written so far. `first_bad` is the first skipped record's message.

    `templated`: some document was made by a template; `untrained` documents have no trained token,
    and `unknown` counts the characters without a token.
    """

    documents: int = 0
    tokens: int = 0
    held_out: int = 0
    masked_tokens: int = 0
    read_bytes: int = 0
    skipped: int = 0
    first_bad: str = ""
    templated: bool = False
    untrained: int = 0
    unknown: dict[str, int] = field(default_factory=dict)


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

    def note(self, tokenizer: Tokenizer, template: Template | None) -> None:
        """Write beside the pair what it was made with."""
        counts = self.tokens.n_documents, self.tokens.n_tokens
        made = Provenance(tokenizer.name, tokenizer.sha256, template, *counts)
        path = self._files.add(info_path(self.prefix))
        path.write_text(json.dumps(made.record(), indent=2) + "\n")

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
        for block in encode_all(blocks, recipe, workers):
            for target, part in zip(outputs, block.parts, strict=True):
                target.add(part, block.goes_on)
            _count(totals, block)
            totals.masked_tokens = sum(target.masked_tokens for target in outputs)
            progress(totals)
        _check(outputs, totals, inputs)
        template = recipe.layout.chosen_template if totals.templated else None
        for target in outputs:
            target.drop_old_mask()
            target.note(tokenizer, template)
    return totals


def _count(totals: Totals, block: EncodedBlock) -> None:
    totals.documents += sum(len(part.sizes) for part in block.parts) - block.goes_on
    totals.held_out += sum(len(part.sizes) for part in block.parts[1:])
    totals.tokens += sum(len(part.tokens) for part in block.parts)
    totals.read_bytes += block.read_bytes
    totals.skipped += block.found.count
    totals.first_bad = totals.first_bad or block.found.first
    totals.templated = totals.templated or block.found.templated
    for character, count in block.found.unknown.items():
        totals.unknown[character] = totals.unknown.get(character, 0) + count
    totals.untrained += sum(part.untrained() for part in block.parts if not block.goes_on)


def _check(outputs: list[_Output], totals: Totals, inputs: Sequence[str]) -> None:
    if not totals.documents:
        skipped = f" ({totals.skipped} bad records skipped)" if totals.skipped else ""
        raise DataError(f"{' '.join(inputs)}: there are no documents in it{skipped}")
    for target in outputs:
        if not target.tokens.n_documents:
            raise DataError(
                f"no document would go to {target.prefix} of {totals.documents} in all; "
                "choose another `val_split`"
            )
