"""A real server in a process of its own."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from helpers.support import script_command


@contextmanager
def serving(*flags) -> Iterator[str]:
    """Runs scripts/serve.py on a free port; yields the address of its API."""
    command, env = script_command("scripts/serve.py", "--port", 0, *flags)
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert " at http://" in line, process.stderr.read() if process.stderr else ""
        yield line.strip().rpartition(" at ")[2]
    finally:
        running = process.poll() is None
        process.terminate()
        _, error = process.communicate(timeout=60)
        assert running, error
        assert "Traceback" not in error, error
