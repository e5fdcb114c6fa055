"""Rows cut into shards of r channels: what Bone and Bat do beside their products with W.

Compiled where there are kernels; the plain forms run everywhere, and are their oracle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from finchtune.adapters.base import merge_precision
from finchtune.ops.kernels import device_type, fits

GROUP_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Largest temporary tensor of plain Bat: on a CPU small, on a GPU few but full launches."""
LARGEST_SHARD = 256  # above it torch's own products are as fast on a CPU


def compiled(*tensors: Tensor) -> bool:
    """Whether compiled operators take these. They have no gradients: not where autograd watches."""
    return not torch.is_grad_enabled() and fits(*tensors)


def moves_shards(x: Tensor, D: Tensor, *others: Tensor) -> bool:
    """Whether compiled operators move the shards of x (T, k) by D (k/r, r, r)."""
    narrow = D.shape[1] <= LARGEST_SHARD or device_type(x) != "cpu"
    return narrow and compiled(x, D, *others)


def tiled_identity(r: int, k: int) -> Tensor:
    """The matrix (r, k) of which `shard_sum` is the product with x: identities side by side."""
    return torch.eye(r).repeat(1, -(-k // r))[:, :k]


def shard_sum(x: Tensor, r: int, dtype: torch.dtype | None = None) -> Tensor:
    """x (..., k) -> (..., r): the sum of its shards of r channels, the last padded with zeros.

    In `dtype`, that of x if None.
    """
    if x.dim() == 2 and compiled(x):
        return torch.ops.finchtune.shard_sums(x, r, dtype or x.dtype)
    padding = -x.shape[-1] % r
    if padding:
        x = F.pad(x, (0, padding))
    return x.unflatten(-1, (-1, r)).sum(-2, dtype=dtype)


def add_to_shards(x: Tensor, s: Tensor) -> None:
    """Add s (T, r) to every shard of r columns of x (T, k), in place; the last may be narrower."""
    if compiled(x):
        torch.ops.finchtune.add_to_shards_(x, s)
    else:
        add_to_each_shard(x, s)


def add_to_each_shard(x: Tensor, s: Tensor) -> None:
    """`add_to_shards` in plain torch."""
    r = s.shape[1]
    whole = x.shape[1] // r * r
    x[:, :whole].unflatten(1, (-1, r)).add_(s.unsqueeze(1))
    x[:, whole:].add_(s[:, : x.shape[1] - whole])


def move_shards(x: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """x + u (T, k) and sum_b u_b (T, r), at least fp32, for u_b = D_b x_b of the shards of x.

    x (T, k), D (k/r, r, r).
    """
    if moves_shards(x, D):
        return torch.ops.finchtune.bat_row_forward(x, D)
    x = x.unflatten(1, D.shape[:2])
    moved = torch.empty_like(x)
    sums = torch.zeros_like(x[:, 0], dtype=merge_precision(x))
    for part in groups(D, len(x), GROUP_ELEMENTS):
        u = torch.bmm(x[:, part].transpose(0, 1), D[part].mT)
        torch.add(x[:, part], u.transpose(0, 1), out=moved[:, part])
        sums += u.sum(0)
    return moved.flatten(1), sums


def move_shards_backward(dx: Tensor, x: Tensor, D: Tensor, sums: Tensor) -> Tensor:
    """dD of `move_shards`, and dx made that of x in place, from the gradients of its results.

    dx (T, k) comes in as that of x + u, and sums (T, r), at least fp32, as that of sum_b u_b.
    With q_b = dx_b + sums: dD_b = q_b x_b^T over all tokens, dx_b + D_b^T q_b.
    """
    if moves_shards(x, D):
        return torch.ops.finchtune.bat_row_backward_(dx, x, D, sums)
    x, dx = x.unflatten(1, D.shape[:2]), dx.unflatten(1, D.shape[:2])
    dD = torch.empty_like(D)
    for part in groups(D, len(x), GROUP_ELEMENTS):
        # Contiguous: a bmm of the transposed view would be slow in bfloat16 on a CPU.
        q = dx[:, part].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        q += sums
        dD[part] = torch.bmm(q.mT, x[:, part].transpose(0, 1))
        dx[:, part].add_(torch.bmm(q, D[part]).transpose(0, 1))  # += would write to a leaf
    return dD


def groups(D: Tensor, length: int, sizes: dict[str, int]) -> list[slice]:
    """D's shards (n, r, r) in groups of which r * length * their number fits, by device type."""
    count, r, _ = D.shape
    elements = sizes.get(device_type(D), sizes["cuda"])
    step = max(1, elements // max(1, length) // r)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
