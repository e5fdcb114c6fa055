"""Hostile programs fail in the sandbox, and nothing of them is left."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finchtune.errors import UserError
from finchtune.evaluation.sandbox import isolate, require_sandbox, run_program, run_programs

HOSTILE = {
    "assertion": "assert 1 + 1 == 3",
    "syntax": "def f(:",
    "network": "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)",
    "loopback": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "fork_bomb": "import os\nwhile True:\n    os.fork()",
    "patient_fork_bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    ),
    "memory": "held = bytearray(100 << 30)",
    "memory_bit_by_bit": "held = []\nwhile True:\n    held.append(bytearray(64 << 20))",
    "huge_file": "file = open('huge', 'wb')\nwhile True:\n    file.write(bytes(1 << 20))",
    "many_files": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').close()",
    "open_files": "held = []\nwhile True:\n    held.append(open('/dev/null'))",
    "endless_loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(1000)",
    "endless_output": "while True:\n    print('x' * 100_000)",
    "exit": "import sys\nsys.exit(0)",
    "exit as if nothing were isolated": "import sys\nsys.exit(125)",
    "hard_exit": "import os\nos._exit(0)",
    "reads_passwd": "open('/etc/passwd').read()",
    "reads_marker": "open({marker!r}).read()",
    "reads_processes": "open('/proc/1/environ').read()",
    "lists_home": "import os\nassert os.listdir('/root') and '.bashrc' in os.listdir('/root')",
    "writes_outside": "open({marker!r}, 'w').write('x')",
    "writes_to_python": "import os\nopen(os.__file__, 'a').write('x')",
    "remounts": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, b'') == 0"
    ),
    "own_namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "becomes_root": "import os\nos.setuid(0)",
    "kills_its_parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills_everything": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kills_the_outside": "import os, signal\nos.kill({pid}, signal.SIGKILL)",
    "child_outlives": (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n    os._exit(0)"
    ),
    "thread_outlives": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()"
    ),
    "prints_a_sentinel": "import os\nprint('passed')\nprint('0' * 64, flush=True)\nos._exit(0)",
    "prints_its_source": (
        "import sys, os, gc\n"
        "frame, found = sys._getframe(), [sys.argv, sys.orig_argv, dict(os.environ)]\n"
        "while frame:\n"
        "    found += [frame.f_code.co_consts, dict(frame.f_globals), dict(frame.f_locals)]\n"
        "    frame = frame.f_back\n"
        "import re\n"
        "print(max(re.findall('[0-9a-f]{{64}}', repr(found)), default=''), end='', flush=True)\n"
        "os._exit(0)"
    ),
    "prints_after_it": "import atexit\natexit.register(print, 'the end')",
}


@pytest.fixture(scope="module", autouse=True)
def isolated():
    try:
        require_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def running() -> set[int]:
    """Processes of the sandbox: those of its script, and of what it executes."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if isolate.__file__.encode() in command or isolate.RUN.encode() in command:
            found.add(int(folder.name))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What becomes of every hostile program, all in one go."""
    marker = tmp_path_factory.mktemp("outside") / "marker"
    marker.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"port": server.getsockname()[1], "marker": str(marker), "pid": os.getpid()}
        programs = [program.format(**names) for program in HOSTILE.values()]
        found = dict(zip(HOSTILE, run_programs(programs, cpu_seconds=1), strict=True))
    assert marker.read_text() == "secret"
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_fails(outcomes, name):
    assert outcomes[name] in ("failed", "out of time")


def test_time_is_what_a_loop_runs_out_of(outcomes):
    assert outcomes["endless_loop"] == outcomes["sleep"] == "out of time"


def test_nothing_is_left_behind(outcomes):
    assert running() == set()


def test_good_programs_pass():
    programs = [
        "",
        "print('no newline at the end', end='')",
        "import os\nopen('scratch', 'w').write('x')\nassert os.listdir('.') == ['scratch']",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1",
        "from concurrent.futures import ThreadPoolExecutor as T\n"
        "with T(2) as pool:\n    assert list(pool.map(abs, [-1, -2])) == [1, 2]",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', '1'], check=True)",
        "assert input is not None and 'é' == '\\xe9'",
        "text = '" + "x" * 200_000 + "'",
    ]
    assert list(run_programs(programs)) == ["passed"] * len(programs)


def test_programs_do_not_see_each_other():
    assert run_program("open('mine', 'w').write('x')") == "passed"
    assert run_program("import os\nassert os.listdir('.') == []") == "passed"


def test_killed_evaluator_leaves_nothing():
    code = (
        "from finchtune.evaluation.sandbox import run_program\nrun_program('while True: pass', 60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while not any(isolate.RUN.encode() in command_of(pid) for pid in running()):
        assert process.poll() is None
    process.kill()
    process.wait()
    for _ in range(100):
        if not running():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert running() == set()


def command_of(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""


def test_other_users_programs_are_isolated_too():
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not shutil.which("setpriv") or not Path(python).exists():
        pytest.skip("needs root and a Python that everybody may run")
    script = Path(isolate.__file__).read_text()
    request = '{"program": "print(1)", "sentinel": "last", "cpu_seconds": 3, "wall_seconds": 9}\n'
    command = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    done = subprocess.run(
        [*command, python, "-I", "-S", "-c", script], input=request, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "1\n\nlast"), done.stderr


def test_machine_that_cannot_isolate_is_refused():
    """In a user namespace that allows no other, as in many containers."""
    code = "from finchtune.evaluation.sandbox import require_sandbox\nrequire_sandbox()"
    limit = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", limit, "sh"]
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "this machine cannot isolate programs (unshare: No space left on device)" in last
