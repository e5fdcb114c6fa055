"""Every form of every WKV operator against its recurrence in float64: all outputs and gradients."""

import pytest
import torch
from helpers.wkv import errors, evaluate, rms
from helpers.wkv_operators import OPERATORS, every_form, every_operator, every_regime
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("quiet")

LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 203]
HEAD_SIZES = {"wkv6": [8, 16, 24, 40, 64, 128], "wkv7": [16, 32, 64, 128]}
SIZES_FOR = {"wkv6": ["typical", "mixed"], "wkv7": ["typical", "alike"]}
ANY_SIZE = {"wkv6": [8, 16, 24, 32, 48], "wkv7": [8, 16, 24, 40, 48]}
IN_FLOAT64 = {"wkv6": ([1, 63, 65], 1e-13), "wkv7": ([1, 15, 65], 1e-12)}
RMS = {"wkv7": 6e-3}
"""In bf16 and fp16, of all outputs."""


@every_form
@every_regime
@pytest.mark.parametrize("T", LENGTHS)
def test_fp32_matches_recurrence(form, name, regime, T):
    cases = OPERATORS[name].cases
    inputs, exact = cases.oracle(regime, 2, T, 2, 32)
    cases.assert_close(evaluate(form, cases.in_dtype(inputs, torch.float32)), exact)


@every_form
@pytest.mark.parametrize(
    ("name", "regime", "N"),
    [(o, regime, N) for o in OPERATORS for regime in SIZES_FOR[o] for N in HEAD_SIZES[o]],
)
def test_head_sizes(form, name, regime, N):
    cases = OPERATORS[name].cases
    inputs, exact = cases.oracle(regime, 1, 17, 2, N)
    cases.assert_close(evaluate(form, cases.in_dtype(inputs, torch.float32)), exact)


@every_form
@pytest.mark.slow
@every_regime
def test_long_sequences(form, name, regime):
    cases = OPERATORS[name].cases
    inputs, exact = cases.oracle(regime, 1, 1000, 2, 64)
    cases.assert_close(evaluate(form, cases.in_dtype(inputs, torch.float32)), exact)


@every_regime
def test_chunked_is_exact_in_float64(name, regime):
    one, (lengths, tolerance) = OPERATORS[name], IN_FLOAT64[name]
    for T in lengths:
        inputs, exact = one.cases.oracle(regime, 2, T, 2, 32)
        one.cases.assert_close(evaluate(one.chunked, inputs), exact, tolerance)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_regime
def test_low_precision(form, name, regime, dtype):
    """No worse than twice the rounding of the exact result to the output's dtype."""
    one = OPERATORS[name]
    names, tolerance = one.cases.NAMES, one.cases.FP32_TOLERANCE
    inputs = one.cases.in_dtype(one.cases.make_inputs(regime, 2, 65, 2, 32), dtype)
    exact = evaluate(one.reference, [x.double() for x in inputs])
    got = evaluate(form, inputs)
    assert max(rms(names, got, exact).values()) <= RMS.get(name, float("inf"))
    rounding = errors(names, [b.to(a.dtype) for a, b in zip(got, exact, strict=True)], exact)
    found = errors(names, got, exact)
    for output in names:
        assert found[output] <= max(2 * rounding[output], tolerance), output
    wide = one.n_inputs - one.n_rows
    expected = [dtype, torch.float32] + one.n_rows * [dtype] + wide * [torch.float32]
    assert [x.dtype for x in got] == expected


@every_operator
@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 80), H=st.integers(1, 3), data=st.data())
def test_any_shape(name, B, T, H, data):
    one = OPERATORS[name]
    N = data.draw(st.sampled_from(ANY_SIZE[name]), label="N")
    regime = data.draw(st.sampled_from(one.cases.REGIMES), label="regime")
    inputs = one.cases.make_inputs(regime, B, T, H, N)
    exact = evaluate(one.chunked, inputs)
    one.cases.assert_close(evaluate(one.fastest, one.cases.in_dtype(inputs, torch.float32)), exact)
