"""One of several processes that share contexts: the gradients of all its calls, on rank 0."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from helpers.contexts import long_batch, trainable

from finchtune import distributed
from finchtune.data.chunks import cut
from finchtune.data.parts import part_of
from finchtune.distributed.context import context_group
from finchtune.training.chunked import exact_backward

CASES = [
    (kind, trained, dtype, length, grad_checkpoint)
    for kind in ("row", "rows", "packed")
    for trained in ("all", "bone+state", "state")
    for length in (0, 12)
    for dtype, grad_checkpoint in ((torch.float64, 0), (torch.float32, 1))
    if dtype == torch.float64 or trained == "all"
]


def shared_gradients(context, case, generation):
    """Loss and gradients, summed over the processes, of a context that these share."""
    kind, trained, dtype, length, grad_checkpoint = case
    model = trainable(trained, dtype, grad_checkpoint, generation)
    batch = long_batch(kind)
    model.share_contexts(context)

    def lose(batch, state):
        part, context.goes_on = part_of(batch, context.rank, context.size)
        return model.loss(*part, state=state)

    def read(batch, state):
        part, context.goes_on = part_of(batch, context.rank, context.size)
        return model.hidden(part.tokens, state, part.cu_seqlens)[1]

    with context.reading():
        if length:
            length = length // context.size * context.size
            loss = exact_backward(read, lose, cut(batch, length), lambda a, b: (a + b).backward())
        else:
            loss, _ = lose(batch, None)
            loss.backward()
    found = {"loss": loss.detach().to(dtype)}
    found |= {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for tensor in found.values():
        dist.all_reduce(tensor, group=context.group)
    return found


def bytes_for(context, n_tokens, generation):
    """What this process sends in a forward and a backward of a row of so many tokens."""
    model = trainable("all", generation=generation)
    model.share_contexts(context)
    tokens = torch.randint(0, 256, (1, n_tokens // context.size))
    before = context.bytes_sent
    with context.reading():
        context.goes_on = context.rank > 0
        model.loss(tokens, tokens)[0].backward()
    return context.bytes_sent - before


def main():
    distributed.init_process_group(torch.device("cpu"))
    context = context_group(distributed.world_size(), timedelta(minutes=2))
    found = {}
    for generation in (6, 7):
        results = [shared_gradients(context, case, generation) for case in CASES]
        sent = [bytes_for(context, n_tokens, generation) for n_tokens in (24, 240)]
        found[generation] = {"results": results, "bytes": sent}
    if distributed.rank() == 0:
        torch.save(found, sys.argv[1])
    distributed.shutdown()


if __name__ == "__main__":
    main()
