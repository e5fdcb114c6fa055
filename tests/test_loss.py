"""Chunked cross entropy against torch's own on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from finchtune import loss
from finchtune.loss import cross_entropy_sum


def plain(hidden, weight, labels):
    logits = hidden @ weight.T
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("chunk_elements", [1, 50 * 7, 1 << 24])
def test_value_and_gradients_for_every_chunking(monkeypatch, chunk_elements):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (3, 9))
    labels[1, 2:6] = -100
    found = cross_entropy_sum(hidden, weight, labels)
    expected = plain(hidden, weight, labels)
    assert torch.allclose(found, expected, rtol=1e-12)
    upstream = 0.37
    for a, b in zip(
        torch.autograd.grad(found * upstream, (hidden, weight)),
        torch.autograd.grad(expected * upstream, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_bf16_is_as_near_to_the_truth_as_torch():
    hidden = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = torch.randn(300, 32).bfloat16().requires_grad_()
    labels = torch.randint(0, 300, (64,))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(plain(*exact, labels), exact)
    ours = torch.autograd.grad(cross_entropy_sum(hidden, weight, labels), (hidden, weight))
    torchs = torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight))
    for mine, other, true in zip(ours, torchs, truth, strict=True):
        assert (mine.double() - true).norm() <= 2 * (other.double() - true).norm()


def test_all_masked_is_zero_with_zero_gradient():
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    total = cross_entropy_sum(hidden, weight, torch.full((2, 5), -100))
    total.backward()
    assert total.item() == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_frozen_head_keeps_no_weight_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(20, 8)
    total = cross_entropy_sum(hidden, weight, torch.randint(0, 20, (4,)))
    assert total.grad_fn.saved_tensors[1] is None


def test_extreme_logits_stay_finite():
    hidden = torch.full((1, 4), 1e4, requires_grad=True)
    total = cross_entropy_sum(hidden, torch.randn(20, 4), torch.tensor([3]))
    total.backward()
    assert total.isfinite()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("chunk_elements", [50 * 7, 1 << 24])
def test_l2wrap_is_the_gradient_of_the_squared_largest_logits(monkeypatch, chunk_elements):
    """Scaled by the incoming gradient, absent where masked, and not part of the loss's value."""
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk_elements)
    hidden = torch.randn(3, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (3, 9))
    labels[1, 2:6] = -100
    factor, upstream = 0.3, 0.37
    found = cross_entropy_sum(hidden, weight, labels, factor)
    assert torch.allclose(found, plain(hidden, weight, labels), rtol=1e-12)
    largest = (hidden @ weight.T).amax(-1)[labels != -100]
    expected = plain(hidden, weight, labels) + factor / 2 * largest.square().sum()
    for a, b in zip(
        torch.autograd.grad(found * upstream, (hidden, weight)),
        torch.autograd.grad(expected * upstream, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
