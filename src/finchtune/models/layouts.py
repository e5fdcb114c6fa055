"""How other software names a generation's tensors, and lays them out in its files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finchtune.models.config import ModelSizes

RESCALE = 6
"""Every so many layers some runtimes halve the hidden states, so that fp16 does not overflow."""


@dataclass(frozen=True)
class Entry:
    """A tensor of another form, and the official ones that it is made of.

    `make` takes theirs from ours, `split` is its inverse. Both take meta tensors and give views
    where they can.
    """

    name: str
    ours: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor] = lambda ours: ours[0]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda theirs: [theirs]


def reshaped(name: str, ours: str, make: Callable[..., Any], split: Callable[..., Any]) -> Entry:
    """An entry for one tensor that is laid out otherwise."""
    return Entry(name, (ours,), lambda tensors: make(tensors[0]), lambda theirs: [split(theirs)])


def swapped(name: str, ours: str) -> Entry:
    """An entry for a tensor whose last two dimensions are exchanged."""
    return reshaped(name, ours, lambda t: t.transpose(-1, -2), lambda t: t.transpose(-1, -2))


def flat(name: str, ours: str) -> Entry:
    """An entry for a vector (1, 1, C) that is stored as (C)."""
    return reshaped(name, ours, torch.ravel, lambda t: t.reshape(1, 1, -1))


def norms(pairs: Mapping[str, str]) -> list[Entry]:
    """Entries for the weights and biases of norms, their name -> ours."""
    return [
        Entry(f"{theirs}.{part}", (f"{ours}.{part}",))
        for theirs, ours in pairs.items()
        for part in ("weight", "bias")
    ]


class Told(NamedTuple):
    """What must be known of a model before its tensors can be named."""

    n_layer: int
    names: Sequence[str]
    """Of the tensors, as in an official file."""
    head_size: int = 1  # counts only where a form is written
    rescale: int = RESCALE


def fla_entries(told: Told, of_layer: Callable[[int], list[Entry]]) -> list[Entry]:
    """All tensors of fla's form, `of_layer` those of a layer besides its norms."""
    found = [Entry("model.embeddings.weight", ("emb.weight",))]
    for layer in range(told.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        pairs = {"attn_norm": "ln1", "ffn_norm": "ln2", "attn.g_norm": "att.ln_x"}
        pairs |= {"pre_norm": "ln0"} if layer == 0 else {}
        found += norms({f"{theirs}.{norm}": f"{ours}.{own}" for norm, own in pairs.items()})
        found += of_layer(layer)
    return [*found, *norms({"model.norm": "ln_out"}), Entry("lm_head.weight", ("head.weight",))]


def fla_told(sizes: ModelSizes) -> dict[str, Any]:
    """What config.json of fla's form says of every generation."""
    return {
        "attn_mode": "chunk",
        "hidden_act": "sqrelu",
        "hidden_ratio": None,
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.dim_ffn,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "norm_first": True,
        "num_heads": sizes.n_head,
        "num_hidden_layers": sizes.n_layer,
        "vocab_size": sizes.vocab_size,
    }


class Naming(NamedTuple):
    """Names of modules and tensors in a form, where every one of ours is one of theirs."""

    theirs: Callable[[str], str]
    """(our name) -> theirs."""
    ours: Callable[[str], str]
    """The inverse; raises UserError for a name of another form."""


@dataclass(frozen=True)
class Layout:
    """A generation in one form of weights, for example in GGUF."""

    entries: Callable[[Told], list[Entry]]
    name: str = ""
    """What files of this form call the generation: an architecture, or a class."""
    mark: str = ""
    """A key of the config.json of such a folder, and of no other form's of this generation."""
    recognise: Callable[[Mapping[str, Sequence[int]]], bool] = lambda shapes: False
    """Whether a file's tensors, by the names in this form, are of this generation."""
    told: Callable[[Any], dict[str, Any]] = lambda sizes: {}
    """What such a file says of the model's sizes."""
    check: Callable[[Any], None] = lambda sizes: None
    """Raises UserError for sizes that this form cannot have."""
    naming: Naming | None = None
    precise: str = r"$^"
    """Pattern of the names of tensors, besides vectors, that stay in fp32."""
