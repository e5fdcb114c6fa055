"""Gradient checkpointing: what a block keeps for backward, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)
KEPT = tuple(
    f"finchtune.{name}.default"
    for name in ("wkv6_forward", "wkv7_forward", "product_plus", "fp8_product", "bone", "bat_row")
)
THIN = 256  # a product over fewer elements is cheap to make again


def recomputed(mode: int, block: Callable[..., Any], *inputs: Any) -> Any:
    """block(*inputs). In backward, mode 0 computes nothing again, mode 1 the whole block.

    Mode 2 keeps the results of WKV and of matrix products over at least THIN elements, and makes
    the rest again: norms, token-shift mixtures, activations, low-rank products. A kept result
    must not be written to in place; torch raises a RuntimeError if it is.
    """
    if mode == 0 or not torch.is_grad_enabled():
        return block(*inputs)
    if mode == 1:
        return checkpoint(block, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, keep_expensive)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def keep_expensive(_: Any, operator: Any, *inputs: Any, **__: Any) -> CheckpointPolicy:
    """The policy of mode 2."""
    # As (first factor, second factor): addmm has what is added before them.
    large = operator in PRODUCTS and inputs[-2].shape[-1] >= THIN
    expensive = large or str(operator) in KEPT
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
