"""Models without autograd, by compiled CPU operators: what the generations' forms share.

Every token is a row (C) here; the rows of all sequences follow one another. A sequence's result
does not depend on the others, to the last bit, but for adapters that run as they are (products.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finchtune.models.language_model import LanguageModel
from finchtune.models.products import NONE, prepared, products
from finchtune.models.recurrent import BlockState, State, filled
from finchtune.ops.kernels import fits_cpu


def fits(model: LanguageModel) -> bool:
    """Whether the compiled form takes a model: whole, on a CPU, all but adapters of one dtype."""
    own = [p for name, p in model.named_parameters() if ".adapter." not in name]
    whole = all(p.numel() for p in own)  # ZeRO-3 leaves shells
    return whole and fits_cpu(*own) and model.config.head_size in range(8, 129, 8)


class CompiledModel:
    """A model as it is now: small matrices are copied, so build it anew when they change.

    `time_mix` and `channel_mix` make the compiled forms of a block's parts.
    """

    time_mix: type
    channel_mix: type

    def __init__(self, model: LanguageModel):
        self.model, self.head = model, prepared(model.head, model.emb.weight.dtype)
        self.blocks = [
            CompiledBlock(block, self.time_mix(block.att), self.channel_mix(block.ffn))
            for block in model.blocks
        ]

    def through_blocks(self, x: Tensor, rows: "Rows", state: State | None) -> tuple[Tensor, State]:
        """Embedded tokens (rows, C) and the states before them -> the same after all blocks."""
        new_state: State = []
        more: list[Tensor] = []  # what a generation hands on from block to block
        for layer, block in enumerate(self.blocks):
            x, block_state, *more = block(x, rows, state[layer] if state else None, *more)
            new_state.append(block_state)
        return x, new_state

    def advance(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `LanguageModel.advance`, which says what the arguments are.

        Where each sequence has one token, the given WKV state may be written to.
        """
        B, T = tokens.shape
        if cu_seqlens is None and T > 1:
            cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
        rows = Rows(B, cu_seqlens)
        x, state = self.through_blocks(self.model.emb(tokens.flatten()), rows, state)
        return self.model.ln_out(rows.last(x)), state

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, C) -> (rows, V)."""
        return products([hidden], [self.head], [NONE])[0]


class CompiledBlock:
    """One block, by the compiled forms of its time mix and its channel mix."""

    def __init__(self, block: Any, time_mix: Callable[..., Any], channel_mix: Callable[..., Any]):
        self.block, self.time_mix, self.channel_mix = block, time_mix, channel_mix

    def __call__(self, x: Tensor, rows: "Rows", state: BlockState | None, *more: Any) -> Any:
        """x (rows, C) and the states before -> the same two after the block.

        `more` the time mix takes from the block before, and returns for the next one.
        """
        block = self.block
        att_shift, wkv, ffn_shift = state or (None, None, None)
        att_shift, ffn_shift = filled(att_shift, rows.count), filled(ffn_shift, rows.count)
        if block.is_first:
            x = block.ln0(x)
        x, normed = block.ln1(x)
        y, wkv, *more = self.time_mix(normed, rows, att_shift, wkv, *more)
        x, normed_2 = block.ln2(x, y)
        x = x + self.channel_mix(normed_2, rows, ffn_shift)
        return x, BlockState(rows.last(normed), wkv, rows.last(normed_2)), *more


class Rows:
    """Which rows of x (rows, C) are whose: one each of `count` sequences, or at boundaries."""

    def __init__(self, count: int, cu_seqlens: Tensor | None):
        self.cu_seqlens = cu_seqlens
        self.ends = None if cu_seqlens is None else cu_seqlens[1:].long() - 1
        self.count = count if cu_seqlens is None else len(cu_seqlens) - 1

    def last(self, x: Tensor) -> Tensor:
        """The last row of each sequence, (S, C): a copy, or all of x where each has one."""
        return x if self.ends is None else x.index_select(0, self.ends)

    def batch(self, x: Tensor) -> Tensor:
        """x as (B, T, ...), which operators for packed sequences take."""
        return x.unsqueeze(0 if self.cu_seqlens is not None else 1)
