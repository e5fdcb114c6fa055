"""Rows read ahead: what remains of the thread when a program ends."""

import subprocess
import sys

import pytest

ENDING = """
import torch
from finchtune.data.prefetch import prefetch

torch.set_num_threads(1)

def items():
    yield 0
    for _ in range(20_000):
        torch.ones(64, 64) @ torch.ones(64, 64)
    yield 1

ahead = prefetch(items())
assert next(ahead) == 0
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_a_program_that_ends_amid_reading_ahead_is_not_aborted(end, status):
    command = [sys.executable, "-c", ENDING.format(end=end)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "terminate called" not in done.stderr
