"""Every form of WKV6 against the recurrence in float64: all outputs, all gradients."""

from functools import lru_cache

import pytest
import torch
from helpers.wkv import CPU_PATHS, errors, evaluate, named_form, one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from finchtune.errors import UserError
from finchtune.ops.wkv6 import wkv6, wkv6_chunked, wkv6_reference

FORMS = ["chunked", *CPU_PATHS]
REGIMES = ["strong", "weak", "typical", "mixed", "extreme"]
NAMES = ["y", "state", "dr", "dk", "dv", "dw", "du", "dstate"]
LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 203]
FP32_TOLERANCE = 2e-6  # of the largest value


def decays(regime: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Raw decays w: forget at once, hardly ever, or both side by side."""
    noise = torch.randn(shape, dtype=torch.float64)
    coin = torch.rand(shape)
    if regime == "strong":
        return torch.full_like(noise, 3)
    if regime == "weak":
        return -8 + 0.3 * noise
    if regime == "typical":
        return torch.linspace(-6, 1, shape[-1], dtype=torch.float64) + 0.5 * noise
    if regime == "mixed":
        return torch.where(coin < 0.5, 3.0, -8.0).double()
    return torch.where(coin < 0.3, torch.full_like(noise, 6), -10 + 2 * noise)


def make_inputs(regime, B, T, H, N, n_sequences=None):
    """r, k, v, w, u, state, then the gradients of y and of the final state, in float64."""
    torch.manual_seed(T * N)
    n = n_sequences or B
    r, k, v, grad_y = torch.randn(4, B, T, H, N, dtype=torch.float64).unbind()
    state, grad_state = torch.randn(2, n, H, N, N, dtype=torch.float64).unbind()
    u = 0.5 * torch.randn(H, N, dtype=torch.float64)
    return r, k, v, decays(regime, (B, T, H, N)), u, state, grad_y, grad_state


@lru_cache(maxsize=256)
def oracle(regime, B, T, H, N):
    inputs = make_inputs(regime, B, T, H, N)
    return inputs, evaluate(wkv6_reference, inputs)


def in_dtype(inputs, dtype):
    """Token tensors in `dtype`; u, the states and their gradient in fp32."""
    return [x.to(dtype if i in (0, 1, 2, 3, 6) else torch.float32) for i, x in enumerate(inputs)]


def assert_close(got, exact, tolerance=FP32_TOLERANCE):
    found = errors(NAMES, got, exact)
    assert all(error <= tolerance for error in found.values()), found


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


@every_form
def test_packed_sequences(form):
    """Packed sequences (one of one token, one empty) equal separate ones, each with its state."""
    bounds = [0, 70, 71, 71, 200]
    inputs = make_inputs("typical", 1, 200, 2, 32, n_sequences=4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    exact = evaluate(wkv6_reference, inputs, cu_seqlens)
    assert_close(evaluate(form, in_dtype(inputs, torch.float32), cu_seqlens), exact)
    r, k, v, w, u, state, _, _ = in_dtype(inputs, torch.float32)
    y, new_state = form(r, k, v, w, u, state, cu_seqlens)
    for i in (0, 1, 3):
        part = slice(bounds[i], bounds[i + 1])
        own = form(r[:, part], k[:, part], v[:, part], w[:, part], u, state[i : i + 1])
        torch.testing.assert_close((y[:, part], new_state[i : i + 1]), own)
    assert torch.equal(new_state[2], state[2])


@every_form
def test_a_sequence_in_parts_equals_the_whole(form):
    """Through the state that one call returns and the next one takes, gradients included."""
    inputs, exact = oracle("typical", 2, 65, 2, 32)

    def in_parts(r, k, v, w, u, state, _):
        outputs = []
        for part in (slice(0, 1), slice(1, 40), slice(40, 65)):
            y, state = form(r[:, part], k[:, part], v[:, part], w[:, part], u, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    assert_close(evaluate(in_parts, in_dtype(inputs, torch.float32)), exact)


@every_form
def test_no_state_is_the_zero_state(form):
    r, k, v, w, u, state, _, _ = in_dtype(make_inputs("typical", 2, 9, 2, 16), torch.float32)
    assert all(map(torch.equal, form(r, k, v, w, u), form(r, k, v, w, u, torch.zeros_like(state))))


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


@pytest.mark.parametrize("wanted", range(6))
@pytest.mark.parametrize("output", [0, 1])
def test_one_input_and_one_output_alone(kernels, wanted, output):
    inputs, _ = oracle("typical", 1, 17, 2, 16)
    results = []
    for form, dtype in ((wkv6, torch.float32), (wkv6_reference, torch.float64)):
        leaves = [x.to(dtype) for x in inputs[:6]]
        leaves[wanted].requires_grad_()
        out = form(*leaves)[output]
        weight = inputs[6 + output].to(dtype)
        results.append(
            torch.autograd.grad((out * weight).sum(), leaves[wanted], allow_unused=True)[0]
            if out.requires_grad
            else None
        )
    got, exact = results
    if exact is None:  # the final state depends on neither r nor u
        assert got is None or not got.any()
    else:
        assert (got - exact).abs().max() <= FP32_TOLERANCE * exact.abs().max()


def test_thread_count_changes_no_bit(kernels):
    inputs = in_dtype(make_inputs("typical", 2, 65, 3, 32), torch.float32)
    results = []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(evaluate(wkv6, inputs))
    assert all(map(torch.equal, *results))


def test_decays_beyond_fp32_range(kernels):
    """exp(w) may overflow or vanish: the state is cleared, or kept, and no gradient is NaN."""
    r, k, v, w, u, state, *gradients = in_dtype(make_inputs("weak", 1, 9, 1, 8), torch.float32)
    for value, kept in ((200.0, 0.0), (-200.0, 1.0)):
        got = evaluate(wkv6, [r, k * 0, v, torch.full_like(w, value), u, state, *gradients])
        torch.testing.assert_close(got[1], kept * state)
        assert all(x.isfinite().all() for x in got)


def test_autocast_leaves_the_operator_alone(kernels):
    """Under autocast r, k, v come as bf16 and w as fp32; the result is that of bf16 outside."""
    inputs = in_dtype(make_inputs("typical", 2, 17, 2, 16), torch.bfloat16)
    inputs[3] = inputs[3].float() + 0.001
    for form in (wkv6, wkv6_chunked):

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
        torch.library.opcheck(ops.wkv6_forward.default, (*leaves, cu_seqlens, True))
        torch.library.opcheck(ops.wkv6_forward.default, (*inputs, cu_seqlens, False))
        torch.library.opcheck(ops.wkv6_forward.default, (*leaves[:-1], None, cu_seqlens, True))
        for form in (inputs, [*inputs[:-1], None]):
            _, _, checkpoints = ops.wkv6_forward(*form, cu_seqlens, True)
            for grad in (grad_state, None):
                arguments = (*form, cu_seqlens, checkpoints, grad_y, grad)
                torch.library.opcheck(ops.wkv6_backward.default, arguments)


def test_without_a_state_none_is_saved(kernels):
    """A zero state, and its gradient, would be traffic for nothing in every layer."""
    *rows, u, _, _, _ = make_inputs("typical", 2, 20, 2, 16)
    leaves = [x.float().requires_grad_() for x in (*rows, u)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        y, state = wkv6(*leaves)
    assert saved.count(state.shape) == 1  # the checkpoints: at most one state of each sequence
    expected, _ = wkv6(*leaves, torch.zeros(2, 2, 16, 16))
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(out.sum(), leaves) for out in (y, expected)]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("form", "dynamic", "lengths"),
    [(wkv6, True, [17, 40]), (wkv6, False, [17]), (wkv6_chunked, False, [9])],
    ids=["kernel, any length", "kernel", "chunked"],
)
def test_torch_compile(kernels, form, dynamic, lengths, backend):
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, backend=backend, dynamic=dynamic)
    for T in lengths:
        inputs, exact = oracle("typical", 1, T, 2, 16)
        assert_close(evaluate(compiled, in_dtype(inputs, torch.float32)), exact)


def replaced(index, tensor):
    """Arguments that fit, but for one."""
    torch.manual_seed(0)
    arguments = [*torch.randn(4, 2, 5, 2, 8).unbind(), torch.randn(2, 8), None, None]
    arguments[index] = tensor
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (replaced(0, torch.zeros(2, 5, 16)), "r must be"),
        (replaced(0, torch.zeros(2, 0, 2, 8)), "not empty"),
        (replaced(0, torch.zeros(2, 5, 2, 8, dtype=torch.int64)), "r must be bf16"),
        (replaced(1, torch.zeros(2, 5, 1, 8)), "k must be"),
        (replaced(2, torch.zeros(2, 5, 2, 8).double()), "use one dtype"),
        (replaced(3, torch.zeros(2, 5, 2, 8, dtype=torch.int32)), "w must be floating"),
        (replaced(4, torch.zeros(8)), "u must be"),
        (replaced(5, torch.zeros(2, 2, 8)), "state must be"),
        (replaced(5, torch.zeros(2, 2, 8, 8, device="meta")), "state is on meta"),
        (replaced(6, torch.tensor([0, 5])), "a batch of 1"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        wkv6(*arguments)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 2, 5], [0], [0.0, 5.0]])
def test_wrong_boundaries_are_told(bounds):
    x, u = torch.zeros(1, 5, 2, 8), torch.zeros(2, 8)
    with pytest.raises(UserError, match="cu_seqlens"):
        wkv6(x, x, x, x, u, cu_seqlens=torch.tensor(bounds))
