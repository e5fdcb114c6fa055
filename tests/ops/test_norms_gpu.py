"""Layer norm joined with the sum before it, on a GPU, against float64."""

import pytest
import torch
from helpers.elementwise_cases import outputs_and_gradients

from finchtune.ops.elementwise import AddedNorm
from finchtune.ops.kernels import fits, kernels_set_aside

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def error(found, true):
    return ((found.double() - true).norm() / true.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", [45, 2560, 4096])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_as_near_to_the_truth_as_torch(C, dtype, trained, summed):
    def function(x, y, weight, bias):
        norm = AddedNorm(C, device="meta")
        del norm.weight, norm.bias  # the leaves themselves take their place
        norm.weight, norm.bias = weight, bias
        return norm(x, y if summed else None)

    leaves = [torch.randn(3, 70, C) + 3, torch.randn(3, 70, C), torch.randn(C), torch.randn(C)]
    leaves = [x.to("cuda", dtype).requires_grad_() for x in leaves]
    leaves[1].requires_grad_(summed)
    for weight in leaves[2:]:
        weight.requires_grad_(trained)
    assert fits(*leaves)
    ours = outputs_and_gradients(function, leaves)
    with kernels_set_aside():
        plain = outputs_and_gradients(function, leaves)
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
        truth = outputs_and_gradients(function, exact)
    for mine, other, true in zip(ours, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert error(mine, true) <= 2 * error(other, true) + 4 * torch.finfo(dtype).eps
