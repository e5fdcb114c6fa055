"""Starting a run from an adapter file: the flags must ask for what the file holds."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from finchtune import distributed
from finchtune.adapters import adapted_layers, get_method, hyperparameters_of, targets_of
from finchtune.adapters.state import is_adapter_tensor
from finchtune.config import TrainConfig
from finchtune.errors import UserError
from finchtune.methods import method_files
from finchtune.models import INITIAL_STATE, LanguageModel
from finchtune.weights.adapter_files import (
    adapter_keys,
    adapter_record,
    check_base,
    load_adapter,
    read_adapter,
)
from finchtune.weights.stated import possible_methods, shapes_of

PARTS = ("time", "ln", "emb", "head")  # words that --train_parts takes in RWKV-PEFT's scripts
FREE_HYPERPARAMETERS = {"targets", "dropout", "svd_niter", "gamma"}
"""Hyperparameters that may differ from those in the file: they do not change what it computes."""


def start_from_file(model: LanguageModel, config: TrainConfig) -> None:
    """Fill an adapted model's trained tensors from --peft_load. A collective call.

    Raises UserError, saying which flags to give, unless method, hyperparameters, trained
    parameters and base are those of the file.
    """
    path, initial = config.peft_load, config.pissa_init or None
    tensors, record = read_adapter(path, initial), adapter_record(path)
    if record:
        distributed.run_on_rank_zero(lambda: check_base(record, config.load_model, path))
    found = record["adapter"] if record else told_by_tensors(tensors, config.peft)
    if config.adapter != "none":
        check_method(config, found)
        check_places(model, set(tensors), path)
    elif found:
        method = found["method"]
        raise UserError(
            f"`peft_load` {path} holds an adapter of {method}; give `peft` {method}, and "
            "`train_type` state to train states beside it"
        )
    check_parts(model, set(tensors), path)
    load_adapter(model, path, initial)


def told_by_tensors(tensors: Mapping[str, Tensor], wanted: str) -> dict[str, Any]:
    """What the tensors of a file without a record tell; {} if it holds no adapter.

    The `wanted` method is taken where its tensors would be the same, and what no tensor tells is
    as the flags say, but for Bat: files without a record are other software's, whose Bat is row.
    """
    methods = possible_methods(tensors)
    if not methods:
        return {}
    method = wanted if wanted in methods else methods[0]
    return {"method": method, **shapes_of(tensors), **({"mode": "row"} if method == "bat" else {})}


def check_method(config: TrainConfig, found: dict[str, Any]) -> None:
    """Raise UserError unless the flags ask for the method and hyperparameters of the file."""
    path, defaults = config.peft_load, hyperparameters_of(get_method(config.peft))
    wanted = {"method": config.peft, **defaults, **config.adapter_hyperparameters}
    if not found:
        raise UserError(f"`peft_load` {path} holds no adapter; give merged weights as `load_model`")
    if config.peft == "pissa" and found["method"] == "lora" and not config.pissa_init:
        raise UserError(
            f"`peft_load` {path} holds no initial A and B, which PiSSA subtracts; give the file "
            "that holds them (init_pissa.pth) as `pissa_init`"
        )
    if any(wanted.get(key) != found[key] for key in found if key not in FREE_HYPERPARAMETERS):
        kind = found["method"]
        flags = {own.hyperparameter: flag for flag, own in method_files()[kind].flags.items()}
        flags |= {"method": "peft", "quant": "quant"}
        needed = " ".join(
            f"`{flags[key]}` {value}"
            for key, value in found.items()
            if key in flags and key not in FREE_HYPERPARAMETERS
        )
        raise UserError(f"`peft_load` {path} was trained otherwise; give {needed}")


def check_places(model: LanguageModel, found: set[str], path: str) -> None:
    """Raise UserError unless --target chooses the linears that have adapters in the file."""
    there = {key.rpartition(".")[0] for key in found - set(model.state_dict())}
    if targets_of(there) != targets_of(adapted_layers(model)):
        needed = " ".join(targets_of(there))
        raise UserError(
            f"`peft_load` {path} has adapters on other linears; "
            + (f"give `target` {needed}" if needed else "drop `target`: it has them on all")
        )


def check_parts(model: LanguageModel, found: set[str], path: str) -> None:
    """Raise UserError unless the flags train the tensors that the file holds beside adapters.

    Adapter tensors are left to `load_adapter`.
    """
    base = {name for name in model.state_dict() if not is_adapter_tensor(name)}
    wanted = set(adapter_keys(model).values()) & base
    states = {name for name in found if name.endswith(INITIAL_STATE)}
    if states and not model.initial_states():
        raise UserError(
            f"`peft_load` {path} also holds {len(states)} trained states; give `train_type` state "
            "to continue training them"
        )
    if model.initial_states() and not states:
        raise UserError(
            f"`peft_load` {path} holds no trained states; drop `train_type` state or `peft` state"
        )
    extra = sorted((found & base) - wanted)
    if extra:
        parts = [part for part in PARTS if any(part in name for name in extra)]
        words = " ".join(parts) if parts else " ".join(extra)
        raise UserError(
            f"`peft_load` {path} also holds {len(extra)} trained tensors of the model, such as "
            f"{extra[0]}; give `train_parts` {words} to continue training them"
        )
    missing = sorted(wanted - found)
    if missing:
        raise UserError(
            f"`peft_load` {path} does not hold {missing[0]} ({len(missing)} such tensors), which "
            "`train_parts` trains; drop what the file lacks from `train_parts`"
        )
