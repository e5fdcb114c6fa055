"""Contexts longer than memory: a micro batch read and trained on in chunks of tokens.

Exact: the model reads all chunks, and only the states between them stay. Then, from the last chunk
to the first, each is read again with its activations, and its backward takes the gradient of the
state after it and gives that of the state before. The sum over the chunks is the gradient of the
whole context. Truncated: one pass, with no gradient from one chunk into another.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from finchtune.data import Batch
from finchtune.data.chunks import Chunk
from finchtune.models import LanguageModel, State

Read = Callable[[Batch, State | None], State]
"""(a chunk's batch, the state before it) -> the state after it."""
Lose = Callable[[Batch, State | None], tuple[Tensor, State]]
"""The same with the summed loss, differentiable."""
Backward = Callable[[Tensor, Tensor], Any]
"""(summed loss, what to add to it when it is scaled as a step wants it): runs the backward.

It may multiply all gradients by one factor, such as fp16's loss scale.
"""


def own_calls(model: LanguageModel) -> tuple[Read, Lose]:
    """The two calls of a model itself, without DeepSpeed."""

    def read(batch: Batch, state: State | None) -> State:
        return model.hidden(batch.tokens, state, batch.cu_seqlens)[1]

    def lose(batch: Batch, state: State | None) -> tuple[Tensor, State]:
        return model.loss(*batch, state=state)

    return read, lose


def carried_into(chunk: Chunk, state: State | None) -> State | None:
    """Of the state after the chunk before, the part that continues in this one.

    That of no sequence where none does: ZeRO-3's hooks, and with them its collective calls, follow
    from what requires a gradient, which must be alike on all ranks.
    """
    if state is None:
        return None

    def select(x: Tensor) -> Tensor:
        index = chunk.carried.to(x.device) % len(x)
        whole = torch.equal(chunk.carried, torch.arange(len(x)))
        return x if whole else x.index_select(0, index)

    return tree_map(select, state)


@torch.no_grad()
def boundary_states(
    read: Read, chunks: list[Chunk], seed: int, offload: bool
) -> list[State | None]:
    """The state before each chunk, on the host if `offload`; chunk i drops what seed + i says."""
    before: list[State | None] = [None]
    ends = list(itertools.accumulate(len(chunk.carried) for chunk in chunks))
    wholes: list[Tensor] = []
    state: State | None = None
    for index, (chunk, after) in enumerate(itertools.pairwise(chunks)):
        torch.manual_seed(seed + index)
        state = carried_into(after, read(chunk.batch, state))
        wholes = wholes or [room_for(leaf, ends[-1], offload) for leaf in tree_leaves(state)]
        places = iter([whole[ends[index] : ends[index + 1]] for whole in wholes])
        before.append(tree_map(lambda leaf, places=places: next(places).copy_(leaf), state))
        state = state if offload else before[-1]
    return before


def room_for(leaf: Tensor, n_sequences: int, offload: bool) -> Tensor:
    """Memory for one tensor of all states between chunks, of so many sequences in all.

    One allocation: small ones, left where they were made among a chunk's activations, would keep
    the memory of these from being used again.
    """
    shape = (n_sequences, *leaf.shape[1:])
    return torch.empty(shape, dtype=leaf.dtype, device="cpu" if offload else leaf.device)


def exact_backward(
    read: Read, lose: Lose, chunks: list[Chunk], backward: Backward, offload: bool = False
) -> Tensor:
    """Run the backward of a whole context; returns its summed loss, detached.

    `backward` is called for each chunk, the last first, and adds to the parameters' gradients.
    Takes the memory of one chunk's activations and of the states between chunks.
    """
    seed = int(torch.randint(2**62, ()))  # the same dropout whenever a chunk is read
    before = boundary_states(read, chunks, seed, offload)
    d_after: list[Tensor] = []
    total = torch.zeros(())
    for index in reversed(range(len(chunks))):
        torch.manual_seed(seed + index)
        loss, d_after = chunk_backward(lose, chunks[index:], before.pop(), d_after, backward)
        total = total.to(loss.device) + loss
    return total


def chunk_backward(
    lose: Lose, chunks: list[Chunk], state: State | None, d_after: list[Tensor], backward: Backward
) -> tuple[Tensor, list[Tensor]]:
    """The backward of the first of `chunks`, from the gradient of the state after it, if any.

    Returns its summed loss, detached, and the gradient of the state before it, by its leaves. It
    is put where that state was, for the same reason as in `room_for`.
    """
    batch = chunks[0].batch
    given, structure = tree_flatten(state or [])
    leaves = [leaf.detach().to(batch.tokens.device).requires_grad_() for leaf in given]
    loss, after = lose(batch, tree_unflatten(leaves, structure) or None)
    unit = torch.zeros_like(loss, requires_grad=True)
    backward(loss, unit + pull(after, chunks[1:], d_after))
    scale = gradient_of(unit)
    return loss.detach(), [replaced(x, precise(gradient_of(x)) / scale) for x in leaves]


def replaced(leaf: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in a leaf's memory, unless it is wider."""
    return leaf.detach().copy_(gradient) if leaf.dtype == gradient.dtype else gradient


def pull(after: State, following: list[Chunk], d_after: list[Tensor]) -> Tensor | float:
    """A number whose gradient in the state after a chunk is `d_after`, by the state's leaves."""
    if not d_after:
        return 0.0
    carried = tree_leaves(carried_into(following[0], after))
    return sum((precise(x) * d).sum() for x, d in zip(carried, d_after, strict=True))


def precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def truncated_backward(lose: Lose, chunks: list[Chunk], backward: Backward) -> Tensor:
    """Like `exact_backward`, but every chunk takes the state before it as given."""
    state, total = None, torch.zeros(())
    for chunk in chunks:
        state = carried_into(chunk, tree_map(Tensor.detach, state or []) or None)
        loss, state = lose(chunk.batch, state)
        backward(loss, torch.zeros_like(loss))
        total = total.to(loss.device) + loss.detach()
    return total


@torch.no_grad()
def chunked_loss(lose: Lose, chunks: list[Chunk]) -> Tensor:
    """The summed loss of a whole context."""
    state, total = None, torch.zeros(())
    for chunk in chunks:
        loss, state = lose(chunk.batch, carried_into(chunk, state))
        total = total.to(loss.device) + loss
    return total
