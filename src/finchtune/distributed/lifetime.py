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
from finchtune.distributed.identity import (
    launched,
    local_rank,
    number,
    one_machine,
    rank,
    world_size,
)
from finchtune.errors import UserError, print_error

REPORT_SECONDS = 2.0  # within which all ranks find a mistake that all of them find
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)
HOME = "127.0.0.1"
LOOPBACK = ("lo", "lo0")  # the interface's name on Linux, and elsewhere


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOME, 0))
        return probe.getsockname()[1]


def pick_device(accelerator: str) -> torch.device:
    """`auto`, `gpu` or `cpu` -> the device of this process. UserError where it has no GPU."""
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank() >= n_gpus:
        found = f"finds {n_gpus} GPUs" if n_gpus else "finds no GPU"
        raise UserError(
            f"`accelerator` {accelerator}: torch {found} here, and process {local_rank()} needs "
            "one of its own; give `accelerator` cpu, or fewer `devices`"
        )
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
    if not launched():
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if one_machine():
        talk_on_loopback()
    store = meeting_store(timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout
        )
    atexit.register(_leave)


def talk_on_loopback() -> None:
    """Have gloo and NCCL open their ports where no other machine reaches them, unless told else."""
    for _, name in socket.if_nameindex():
        for library in ("GLOO", "NCCL") if name in LOOPBACK else ():
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", name)


def meeting_store(timeout: timedelta) -> dist.Store | None:
    """Where the ranks of one machine find each other; None: as the launcher's environment says.

    A lone process needs no port, and rank 0 of several listens on the loopback interface only. The
    store that torch would open listens on every network. torchrun has one of its own in any case.
    """
    if world_size() == 1:
        return dist.HashStore()
    port = number("MASTER_PORT")
    if not one_machine() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if "MASTER_ADDR" not in os.environ:
            raise UserError("MASTER_ADDR is missing in the environment: launchers set it")
        return None
    place = (HOME, port)
    if rank() != 0:
        return dist.TCPStore(*place, world_size(), False, timeout)
    try:
        listener = socket.create_server(place).detach()
    except (OSError, OverflowError) as error:
        raise UserError(f"port {place[1]} cannot be had ({error}); start again") from error
    return dist.TCPStore(*place, world_size(), True, timeout, master_listen_fd=listener)


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
        local = os.environ.get("LOCAL_RANK", "0")
        if not launched() or not local.isdigit() or int(local) == 0:
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
