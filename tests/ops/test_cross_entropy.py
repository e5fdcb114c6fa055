"""Chunked cross entropy against torch's own on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from helpers.elementwise_emulator import EMULATED, kernels_in_use

from finchtune.ops import cross_entropy as loss
from finchtune.ops.cross_entropy import cross_entropy_sum


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


def test_the_loss_scale_is_not_rounded_to_bf16():
    hidden = torch.randn(6, 16).bfloat16().requires_grad_()
    weight, labels = torch.randn(32, 16).bfloat16(), torch.randint(0, 32, (6,))
    (whole,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, labels), hidden)
    scale = 1 + 2**-8 + 2**-9  # bf16 would make 1 or 1 + 2^-7 of it
    (scaled,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, labels) * scale, hidden)
    assert torch.equal(scaled, (whole.float() * scale).bfloat16())


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


@pytest.fixture(params=["avx512", "avx2", "portable", EMULATED])
def cpu_path(kernels, request):
    with kernels_in_use(request.param):
        yield


def row_gradients(logits, labels, l2wrap):
    """Losses and gradients of single rows, in the dtype of `logits`, by torch's formulas."""
    largest = logits.max(-1, keepdim=True)
    losses = F.cross_entropy(logits, labels, reduction="none")
    gradients = logits.softmax(-1).scatter_add(-1, labels[:, None], -torch.ones_like(logits))
    return losses, gradients.scatter_add(-1, largest.indices, l2wrap * largest.values)


@pytest.mark.parametrize("l2wrap", [0.0, 0.3])
@pytest.mark.parametrize("vocab_size", [1, 7, 300, 2048, 5003])
def test_the_compiled_rows_are_torchs(cpu_path, vocab_size, l2wrap):
    """Small and large logits, among them rows that begin where no vector does."""
    logits = torch.randn(11, vocab_size) * torch.logspace(-3, 3, 11)[:, None]
    labels = torch.randint(vocab_size, (11,))
    losses, gradients = row_gradients(logits.double(), labels, l2wrap)
    torchs, _ = row_gradients(logits, labels, l2wrap)
    found = torch.ops.finchtune.cross_entropy_(logits, labels, l2wrap)
    error = 2 * (torchs - losses).abs() + 1e-6 * losses.abs() + 1e-7
    assert ((found - losses).abs() <= error).all()
    # A logit of 3,000 is itself only good to 2e-4, and so is the exponential of a difference.
    assert torch.allclose(logits.double(), gradients, rtol=5e-4, atol=1e-7)
    assert torch.allclose(logits[:6].double(), gradients[:6], rtol=1e-6, atol=1e-7)


def test_of_equal_largest_logits_the_first_is_wrapped(cpu_path):
    logits = torch.zeros(1, 1200)
    logits[0, [7, 150, 900]] = 2.0
    torch.ops.finchtune.cross_entropy_(logits, torch.tensor([3]), 0.5)
    assert logits[0, 7] > 1 > logits[0, 150]
    assert logits[0, 150] == logits[0, 900]


def test_the_compiled_rows_round_bf16_once(cpu_path):
    logits = (torch.randn(9, 777) * 3).bfloat16()
    labels = torch.randint(777, (9,))
    losses, gradients = row_gradients(logits.double(), labels, 0.0)
    found = torch.ops.finchtune.cross_entropy_(logits, labels, 0.0)
    assert torch.allclose(found.double(), losses, rtol=1e-6)
    assert torch.allclose(logits.double(), gradients, rtol=2**-8, atol=1e-30)


def test_the_compiled_rows_keep_what_is_not_finite(cpu_path):
    logits = torch.randn(3, 300)
    logits[0, 5], logits[1, 7] = float("nan"), float("-inf")
    found = torch.ops.finchtune.cross_entropy_(logits, torch.tensor([2, 3, 4]), 0.0)
    assert found.isnan().tolist() == [True, False, False]
    assert logits[0].isnan().all()
    assert logits[1:].isfinite().all()
    assert logits[1, 7] < 1e-37


def test_a_label_outside_the_vocabulary_is_an_error(kernels):
    with pytest.raises(IndexError, match="label 9 lies outside the vocabulary of 9"):
        cross_entropy_sum(torch.randn(2, 4), torch.randn(9, 4), torch.tensor([3, 9]))


def test_a_gpus_pieces_grow_with_the_memory_that_is_free():
    least = loss.CHUNK_ELEMENTS["cuda"]
    found = [loss.sized_by(room, least) for room in (0, least, 3 * least, 1 << 40)]
    assert found == [least, least, 2 * least, loss.MOST_ELEMENTS]
