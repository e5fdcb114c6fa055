"""Merge an adapter into its base model's weights."""

import argparse
import gc
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.cli.options import OTHER_BASE, check_output
from finchtune.cli.spellings.merge_lines import our_arguments
from finchtune.cli.stated import add_stated_flags, stated_of
from finchtune.errors import UserError, printable
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.adapter_files import adapted_model, read_adapter
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files, receipt_path

RWKV_PEFT = {"rslora": False, "mode": "row", "quant": "none"}
"""What the scripts for one method, and --type, take for granted, as in RWKV-PEFT."""
VERIFY_TOKENS = 512
VERIFY_LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By the dtype that merged weights are rounded to: what their logits may differ by."""


def main(arguments: list[str] | None = None, methods: Collection[str] | None = None) -> None:
    """`methods` restricts which methods' adapters are merged."""
    arguments = arguments or []
    theirs = bool(methods) or "--type" in arguments
    parser = argparse.ArgumentParser(description=__doc__)
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
    given = parser.parse_args(our_arguments(arguments, methods))
    inputs = (given.base_model, given.peft_checkpoint, given.lora_init)
    check_output(given.output, *inputs, suffixes=(".pth", ".safetensors"))

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
        check=check if given.verify else None,
    )
    counts = ", ".join(f"{receipt[kind]} tensors {kind}" for kind in ("merged", "replaced", "kept"))
    print(printable(f"{given.output}: {counts}; receipt: {receipt_path(given.output)}"))


@torch.no_grad()
def verify(
    base: str,
    tensors: dict[str, Tensor],
    spec: dict[str, Any],
    merged: Path,
    text: str,
    device: str = "cpu",
) -> str:
    """A line that tells how far merged and adapted logits are apart; too far raises UserError.

    Both models compute in float32; only the weights' one rounding is between them.
    """
    model = adapted_model(base, tensors, spec).to(device)
    source = Path(text).read_text() if Path(text).is_file() else text
    ids = load_tokenizer(None, model.config.vocab_size).encode(source)[:VERIFY_TOKENS]
    if not ids:
        raise UserError("--verify needs a text of at least one token")
    tokens = torch.tensor([ids], device=device)
    expected = model(tokens)[0][0].cpu()
    rounding = load_model(merged).head.weight.dtype
    del model
    gc.collect()
    found = load_model(merged, torch.float32, device)(tokens)[0][0].cpu()
    gap = float((found - expected).abs().max() / expected.abs().max())
    agreeing = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    line = (
        f"verified on {len(ids)} tokens: logits differ by at most {gap:.2g} of the largest, the "
        f"likeliest token agrees at {agreeing:.1%} of the positions"
    )
    if not gap <= VERIFY_LIMITS[rounding]:
        raise UserError(f"{line}; more than {VERIFY_LIMITS[rounding]:g} is too much for {rounding}")
    return line
