"""Finding CUDA's compiler and headers, and what happens to both libraries without them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finchtune.ops.kernels import build, operators, toolkit
from finchtune.ops.kernels.build import CPU, GPU
from finchtune.ops.kernels.toolkit import BuildError, Toolkit, cuda_home

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def real_toolkit() -> Toolkit | None:
    try:
        return Toolkit(cuda_home(), "9.0")
    except BuildError:
        return None


needs_nvcc = pytest.mark.skipif(real_toolkit() is None, reason="needs nvcc, CUDA's compiler")


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without any CUDA, for torch built for CUDA 13; its PATH is the folder `bin`."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolkit, "INSTALLED", [tmp_path / "installed"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    return tmp_path


def make_home(home: Path, version: int | None = 13000, nvcc: str | None = "exit 0") -> Path:
    """A folder like a CUDA toolkit: with headers of this version, with this script as nvcc."""
    if version is not None:
        (home / "include").mkdir(parents=True)
        (home / "include" / "cuda_runtime.h").touch()
        (home / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    if nvcc is not None:
        make_program(home / "bin" / "nvcc", nvcc)
    return home


def make_program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_wrapper_on_the_path_does_not_hide_the_toolkit(nowhere):
    home = make_home(nowhere / "installed" / "cuda-13.0")
    make_program(nowhere / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert cuda_home() == home


def test_a_link_on_the_path_leads_to_its_toolkit(nowhere):
    home = make_home(nowhere / "elsewhere" / "cuda")
    (nowhere / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert cuda_home() == home


def test_a_named_folder_without_headers_is_passed_over(nowhere, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(make_home(nowhere / "bare", version=None)))
    with pytest.raises(BuildError, match=r"bare \(no include/cuda_runtime.h\)"):
        cuda_home()
    home = make_home(nowhere / "installed" / "cuda")
    assert cuda_home() == home


def test_the_named_folder_comes_first(nowhere, monkeypatch):
    make_home(nowhere / "installed" / "cuda")
    named = make_home(nowhere / "named")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert cuda_home() == named


def test_wheels_of_nvidia_are_found(nowhere):
    make_home(nowhere / "site" / "nvidia" / "cu12", version=12080)
    home = make_home(nowhere / "site" / "nvidia" / "cu13")
    assert cuda_home() == home


def test_another_version_is_refused_and_named(nowhere):
    make_home(nowhere / "installed" / "cuda-12.4", version=12040)
    make_home(nowhere / "installed" / "cuda", nvcc=None)
    with pytest.raises(BuildError) as raised:
        cuda_home()
    assert "cuda-12.4 (version 12.4)" in str(raised.value)
    assert "cuda (no bin/nvcc)" in str(raised.value)
    assert "pip install nvidia-cuda-nvcc==13.0.*" in str(raised.value)
    assert "CUDA_HOME" in str(raised.value)


def test_the_runtime_library_of_wheels_is_linked_by_its_version(tmp_path):
    home = tmp_path / "cu13"
    (home / "lib").mkdir(parents=True)
    (home / "lib" / "libcudart.so.13").touch()
    assert build.link_folder(Toolkit(home, "9.0"), tmp_path) == [f"-L{tmp_path}"]
    assert (tmp_path / "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"
    (home / "lib" / "libcudart.so").touch()
    assert build.link_folder(Toolkit(home, "9.0"), tmp_path) == []


@pytest.fixture
def tiny_sources(tmp_path, monkeypatch):
    """Sources that compile in a second; torch says that there is a GPU."""
    folder = tmp_path / "sources"
    for path in {*build.source_files(CPU), *build.source_files(GPU)}:
        copy = folder / path.relative_to(build.SOURCE_FOLDER)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    # Torch counts the builds of one name in a process: each test's has a name of its own.
    (folder / "operators" / "schemas.cpp").write_text(f"// {tmp_path}\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    return folder


def hide_toolkits(monkeypatch, tmp_path):
    """As `nowhere`, with the PATH as it is but for folders with an nvcc."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folders = [x for x in os.environ["PATH"].split(os.pathsep) if not Path(x, "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setattr(toolkit, "INSTALLED", [tmp_path / "installed"])


@needs_compiler
@pytest.mark.parametrize(
    "nvcc", [None, "echo release 13.0; case $1 in --version) ;; *) exit 1; esac"]
)
def test_the_cpu_part_survives_the_gpu_part(tiny_sources, tmp_path, monkeypatch, nvcc):
    """Without nvcc, and with one that fails."""
    hide_toolkits(monkeypatch, tmp_path)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    if nvcc is not None:
        make_home(tmp_path / "installed" / "cuda", nvcc=nvcc)
    outcome = build.load_libraries(tmp_path / "cache")
    assert outcome["cpu"] is None
    assert "nvcc" in str(outcome["cuda"])


@needs_compiler
@needs_nvcc
def test_the_gpu_part_survives_the_cpu_part(tiny_sources, tmp_path, monkeypatch):
    """Its command is nvcc's, for exactly the architectures asked for."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    (tiny_sources / "cpu" / "paths.cpp").write_text("#error not on this machine\n")
    (tiny_sources / "gpu" / "wkv6.cu").write_text("#error so that the command is shown\n")
    outcome = build.load_libraries(tmp_path / "cache")
    assert "not on this machine" in str(outcome["cpu"])
    commands = re.findall(r"^\S*nvcc .*wkv6\.cu .*$", str(outcome["cuda"]), re.MULTILINE)
    assert len(commands) == 1
    assert set(re.findall(r"arch=(\w+),code=(\w+)", commands[0])) == {
        ("compute_80", "sm_80"),
        ("compute_90", "sm_90"),
        ("compute_90", "compute_90"),
    }


@pytest.mark.parametrize("fla", [False, True])
def test_the_advice_names_both_remedies(monkeypatch, fla):
    monkeypatch.setattr(operators, "find_spec", lambda name: name if fla else None)
    error = BuildError("no CUDA 13.0 compiler: pip install nvidia-cuda-nvcc")
    with pytest.warns(UserWarning, match="nvidia-cuda-nvcc") as warned:
        operators.warn_of({"cuda": error})
    said = str(warned[0].message)
    assert ("pip install flash-linear-attention" in said) == (not fla)
    assert ("plain torch" in said) == (not fla)


@needs_compiler
@needs_nvcc
@pytest.mark.slow
def test_the_cuda_binding_compiles(tmp_path):
    from torch.utils import cpp_extension

    home = real_toolkit().home
    # Torch for the CPU ships its CUDA headers, but not this generated one.
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.touch()
    # Torch 2.11 builds extensions as C++17, later ones as C++20.
    command = ["c++", "-fsyntax-only", "-std=c++17", "-I", str(tmp_path)]
    for folder in [*cpp_extension.include_paths(), str(home / "include")]:
        command += ["-isystem", folder]
    for source in build.source_files(GPU):
        if source.suffix == ".cpp":
            result = subprocess.run([*command, str(source)], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
