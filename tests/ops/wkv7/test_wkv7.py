"""Every form of WKV7 against the recurrence in float64: all outputs, all gradients."""

import pytest
import torch
from helpers.wkv import CPU_PATHS, errors, evaluate, named_form, one_thread
from helpers.wkv7_cases import (
    FP32_TOLERANCE,
    NAMES,
    REGIMES,
    assert_close,
    in_dtype,
    make_inputs,
    oracle,
    rms,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from finchtune.errors import UserError
from finchtune.ops.wkv7 import wkv7, wkv7_chunked, wkv7_reference

FORMS = ["chunked", *CPU_PATHS]
LENGTHS = [1, 2, 15, 16, 17, 65, 203]
HEAD_SIZES = [16, 32, 64, 128]


@pytest.fixture(autouse=True)
def quiet():
    with one_thread():
        yield


@pytest.fixture
def form(request):
    """wkv7 by the named form; the CPU kernel's forms where this processor has them."""
    with named_form(request, wkv7, wkv7_chunked) as named:
        yield named


every_form = pytest.mark.parametrize("form", FORMS, indirect=True)


@every_form
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("regime", REGIMES)
def test_fp32_matches_recurrence(form, regime, T):
    inputs, exact = oracle(regime, 2, T, 2, 32)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32)), exact)


@every_form
@pytest.mark.parametrize("N", HEAD_SIZES)
@pytest.mark.parametrize("regime", ["typical", "alike"])
def test_head_sizes(form, regime, N):
    inputs, exact = oracle(regime, 1, 17, 2, N)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32)), exact)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("T", [1, 15, 65])
def test_chunked_is_exact_in_float64(regime, T):
    inputs, exact = oracle(regime, 2, T, 2, 32)
    assert_close(evaluate(wkv7_chunked, inputs), exact, 1e-12)


@every_form
@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_long_sequences(form, regime):
    inputs, exact = oracle(regime, 1, 1000, 2, 64)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32)), exact)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", REGIMES)
def test_low_precision(form, regime, dtype):
    """No worse than twice the rounding of the exact result to the output's dtype."""
    inputs = in_dtype(make_inputs(regime, 2, 65, 2, 32), dtype)
    exact = evaluate(wkv7_reference, [x.double() for x in inputs])
    got = evaluate(form, inputs)
    assert max(rms(got, exact).values()) <= 6e-3
    rounding = errors(NAMES, [b.to(a.dtype) for a, b in zip(got, exact, strict=True)], exact)
    found = errors(NAMES, got, exact)
    for name in NAMES:
        assert found[name] <= max(2 * rounding[name], FP32_TOLERANCE), name
    assert [x.dtype for x in got] == [dtype, torch.float32] + 6 * [dtype] + [torch.float32]


@settings(max_examples=30)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 80),
    H=st.integers(1, 3),
    N=st.sampled_from([8, 16, 24, 40, 48]),
    regime=st.sampled_from(REGIMES),
)
def test_any_shape(B, T, H, N, regime):
    inputs = make_inputs(regime, B, T, H, N)
    exact = evaluate(wkv7_chunked, inputs)
    assert_close(evaluate(wkv7, in_dtype(inputs, torch.float32)), exact)


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
