"""Linear layers as text is written with them: without autograd, by compiled CPU operators.

A layer with an adapter that adds a product of two thin matrices is computed as such, and one whose
adapter moves shards of its input too; a quantised weight is decoded in pieces that stay in the
cache. Other adapters run as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finchtune.adapters.frozen import coded_product
from finchtune.adapters.linear import AdaptedLinear, QuantisedLinear
from finchtune.adapters.quantise import QuantisedWeight
from finchtune.adapters.shards import add_to_shards, move_shards
from finchtune.errors import UserError

NONE, TANH, SQUARED_RELU = range(3)  # activations of the operator `products`


@dataclass(frozen=True)
class Sum:
    """W + B A of W (d, k), which may be quantised, A (r, k) and B (d, r)."""

    W: Tensor | QuantisedWeight
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Moved:
    """W (x + u) + the sum of all u_b at every shard, of u_b = D_b x_b: see `Adapter.shard_map`."""

    W: Tensor | QuantisedWeight
    D: Tensor


Layer = Tensor | Sum | Moved | nn.Module


def prepared(layer: nn.Module, dtype: torch.dtype) -> Layer:
    """A linear layer in the form that `products` is fastest with. Small matrices are copied.

    `dtype` is that of the layer's inputs.
    """
    if isinstance(layer, nn.Linear) and layer.bias is None:
        return layer.weight
    if isinstance(layer, QuantisedLinear) and layer.bias is None:
        return layer.weight
    if not isinstance(layer, AdaptedLinear) or layer.bias is not None:
        return layer
    D = layer.adapter.shard_map()
    if D is not None:
        return Moved(layer.weight, D.to(dtype).contiguous())
    try:
        A, B, scale = layer.adapter.low_rank()
    except UserError:  # what the adapter adds is no such product
        return layer
    return Sum(layer.weight, A.to(dtype).contiguous(), (B * scale).to(dtype).contiguous())


def products(
    inputs: Sequence[Tensor], layers: Sequence[Layer], activations: Sequence[int]
) -> list[Tensor]:
    """activation(layer(x)) of each input (rows, k) and prepared layer, or matrix (d, k).

    A row's results do not depend on the other rows, to the last bit, but for layers that run as
    they are. All matrices are multiplied in one call, then all B in another: with few rows a call
    costs as much as a small product.
    """
    moved = {
        i: move_shards(inputs[i], layer.D)
        for i, layer in enumerate(layers)
        if isinstance(layer, Moved)
    }
    inputs = [moved[i][0] if i in moved else x for i, x in enumerate(inputs)]
    sums = {i: layer for i, layer in enumerate(layers) if isinstance(layer, Sum)}
    whole = {i: W for i, layer in enumerate(layers) if isinstance(W := matrix_of(layer), Tensor)}
    chosen = [*whole, *sums]
    matrices = [*whole.values(), *(one.A for one in sums.values())]
    unfinished = sums.keys() | moved.keys()
    own = [NONE if i in unfinished else activations[i] for i in whole] + [NONE] * len(sums)
    found = multiplied([inputs[i] for i in chosen], matrices, own)
    results = dict(zip(whole, found, strict=False))
    for i, layer in enumerate(layers):
        if i not in results:
            results[i] = other_product(inputs[i], layer, activations[i])
    thin = [one.B for one in sums.values()]
    added = multiplied(found[len(whole) :], thin, [NONE] * len(sums))
    for i, more in zip(sums, added, strict=True):
        results[i] = activated(results[i].add_(more), activations[i])
    for i, (_, u) in moved.items():
        add_to_shards(results[i], u)
        results[i] = activated(results[i], activations[i])
    return [results[i] for i in range(len(layers))]


def matrix_of(layer: Layer) -> Tensor | QuantisedWeight | None:
    """What of a layer is one matrix; None for one that runs as it is."""
    if isinstance(layer, Sum | Moved):
        return layer.W
    return layer if isinstance(layer, Tensor) else None


def multiplied(
    inputs: list[Tensor], matrices: list[Tensor], activations: list[int]
) -> list[Tensor]:
    """activation(x W^T) of each pair, in one call."""
    return torch.ops.finchtune.products(inputs, matrices, activations) if inputs else []


def other_product(x: Tensor, layer: Layer, activation: int) -> Tensor:
    """x by a quantised weight alone, or through a layer that runs as it is."""
    W, own = (layer.W, NONE) if isinstance(layer, Sum | Moved) else (layer, activation)
    if not isinstance(W, QuantisedWeight):
        assert isinstance(W, nn.Module)
        return activated(W(x), activation)
    return coded_product(x, W.codes, W.scales, W.form, own)


def activated(x: Tensor, activation: int) -> Tensor:
    """An activation of what a layer gave, which may be written to."""
    if activation == TANH:
        return x.tanh_()
    return torch.relu_(x).square_() if activation == SQUARED_RELU else x
