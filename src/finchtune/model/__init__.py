"""RWKV-6: `ModelConfig`, the model `RWKV6`, its state, and its initialisation."""

from finchtune.model.config import ModelConfig
from finchtune.model.init import init_weights
from finchtune.model.rwkv6 import RWKV6, BlockState, State

__all__ = ["RWKV6", "BlockState", "ModelConfig", "State", "init_weights"]
