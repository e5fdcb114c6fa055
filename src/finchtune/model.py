"""The models' public names: `RWKV6`, its sizes, its state and its initialisation."""

from finchtune.models.rwkv6 import RWKV6, BlockState, ModelConfig, State, init_weights

__all__ = ["RWKV6", "BlockState", "ModelConfig", "State", "init_weights"]
