"""Micro batches of long contexts, and the plain gradient of a model on them."""

from functools import cache

import torch
from helpers.support import small_model
from torch.utils._pytree import tree_map

from finchtune.adapters import attach
from finchtune.data.batch import Batch, packed, padded
from finchtune.data.sampling import Segment

LENGTHS = (50, 23, 7)


def segments(lengths=LENGTHS, vocab_size=256):
    generator = torch.Generator().manual_seed(3)
    return [
        Segment(torch.randint(0, vocab_size, (n + 1,), generator=generator).numpy(), None, i)
        for i, n in enumerate(lengths)
    ]


def long_batch(kind: str) -> Batch:
    """A row, rows of several lengths, or documents packed into one row."""
    if kind == "row":
        return padded(segments(LENGTHS[:1]), 50)
    return padded(segments(), 50) if kind == "rows" else packed(segments())


def trainable(trained: str, dtype=torch.float32, grad_checkpoint=0, generation=6):
    """A small model of which everything, an adapter or the initial state is trained."""
    model = small_model(generation=generation)
    if trained in ("bone", "lora", "bone+state"):
        attach(model, trained.split("+")[0], r=8)
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                torch.nn.init.normal_(parameter, std=0.05)
    if "state" in trained:
        if trained == "state":
            model.requires_grad_(False)
        model.add_initial_state()
        for parameter in model.initial_states().values():
            torch.nn.init.normal_(parameter, std=0.3)
    model.grad_checkpoint = grad_checkpoint
    return model.to(dtype)


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def plain_gradients(model, batch):
    """Summed loss and every gradient of the whole context at once."""
    loss, _ = model.loss(*batch)
    loss.backward()
    found = tree_map(torch.clone, gradients(model))
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@cache
def whole_context(trained, dtype, kind, generation):
    """`plain_gradients` of a model and a batch, which many ways of computing them must give."""
    return plain_gradients(trainable(trained, dtype, generation=generation), long_batch(kind))
