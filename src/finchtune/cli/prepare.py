"""Tokenise text into the .bin/.idx pair that `train.py --data_type binidx` reads.

    python scripts/prepare_data.py --input corpus.jsonl --output data/corpus
    python scripts/prepare_data.py --input qa.jsonl --output data/qa --sft_field question answer

The command line of json2binidx works too and gives the same files, byte for byte:

    python scripts/prepare_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --vocab rwkv_vocab_v20230424.txt --dataset-impl mmap --tokenizer-type RWKVTokenizer \\
        --append-eod
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from finchtune.cli.options import Parser
from finchtune.data import templates
from finchtune.data.binidx import exists, strip_extension, token_dtype
from finchtune.data.inputs import find_inputs
from finchtune.data.labels import unknown_characters
from finchtune.data.prepare import VALIDATION_SUFFIX, Totals, prepare
from finchtune.data.render import Layout
from finchtune.data.speakers import parse_pairs
from finchtune.data.workers import Recipe
from finchtune.errors import UserError, printable
from finchtune.tokenizer import load_tokenizer

WORLD_FILE = "rwkv_vocab_v20230424.txt"
JSON2BINIDX_WIDE_FROM = 65500  # tokens of a vocabulary that it writes in int32
WORLD_FILE = "rwkv_vocab_v20230424.txt"
JSON2BINIDX_TOKENIZERS = ("RWKVTokenizer", "HFTokenizer")


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, globs or folders: .jsonl, .json, .csv, "
        ".tsv, .txt (also .gz or .zst), .parquet")  # fmt: skip
    add("--output", help="prefix of the files to write")
    add("--tokenizer", help="world (default), bytes, or the path of a tokenizer.json")
    add("--field", help="the field that holds the text (default: text)")
    add("--sft_field", nargs="+", metavar="NAME", help="question answer, or instruction input "
        "output: only the last one is trained on under --loss_mask qa")  # fmt: skip
    add("--template", default="", help="how questions and chats are put: metamath (default), chat "
        "(default for messages), alpaca, rwkv-peft, or a file")  # fmt: skip
    add("--loss_mask", choices=("none", "qa"), default="none", help="qa: in plain text train on "
        "what stands between `Assistant:` and the next `User:`")  # fmt: skip
    add("--speakers", nargs="+", default=[], metavar="ASKS/ANSWERS", help="the speakers under "
        "--loss_mask qa, such as Customer/Agent; default User/Assistant and the like")  # fmt: skip
    add("--no_eod", action="store_true", help="do not end documents with token 0")
    add("--val_split", type=float, default=0.0, help="share of the documents, chosen by their "
        "hash, to write to OUTPUT_val instead")  # fmt: skip
    add("--on_bad", choices=("fail", "skip"), default="fail", help="what to do with bad records")
    add("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    add("--overwrite", action="store_true", help="replace files that are there already")
    like = parser.add_argument_group("spelled like json2binidx")
    like.add_argument("--output-prefix", help="write to PREFIX_text_document instead of --output")
    like.add_argument("--vocab", "--vocab-file", help="the vocabulary's file")
    like.add_argument("--tokenizer-type", choices=JSON2BINIDX_TOKENIZERS)
    like.add_argument("--dataset-impl", choices=("mmap",), help="the only kind of file there is")
    like.add_argument("--append-eod", action="store_true", help="end documents with token 0")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    flags = parse_flags(arguments)
    # An exception raised from here would be lost if it came while a worker is being forked.
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    if flags.workers < 1:
        raise UserError(f"--workers {flags.workers} must be at least 1")
    inputs = flags.input
    if flags.output_prefix:
        output, recipe = json2binidx_recipe(flags)
        inputs = [path for paths in inputs for path in paths.split(",")]
    else:
        output, recipe = own_recipe(flags)
    if not flags.overwrite:
        refuse_existing(output, recipe.val_split > 0)
    size = sum(path.stat().st_size for path in find_inputs(inputs))
    interval, file = (0.2, sys.stderr) if sys.stderr.isatty() else (10.0, Log())
    with tqdm(total=size, unit="B", unit_scale=True, mininterval=interval, file=file) as bar:

        def show(totals: Totals) -> None:
            bar.set_postfix_str(f"{totals.tokens:,} tokens", refresh=False)
            bar.update(totals.read_bytes - bar.n)
            if terminated:
                sys.exit(128 + signal.SIGTERM)

        totals = prepare(inputs, output, recipe, flags.workers, show)
    print(printable(summary(output, totals)))


def own_recipe(flags: argparse.Namespace) -> tuple[str, Recipe]:
    unfit = [
        name
        for name in ("vocab", "tokenizer_type", "dataset_impl", "append_eod")
        if getattr(flags, name)
    ]
    if unfit:
        raise UserError(f"--{unfit[0].replace('_', '-')} goes with --output-prefix, not --output")
    if flags.output is None:
        raise UserError("--output is needed: the prefix of the files to write")
    if not 0 <= flags.val_split < 1:
        raise UserError(f"--val_split {flags.val_split} must be at least 0 and below 1")
    if flags.sft_field and (flags.field or len(flags.sft_field) not in (2, 3)):
        raise UserError(
            "--sft_field takes two names (question answer) or three (instruction input output), "
            "and no --field beside it"
        )
    fields = tuple(flags.sft_field or [flags.field or "text"])
    if flags.speakers and (flags.sft_field or flags.loss_mask != "qa"):
        raise UserError("--speakers goes with --loss_mask qa and plain text")
    template = templates.get(flags.template) if flags.template else None
    name = flags.tokenizer or "world"
    return flags.output, Recipe(
        Layout(fields, flags.loss_mask == "qa", template, parse_pairs(flags.speakers)),
        name,
        token_dtype(load_tokenizer(name).vocab_size).str,
        end=not flags.no_eod,
        on_bad=flags.on_bad,
        val_split=flags.val_split,
    )


def json2binidx_recipe(flags: argparse.Namespace) -> tuple[str, Recipe]:
    """As json2binidx writes: its own choice of dtype, and an end only where asked for."""
    unfit = [
        name
        for name in (
            *("output", "tokenizer", "field", "sft_field", "template", "speakers"),
            *("no_eod", "val_split"),
        )
        if getattr(flags, name)
    ]
    if unfit or flags.loss_mask == "qa":
        raise UserError(f"--{(unfit or ['loss_mask'])[0]} goes with --output, not --output-prefix")
    if flags.tokenizer_type is None:
        raise UserError(f"--tokenizer-type is needed: {' or '.join(JSON2BINIDX_TOKENIZERS)}")
    if flags.tokenizer_type == "HFTokenizer" and flags.vocab is None:
        raise UserError("--tokenizer-type HFTokenizer needs --vocab with its tokenizer.json")
    name = vocabulary(flags.vocab)
    if Path(name).name == WORLD_FILE and not Path(name).exists():
        name = "world"  # the file that comes with the tokenizer
    dtype = "<u2" if load_tokenizer(name).vocab_size < JSON2BINIDX_WIDE_FROM else "<i4"
    recipe = Recipe(Layout(), name, dtype, end=flags.append_eod, on_bad=flags.on_bad)
    return f"{flags.output_prefix}_text_document", recipe


def refuse_existing(output: str, held_out: bool) -> None:
    """Raise UserError if files of a data set are there already."""
    prefix = strip_extension(output)
    for name in (prefix, prefix + VALIDATION_SUFFIX)[: 1 + held_out]:
        if exists(name):
            raise UserError(
                f"{name}.bin or .idx is there already; choose another name, or replace the data "
                "with --overwrite"
            )


def vocabulary(path: str | None) -> str:
    """The tokenizer that --vocab names: the built-in World where its usual file is not there."""
    if path is None or (Path(path).name == WORLD_FILE and not Path(path).exists()):
        return "world"
    return path


class Log:
    """Standard error that is no terminal: every state of the progress line is a line of its own."""

    def write(self, text: str) -> None:
        sys.stderr.write(text.replace("\r", "\n"))

    def flush(self) -> None:
        sys.stderr.flush()


def summary(output: str, totals: Totals) -> str:
    lines = [f"{output}: {totals.documents:,} documents, {totals.tokens:,} tokens"]
    if totals.masked_tokens:
        share = 1 - totals.masked_tokens / totals.tokens
        lines.append(f"  {share:.1%} of the tokens are trained on under --loss_mask qa")
    if totals.untrained:
        lines.append(f"  {totals.untrained:,} documents have no trained token under --loss_mask qa")
    if totals.unknown:
        lines.append(f"  {unknown_characters(totals.unknown)}")
    if totals.held_out:
        lines.append(f"  {totals.held_out:,} documents are in {output}_val")
    if totals.skipped:
        lines.append(f"  skipped {totals.skipped:,} bad records; the first: {totals.first_bad}")
    return "\n".join(lines)
