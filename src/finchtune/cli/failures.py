"""What ends a run, in the user's words: no memory left, a process lost."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.errors import LOST_RANK, LostRank, OutOfMemory, UserError, is_out_of_memory
from finchtune.memory.estimate import estimate
from finchtune.training.metrics import peak_memory_mb
from finchtune.training.plan import planned_sizes
from finchtune.training.precision import choose_precision, device_type
from finchtune.training.setup import model_plan

ROLL_CALL_SECONDS = 5.0


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Turn exceptions of a run that a user can do something about into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = explain(error, config)
        if told is None:
            raise
        raise told from error


def explain(error: Exception, config: TrainConfig) -> UserError | None:
    """The user's view of an exception of a run; None where there is none but the traceback."""
    if is_out_of_memory(error):
        return OutOfMemory(out_of_memory_message(config, error))
    if is_lost_connection(error) and distributed.world_size() > 1:
        return LostRank(lost_rank_message(error))
    return None


def out_of_memory_message(config: TrainConfig, error: Exception) -> str:
    """The estimate, what this process has used, what it asked for, and flags that lower it."""
    asked = " ".join(str(error).split())[:160]
    return (
        f"out of memory on rank {distributed.rank()}: {estimated_need(config)}it has used up to "
        f"{peak_memory_mb():,} MB when this failed: {asked}; lower it with "
        f"{', or '.join(flags_that_lower_memory(config))}"
    )


def estimated_need(config: TrainConfig) -> str:
    """What --plan says of one device, largest parts first; empty where there is no plan."""
    try:
        device = device_type(config)
        dtype = choose_precision(config, device)
        plan = model_plan(config, planned_sizes(config.load_model), dtype)
        need = estimate(config, plan, distributed.world_size(), device)
    except (RuntimeError, MemoryError, UserError):  # there may be no memory left for this either
        return ""
    parts = sorted(need.parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {n_bytes / 2**20:,.0f}" for name, n_bytes in parts if n_bytes)
    return f"{need.total / 2**20:,.0f} MiB are estimated ({shown}), "


def flags_that_lower_memory(config: TrainConfig) -> list[str]:
    """At least three changes of flags that make a run smaller, the cheapest first."""
    flags = []
    stage = 2 if config.cuda_graphs else 3  # graphs need whole weights on each device
    if config.micro_bsz > 1:
        half = max(n for n in range(1, config.micro_bsz) if config.micro_bsz % n == 0)
        micro_batches = config.accumulate_grad_batches * config.micro_bsz // half
        more = "" if config.global_bsz else f" --accumulate_grad_batches {micro_batches}"
        flags.append(f"--micro_bsz {half}{more} (same batch)")
    if config.cuda_graphs:
        flags.append("--cuda_graphs 0")
    if config.grad_cp != 1:
        flags.append("--grad_cp 1")
    if config.precision == "fp32" or (config.precision is None and config.accelerator == "cpu"):
        flags.append("--precision bf16")
    if not config.offload:
        flags.append(f"--strategy deepspeed_stage_{stage}_offload")
    if config.trains_all:
        flags.append("--peft bone")
    if not (config.chunked or config.cuda_graphs) and config.ctx_len > 1024:
        flags.append(f"--train_type {' '.join([*config.train_type, 'infctx'])}")
    flags.append(f"--ctx_len {max(16, config.ctx_len // 2)}")
    flags += [f"more --devices under --strategy deepspeed_stage_{stage}", "a smaller --load_model"]
    return flags[:5]


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective call failed for want of another process."""
    gloo = "gloo/transport" in str(error) or "Connection closed by peer" in str(error)
    return isinstance(error, torch.distributed.DistError) or gloo


def lost_rank_message(error: Exception) -> str:
    """Name the ranks that no longer answer. Only the first of the survivors comes back to say so.

    Every survivor reports to the store where the ranks met, and waits for the others to do so.
    """
    world, me = distributed.world_size(), distributed.rank()
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"alive/{me}", "1")
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        while time.monotonic() < deadline:
            alive = [rank for rank in range(world) if store.check([f"alive/{rank}"])]
            time.sleep(0.1)
        lost = sorted(set(range(world)) - set(alive))
    except (RuntimeError, OSError):
        # The store lives in rank 0, or in the launcher of its machine.
        lost, alive = [0], [me]
    if me != min(alive):
        sys.exit(LOST_RANK)
    asked = " ".join(str(error).split())[-160:]
    names = ", ".join(map(str, lost)) or "unknown (all answer, but one was too late)"
    return (
        f"lost rank {names} of {world}, which died or hangs ({asked}); its own message, if any, "
        "says why; resume with --resume auto"
    )
