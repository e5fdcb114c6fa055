"""The recurrent states of several sequences: a list of layers, each a tuple of tensors (S, ...)."""

from collections.abc import Sequence
from typing import Any

import torch

State = list[Any]


def select(state: State, rows: Sequence[int]) -> State:
    """A copy of the states of some sequences, in that order."""
    index = torch.tensor(rows, device=state[0][0].device)
    return [type(layer)(*(part.index_select(0, index) for part in layer)) for layer in state]


def join(states: Sequence[State]) -> State:
    """The states of all sequences, one after another."""
    if len(states) == 1:
        return states[0]
    return [
        type(layers[0])(*map(torch.cat, zip(*layers, strict=True)))
        for layers in zip(*states, strict=True)
    ]
