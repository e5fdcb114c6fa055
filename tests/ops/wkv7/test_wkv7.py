"""Every form of WKV7 against the recurrence in float64: all outputs, all gradients."""

import pytest
import torch
from helpers.wkv import CPU_PATHS, errors, evaluate, named_form, one_thread
from helpers.wkv7_cases import NAMES, REGIMES, in_dtype, make_inputs, oracle, rms
from hypothesis import given, settings
from hypothesis import strategies as st

from finchtune.errors import UserError
from finchtune.ops.wkv7 import wkv7, wkv7_chunked, wkv7_reference

FORMS = ["chunked", *CPU_PATHS]
LENGTHS = [1, 2, 15, 16, 17, 65, 203]
HEAD_SIZES = [16, 32, 64, 128]
FP32_TOLERANCE = 3e-6  # of the largest value


def assert_close(got, exact, tolerance=FP32_TOLERANCE):
    found = errors(NAMES, got, exact)
    assert all(error <= tolerance for error in found.values()), found


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
def test_packed_sequences(form):
    """Packed sequences (one of one token, one empty) equal separate ones, each with its state."""
    bounds = [0, 70, 71, 71, 200]
    inputs = make_inputs("typical", 1, 200, 2, 32, n_sequences=4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    exact = evaluate(wkv7_reference, inputs, cu_seqlens)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32), cu_seqlens), exact)
    *rows, state, _, _ = in_dtype(inputs, torch.float32)
    y, new_state = form(*rows, state, cu_seqlens)
    for i in (0, 1, 3):
        part = slice(bounds[i], bounds[i + 1])
        own = form(*(x[:, part] for x in rows), state[i : i + 1])
        torch.testing.assert_close((y[:, part], new_state[i : i + 1]), own)
    assert torch.equal(new_state[2], state[2])


@every_form
def test_a_sequence_in_parts_equals_the_whole(form):
    """Through the state that one call returns and the next one takes, gradients included."""
    inputs, exact = oracle("typical", 2, 65, 2, 32)

    def in_parts(*arguments):
        *rows, state, _ = arguments
        outputs = []
        for part in (slice(0, 1), slice(1, 40), slice(40, 65)):
            y, state = form(*(x[:, part] for x in rows), state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    assert_close(evaluate(in_parts, in_dtype(inputs, torch.float32)), exact)


@every_form
def test_no_state_is_the_zero_state(form):
    *rows, state, _, _ = in_dtype(make_inputs("typical", 2, 9, 2, 16), torch.float32)
    assert all(map(torch.equal, form(*rows), form(*rows, torch.zeros_like(state))))


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


@pytest.mark.parametrize("wanted", range(7))
@pytest.mark.parametrize("output", [0, 1])
def test_one_input_and_one_output_alone(kernels, wanted, output):
    inputs, _ = oracle("typical", 1, 17, 2, 16)
    results = []
    for form, dtype in ((wkv7, torch.float32), (wkv7_reference, torch.float64)):
        leaves = [x.to(dtype) for x in inputs[:7]]
        leaves[wanted].requires_grad_()
        out = form(*leaves)[output]
        weight = inputs[7 + output].to(dtype)
        results.append(
            torch.autograd.grad((out * weight).sum(), leaves[wanted], allow_unused=True)[0]
            if out.requires_grad
            else None
        )
    got, exact = results
    if exact is None:  # the final state does not depend on r
        assert got is None or not got.any()
    else:
        assert (got - exact).abs().max() <= FP32_TOLERANCE * exact.abs().max()


def test_thread_count_changes_no_bit(kernels):
    inputs = in_dtype(make_inputs("typical", 2, 65, 3, 32), torch.float32)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(evaluate(wkv7, inputs))
    assert all(map(torch.equal, *results))


def test_decays_that_clear_the_state(kernels):
    """Beyond what the model gives the kernel still is exact, and no gradient is NaN."""
    inputs = in_dtype(make_inputs("typical", 1, 40, 1, 16), torch.float32)
    inputs[3] = torch.full_like(inputs[3], 200.0)
    got = evaluate(wkv7, inputs)
    inputs[3] = torch.full_like(inputs[3], 3.0)
    assert_close(evaluate(wkv7, inputs), evaluate(wkv7_reference, [x.double() for x in inputs]))
    assert all(x.isfinite().all() for x in got)


def test_autocast_leaves_the_operator_alone(kernels):
    """Under autocast the rows come as bf16 and w as fp32; the result is that of bf16 outside."""
    inputs = in_dtype(make_inputs("typical", 2, 17, 2, 16), torch.bfloat16)
    inputs[3] = inputs[3].float() + 0.001
    for form in (wkv7, wkv7_chunked):

        def under_autocast(*arguments, form=form):
            with torch.autocast("cpu", torch.bfloat16):
                return form(*arguments)

        outside, inside = evaluate(form, inputs), evaluate(under_autocast, inputs)
        assert all(map(torch.equal, outside, inside))
        assert outside[5].dtype == torch.float32


def test_operators_keep_torchs_contract(kernels):
    for T, cu_seqlens in ((40, None), (70, torch.tensor([0, 66, 70], dtype=torch.int32))):
        n = 1 if cu_seqlens is None else 2
        made = make_inputs("typical", 1, T, 2, 16, n_sequences=n)
        *inputs, grad_y, grad_state = in_dtype(made, torch.float32)
        leaves = [x.clone().requires_grad_() for x in inputs]
        ops = torch.ops.finchtune
        torch.library.opcheck(ops.wkv7_forward.default, (*leaves, cu_seqlens, True))
        torch.library.opcheck(ops.wkv7_forward.default, (*inputs, cu_seqlens, False))
        torch.library.opcheck(ops.wkv7_forward.default, (*leaves[:-1], None, cu_seqlens, True))
        for form in (inputs, [*inputs[:-1], None]):
            _, _, checkpoints = ops.wkv7_forward(*form, cu_seqlens, True)
            for grad in (grad_state, None):
                arguments = (*form, cu_seqlens, checkpoints, grad_y, grad)
                torch.library.opcheck(ops.wkv7_backward.default, arguments)


@pytest.mark.parametrize(
    ("form", "dynamic", "lengths"),
    [(wkv7, True, [17, 40]), (wkv7, False, [17]), (wkv7_chunked, False, [9])],
    ids=["kernel, any length", "kernel", "chunked"],
)
def test_torch_compile(kernels, form, dynamic, lengths):
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in lengths:
        inputs, exact = oracle("typical", 1, T, 2, 16)
        assert_close(evaluate(compiled, in_dtype(inputs, torch.float32)), exact)


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
