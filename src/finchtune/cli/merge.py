"""Merge an adapter into its base model's weights."""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from finchtune.cli.options import OTHER_BASE, Parser, check_output
from finchtune.cli.spellings.merge_lines import our_arguments
from finchtune.cli.stated import add_stated_flags, stated_of
from finchtune.errors import printable
from finchtune.weights.hashing import hashing

RWKV_PEFT = {"rslora": False, "mode": "row", "quant": "none"}
"""What the scripts for one method, and --type, take for granted, as in RWKV-PEFT."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--base_model", required=True, help="the .pth that was fine-tuned")
    parser.add_argument(
        *("--peft_checkpoint", "--lora_checkpoint", "--state_checkpoint"),
        required=True,
        help="the .pth of the adapter or of the initial states",
    )
    parser.add_argument("--output", required=True, help="the merged .pth or .safetensors to write")
    parser.add_argument("--other_base", type=int, choices=(0, 1), default=0, help=OTHER_BASE)
    add_stated_flags(parser)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute")
    parser.add_argument(
        "--verify",
        metavar="TEXT|FILE",
        help="compare the logits of the merged and of the adapted model on this text; both are "
        "loaded whole, one after the other",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, methods: Collection[str] | None = None) -> None:
    """`methods` restricts which methods' adapters are merged."""
    arguments = arguments or []
    theirs = bool(methods) or "--type" in arguments
    given = parse(our_arguments(arguments, methods))
    inputs = (given.base_model, given.peft_checkpoint, given.lora_init)
    check_output(given.output, *inputs, suffixes=(".pth", ".safetensors"))
    base_hash = hashing(given.base_model)  # already while torch is imported

    from finchtune.weights.adapter_files import read_adapter
    from finchtune.weights.merging import merge_files, receipt_path
    from finchtune.weights.verifying import verify

    def check(merged: Path, spec: dict[str, Any]) -> None:
        tensors = read_adapter(given.peft_checkpoint, given.lora_init)
        print(verify(given.base_model, tensors, spec, merged, given.verify, given.device))

    receipt = merge_files(
        given.base_model,
        given.peft_checkpoint,
        given.output,
        methods=methods,
        stated=stated_of(given),
        other_base=bool(given.other_base),
        defaults=RWKV_PEFT if theirs else {},
        initial=given.lora_init,
        device=given.device,
        base_hash=base_hash,
        check=check if given.verify else None,
    )
    counts = ", ".join(f"{receipt[kind]} tensors {kind}" for kind in ("merged", "replaced", "kept"))
    print(printable(f"{given.output}: {counts}; receipt: {receipt_path(given.output)}"))
