"""Hugging Face folders in the layout of flash-linear-attention's RWKV-6.

Source: fla 0.6, fla/models/rwkv6 and fla/layers/rwkv6.py. Two things differ from the official
model: the five mixtures stand in the order r, w, k, v, g, and the norm over heads has an eps of
1e-5 instead of 64e-5, which values divided by 8 make up for exactly.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from finchtune.models.rwkv6 import ModelConfig
from finchtune.weights.forms.base import (
    DTYPES,
    Entry,
    Form,
    Settings,
    from_form,
    n_layer_of,
    reshaped,
    to_form,
)
from finchtune.weights.forms.folders import is_rwkv6_folder, read_folder, write_folder
from finchtune.weights.lazy import layout_of

ARCHITECTURE = "RWKV6ForCausalLM"
OURS, THEIRS = "wkvrg", "rwkvg"
TO_THEIRS = [OURS.index(part) for part in THEIRS]
TO_OURS = [THEIRS.index(part) for part in OURS]
VALUE_DIVISOR = 8  # the square root of 64e-5 / 1e-5


def entries(n_layer: int) -> list[Entry]:
    """Every tensor of this form."""
    found = [Entry("model.embeddings.weight", ("emb.weight",))]
    for layer in range(n_layer):
        found += layer_entries(layer)
    found += [Entry(f"model.norm.{part}", (f"ln_out.{part}",)) for part in ("weight", "bias")]
    return [*found, Entry("lm_head.weight", ("head.weight",))]


def layer_entries(layer: int) -> list[Entry]:
    """The tensors of one layer."""
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    a, t = f"{ours}.att", f"{theirs}.attn"
    norms = [("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm")]
    norms += [("ln0", "pre_norm")] if layer == 0 else []
    found = [
        Entry(f"{theirs}.{norm}.{part}", (f"{ours}.{own}.{part}",))
        for own, norm in norms
        for part in ("weight", "bias")
    ]
    found += [
        reshaped(f"{t}.x_proj.0.mu", f"{a}.time_maa_x", torch.ravel, as_row),
        reshaped(f"{t}.x_proj.0.linear.weight", f"{a}.time_maa_w1", first_made, first_split),
        reshaped(f"{t}.x_proj.2.weight", f"{a}.time_maa_w2", second_made, second_split),
        Entry(f"{t}.x_bias", tuple(f"{a}.time_maa_{part}" for part in THEIRS), stacked, rows),
        reshaped(f"{t}.w_proj.linear.lora.0.weight", f"{a}.time_decay_w1", torch.t, torch.t),
        reshaped(f"{t}.w_proj.linear.lora.2.weight", f"{a}.time_decay_w2", torch.t, torch.t),
        reshaped(f"{t}.w_proj.linear.lora.2.bias", f"{a}.time_decay", torch.ravel, as_row),
        Entry(f"{t}.bonus", (f"{a}.time_faaaa",)),
        reshaped(f"{t}.v_proj.linear.weight", f"{a}.value.weight", divided, multiplied),
        Entry(f"{t}.o_proj.weight", (f"{a}.output.weight",)),
    ]
    for name, own in (("r", "receptance"), ("k", "key"), ("g", "gate")):
        found.append(Entry(f"{t}.{name}_proj.linear.weight", (f"{a}.{own}.weight",)))
    for own in ("key", "receptance"):
        mu = f"{ours}.ffn.time_maa_{own[0]}"
        found.append(reshaped(f"{theirs}.ffn.{own}.mu", mu, torch.ravel, as_row))
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


def as_row(vector: Tensor) -> Tensor:
    """C -> 1, 1, C."""
    return vector.view(1, 1, -1)


def divided(value: Tensor) -> Tensor:
    return value / VALUE_DIVISOR


def multiplied(value: Tensor) -> Tensor:
    return value * VALUE_DIVISOR


def recognise(path: Path) -> bool:
    """By config.json."""
    return is_rwkv6_folder(path, ARCHITECTURE, "num_heads")


def read(path: Path) -> Mapping[str, Tensor]:
    """A folder's tensors, memory-mapped."""
    theirs = read_folder(path)
    return from_form(theirs, entries(n_layer_of(theirs, "model.layers.")), path)


def write(weights: Mapping[str, Tensor], path: Path, settings: Settings) -> None:
    """Write a folder."""
    sizes = ModelConfig.from_weights(layout_of(weights))
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "rwkv6",
        "attn_mode": "chunk",
        "expand_k": 1.0,
        "expand_v": 1.0,
        "gate_low_rank_dim": sizes.dim_decay_lora,
        "hidden_act": "sqrelu",
        "hidden_ratio": None,
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.dim_ffn,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "norm_first": True,
        "num_heads": sizes.n_head,
        "num_hidden_layers": sizes.n_layer,
        "proj_low_rank_dim": sizes.dim_mix_lora,
        "vocab_size": sizes.vocab_size,
    }
    write_folder(to_form(weights, entries(sizes.n_layer)), path, config, settings)


FORM = Form(
    name="fla",
    title="a Hugging Face folder (flash-linear-attention)",
    dtypes=tuple(DTYPES),
    recognise=recognise,
    read=read,
    write=write,
)
