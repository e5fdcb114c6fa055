"""The C++ and CUDA sources are formatted as .clang-format says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def test_sources_are_formatted() -> None:
    folders = [ROOT / name for name in ("cuda", "scripts", "tests")]
    sources = [path for folder in folders for path in sorted(folder.rglob("*"))]
    sources = [path for path in sources if path.suffix in SUFFIXES]
    assert sources
    program = Path(sys.executable).with_name("clang-format")
    command = [program, "--dry-run", "-Werror", *sources]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
