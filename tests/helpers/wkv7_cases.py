"""Random inputs of WKV7, as a model gives them, with their exact results."""

from functools import lru_cache

import torch
from helpers.wkv import errors, evaluate
from torch.nn.functional import normalize, softplus

from finchtune.ops.wkv7 import wkv7_reference

REGIMES = ["typical", "weak", "strong", "alike"]
NAMES = ["y", "state", "dr", "dk", "dv", "dw", "da", "db", "dstate"]
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
