"""Run one Python program in namespaces of its own. A script that needs nothing but Python.

It reads `{"program", "sentinel", "cpu_seconds", "wall_seconds"}` as a line of JSON from standard
input, and exits with one of the statuses below. The program's standard output is its own.

    this process    outside; maps the user, keeps the time, waits for all the others
      keeper        enters the namespaces and builds the file system
        init        process 1 of the namespace: when it ends, the kernel ends all that is left
          parent    dies if the program kills its parent
            program unprivileged, with limits
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

ENDED, OUT_OF_TIME, NOT_ISOLATED, DIED, LEFT_BEHIND = 0, 124, 125, 126, 127

USER = 1000  # inside; outside it is NOBODY, or whoever runs this
NOBODY = 65534
MEMORY = 1 << 30  # of address space, a process
FILE = 8 << 20
SCRATCH = "size=16m,nr_inodes=1024,mode=700"
PROCESSES = 8
OPEN_FILES = 32
GRACE = 0.2  # seconds that the program's own children have to end after it

# linux/sched.h, linux/mount.h, linux/prctl.h; the numbers of the system calls are the same on
# x86-64 and arm64 for mount_setattr.
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE, ATTR_RDONLY, ATTR_NOSUID = 442, 0x8000, 1, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SET_PDEATHSIG, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 1, 36, 38

# The sentinel is in a pipe, not in the program's text, and read when the program has run.
RUN = """
import os, sys
exec(compile(sys.stdin.buffer.read().decode(), "program", "exec"), {})
sys.stdout.flush()
os.write(1, b"\\n" + os.read(3, 256))
"""
ENVIRONMENT = {"HOME": "/tmp", "TMPDIR": "/tmp", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    request = json.loads(sys.stdin.buffer.readline())
    die_with_parent()
    libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    entered, mapped = os.pipe(), os.pipe()
    keeper = fork(lambda: keep(request, entered, mapped))
    os.close(entered[1])
    if os.read(entered[0], 1):
        map_user(keeper)
        os.write(mapped[1], b".")
    status = wait_for(keeper, request["wall_seconds"])
    reap_all()
    return status


def fork(work: Callable[[], int]) -> int:
    """Run `work` in a child, whose exit status is what it returns."""
    child = os.fork()
    if child == 0:
        status = NOT_ISOLATED
        try:
            status = work()
        except OSError as error:
            print(f"{error.filename or 'process'}: {error.strerror}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def wait_for(child: int, seconds: float) -> int:
    """A child's exit status, or that it is out of time, or died; it has ended then."""
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    if not poll.poll(seconds * 1000):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return OUT_OF_TIME
    return exit_status(os.waitpid(child, 0)[1])


def exit_status(status: int) -> int:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return OUT_OF_TIME
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else DIED


def reap_all() -> None:
    """Wait until every descendant has ended: all are dying, for their keeper is dead."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def die_with_parent() -> None:
    libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def check(result: int, what: str) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)


def map_user(keeper: int) -> None:
    """Make USER in the keeper's namespace a user that owns nothing, or the caller if not root.

    The kernel does not limit root's processes, so root's programs run as NOBODY.
    """
    own = os.geteuid()
    for outside in (NOBODY, own) if own == 0 else (own,):
        try:
            write(f"/proc/{keeper}/uid_map", f"{USER} {outside} 1")
            write(f"/proc/{keeper}/setgroups", "deny")
            group = outside if outside != own else os.getegid()
            write(f"/proc/{keeper}/gid_map", f"{USER} {group} 1")
            return
        except OSError:
            continue


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def keep(request: dict[str, Any], entered: tuple[int, int], mapped: tuple[int, int]) -> int:
    """Enter the namespaces, build the file system and run the program in them."""
    os.close(mapped[1])
    with suppress(PermissionError):  # who may not, has none that matter
        os.setgroups([])
    write("/proc/self/oom_score_adj", "1000")
    spaces = NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
    check(libc.unshare(spaces), "unshare")
    os.write(entered[1], b".")
    os.read(mapped[0], 1)
    # Inside another user namespace the program would have a file system to fill.
    write("/proc/sys/user/max_user_namespaces", "0")
    build_root()
    die_with_parent()
    init = fork(lambda: run_init(request))
    return exit_status(os.waitpid(init, 0)[1])


def build_root() -> None:
    """Make a small read-only root of Python and the system's libraries, with a scratch /tmp."""
    folders = visible_folders()
    links = {path: os.readlink(path) for path in folders if os.path.islink(path)}
    sources = {path: open_directory(path) for path in folders if path not in links}
    devices = {path: os.open(path, os.O_PATH) for path in ("/dev/null", "/dev/urandom")}
    # As the mapped user; the folders were opened as whoever may pass those above them.
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    mount(None, "/", None, REC | PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "size=1m,nr_inodes=256,mode=755")
    root = open_directory("/tmp")
    for path, source in sources.items():
        os.makedirs(f"/tmp{path}", exist_ok=True)
        bind(source, f"/tmp{path}")
        set_attributes(f"/tmp{path}", ATTR_RDONLY | ATTR_NOSUID, AT_RECURSIVE)
    for path, target in links.items():
        os.symlink(target, f"/tmp{path}")
    os.mkdir("/tmp/dev")
    for path, device in devices.items():
        write(f"/tmp{path}", "")
        mount(f"/proc/self/fd/{device}", f"/tmp{path}", None, BIND)
    os.mkdir("/tmp/tmp")
    mount("tmpfs", "/tmp/tmp", "tmpfs", NOSUID | NODEV | NOEXEC, SCRATCH)
    os.fchdir(root)
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", DETACH), "umount")
    set_attributes("/", ATTR_RDONLY, 0)
    os.closerange(4, OPEN_FILES * 8)
    os.chdir("/tmp")


def visible_folders() -> list[str]:
    """What a program sees of the machine: this Python and the libraries it loads."""
    folders = ["/usr", "/lib", "/lib64", sys.base_prefix]
    inside_usr = os.path.commonpath([os.path.realpath(sys.base_prefix), "/usr"]) == "/usr"
    return [path for path in folders[: 3 if inside_usr else 4] if os.path.exists(path)]


def open_directory(path: str) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY)


def bind(source: int, target: str) -> None:
    os.fchdir(source)
    mount(".", target, None, BIND | REC)


def mount(
    source: "str | None", target: str, kind: "str | None", flags: int, data: str = ""
) -> None:
    names = [name and name.encode() for name in (source, target, kind)]
    check(libc.mount(*names, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def set_attributes(path: str, attributes: int, flags: int) -> None:
    structure = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    done = libc.syscall(MOUNT_SETATTR, -100, path.encode(), flags, structure, 32)
    check(done, f"mount_setattr {path}")


def run_init(request: dict[str, Any]) -> int:
    """Process 1: see the program's parent end, and whether anything of the program is left."""
    die_with_parent()
    parent = fork(lambda: run_parent(request))
    while True:
        child, status = os.wait()
        if child == parent:
            return LEFT_BEHIND if anything_left() else exit_status(status)


def anything_left() -> bool:
    """Whether processes of the namespace live on; those that are just ending have GRACE."""
    for _ in range(20):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        select.select([], [], [], GRACE / 20)
    return True


def run_parent(request: dict[str, Any]) -> int:
    program, sentinel = os.pipe(), os.pipe()
    os.write(sentinel[1], request["sentinel"].encode())
    child = fork(lambda: run_program(request["cpu_seconds"], program, sentinel))
    for descriptor in (program[0], *sentinel):
        os.close(descriptor)
    try:
        with os.fdopen(program[1], "wb") as file:
            file.write(request["program"].encode())
    except BrokenPipeError:
        pass  # the program's end tells the rest
    return exit_status(os.waitpid(child, 0)[1])


def run_program(cpu_seconds: int, program: tuple[int, int], sentinel: tuple[int, int]) -> NoReturn:
    """Become the program: in a session of its own, limited, without any way to privileges."""
    os.setsid()
    os.dup2(program[0], 0)
    os.dup2(sentinel[0], 3)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    os.closerange(4, OPEN_FILES * 8)
    check(libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    for kind, limit in {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: PROCESSES,
    }.items():
        # Beyond the soft limit of time comes a signal that tells it, beyond the hard one death.
        resource.setrlimit(kind, (limit, limit + (kind == resource.RLIMIT_CPU)))
    command = [sys.executable, "-s", "-S", "-X", "utf8", "-c", RUN]
    os.execve(sys.executable, command, ENVIRONMENT)


if __name__ == "__main__":
    sys.exit(main())
