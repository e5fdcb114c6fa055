"""How every tensor of a new model starts that no generation has to itself."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finchtune.models.language_model import LanguageModel


@torch.no_grad()
def init_all(
    model: LanguageModel, parts: Mapping[type[nn.Module], Callable[[Any], None]], seed: int | None
) -> None:
    """Initialise embedding, norms and head, and with `parts` every module of their classes.

    Reproducible when `seed` is given.
    """
    if seed is not None:
        torch.manual_seed(seed)
    config = model.config
    nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif type(module) in parts:
            parts[type(module)](module)
    ratio = config.vocab_size / config.n_embd
    nn.init.orthogonal_(model.head.weight, gain=0.5 * math.sqrt(max(1.0, ratio)))


def row(vector: Tensor) -> Tensor:
    """(C) as (1, 1, C)."""
    return vector.view(1, 1, -1)
