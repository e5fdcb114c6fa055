"""--compat rwkv-peft: its meanings and defaults for the flags that it shares with us."""

import math
from typing import Any

from finchtune.config import TrainConfig
from finchtune.errors import UserError

COMPAT = ("rwkv-peft",)
DEFAULTS: dict[str, Any] = {
    "ctx_len": 1024,
    "epoch_steps": 1000,
    "epoch_count": 500,
    "epoch_save": 5,
    "micro_bsz": 12,
    "lr_init": 6e-4,
    "lr_final": 1e-5,
    "grad_cp": 0,
    "layerwise_lr": True,
    "l2wrap": 1e-4,
    "loss_mean": "micro_batches",
}
"""What it takes where a flag is not given; the last two it has no flag for."""
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 8, "lora_alpha": 32.0, "lora_dropout": 0.01},
    "pissa": {"pissa_r": 8},
}
CHUNKS = {"chunk_ctx": 512, "bptt": "truncated"}
PARTS = ["time", "ln"]
WSD_WARMUP = 100
REASONS = {
    "epoch_steps": "there micro batches of all devices, not optimizer steps",
    "train_parts": "trained beside an adapter",
    "lr_schedule": "its wsd is a warm-up and a cosine to zero",
    "warmup_steps": "its cos has no warm-up; its wsd has at least 1 step, 100 if none is given",
    "loss_mean": "over each micro batch's own tokens, then over micro batches",
    "template": "the prompt of its --data_type sft, and the end of its answers",
    "loss_mask": "its --data_type sft never trains the prompt",
    "bptt": "there a chunk's gradient ends at its first token",
    "decay_adapters": "its weight decay acts on every matrix that is trained",
}
"""Flag -> what is behind the difference, where the value does not say it."""


def as_rwkv_peft(values: dict[str, Any]) -> dict[str, Any]:
    """The values of given flags -> those that say here what the former say in RWKV-PEFT.

    Raises UserError for what has no such meaning.
    """
    method = values.get("peft", "none")
    found = DEFAULTS | METHOD_DEFAULTS.get(method, {}) | values
    if "infctx" in values.get("train_type", ()):
        found = CHUNKS | found
    if method not in ("none", "state"):
        found.setdefault("train_parts", PARTS)
        if found.get("weight_decay"):
            found.setdefault("decay_adapters", True)
    if found.get("sft_field"):
        found = {"template": "rwkv-peft"} | found | {"loss_mask": "qa"}
    return found | learning_rates(found) | {"epoch_steps": optimizer_steps(found)}


def learning_rates(values: dict[str, Any]) -> dict[str, Any]:
    """Schedule, last learning rate and warm-up."""
    schedule = values.get("lr_schedule", "cos")
    if values["lr_final"] == values["lr_init"]:
        return {"warmup_steps": 0, "lr_schedule": "cos"}
    if schedule == "wsd":
        warmup = values.get("warmup_steps", 0) or WSD_WARMUP
        return {"lr_schedule": "cos", "lr_final": 0.0, "warmup_steps": warmup}
    return {"warmup_steps": 0} if schedule == "cos" else {}


def optimizer_steps(values: dict[str, Any]) -> int:
    """Optimizer steps of an epoch of --epoch_steps micro batches, counted over all devices."""
    if values.get("global_bsz"):
        raise UserError(
            "--global_bsz is not RWKV-PEFT's; with --compat give --accumulate_grad_batches"
        )
    devices = values.get("devices", 1) * values.get("num_nodes", 1)
    batches = values["epoch_steps"] // max(1, devices)
    if values["epoch_steps"] and not batches:
        raise UserError(
            f"--epoch_steps {values['epoch_steps']} are fewer micro batches than the {devices} "
            "devices, so that an epoch has no step; raise it"
        )
    return math.ceil(batches / max(1, values.get("accumulate_grad_batches", 1)))


def differences(config: TrainConfig, values: dict[str, Any]) -> list[str]:
    """A line for each flag whose value is another than RWKV-PEFT would take it for."""
    theirs = TrainConfig(**as_rwkv_peft(values))
    lines = []
    for name, other in vars(theirs).items():
        if (mine := getattr(config, name)) != other:
            reason = f" ({REASONS[name]})" if name in REASONS else ""
            lines.append(f"--{name} {shown(mine)}, there {shown(other)}{reason}")
    return lines


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, list):
        return " ".join(value) or "[]"
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
