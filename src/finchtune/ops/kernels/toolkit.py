"""Where CUDA's compiler and headers are, and which GPUs to compile for."""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

INSTALLED = [Path("/usr/local"), Path("/opt")]  # the folders that hold a cuda or cuda-VERSION
WHEELS = "pip install nvidia-cuda-nvcc=={}.*"  # brings the headers too


class BuildError(RuntimeError):
    """The kernels cannot be had here; the message says why and what to install."""


@dataclass(frozen=True)
class Toolkit:
    """A folder with both bin/nvcc and include/cuda_runtime.h, and the architectures wanted."""

    home: Path
    architectures: str  # as in TORCH_CUDA_ARCH_LIST

    @property
    def nvcc(self) -> Path:
        """The compiler itself, not a wrapper elsewhere on the PATH."""
        return self.home / "bin" / "nvcc"

    def libraries(self) -> list[Path]:
        """Files of the CUDA runtime library, the one that a linker finds by name first."""
        folders = (self.home / name for name in ("lib64", "lib"))
        return sorted(path for folder in folders for path in folder.glob("libcudart.so*"))


def candidate_homes() -> Iterator[Path]:
    """Folders that may hold a CUDA toolkit: what the user names, the PATH, usual places, wheels."""
    yield from (Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ)
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        nvcc = shutil.which("nvcc", path=folder) if folder else None
        if nvcc is not None:
            yield from (Path(nvcc).parents[1], Path(nvcc).resolve().parents[1])
    for parent in INSTALLED:
        yield parent / "cuda"
        yield from sorted(parent.glob("cuda-*"), reverse=True)
    wheels = importlib.util.find_spec("nvidia")
    for location in (wheels and wheels.submodule_search_locations) or []:
        yield from sorted(Path(location).glob("cu[0-9]*"), reverse=True)


def version_of(home: Path) -> str | None:
    """The version of the headers in this folder, "13.0"; None where there are none."""
    header = home / "include" / "cuda_runtime_api.h"
    if not (home / "include" / "cuda_runtime.h").exists() or not header.exists():
        return None
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else None


def fits_torch(version: str) -> bool:
    """Whether torch can be extended with this version: it has to agree in the first number."""
    own = torch.version.cuda
    return own is None or own.split(".")[0] == version.split(".")[0]


def cuda_home() -> Path:
    """The folder with nvcc and the headers that fit torch's version of CUDA.

    Raises:
        BuildError: none does; the message names those that come near, and the remedy.
    """
    rejected = []
    for home in dict.fromkeys(candidate_homes()):
        version = version_of(home)
        compiler = os.access(home / "bin" / "nvcc", os.X_OK)
        if compiler and version is not None and fits_torch(version):
            return home
        if version is not None:
            missing = "no bin/nvcc" if not compiler else f"version {version}"
            rejected.append(f"{home} ({missing})")
        elif compiler:
            rejected.append(f"{home} (no include/cuda_runtime.h)")
    wanted = torch.version.cuda or "13.0"
    near = f"; unsuitable: {', '.join(rejected)}" if rejected else ""
    raise BuildError(
        f"no CUDA {wanted} compiler and headers were found{near}. Install them "
        f"({WHEELS.format(wanted)}), or set CUDA_HOME to the folder that holds bin/nvcc and "
        "include/cuda_runtime.h"
    )


def find_toolkit() -> Toolkit:
    """The toolkit for this machine's GPUs, or for the architectures in TORCH_CUDA_ARCH_LIST."""
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    seen = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    return Toolkit(cuda_home(), os.environ.get("TORCH_CUDA_ARCH_LIST") or seen)
