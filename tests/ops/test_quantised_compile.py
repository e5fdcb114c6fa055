"""The CUDA kernels of quantised weights compile for every GPU they are for, without spilling."""

from helpers.nvcc import compile_report, every_capability, needs_nvcc

KERNELS = {"coded_product", "fp8_rows", "sum_parts", "turn_bytes"}


@needs_nvcc
@every_capability
def test_kernels_fit(capability, tmp_path):
    kernels = compile_report("quantised.cu", capability, tmp_path)
    assert {kernel["name"].removesuffix("_kernel") for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
