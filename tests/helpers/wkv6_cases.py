"""Random inputs of WKV6 and their exact results."""

from functools import lru_cache

import torch
from helpers.wkv import errors, evaluate

from finchtune.ops.wkv6 import wkv6_reference

REGIMES = ["strong", "weak", "typical", "mixed", "extreme"]
NAMES = ["y", "state", "dr", "dk", "dv", "dw", "du", "dstate"]
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
