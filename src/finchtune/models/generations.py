"""The generations of models: which there are, and which one a weight file holds."""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import UserError
from finchtune.models.config import ModelSizes
from finchtune.models.language_model import LanguageModel
from finchtune.models.layouts import Layout


@dataclass(frozen=True)
class Generation:
    """One generation of models. Each folder beside this file defines its own as GENERATION."""

    name: str
    """As in --my_testing, e.g. x060."""
    number: int
    """As in RWKV-6."""
    model: Callable[[Any, int], LanguageModel]
    """Its class: (sizes, grad_checkpoint) -> a model of uninitialised memory."""
    sizes: type[ModelSizes]
    init_weights: Callable[..., LanguageModel]
    """(model, seed=None): sets every tensor for training from scratch."""
    recognised_by: str
    """A pattern that matches a key of each of its weight files, and of no other generation's."""
    stored_flat: str
    """Pattern of the keys of vectors (1, 1, C) that some files store as (C)."""
    released: dict[str, ModelSizes]
    """Sizes of the released models by their names, e.g. 3B."""
    layouts: dict[str, Layout]
    """How forms of other software lay it out, by the names of the forms."""
    unread: str = r"$^"
    """Pattern of the keys of tensors that some files hold and no model reads."""

    def tensor_names(self, n_layer: int) -> list[str]:
        """Every tensor of a plain model, in the order of its file."""
        sizes = self.sizes(n_layer=n_layer, n_embd=64, vocab_size=1, dim_ffn=1)
        return list(meta_model(sizes).state_dict())


@functools.cache
def generations() -> dict[str, Generation]:
    """Every generation by its name, the oldest first."""
    package = importlib.import_module("finchtune.models")
    folders = [info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg]
    found: list[Generation] = [
        importlib.import_module(f"finchtune.models.{folder}").GENERATION for folder in folders
    ]
    return {one.name: one for one in sorted(found, key=lambda one: one.number)}


def by_number() -> dict[int, Generation]:
    """Every generation by its number, the oldest first."""
    return {one.number: one for one in generations().values()}


def generation_of(weights: Mapping[str, Any]) -> Generation:
    """The generation of a weight file, by its keys. Raises UserError if there is none."""
    for generation in generations().values():
        if any(re.search(generation.recognised_by, key) for key in weights):
            return generation
    known = ", ".join(f"RWKV-{one.number} ({one.name})" for one in generations().values())
    raise UserError(f"not a weight file of {known}; its first keys are {list(weights)[:3]}")


def standard_form(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, vectors that are stored flat viewed as (1, 1, C)."""
    flat = re.compile(generation_of(weights).stored_flat)
    return {
        name: tensor.view(1, 1, -1) if tensor.dim() == 1 and flat.search(name) else tensor
        for name, tensor in weights.items()
    }


def sizes_of(weights: Mapping[str, Tensor]) -> ModelSizes:
    """The sizes of the model in a weight file. Raises UserError if they cannot be read off."""
    layers = {match[1] for name in weights if (match := re.match(r"blocks\.([^.]*)\.", name))}
    odd = sorted(layers - {str(number) for number in range(len(layers))})
    if odd:
        raise UserError(
            f"has {len(layers)} layers, one of them numbered {odd[0][:20]!r}; they must be "
            "numbered from 0 without a gap"
        )
    return generation_of(weights).sizes.from_weights(weights)


def generation_of_sizes(sizes: ModelSizes) -> Generation:
    """The generation whose sizes these are."""
    return next(one for one in generations().values() if one.sizes is type(sizes))


def meta_model(sizes: ModelSizes, grad_checkpoint: int = 0) -> LanguageModel:
    """A model of these sizes on the meta device: shapes without memory."""
    with torch.device("meta"):
        return generation_of_sizes(sizes).model(sizes, grad_checkpoint)


def released_sizes() -> dict[str, ModelSizes]:
    """Sizes of all released models by name; a name that two generations share is the newer's."""
    return {name: sizes for one in generations().values() for name, sizes in one.released.items()}
