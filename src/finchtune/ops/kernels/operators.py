"""The compiled operators as torch sees them: gradients, and whether there are any."""

import functools
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from finchtune.ops.kernels import composites
from finchtune.ops.kernels.build import load_libraries
from finchtune.ops.kernels.devices import are_absent, are_set_aside, device_type, stands_for
from finchtune.ops.kernels.fakes import SHAPES
from finchtune.ops.kernels.toolkit import BuildError

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keep the inputs and the checkpoints."""
    *tensors, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])
    ctx.set_materialize_grads(False)  # the checkpoints, large, have no gradient


def gradients(
    operator: str, ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: None
) -> tuple[Any, ...]:
    """Those of the rows and of a given state by `operator`; none for cu_seqlens, for_backward."""
    saved = ctx.saved_tensors
    r, state = saved[0], saved[-3]
    grad_y = torch.zeros_like(r) if grad_y is None else grad_y
    backward = getattr(torch.ops.finchtune, operator)
    *of_rows, of_state = backward(*saved, grad_y, grad_state)
    return *of_rows, None if state is None else of_state, None, None


def warn_of(failures: dict[str, BuildError]) -> None:
    """One warning for each type of device without kernels: what runs instead, why, what helps."""
    for device, error in failures.items():
        if device == "cpu":
            instead = "there are no compiled CPU kernels, plain torch runs, which is slower"
        elif find_spec("fla"):
            instead = "WKV runs on the GPU in flash-linear-attention's kernels, which are slower"
        else:
            instead = (
                "WKV runs on the GPU in plain torch, which is far slower and needs much memory; "
                "`pip install flash-linear-attention` helps, more so does compiling our kernels"
            )
        warnings.warn(f"{instead}: {error}", stacklevel=4)


@functools.cache
def loaded_devices() -> frozenset[str]:
    """Load the operators, once; the device types they run on. Warns, once for each that failed."""
    outcome = load_libraries()
    warn_of({device: error for device, error in outcome.items() if error is not None})
    loaded = frozenset(device for device, error in outcome.items() if error is None)
    if loaded:
        for name, shapes in SHAPES.items():
            torch.library.register_fake(f"finchtune::{name}", shapes)
        composites.register()
        for wkv in ("wkv6", "wkv7"):
            torch.library.register_autograd(
                f"finchtune::{wkv}_forward",
                functools.partial(gradients, f"{wkv}_backward"),
                setup_context=save_for_backward,
            )
    return loaded


def has_kernels(device: str) -> bool:
    """Whether compiled kernels run on this type of device; compiles them on first use."""
    if are_absent():
        return False
    if device == stands_for():
        device = "cpu"  # whose library knows all operators by name
    return device in DTYPES and device in loaded_devices()


# What torch.compiler.assume_constant_result sets. It would import torch's compiler, a second of
# every command's time.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fits(*tensors: Tensor) -> bool:
    """Whether kernels take these: on one device with them, all of one of its dtypes."""
    dtype, device = tensors[0].dtype, device_type(tensors[0])
    if are_set_aside():
        return False
    alike = all(x.device == tensors[0].device and x.dtype == dtype for x in tensors)
    return alike and dtype in DTYPES.get(device, ()) and has_kernels(device)


def fits_cpu(*tensors: Tensor) -> bool:
    """As `fits`, on a CPU: for operators that exist there alone."""
    return device_type(tensors[0]) == "cpu" and fits(*tensors)


def cpu_paths() -> list[str]:
    """Names of the CPU kernels' forms that this processor runs, the fastest first."""
    assert has_kernels("cpu")
    return torch.ops.finchtune.cpu_paths()


def use_cpu_path(name: str) -> None:
    """Run the CPU kernels in this form from now on: a name from `cpu_paths`, or "fastest"."""
    assert has_kernels("cpu")
    torch.ops.finchtune.use_cpu_path(name)
