"""Every form of WKV7 against the recurrence in float64: all outputs, all gradients."""

from functools import lru_cache

import pytest
import torch
from helpers.wkv import errors, evaluate, named_form, one_thread
from torch.nn.functional import normalize, softplus

from finchtune.errors import UserError
from finchtune.ops.wkv7 import wkv7, wkv7_chunked, wkv7_reference

FORMS = ["chunked"]
REGIMES = ["typical", "weak", "strong", "alike"]
NAMES = ["y", "state", "dr", "dk", "dv", "dw", "da", "db", "dstate"]
LENGTHS = [1, 2, 15, 16, 17, 65, 203]
HEAD_SIZES = [16, 32, 64, 128]
FP32_TOLERANCE = 3e-6  # of the largest value


def make_inputs(regime, B, T, H, N, n_sequences=None):
    """r, k, v, w, a, b, state, then the gradients of y and of the final state, in float64.

    As the model gives them: slow decays ("weak"), the fastest ("strong"), and tokens that all
    overwrite one key entirely ("alike"), where the powers of A B^T are largest.
    """
    torch.manual_seed(T * N)
    n = n_sequences or B
    r, k, v, x, kk, rate, grad_y = torch.randn(7, B, T, H, N, dtype=torch.float64).unbind()
    state, grad_state = torch.randn(2, n, H, N, N, dtype=torch.float64).unbind()
    kk, rate = normalize(kk, dim=-1), torch.sigmoid(rate)
    x = {"weak": -8 + x, "strong": 8 + x}.get(regime, 2 * x)
    if regime == "alike":
        kk, rate, x = kk[:, :1].expand_as(kk), torch.ones_like(rate), x - 8
    return r, k, v, -softplus(-x) - 0.5, -kk, kk * rate, state, grad_y, grad_state


@lru_cache(maxsize=256)
def oracle(regime, B, T, H, N):
    inputs = make_inputs(regime, B, T, H, N)
    return inputs, evaluate(wkv7_reference, inputs)


def in_dtype(inputs, dtype):
    """Token tensors in `dtype`; the states and their gradient in fp32."""
    return [
        x.to(dtype if i in (0, 1, 2, 3, 4, 5, 7) else torch.float32) for i, x in enumerate(inputs)
    ]


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
