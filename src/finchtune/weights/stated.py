"""What an adapter file without a record leaves open, and the user has to state.

Tensors show the rank, but not by how much a product is scaled, from which side Bat multiplies, or
whether the base was quantised. None of this is guessed.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.adapters import METHODS, hyperparameters_of
from finchtune.errors import CheckpointError

FLAGS = {
    "method": "`method` NAME",
    "alpha": "`lora_alpha` NUMBER",
    "rslora": "`rslora` 0 or 1",
    "mode": "`bat_mode` row or col",
    "quant": "`quant` none or its form",
}
"""What has to be stated -> the flag for it."""
SHAPES = {
    "bone": lambda t: {"r": t.shape[0 if t.dim() == 2 else 1]},
    "lora_A": lambda t: {"r": t.shape[0]},
    "shard": lambda t: {"r1": t.shape[0], "r2": t.shape[1]},
}
"""A tensor of an adapter -> the hyperparameters that its shape tells."""
ALIKE = {"biglora"}  # methods that compute what another does


@cache
def tensor_names(method: str) -> frozenset[str]:
    """The names of a method's tensors of one layer."""
    with torch.device("meta"):
        return frozenset(METHODS[method](4096, 4096).state_dict())


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor of each kind that adapters hold, by its name in its layer."""
    own = frozenset().union(*map(tensor_names, METHODS))
    kinds = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    return {kind: tensor for kind, tensor in kinds.items() if kind in own}


def possible_methods(tensors: Mapping[str, Tensor]) -> list[str]:
    """The methods that an adapter file's tensors may be of."""
    kinds = adapter_tensors(tensors)
    if "bone" in kinds:
        return ["bat" if kinds["bone"].dim() == 3 else "bone"]
    return [m for m in METHODS if tensor_names(m) == kinds.keys() and m not in ALIKE]


def stated_spec(
    tensors: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    adapter: str | Path,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Method and hyperparameters of a file without a record; {} if it holds no adapter.

    `stated` holds what the user says of it, by the names in FLAGS, and `defaults` what is taken
    where the method has such a setting. Raises UserError that names the flags for what is still
    open, or for what the tensors or the method contradict.
    """
    kinds = adapter_tensors(tensors)
    if not kinds:
        return {}
    methods = possible_methods(tensors)
    if stated.get("method", methods[0] if methods else None) not in methods:
        names = " or ".join(methods) or "those of no method"
        raise CheckpointError(f"{adapter}: its tensors ({', '.join(sorted(kinds))}) are {names}")
    method = stated.get("method") or (defaults or {}).get("method")
    if method in methods:
        methods = [method]
    wanted = asked(methods)
    for key in stated.keys() - wanted - {"method"}:
        raise CheckpointError(
            f"{FLAGS[key].split()[0]} is no setting of {' or '.join(methods)}, which {adapter} "
            "holds; drop it"
        )
    stated = {key: v for key, v in (defaults or {}).items() if key in wanted} | dict(stated)
    known = {"method": methods[0]} if len(methods) == 1 else {}
    missing = [key for key in FLAGS if key in wanted and key not in stated]
    if missing:
        flags = [f"`method` {'|'.join(methods)}" if k == "method" else FLAGS[k] for k in missing]
        raise CheckpointError(
            f"{adapter} carries no record of how it was trained, and its tensors do not tell "
            f"{', '.join(missing)}; give {' '.join(flags)}, as in training"
        )
    settings = {**known, **shapes_of(tensors), **stated}
    if settings["quant"] == "none":
        del settings["quant"]
    return settings


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The hyperparameters that an adapter's tensors tell. UserError for tensors of odd shapes."""
    found: dict[str, Any] = {}
    for kind, tensor in adapter_tensors(tensors).items():
        try:
            found |= SHAPES[kind](tensor) if kind in SHAPES else {}
        except IndexError as error:
            raise CheckpointError(f"{kind} is {list(tensor.shape)}, which no method has") from error
    return found


def asked(methods: list[str]) -> set[str]:
    """What has to be stated for a file of one of these methods."""
    open_ones = {"quant"} | ({"method"} if len(methods) > 1 else set())
    for method in methods:
        open_ones |= set(hyperparameters_of(METHODS[method])) & set(FLAGS)
    return open_ones


def spec_of(
    record: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    adapter: str | Path,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Method and hyperparameters of an adapter file, by its record or else as the user states them.

    `defaults` as in `stated_spec`. Raises UserError where neither tells, or where the two
    contradict each other.
    """
    if record is None:
        return stated_spec(tensors, stated, adapter, defaults)
    recorded = {"method": "none", "quant": "none", **record["adapter"]}
    for key, value in stated.items():
        flag = FLAGS[key].split()[0]
        if key not in recorded:
            raise CheckpointError(
                f"{flag} is no setting of {recorded['method']}, which {adapter} holds; drop it"
            )
        if recorded[key] != value:
            raise CheckpointError(f"{flag} {value}: the record of {adapter} says {recorded[key]}")
    return record["adapter"]
