"""The CUDA kernels of layer norm compile for every GPU they are for, without spilling."""

from helpers.nvcc import compile_report, every_capability, needs_nvcc

KERNELS = {"added_norm", "added_norm_backward", "added_norm_weight", "sum_parts"}


@needs_nvcc
@every_capability
def test_kernels_fit(capability, tmp_path):
    kernels = compile_report("norm.cu", capability, tmp_path)
    assert {kernel["name"].removesuffix("_kernel") for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] <= 64, kernel
