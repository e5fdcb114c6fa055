"""`wkv7`: the arguments checked, and the fastest form that this machine offers."""

from torch import Tensor

from finchtune.ops.wkv import by_kernel, check_arguments, compute_dtype, fits_kernel
from finchtune.ops.wkv7.chunked import wkv7_chunked
from finchtune.ops.wkv7.triton import fits_triton, wkv7_triton


def wkv7(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's memory: S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T, y_t = S_t r_t.

    Here d_t = exp(-exp(w_t)): `w` is the raw decay, as the model computes it,
    w = -softplus(-(...)) - 0.5, hence d in (0.545, 1). Forms that divide by decays are exact to
    rounding for w up to 1. The model gives a = -kk and b = kk * rate, with kk of length 1 in each
    head and the rate in (0, 1).

    Args:
        r, k, v, a, b: (B, T, H, N) in one of bf16, fp16, fp32, fp64.
        w: (B, T, H, N), converted to r's dtype.
        state: (B, H, N value, N key), zero when None; fp32, or fp64 for fp64 inputs. Note the
            order: the transpose of `wkv6`'s, as official state files have it.
        cu_seqlens: (n+1) integer boundaries of n sequences packed into a batch of 1; the state is
            then (n, H, N, N), one for each sequence. On a GPU its values are not checked.

    Returns:
        y (B, T, H, N) in r's dtype, and the state after the last token in the state's dtype.
        Both are differentiable in r, k, v, w, a, b and state.

    Raises:
        UserError: a shape, dtype or device does not fit.

    Source: "RWKV-7 Goose", arXiv 2503.14456, section 4.
    """
    named = {"k": k, "v": v, "w": w, "a": a, "b": b}
    others = {**{name: (x, "BTHN") for name, x in named.items()}, "state": (state, "SHNN")}
    check_arguments("wkv7", r, others, ("k", "v", "a", "b"), cu_seqlens)
    state = None if state is None else state.to(compute_dtype(r))
    inputs = (r, k, v, w.to(r.dtype), a, b, state, cu_seqlens)
    if fits_kernel(r):
        return by_kernel("wkv7_forward", *inputs)
    return wkv7_triton(*inputs) if fits_triton(r) else wkv7_chunked(*inputs)
