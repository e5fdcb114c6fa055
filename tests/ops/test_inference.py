"""The operators that only inference calls, in every form of the CPU kernels."""

import pytest
import torch
from helpers.support import cpu_path_in_use, relative_error

from finchtune.adapters.quantise import QuantisedWeight, code_table
from finchtune.ops.wkv6 import wkv6_reference

pytestmark = pytest.mark.usefixtures("kernels")
PATHS = ["avx512", "avx2", "portable"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ACTIVATIONS = {0: lambda x: x, 1: torch.tanh, 2: lambda x: torch.relu(x).square()}


@pytest.fixture(params=PATHS)
def path(request):
    with cpu_path_in_use(request.param):
        yield request.param


def products(x, W, activation=0):
    return torch.ops.finchtune.products([x], [W], [activation])[0]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(1, 64, 64), (3, 45, 37), (7, 200, 100), (130, 96, 50)])
def test_products_equal_their_definition(dtype, activation, sizes):
    rows, n_in, n_out = sizes
    x, W = torch.randn(rows, n_in).to(dtype), torch.randn(n_out, n_in).div(n_in**0.5).to(dtype)
    expected = ACTIVATIONS[activation](x.double() @ W.double().T)
    assert relative_error(products(x, W, activation), expected) < TOLERANCE[dtype]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_of_a_product_depends_on_no_other(dtype):
    """To the last bit, whatever the number of rows and threads."""
    x, W = torch.randn(70, 333).to(dtype), torch.randn(77, 333).to(dtype)
    whole = products(x, W)
    for rows in (1, 2, 3, 4, 6, 17):
        assert torch.equal(torch.cat([products(part, W) for part in x.split(rows)]), whole)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    threaded = products(x, W)
    torch.set_num_threads(before)
    assert torch.equal(threaded, whole)


def test_products_in_one_call_are_those_one_by_one():
    x = torch.randn(5, 96)
    inputs = [x[:, :32], torch.randn(2, 40), x]  # the first not dense
    weights = [
        torch.randn(out, part.shape[1]) for out, part in zip((33, 7, 100), inputs, strict=True)
    ]
    together = torch.ops.finchtune.products(inputs, weights, [1, 0, 2])
    for y, part, W, activation in zip(together, inputs, weights, (1, 0, 2), strict=True):
        assert torch.equal(y, products(part.contiguous(), W, activation))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(1, 64, 64), (3, 45, 37), (70, 200, 100)], ids=str)
def test_products_with_codes_are_those_with_the_weight_they_stand_for(kind, dtype, sizes):
    """To the last bit, whatever the number of rows and threads."""
    rows, n_in, n_out = sizes
    x, W = torch.randn(rows, n_in).to(dtype), QuantisedWeight(torch.randn(n_out, n_in), kind)
    scales, table = W.scales.view(torch.float32), code_table(kind)
    dense = W.dense(dtype)
    for activation in ACTIVATIONS:
        found = torch.ops.finchtune.coded_product(x, W.codes, scales, table, n_out, activation)
        assert torch.equal(found, products(x, dense, activation))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    threaded = torch.ops.finchtune.coded_product(x[:1], W.codes, scales, table, n_out, activation)
    torch.set_num_threads(before)
    assert torch.equal(threaded, found[:1])


@pytest.mark.parametrize("change", ["codes", "scales", "table"])
def test_products_with_codes_refuse_what_does_not_fit(change):
    W = QuantisedWeight(torch.randn(8, 64), "nf4")
    given = {
        "codes": W.codes,
        "scales": W.scales.view(torch.float32),
        "table": code_table("nf4"),
    }
    given[change] = given[change][1:]
    with pytest.raises(RuntimeError, match=f"coded_product: (the )?{change}"):
        torch.ops.finchtune.coded_product(torch.randn(1, 64), *given.values(), 8, 0)


def test_tanh_is_precise_near_zero_and_saturates():
    x = torch.tensor([[1e-6], [-1e-6], [1e-3], [0.0], [30.0], [-100.0], [float("nan")]])
    y = products(x, torch.ones(1, 1), activation=1)
    assert torch.allclose(y, torch.tanh(x), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "W", "activation"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), 0),
        (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.bfloat16), 0),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3).double(), 0),
        (torch.zeros(2, 3), torch.zeros(4, 3), 3),
    ],
)
def test_products_refuse_what_does_not_fit(x, W, activation):
    with pytest.raises(RuntimeError, match=r"products|CPU kernels"):
        products(x, W, activation)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_size", [8, 24, 64, 128])
def test_a_step_is_a_token_of_the_recurrence(dtype, head_size):
    B, H, N = 3, 2, head_size
    r, k, v = (torch.randn(B, 1, H, N).to(dtype) for _ in range(3))
    w = torch.linspace(-12, 5, B * H * N).view(B, 1, H, N).to(dtype)
    u, state = torch.randn(H, N), torch.randn(B, H, N, N)
    expected, after = wkv6_reference(*(x.double() for x in (r, k, v, w, u, state)))
    rows = [x.view(B, H * N) for x in (r, k, v, w)]
    y = torch.ops.finchtune.wkv6_step_(*rows, u, state)
    assert relative_error(y, expected.view(B, H * N)) < TOLERANCE[dtype]
    assert relative_error(state, after) < 1e-5


def test_a_step_refuses_a_state_that_does_not_fit():
    rows = [torch.zeros(2, 16) for _ in range(4)]
    with pytest.raises(RuntimeError, match="the state must be dense"):
        torch.ops.finchtune.wkv6_step_(*rows, torch.zeros(2, 8), torch.zeros(1, 2, 8, 8))
