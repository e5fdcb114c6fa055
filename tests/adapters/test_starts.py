"""Where the methods start from, and what is particular to one of them."""

import math

import pytest
import torch
import torch.nn.functional as F

from finchtune.adapters import METHODS
from finchtune.adapters.methods.pissa import principal_svd
from finchtune.errors import UserError


def spectrum(out: int, k: int, decay: float) -> torch.Tensor:
    """A weight with singular values falling as a power."""
    U, V = (torch.linalg.qr(torch.randn(n, min(out, k), dtype=torch.float64)).Q for n in (out, k))
    return U * torch.arange(1, min(out, k) + 1, dtype=torch.float64) ** -decay @ V.T


def start(name: str, W: torch.Tensor, **settings):
    adapter = METHODS[name](W.shape[1], W.shape[0], **settings).to(W.dtype)
    adapter.init(W)
    return adapter


@pytest.mark.parametrize("shape", [(60, 200), (200, 60)])
@pytest.mark.parametrize("niter", [None, 0, 4])
def test_pissa_takes_the_principal_part(shape, niter):
    W = spectrum(*shape, decay=0.5)
    adapter = start("pissa", W, r=8, svd_niter=niter)
    A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
    S = torch.linalg.svdvals(W)
    best = S[8:].norm()
    assert (W - B @ A).norm() <= (1 if not niter else 1.001) * best * (1 + 1e-9)
    torch.testing.assert_close(A @ A.T, torch.diag(S[:8]), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(B.T @ B, torch.diag(S[:8]), rtol=1e-2, atol=1e-6)


def test_the_fast_svd_is_the_same_every_time_and_leaves_the_seed_alone():
    W = torch.randn(40, 30)
    state = torch.get_rng_state()
    first = principal_svd(W, 4, 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    for got, want in zip(principal_svd(W, 4, 2), first, strict=True):
        assert torch.equal(got, want)


def test_the_residual_methods_keep_their_start():
    W = torch.randn(12, 8)
    adapter = start("olora", W, r=4)
    assert not adapter.init_lora_A.requires_grad
    assert adapter.init_lora_A.data_ptr() != adapter.lora_A.data_ptr()
    with torch.no_grad():
        adapter.lora_A.zero_()
        adapter.lora_B.zero_()
    taken = adapter.scale * adapter.init_lora_B @ adapter.init_lora_A
    torch.testing.assert_close(adapter.merged(W), W - taken)


def test_olora_takes_the_first_part_of_the_qr_decomposition():
    W = torch.randn(12, 8, dtype=torch.float64)
    Q, R = torch.linalg.qr(W)
    adapter = start("olora", W, r=3, alpha=6)
    torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, Q[:, :3] @ R[:3])
    torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, torch.eye(3).double())
    assert adapter.scale == 2


def test_lora_ga_takes_directions_of_the_gradient():
    W, G = torch.randn(2, 12, 8, dtype=torch.float64)
    adapter = METHODS["lora_ga"](8, 12, r=3, alpha=6, gamma=4, svd_niter=0).double()
    adapter.init_from_gradient(W, G)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    size = 12**0.25 / 2
    torch.testing.assert_close(adapter.lora_A.detach(), size * Vh[:3])
    torch.testing.assert_close(adapter.lora_B.detach(), size * U[:, 3:6])
    assert adapter.scale == 6 / math.sqrt(3)


def test_lora_starts_at_zero_change_and_scales_by_rank():
    W = torch.randn(12, 300)
    adapter = start("lora", W, r=4, alpha=8)
    assert adapter.scale == 2
    assert start("lora", W, r=4, alpha=8, rslora=True).scale == 4
    bound = 1 / math.sqrt(300)
    assert 0.9 * bound < adapter.lora_A.abs().max() <= bound
    assert not adapter.lora_B.any()
    assert start("biglora", W).lora_A.shape == (1024, 300)


def test_lora_drops_inputs_of_its_own_path_in_training_only():
    W = torch.randn(12, 400)
    adapter = start("lora", W, r=4, dropout=0.5)
    torch.nn.init.normal_(adapter.lora_B)
    x = torch.randn(1, 400)
    path = adapter.eval()(x, W) - x @ W.T
    torch.testing.assert_close(path, x @ (adapter.merged(W) - W).T, rtol=1e-3, atol=1e-3)
    adapter.train()
    assert not torch.allclose(adapter(x, W), adapter(x, W))
    mean = torch.stack([adapter(x, W) - x @ W.T for _ in range(2000)]).mean(0)
    assert (mean - path).norm() < 0.15 * path.norm() + 0.1


def test_lora_has_the_gradients_of_what_it_drops():
    W = torch.randn(12, 40, dtype=torch.float64)
    adapter = start("lora", W, r=4, alpha=6, dropout=0.5).double()
    torch.nn.init.normal_(adapter.lora_B)
    A, B = adapter.lora_A, adapter.lora_B
    x = torch.randn(2, 3, 40, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = adapter(x, W)
    torch.manual_seed(1)
    expected = x @ W.T + 1.5 * F.dropout(x, 0.5) @ A.T @ B.T
    torch.testing.assert_close(y, expected)
    gradients, wanted = (torch.autograd.grad(t.square().sum(), (x, A, B)) for t in (y, expected))
    torch.testing.assert_close(gradients, wanted)


def test_dora_moves_the_length_of_rows_and_refuses_empty_ones():
    W = torch.randn(12, 8)
    adapter = start("dora", W, r=2)
    torch.testing.assert_close(adapter.magnitude.detach(), W.norm(dim=1))
    with torch.no_grad():
        adapter.magnitude_change.copy_(2 * W.norm(dim=1))
        torch.nn.init.normal_(adapter.lora_B)
    torch.testing.assert_close(adapter.merged(W).norm(dim=1), 3 * W.norm(dim=1))
    W[3] = 0
    with pytest.raises(UserError, match="row"):
        start("dora", W, r=2)


def test_dora_starts_as_the_base_in_bf16_and_keeps_small_changes():
    W = torch.randn(64, 96).bfloat16()
    adapter = start("dora", W, r=2).bfloat16()
    assert adapter.init_magnitude.dtype == torch.float32
    x = torch.randn(5, 96).bfloat16()
    assert torch.equal(adapter(x, W), x @ W.T)
    with torch.no_grad():
        adapter.magnitude_change.copy_(W.float().norm(dim=1) / 2**10)
    error = adapter.merged(W) / W.float() - (1 + 2**-10)
    assert error.abs().max() < 2**-17


def test_general_disha_contains_bone():
    W = torch.randn(12, 10)
    bone, disha = start("bone", W, r=4), start("disha", W, r1=12, r2=4)
    with torch.no_grad():
        disha.shard.copy_(bone.bone.normal_().T)
    x = torch.randn(3, 10)
    torch.testing.assert_close(disha(x, W), bone(x, W))
