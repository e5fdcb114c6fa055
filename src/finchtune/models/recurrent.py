"""What the generations with a WKV memory and token shift share: a block's state, and its parts.

Letters in shapes: B batch, T tokens, S sequences, C n_embd, H heads, N head_size.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from finchtune.distributed.context import ContextGroup
from finchtune.models.config import ModelSizes
from finchtune.models.language_model import INITIAL_STATE, LanguageModel, last_of
from finchtune.ops.context import shift_across
from finchtune.ops.elementwise import AddedNorm
from finchtune.ops.wkv import zero_state


class BlockState(NamedTuple):
    """What one block carries from token to token: the whole memory of S sequences' past."""

    att_shift: Tensor  # (S, C), the time mix's last input
    wkv: Tensor  # (S, H, N, N), fp32, laid out as the generation's operator has it
    ffn_shift: Tensor  # (S, C), the channel mix's last input


State = list[BlockState]


def filled(state: Tensor | None, n_sequences: int) -> Tensor | None:
    """A state (k, ...) of the first k sequences, with zeros for the others."""
    if state is None or len(state) == n_sequences:
        return state
    return torch.cat([state, state.new_zeros(n_sequences - len(state), *state.shape[1:])])


def token_before(
    context: ContextGroup | None, x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """What precedes the sequences of x (B, T, C), given `shift`, and the shift after them."""
    if context is None or context.goes_on is None:
        return filled(shift, count(x, cu_seqlens)), last_of(x, cu_seqlens)
    before, final = shift_across(context, x, shift)
    return filled(before, count(x, cu_seqlens)), final


def count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences in x (B, T, ...)."""
    return len(x) if cu_seqlens is None else len(cu_seqlens) - 1


class WKVMix(nn.Module):
    """A time mix's initial state. A generation's own registers `time_state` where files have it."""

    context: ContextGroup | None = None
    time_state: nn.Parameter | None
    """What documents begin from, (H, N value, N key) as files have it."""

    def __init__(self, config: ModelSizes, layer: int):
        super().__init__()
        self.config, self.layer = config, layer

    @property
    def across(self) -> ContextGroup | None:
        """The processes that share the context which is being read, if there are others."""
        return (
            self.context if self.context is not None and self.context.goes_on is not None else None
        )

    def add_initial_state(self) -> None:
        """Begin documents from a parameter, zero at first, instead of from zero."""
        if self.time_state is None:
            shape = self.config.n_head, self.config.head_size, self.config.head_size
            like = next(self.parameters())
            self.time_state = nn.Parameter(like.new_zeros(shape))

    def starting_state(self, state: Tensor | None, n_sequences: int) -> Tensor | None:
        """WKV states (S, H, N, N) of all sequences, of which `state` may hold the first ones'."""
        if self.time_state is None:
            return filled(state, n_sequences)
        # Also where all are given, so that every backward reaches the parameter.
        n_given = 0 if state is None else len(state)
        precise = torch.promote_types(self.time_state.dtype, torch.float32)
        fresh = self.as_state(self.time_state.to(precise))
        fresh = fresh.expand(n_sequences - n_given, -1, -1, -1)
        return fresh if state is None else torch.cat([state, fresh])

    def recall(
        self,
        operator: Callable[..., tuple[Tensor, Tensor]],
        operator_across: Callable[..., tuple[Tensor, Tensor]],
        inputs: tuple[Tensor, ...],
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """y and the new state by a WKV operator, or by the one across processes that share the
        context. `inputs` are r (B, T, H, N) and what the operator takes before its state.
        """
        n_sequences = count(inputs[0], cu_seqlens)
        if self.across is None:
            return operator(*inputs, self.starting_state(state, n_sequences), cu_seqlens)
        fresh = self.starting_state(None, n_sequences)
        fresh = zero_state(inputs[0], cu_seqlens) if fresh is None else fresh
        return operator_across(self.across, *inputs, fresh, state, cu_seqlens)

    @staticmethod
    def as_state(initial: Tensor) -> Tensor:
        """An initial state (..., N value, N key) as the generation's operator has it."""
        return initial


class NormedBlock(nn.Module):
    """A time mix, a channel mix, and the norms of their inputs. The first has one of its own."""

    def __init__(self, att: nn.Module, ffn: nn.Module, n_embd: int, layer: int):
        super().__init__()
        self.ln1 = AddedNorm(n_embd)
        self.ln2 = AddedNorm(n_embd)
        if layer == 0:
            self.ln0 = nn.LayerNorm(n_embd)
        self.att, self.ffn = att, ffn
        self.is_first = layer == 0


class RecurrentModel(LanguageModel):
    """A language model whose blocks carry a BlockState. Its parts may have a `context`."""

    def share_contexts(self, context: ContextGroup) -> None:
        for block in self.blocks:
            for part in (block.att, block.ffn):
                cast(Any, part).context = context

    def inference_form(self) -> Any:
        """As in the base class: compiled where that fits."""
        from finchtune.models.compiled import fits

        return self.compiled_form() if fits(self) else super().inference_form()

    def compiled_form(self) -> Any:
        """The same model by compiled CPU operators (`CompiledModel`)."""
        raise NotImplementedError

    def state_from(self, initial: Mapping[str, Tensor]) -> State:
        weight = self.emb.weight
        none = weight.new_zeros(1, self.config.n_embd)
        states = []
        for i, block in enumerate(self.blocks):
            wkv = initial[f"blocks.{i}{INITIAL_STATE}"].to(weight.device).float()
            states.append(BlockState(none, cast(Any, block).att.as_state(wkv)[None], none))
        return states
