"""Which process am I, and how do the processes meet. The only reader of RANK and WORLD_SIZE."""

import atexit
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from finchtune.errors import UserError, print_error

T = TypeVar("T")
Item = TypeVar("Item")
TELL_SECONDS = 2.0  # within which all ranks find a mistake that all of them find
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


def rank() -> int:
    """Global rank of this process; 0 when started without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank of this process on its own machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of the run; 1 when started without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether torchrun, deepspeed or another launcher started this process."""
    return "RANK" in os.environ


def processes_to_start(devices: int, num_nodes: int) -> int:
    """How many processes this one has to start for the run; 0: it is one of the run's own.

    A launcher's own count wins where --devices was left at 1. Raises UserError where the two
    contradict each other, or where several machines are asked for without a launcher.
    """
    if launched():
        if devices * num_nodes not in (1, world_size()):
            raise UserError(
                f"--devices {devices} --num_nodes {num_nodes} contradicts the launcher, which "
                f"started {world_size()} processes; drop the flags"
            )
    elif num_nodes > 1:
        raise UserError(
            "--num_nodes needs a launcher: see scripts/run_multinode.sh (torchrun) and "
            "scripts/run_slurm.sh, and drop the flag"
        )
    return 0 if launched() or devices == 1 else devices


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pick_device(accelerator: str) -> torch.device:
    """`auto`, `gpu` or `cpu` -> the device of this process."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, dies or is dead already.

    A launcher that is killed outright ends nobody itself: its workers would train on unseen.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_agent() -> None:
    """`die_with` the process that started this one, if it is torchrun's or DeepSpeed's agent.

    Not for other launchers: a shell may start ranks in the background, and end before they do.
    """
    if torch.distributed.is_torchelastic_launched() or "CROSS_RANK" in os.environ:
        parent = os.getppid()
        # The first process adopts those whose parent is dead; in a container it may be the agent.
        adopted = parent == 1 and "python" not in os.path.basename(os.path.realpath("/proc/1/exe"))
        die_with(-1 if adopted else parent)


def watch_runner() -> Callable[[], bool]:
    """Tells, whenever it is called, whether DeepSpeed's runner has ended since.

    The runner starts the agent that starts the ranks. What ends the runner reaches neither.
    """
    if "CROSS_RANK" not in os.environ:
        return lambda: False
    import psutil

    try:
        agent = psutil.Process(os.getppid())
        runner = agent.parent()
        words = {os.path.basename(word) for word in runner.cmdline()} if runner else set()
    except psutil.Error:  # processes of another user or container
        return lambda: False
    # Not for a shell that started the agent itself: it may end first.
    if runner is None or not words & {"deepspeed", "ds", "deepspeed.launcher.runner"}:
        return lambda: False
    return lambda: agent.ppid() != runner.pid


def init_process_group(device: torch.device, timeout_minutes: float = 30) -> None:
    """Join the other processes (nccl on GPUs, gloo on CPUs); a lone process gets a group of one.

    A collective call that waits longer than `timeout_minutes` for another rank fails. From here on
    the process ends with the launcher that started it.
    """
    die_with_agent()
    lone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if not launched():
        os.environ.update(lone, MASTER_PORT=str(free_port()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    atexit.register(_leave)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group when all processes have come here."""
    barrier()
    _leave()


def _leave() -> None:
    # A process that ends with the group's threads alive may abort, whatever status it wanted.
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums of `values` over all processes, in float64, by one collective."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def all_min(value: float, device: torch.device) -> float:
    """The smallest `value` of all processes, in float64."""
    least = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least.item()


def from_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait; its result, or its failure, is everyone's."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # handed on to every rank below
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def rank_zero_takes(items: Iterator[Item], work: Callable[[Iterator[Item]], T]) -> T:
    """`from_rank_zero(work)`, with items that all ranks make together, one collective call each.

    Every rank makes all of them, whether `work` takes them all or fails half-way.
    """

    def take() -> T:
        try:
            return work(items)
        finally:
            exhaust(items)

    if rank() != 0:
        exhaust(items)
    return from_rank_zero(take)


def exhaust(items: Iterator) -> None:
    """Make all items, and keep none."""
    for _ in items:
        pass


def all_gather(value: T) -> list[T]:
    """What each process gives, by rank: any object that can be pickled. A collective call."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process rank 0's values of `tensors`, in place. A collective call."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def machine() -> tuple[str, int]:
    """Names the machine, or the container on it: whose processes can open each other's files in
    /proc.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return boot, os.stat("/proc/self/ns/pid").st_ino


def tell_once(error: UserError) -> None:
    """Print an error, unless another rank that has made one of the same subject did so.

    Before the processes have met, the first one of each machine prints it.
    """
    if not dist.is_initialized():
        if local_rank() == 0:
            print_error(error)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        found_by = store.add(error.subject, 1)
        if found_by == 1:
            print_error(error)
        # The store may live in rank 0, which therefore goes last.
        deadline = time.monotonic() + TELL_SECONDS
        while rank() == 0 and found_by < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            found_by = store.add(error.subject, 0)
    except RuntimeError:  # rank 0 is gone already
        print_error(error)


def say(message: str) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(message, flush=True)
