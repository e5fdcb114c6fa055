"""Building the kernels: once, by one process, whatever happens to it; and life without a compiler.

Most tests hand the real builder a source file of one line, which compiles in a second.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.support import is_alive

from finchtune.ops.kernels import build
from finchtune.ops.kernels.build import CPU, GPU
from finchtune.ops.kernels.toolkit import BuildError, Toolkit

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
STARTED = "compiling the CPU kernels"
TINY = """
import sys
from pathlib import Path
from finchtune.ops.kernels import build
build.SOURCE_FOLDER = Path(sys.argv[1])
build.load_part(build.CPU, None, Path(sys.argv[2]))
"""


@pytest.fixture
def sources(tmp_path):
    """A folder of sources like cuda/, but quick to compile."""
    folder = tmp_path / "sources"
    for path in {*build.source_files(CPU), *build.source_files(GPU)}:
        copy = folder / path.relative_to(build.SOURCE_FOLDER)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    (folder / "cpu" / "paths.cpp").write_text("int finchtune_test_symbol = 1;\n")
    return folder


def start(*arguments: object, program: str = TINY, **environment: str) -> subprocess.Popen:
    """A fresh Python, with `environment` on top of this one's."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What a process that must succeed wrote to both streams."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


def endless_compiler(folder: Path) -> Path:
    """A compiler that notes its process id and then hangs, except when asked for its version."""
    script = folder / "endless-c++"
    hang = f'case "$*" in *-c*) echo $$ >> {folder}/pids; exec sleep 60;; esac'
    script.write_text(f'#!/bin/sh\n{hang}\nexec c++ "$@"\n')
    script.chmod(0o755)
    return script


@needs_compiler
def test_one_of_several_processes_builds(sources, tmp_path):
    processes = [start(sources, tmp_path / "cache", LOCAL_RANK=str(i)) for i in range(2)]
    said = [finish(process) for process in processes]
    assert sum(text.count(STARTED) for text in said) == 1
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


@needs_compiler
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_build_ends_at_once_and_leaves_no_compiler(sources, tmp_path, number):
    """And holds up nobody."""
    cache, pids = tmp_path / "cache", tmp_path / "pids"
    compiler = endless_compiler(tmp_path)
    killed = start(sources, cache, CXX=str(compiler))
    while not pids.exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(number)
    killed.communicate(timeout=10)
    compilers = [int(pid) for pid in pids.read_text().split()]
    deadline = time.monotonic() + 10
    while any(map(is_alive, compilers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, compilers))
    if number == signal.SIGKILL:
        compiler.write_text('#!/bin/sh\nexec c++ "$@"\n')  # by the same name: the same build
        assert STARTED in finish(start(sources, cache, CXX=str(compiler)))
        assert not list(cache.glob("*.tmp"))


@pytest.mark.slow
@needs_compiler
def test_a_damaged_library_is_compiled_again(sources, tmp_path):
    cache = tmp_path / "cache"
    finish(start(sources, cache))
    (library,) = cache.glob("*.so")
    whole = library.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        library.write_bytes(content)
        assert STARTED in finish(start(sources, cache))
        assert library.stat().st_size > len(whole) // 2
    assert STARTED not in finish(start(sources, cache))
    library.with_suffix(".sha256").unlink()
    assert STARTED in finish(start(sources, cache))


@needs_compiler
def test_what_others_can_write_is_not_loaded(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCE_FOLDER", sources)
    cache = tmp_path / "cache"
    build.load_part(CPU, None, cache)
    (library,) = cache.glob("*.so")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    for place in (library, cache, tmp_path):
        mode = place.stat().st_mode
        place.chmod(0o777)
        with pytest.raises(BuildError, match=f"others can write to {place};"):
            build.load_part(CPU, None, cache)
        place.chmod(mode)
    build.load_part(CPU, None, cache)
    if os.geteuid() == 0:
        os.chown(library, 12345, 12345)
        with pytest.raises(BuildError, match="others can write to"):
            build.load_part(CPU, None, cache)


def test_whatever_the_library_depends_on_makes_a_new_one(sources, monkeypatch):
    monkeypatch.setattr(build, "SOURCE_FOLDER", sources)
    toolkits = [None, Toolkit(Path("/usr/local/cuda"), "9.0"), Toolkit(Path("/opt/cuda"), "9.0")]
    keys = [build.build_key(CPU, "g++ 12", toolkit) for toolkit in toolkits]
    keys.append(build.build_key(CPU, "g++ 13", None))
    (sources / "cpu" / "wkv6.h").write_text("// included by a source, so it counts\n")
    keys.append(build.build_key(CPU, "g++ 12", None))
    assert len(set(keys)) == 5


def test_each_library_depends_on_its_own_sources(sources, monkeypatch):
    monkeypatch.setattr(build, "SOURCE_FOLDER", sources)

    def keys():
        return [build.build_key(part, "g++", None) for part in (CPU, GPU)]

    before = keys()
    (sources / "gpu" / "scan.cuh").write_text("// for the GPU alone\n")
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, False]


@needs_compiler
def test_ninja_is_found_beside_python(sources, tmp_path, monkeypatch, capfd):
    if not (Path(sys.executable).parent / "ninja").exists():
        pytest.skip("needs ninja installed in this Python's environment")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "as", "ld", "sh", "which"):
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setattr(build, "SOURCE_FOLDER", sources)
    monkeypatch.setenv("PATH", str(tools))
    build.load_part(CPU, None, tmp_path / "cache")
    assert STARTED in capfd.readouterr().err
    assert os.environ["PATH"] == str(tools)


@needs_compiler
def test_the_compilers_message_is_shown(sources, tmp_path, monkeypatch):
    (sources / "cpu/paths.cpp").write_text("#error what the compiler says\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", sources)
    with pytest.raises(BuildError, match="what the compiler says"):
        build.load_part(CPU, None, tmp_path / "cache")


def test_waiting_processes_share_a_failure(tmp_path, capfd):
    """Eight ranks must not compile the same broken source one after the other."""
    library = tmp_path / "library.so"
    with ThreadPoolExecutor() as pool:
        with build.machine_lock(library.with_suffix(".lock")):
            waiting = pool.submit(build.build_or_wait, library, CPU, None)
            time.sleep(0.3)  # now it stands before the lock
            library.with_suffix(".log").write_text("the failure of another")
        with pytest.raises(BuildError, match="the failure of another"):
            waiting.result(timeout=30)
    assert STARTED not in capfd.readouterr().err


def test_no_sources_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path)
    with pytest.raises(BuildError, match="install finchtune anew"):
        build.load_part(CPU, None, tmp_path / "cache")


FALLBACK = """
import torch
from finchtune.ops.wkv6 import wkv6, wkv6_reference
r, k, v, w = torch.randn(4, 1, 9, 2, 8).unbind()
u = torch.randn(2, 8)
for _ in range(3):
    torch.testing.assert_close(wkv6(r, k, v, w, u), wkv6_reference(r, k, v, w, u))
"""


def test_without_a_compiler_one_warning_and_plain_torch(tmp_path):
    said = finish(start(program=FALLBACK, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path)))
    assert said.count("UserWarning") == 1
    assert "apt install g++" in said


def test_importing_builds_nothing(tmp_path):
    program = "import finchtune, finchtune.ops.wkv6, finchtune.ops.kernels"
    finish(start(program=program, XDG_CACHE_HOME=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.slow
def test_two_ranks_build_the_kernels_and_use_them(tmp_path):
    ranks = [
        start(program=FALLBACK, XDG_CACHE_HOME=str(tmp_path), RANK=str(i), LOCAL_RANK=str(i))
        for i in range(2)
    ]
    said = "".join(finish(process) for process in ranks)
    assert said.count(STARTED) == 1
    assert "Warning" not in said
