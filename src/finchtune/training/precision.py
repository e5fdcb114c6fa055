"""The dtype that a run holds its weights in."""

import torch

from finchtune.config import TrainConfig
from finchtune.errors import UserError

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


def choose_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype that weights are held in. Sets TF32 matrix products where asked for."""
    on_gpu = device.type == "cuda"
    name = config.precision or ("bf16" if on_gpu else "fp32")
    if name in ("fp16", "tf32") and not on_gpu:
        raise UserError(f"--precision {name} needs a GPU; use bf16 or fp32 on a CPU")
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    return DTYPES[name]


def planned_precision(config: TrainConfig) -> tuple[torch.dtype, str]:
    """The dtype of the weights, and the kind of device, "cuda" or "cpu"."""
    on_gpu = config.accelerator == "gpu" or (
        config.accelerator == "auto" and torch.cuda.is_available()
    )
    return DTYPES[config.precision or ("bf16" if on_gpu else "fp32")], "cuda" if on_gpu else "cpu"
