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


def begins_from(given: Tensor | None) -> bool:
    """Whether there is a state to continue from: one of at least one sequence."""
    return given is not None and len(given) > 0


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
    goes_on = context.goes_on if context.rank else begins_from(given)
    before, final = LastOfLeft.apply(context, x[:, -1], filled(given, x[:, 0]))
    return before * goes_on, final


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
    goes_on = bool(context.goes_on if context.rank else begins_from(given))
    n_first, wide = len(r), compute_dtype(r)
    begins = torch.ones(len(fresh), 1, 1, 1, dtype=wide, device=r.device)
    begins[:n_first] = not goes_on
    y, after = wkv6(r, k, v, w, u, fresh.to(wide) * begins, cu_seqlens)
    log_decay = -torch.exp(w.to(wide))
    # The last sequence passes on what precedes this part only if it began before it.
    passes_on = goes_on and (cu_seqlens is None or len(cu_seqlens) == 2)
    decay = log_decay.sum(1).exp() * passes_on
    local = after[-n_first:]
    start, final = StateBefore.apply(context, local, decay, filled(given, local))
    end = r.shape[1] if cu_seqlens is None else int(cu_seqlens[1])
    kept = sum_before(log_decay[:, :end].transpose(1, 2)).exp()
    read = (r[:, :end].transpose(1, 2) * kept) @ (start * goes_on)
    added = torch.nn.functional.pad(read.transpose(1, 2), (0, 0, 0, 0, 0, r.shape[1] - end))
    return (y + added).to(y.dtype), final


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
    goes_on = bool(context.goes_on if context.rank else begins_from(given))
    n_first, wide = len(r), compute_dtype(r)
    begins = torch.ones(len(fresh), 1, 1, 1, dtype=wide, device=r.device)
    begins[:n_first] = not goes_on
    y, after = wkv7(r, k, v, w, a, b, fresh.to(wide) * begins, cu_seqlens)
    _, T, H, N = r.shape
    end = T if cu_seqlens is None else int(cu_seqlens[1])
    unit = torch.eye(N, dtype=wide, device=r.device).expand(n_first, H, N, N)
    r, k, v, w, a, b = (x[:, :end] for x in (r, k, torch.zeros_like(v), w, a, b))
    read, transfer = wkv7(r, k, v, w, a, b, unit)
    passes_on = goes_on and (cu_seqlens is None or len(cu_seqlens) == 2)
    local = after[-n_first:]
    start, final = StateBefore.apply(context, local, transfer * passes_on, filled(given, local))
    added = read.to(wide).transpose(1, 2) @ (start * goes_on).mT
    added = torch.nn.functional.pad(added.transpose(1, 2), (0, 0, 0, 0, 0, T - end))
    return (y + added).to(y.dtype), final
