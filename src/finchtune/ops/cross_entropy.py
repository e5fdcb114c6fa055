"""Cross entropy over a large vocabulary without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from finchtune.ops.kernels import device_type, fits

IGNORE = -100
# Logits held at once. A CPU streams the whole weight for each chunk, so that fewer rows cost time;
# a GPU needs enough rows to be busy.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 24}
MOST_ELEMENTS = 1 << 27  # on a GPU with room for them: 2,048 rows of 65,536


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the token losses. The gradient is made chunk by chunk while the logits are at hand.

    Nothing of the size (tokens, vocab) outlives its chunk: what is saved for backward is the
    gradient of `hidden` and, where the head is trained, of `weight`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, l2wrap: float
    ) -> Tensor:
        with_hidden, with_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if with_hidden else None
        precise = torch.promote_types(hidden.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=precise) if with_weight else None
        total = hidden.new_zeros((), dtype=precise)
        # The same memory for all chunks: fresh memory of this size costs as much as its use.
        low_buffer = hidden.new_empty(chunk, weight.shape[0])
        # The compiled operator computes in fp32 whatever the dtype of the logits.
        in_place = precise == hidden.dtype or fits(hidden)
        buffer = low_buffer if in_place else torch.empty_like(low_buffer, dtype=precise)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            n_rows = len(labels[rows])
            low, logits = low_buffer[:n_rows], buffer[:n_rows]
            torch.mm(hidden[rows], weight.T, out=low)
            if logits is not low:
                logits.copy_(low)
            losses = _losses_to_gradients(logits, labels[rows].clamp_min(0), l2wrap)
            # Masked here and not in the logits, which are many more.
            valid = labels[rows] != IGNORE
            total += torch.where(valid, losses, 0).sum()
            if logits is not low:
                low.copy_(logits)
            if d_hidden is not None:
                torch.mm(low, weight, out=d_hidden[rows]).mul_(valid.unsqueeze(-1))
            if d_weight is not None:
                d_weight += low.T @ (hidden[rows] * valid.unsqueeze(-1))
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (d_total,) = grad_outputs
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            # The scale rounded to bf16 would be wrong by up to 0.4 % in every gradient below.
            d_hidden = d_hidden.to(d_total.dtype).mul_(d_total).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d_total).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def _losses_to_gradients(logits: Tensor, labels: Tensor, l2wrap: float) -> Tensor:
    """Each token's loss; turns `logits` (tokens, V) into their gradient, in place."""
    if fits(logits):
        return torch.ops.finchtune.cross_entropy_(logits, labels, l2wrap)
    index = labels.unsqueeze(-1)
    largest = logits.max(-1, keepdim=True) if l2wrap else None
    torch.log_softmax(logits, -1, out=logits)
    losses = -logits.gather(-1, index).squeeze(-1)
    logits.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=logits.dtype))
    if largest is not None:
        logits.scatter_add_(-1, largest.indices, l2wrap * largest.values)
    return losses


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, l2wrap: float = 0.0
) -> Tensor:
    """Sum over all unmasked tokens of -log softmax(hidden @ weight.T)[label].

    hidden (..., C), weight (V, C), labels (...) int64 with -100 where the loss is masked.
    Returns a scalar, fp32 (float64 for float64 inputs). All masked: exactly 0.

    With `l2wrap` the gradient, not the value, is that of the loss plus l2wrap / 2 times the
    square of each unmasked token's largest logit (RWKV-LM's L2Wrap, which keeps logits from
    growing without bound).
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    elements = elements_at_once(hidden)
    chunk = max(1, min(hidden.shape[0], elements // weight.shape[0]))
    return _ChunkedCrossEntropy.apply(hidden, weight, labels.reshape(-1), chunk, l2wrap)


def elements_at_once(hidden: Tensor) -> int:
    """How many logits to hold: on a GPU as many as fit an eighth of the memory that is free.

    A power of two, so that the pieces are the same in steps alike: a product of other rows may
    round otherwise.
    """
    elements = CHUNK_ELEMENTS.get(device_type(hidden), CHUNK_ELEMENTS["cuda"])
    if hidden.device.type != "cuda" or isinstance(hidden, FakeTensor):
        return elements
    unused = torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
    free = torch.cuda.mem_get_info(hidden.device)[0] + unused
    # A logit in the dtype of the product and, where no kernel takes that, in fp32.
    return sized_by(free // 8 // (hidden.element_size() + 4), elements)


def sized_by(room: int, least: int) -> int:
    """The largest `least` times a power of two within `room`, at most MOST_ELEMENTS."""
    elements = least
    while 2 * elements <= min(room, MOST_ELEMENTS):
        elements *= 2
    return elements
