"""WKV6 of strided inputs and far decays."""

import pytest
import torch
from helpers.wkv import evaluate
from helpers.wkv6_cases import (
    in_dtype,
    make_inputs,
)

from finchtune.ops.wkv6 import wkv6, wkv6_reference

pytestmark = pytest.mark.usefixtures("quiet")


def test_strided_inputs_and_gradients(kernels):
    """Views of one projection, a transposed state, and gradients that autograd expands."""
    torch.manual_seed(0)
    fused = torch.randn(2, 33, 2, 4, 16).requires_grad_()
    u, state = torch.randn(16, 2).t(), torch.randn(2, 2, 16, 16).mT
    results = []
    for form in (wkv6, wkv6_reference):
        y, new_state = form(*fused.unbind(3), u, state)
        results.append([y, new_state, *torch.autograd.grad(y.sum() + new_state.sum(), fused)])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


def test_decays_beyond_fp32_range(kernels):
    """exp(w) may overflow or vanish: the state is cleared, or kept, and no gradient is NaN."""
    r, k, v, w, u, state, *gradients = in_dtype(make_inputs("weak", 1, 9, 1, 8), torch.float32)
    for value, kept in ((200.0, 0.0), (-200.0, 1.0)):
        got = evaluate(wkv6, [r, k * 0, v, torch.full_like(w, value), u, state, *gradients])
        torch.testing.assert_close(got[1], kept * state)
        assert all(x.isfinite().all() for x in got)
