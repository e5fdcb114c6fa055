"""How the tests compile CUDA kernels, and for which GPUs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.support import REPOSITORY, run_script

CUDA = Path(__file__).parents[2] / "cuda" / "gpu"

# What torch's extension builder passes: no implicit conversions from and to bf16 and fp16.
TORCH_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
]
# Compute capability -> bytes of shared memory that one thread block may have.
SHARED_LIMIT = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, CUDA's compiler")
every_capability = pytest.mark.parametrize(
    "capability",
    [pytest.param(x, marks=() if x == 90 else pytest.mark.slow) for x in SHARED_LIMIT],
)


def compile_report(source: str, capability: int, folder: Path) -> list[dict]:
    """What ptxas tells of each kernel: its name, the first integer among its template arguments,
    registers, spilled bytes and static shared memory."""
    command = ["nvcc", "-cubin", f"-arch=sm_{capability}", *TORCH_FLAGS, "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", str(CUDA / source), "-o", str(folder / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = []
    for part in result.stderr.split("Compiling entry function ")[1:]:
        spilled = re.search(r"(\d+) bytes spill stores", part)
        static_shared = re.search(r"(\d+) bytes smem", part)
        name = re.match(r"'_ZN\d+[a-z]+\d.*?\d*([a-z][a-z_0-9]*_kernel)", part)
        registers = re.search(r"Used (\d+) registers", part)
        argument = re.search(r"Li(\d+)E", part.split("'", 2)[1])
        kernels.append(
            {
                "name": name[1],
                "spilled": int(spilled[1]),
                "registers": int(registers[1]),
                "shared": int(static_shared[1]) if static_shared else 0,
                "argument": int(argument[1]) if argument else None,
            }
        )
    return kernels


def count_instructions(operator: str, folder: Path) -> dict[str, dict[str, float]]:
    """Of each tensor-core kernel for a chunk, by kind; skips the test where a tool is missing."""
    json_file = folder / "counts.json"
    script = REPOSITORY / "scripts" / "dev" / "count_sass.py"
    done = run_script(script, "--operators", operator, "--json", json_file)
    if done.returncode == 2 and re.search("nvdisasm|nvcc", done.stderr):
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return json.loads(json_file.read_text())["90"]
