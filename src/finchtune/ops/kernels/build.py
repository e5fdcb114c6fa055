"""Compiling the kernels: on first use, once per machine, by one process while the others wait."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from finchtune.errors import UserError
from finchtune.files import (
    FileSet,
    cache_folder,
    check_sums,
    finish_interrupted,
    make_private,
    require_private,
    sha256,
    sums_text,
)
from finchtune.ops.kernels.compiling import compile_apart
from finchtune.ops.kernels.toolkit import BuildError, Toolkit, find_toolkit

PACKAGED = Path(__file__).parents[2] / "cuda"
SOURCE_FOLDER = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[4] / "cuda"
"""The kernels' sources: in an installed package its own, in a clone the folder at its top."""

C_FLAGS = ["-O3", "-fopenmp"]
NEEDS = "install g++ and ninja (apt install g++; pip install ninja)"


@dataclass(frozen=True)
class Part:
    """One library of operators. Each is built and loaded without the others."""

    name: str
    sources: tuple[str, ...]
    folders: tuple[str, ...]  # with all that the sources include


CPU = Part(
    "finchtune_cpu",
    (
        "operators/schemas.cpp",
        "operators/wkv6_cpu.cpp",
        "operators/wkv7_cpu.cpp",
        "operators/cpu.cpp",
        "operators/adapters.cpp",
        "operators/block.cpp",
        "operators/composite.cpp",
        "operators/low_ranks.cpp",
        "operators/heads.cpp",
        "operators/heads_cpu.cpp",
        "operators/inference.cpp",
        "cpu/paths.cpp",
    ),
    ("operators", "cpu"),
)
GPU = Part(
    "finchtune_gpu",
    (
        "operators/schemas.cpp",
        "operators/wkv6_gpu.cpp",
        "operators/wkv7_gpu.cpp",
        "operators/block_gpu.cpp",
        "operators/adapters_gpu.cpp",
        "operators/norm_gpu.cpp",
        "operators/quantised_gpu.cpp",
        "operators/composite.cpp",
        "operators/low_ranks.cpp",
        "operators/heads.cpp",
        "operators/heads_gpu.cpp",
        "gpu/wkv6.cu",
        "gpu/wkv7.cu",
        "gpu/elementwise.cu",
        "gpu/norm.cu",
        "gpu/quantised.cu",
        "gpu/heads.cu",
    ),
    ("operators", "gpu"),
)


@contextlib.contextmanager
def scripts_on_path() -> Iterator[None]:
    """Let torch find the ninja installed beside this Python when its venv is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def compiler_version(command: str) -> str:
    """What the compiler says of itself; BuildError when there is none."""
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"no working compiler '{command}': {NEEDS}") from error
    return answer.stdout


def source_files(part: Part) -> list[Path]:
    """The files to compile."""
    return [SOURCE_FOLDER / name for name in part.sources]


def build_key(part: Part, compiler: str, toolkit: Toolkit | None) -> str:
    """A digest of everything that the compiled library depends on."""
    digest = hashlib.sha256()
    files = (path for folder in part.folders for path in (SOURCE_FOLDER / folder).rglob("*"))
    for path in sorted(path for path in files if path.is_file()):
        name = str(path.relative_to(SOURCE_FOLDER))
        digest.update(name.encode() + b"\0" + path.read_bytes())
    facts = [torch.__version__, platform.machine(), compiler, *C_FLAGS, repr(toolkit)]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def machine_lock(path: Path) -> Iterator[None]:
    """One process at a time. The system drops the lock of a killed process, so none goes stale."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def link_folder(toolkit: Toolkit, folder: Path) -> list[str]:
    """Linker flags for the CUDA runtime, to which nvidia's wheels hold no link without version."""
    libraries = toolkit.libraries()
    if not libraries or libraries[0].name == "libcudart.so":
        return []
    (folder / "libcudart.so").symlink_to(libraries[0])
    return [f"-L{folder}"]


def compile_library(library: Path, part: Part, toolkit: Toolkit | None) -> None:
    """Compile in a fresh folder and publish the library together with its sha256."""
    for leftover in library.parent.glob(f"{library.stem}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(".tmp", f"{library.stem}.", library.parent))
    what = "CPU" if toolkit is None else "GPU"
    print(f"compiling the {what} kernels, once for this machine ...", file=sys.stderr, flush=True)
    options = {
        "name": library.stem,
        "sources": [str(path) for path in source_files(part)],
        "extra_cflags": C_FLAGS,
        "extra_ldflags": [] if toolkit is None else link_folder(toolkit, folder),
        "build_directory": str(folder),
        "with_cuda": toolkit is not None,
        "is_python_module": False,
    }
    try:
        compile_apart(None if toolkit is None else str(toolkit.home), options)
        with FileSet() as files:
            shutil.copyfile(folder / library.name, files.add(library))
            sums = sums_text({library.name: sha256(folder / library.name)})
            files.add(library.with_suffix(".sha256")).write_text(sums)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_kept(library: Path) -> bool:
    """Load a library of an earlier run; False where it is not there, or not what was written.

    Raises UserError, for who may write it may have put any code there.
    """
    finish_interrupted(library.parent)
    if not library.exists():
        return False
    require_private(library)
    try:
        # Loading a file that was cut short would end the process by a signal.
        check_sums(library.with_suffix(".sha256"), {library.name})
        torch.ops.load_library(str(library))
    except (UserError, OSError):
        return False
    return True


def build_or_wait(library: Path, part: Part, toolkit: Toolkit | None) -> None:
    """Have the library loaded: by compiling it, or from another process that did meanwhile."""
    failure = library.with_suffix(".log")
    began = time.time()
    with machine_lock(library.with_suffix(".lock")):
        if load_kept(library):
            return
        if failure.exists() and failure.stat().st_mtime >= began:  # failed while this one waited
            raise BuildError(failure.read_text())
        try:
            compile_library(library, part, toolkit)
            torch.ops.load_library(str(library))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            needs = NEEDS if toolkit is None else f"{NEEDS}; compiled with {toolkit.nvcc}"
            message = f"compiling the kernels in {SOURCE_FOLDER} failed ({needs}):\n{error}"
            failure.write_text(message)
            raise BuildError(message) from error


def load_part(part: Part, toolkit: Toolkit | None, cache: Path) -> None:
    """Load one library, compiling it first where needed.

    Safe to call from several processes at once: one compiles, the others wait.

    Raises:
        BuildError: no sources, no compiler, a compiler that fails (its output is shown), or a cache
            that others can write to.
    """
    if not all(path.exists() for path in source_files(part)):
        raise BuildError(f"no kernel sources in {SOURCE_FOLDER}: install finchtune anew")
    with scripts_on_path():
        compiler = compiler_version(os.environ.get("CXX", "c++"))
        if toolkit is not None:
            compiler += compiler_version(str(toolkit.nvcc))
        library = cache / f"{part.name}_{build_key(part, compiler, toolkit)}.so"
        try:
            if not load_kept(library):
                make_private(cache)
                build_or_wait(library, part, toolkit)
        except (UserError, OSError) as error:
            raise BuildError(str(error)) from error


def load_libraries(cache: Path | None = None) -> dict[str, BuildError | None]:
    """Load the operators `torch.ops.finchtune.*` for each type of device that this machine has.

    `cache` is the folder of compiled libraries. Returns None for a device type whose operators
    are loaded, else why they are not; one failure leaves the other library as it is.
    """
    cache = cache or cache_folder()
    outcome: dict[str, BuildError | None] = {"cpu": None}
    if torch.cuda.is_available():
        outcome["cuda"] = None
    for device in outcome:
        try:
            if device == "cuda":
                load_part(GPU, find_toolkit(), cache)
            else:
                load_part(CPU, None, cache)
        except BuildError as error:
            outcome[device] = error
    return outcome
