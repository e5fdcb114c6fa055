"""Compiling, in a session of its own that ends with whoever started it.

Run as a script by `compile_apart`: it imports nothing of finchtune, whose kernels are missing.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def compile_apart(home: str | None, options: dict[str, Any]) -> None:
    """`cpp_extension.load(**options)` in another process, with the CUDA toolkit at `home`.

    Whatever ends this process, or the call, ends the compilers too. Raises RuntimeError with what
    the compiler says.
    """
    command = [sys.executable, __file__, json.dumps([os.getpid(), home, options])]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = child.communicate()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if child.returncode:
        raise RuntimeError(said)


def end_with_parent(parent: int) -> None:
    """Have this process, and all that it starts, end when `parent` does, or by SIGTERM."""
    signal.signal(signal.SIGTERM, end_session)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        end_session()


def end_session(*_: object) -> None:
    """Kill every process of this session and end. Ninja gives each compiler a group of its own."""
    import psutil

    while others := [pid for pid in psutil.pids() if pid != os.getpid() and in_session(pid)]:
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os._exit(1)


def in_session(pid: int) -> bool:
    """Whether a process is of this process's session, and still running."""
    import psutil

    try:
        return os.getsid(pid) == os.getsid(0) and psutil.Process(pid).status() != "zombie"
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False


def main() -> None:
    parent, home, options = json.loads(sys.argv[1])
    end_with_parent(parent)
    sys.path.pop(0)  # this folder, whose modules are not meant by their bare names
    from torch.utils import cpp_extension

    if home is not None:  # torch's own guess is the folder above the first nvcc on the PATH
        cpp_extension.CUDA_HOME = home
    try:
        cpp_extension.load(**options)
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
