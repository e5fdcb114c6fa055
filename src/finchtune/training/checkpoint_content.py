"""Whether a checkpoint, whose checksums are right, is one that a run has written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.models import LanguageModel
from finchtune.training.engine import MOMENTS
from finchtune.weights.tensors import FLOATS, is_finite

MANIFEST = {
    **dict.fromkeys(("step", "optimizer_step", "global_batch"), int),
    **dict.fromkeys(("config", "data", "base"), dict),
    **dict.fromkeys(("content", "dtype"), str),
    "data_changes": list,
    "validation": list,
}


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raise UserError unless a manifest holds what resuming reads of it."""
    problems = [f"{key} is {manifest.get(key)!r:.40}" for key, kind in MANIFEST.items()
                if type(manifest.get(key)) is not kind]  # fmt: skip
    if not problems and not isinstance(manifest["base"].get("sha256"), str):
        problems.append("base has no sha256")
    if not problems and not all(map(is_validation, manifest["validation"])):
        problems.append("validation has no steps and losses")
    if problems:
        raise refusal(path, f"its manifest makes no sense: {problems[0]}")


def is_validation(entry: Any) -> bool:
    """Whether an entry is a step and the loss after it."""
    pair = isinstance(entry, list) and len(entry) == 2
    return pair and type(entry[0]) is int and isinstance(entry[1], int | float)


def check_state(state: dict[str, Any], model: LanguageModel, path: Path) -> None:
    """Raise UserError unless a state is one of just these trained parameters, whole and finite."""
    named = model.named_parameters()
    trained = {name: tuple(p.shape) for name, p in named if p.requires_grad}
    found = state.get("trained", {})
    if isinstance(found, dict) and set(found) != set(trained):
        raise CheckpointError(f"`resume` {path}: it trains other parameters than this run")
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for part, shapes in {"trained": trained, **dict.fromkeys(MOMENTS, trained)}.items():
        for problem in problems_of(state.get(part), shapes):
            raise refusal(path, f"{part} {problem}")
    frozen = state.get("frozen")
    known = {n: s for n, s in own.items() if isinstance(frozen, dict) and n in frozen}
    for problem in problems_of(frozen, known):
        raise refusal(path, f"frozen {problem}")
    scale = state.get("loss_scale", {})
    if not isinstance(scale, dict) or not all(map(is_setting, scale.values())):
        raise refusal(path, "its loss scale makes no sense")


def is_setting(value: Any) -> bool:
    """Whether it is what DeepSpeed's loss scaler has as an attribute."""
    return value is None or isinstance(value, int | float | torch.dtype)


def problems_of(tensors: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """What keeps tensors from being finite ones of these shapes."""
    if not isinstance(tensors, dict) or set(tensors) != set(shapes):
        yield "does not hold just the tensors that it should"
        return
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            yield f"of {name} is no tensor"
        elif tensor.dtype not in FLOATS or tuple(tensor.shape) != shapes[name]:
            kind = f"{list(tensor.shape)} of {tensor.dtype}"
            yield f"of {name} is {kind}, not {list(shapes[name])}; is it the same base?"
        elif not is_finite(tensor):
            yield f"of {name} holds NaN or infinity"


def refusal(path: Path, problem: str) -> CheckpointError:
    """What to say of a checkpoint that no run has written."""
    return CheckpointError(f"`resume` {path}: {problem}; use an earlier checkpoint")
