"""Starting DeepSpeed: the same numbers on every rank, and no copies of what nobody writes.

It touches DeepSpeed's internals in ways that were checked against the pinned version.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from finchtune import distributed
from finchtune.errors import UserError


def start_deepspeed(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ds_config: dict[str, Any],
    device: torch.device,
    timeout: timedelta,
) -> Any:
    """DeepSpeed's engine around a module, which starts as rank 0's on every rank.

    Trained parameters and buffers (what adapters computed, codes of a quantised base) become
    rank 0's. Frozen parameters were read from a file and stay as they are. A collective call.
    Raises UserError on every rank if the frozen parameters of one are not rank 0's.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # spares a warning that it guessed so
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Compiling DeepSpeed's shared-memory collectives takes half a minute; gloo gives the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its use of collectives that torch renamed would warn at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    trainable = [p for p in module.parameters() if p.requires_grad]
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", dist_init_required=False
    )
    # DeepSpeed's own copy of the world group would wait torch's half hour for a hung rank.
    deepspeed.utils.groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)
    distributed.broadcast(module.buffers())
    check_frozen(module)
    import_muon()
    with frozen_left_alone(module):
        engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=trainable, config=ds_config
        )
    return engine


def import_muon() -> None:
    """Import what DeepSpeed imports with any optimizer, its Muon, without compiling that.

    Its decorator would have torch import the whole of its compiler, which takes a second.
    """
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = original


@contextmanager
def frozen_left_alone(module: nn.Module) -> Iterator[None]:
    """Keep DeepSpeed from broadcasting frozen parameters while it starts.

    On a CPU these are pages of the weight file that the processes of a machine share. Rank 0's
    numbers written over the same numbers would give each process pages of its own.
    """
    from deepspeed import comm

    frozen = {p.data_ptr() for p in module.parameters() if not p.requires_grad}
    original = comm.broadcast

    def broadcast(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.data_ptr() not in frozen:
            return original(tensor, *arguments, **options)
        return None

    comm.broadcast = broadcast
    try:
        yield
    finally:
        comm.broadcast = original


def check_frozen(module: nn.Module) -> None:
    """Raise UserError on every rank, naming the first, if one has other frozen parameters."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    sums = distributed.all_gather([checksum(p.detach()) for p in frozen.values()])
    for rank, found in enumerate(sums):
        differing = [name for name, a, b in zip(frozen, sums[0], found, strict=True) if a != b]
        if differing:
            raise UserError(
                f"rank {rank} has other weights than rank 0 ({differing[0].removeprefix('model.')} "
                f"and {len(differing) - 1} more); `load_model` must be the same file everywhere"
            )


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bits, read as whole numbers: fast, and another if a number differs."""
    content = tensor.contiguous().view(-1).view(torch.uint8)
    wide = content if content.numel() % 8 else content.view(torch.int64)
    return int(wide.sum(dtype=torch.int64))
