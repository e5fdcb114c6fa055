"""`wkv6`: the arguments checked, and the fastest form that this machine offers."""

from torch import Tensor

from finchtune.ops.wkv import by_kernel, check_arguments, compute_dtype, fits_kernel
from finchtune.ops.wkv6.chunked import wkv6_chunked
from finchtune.ops.wkv6.triton import fits_triton, wkv6_triton


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
    rows = {name: (x, "BTHN") for name, x in (("k", k), ("v", v), ("w", w))}
    others = {**rows, "u": (u, "HN"), "state": (state, "SHNN")}
    check_arguments("wkv6", r, others, ("k", "v"), cu_seqlens)
    wide = compute_dtype(r)
    w = w.to(r.dtype)
    state = None if state is None else state.to(wide)
    if fits_kernel(r):
        return by_kernel("wkv6_forward", r, k, v, w, u, state, cu_seqlens)
    inputs = (r, k, v, w, u.to(wide), state, cu_seqlens)
    return wkv6_triton(*inputs) if fits_triton(r) else wkv6_chunked(*inputs)
