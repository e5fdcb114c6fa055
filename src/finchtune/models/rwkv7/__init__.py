"""RWKV-7 (x070, "Goose")."""

from finchtune.models.generations import Generation
from finchtune.models.recurrent import BlockState, State
from finchtune.models.rwkv7.config import ModelConfig
from finchtune.models.rwkv7.init import init_weights
from finchtune.models.rwkv7.layouts import LAYOUTS
from finchtune.models.rwkv7.model import RWKV7


def released(n_layer: int, n_embd: int, *ranks: int) -> ModelConfig:
    """Sizes of a released model; ranks as in `w1`, `a1`, `v1` and `g1`."""
    names = "dim_decay_lora", "dim_rate_lora", "dim_value_lora", "dim_gate_lora"
    return ModelConfig(n_layer, n_embd, 65536, **dict(zip(names, ranks, strict=True)))


GENERATION = Generation(
    name="x070",
    number=7,
    model=RWKV7,
    sizes=ModelConfig,
    init_weights=init_weights,
    recognised_by=r"\.att\.r_k$",
    stored_flat=r"\.att\.(x_[rwkvag]|[wav]0|k_[ka])$|\.ffn\.x_k$",
    released={
        "0.1B": released(12, 768, 64, 64, 32, 128),
        "0.4B": released(24, 1024, 64, 64, 32, 128),
        "1.5B": released(24, 2048, 96, 96, 64, 256),
        "2.9B": released(32, 2560, 96, 96, 64, 320),
        "7.2B": released(32, 4096, 128, 128, 96, 480),
        "13.3B": released(61, 4096, 192, 192, 128, 384),
    },
    layouts=LAYOUTS,
    unread=r"^blocks\.0\.att\.v[012]$",
)

__all__ = ["GENERATION", "RWKV7", "BlockState", "ModelConfig", "State", "init_weights"]
