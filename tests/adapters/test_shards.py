"""The compiled forms of what Bone and Bat do beside their products with W, against float64."""

import pytest
import torch
from helpers.elementwise_emulator import EMULATED, kernels_in_use

from finchtune.adapters import METHODS
from finchtune.adapters.shards import (
    add_to_shards,
    compiled,
    move_shards,
    move_shards_backward,
    shard_sum,
)

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # and the largest error of one rounding
SHAPES = [(1, 1, 1), (5, 7, 3), (33, 3, 16), (70, 5, 20), (64, 2, 64), (101, 40, 2), (9, 2, 130)]
"""Tokens, shards and r: tiles that are full and not, shards smaller and larger than a vector."""


@pytest.fixture(params=["avx512", "avx2", "portable", EMULATED])
def cpu_path(kernels, request):
    with kernels_in_use(request.param), torch.no_grad():
        torch.use_deterministic_algorithms(True)  # memory that nothing was written to holds NaN
        yield request.param
        torch.use_deterministic_algorithms(False)


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    difference = (found.double() - expected).abs().max()
    assert difference <= tolerance * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bat_moves_blocks(cpu_path, dtype, shape):
    T, count, r = shape
    x, dx = torch.randn(2, T, count * r).to(dtype)
    D = (torch.randn(count, r, r) / r**0.5).to(dtype)
    assert compiled(x)
    moved, sums = move_shards(x, D)
    wanted_moved, wanted_sums = move_shards(x.double(), D.double())
    assert moved.dtype == dtype
    assert sums.dtype == torch.float32
    # On a GPU torch makes the products, and rounds them.
    roundings = 2 if cpu_path == EMULATED else 1
    assert_close(moved, wanted_moved, roundings * DTYPES[dtype])
    assert_close(sums, wanted_sums, 2e-6 if roundings == 1 else DTYPES[dtype])
    wanted_dx = dx.double()
    wanted_dD = move_shards_backward(wanted_dx, x.double(), D.double(), sums.double())
    dD = move_shards_backward(dx, x, D, sums)
    assert dx.dtype == dD.dtype == dtype
    assert_close(dx, wanted_dx, roundings * DTYPES[dtype])
    assert_close(dD, wanted_dD, roundings * DTYPES[dtype])


@pytest.mark.parametrize(("k", "r"), [(7, 1), (60, 7), (64, 16), (24, 30), (300, 130)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_summed_and_added_to(cpu_path, dtype, k, r):
    x = torch.randn(11, k).to(dtype)
    for of_sums in (dtype, torch.float32):
        sums = shard_sum(x, r, of_sums)
        assert sums.dtype == of_sums
        assert_close(sums, shard_sum(x.double(), r), DTYPES[of_sums])
        expected, found = x.double(), x.clone()
        add_to_shards(expected, sums.double())
        add_to_shards(found, sums)
        assert_close(found, expected, DTYPES[dtype])


def test_any_strides(kernels):
    wide = torch.randn(6, 24)
    D, sums = torch.randn(3, 4, 4), torch.randn(4, 6).T
    for x in (wide[:, ::2], wide[:, 1:13], torch.randn(12, 6).T):
        dense = x.contiguous()
        with torch.no_grad():
            torch.testing.assert_close(move_shards(x, D), move_shards(dense, D))
            torch.testing.assert_close(shard_sum(x, 5), shard_sum(dense, 5))
            one, other = torch.ones(2, 6, 12)
            narrow = sums[:, :4]
            torch.testing.assert_close(
                move_shards_backward(one, x, D.mT, narrow),
                move_shards_backward(other, dense, D.mT.contiguous(), narrow.contiguous()),
            )
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["bone", "bat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_has_the_gradients_of_float64(cpu_path, dtype, name):
    """First derivatives by the compiled forms, second ones by the plain."""
    adapter = METHODS[name](24, 32, r=8)
    torch.nn.init.normal_(adapter.bone, std=0.3)
    adapter.to(dtype)
    W = torch.randn(32, 24).to(dtype)
    x = torch.randn(50, 24).to(dtype).requires_grad_()

    def derivatives(x, W):
        inputs = [x, *adapter.parameters()]
        with torch.enable_grad():
            y = adapter(x, W)
            first = torch.autograd.grad(y.pow(2).sum(), inputs)
            graph = torch.autograd.grad(adapter(x, W).pow(3).sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in graph), inputs)
        return y, *first, *second

    found = derivatives(x, W)
    adapter.double()
    wanted = derivatives(x.detach().double().requires_grad_(), W.double())
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, 12 * DTYPES[dtype])


def test_the_same_bits_in_every_run(kernels):
    x, dx, sums = torch.randn(301, 192), torch.randn(301, 192), torch.randn(301, 16)
    D = torch.randn(12, 16, 16)
    with torch.no_grad():
        runs = [move_shards_backward(dx.clone(), x, D, sums) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_are_what_torch_expects(kernels, dtype):
    """Their shapes without content, and what they say they write to."""
    x, dx = torch.randn(2, 6, 12).to(dtype)
    D, sums = torch.randn(3, 4, 4).to(dtype), torch.randn(6, 4)
    operators = torch.ops.finchtune
    torch.library.opcheck(operators.shard_sums, (x, 5, torch.float32))
    torch.library.opcheck(operators.add_to_shards_, (dx, sums))
    torch.library.opcheck(operators.bat_row_forward, (x, D))
    torch.library.opcheck(operators.bat_row_backward_, (dx, x, D, sums))


@pytest.mark.parametrize("name", ["bone", "bat"])
def test_a_compiled_graph_takes_the_operators(kernels, name):
    adapter = METHODS[name](24, 32, r=8)
    torch.nn.init.normal_(adapter.bone, std=0.3)
    W, x = torch.randn(32, 24), torch.randn(5, 24, requires_grad=True)
    torch._dynamo.reset()
    graph = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    y, expected = graph(x, W), adapter(x, W)
    torch.testing.assert_close(y, expected)
    inputs = [x, adapter.bone]
    wanted = torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs), wanted)
