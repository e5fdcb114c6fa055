"""Killing a piece of work at each thing that it does to files."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def kill_everywhere(work: Callable[[], object], folder: Path, every: int = 1) -> Iterator[int]:
    """Do `work` in a child that is killed before its first, second, ... change under `folder`.

    Yields the number of the change after each kill, for the caller to look and to put everything
    back as it was. Ends when the work was done undisturbed. `every`: from one kill to the next so
    many changes are passed over.
    """
    number = 1
    while _killed(work, folder, number):
        yield number
        number += every


def _killed(work: Callable[[], object], folder: Path, number: int) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _kill_at(number, str(folder))
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0, "the work failed by itself"
    return False


def _kill_at(number: int, folder: str) -> None:
    """Kill this process at its `number`-th change of a file under `folder`."""
    seen = 0

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in CHANGES or not os.path.abspath(str(arguments[0])).startswith(folder):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
