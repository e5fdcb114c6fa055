"""What the parts of a context, one in each process, tell each other: vectors and WKV states.

Their sizes do not depend on the number of tokens. A state that all processes hold alike (what a
context starts from, and what it ends with) has the same gradient in all of them.
"""

from typing import Any

import torch
from torch import Tensor

from finchtune.distributed.context import ContextGroup
from finchtune.ops.wkv import compute_dtype
from finchtune.ops.wkv6 import wkv6
from finchtune.ops.wkv6.chunked import sum_before
from finchtune.ops.wkv7 import wkv7


class LastOfLeft(torch.autograd.Function):
    """What precedes each process's part: its left neighbour's last tokens."""

    @staticmethod
    def forward(ctx: Any, context: ContextGroup, last: Tensor, given: Tensor) -> Any:
        """`last` (k, C) of this part; `given` (k, C) precedes the first part -> what precedes this
        one, and the last of all.
        """
        ctx.context = context
        everyones = context.gather(last)
        before = everyones[context.rank - 1] if context.rank else given.clone()
        return before, everyones[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor]:
        d_before, d_final = gradients
        everyones = ctx.context.gather(d_before)
        right = ctx.context.rank + 1
        d_last = everyones[right] if right < len(everyones) else d_final
        return None, d_last, everyones[0]


class StateBefore(torch.autograd.Function):
    """The WKV state before each part: S_0 = given, S_{p+1} = passed(S_p, transfer_p) + local_p."""

    @staticmethod
    def forward(
        ctx: Any, context: ContextGroup, local: Tensor, transfer: Tensor, given: Tensor
    ) -> Any:
        """local, given (k, H, N, N), transfer as in `passed` -> the state before this part, and
        that after all.
        """
        locals_, transfers = context.gather(local), context.gather(transfer)
        states = [given]
        for own, one in zip(locals_, transfers, strict=True):
            states.append(passed(states[-1], one) + own)
        ctx.context = context
        before = states[context.rank].clone()
        ctx.save_for_backward(before, *transfers)
        return before, states[-1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        context: ContextGroup = ctx.context
        before, *transfers = ctx.saved_tensors
        d_before, d_state = gradients
        d_local = d_state
        for p, own in reversed(list(enumerate(context.gather(d_before)))):
            if p == context.rank:
                d_local = d_state
            transposed = transfers[p].mT if is_matrix(transfers[p], own) else transfers[p]
            d_state = own + passed(d_state, transposed)
        matrix = is_matrix(transfers[0], before)
        d_transfer = before.mT @ d_local if matrix else (d_local * before).sum(-1)
        return None, d_local, d_transfer, d_state


def is_matrix(transfer: Tensor, state: Tensor) -> bool:
    """Whether a transfer is a matrix for each head, not a decay for each row of the state."""
    return transfer.dim() == state.dim()


def passed(state: Tensor, transfer: Tensor) -> Tensor:
    """What tokens leave of a state (k, H, N, N): `transfer` (k, H, N) decays its rows, (k, H, N, N)
    is multiplied from the right.
    """
    return state @ transfer if is_matrix(transfer, state) else transfer.unsqueeze(-1) * state


def continues(context: ContextGroup, given: Tensor | None) -> bool:
    """Whether this part's first sequences began before it: in another part, or with a state of at
    least one sequence that is given.
    """
    return bool(context.goes_on) if context.rank else given is not None and len(given) > 0


def filled(given: Tensor | None, like: Tensor) -> Tensor:
    """A given state in `like`'s shape and dtype: zeros where there is none, or that of none."""
    none = torch.zeros_like(like)
    if given is None:
        return none
    return torch.cat([given.to(like.dtype), none[len(given) :]])


def shift_across(context: ContextGroup, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """What precedes the first sequences of this part of x (B, T, C), zero where they begin here,
    and the last token of the whole context, both (B, C).

    `given` (B, C) precedes the whole context, if that continues a state.
    """
    before, final = LastOfLeft.apply(context, x[:, -1], filled(given, x[:, 0]))
    return before * continues(context, given), final


def starts_of(r: Tensor, fresh: Tensor, goes_on: bool) -> Tensor:
    """What the sequences of a part (B, T, H, N) start from: zero for the first ones if they began
    before it, else `fresh` (S, H, N, N).
    """
    begins = torch.ones(len(fresh), 1, 1, 1, dtype=compute_dtype(r), device=r.device)
    begins[: len(r)] = not goes_on
    return fresh.to(begins.dtype) * begins


def first_end(r: Tensor, cu_seqlens: Tensor | None) -> int:
    """Where the first sequence of a part (B, T, H, N) ends."""
    return r.shape[1] if cu_seqlens is None else int(cu_seqlens[1])


def passes_on(goes_on: bool, cu_seqlens: Tensor | None) -> bool:
    """Whether the part's last sequence began before it, so that what precedes reaches the next."""
    return goes_on and (cu_seqlens is None or len(cu_seqlens) == 2)


def added_to(y: Tensor, read: Tensor) -> Tensor:
    """y (B, T, H, N) and what its first tokens read besides (B, H, end, N)."""
    rest = y.shape[1] - read.shape[2]
    return (y + torch.nn.functional.pad(read.transpose(1, 2), (0, 0, 0, 0, 0, rest))).to(y.dtype)


def wkv6_across(
    context: ContextGroup,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    fresh: Tensor,
    given: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv6` of this process's part of a context, and the state after the whole context.

    `fresh` (S, H, N, N) is what sequences begin from, `given` (B, H, N, N) the state that the
    whole context continues. y is linear in the state: the kernel runs from zero, and what the
    state before adds to y comes on top. Shapes otherwise as in `wkv6`; of a packed context the
    state is that of its last sequence.
    """
    goes_on, end = continues(context, given), first_end(r, cu_seqlens)
    y, after = wkv6(r, k, v, w, u, starts_of(r, fresh, goes_on), cu_seqlens)
    log_decay = -torch.exp(w.to(compute_dtype(r)))
    decay = log_decay.sum(1).exp() * passes_on(goes_on, cu_seqlens)
    local = after[-len(r) :]
    start, final = StateBefore.apply(context, local, decay, filled(given, local))
    kept = sum_before(log_decay[:, :end].transpose(1, 2)).exp()
    read = (r[:, :end].transpose(1, 2) * kept) @ (start * goes_on)
    return added_to(y, read), final


def wkv7_across(
    context: ContextGroup,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    fresh: Tensor,
    given: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` of this process's part of a context, as `wkv6_across`.

    What a state before this part becomes, and what it adds to y, is the state times what the
    operator makes of the unit matrix without values.
    """
    goes_on, end = continues(context, given), first_end(r, cu_seqlens)
    y, after = wkv7(r, k, v, w, a, b, starts_of(r, fresh, goes_on), cu_seqlens)
    B, _, H, N = r.shape
    unit = torch.eye(N, dtype=compute_dtype(r), device=r.device).expand(B, H, N, N)
    r, k, v, w, a, b = (x[:, :end] for x in (r, k, torch.zeros_like(v), w, a, b))
    read, transfer = wkv7(r, k, v, w, a, b, unit)
    transfer = transfer * passes_on(goes_on, cu_seqlens)
    local = after[-B:]
    start, final = StateBefore.apply(context, local, transfer, filled(given, local))
    return added_to(y, read.to(unit.dtype).transpose(1, 2) @ (start * goes_on).mT), final
