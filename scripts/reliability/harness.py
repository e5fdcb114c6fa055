"""Running a command of finchtune on changed files, in a process of its own, and judging its end."""

import fcntl
import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from finchtune.cli.main import VERBS
from finchtune.errors import print_error, run_cli
from finchtune.files.temporary import DUE, TEMPORARY

SECONDS = 60  # a command on a tiny file takes less than one, on a quiet machine
MEMORY = 6 << 30  # bytes of address space that a command may take beyond this process's own

SLOW_IMPORTS = (
    *("torch._inductor.config", "matplotlib.backends.backend_agg", "gguf", "pyarrow.parquet"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.op_builder.all_ops"),
    *("deepspeed.ops.triton_ops", "deepspeed.module_inject.auto_ep_presets.registry"),
    *("finchtune.cli.failures", "finchtune.training.loop", "finchtune.training.plan"),
)
"""What commands import on their way: once in this process, not in each of its children."""

READ, REFUSED, CHECKED, EITHER = "read", "refused", "checked", "either"
"""What a changed file must be: read as before; refused; one of these two; or refused or read as
whatever it now says, where nothing but the file itself tells what it should be."""

Change = Callable[[Path], object]
"""Changes the files in a folder."""


CONTINUING = ("train", "evaluate")  # what they had done stays: the same command continues


class Case(NamedTuple):
    """A change of good files, the command that reads them, and what has to come of it.

    The command is a verb and its words; it runs inside the folder. `outputs` are what it writes:
    they are compared with those of the unchanged files. `prepare` runs in the command's process.
    """

    kind: str
    name: str
    change: Change
    command: tuple[str, ...]
    wanted: str = EITHER
    outputs: tuple[str, ...] = ()
    prepare: Callable[[], object] = lambda: None


class End(NamedTuple):
    """How a command ended: by its own status, or by a signal."""

    status: int | None
    signal: int | None
    out: str
    err: str


def import_all() -> None:
    """Import what the commands need."""
    for name in (*SLOW_IMPORTS, *(f"finchtune.cli.{verb}" for verb in VERBS)):
        import_module(name)


def run_verb(
    command: tuple[str, ...], folder: Path, prepare: Callable[[], object] = lambda: None
) -> End:
    """Run a verb in a child, which has imported everything already, inside `folder`."""
    pipes = [os.pipe(), os.pipe()]  # not files, whose size a case may limit
    for reader, _ in pipes:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)
    child = os.fork()
    if child == 0:
        _be_the_command(command, folder, [writer for _, writer in pipes], prepare)
    _, ended = os.waitpid(child, 0)
    for _, writer in pipes:
        os.close(writer)
    out, err = (text_of(reader) for reader, _ in pipes)
    if os.WIFSIGNALED(ended):
        return End(None, os.WTERMSIG(ended), out, err)
    return End(os.WEXITSTATUS(ended), None, out, err)


def text_of(reader: int) -> str:
    """What was written into a pipe, which is closed."""
    with open(reader, errors="replace") as pipe:
        return pipe.read()


def _be_the_command(
    command: tuple[str, ...], folder: Path, pipes: list[int], prepare: Callable[[], object]
) -> None:
    """Never returns: this process becomes the command."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, pipe in zip((1, 2), pipes, strict=True):
            os.dup2(pipe, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit_memory(MEMORY)
        signal.alarm(SECONDS)  # whose default is to end the process
        prepare()
        verb, *words = command
        module = import_module(f"finchtune.cli.{verb}")
        report = getattr(module, "report_error", print_error)
        run_cli(lambda: module.main(words), report)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        flush()
        os._exit(status)


def limit_memory(n_bytes: int) -> None:
    """Have this process fail, not the machine, where it asks for very much."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes,) * 2)


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # full, or closed on purpose
            continue


@contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    """A copy of a folder, for one case to change."""
    with tempfile.TemporaryDirectory(prefix="reliability-") as place:
        copy = Path(place, "case")
        shutil.copytree(folder, copy, symlinks=True)
        yield copy


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with the hash of its bytes, but for what may come and go."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def half_written(folder: Path) -> list[str]:
    """Temporary files that were left."""
    paths = folder.rglob(".*")
    return [p.name for p in paths if TEMPORARY.fullmatch(p.name) or DUE.fullmatch(p.name)]


def fault_of(end: End, several: bool = False) -> str | None:
    """What is wrong with how a command ended, whatever it was asked; None if nothing is.

    `several`: it may have a line for each of several mistakes.
    """
    if end.signal == signal.SIGALRM:
        return "hangs"
    if end.signal is not None:
        return f"ended by {signal.Signals(end.signal).name}"
    if "Traceback (most recent call last)" in end.err or end.status == 1:
        return f"traceback: {' | '.join(end.err.strip().splitlines()[-3:])}"
    if raw := unprintable(end.out + end.err):
        return f"sends {raw!r} to the terminal"
    errors = [line for line in end.err.splitlines() if line.startswith("error: ")]
    told = len(errors) == 1 or (several and len(set(errors)) == len(errors) > 0)
    if end.status and not told:
        return f"{len(errors)} error lines, status {end.status}: {end.err[-300:]}"
    return None


def unprintable(text: str) -> str:
    """The control characters in a text that a terminal should not get."""
    return "".join({c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t"})


def judge(case: Case, good: dict[str, str], folder: Path) -> str | None:
    """Do a case in a copy of the good files; what is wrong with it, None if it held."""
    with copy_of(folder) as place:
        case.change(place)
        before = contents(place)
        end = run_verb(case.command, place, case.prepare)
        after, left = contents(place), half_written(place)
    fault = fault_of(end, several=case.command[0] in ("train", "plan"))
    if fault:
        return fault
    if left:
        return f"leaves {left[0]}"
    told = next((line for line in end.err.splitlines() if line.startswith("error: ")), "")
    if end.status:
        if case.wanted == READ:
            return f"refuses what it can read: {told}"
        changed = {name for name in before.keys() | after if before.get(name) != after.get(name)}
        if case.kind.startswith("output: "):  # was done, but could not be told
            return None
        if case.command[0] in CONTINUING:
            changed = {name for name in changed if not name.startswith(("new/", "run/"))}
        return f"is refused ({told}) but writes {min(changed)}" if changed else None
    if case.wanted == REFUSED:
        return "is accepted in silence"
    found = {name: after.get(name) for name in case.outputs}
    wanted = {name: good.get(name) for name in case.outputs}
    if case.wanted in (READ, CHECKED) and found != wanted:
        return "is read as something else"
    return None


def good_outputs(case: Case, folder: Path) -> dict[str, str]:
    """What the case's command writes where nothing was changed; it must succeed."""
    with copy_of(folder) as place:
        end = run_verb(case.command, place, case.prepare)
        assert end.status == 0, f"{case.kind}: {end.err or end.out}"
        return contents(place)
