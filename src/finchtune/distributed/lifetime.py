"""How the processes of a run meet and end: joining, leaving, and ending with their launcher."""

import atexit
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from finchtune.distributed.collectives import barrier
from finchtune.distributed.identity import launched, local_rank, rank, world_size
from finchtune.errors import UserError, print_error

REPORT_SECONDS = 2.0  # within which all ranks find a mistake that all of them find
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


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


def set_parent_death_signal(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, dies or is dead already.

    A launcher that is killed outright ends nobody itself: its workers would train on unseen.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def set_agent_death_signal() -> None:
    """`set_parent_death_signal` for the parent, if it is torchrun's or DeepSpeed's agent.

    Not for other launchers: a shell may start ranks in the background, and end before they do.
    """
    if torch.distributed.is_torchelastic_launched() or "CROSS_RANK" in os.environ:
        parent = os.getppid()
        # The first process adopts those whose parent is dead; in a container it may be the agent.
        adopted = parent == 1 and "python" not in os.path.basename(os.path.realpath("/proc/1/exe"))
        set_parent_death_signal(-1 if adopted else parent)


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
    set_agent_death_signal()
    lone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if not launched():
        os.environ.update(lone, MASTER_PORT=str(free_port()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    atexit.register(_leave)


def shutdown() -> None:
    """Leave the process group when all processes have come here."""
    barrier()
    _leave()


def _leave() -> None:
    # A process that ends with the group's threads alive may abort, whatever status it wanted.
    if dist.is_initialized():
        dist.destroy_process_group()


def report_once(error: UserError) -> None:
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
        deadline = time.monotonic() + REPORT_SECONDS
        while rank() == 0 and found_by < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            found_by = store.add(error.subject, 0)
    except RuntimeError:  # rank 0 is gone already
        print_error(error)
