"""Forward and backward of a step's micro batches under DeepSpeed: whole, or in chunks of tokens."""

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.data.chunks import Chunk, cut, empty_chunk
from finchtune.data.parts import part_of
from finchtune.distributed.context import ContextGroup, context_group
from finchtune.models import LanguageModel, State
from finchtune.training.chunked import chunked_loss, exact_backward, truncated_backward


class SummedLoss(nn.Module):
    """What DeepSpeed wraps: a micro batch -> the sum of the unmasked tokens' losses.

    With `chunk` the state after it as well; without labels that alone.
    """

    def __init__(self, model: LanguageModel, l2wrap: float):
        super().__init__()
        self.model, self.l2wrap = model, l2wrap

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        chunk: bool = False,
    ) -> Any:
        if labels is None:
            return self.model.hidden(tokens, state, cu_seqlens)[1]
        loss, state = self.model.loss(tokens, labels, cu_seqlens, state=state, l2wrap=self.l2wrap)
        return (loss, state) if chunk else loss


def make_passes(
    ds: Any, model: LanguageModel, config: TrainConfig, device: torch.device
) -> "Passes":
    """What --train_type and --context_parallel ask for. A collective call."""
    context = None
    if config.context_parallel > 1:
        timeout = timedelta(minutes=config.timeout_minutes)
        context = context_group(config.context_parallel, timeout)
        model.share_contexts(context)
    if config.chunked:
        return ChunkedPasses(ds, device, context, config)
    return Passes(ds, device, context)


class Passes:
    """How the micro batches of a step go through DeepSpeed's engine.

    `context`: the processes that share each context with this one, if there are others.
    """

    def __init__(self, ds: Any, device: torch.device, context: ContextGroup | None):
        self.ds, self.device, self.context = ds, device, context

    def own(self, batch: Batch) -> Batch:
        """This process's part of a batch, on its device, and the model told that it reads it."""
        if self.context is not None:
            batch, self.context.goes_on = part_of(batch, self.context.rank, self.context.size)
        return batch.to(self.device)

    def sharing(self) -> AbstractContextManager[None]:
        """Within, the model reads what `own` gives."""
        return nullcontext() if self.context is None else self.context.reading()

    def backward(self, micro_batches: list[Batch], weights: list[float], scale: Tensor) -> Tensor:
        """Forward, backward and, at the end, the update: of the summed losses, each micro batch's
        times its weight. Returns that sum; its gradient is times `scale`.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.sharing():
            for batch, weight in zip(micro_batches, weights, strict=True):
                loss = self.ds(*self.own(batch))
                self.scaled_backward(loss, weight * scale)
                total += weight * loss.detach()
        return total

    def scaled_backward(self, loss: Tensor, scale: Tensor, added: Tensor | float = 0.0) -> None:
        """The backward of scale * loss + added, and DeepSpeed's step after it."""
        scale = scale.to(loss.dtype)
        # DeepSpeed skips a step whose gradient norm is not finite, on all ranks alike. A loss
        # of infinity may have a finite gradient; 0 * inf is NaN and makes it bad as well.
        self.ds.backward(loss * (scale + 0 * loss.detach()) + added)
        self.ds.step()

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of a micro batch."""
        with self.sharing():
            return self.ds(*self.own(batch))


class ChunkedPasses(Passes):
    """The same, each micro batch in chunks. DeepSpeed takes a chunk as a micro batch of its own.

    All ranks go through as many chunks: their collective calls must meet.
    """

    def __init__(
        self, ds: Any, device: torch.device, context: ContextGroup | None, config: TrainConfig
    ):
        super().__init__(ds, device, context)
        self.length, self.offload = config.chunk_ctx, config.infctx_offload
        self.exact = config.bptt == "exact"

    def backward(self, micro_batches: list[Batch], weights: list[float], scale: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        contexts = self.chunks_of(micro_batches)
        left = sum(map(len, contexts))

        def lose(batch: Batch, state: State | None) -> tuple[Tensor, State]:
            nonlocal left
            left -= 1
            self.ds.set_gradient_accumulation_boundary(left == 0)
            return self.lose(batch, state)

        with self.sharing():
            for chunks, weight in zip(contexts, weights, strict=True):

                def backward(loss: Tensor, added: Tensor, weight: float = weight) -> None:
                    self.scaled_backward(loss, weight * scale, added)

                if self.exact:
                    loss = exact_backward(self.read, lose, chunks, backward, self.offload)
                else:
                    loss = truncated_backward(lose, chunks, backward)
                total += weight * loss
        return total

    def loss(self, batch: Batch) -> Tensor:
        (chunks,) = self.chunks_of([batch])
        with self.sharing():
            return chunked_loss(self.lose, chunks)

    def read(self, batch: Batch, state: State | None) -> State:
        batch = self.own(batch)
        return self.ds(batch.tokens, None, batch.cu_seqlens, state)

    def lose(self, batch: Batch, state: State | None) -> tuple[Tensor, State]:
        return self.ds(*self.own(batch), state, chunk=True)

    def chunks_of(self, micro_batches: list[Batch]) -> list[list[Chunk]]:
        """Each micro batch's chunks, empty ones after them where another rank has more."""
        contexts = [cut(batch, self.length) for batch in micro_batches]
        counts = zip(*distributed.all_gather([len(chunks) for chunks in contexts]), strict=True)
        for chunks, count in zip(contexts, map(max, counts), strict=True):
            chunks.extend(empty_chunk() for _ in range(count - len(chunks)))
        return contexts
