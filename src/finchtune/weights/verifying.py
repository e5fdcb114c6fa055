"""Whether a merged file computes what the adapted model does."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.adapters import QuantisedWeight
from finchtune.errors import UserError
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.adapter_files import adapted_model
from finchtune.weights.base import load_model

VERIFY_TOKENS = 512
VERIFY_LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By the dtype that merged weights are rounded to: what their logits may differ by."""


@torch.no_grad()
def verify(
    base: str | Path,
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
    source = Path(text).read_text() if os.path.isfile(text) else text  # which may be long
    ids = load_tokenizer(None, model.config.vocab_size).encode(source)[:VERIFY_TOKENS]
    if not ids:
        raise UserError("`verify` needs a text of at least one token")
    tokens = torch.tensor([ids], device=device)
    for module in model.modules():
        if isinstance(module, QuantisedWeight):
            module.leave_fp8()
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
