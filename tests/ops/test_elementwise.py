"""The compiled element-wise parts of a block against the plain ones in float64."""

import pytest
import torch
from helpers.elementwise_cases import (
    CASES,
    assert_threads_change_no_bit,
    outputs_and_gradients,
    random_inputs,
)
from helpers.elementwise_emulator import EMULATED, kernels_in_use
from helpers.support import relative_error

from finchtune.ops.elementwise import sigmoid_gate, squared_relu
from finchtune.ops.kernels import kernels_set_aside

PATHS = ["avx512", "avx2", "portable", EMULATED]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=PATHS)
def path(request, kernels):
    with kernels_in_use(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_near_to_the_truth_as_torch(case, dtype, path):
    function, shapes = CASES[case]
    inputs = random_inputs(shapes, dtype)
    ours = outputs_and_gradients(function, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = outputs_and_gradients(function, exact)
    with kernels_set_aside():
        plain = outputs_and_gradients(function, inputs)
    for mine, other, true in zip(ours, plain, truth, strict=True):
        assert mine.dtype == dtype
        allowed = 2 * relative_error(other, true) + 4 * torch.finfo(dtype).eps
        assert relative_error(mine, true) <= allowed


FROZEN = {  # the inputs that are left
    "mixtures after a state": 2,
    "fixed mixtures": 1,
    "gated norm": 2,
    "inputs of WKV7": 6,
    "bonus norm": 5,
}


@pytest.mark.parametrize("case", FROZEN)
def test_inputs_alone_get_the_same_gradients_when_weights_are_frozen(case, path):
    function, shapes = CASES[case]
    inputs = random_inputs(shapes, torch.float32)
    with_weights = outputs_and_gradients(function, inputs)
    for weight in inputs[FROZEN[case] :]:
        weight.requires_grad_(False)
    alone = outputs_and_gradients(function, inputs)
    for a, b in zip(alone, with_weights, strict=False):
        assert torch.equal(a, b)


# Those with products in them, which torch makes, are left out.
OWN = [c for c in CASES if not c.startswith(("mixtures", "low ranks")) and "whole" not in c]


@pytest.mark.parametrize("case", OWN)
def test_any_number_of_threads_gives_the_same_bits(case, kernels):
    function, shapes = CASES[case]
    if case.endswith("packed rows"):
        shapes = [(1, 7, 4500), *([(2, 4500)] * (len(shapes) - 1))]
    elif "mixtures" in case:
        shapes = [(2, 700, shapes[0][2]), *shapes[1:]]
    else:
        shapes = [(600, s[-1]) if len(s) > 1 else s for s in shapes]
    inputs = random_inputs(shapes, torch.float32)
    assert_threads_change_no_bit(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_pass(dtype, path):
    """Closed and open gates stay exact; what is not finite is seen, not hidden."""
    gate = torch.tensor([-3e4, -200.0, 0.0, 200.0, 3e4, torch.nan, torch.inf]).to(dtype)
    ones = torch.ones_like(gate)
    expected = torch.sigmoid(gate.float())
    assert torch.allclose(sigmoid_gate(gate, ones).float(), expected, atol=1e-30, equal_nan=True)
    x = torch.tensor([-torch.inf, -1.0, 0.0, 2.0, torch.inf, torch.nan]).to(dtype).requires_grad_()
    y = squared_relu(x)
    assert torch.equal(y[:5].float(), torch.tensor([0.0, 0.0, 0.0, 4.0, torch.inf]))
    assert y[5].isnan()
    (dx,) = torch.autograd.grad(y[:4].sum(), x)
    assert torch.equal(dx[:4].float(), torch.tensor([0.0, 0.0, 0.0, 4.0]))


def test_second_derivatives_are_refused(kernels):
    x = torch.randn(5, requires_grad=True)
    (dx,) = torch.autograd.grad(squared_relu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_takes_the_plain_form_where_products_are_mixed_in(kernels):
    function, shapes = CASES["mixtures"]
    inputs = random_inputs(shapes, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = function(*inputs)
    for y, expected in zip(found, function(*inputs), strict=True):
        assert relative_error(y, expected) < 0.02


@pytest.mark.parametrize("of_maa", [False, True])
def test_operators_say_what_they_return_and_write_to(of_maa, kernels):
    x, before, maa = torch.randn(2, 7, 45), torch.randn(2, 45), torch.randn(3, 45)
    tensors = [torch.randn(14, 45) for _ in range(3)]
    blends = [y.clone() for y in tensors]
    ops = torch.ops.finchtune
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(ops.token_mix, (x, before, None, maa), test_utils=checks)
    torch.library.opcheck(ops.token_mix_, (blends, x, before, None, maa), test_utils=checks)
    backward = tensors, x, before, None, maa, blends, of_maa
    torch.library.opcheck(ops.token_mix_backward, backward, test_utils=checks)
    shift = *tensors[:2], tensors[2], x, None, maa[:1], True
    torch.library.opcheck(ops.shift_backward, shift, test_utils=checks)
    norm = x.flatten(0, 1), tensors[0], maa[0], maa[1], 3, 1e-5
    torch.library.opcheck(ops.gated_norm, norm, test_utils=checks)
    backward = tensors[1], *norm, of_maa
    torch.library.opcheck(ops.gated_norm_backward, backward, test_utils=checks)
