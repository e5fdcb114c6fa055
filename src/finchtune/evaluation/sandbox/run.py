"""The outside of the sandbox: which programs reach their end.

A program runs in user, mount, process, network, IPC, host name and cgroup namespaces of its own,
as a user without any privilege, on a read-only file system of Python and the system's libraries
with a scratch folder in memory; its processor time, memory, processes and files are limited. It
has passed if a sentinel that nobody can know beforehand is the last that it prints, nothing of it
is left running, and it ends with status 0.

The sandbox protects the machine. A program shares its process with the tests that judge it, so one
that is written to deceive them can, as under every scorer of HumanEval.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finchtune.errors import UserError
from finchtune.evaluation.sandbox import isolate

CPU_SECONDS = 3
WALL_FACTOR = 4  # a busy machine, and programs that sleep
KEPT_OUTPUT = 4096

PROBE = """
import os, socket
assert os.getuid() == os.geteuid() == {user} and os.getpid() < 10
assert [name for _, name in socket.if_nameindex()] == ["lo"]
assert set(os.listdir("/")) <= {folders}
for path in ("/file", "/usr/file"):
    try:
        open(path, "w")
    except OSError:
        pass
    else:
        raise AssertionError
open("file", "w").write("scratch")
pipe, children = os.pipe(), 0
try:
    while children < {processes}:
        if os.fork() == 0:
            os.close(pipe[1])
            os.read(pipe[0], 1)
            os._exit(0)
        children += 1
except BlockingIOError:
    pass
os.close(pipe[1])
for _ in range(children):
    os.wait()
assert children < {processes}
"""


def run_program(program: str, cpu_seconds: int = CPU_SECONDS) -> str:
    """Run a Python program in the sandbox: "passed", "failed" or "out of time".

    Raises UserError where this machine cannot isolate it.
    """
    status, output, errors = start(program, cpu_seconds)
    if status == isolate.NOT_ISOLATED and errors:  # else the program itself ended with it
        raise refusal(errors)
    if status == isolate.OUT_OF_TIME:
        return "out of time"
    return "passed" if status == isolate.ENDED and output else "failed"


def run_programs(programs: Sequence[str], cpu_seconds: int = CPU_SECONDS) -> Iterator[str]:
    """`run_program` of each, in order, as many at a time as there are processors."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(lambda program: run_program(program, cpu_seconds), programs)


def require_sandbox() -> None:
    """Raise UserError unless this machine isolates programs; nothing else is run on it."""
    folders = {path.split("/")[1] for path in isolate.visible_folders()} | {"dev", "tmp"}
    probe = PROBE.format(user=isolate.USER, folders=folders, processes=isolate.PROCESSES)
    status, complete, errors = start(probe, CPU_SECONDS)
    if status != isolate.ENDED or not complete:
        raise refusal(errors)


def refusal(errors: str) -> UserError:
    reason = errors.strip().splitlines()[-1] if errors.strip() else "a probe could leave it"
    return UserError(
        f"this machine cannot isolate programs ({reason}), and those that a model wrote run only "
        "in a sandbox; it takes Linux 5.14 or later and user namespaces: sysctl "
        "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns 0; in a "
        "container, privileges"
    )


def start(program: str, cpu_seconds: int) -> tuple[int, bool, str]:
    """Exit status of isolate.py, whether the sentinel came last, and what it says of itself."""
    sentinel = secrets.token_hex(32)
    request = {
        "program": program,
        "sentinel": sentinel,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": cpu_seconds * WALL_FACTOR,
    }
    process = subprocess.Popen(
        [os.path.realpath(sys.executable), "-I", "-S", str(Path(isolate.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        with process.stdin:
            process.stdin.write(json.dumps(request).encode() + b"\n")
        output = last_bytes(process.stdout.fileno())
        errors = process.stderr.read().decode()
        return process.wait(), output.endswith(f"\n{sentinel}".encode()), errors
    finally:
        process.kill()
        process.wait()


def last_bytes(descriptor: int) -> bytes:
    """The end of all that comes through a pipe."""
    kept = b""
    while chunk := os.read(descriptor, 1 << 16):
        kept = (kept + chunk)[-KEPT_OUTPUT:]
    return kept
