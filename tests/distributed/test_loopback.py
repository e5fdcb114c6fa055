"""A run on one machine is not to be reached from any other."""

import subprocess
import time
from contextlib import suppress

import psutil
import pytest
from helpers.additions import flags, make_folder
from helpers.support import script_command

from finchtune.distributed.launch import run_processes

PROGRAM = """
import psutil, torch
from finchtune import distributed

distributed.init_process_group(torch.device("cpu"))
torch.distributed.new_group()
assert distributed.all_sum([1], torch.device("cpu")) == [distributed.world_size()]
found = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
assert found or distributed.world_size() == 1
assert set(found) <= {"127.0.0.1"}, found
distributed.shutdown()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_every_port_is_on_the_loopback_interface(processes):
    assert run_processes(processes, ["-c", PROGRAM]) == 0


def listening(process):
    """Addresses on which a process and its children listen."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # a compiler or the like
            found |= {c.laddr.ip for c in one.net_connections("inet") if c.status == "LISTEN"}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_training_run_listens_on_the_loopback_interface_only(tmp_path, devices):
    folder = make_folder(tmp_path)
    words = ["--devices", devices, "--micro_bsz", 2, "--epoch_steps", 5000]
    command, env = script_command("train.py", *flags(folder, "run", *words))
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        seen: set[str] = set()
        path = folder / "run" / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < 3:
            assert process.poll() is None
            seen |= listening(psutil.Process(process.pid))
            time.sleep(0.2)
        seen |= listening(psutil.Process(process.pid))
        assert seen == {"127.0.0.1"}
    finally:
        process.terminate()
        process.wait(60)
