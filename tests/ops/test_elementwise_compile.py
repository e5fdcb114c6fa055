"""The element-wise CUDA kernels compile for every GPU they are for, without spilling."""

import pytest
from helpers.nvcc import compile_report, every_capability, needs_nvcc

MOST_REGISTERS = 168  # three thread blocks of 128 threads share a multiprocessor's 65,536
KERNELS = {
    "elementwise.cu": {
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
    },
    "heads.cu": {
        "bonus_norm",
        "bonus_norm_backward",
        "head_weights",
        "sum_parts",
        "wkv7_inputs",
        "wkv7_inputs_backward",
    },
}


@needs_nvcc
@every_capability
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_fit(source, capability, tmp_path):
    kernels = compile_report(source, capability, tmp_path)
    assert {kernel["name"].removesuffix("_kernel") for kernel in kernels} == KERNELS[source]
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] <= MOST_REGISTERS, kernel
