"""The CUDA kernels compile for every GPU they are for, within its registers and shared memory."""

import subprocess
from pathlib import Path

from helpers.nvcc import (
    SHARED_LIMIT,
    compile_report,
    count_instructions,
    every_capability,
    needs_nvcc,
)

SOURCE = Path(__file__).parents[3] / "cuda" / "gpu" / "wkv6.cu"
# Several thread blocks share a multiprocessor's registers; a few values that are used once for each
# chunk may then lie in local memory.
SPILL_LIMIT = 32
# Of a multiprocessor's 65,536: four and three thread blocks of 128 threads.
REGISTER_LIMIT = {"forward_kernel": 128, "backward_kernel": 168, "segment_kernel": 128}
# Instructions of a warp for one chunk on compute capability 9.0.
INSTRUCTION_LIMIT = {"forward_kernel": 2300, "backward_kernel": 5700}
KERNELS = {
    "forward_kernel": 1,
    "backward_kernel": 1,
    "segment_kernel": 2,  # forward and backward
    "join_kernel": 2,
    "sum_kernel": 1,
    "scan_forward_kernel": 3,  # one for each dtype
    "scan_backward_kernel": 3,
}


@needs_nvcc
@every_capability
def test_kernels_fit(capability, tmp_path):
    """Their dynamic shared memory is not in the report: wkv6.cu itself asserts it."""
    kernels = compile_report("wkv6.cu", capability, tmp_path)
    names = [kernel["name"] for kernel in kernels]
    assert {name: names.count(name) for name in names} == KERNELS
    for kernel in kernels:
        assert kernel["spilled"] <= SPILL_LIMIT, kernel
        assert kernel["registers"] <= REGISTER_LIMIT.get(kernel["name"], 255), kernel
    assert all(kernel["shared"] <= SHARED_LIMIT[capability] for kernel in kernels), kernels


def test_instructions_of_a_chunk(tmp_path):
    """Their issue is what limits the tensor-core kernels."""
    counts = count_instructions("wkv6", tmp_path)
    assert counts["forward_kernel"]["tensor core"] == 88
    assert counts["backward_kernel"]["tensor core"] == 224
    for kernel, limit in INSTRUCTION_LIMIT.items():
        assert 0.6 * limit < counts[kernel]["all"] <= limit, counts


def test_header_is_plain_c(tmp_path):
    source = tmp_path / "only_header.c"
    source.write_text('#include "wkv6.h"\n')
    command = ["gcc", "-std=c99", "-Wall", "-Werror", "-fsyntax-only", f"-I{SOURCE.parent}", source]
    subprocess.run(command, check=True)
