"""RWKV-6 in the layout of flash-linear-attention.

Source: fla 0.6, fla/models/rwkv6 and fla/layers/rwkv6.py. Two things differ from the official
model: the five mixtures stand in the order r, w, k, v, g, and the norm over heads has an eps of
1e-5 instead of 64e-5, which values divided by 8 make up for exactly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finchtune.models.layouts import Entry, fla_told, flat, reshaped, swapped
from finchtune.models.rwkv6.config import ModelConfig

OURS, THEIRS = "wkvrg", "rwkvg"
TO_THEIRS = [OURS.index(part) for part in THEIRS]
TO_OURS = [THEIRS.index(part) for part in OURS]
VALUE_DIVISOR = 8  # the square root of 64e-5 / 1e-5


def layer_entries(layer: int) -> list[Entry]:
    """The tensors of one layer, besides its norms."""
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    a, t = f"{ours}.att", f"{theirs}.attn"
    found = [
        flat(f"{t}.x_proj.0.mu", f"{a}.time_maa_x"),
        reshaped(f"{t}.x_proj.0.linear.weight", f"{a}.time_maa_w1", first_made, first_split),
        reshaped(f"{t}.x_proj.2.weight", f"{a}.time_maa_w2", second_made, second_split),
        Entry(f"{t}.x_bias", tuple(f"{a}.time_maa_{part}" for part in THEIRS), stacked, rows),
        swapped(f"{t}.w_proj.linear.lora.0.weight", f"{a}.time_decay_w1"),
        swapped(f"{t}.w_proj.linear.lora.2.weight", f"{a}.time_decay_w2"),
        flat(f"{t}.w_proj.linear.lora.2.bias", f"{a}.time_decay"),
        Entry(f"{t}.bonus", (f"{a}.time_faaaa",)),
        reshaped(f"{t}.v_proj.linear.weight", f"{a}.value.weight", divided, multiplied),
        Entry(f"{t}.o_proj.weight", (f"{a}.output.weight",)),
    ]
    for name, own in (("r", "receptance"), ("k", "key"), ("g", "gate")):
        found.append(Entry(f"{t}.{name}_proj.linear.weight", (f"{a}.{own}.weight",)))
    for own in ("key", "receptance"):
        mu = f"{ours}.ffn.time_maa_{own[0]}"
        found.append(flat(f"{theirs}.ffn.{own}.mu", mu))
        found.append(Entry(f"{theirs}.ffn.{own}.linear.weight", (f"{ours}.ffn.{own}.weight",)))
    return [*found, Entry(f"{theirs}.ffn.value.weight", (f"{ours}.ffn.value.weight",))]


def first_made(w1: Tensor) -> Tensor:
    """(C, 5 M) -> (5 M, C), the fives in their order."""
    return w1.T.unflatten(0, (5, -1))[TO_THEIRS].flatten(0, 1)


def first_split(theirs: Tensor) -> Tensor:
    """The inverse of `first_made`."""
    return theirs.unflatten(0, (5, -1))[TO_OURS].flatten(0, 1).T


def second_made(w2: Tensor) -> Tensor:
    """(5, M, C) -> (C, 5 M), the fives in their order."""
    return w2[TO_THEIRS].permute(2, 0, 1).flatten(1)


def second_split(theirs: Tensor) -> Tensor:
    """The inverse of `second_made`."""
    return theirs.unflatten(1, (5, -1)).permute(1, 2, 0)[TO_OURS]


def stacked(vectors: Sequence[Tensor]) -> Tensor:
    """Five vectors 1, 1, C as (5, C)."""
    return torch.cat([vector.view(1, -1) for vector in vectors])


def rows(theirs: Tensor) -> Sequence[Tensor]:
    """The inverse of `stacked`."""
    return theirs.view(5, 1, 1, -1).unbind()


def divided(value: Tensor) -> Tensor:
    return value / VALUE_DIVISOR


def multiplied(value: Tensor) -> Tensor:
    return value * VALUE_DIVISOR


def told(sizes: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return fla_told(sizes) | {
        "expand_k": 1.0,
        "expand_v": 1.0,
        "gate_low_rank_dim": sizes.dim_decay_lora,
        "proj_low_rank_dim": sizes.dim_mix_lora,
    }
