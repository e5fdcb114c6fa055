"""Where a run computes, what it cannot do there, and the dtype that it holds its weights in."""

import torch

from finchtune.adapters.fp8 import check_fp8_device
from finchtune.adapters.quantise import BY_ROW
from finchtune.config import TrainConfig
from finchtune.errors import UserError
from finchtune.models.graphed_blocks import check_graphs_device

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}


def device_type(config: TrainConfig) -> str:
    """ "cuda" or "cpu": what --accelerator asks for."""
    on_gpu = config.accelerator == "gpu" or (
        config.accelerator == "auto" and torch.cuda.is_available()
    )
    return "cuda" if on_gpu else "cpu"


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError for flags that the device cannot follow.

    A GPU that is planned for on a machine without one is taken for one that can.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        return
    if config.quant == BY_ROW:
        check_fp8_device(device)
    if config.cuda_graphs:
        check_graphs_device(device)


def choose_precision(config: TrainConfig, device_type: str) -> torch.dtype:
    """The dtype that weights are held in. Raises UserError for one that the device has not."""
    on_gpu = device_type == "cuda"
    name = config.precision or ("bf16" if on_gpu else "fp32")
    if name in ("fp16", "tf32") and not on_gpu:
        raise UserError(f"`precision` {name} needs a GPU; use bf16 or fp32 on a CPU")
    return DTYPES[name]


def set_matrix_precision(config: TrainConfig) -> None:
    """Have GPUs multiply fp32 matrices in TF32 where --precision asks for it, else exactly."""
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
