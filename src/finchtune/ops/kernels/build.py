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
from pathlib import Path

import torch

from finchtune.files import cache_folder

SOURCE_FOLDER = Path(__file__).parents[4] / "cuda"
SOURCES = [
    "operators/wkv6.cpp",
    "operators/cpu.cpp",
    "operators/adapters.cpp",
    "operators/block.cpp",
    "cpu/paths.cpp",
]
C_FLAGS = ["-O3", "-fopenmp"]
NEEDS = "install g++ and ninja (apt install g++; pip install ninja)"


class BuildError(RuntimeError):
    """The kernels cannot be had here; the message says why and what to install."""


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


def cuda_target() -> str | None:
    """The GPU architectures to compile for; None, for a build without CUDA: no GPU or no nvcc."""
    if not torch.cuda.is_available():
        return None
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        return None
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    seen = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or seen


def source_files(target: str | None) -> list[Path]:
    """The files to compile."""
    names = SOURCES + ([] if target is None else ["gpu/wkv6.cu"])
    return [SOURCE_FOLDER / name for name in names]


def build_key(compiler: str, target: str | None) -> str:
    """A digest of everything that the compiled library depends on."""
    digest = hashlib.sha256()
    for path in sorted(p for p in SOURCE_FOLDER.rglob("*") if p.is_file() and p.suffix != ".md"):
        name = str(path.relative_to(SOURCE_FOLDER))
        digest.update(name.encode() + b"\0" + path.read_bytes())
    facts = [torch.__version__, platform.machine(), compiler, *C_FLAGS, f"CUDA: {target}"]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def machine_lock(path: Path) -> Iterator[None]:
    """One process at a time. The system drops the lock of a killed process, so none goes stale."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_and_load(library: Path, target: str | None) -> None:
    """Compile in a fresh folder, load, and move the finished library to its place in one step."""
    from torch.utils import cpp_extension  # slow to import, so only where it is needed

    for leftover in library.parent.glob(f"{library.stem}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(".tmp", f"{library.stem}.", library.parent))
    print("compiling the kernels, once for this machine ...", file=sys.stderr, flush=True)
    try:
        cpp_extension.load(
            name=library.stem,
            sources=[str(path) for path in source_files(target)],
            extra_cflags=C_FLAGS + ([] if target is None else ["-DFINCHTUNE_CUDA"]),
            build_directory=str(folder),
            with_cuda=target is not None,
            is_python_module=False,
        )
        os.replace(folder / library.name, library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_or_wait(library: Path, target: str | None) -> None:
    """Have the library loaded: by compiling it, or from another process that did meanwhile."""
    failure = library.with_suffix(".log")
    began = time.time()
    with machine_lock(library.with_suffix(".lock")):
        if library.exists():
            torch.ops.load_library(str(library))
            return
        if failure.exists() and failure.stat().st_mtime >= began:  # failed while this one waited
            raise BuildError(failure.read_text())
        try:
            compile_and_load(library, target)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            message = f"compiling the kernels in {SOURCE_FOLDER} failed ({NEEDS}):\n{error}"
            failure.write_text(message)
            raise BuildError(message) from error


def load_library(cache: Path | None = None) -> bool:
    """Load the operators `torch.ops.finchtune.*`, compiling them first where needed.

    Safe to call from several processes at once: one compiles, the others wait. `cache` is the
    folder of compiled libraries. Returns whether the GPU kernels are in it.

    Raises:
        BuildError: no sources, no compiler, or a compiler that fails (its output is shown).
    """
    target = cuda_target()
    if not all(path.exists() for path in source_files(target)):
        raise BuildError(f"no kernel sources in {SOURCE_FOLDER}: install from a clone, pip -e")
    cache = cache or cache_folder()
    with scripts_on_path():
        compiler = compiler_version(os.environ.get("CXX", "c++"))
        library = cache / f"finchtune_kernels_{build_key(compiler, target)}.so"
        if library.exists():
            torch.ops.load_library(str(library))
        else:
            cache.mkdir(parents=True, exist_ok=True)
            build_or_wait(library, target)
    return target is not None
