"""WKV7's CUDA kernels compile for every GPU they are for, within its registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.nvcc import QUICK, SHARED_LIMIT, TORCH_FLAGS

SOURCE = Path(__file__).parents[3] / "cuda" / "gpu" / "wkv7.cu"
# Elements of a row in a thread -> bytes spilled. 512 threads hold the largest matrices, with 128
# registers each.
SPILL_LIMIT = {16: 32, 32: 1100}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, CUDA's compiler")
@pytest.mark.parametrize(
    "capability",
    [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in SHARED_LIMIT],
)
def test_kernels_fit(capability, tmp_path):
    command = ["nvcc", "-cubin", f"-arch=sm_{capability}", *TORCH_FLAGS, "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", str(SOURCE), "-o", str(tmp_path / "wkv7.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = result.stderr.split("Compiling entry function ")[1:]
    assert len(kernels) == 2 * 2 * 3  # forward and backward, few and many elements, dtypes
    for part in kernels:
        elements = int(re.search(r"Li(16|32)E", part)[1])
        spilled = int(re.search(r"(\d+) bytes spill stores", part)[1])
        assert spilled <= SPILL_LIMIT[elements], part
