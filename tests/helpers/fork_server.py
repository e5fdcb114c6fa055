"""Scripts in processes of their own that need not import torch first.

A server imports what scripts use and forks a process for each. Such a process has the script's
arguments, environment and output, and ends as any other does; only its imports are done already,
a second or more of work. `Server` is the tests' side; as a program, this file is the server's.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

PRELOADED = (
    *("finchtune.training.loop", "finchtune.training.plan", "finchtune.cli.failures"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"),
    *("matplotlib.backends.backend_agg", "pyarrow.parquet"),
)


class Server:
    """Forks one script after another."""

    def __init__(self) -> None:
        env = os.environ | {"DS_ACCELERATOR": "cpu"}  # DeepSpeed would print that it guessed so
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
        atexit.register(self.process.communicate)  # the end of its input is its own

    def run(self, command: list[str], env: dict[str, str], timeout: float):
        """Run a script with its arguments as `subprocess.run` does, with captured output."""
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/out", f"{folder}/err"]
            request = {"command": command, "env": env, "cwd": os.getcwd(), "files": files}
            print(json.dumps(request | {"timeout": timeout}), file=self.process.stdin, flush=True)
            status = json.loads(self.process.stdout.readline())
            texts = [Path(file).read_text() for file in files]
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout, *texts)
        return subprocess.CompletedProcess(command, status, *texts)


@cache
def server() -> Server:
    """The one of this process."""
    return Server()


def serve() -> dict:
    """Fork a process for each request; returns in these, with theirs."""
    for name in PRELOADED:
        import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            return request
        print(json.dumps(wait(child, request["timeout"])), flush=True)
    sys.exit()


def wait(child: int, seconds: float) -> int | None:
    """A process's exit status, as subprocess has it; None if it had to be killed."""
    descriptor = os.pidfd_open(child)
    ended, _, _ = select.select([descriptor], [], [], seconds)
    os.close(descriptor)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def become(request: dict) -> None:
    """Take the arguments, the environment and the files of a script."""
    for number, path in enumerate((os.devnull, *request["files"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)


if __name__ == "__main__":
    request = serve()
    become(request)
    runpy.run_path(sys.argv[0], run_name="__main__")
