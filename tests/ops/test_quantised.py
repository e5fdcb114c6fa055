"""The CUDA kernels of quantised weights, emulated: few rows times codes, and products in fp8."""

import itertools

import pytest
import torch
from helpers.elementwise_emulator import cuda_kernels_in_place, emulated_library
from helpers.emulation import ORDERS
from helpers.support import relative_error

from finchtune.adapters import METHODS, AdaptedLinear, QuantisedWeight
from finchtune.adapters.fp8 import rounded_rows
from finchtune.adapters.frozen import coded_product
from finchtune.ops.kernels import cpu_standing_for, kernels_set_aside

KINDS = ("nf4", "fp4", "int8", "fp8", "fp8_compute")
SIZES = [(1, 32, 64), (3, 96, 37), (5, 64, 6), (8, 2272, 10)]
ROW_SIZES = [(1, 64, 64), (3, 128, 48), (8, 2304, 16)]  # that fp8_compute takes
FEW = [(kind, sizes) for kind in KINDS for sizes in (ROW_SIZES if kind == "fp8_compute" else SIZES)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ops = torch.ops.finchtune


@pytest.fixture(autouse=True)
def emulated(kernels):
    with cuda_kernels_in_place("elementwise.cu", "quantised.cu"):
        yield


def few_rows_product(x, W):
    return coded_product(x, W.codes, W.scales, W.form)


@every_dtype
@pytest.mark.parametrize(("kind", "sizes"), FEW, ids=str)
def test_few_rows_times_codes(kind, dtype, sizes):
    """Nearer than with the weight in x's dtype: here it is never rounded to that."""
    rows, n_in, n_out = sizes
    x, W = torch.randn(rows, n_in).to(dtype), QuantisedWeight(torch.randn(n_out, n_in), kind)
    y = few_rows_product(x, W)
    assert y.dtype == dtype
    expected = x.double() @ W.dense(torch.float32).double().T
    assert relative_error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(9, 64), (1, 16), (0, 64)], ids=str)
def test_few_rows_refuse_what_does_not_fit(shape):
    W = QuantisedWeight(torch.randn(4, shape[1]), "int8")
    with pytest.raises(AssertionError, match="error 1"):
        few_rows_product(torch.randn(shape), W)


@every_dtype
@pytest.mark.parametrize("n", [16, 48, 2064])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_in_fp8_are_the_plain_ones(dtype, n, scaled):
    x = torch.randn(7, n).to(dtype) * torch.logspace(-3, 3, 7).unsqueeze(1).to(dtype)
    x[2] = 0
    x[3] *= torch.logspace(-6, 0, n).to(dtype)  # down into what e4m3 has no numbers for
    factors = torch.rand(n) if scaled else None
    codes, scales = ops.fp8_rows(x, factors)
    plain_codes, plain_scales = rounded_rows(x, factors)
    assert torch.equal(scales, plain_scales)
    assert torch.equal(codes.view(torch.uint8), plain_codes.view(torch.uint8))


def test_every_number_becomes_the_nearest_in_fp8():
    """Ties too: the middles between neighbours, and what lies beside them."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (every[1:] + every[:-1]) / 2
    beside = [middles.nextafter(torch.tensor(side)) for side in (0.0, 1e9)]
    x = torch.cat([every, middles, *beside, torch.zeros(7)])
    x = torch.cat([x, -x]).view(1, -1)[:, : 2 * len(x) // 16 * 16]
    x[0, 0] = 448.0  # so that the scale is 1
    codes, scales = ops.fp8_rows(x, None)
    assert scales.item() == 1
    assert torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())


def test_what_is_not_finite_is_seen():
    x = torch.randn(3, 48)
    x[0, 40], x[1, 3] = torch.nan, torch.inf
    _, scales = ops.fp8_rows(x, None)
    assert scales[0].isnan()
    assert scales[1].isinf()
    assert scales[2].isfinite()


@pytest.mark.parametrize("shape", [(16, 16), (48, 64), (64, 80), (208, 144)], ids=str)
def test_codes_are_turned(shape):
    codes = torch.randint(256, shape, dtype=torch.uint8)
    assert torch.equal(ops.turn_bytes(codes), codes.T)


def test_every_thread_schedule_gives_the_same_bits():
    x, library = torch.randn(3, 2304), emulated_library("quantised.cu")
    weights = [QuantisedWeight(torch.randn(16, 2304), kind) for kind in KINDS]
    codes = torch.randint(256, (80, 80), dtype=torch.uint8)
    runs = []
    for order, eager in itertools.product(range(len(ORDERS)), (False, True)):
        library.emulation_configure(order, eager, 1, 8)
        found = [few_rows_product(x, W) for W in weights]
        rounded, scales = ops.fp8_rows(x[:, :2064], None)
        runs.append([*found, rounded.float(), scales, ops.turn_bytes(codes)])
    library.emulation_configure(0, False, 1, 8)
    for run in runs:
        assert all(map(torch.equal, run, runs[0]))


LINEARS = [("bone", {"r": 8}), ("bat", {"r": 8}), ("lora", {"r": 4}), ("pissa", {"r": 4})]


def adapted(name, settings, kind, dtype):
    linear = torch.nn.Linear(128, 32, bias=False, dtype=dtype)
    adapter = METHODS[name](128, 32, **settings)
    adapter.init(linear.weight.detach())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return AdaptedLinear(linear, adapter, kind)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8_compute"])
@pytest.mark.parametrize(("name", "settings"), LINEARS)
def test_layers_of_few_rows_never_rebuild_the_weight(name, settings, kind, monkeypatch):
    """With fp8_compute on a GPU without products in fp8."""
    monkeypatch.setattr("finchtune.adapters.frozen.can_multiply", lambda device: False)
    layer = adapted(name, settings, kind, torch.bfloat16)
    x = torch.randn(3, 1, 128).bfloat16()
    expected = layer(x)
    with cpu_standing_for("cuda"):
        many = layer(torch.cat([x] * 3))  # nine rows
        monkeypatch.delattr("finchtune.adapters.frozen.dequantise")
        few = layer(x)
    assert relative_error(many[:3], expected) < 0.01
    assert relative_error(few, expected) < 0.01


@pytest.mark.parametrize(("name", "settings"), LINEARS)
def test_layers_in_fp8_are_as_without_kernels(name, settings):
    layer = adapted(name, settings, "fp8_compute", torch.bfloat16)
    x = torch.randn(11, 128).bfloat16().requires_grad_()
    inputs, dy = [x, *layer.adapter.parameters()], torch.randn(11, 32).bfloat16()
    with cpu_standing_for("cuda"):
        y = layer(x)
        found = [y, *torch.autograd.grad(y, inputs, dy)]
    with kernels_set_aside():
        plain = layer(x)
        expected = [plain, *torch.autograd.grad(plain, inputs, dy)]
    for mine, other in zip(found, expected, strict=True):
        assert relative_error(mine, other) < 0.01
