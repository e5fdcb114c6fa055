"""What everything else asks of a model, whatever its generation."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finchtune.distributed.context import ContextGroup
from finchtune.errors import UserError
from finchtune.models.config import ModelSizes
from finchtune.models.graphed_blocks import GraphedBlocks
from finchtune.models.recompute import recomputed
from finchtune.ops.cross_entropy import cross_entropy_sum

INITIAL_STATE = ".att.time_state"
"""End of the name of the state that a block begins documents from."""
State = Any
"""What a model carries from token to token: a list with an entry for each block, itself a named
tuple of tensors with the rows (B, ...) first. `torch.utils._pytree` reaches every tensor of it."""


def last_of(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last token of each sequence in x (B, T, C), as (S, C).

    A copy, for a view in the state would keep all of x alive.
    """
    return x[:, -1].clone() if cu_seqlens is None else x[0, cu_seqlens[1:].long() - 1]


class Head(nn.Linear):
    """Hidden states -> logits; with labels -> the summed loss, without holding all logits."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, l2wrap: float = 0.0) -> Tensor:
        if labels is None:
            return F.linear(hidden, self.weight)
        return cross_entropy_sum(hidden, self.weight, labels, l2wrap)


class LanguageModel(nn.Module):
    """A language model. Parallel over T; feeding T = 1 with the state is the recurrent form.

    A new model's tensors are uninitialised memory: initialise them or load a file. A generation
    subclasses this, makes its `blocks`, and writes `hidden`. Its linear layers that adapters take
    are those directly in `blocks.N.att` and `blocks.N.ffn`.

    `grad_checkpoint` says what of a block's activations backward recomputes instead of having
    them saved: 0 nothing, 1 everything, 2 all but large matrix products and WKV.
    """

    doubled_lr: ClassVar[str]
    """End of the names of the parameters that --layerwise_lr trains at twice the rate."""

    emb: nn.Embedding
    blocks: nn.ModuleList
    ln_out: nn.LayerNorm
    head: Head
    graphs: GraphedBlocks | None = None
    """What runs the blocks in training in place of `recomputed`, if anything does."""

    def __init__(self, config: ModelSizes, block: type[nn.Module], grad_checkpoint: int = 0):
        super().__init__()
        self.config, self.grad_checkpoint = config, grad_checkpoint
        # Not nn.Embedding(...), whose random numbers on the meta device import torch's compiler.
        empty = torch.empty(config.vocab_size, config.n_embd)
        self.emb = nn.Embedding.from_pretrained(empty, freeze=False)
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)

    def through(self, block: nn.Module, *inputs: Any) -> Any:
        """block(*inputs): rows, a state and cu_seqlens. Recomputed as `grad_checkpoint` says."""
        if self.graphs is not None:
            return self.graphs(block, *inputs)
        return recomputed(self.grad_checkpoint, block, *inputs)

    def hidden(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """tokens (B, T) int64 -> normalised hidden states (B, T, C) before the head, new state.

        `cu_seqlens` (S + 1,) integers rising from 0 to T: where each of S sequences packed into
        tokens (1, T) begins. None of them sees another; the states are theirs, in order. That of
        an empty sequence is of no use.

        Sequences begin from the model's initial state, zero unless it has one. Those that `state`
        is of, the first ones where it is of fewer, continue from that.
        """
        raise NotImplementedError

    def add_initial_state(self) -> None:
        """Give every block a trainable state to begin documents from, zero at first.

        Its name in a generation's files is `blocks.N.att.time_state`. Does nothing to a model
        that has one.
        """
        for block in self.blocks:
            cast(Any, block).att.add_initial_state()

    def initial_states(self) -> dict[str, nn.Parameter]:
        """The states that documents begin from, by name; {} for a model that begins from zero."""
        return {n: p for n, p in self.named_parameters() if n.endswith(INITIAL_STATE)}

    def share_contexts(self, context: ContextGroup) -> None:
        """Have several processes read each context, every one its part of the tokens.

        While `context.goes_on` is not None, `hidden` takes this process's part of the tokens and
        of the packed sequences, a `state` that is the same in all, and returns the state after
        the last part, the same in all. Raises UserError where the generation cannot.
        """
        raise UserError("`context_parallel` is not available for this generation of models")

    def state_from(self, initial: Mapping[str, Tensor]) -> State:
        """The state of one sequence that begins from tensors named as in `initial_states`."""
        raise NotImplementedError

    @torch.no_grad()
    def advance(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """`hidden` of the last token of each sequence, (S, C), and the new state. For inference.

        The new state may lie in the memory of the given one.
        """
        hidden, state = self.hidden(tokens, state, cu_seqlens)
        return last_of(hidden, cu_seqlens), state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (S, C), as `advance` returns them -> (S, V)."""
        return self.head(hidden)

    def inference_form(self) -> Any:
        """What offers `advance` and `logits` the fastest here, until the weights change."""
        from finchtune.models.graphed import GraphedModel, fits

        return GraphedModel(self) if fits(self) else self

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens (B, T) int64 -> logits (B, T, V) in the weights' dtype, new state.

        `state` is what an earlier call returned, None at the start of a document.
        """
        hidden, state = self.hidden(tokens, state)
        return self.head(hidden), state

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        state: State | None = None,
        l2wrap: float = 0.0,
    ) -> tuple[Tensor, State]:
        """Sum of the cross entropy over the labels (B, T) that are not -100, and the new state.

        The loss is a scalar, fp32. `state` and `cu_seqlens` as in `hidden`, `l2wrap` as in
        `cross_entropy_sum`.
        """
        hidden, state = self.hidden(tokens, state, cu_seqlens)
        return self.head(hidden, labels, l2wrap), state
