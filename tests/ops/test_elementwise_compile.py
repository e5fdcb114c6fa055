"""The CUDA kernels beside WKV compile for every GPU they are for, without spilling."""

import pytest
from helpers.nvcc import compile_report, every_capability, needs_nvcc

THREE_BLOCKS = 168  # three thread blocks of 128 threads share a multiprocessor's 65,536
MOST_REGISTERS = {"elementwise.cu": THREE_BLOCKS, "heads.cu": THREE_BLOCKS, "norm.cu": 64}
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
    "norm.cu": {"added_norm", "added_norm_backward", "added_norm_weight", "sum_parts"},
    "quantised.cu": {"coded_product", "fp8_rows", "sum_parts", "turn_bytes"},
}


@needs_nvcc
@every_capability
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_fit(source, capability, tmp_path):
    kernels = compile_report(source, capability, tmp_path)
    assert {kernel["name"].removesuffix("_kernel") for kernel in kernels} == KERNELS[source]
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        if source in MOST_REGISTERS:
            assert kernel["registers"] <= MOST_REGISTERS[source], kernel
