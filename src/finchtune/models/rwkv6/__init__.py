"""RWKV-6 (x060, "Finch")."""

from finchtune.models.generations import Generation
from finchtune.models.recurrent import BlockState, State
from finchtune.models.rwkv6.config import ModelConfig
from finchtune.models.rwkv6.init import init_weights
from finchtune.models.rwkv6.layouts import LAYOUTS
from finchtune.models.rwkv6.model import RWKV6

GENERATION = Generation(
    name="x060",
    number=6,
    model=RWKV6,
    sizes=ModelConfig,
    init_weights=init_weights,
    recognised_by=r"\.time_(maa_|faaaa$)",
    stored_flat=r"time_(maa_[xwkvrg]|decay)$",
    released={
        "1.6B": ModelConfig(n_layer=24, n_embd=2048, vocab_size=65536),
        "3B": ModelConfig(n_layer=32, n_embd=2560, vocab_size=65536),
        "7B": ModelConfig(n_layer=32, n_embd=4096, vocab_size=65536),
        "14B": ModelConfig(n_layer=61, n_embd=4096, vocab_size=65536),
    },
    layouts=LAYOUTS,
)

__all__ = ["GENERATION", "RWKV6", "BlockState", "ModelConfig", "State", "init_weights"]
