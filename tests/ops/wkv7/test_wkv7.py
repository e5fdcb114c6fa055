"""WKV7 of strided inputs and far decays, and wrong arguments told."""

import pytest
import torch
from helpers.wkv import evaluate
from helpers.wkv7_cases import (
    assert_close,
    in_dtype,
    make_inputs,
)

from finchtune.errors import UserError
from finchtune.ops.wkv7 import wkv7, wkv7_reference

pytestmark = pytest.mark.usefixtures("quiet")


def test_strided_inputs_and_gradients(kernels):
    """Views of one projection, a transposed state, and gradients that autograd expands."""
    torch.manual_seed(0)
    fused = (0.2 * torch.randn(2, 33, 2, 6, 16)).requires_grad_()
    state = torch.randn(2, 2, 16, 16).mT
    results = []
    for form in (wkv7, wkv7_reference):
        y, new_state = form(*fused.unbind(3), state)
        results.append([y, new_state, *torch.autograd.grad(y.sum() + new_state.sum(), fused)])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


def test_decays_that_clear_the_state(kernels):
    """Beyond what the model gives the kernel still is exact, and no gradient is NaN."""
    inputs = in_dtype(make_inputs("typical", 1, 40, 1, 16), torch.float32)
    inputs[3] = torch.full_like(inputs[3], 200.0)
    got = evaluate(wkv7, inputs)
    inputs[3] = torch.full_like(inputs[3], 3.0)
    assert_close(evaluate(wkv7, inputs), evaluate(wkv7_reference, [x.double() for x in inputs]))
    assert all(x.isfinite().all() for x in got)


def replaced(index, tensor):
    """Arguments that fit, but for one."""
    torch.manual_seed(0)
    arguments = [*torch.randn(6, 2, 5, 2, 8).unbind(), None, None]
    arguments[index] = tensor
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (replaced(0, torch.zeros(2, 5, 16)), "wkv7: r must be"),
        (replaced(2, torch.zeros(2, 5, 2, 8).double()), "v is torch.float64, .* use one dtype"),
        (replaced(3, torch.zeros(2, 5, 2, 8, dtype=torch.int32)), "w must be floating"),
        (replaced(4, torch.zeros(8)), "a must be"),
        (replaced(5, torch.zeros(2, 5, 2, 8).half()), "b is torch.float16"),
        (replaced(6, torch.zeros(2, 2, 8)), "state must be"),
        (replaced(7, torch.tensor([0, 5])), "wkv7: cu_seqlens needs a batch of 1"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        wkv7(*arguments)
