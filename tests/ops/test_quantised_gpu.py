"""Few rows times codes, and products in fp8, on a GPU."""

import pytest
import torch
from helpers.support import relative_error

from finchtune.adapters import METHODS, AdaptedLinear, QuantisedWeight
from finchtune.adapters.fp8 import can_multiply, fp8_product, fp8_product_back, rounded_rows
from finchtune.adapters.frozen import coded_product
from finchtune.ops.kernels import has_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
CUDA = torch.device("cuda")
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
in_fp8 = pytest.mark.skipif(
    not (torch.cuda.is_available() and can_multiply(torch.device("cuda", 0))),
    reason="needs compute capability 8.9",
)


@pytest.fixture(autouse=True)
def compiled():
    assert has_kernels("cuda")


@every_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8", "fp8_compute"])
@pytest.mark.parametrize("sizes", [(1, 2560, 8960), (3, 96, 37), (8, 8960, 2560)], ids=str)
def test_few_rows_times_codes(kind, dtype, sizes):
    rows, n_in, n_out = sizes
    if kind == "fp8_compute":
        n_in, n_out = -(-n_in // 64) * 64, -(-n_out // 16) * 16  # all that it takes
    # On the CPU, where every machine takes fp8_compute, and moved.
    W = QuantisedWeight(torch.randn(n_out, n_in), kind).to(CUDA)
    x = torch.randn(rows, n_in, device=CUDA).to(dtype)
    y = coded_product(x, W.codes, W.scales, W.form)
    expected = x.double() @ W.dense(torch.float32).double().T
    assert relative_error(y.cpu(), expected.cpu()) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_in_fp8_are_the_cpus(dtype, scaled):
    x, factors = torch.randn(70, 2560).to(dtype), torch.rand(2560) if scaled else None
    plain, plain_scales = rounded_rows(x, factors)
    found, scales = rounded_rows(x.to(CUDA), None if factors is None else factors.to(CUDA))
    assert torch.equal(scales.cpu(), plain_scales)
    assert torch.equal(found.view(torch.uint8).cpu(), plain.view(torch.uint8))


def test_codes_are_turned():
    codes = torch.randint(256, (2560, 8960), dtype=torch.uint8, device=CUDA)
    assert torch.equal(torch.ops.finchtune.turn_bytes(codes), codes.T)


@in_fp8
@every_dtype
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_products_in_fp8_are_the_cpus(dtype, rows):
    """Up to the sums inside the tensor cores, which have fewer bits than fp32."""
    W = torch.randn(2560, 8960)
    own, there = QuantisedWeight(W, "fp8_compute"), QuantisedWeight(W, "fp8_compute", CUDA)
    x, dy = torch.randn(rows, 8960).to(dtype), torch.randn(rows, 2560).to(dtype)
    y = fp8_product(x.to(CUDA), there.codes, there.scales)
    dx = fp8_product_back(dy.to(CUDA), there.codes, there.scales)
    assert y.dtype == dx.dtype == dtype
    assert relative_error(y.cpu(), fp8_product(x, own.codes, own.scales)) < 0.01
    assert relative_error(dx.cpu(), fp8_product_back(dy, own.codes, own.scales)) < 0.005


@in_fp8
@pytest.mark.parametrize(
    ("name", "settings"), [("bone", {"r": 16}), ("bat", {"r": 16}), ("lora", {"r": 8})]
)
def test_layers_in_fp8(name, settings):
    linear = torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    adapter = METHODS[name](256, 128, **settings)
    adapter.init(linear.weight.detach())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 16)
    layer = AdaptedLinear(linear, adapter, "fp8_compute")
    x, dy = torch.randn(70, 256).bfloat16(), torch.randn(70, 128).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        leaf = x.to(device).requires_grad_()
        y = layer(leaf)
        inputs = [leaf, *layer.adapter.parameters()]
        found.append([y, *torch.autograd.grad(y, inputs, dy.to(device))])
    for mine, other in zip(*found, strict=True):
        assert relative_error(other.cpu(), mine) < 0.015
