"""RWKV-7's parts around WKV7, compiled, against torch's operators in float64."""

import pytest
import torch
from helpers.elementwise_cases import (
    assert_threads_change_no_bit,
    outputs_and_gradients,
    random_inputs,
)
from helpers.support import cpu_path_in_use, relative_error
from helpers.wkv import CPU_PATHS

from finchtune.ops.elementwise import BonusNorm, heads, removal, value_residual

DTYPES = [torch.float32, torch.bfloat16]
HEADS = 3


@pytest.fixture(params=CPU_PATHS)
def path(request, kernels):
    with cpu_path_in_use(request.param):
        yield request.param


def value_residual_of(v, first, gate):
    return value_residual(v, first, gate, HEADS)


def removal_of(k, rate, k_k, k_a):
    return removal(k, rate, k_k, k_a, HEADS)


def bonus_norm(y, r, k, v, gate, weight, bias, r_k):
    norm = BonusNorm(HEADS, y.shape[1], eps=64e-5)
    del norm.weight, norm.bias  # the leaves themselves take their place
    norm.weight, norm.bias = weight, bias
    return norm(y, r, k, v, gate, r_k)


# A head is 15, 20 or 24 channels: whole vectors and a rest, for every width of vector.
CASES = {
    "value residual": (value_residual_of, [(2, 7, 45)] * 3, 3),
    "removal": (removal_of, [(2, 7, 60)] * 2 + [(1, 1, 60)] * 2, 2),
    "bonus norm": (bonus_norm, [(9, 72)] * 5 + [(72,), (72,), (HEADS, 24)], 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_near_to_the_truth_as_torch(case, dtype, path, monkeypatch):
    function, shapes, _ = CASES[case]
    inputs = random_inputs(shapes, dtype)
    ours = outputs_and_gradients(function, inputs)
    truth = outputs_and_gradients(function, [x.detach().double().requires_grad_() for x in inputs])
    monkeypatch.setattr(heads, "fits_cpu", lambda *_: False)
    plain = outputs_and_gradients(function, inputs)
    for mine, other, true in zip(ours, plain, truth, strict=True):
        assert mine.dtype == dtype
        allowed = 2 * relative_error(other, true) + 4 * torch.finfo(dtype).eps
        assert relative_error(mine, true) <= allowed


@pytest.mark.parametrize("case", ["removal", "bonus norm"])
def test_rows_alone_get_the_same_gradients_when_weights_are_frozen(case, kernels):
    function, shapes, n_rows = CASES[case]
    inputs = random_inputs(shapes, torch.float32)
    with_weights = outputs_and_gradients(function, inputs)
    for weight in inputs[n_rows:]:
        weight.requires_grad_(False)
    alone = outputs_and_gradients(function, inputs)
    assert all(torch.equal(a, b) for a, b in zip(alone, with_weights, strict=False))


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_gives_the_same_bits(case, kernels):
    function, shapes, n_rows = CASES[case]
    many = [(600, s[-1]) if i < n_rows else s for i, s in enumerate(shapes)]
    inputs = random_inputs(many, torch.float32)
    assert_threads_change_no_bit(function, inputs)


def test_a_key_of_zeros_removes_nothing(path):
    k = torch.zeros(2, 60, requires_grad=True)
    ones = torch.ones(60)
    key, a, b = removal(k, torch.randn(2, 60), ones, ones, HEADS)
    assert not torch.cat([key, a, b]).any()
    (dk,) = torch.autograd.grad(key.sum(), k)
    assert dk.isfinite().all()


def test_operators_say_what_they_return(kernels):
    rows, weights = list(torch.randn(5, 9, 60).unbind()), list(torch.randn(3, 60).unbind())
    ops, checks = torch.ops.finchtune, ("test_schema", "test_faketensor")
    calls = [
        (ops.value_residual, (*rows[:3], 3)),
        (ops.value_residual_backward, (*rows[:4], 3)),
        (ops.removal, (*rows[:2], *weights[:2], 3, 1e-12)),
        (ops.bonus_norm, (rows, weights, 3, 1e-5)),
    ]
    for wanted in (False, True):
        backward = rows[2:], *rows[:2], *weights[:2], 3, 1e-12, wanted
        calls.append((ops.removal_backward, backward))
        calls.append((ops.bonus_norm_backward, (rows[0], rows, weights, 3, 1e-5, wanted)))
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=checks)
