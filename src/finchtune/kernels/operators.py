"""The compiled operators as torch sees them: shapes, gradients, and whether there are any."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from finchtune.kernels.build import BuildError, load_library

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
CHECKPOINT_SPAN = 64  # tokens between the states that forward keeps for backward


def checkpoint_dtype(r: Tensor) -> torch.dtype:
    """bf16 where the tensor-core kernel runs, else fp32; the kernels check that they agree."""
    _, T, _, N = r.shape
    tensor_cores = r.device.type == "cuda" and r.dtype == torch.bfloat16 and N == 64 and T > 16
    return torch.bfloat16 if tensor_cores else torch.float32


def fake_forward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of `wkv6_forward`: y, the new state, and the checkpoints for backward."""
    B, T, H, N = r.shape
    # Every sequence adds at most one incomplete span.
    n_checkpoints = B * T // CHECKPOINT_SPAN + state.shape[0] if for_backward else 0
    checkpoints = r.new_empty(n_checkpoints, H, N, N, dtype=checkpoint_dtype(r))
    return r.new_empty(r.shape), state.new_empty(state.shape), checkpoints


def fake_backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """Shapes of `wkv6_backward`: one gradient for each of the six inputs."""
    return tuple(x.new_empty(x.shape) for x in (r, k, v, w, u, state))


def fake_cross_entropy(logits: Tensor, labels: Tensor, l2wrap: float) -> Tensor:
    """Shape of what `cross_entropy_` returns."""
    return logits.new_empty(labels.shape, dtype=torch.float32)


def fake_block_sums(x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """Shape of what `block_sums` returns."""
    return x.new_empty(x.shape[0], r, dtype=dtype)


def fake_add_to_blocks(x: Tensor, s: Tensor) -> None:
    """`add_to_blocks_` returns nothing."""


def fake_bat_row_forward(x: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of `bat_row_forward`: the moved x and the sums."""
    return x.new_empty(x.shape), x.new_empty(x.shape[0], D.shape[1], dtype=torch.float32)


def fake_bat_row_backward(dx: Tensor, x: Tensor, D: Tensor, sums: Tensor) -> Tensor:
    """Shape of what `bat_row_backward_` returns, dD."""
    return D.new_empty(D.shape)


def save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep the inputs and the checkpoints."""
    *tensors, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)  # the checkpoints, large, have no gradient


def backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: None) -> tuple:
    """Gradients of r, k, v, w, u, state; none for cu_seqlens and for_backward."""
    saved = ctx.saved_tensors
    r, state = saved[0], saved[5]
    grad_y = torch.zeros_like(r) if grad_y is None else grad_y
    grad_state = torch.zeros_like(state) if grad_state is None else grad_state
    gradients = torch.ops.finchtune.wkv6_backward(*saved, grad_y, grad_state)
    return *gradients, None, None


@functools.cache
def loaded_devices() -> frozenset[str]:
    """Load the operators, once; the device types they run on. Warns, once, when there are none."""
    try:
        with_cuda = load_library()
    except BuildError as error:
        warnings.warn(f"WKV6 runs in plain torch, which is slower: {error}", stacklevel=2)
        return frozenset()
    torch.library.register_fake("finchtune::wkv6_forward", fake_forward)
    torch.library.register_fake("finchtune::wkv6_backward", fake_backward)
    torch.library.register_fake("finchtune::cross_entropy_", fake_cross_entropy)
    torch.library.register_fake("finchtune::block_sums", fake_block_sums)
    torch.library.register_fake("finchtune::add_to_blocks_", fake_add_to_blocks)
    torch.library.register_fake("finchtune::bat_row_forward", fake_bat_row_forward)
    torch.library.register_fake("finchtune::bat_row_backward_", fake_bat_row_backward)
    torch.library.register_autograd(
        "finchtune::wkv6_forward", backward, setup_context=save_for_backward
    )
    if not with_cuda and torch.cuda.is_available():
        message = "WKV6 runs in plain torch on the GPU, which is slower: install CUDA's nvcc"
        warnings.warn(message, stacklevel=2)
    return frozenset({"cpu", "cuda"} if with_cuda else {"cpu"})


@torch.compiler.assume_constant_result
def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels run on this type of device; compiles them on first use."""
    return device_type in DTYPES and device_type in loaded_devices()


def fits_cpu(*tensors: Tensor) -> bool:
    """Whether the CPU kernels take these: on a CPU, all of one of their dtypes, kernels there."""
    dtype = tensors[0].dtype
    alike = all(x.device.type == "cpu" and x.dtype == dtype for x in tensors)
    return alike and dtype in DTYPES["cpu"] and has_kernels("cpu")


def cpu_paths() -> list[str]:
    """Names of the CPU kernels' forms that this processor runs, the fastest first."""
    assert has_kernels("cpu")
    return torch.ops.finchtune.cpu_paths()


def use_cpu_path(name: str) -> None:
    """Run the CPU kernels in this form from now on: a name from `cpu_paths`, or "fastest"."""
    assert has_kernels("cpu")
    torch.ops.finchtune.use_cpu_path(name)
