"""Several processes on one machine, without torchrun: their signals, their exit statuses."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finchtune.distributed.lifetime import free_port, set_parent_death_signal
from finchtune.errors import LOST_RANK

POLL_SECONDS = 0.1
GRACE_SECONDS = 20.0  # for the others to notice a dead one, say so, and leave


def run_processes(n_processes: int, command: list[str]) -> int:
    """Run `command` (after the Python interpreter) in so many ranks; returns the exit status.

    It is that of the first rank that failed, LOST_RANK if a signal ended it. SIGTERM and SIGINT
    are passed on to every rank, which decides; the ranks do not outlive this process.
    """
    env = dict(os.environ, WORLD_SIZE=str(n_processes), LOCAL_WORLD_SIZE=str(n_processes))
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # torch's default of a thread per core and process starves a CPU run.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))
    launcher = os.getpid()

    def start(rank: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            # A session of its own: Ctrl-C on the terminal reaches it once, through us.
            start_new_session=True,
            preexec_fn=lambda: set_parent_death_signal(launcher),
        )

    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any) -> None:
        for process in processes:
            process.send_signal(number)

    with handling((signal.SIGTERM, signal.SIGINT), pass_on):
        for rank in range(n_processes):
            processes.append(start(rank))
        return _wait(processes)


@contextmanager
def handling(numbers: tuple[signal.Signals, ...], handler: Callable[..., Any]) -> Iterator[None]:
    """Have `handler` take these signals within; what took them before takes them afterwards."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one failed, no longer than GRACE_SECONDS for the others."""
    first_failed: int | None = None
    deadline = float("inf")
    while True:
        running = [process for process in processes if process.poll() is None]
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed and first_failed is None:
            first_failed = failed[0]
            deadline = time.monotonic() + GRACE_SECONDS
        if not running:
            break
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        time.sleep(POLL_SECONDS)
    if first_failed is None:
        return 0
    code = processes[first_failed].returncode
    if code < 0:
        name = signal.Signals(-code).name
        line = f"error: the process of rank {first_failed} was ended by {name}"
        print(line, file=sys.stderr, flush=True)
    return code if code > 0 else LOST_RANK
