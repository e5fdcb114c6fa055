"""Element-wise parts, adapters' linears, unpacking and the loss on a GPU, against float64."""

import pytest
import torch
from helpers.elementwise_cases import CASES, outputs_and_gradients

from finchtune.adapters import QuantisedWeight
from finchtune.adapters.methods.bat import BatRow
from finchtune.adapters.methods.bone import BoneLinear
from finchtune.ops.cross_entropy import cross_entropy_sum
from finchtune.ops.kernels import fits, has_kernels, kernels_set_aside

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def exact_products():
    assert has_kernels("cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def error(found, true):
    return ((found.double() - true).norm() / true.norm().clamp_min(1e-30)).item()


def check(function, inputs, dtype):
    """By the kernels no worse than twice as far from float64 as plain torch."""
    leaves = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    assert fits(*leaves)
    ours = outputs_and_gradients(function, leaves)
    with kernels_set_aside():
        plain = outputs_and_gradients(function, leaves)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        truth = outputs_and_gradients(function, exact)
    for mine, other, true in zip(ours, plain, truth, strict=True):
        assert mine.dtype == dtype
        assert error(mine, true) <= 2 * error(other, true) + 4 * torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("case", [case for case in CASES if "packed" not in case])
def test_element_wise_parts(case, dtype):
    function, shapes = CASES[case]
    check(function, [torch.randn(shape) for shape in shapes], dtype)


@every_dtype
@pytest.mark.parametrize(("linear", "shape"), [(BoneLinear, (32, 192)), (BatRow, (4, 32, 32))])
def test_linears_with_adapters(linear, shape, dtype):
    W = (torch.randn(192, 128) / 11).to("cuda", dtype)

    def function(x, D):
        y = linear.apply(x, D, W.to(x.dtype), None, None)
        return y[0] if linear is BoneLinear else y

    check(function, [torch.randn(70, 128), 0.1 * torch.randn(shape)], dtype)


@every_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
def test_quantised_weights_are_the_cpus(kind, dtype):
    W = torch.randn(300, 200)
    own, there = QuantisedWeight(W, kind), QuantisedWeight(W, kind, torch.device("cuda"))
    assert torch.equal(own.codes, there.codes.cpu())
    assert torch.equal(own.scales, there.scales.cpu())
    assert torch.equal(own.dense(dtype), there.dense(dtype).cpu())


@every_dtype
def test_the_loss(dtype):
    hidden, weight = torch.randn(70, 64, device="cuda"), torch.randn(3001, 64, device="cuda")
    labels = torch.randint(3001, (70,), device="cuda")
    labels[3:9] = -100
    found = []
    for kind in (dtype, torch.float64):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in (hidden, weight)]
        loss = cross_entropy_sum(*leaves, labels)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for mine, true in zip(*found, strict=True):
        assert error(mine, true) <= 16 * torch.finfo(dtype).eps
