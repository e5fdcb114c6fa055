"""Check a .bin/.idx pair completely and show what is in it.

    python scripts/inspect_data.py --data_file data/corpus --ctx_len 512

Ends with a message and status 2 at the first thing that is wrong.
"""

import argparse
import sys
from collections.abc import Iterable

import numpy as np

from finchtune.cli.options import Parser
from finchtune.data import inspect, templates
from finchtune.data.binidx import BinIdx, exists, strip_extension
from finchtune.data.documents import MASK_SUFFIX, read_binidx
from finchtune.data.provenance import read_provenance
from finchtune.errors import UserError, printable
from finchtune.tokenizer import load_tokenizer

MOST_USED = 10
MOST_TOKENS = 2**31  # of a context
MOST_IDS = 2**24  # of a vocabulary; a count of 8 bytes for each is made


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_file", required=True, help="prefix of the pair, with or without an extension")
    add("--tokenizer", help="world, bytes, or a tokenizer.json; default that of the data, or world")
    add("--template", default="", help="refuse data that was prepared with another one")
    add("--vocab_size", type=int, help="the model's, if it differs from the tokenizer's")
    add("--ctx_len", type=int, default=512, help="context to count rows and padding for")
    add("--samples", type=int, default=2, help="documents to show as text")
    add("--random_seed", type=int, default=42, help="chooses the documents to show")
    add("--color", choices=("auto", "always", "never"), default="auto", help="mark what is trained "
        "on by colour (on a terminal) or by « »")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    flags = parse_flags(arguments)
    if not 1 <= flags.ctx_len <= MOST_TOKENS or flags.samples < 0:
        raise UserError(
            f"--ctx_len must be at least 1 and at most {MOST_TOKENS:,}, --samples not below 0"
        )
    if flags.vocab_size is not None and not 1 <= flags.vocab_size <= MOST_IDS:
        raise UserError(f"--vocab_size must be at least 1 and at most {MOST_IDS:,}")
    prefix = strip_extension(flags.data_file)
    pair = BinIdx(prefix)
    made = read_provenance(prefix, len(pair), pair.n_tokens)
    default = made.tokenizer if made else "world"
    tokenizer = load_tokenizer(flags.tokenizer or default, flags.vocab_size)
    if made:
        made.check(prefix, tokenizer, templates.get(flags.template) if flags.template else None)
    vocab_size = flags.vocab_size or tokenizer.vocab_size
    masked = exists(prefix + MASK_SUFFIX)
    documents = read_binidx(prefix, vocab_size, "qa" if masked else "none")
    print(f"{printable(prefix)}: the files fit together, every token id is below {vocab_size}")
    if made:
        template = made.template.name if made.template else "none"
        show([f"tokenizer       {made.tokenizer}", f"template        {template}"])
    show(inspect.overview(documents))
    show(inspect.rows_at(documents, flags.ctx_len, flags.random_seed))
    print("\ntokens in a document, documents")
    show(inspect.length_histogram(documents.sizes))
    counts = inspect.vocabulary_use(documents, vocab_size)
    print(f"\nvocabulary: {np.count_nonzero(counts):,} of {vocab_size:,} ids are used; most often")
    for id in np.argsort(-counts, kind="stable")[:MOST_USED]:
        if counts[id]:
            share = counts[id] / documents.n_tokens
            print(f"{id:>8}  {tokenizer.id_bytes(int(id))!r:<24} {counts[id]:>12,}  {share:.1%}")
    colour = flags.color == "always" or (flags.color == "auto" and sys.stdout.isatty())
    for i in inspect.sample(documents, flags.samples, flags.random_seed):
        print(f"\ndocument {i}, {documents.sizes[i]} tokens")
        print(inspect.marked_text(documents, i, tokenizer, colour))


def show(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"  {printable(line)}")
