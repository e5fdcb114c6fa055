"""What the WKV operators of all generations share: checks, precision, packed sequences."""

import itertools
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from finchtune.errors import UserError
from finchtune.ops.kernels import DTYPES as KERNEL_DTYPES
from finchtune.ops.kernels import device_type, has_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_packing(operator: str, r: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse boundaries that cannot be those of sequences packed into r (1, T, H, N)."""
    if r.shape[0] != 1:
        raise UserError(f"{operator}: cu_seqlens needs a batch of 1, not {r.shape[0]}")
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or not integers:
        raise UserError(
            f"{operator}: cu_seqlens must be n+1 int32 or int64 boundaries of n sequences"
        )
    # Reading a GPU tensor's values would make every call wait for the GPU.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != r.shape[1] or bounds != sorted(bounds):
            raise UserError(
                f"{operator}: cu_seqlens must rise from 0 to T = {r.shape[1]}: {bounds}"
            )


def check_arguments(
    operator: str,
    r: Tensor,
    others: Mapping[str, tuple[Tensor | None, str]],
    alike: Collection[str],
    cu_seqlens: Tensor | None,
) -> None:
    """Raise UserError for the first argument that does not fit r's shape, dtype or device.

    `others` has each argument, None if not given, with its dimensions: letters of B, T, H, N and
    S, the number of sequences. Those named in `alike` must have r's dtype.
    """
    if r.dim() != 4 or 0 in r.shape:
        raise UserError(f"{operator}: r must be (B, T, H, N) and not empty, not {tuple(r.shape)}")
    if r.dtype not in DTYPES:
        raise UserError(f"{operator}: r must be bf16, fp16, fp32 or fp64, not {r.dtype}")
    if cu_seqlens is not None:
        check_packing(operator, r, cu_seqlens)
    sizes = dict(zip("BTHN", r.shape, strict=True))
    sizes["S"] = sizes["B"] if cu_seqlens is None else len(cu_seqlens) - 1
    for name, (tensor, dimensions) in others.items():
        if tensor is None:
            continue
        shape = tuple(sizes[letter] for letter in dimensions)
        if tensor.shape != shape:
            raise UserError(f"{operator}: {name} must be {shape}, not {tuple(tensor.shape)}")
        if tensor.device != r.device:
            raise UserError(f"{operator}: {name} is on {tensor.device}, r on {r.device}")
        if not tensor.is_floating_point():
            raise UserError(f"{operator}: {name} must be floating point, not {tensor.dtype}")
        if name in alike and tensor.dtype != r.dtype:
            raise UserError(f"{operator}: {name} is {tensor.dtype}, r is {r.dtype}; use one dtype")


def compute_dtype(r: Tensor) -> torch.dtype:
    """fp32, or float64 for float64 inputs: the dtype of all sums and of the state."""
    return torch.float64 if r.dtype == torch.float64 else torch.float32


def zero_state(r: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The state before the first token of every sequence, (B or n, H, N, N)."""
    B, _, H, N = r.shape
    n_sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    return r.new_zeros(n_sequences, H, N, N, dtype=compute_dtype(r))


def for_each_sequence(
    form: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    state: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Apply `form(*inputs, state=state)` to each packed sequence with its state."""
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = state[i : i + 1]
        if end > start:
            y, own = form(*(x[:, start:end] for x in inputs), state=own)
            outputs.append(y)
        states.append(own)
    return torch.cat(outputs, dim=1), torch.cat(states)


def in_plain_torch(
    form: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`form(*inputs, state=state)` of a batch or of packed sequences, in fp32 (float64 for it).

    `inputs` are r and its like (B, T, H, N). y comes back in r's dtype.
    """
    r = inputs[0]
    wide = compute_dtype(r)
    with torch.autocast(r.device.type, enabled=False):
        exact = [x.to(wide) for x in inputs]
        state = zero_state(r, cu_seqlens) if state is None else state.to(wide)
        if cu_seqlens is None:
            y, state = form(*exact, state=state)
        else:
            y, state = for_each_sequence(form, exact, state, cu_seqlens)
    return y.to(r.dtype), state


def fits_kernel(r: Tensor) -> bool:
    """Whether a compiled kernel exists for inputs like r (B, T, H, N) on this machine."""
    device, N = device_type(r), r.shape[-1]
    fits = r.dtype in KERNEL_DTYPES.get(device, ()) and N % 8 == 0 and 8 <= N <= 128
    return fits and has_kernels(device)


def suits_triton(r: Tensor) -> bool:
    """Whether Triton kernels can take inputs like r: real ones of at most 32 bits on a GPU."""
    narrow = r.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return r.device.type == "cuda" and narrow and not isinstance(r, FakeTensor)


def by_kernel(operator: str, r: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and the new state by a compiled operator; its last input is cu_seqlens, or None.

    Rows are in one dtype, the state is in fp32.
    """
    *tensors, cu_seqlens = r, *others
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(r.device, torch.int32)
    saves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    forward = getattr(torch.ops.finchtune, operator)
    y, new_state, _ = forward(*tensors, cu_seqlens, saves)
    return y, new_state
