"""`wkv7` on a GPU, through the binding and its autograd function, against float64 autograd."""

import pytest
import torch
from helpers.wkv import errors, evaluate, rms
from helpers.wkv7_cases import NAMES, REGIMES, in_dtype, make_inputs

from finchtune.ops.wkv7 import wkv7, wkv7_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(inputs):
    return [x.cuda() for x in inputs]


@pytest.mark.parametrize("N", [16, 64, 128])
@pytest.mark.parametrize("T", [1, 17, 203])
def test_fp32(T, N):
    inputs = on_gpu(make_inputs("typical", 2, T, 2, N))
    exact = evaluate(wkv7_reference, inputs)
    found = errors(NAMES, evaluate(wkv7, in_dtype(inputs, torch.float32)), exact)
    assert max(found.values()) <= 3e-6, found


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("B", "T", "H"), [(2, 17, 2), (2, 64, 3), (1, 203, 2), (6, 70, 60)])
def test_tensor_cores(B, T, H, regime):
    inputs = in_dtype(on_gpu(make_inputs(regime, B, T, H, 64)), torch.bfloat16)
    exact = evaluate(wkv7_reference, [x.double() for x in inputs])
    found = rms(NAMES, evaluate(wkv7, inputs), exact)
    assert max(found.values()) <= 6e-3, found


def test_the_same_inputs_give_the_same_bits():
    inputs = in_dtype(on_gpu(make_inputs("typical", 4, 150, 60, 64)), torch.bfloat16)
    for first, second in zip(evaluate(wkv7, inputs), evaluate(wkv7, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_sequences_in_low_precision(dtype):
    cu_seqlens = torch.tensor([0, 70, 71, 71, 200], dtype=torch.int32, device="cuda")
    inputs = in_dtype(on_gpu(make_inputs("typical", 1, 200, 2, 64, n_sequences=4)), dtype)
    exact = evaluate(wkv7_reference, [x.double() for x in inputs], cu_seqlens)
    found = rms(NAMES, evaluate(wkv7, inputs, cu_seqlens), exact)
    assert max(found.values()) <= 6e-3, found
