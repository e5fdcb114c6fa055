"""The element-wise CUDA kernels compile for every GPU they are for, without spilling."""

from helpers.nvcc import compile_report, every_capability, needs_nvcc

MOST_REGISTERS = 168  # three thread blocks of 128 threads share a multiprocessor's 65,536
KERNELS = {
    "cross_entropy",
    "elements",
    "gated_norm",
    "gated_norm_backward",
    "norm_weight",
    "shard_sums",
    "shift_backward",
    "spread",
    "sum_parts",
    "token_mix",
    "token_mix_backward",
    "unpack",
}


@needs_nvcc
@every_capability
def test_kernels_fit(capability, tmp_path):
    kernels = compile_report("elementwise.cu", capability, tmp_path)
    assert {kernel["name"].removesuffix("_kernel") for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] <= MOST_REGISTERS, kernel
