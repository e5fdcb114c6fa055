"""The tensors of a model's adapters, under the keys they have in files."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finchtune.adapters.attaching import adapted_layers
from finchtune.errors import UserError

ADAPTER = ".adapter."  # stands in the name of every tensor of an adapter


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of a model, by its full name, is an adapter's."""
    return ADAPTER in name


def adapter_tensor(name: str) -> str:
    """What an adapter itself calls a tensor of this full name; "" for one of the model's own."""
    return name.rpartition(ADAPTER)[2] if is_adapter_tensor(name) else ""


def file_key(name: str) -> str:
    """The key in a file of an adapter tensor's name in the model.

    `blocks.0.att.key.adapter.bone` becomes `blocks.0.att.key.bone`, as other software writes it.
    """
    layer, _, tensor = name.rpartition(ADAPTER)
    return f"{layer}.{tensor}" if layer else name


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of the adapters, by file key.

    The tensors are detached, not copied. Raises UserError for a model without adapters.
    """
    return {
        f"{name}.{key}": tensor
        for name, layer in adapted_layers(model).items()
        for key, tensor in layer.adapter.state_dict().items()
    }


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors by file key into the adapters, which keep their dtype and device.

    Raises UserError, before anything is changed, that lists missing, extra and misshapen keys.
    """
    own = adapter_state(model)
    faults = [f"missing {key}" for key in own if key not in state]
    faults += [f"unknown {key}" for key in state if key not in own]
    faults += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if faults:
        more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"the adapter does not fit this model: {'; '.join(faults[:8])}{more}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
