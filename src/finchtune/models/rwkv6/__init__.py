"""RWKV-6: `ModelConfig`, the model `RWKV6`, its state, and its initialisation."""

from finchtune.models.rwkv6.config import ModelConfig
from finchtune.models.rwkv6.init import init_weights
from finchtune.models.rwkv6.model import RWKV6, BlockState, State

__all__ = ["RWKV6", "BlockState", "ModelConfig", "State", "init_weights"]
