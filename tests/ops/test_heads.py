"""RWKV-7's parts around WKV7 where numbers are not random, and what their operators say."""

import pytest
import torch
from helpers.elementwise_emulator import EMULATED, kernels_in_use
from helpers.support import relative_error
from helpers.wkv import CPU_PATHS

from finchtune.ops.elementwise import wkv7_inputs

HEADS = 3


@pytest.fixture(params=[*CPU_PATHS, EMULATED])
def path(request, kernels):
    with kernels_in_use(request.param):
        yield request.param


def test_a_key_of_zeros_removes_nothing(path):
    k = torch.zeros(2, 60, requires_grad=True)
    x, ones = torch.randn(2, 60), torch.ones(60)
    key, _, _, a, b = wkv7_inputs(k, x, x, x, ones, ones, HEADS)
    assert not torch.cat([key, a, b]).any()
    (dk,) = torch.autograd.grad(key.sum(), k)
    assert dk.isfinite().all()


def gradient_of_removal(k, rate):
    ones = torch.ones_like(k[0])
    *_, a, b = wkv7_inputs(k, k, rate, rate, ones, ones, HEADS)
    return torch.autograd.grad((a + 2 * b).sum(), k)[0]


def test_tiny_keys_are_divided_by_the_shortest_length(path):
    k, rate = (1e-14 * torch.randn(2, 60)).requires_grad_(), torch.randn(2, 60)
    exact = k.detach().double().requires_grad_()
    truth = gradient_of_removal(exact, rate.double())
    assert relative_error(gradient_of_removal(k, rate), truth) < 1e-6


def test_decays_of_any_size(path):
    """log sigmoid: near zero, small, large, and what is not finite is seen."""
    some = torch.tensor([-torch.inf, -1e4, -90, -20, -1, -1e-3, 0, 1e-3, 1, 20, 90, 1e4])
    decay = torch.cat([some, torch.tensor([torch.inf, torch.nan]), torch.linspace(-9, 9, 46)])
    decay, x = decay[None].requires_grad_(), torch.randn(1, 60)
    w = wkv7_inputs(x, x, decay, x, x[0], x[0], HEADS)[2]
    exact = decay.detach().double()
    expected = torch.nn.functional.logsigmoid(exact) - 0.5
    assert torch.allclose(w.double(), expected, rtol=2e-7, atol=1e-7, equal_nan=True)
    (d,) = torch.autograd.grad(w.sum(), decay)
    assert torch.allclose(d.double(), torch.sigmoid(-exact), rtol=1e-6, equal_nan=True)


def test_operators_say_what_they_return(kernels):
    rows, weights = list(torch.randn(5, 9, 60).unbind()), list(torch.randn(3, 60).unbind())
    ops, checks = torch.ops.finchtune, ("test_schema", "test_faketensor")
    calls = [(ops.bonus_norm, (rows, weights, 3, 1e-5))]
    for values in ([], rows[:3]):
        calls.append((ops.wkv7_inputs, (rows[:3], values, weights[:2], 3, 1e-12)))
    for wanted in (False, True):
        for values, douts in ([], rows[:4]), (rows[:3], rows):
            backward = douts, rows[:3], values, weights[:2], 3, 1e-12, wanted
            calls.append((ops.wkv7_inputs_backward, backward))
        calls.append((ops.bonus_norm_backward, (rows[0], rows, weights, 3, 1e-5, wanted)))
    x, one, two, zero = torch.randn(9, 60), torch.randn(60, 5), torch.randn(5, 60), rows[0][0]
    calls.append((ops.low_ranks, ([x, x], [one, one], [two, two], [zero, None], [1, 2])))
    each, low = [[False, True]] * 3, torch.randn(9, 5)
    backward = [x, x], [x, x], [low, low], [one, one], [two, two], [0, 1], *each
    calls.append((ops.low_ranks_backward, backward))
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=checks)
