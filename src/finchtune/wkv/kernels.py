"""The compiled kernels as one differentiable torch operator; loaded when first needed."""

import functools
import warnings

import torch
from torch import Tensor

from finchtune.wkv.build import BuildError, load_library
from finchtune.wkv.sequences import zero_state

CHECKPOINT_SPAN = 64  # tokens between two states that forward keeps; kCheckpointSpan in cuda/
DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_SIZE = 128


@functools.cache
def available() -> bool:
    """Whether the kernels can be had here. The first call may compile them; a warning says why not."""
    try:
        load_library()
    except BuildError as error:
        warnings.warn(f"the slow torch form of WKV6 is used: {error}", stacklevel=2)
        return False
    torch.library.register_fake("finchtune::wkv6_forward", _fake_forward)
    torch.library.register_fake("finchtune::wkv6_backward", _fake_backward)
    torch.library.register_autograd(
        "finchtune::wkv6_forward", _backward, setup_context=_keep_for_backward
    )
    return True


def supports(r: Tensor) -> bool:
    """Whether the kernels take inputs like r (B, T, H, N), and can be had."""
    head_size = r.shape[-1]
    fits = r.device.type == "cpu" and r.dtype in DTYPES
    return fits and head_size % 8 == 0 and head_size <= MAX_HEAD_SIZE and available()


def wkv6_kernel(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`wkv6` by the compiled kernel, for inputs that `supports` accepts."""
    state = zero_state(r, cu_seqlens) if state is None else state
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
    inputs = (r, k, v, w, u.float(), state)
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, new_state, _ = torch.ops.finchtune.wkv6_forward(*inputs, bounds, for_backward)
    return y, new_state


def _fake_forward(r, k, v, w, u, state, cu_seqlens, for_backward):
    B, T, H, N = r.shape
    count = B * T // CHECKPOINT_SPAN + state.shape[0] if for_backward else 0
    checkpoints = r.new_empty(count, H, N, N, dtype=torch.float32)
    return (
        torch.empty_like(r, memory_format=torch.contiguous_format),
        state.new_empty(state.shape),
        checkpoints,
    )


def _fake_backward(r, k, v, w, u, state, cu_seqlens, checkpoints, grad_y, grad_state):
    inputs = (r, k, v, w, u, state)
    return tuple(x.new_empty(x.shape) for x in inputs)


def _keep_for_backward(ctx, inputs, output):
    *tensors, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _backward(ctx, grad_y, grad_state, _):
    *tensors, cu_seqlens, checkpoints = ctx.saved_tensors
    r, state = tensors[0], tensors[5]
    grad_y = torch.zeros_like(r) if grad_y is None else grad_y
    grad_state = torch.zeros_like(state) if grad_state is None else grad_state
    gradients = torch.ops.finchtune.wkv6_backward(
        *tensors, cu_seqlens, checkpoints, grad_y, grad_state
    )
    return *gradients, None, None
