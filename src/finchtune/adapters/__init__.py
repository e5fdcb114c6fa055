"""Adapters: small trainable changes of a frozen model's linear layers. One file, one method."""

from finchtune.adapters.attaching import (
    adapted_layers,
    attach,
    block_targets,
    exactly,
    find_targets,
    merge,
    quantise_linears,
    targets_of,
)
from finchtune.adapters.base import Adapter
from finchtune.adapters.gradients import (
    collected_gradients,
    start_from_gradients,
    weight_gradients,
)
from finchtune.adapters.linear import AdaptedLinear, QuantisedLinear
from finchtune.adapters.quantise import QuantisedWeight
from finchtune.adapters.registry import METHODS, get_method, hyperparameters_of
from finchtune.adapters.state import (
    adapter_state,
    adapter_tensor,
    file_key,
    is_adapter_tensor,
    load_adapter_state,
)

__all__ = [
    "METHODS",
    "AdaptedLinear",
    "Adapter",
    "QuantisedLinear",
    "QuantisedWeight",
    "adapted_layers",
    "adapter_state",
    "adapter_tensor",
    "attach",
    "block_targets",
    "collected_gradients",
    "exactly",
    "file_key",
    "find_targets",
    "get_method",
    "hyperparameters_of",
    "is_adapter_tensor",
    "load_adapter_state",
    "merge",
    "quantise_linears",
    "start_from_gradients",
    "targets_of",
    "weight_gradients",
]
