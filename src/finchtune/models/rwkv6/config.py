"""The sizes of an RWKV-6, given or read off its weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from finchtune.errors import UserError
from finchtune.models.config import ModelSizes


@dataclass(frozen=True)
class ModelConfig(ModelSizes):
    """Every size of an RWKV-6. `dim_ffn` defaults to 3.5 n_embd, rounded down to 32."""

    dim_mix_lora: int = None  # type: ignore[assignment]  # filled in below
    dim_decay_lora: int = None  # type: ignore[assignment]

    def defaults(self) -> dict[str, int]:
        wide = self.n_embd >= 4096
        return {
            "dim_ffn": int(self.n_embd * 3.5) // 32 * 32 or 32,
            "dim_mix_lora": 64 if wide else 32,
            "dim_decay_lora": 128 if wide else 64,
        }

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "ModelConfig":
        """Read every size off a weight file's tensors. Raises UserError if it is no RWKV-6."""
        try:
            vocab_size, n_embd = weights["emb.weight"].shape
            heads = weights["blocks.0.att.time_faaaa"].shape
            dim_ffn = weights["blocks.0.ffn.key.weight"].shape[0]
            dim_mix_lora = weights["blocks.0.att.time_maa_w2"].shape[1]
            dim_decay_lora = weights["blocks.0.att.time_decay_w1"].shape[1]
            head_size = heads[1]
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"not an RWKV-6 (x060) weight file: no usable {error}; its first keys are "
                f"{list(weights)[:3]}"
            ) from error
        layers = [int(name.split(".")[1]) for name in weights if name.startswith("blocks.")]
        return cls(
            n_layer=1 + max(layers),
            n_embd=n_embd,
            vocab_size=vocab_size,
            dim_ffn=dim_ffn,
            head_size=head_size,
            dim_mix_lora=dim_mix_lora,
            dim_decay_lora=dim_decay_lora,
        )
