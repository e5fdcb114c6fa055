"""RWKV-7 in the forms of other software."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models.layouts import (
    Entry,
    Layout,
    Told,
    fla_entries,
    fla_told,
    flat,
    norms,
    reshaped,
    swapped,
)
from finchtune.models.rwkv7.config import ModelConfig
from finchtune.models.rwkv7.model import MIXED

LOW_RANK = re.compile(r"\.att\.[wavg][12]$")
FLA_HEAD_SIZE = 64
"""At which fla's norm over heads has the eps of the official one: 1e-5 times the head size."""


def web_rwkv_entries(told: Told) -> list[Entry]:
    """Source: cryscan/web-rwkv, assets/scripts/convert_safetensors.py and src/runtime/v7.rs."""
    return [swapped(n, n) if LOW_RANK.search(n) else Entry(n, (n,)) for n in told.names]


def is_web_rwkv(shapes: Mapping[str, Sequence[int]]) -> bool:
    """By the low-rank matrices, which the official form has the other way round."""
    (*_, C) = shapes.get("blocks.0.ln1.weight") or [0]
    first = [tuple(shapes.get(f"blocks.0.att.{name}1", ())) for name in "wag"]
    return "blocks.0.att.r_k" in shapes and any(
        len(shape) == 2 and shape[1] == C != shape[0] for shape in first
    )


def rwkv_cpp_entries(told: Told) -> list[Entry]:
    """Source: RWKV/rwkv.cpp, python/convert_pytorch_to_ggml.py."""
    found = [blends_entry(f"blocks.{i}.att.x_rwkvag", i, (1,)) for i in range(told.n_layer)]
    rest = [name for name in told.names if ".att.x_" not in name]
    return found + [swapped(n, n) if LOW_RANK.search(n) else Entry(n, (n,)) for n in rest]


def blends_entry(name: str, layer: int, between: tuple[int, ...]) -> Entry:
    """The six blends of a time mix as one tensor (6, *between, C)."""

    def make(ours: Sequence[Tensor]) -> Tensor:
        return torch.stack([blend.reshape(*between, -1) for blend in ours])

    def split(theirs: Tensor) -> Sequence[Tensor]:
        return theirs.view(len(MIXED), 1, 1, -1).unbind()

    return Entry(name, tuple(f"blocks.{layer}.att.x_{mixed}" for mixed in MIXED), make, split)


def gguf_entries(told: Told) -> list[Entry]:
    """As llama.cpp's own converter (conversion/rwkv.py, Rwkv7Model) makes them."""
    found = [Entry("token_embd.weight", ("emb.weight",)), Entry("output.weight", ("head.weight",))]
    found += norms({"token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out"})
    # The runtime wants the first block to mix values, reads no more than the names, and is given
    # other matrices of that block.
    found += low_rank_entries("blk.0.time_mix_v", "blocks.0.att.a")
    for layer in range(told.n_layer):
        found += gguf_layer(layer, told.head_size)
    return found


def low_rank_entries(theirs: str, ours: str) -> list[Entry]:
    """The two matrices and the vector of a low-rank part."""
    matrices = [swapped(f"{theirs}{i}.weight", f"{ours}{i}") for i in (1, 2)]
    return [*matrices, flat(f"{theirs}0.weight", f"{ours}0")]


def gguf_layer(layer: int, head_size: int) -> list[Entry]:
    """The tensors of one layer."""
    own, b = f"blocks.{layer}", f"blk.{layer}"
    a, f, mix = f"{own}.att", f"{own}.ffn", f"{b}.time_mix"
    found = norms({f"{b}.attn_norm": f"{own}.ln1", f"{b}.attn_norm_2": f"{own}.ln2"})
    found += norms({f"{mix}_ln": f"{a}.ln_x"})
    found.append(blends_entry(f"{mix}_lerp_fused.weight", layer, (1, 1)))
    for part in "wav" if layer else "wa":
        found += low_rank_entries(f"{mix}_{part}", f"{a}.{part}")
    found += [swapped(f"{mix}_g{i}.weight", f"{a}.g{i}") for i in (1, 2)]
    found += [flat(f"{mix}_{name}.weight", f"{a}.{name}") for name in ("k_k", "k_a")]
    found.append(
        reshaped(f"{mix}_r_k.weight", f"{a}.r_k", torch.ravel, lambda t: t.view(-1, head_size))
    )
    for name in ("receptance", "key", "value", "output"):
        found.append(Entry(f"{mix}_{name}.weight", (f"{a}.{name}.weight",)))
    found.append(flat(f"{b}.channel_mix_lerp_k.weight", f"{f}.x_k"))
    for name in ("key", "value"):
        found.append(Entry(f"{b}.channel_mix_{name}.weight", (f"{f}.{name}.weight",)))
    return found


def gguf_told(sizes: ModelConfig) -> dict[str, Any]:
    """The sizes that llama.cpp's loader reads (src/models/rwkv7.cpp), beside every model's."""
    return {
        "wkv.head_size": sizes.head_size,
        "attention.decay_lora_rank": sizes.dim_decay_lora,
        "attention.iclr_lora_rank": sizes.dim_rate_lora,
        "attention.value_residual_mix_lora_rank": sizes.dim_value_lora,
        "attention.gate_lora_rank": sizes.dim_gate_lora,
    }


def fla_layer(layer: int) -> list[Entry]:
    """The tensors of one layer, besides its norms. Source: fla 0.6, fla/layers/rwkv7.py."""
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    a, t, f = f"{ours}.att", f"{theirs}.attn", f"{theirs}.ffn"
    found = [Entry(f"{t}.x_{mixed}", (f"{a}.x_{mixed}",)) for mixed in MIXED]
    found += [flat(f"{t}.{name}", f"{a}.{name}") for name in ("k_k", "k_a")]
    found.append(Entry(f"{t}.r_k", (f"{a}.r_k",)))
    for part in "wavg" if layer else "wag":
        low = f"{t}.{part}_lora.lora"
        found += [swapped(f"{low}.{2 * i}.weight", f"{a}.{part}{i + 1}") for i in (0, 1)]
        found += [flat(f"{low}.2.bias", f"{a}.{part}0")] if part != "g" else []
    for name, own in (("r", "receptance"), ("k", "key"), ("v", "value"), ("o", "output")):
        found.append(Entry(f"{t}.{name}_proj.weight", (f"{a}.{own}.weight",)))
    found.append(flat(f"{f}.x_k", f"{ours}.ffn.x_k"))
    return found + [Entry(f"{f}.{n}.weight", (f"{ours}.ffn.{n}.weight",)) for n in ("key", "value")]


def fla_config(sizes: ModelConfig) -> dict[str, Any]:
    """config.json."""
    return fla_told(sizes) | {
        "decay_low_rank_dim": sizes.dim_decay_lora,
        "a_low_rank_dim": sizes.dim_rate_lora,
        "v_low_rank_dim": sizes.dim_value_lora,
        "gate_low_rank_dim": sizes.dim_gate_lora,
        "head_dim": sizes.head_size,
    }


def fla_check(sizes: ModelConfig) -> None:
    """The norm over heads has an eps that grows with the head size there."""
    if sizes.head_size != FLA_HEAD_SIZE:
        raise CheckpointError(
            f"flash-linear-attention's RWKV-7 computes the same for a head size of {FLA_HEAD_SIZE} "
            f"alone, and the model has {sizes.head_size}; export it to another form"
        )


LAYOUTS = {
    "fla": Layout(
        partial(fla_entries, of_layer=fla_layer),
        name="RWKV7ForCausalLM",
        mark="head_dim",
        told=fla_config,
        check=fla_check,
    ),
    "gguf": Layout(
        gguf_entries,
        name="rwkv7",
        told=gguf_told,
        precise=r"norm|lerp|time_mix_(ln|[wavg][012])",
    ),
    "rwkv.cpp": Layout(
        rwkv_cpp_entries,
        recognise=lambda shapes: "blocks.0.att.x_rwkvag" in shapes,
        precise=r"\.(k_k|k_a|r_k|x_rwkvag|x_k|[wav]0)$",
    ),
    "web-rwkv": Layout(web_rwkv_entries, recognise=is_web_rwkv),
}
