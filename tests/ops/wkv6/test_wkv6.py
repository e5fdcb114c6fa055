"""Every form of WKV6 against the recurrence in float64: all outputs, all gradients."""

import pytest
import torch
from helpers.wkv import CPU_PATHS, errors, evaluate, named_form, one_thread
from helpers.wkv6_cases import (
    FP32_TOLERANCE,
    NAMES,
    REGIMES,
    assert_close,
    in_dtype,
    make_inputs,
    oracle,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from finchtune.ops.wkv6 import wkv6, wkv6_chunked, wkv6_reference

FORMS = ["chunked", *CPU_PATHS]
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 203]


@pytest.fixture(autouse=True)
def quiet():
    with one_thread():
        yield


@pytest.fixture
def form(request):
    """wkv6 by the named form; the CPU kernel's forms where this processor has them."""
    with named_form(request, wkv6, wkv6_chunked) as named:
        yield named


every_form = pytest.mark.parametrize("form", FORMS, indirect=True)


@every_form
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("regime", REGIMES)
def test_fp32_matches_recurrence(form, regime, T):
    inputs, exact = oracle(regime, 2, T, 2, 32)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32)), exact)


@every_form
@pytest.mark.parametrize("N", [8, 16, 24, 40, 64, 128])
@pytest.mark.parametrize("regime", ["typical", "mixed"])
def test_head_sizes(form, regime, N):
    inputs, exact = oracle(regime, 1, 17, 2, N)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32)), exact)


@every_form
@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_long_sequences(form, regime):
    inputs, exact = oracle(regime, 1, 1000, 2, 64)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32)), exact)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("T", [1, 63, 65])
def test_chunked_is_exact_in_float64(regime, T):
    inputs, exact = oracle(regime, 2, T, 2, 32)
    assert_close(evaluate(wkv6_chunked, inputs), exact, 1e-13)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", REGIMES)
def test_low_precision(form, regime, dtype):
    """No worse than twice the rounding of the exact result to the output's dtype."""
    inputs = in_dtype(make_inputs(regime, 2, 65, 2, 32), dtype)
    exact = evaluate(wkv6_reference, [x.double() for x in inputs])
    got = evaluate(form, inputs)
    rounding = errors(NAMES, [b.to(a.dtype) for a, b in zip(got, exact, strict=True)], exact)
    found = errors(NAMES, got, exact)
    for name in NAMES:
        assert found[name] <= max(2 * rounding[name], FP32_TOLERANCE), name
    assert [x.dtype for x in got] == [dtype, torch.float32] + 4 * [dtype] + 2 * [torch.float32]


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 80),
    H=st.integers(1, 3),
    N=st.sampled_from([8, 16, 24, 32, 48]),
    regime=st.sampled_from(REGIMES),
)
def test_any_shape(B, T, H, N, regime):
    inputs = make_inputs(regime, B, T, H, N)
    exact = evaluate(wkv6_chunked, inputs)
    assert_close(evaluate(wkv6, in_dtype(inputs, torch.float32)), exact)


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
