"""Models without autograd, by compiled CPU operators: what the generations' forms share.

Every token is a row (C) here; the rows of all sequences follow one another. With plain weights a
sequence's result does not depend on the others, to the last bit; layers with an adapter run as
they are.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from finchtune.models.language_model import LanguageModel
from finchtune.models.recurrent import State
from finchtune.ops.kernels import fits_cpu

NONE, TANH, SQUARED_RELU = range(3)  # activations of the operator `products`


def fits(model: LanguageModel) -> bool:
    """Whether the compiled form takes a model: whole, on a CPU, all but adapters of one dtype."""
    own = [p for name, p in model.named_parameters() if ".adapter." not in name]
    whole = all(p.numel() for p in own)  # ZeRO-3 leaves shells
    return whole and fits_cpu(*own) and model.config.head_size in range(8, 129, 8)


class CompiledModel:
    """A model as it is now: small matrices are copied, so build it anew when they change."""

    def __init__(self, model: LanguageModel):
        self.model = model

    def through_blocks(self, x: Tensor, rows: "Rows", state: State | None) -> tuple[Tensor, State]:
        """Embedded tokens (rows, C) and the states before them -> the same after all blocks."""
        raise NotImplementedError

    def advance(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `LanguageModel.advance`, which says what the arguments are.

        Where each sequence has one token, the given WKV state may be written to.
        """
        B, T = tokens.shape
        if cu_seqlens is None and T > 1:
            cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
        rows = Rows(B, cu_seqlens)
        x, state = self.through_blocks(self.model.emb(tokens.flatten()), rows, state)
        return self.model.ln_out(rows.last(x)), state

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, C) -> (rows, V)."""
        return products([hidden], [self.model.head], [NONE])[0]


class Rows:
    """Which rows of x (rows, C) are whose: one each of `count` sequences, or at boundaries."""

    def __init__(self, count: int, cu_seqlens: Tensor | None):
        self.cu_seqlens = cu_seqlens
        self.ends = None if cu_seqlens is None else cu_seqlens[1:].long() - 1
        self.count = count if cu_seqlens is None else len(cu_seqlens) - 1

    def last(self, x: Tensor) -> Tensor:
        """The last row of each sequence, (S, C): a copy, or all of x where each has one."""
        return x if self.ends is None else x.index_select(0, self.ends)

    def batch(self, x: Tensor) -> Tensor:
        """x as (B, T, ...), which operators for packed sequences take."""
        return x.unsqueeze(0 if self.cu_seqlens is not None else 1)


def products(
    inputs: Sequence[Tensor], layers: Sequence[Tensor | nn.Module], activations: list[int]
) -> list[Tensor]:
    """activation(x W^T) of each input (rows, in) and layer, or matrix (out, in).

    Plain ones in one call; other layers, which have an adapter, one after another.
    """
    matrices = [weight_of(layer) for layer in layers]
    plain = [i for i, matrix in enumerate(matrices) if matrix is not None]
    if len(plain) == len(layers):
        return torch.ops.finchtune.products(inputs, matrices, activations)
    results: list[Tensor] = [torch.empty(0)] * len(layers)
    if plain:
        chosen = [inputs[i] for i in plain], [matrices[i] for i in plain]
        found = torch.ops.finchtune.products(*chosen, [activations[i] for i in plain])
        for i, y in zip(plain, found, strict=True):
            results[i] = y
    for i, layer in enumerate(layers):
        if matrices[i] is None:
            y = cast(nn.Module, layer)(inputs[i])
            results[i] = torch.relu(y).square_() if activations[i] == SQUARED_RELU else y
    return results


def weight_of(layer: Tensor | nn.Module) -> Tensor | None:
    """The matrix that is all there is to a layer, None if there is more."""
    if isinstance(layer, Tensor):
        return layer
    return layer.weight if isinstance(layer, nn.Linear) and layer.bias is None else None
