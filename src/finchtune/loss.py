"""Cross entropy over a large vocabulary without ever holding all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MB in fp32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the token losses. The gradient is made chunk by chunk while the logits are at hand.

    Nothing of the size (tokens, vocab) outlives its chunk: what is kept for backward is the
    gradient of `hidden` and, where the head is trained, of `weight`.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        with_hidden, with_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if with_hidden else None
        precise = torch.promote_types(hidden.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=precise) if with_weight else None
        total = hidden.new_zeros((), dtype=precise)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            valid = labels[rows] != IGNORE
            logits = F.linear(hidden[rows], weight).to(precise)
            log_z = torch.logsumexp(logits, dim=-1)
            index = labels[rows].clamp_min(0).unsqueeze(-1)
            picked = logits.gather(-1, index).squeeze(-1)
            total += torch.where(valid, log_z - picked, 0).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = logits.sub_(log_z.unsqueeze(-1)).exp_()
            d_logits.scatter_add_(-1, index, torch.full_like(log_z, -1).unsqueeze(-1))
            d_logits.mul_(valid.unsqueeze(-1))
            low = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(low, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += low.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (d_total,) = grad_outputs
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * d_total.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d_total).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over all unmasked tokens of -log softmax(hidden @ weight.T)[label].

    hidden (..., C), weight (V, C), labels (...) int64 with -100 where the loss is masked.
    Returns a scalar, fp32 (float64 for float64 inputs). All masked: exactly 0.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chunk = max(1, min(hidden.shape[0], CHUNK_ELEMENTS // weight.shape[0]))
    return _ChunkedCrossEntropy.apply(hidden, weight, labels.reshape(-1), chunk)
