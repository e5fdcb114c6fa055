"""Which process of the run this is. The only reader of RANK and WORLD_SIZE; needs no torch."""

import os
import re
from pathlib import Path

from finchtune.errors import UserError, printable


def rank() -> int:
    """Global rank of this process; 0 when started without a launcher."""
    return number("RANK", 0)


def local_rank() -> int:
    """Rank of this process on its own machine."""
    return number("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes of the run; 1 when started without a launcher."""
    return number("WORLD_SIZE", 1)


def number(name: str, default: int | None = None) -> int:
    """What a launcher says in a variable of the environment; UserError unless it is a number."""
    value = os.environ.get(name, default)
    if value is None or not re.fullmatch(r"[0-9]{1,9}", str(value)):
        found = "is missing" if value is None else f"is {value!r:.40}, not a whole number"
        raise UserError(
            f"{name} {found} in the environment: launchers set it; unset RANK and WORLD_SIZE to "
            "start without one"
        )
    return int(value)


def one_machine() -> bool:
    """Whether all processes of the run are known to be on this machine."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # DeepSpeed's name
    return world_size() == 1 or here == str(world_size())


def launched() -> bool:
    """Whether torchrun, deepspeed or another launcher started this process."""
    return "RANK" in os.environ


def processes_to_start(devices: int, num_nodes: int) -> int:
    """How many processes this one has to start for the run; 0: it is one of the run's own.

    A launcher's own count wins where --devices was left at 1. Raises UserError where the two
    contradict each other, or where several machines are asked for without a launcher.
    """
    if launched():
        if rank() >= world_size() or local_rank() >= world_size():
            raise UserError(
                f"RANK {rank()} of WORLD_SIZE {world_size()} in the environment makes no sense; "
                "unset both to start without a launcher"
            )
        if devices * num_nodes not in (1, world_size()):
            raise UserError(
                f"`devices` {devices} `num_nodes` {num_nodes} contradicts the launcher, which "
                f"started {world_size()} processes; drop the flags"
            )
    elif num_nodes > 1:
        raise UserError(
            "`num_nodes` needs a launcher: see scripts/run_multinode.sh (torchrun) and "
            "scripts/run_slurm.sh, and drop the flag"
        )
    return 0 if launched() or devices == 1 else devices


def machine() -> tuple[str, int]:
    """Names the machine, or the container on it: whose processes can open each other's files in
    /proc.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return boot, os.stat("/proc/self/ns/pid").st_ino


def print_rank_zero(message: str) -> None:
    """Print on rank 0 only, fit for a terminal."""
    if rank() == 0:
        print(printable(message), flush=True)
