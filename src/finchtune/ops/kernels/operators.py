"""The compiled operators as torch sees them: gradients, and whether there are any."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finchtune.ops.kernels.build import BuildError, load_library
from finchtune.ops.kernels.fakes import SHAPES

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


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
        warnings.warn(
            f"there are no compiled kernels, plain torch runs, which is slower: {error}",
            stacklevel=2,
        )
        return frozenset()
    for name, shapes in SHAPES.items():
        torch.library.register_fake(f"finchtune::{name}", shapes)
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


_set_aside: list[None] = []  # one for each time they are


@contextlib.contextmanager
def cpu_kernels_set_aside() -> Iterator[None]:
    """Within, `fits_cpu` is never true: the code runs as on a device without these kernels."""
    _set_aside.append(None)
    try:
        yield
    finally:
        _set_aside.pop()


def fits_cpu(*tensors: Tensor) -> bool:
    """Whether the CPU kernels take these: on a CPU, all of one of their dtypes, kernels there."""
    dtype = tensors[0].dtype
    if _set_aside:
        return False
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
