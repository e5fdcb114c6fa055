"""`wkv6`: the arguments checked, and the fastest form that this machine offers."""

import torch
from torch import Tensor

from finchtune.errors import UserError
from finchtune.ops.kernels import DTYPES as KERNEL_DTYPES
from finchtune.ops.kernels import has_kernels
from finchtune.ops.wkv6.chunked import wkv6_chunked
from finchtune.ops.wkv6.sequences import compute_dtype
from finchtune.ops.wkv6.triton import fits_triton, wkv6_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_packing(r: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse boundaries that cannot be those of sequences packed into r (1, T, H, N)."""
    if r.shape[0] != 1:
        raise UserError(f"wkv6: cu_seqlens needs a batch of 1, not {r.shape[0]}")
    integers = cu_seqlens.dtype in (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or not integers:
        raise UserError("wkv6: cu_seqlens must be n+1 int32 or int64 boundaries of n sequences")
    # Reading a GPU tensor's values would make every call wait for the GPU.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != r.shape[1] or bounds != sorted(bounds):
            raise UserError(f"wkv6: cu_seqlens must rise from 0 to T = {r.shape[1]}: {bounds}")


def check_arguments(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise UserError for the first argument that does not fit r's shape, dtype or device."""
    if r.dim() != 4 or 0 in r.shape:
        raise UserError(f"wkv6: r must be (B, T, H, N) and not empty, not {tuple(r.shape)}")
    if r.dtype not in DTYPES:
        raise UserError(f"wkv6: r must be bf16, fp16, fp32 or fp64, not {r.dtype}")
    if cu_seqlens is not None:
        check_packing(r, cu_seqlens)
    B, _, H, N = r.shape
    n_sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    expected = {"k": (k, r.shape), "v": (v, r.shape), "w": (w, r.shape), "u": (u, (H, N))}
    if state is not None:
        expected["state"] = (state, (n_sequences, H, N, N))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise UserError(f"wkv6: {name} must be {tuple(shape)}, not {tuple(tensor.shape)}")
        if tensor.device != r.device:
            raise UserError(f"wkv6: {name} is on {tensor.device}, r on {r.device}")
        if not tensor.is_floating_point():
            raise UserError(f"wkv6: {name} must be floating point, not {tensor.dtype}")
        if name in ("k", "v") and tensor.dtype != r.dtype:
            raise UserError(f"wkv6: {name} is {tensor.dtype}, r is {r.dtype}; use one dtype")


def fits_kernel(r: Tensor) -> bool:
    """Whether a compiled kernel exists for inputs like r (B, T, H, N) on this machine."""
    device, N = r.device.type, r.shape[-1]
    fits = r.dtype in KERNEL_DTYPES.get(device, ()) and N % 8 == 0 and 8 <= N <= 128
    return fits and has_kernels(device)


def wkv6_compiled(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv6` by the compiled kernels; r, k, v, w in one dtype, u and state fp32."""
    inputs = (r, k, v, w, u, state)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(r.device, torch.int32)
    for_backward = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )
    y, new_state, _ = torch.ops.finchtune.wkv6_forward(*inputs, cu_seqlens, for_backward)
    return y, new_state


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6's memory: y_t = r_t (S_t + diag(u) k_t^T v_t), S_{t+1} = diag(d_t) S_t + k_t^T v_t.

    Here d_t = exp(-exp(w_t)): `w` is the raw decay, as the model computes it.

    Args:
        r, k, v: (B, T, H, N) in one of bf16, fp16, fp32, fp64.
        w: (B, T, H, N), converted to r's dtype.
        u: (H, N), the bonus of the current token.
        state: (B, H, N key, N value), zero when None; fp32, or fp64 for fp64 inputs.
        cu_seqlens: (n+1) integer boundaries of n sequences packed into a batch of 1; the state is
            then (n, H, N, N), one for each sequence. On a GPU its values are not checked.

    Returns:
        y (B, T, H, N) in r's dtype, and the state after the last token in the state's dtype.
        Both are differentiable in r, k, v, w, u and state.

    Raises:
        UserError: a shape, dtype or device does not fit.

    Source: "Eagle and Finch", arXiv 2404.05892, equations 19 and 20.
    """
    check_arguments(r, k, v, w, u, state, cu_seqlens)
    wide = compute_dtype(r)
    w, u = w.to(r.dtype), u.to(wide)
    state = None if state is None else state.to(wide)
    inputs = (r, k, v, w, u, state, cu_seqlens)
    if fits_kernel(r):
        return wkv6_compiled(*inputs)
    return wkv6_triton(*inputs) if fits_triton(r) else wkv6_chunked(*inputs)
