"""The sizes of an RWKV-7, given or read off its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from finchtune.errors import UserError
from finchtune.models.config import ModelSizes

RANKS = {
    "dim_decay_lora": "w1",
    "dim_rate_lora": "a1",
    "dim_gate_lora": "g1",
}
"""Size -> the matrix (C, rank) of every block's time mix that it is read off."""


@dataclass(frozen=True)
class ModelConfig(ModelSizes):
    """Every size of an RWKV-7. `dim_ffn` defaults to 4 n_embd, ranks grow with its root.

    The first block mixes no values; some files hold tensors for that all the same, of rank
    `dim_unused_lora`.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset({"dim_unused_lora"})

    dim_decay_lora: int = None  # type: ignore[assignment]  # filled in below
    dim_rate_lora: int = None  # type: ignore[assignment]
    dim_value_lora: int = None  # type: ignore[assignment]
    dim_gate_lora: int = None  # type: ignore[assignment]
    dim_unused_lora: int = 0

    def defaults(self) -> dict[str, int]:
        def rank(factor: float) -> int:
            return max(32, round(factor * math.sqrt(max(0, self.n_embd)) / 32) * 32)

        return {
            "dim_ffn": 4 * self.n_embd,
            "dim_decay_lora": rank(2.5),
            "dim_rate_lora": rank(2.5),
            "dim_value_lora": rank(1.7),
            "dim_gate_lora": rank(5),
        }

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "ModelConfig":
        """Read every size off a weight file's tensors. Raises UserError if it is no RWKV-7."""
        layers = [int(name.split(".")[1]) for name in weights if name.startswith("blocks.")]
        try:
            vocab_size, n_embd = weights["emb.weight"].shape
            head_size = weights["blocks.0.att.r_k"].shape[1]
            dim_ffn = weights["blocks.0.ffn.key.weight"].shape[0]
            ranks = {size: weights[f"blocks.0.att.{n}"].shape[1] for size, n in RANKS.items()}
            if max(layers):
                ranks["dim_value_lora"] = weights["blocks.1.att.v1"].shape[1]
            if "blocks.0.att.v1" in weights:
                ranks["dim_unused_lora"] = weights["blocks.0.att.v1"].shape[1]
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"not an RWKV-7 (x070) weight file: no usable {error}; its first keys are "
                f"{list(weights)[:3]}"
            ) from error
        return cls(1 + max(layers), n_embd, vocab_size, dim_ffn, head_size, **ranks)
