"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from finchtune.adapters.state import adapter_tensor, is_adapter_tensor
from finchtune.models import INITIAL_STATE

WSD_DECAY = 0.2  # share of the steps that warmup-stable-decay spends decaying


def lr_factor(schedule: str, progress: float, ratio: float) -> float:
    """Learning rate at `progress` in [0, 1], as a multiple of lr_init; `ratio` = lr_final/lr_init.

    All schedules start at 1 and end at `ratio`; `constant` stays at 1.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 + (ratio - 1) * progress
    if schedule == "cos":
        return ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "exp":
        return ratio**progress
    assert schedule == "wsd", schedule
    return 1 + (ratio - 1) * max(0.0, progress - (1 - WSD_DECAY)) / WSD_DECAY


def learning_rate(
    step: int, total: int, lr_init: float, lr_final: float, schedule: str, warmup: int
) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total`.

    During warm-up lr_init is multiplied by 0.01 + 0.99 step/warmup; the schedule covers the rest,
    its first step at lr_init and its last at lr_final.
    """
    if step < warmup:
        return lr_init * (0.01 + 0.99 * step / warmup)
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return lr_init * lr_factor(schedule, min(1.0, progress), lr_final / lr_init)


def is_decayed(name: str, parameter: nn.Parameter, decay_adapters: bool) -> bool:
    """Whether weight decay acts on a parameter: matrices other than the embedding."""
    if is_adapter_tensor(name):
        return decay_adapters
    return name.endswith(".weight") and parameter.squeeze().dim() >= 2 and name != "emb.weight"


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float = 0.0,
    decay_adapters: bool = False,
    doubled_lr: str = "",
    lora_plus_ratio: float = 1.0,
    state_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters; each stands in exactly one.

    A group's `lr_scale` multiplies the learning rate: 2 where a name ends with `doubled_lr`,
    `lora_plus_ratio` for LoRA's B (LoRA+, arXiv 2402.12354), `state_ratio` for initial states.
    """
    trainable = [(name, p) for name, p in named if p.requires_grad]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in trainable:
        scale = 2.0 if doubled_lr and name.endswith(doubled_lr) else 1.0
        scale = lora_plus_ratio if adapter_tensor(name) == "lora_B" else scale
        scale = state_ratio if name.endswith(INITIAL_STATE) else scale
        decay = weight_decay if is_decayed(name, p, decay_adapters) else 0.0
        empty: dict[str, Any] = {"params": [], "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((scale, decay), empty)["params"].append(p)
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(trainable)
    return list(groups.values())


class AdamW(torch.optim.AdamW):
    """torch's, without the decorators that import torch's compiler, which takes a second."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> AdamW:
    """AdamW over `groups`, fused where the parameters' device has a fused form."""
    device = groups[0]["params"][0].device.type
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=device in ("cuda", "cpu"))


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Give every group its share of `lr`."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
