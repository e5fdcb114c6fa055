"""Adapted layers, and base and adapter files, of any method."""

import torch
from helpers.support import save_model, small_model
from torch import nn

from finchtune import adapters
from finchtune.adapters import AdaptedLinear, attach
from finchtune.files import sha256
from finchtune.weights.adapter_files import adapter_keys, save_adapter
from finchtune.weights.base import load_model
from finchtune.weights.tensors import write_tensors

METHODS = {
    "bone": {"r": 8},
    "bat": {"r": 8, "mode": "row"},
    "lora": {"r": 4, "alpha": 16},
    "pissa": {"r": 4},
    "olora": {"r": 4},
    "dora": {"r": 4},
    "disha": {"r1": 8, "r2": 4},
    "frozen_ft": {},
}


def make_adapter(folder, method, hyperparameters, record=True, scale=1.0, sizes=None):
    """A base file, a model adapted with random tensors, and the adapter's file."""
    base = save_model(small_model(**(sizes or {})), folder / "base.pth")
    model = attach(load_model(base), method, **hyperparameters)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * 0.05 * torch.randn_like(parameter))
    tensors = {key: model.state_dict()[name] for name, key in adapter_keys(model).items()}
    path = folder / "rwkv-0.pth"
    if record:
        spec = {"adapter": model.adapter_spec, "base": {"file": base.name, "sha256": sha256(base)}}
        save_adapter(tensors, spec, path)
    else:
        write_tensors(tensors, path)
    return base, model, path


def quantised_and_dense(name, settings, kind, sizes, scale, dtype=torch.float32):
    """A layer of `sizes` (in, out) with a trained adapter on a quantised weight, and the same on
    the dense weight.
    """
    linear = nn.Linear(*sizes, bias=False, dtype=dtype)
    adapter = adapters.METHODS[name](*sizes, **settings)
    adapter.init(linear.weight.detach())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    layer = AdaptedLinear(linear, adapter, kind)
    dense = nn.Linear(*sizes, bias=False, dtype=dtype)
    dense.weight = nn.Parameter(layer.weight.dense(dtype))
    return layer, AdaptedLinear(dense, adapter)
