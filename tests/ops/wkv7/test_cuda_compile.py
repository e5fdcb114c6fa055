"""WKV7's CUDA kernels compile for every GPU they are for, within its registers."""

from helpers.nvcc import compile_report, count_instructions, every_capability, needs_nvcc

KERNELS = {
    "chunk_forward_kernel": 1,
    "chunk_backward_kernel": 1,
    "scan_forward_kernel": 2 * 3,  # few and many elements in a thread, dtypes
    "scan_backward_kernel": 2 * 3,
}
# Of a multiprocessor's 65,536: four and two thread blocks of 128 threads.
REGISTER_LIMIT = {"chunk_forward_kernel": 128, "chunk_backward_kernel": 255}
SPILL_LIMIT = 32
# Instructions of a warp for one chunk on compute capability 9.0.
INSTRUCTION_LIMIT = {"chunk_forward_kernel": 2600, "chunk_backward_kernel": 8900}
# 512 threads hold the largest matrices, 32 elements each, with 128 registers each.
SPILL_LIMIT_OF_MANY = 1100


@needs_nvcc
@every_capability
def test_kernels_fit(capability, tmp_path):
    """Their dynamic shared memory is not in the report: wkv7.cu itself asserts it."""
    kernels = compile_report("wkv7.cu", capability, tmp_path)
    names = [kernel["name"] for kernel in kernels]
    assert {name: names.count(name) for name in names} == KERNELS
    for kernel in kernels:
        few = kernel["argument"] != 32
        assert kernel["spilled"] <= (SPILL_LIMIT if few else SPILL_LIMIT_OF_MANY), kernel
        assert kernel["registers"] <= REGISTER_LIMIT.get(kernel["name"], 255), kernel


def test_instructions_of_a_chunk(tmp_path):
    counts = count_instructions("wkv7", tmp_path)
    assert counts["chunk_forward_kernel"]["tensor core"] == 186
    assert counts["chunk_backward_kernel"]["tensor core"] == 728
    for kernel, limit in INSTRUCTION_LIMIT.items():
        assert 0.6 * limit < counts[kernel]["all"] <= limit, counts
