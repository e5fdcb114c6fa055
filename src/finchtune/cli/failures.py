"""What a run does when something goes wrong: bad numbers, no memory, a lost process."""

import errno
import json
import sys
import time
from pathlib import Path

import torch

from finchtune import distributed
from finchtune.cli.flags import parse_train_flags
from finchtune.cli.plan import planned_precision, planned_sizes
from finchtune.config import TrainConfig
from finchtune.data import Data
from finchtune.errors import LOST_RANK, LostRank, NotFinite, OutOfMemory, UserError
from finchtune.memory.estimate import estimate
from finchtune.training.engine import StepResult
from finchtune.training.metrics import peak_memory_mb, rewind

SKIPPED = "skipped.jsonl"
ROLL_CALL_SECONDS = 5.0


class StepWatch:
    """Looks at every step's result: writes down what was skipped, and stops what goes wrong.

    Rows of skipped.jsonl: step (1-based), loss ("nan", "inf" or a number), documents (their
    numbers in the data set). `start` is the step that a resumed run goes on from; rows of later
    steps are dropped, and bad steps in a row just before it still count.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, data: Data, global_batch: int, start: int
    ):
        self.config, self.path, self.data = config, folder / SKIPPED, data
        self.global_batch = global_batch
        rows = distributed.from_rank_zero(lambda: self._earlier(start))
        steps = {row["step"] for row in rows}
        self.in_a_row = 0
        while start - self.in_a_row in steps:
            self.in_a_row += 1

    def _earlier(self, start: int) -> list[dict]:
        return rewind(self.path, start) if self.path.exists() else []

    def check(self, step: int, result: StepResult) -> None:
        """Warn of a step (0-based) without targets, record a skipped one.

        Raises NotFinite on every rank after --max_skips skipped steps in a row. A collective call.
        """
        if not result.targets:
            distributed.say(f"warning: step {step + 1}: every label is masked; nothing was learnt")
        # fp16 finds its loss scale by trial: a finite loss with an infinite gradient is usual.
        searching = self.config.precision == "fp16" and abs(result.loss) < float("inf")
        if not result.skipped or searching:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        distributed.from_rank_zero(lambda: self._record(step, result))

    def _record(self, step: int, result: StepResult) -> None:
        documents = self.data.document_ids(step, 0, 1, 1, self.global_batch)
        row = {"step": step + 1, "loss": str(result.loss), "documents": documents}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
        distributed.say(
            f"warning: step {step + 1} is skipped: its loss is {result.loss}, its gradient's norm "
            f"{result.grad_norm}; documents {shown} (see {self.path})"
        )
        if self.in_a_row >= self.config.max_skips:
            raise NotFinite(
                f"{self.in_a_row} steps in a row had NaN or infinity, the last of them step "
                f"{step + 1}; checkpoints from before are good; look at the documents named in "
                f"{self.path}, or go on from an earlier checkpoint with a lower --lr_init, more "
                "--warmup_steps, or --precision fp32"
            )


def explain(error: Exception) -> UserError | None:
    """The user's view of an exception of train.py; None where there is none but the traceback."""
    if is_out_of_memory(error):
        return OutOfMemory(out_of_memory_message(parse_train_flags(), error))
    if is_lost_connection(error) and distributed.world_size() > 1:
        return LostRank(lost_rank_message(error))
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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
        sizes = planned_sizes(config.load_model)
        dtype, device = planned_precision(config)
        need = estimate(config, sizes, dtype, distributed.world_size(), device)
    except (RuntimeError, MemoryError, UserError):  # there may be no memory left for this either
        return ""
    parts = sorted(need.parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {n_bytes / 2**20:,.0f}" for name, n_bytes in parts if n_bytes)
    return f"{need.total / 2**20:,.0f} MiB are estimated ({shown}), "


def flags_that_lower_memory(config: TrainConfig) -> list[str]:
    """At least three changes of flags that make a run smaller, the cheapest first."""
    flags = []
    if config.micro_bsz > 1:
        half = max(n for n in range(1, config.micro_bsz) if config.micro_bsz % n == 0)
        micro_batches = config.accumulate_grad_batches * config.micro_bsz // half
        more = "" if config.global_bsz else f" --accumulate_grad_batches {micro_batches}"
        flags.append(f"--micro_bsz {half}{more} (same batch)")
    if config.grad_cp != 1:
        flags.append("--grad_cp 1")
    if config.precision == "fp32" or (config.precision is None and config.accelerator == "cpu"):
        flags.append("--precision bf16")
    if not config.offload:
        flags.append("--strategy deepspeed_stage_3_offload")
    if config.peft == "none":
        flags.append("--peft bone")
    flags.append(f"--ctx_len {max(16, config.ctx_len // 2)}")
    flags += ["more --devices under --strategy deepspeed_stage_3", "a smaller --load_model"]
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
        "says why; go on with --resume auto"
    )
