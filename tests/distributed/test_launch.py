"""Several processes: their exit statuses, their mistakes, their signals and their ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.support import children_of, is_alive

from finchtune.distributed import pick_device, processes_to_start, set_parent_death_signal
from finchtune.distributed.launch import run_processes
from finchtune.errors import LOST_RANK, UserError

PROGRAM = """
import os, signal, sys, time
rank = os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2"
if "catch" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("up", flush=True)
if sys.argv[1] == rank:
    time.sleep(0.2)
    {action}
time.sleep(1 if "catch" not in sys.argv else 60)
"""


@pytest.mark.parametrize(
    ("action", "status"),
    [("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", LOST_RANK), ("pass", 0)],
)
def test_the_launcher_gives_the_first_failures_status(action, status, monkeypatch, capfd):
    monkeypatch.setattr("finchtune.distributed.launch.GRACE_SECONDS", 0.5)
    started = time.monotonic()
    assert run_processes(2, ["-c", PROGRAM.format(action=action), "1"]) == status
    assert time.monotonic() - started < 20
    if status == LOST_RANK:
        assert "the process of rank 1 was ended by SIGKILL" in capfd.readouterr().err


ABORTING = """
import ctypes
from finchtune.cli.main import main

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
main()
"""


@pytest.mark.parametrize(("rank", "status"), [({"RANK": "0"}, 2), ({}, -signal.SIGABRT)])
def test_a_rank_keeps_its_status_whatever_goes_wrong_as_the_process_is_cleared_up(rank, status):
    command = [sys.executable, "-c", ABORTING, "info", "/no/such/file"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | rank
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.startswith("error: /no/such/file")


def test_a_rank_keeps_the_status_of_a_fault_too():
    faulty = ABORTING.replace("main()", "from finchtune.cli import info\ninfo.main = None\nmain()")
    command = [sys.executable, "-c", faulty, "info", "x"]
    done = subprocess.run(command, env=os.environ | {"RANK": "0"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("TypeError: 'NoneType' object is not callable")


MISTAKEN = """
import sys, torch
from finchtune import distributed
from finchtune.errors import UserError, run_cli

def main():
    distributed.init_process_group(torch.device("cpu"))
    if str(distributed.rank()) in sys.argv[1]:
        raise UserError("a mistake in\\nthe file")
    try:
        distributed.barrier()
    except RuntimeError:
        raise UserError("another is gone")

run_cli(main, distributed.report_once)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["0", "1", "01"])
def test_a_mistake_is_told_once_whoever_finds_it(ranks, capfd):
    assert run_processes(2, ["-c", MISTAKEN, ranks]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines.count("error: a mistake in the file") == 1
    assert lines.count("error: another is gone") == 2 - len(ranks)
    assert not any("Traceback" in line for line in lines)


HALF_WAY = """
import torch
from finchtune import distributed
from finchtune.errors import UserError

def fail_at_the_second(items):
    next(items)
    raise UserError("the disk is full")

cpu = torch.device("cpu")
distributed.init_process_group(cpu)
me = distributed.rank()
for work, expected in ((list, [[1.0], [3.0], [5.0]]), (fail_at_the_second, "the disk is full")):
    items = (distributed.all_sum([number + me], cpu) for number in range(3))
    try:
        found = distributed.stream_to_rank_zero(items, work)
    except UserError as error:
        found = str(error)
    assert found == expected, found
    assert distributed.all_sum([1], cpu) == [2], "the ranks are in step again"
distributed.shutdown()
"""


@pytest.mark.slow
def test_ranks_stay_in_step_when_writing_fails_half_way():
    assert run_processes(2, ["-c", HALF_WAY]) == 0


def start_launcher(program):
    command = ["-c", program, "nobody", "catch"]
    code = (
        "import sys; from finchtune.distributed.launch import run_processes; "
        f"sys.exit(run_processes(2, {command}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    # Two processes write at once, and a line's end may come after the other's line.
    assert sorted(process.stdout.read(6)) == sorted("up\nup\n")
    return process


def test_the_launcher_passes_signals_on():
    process = start_launcher(PROGRAM.format(action="pass"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_ranks_do_not_outlive_the_launcher():
    process = start_launcher(PROGRAM.format(action="pass"))
    children = children_of(process.pid)
    assert len(children) == 2
    process.kill()
    process.wait()
    time.sleep(0.5)
    assert not any(is_alive(child) for child in children)


def test_a_rank_whose_launcher_died_before_it_could_tell_ends():
    another = os.getppid()
    child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: set_parent_death_signal(another))
    assert child.wait(10) == -signal.SIGKILL


def test_the_launcher_gives_the_callers_signal_handlers_back():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    mine = [signal.getsignal(number) for number in numbers]
    try:
        assert run_processes(1, ["-c", ""]) == 0
        assert [signal.getsignal(number) for number in numbers] == mine
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


WAITER = """
import sys, threading, time
from finchtune.distributed.signals import StopRequest
stop = StopRequest()
print("up", flush=True)
while not stop:
    time.sleep(0.01)
print("stopping", flush=True)
lock = threading.Lock()
lock.acquire()
lock.acquire()  # as a collective call that no other rank joins
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_second_ends(number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(number)  # the same Ctrl-C, by another way
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert "stopping after this step" in process.stderr.read()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "x"}, "RANK is 'x', not a whole number"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK 3 of WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "1e3"}, "WORLD_SIZE is '1e3'"),
    ],
)
def test_a_launchers_variables_must_make_sense(values, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes_to_start(1, 1)


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="`accelerator` gpu: torch finds no GPU here"):
        pick_device("gpu")
