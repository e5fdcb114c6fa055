"""RWKV-7 (x070, "Goose"): the model, nothing else.

Parameter names and shapes are those of the released weight files. Letters in shapes: B batch,
T tokens, S sequences, C n_embd, H heads, N head_size. Source: "RWKV-7 Goose", arXiv 2503.14456,
section 4 and appendix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finchtune.distributed.context import ContextGroup
from finchtune.models.recurrent import (
    BlockState,
    NormedBlock,
    RecurrentModel,
    State,
    WKVMix,
    token_before,
)
from finchtune.models.rwkv7.config import ModelConfig
from finchtune.ops.context import wkv7_across
from finchtune.ops.elementwise import (
    BonusNorm,
    LowRank,
    fixed_mixtures,
    low_ranks,
    squared_relu,
    wkv7_inputs,
)
from finchtune.ops.wkv7 import wkv7

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
MIXED = "rwkvag"
"""The inputs of the time mix, in the order of their blends in the file."""


class TimeMix(WKVMix):
    """Attention's stand-in: token shift, and a memory that is corrected as it is written to."""

    config: ModelConfig
    w0: Tensor
    w1: Tensor
    w2: Tensor
    a0: Tensor
    v0: Tensor  # not in the first block

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        C = config.n_embd
        for mixed in MIXED:
            self.register_parameter(f"x_{mixed}", nn.Parameter(torch.empty(1, 1, C)))
        self.add_low_rank("w", config.dim_decay_lora)
        self.add_low_rank("a", config.dim_rate_lora)
        if layer:
            self.add_low_rank("v", config.dim_value_lora)
        elif config.dim_unused_lora:
            self.add_unused("v", config.dim_unused_lora)
        self.g1 = nn.Parameter(torch.empty(C, config.dim_gate_lora))
        self.g2 = nn.Parameter(torch.empty(config.dim_gate_lora, C))
        self.k_k = nn.Parameter(torch.empty(1, 1, C))
        self.k_a = nn.Parameter(torch.empty(1, 1, C))
        self.r_k = nn.Parameter(torch.empty(config.n_head, config.head_size))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.register_parameter("time_state", None)
        self.ln_x = BonusNorm(config.n_head, C, eps=64e-5)

    def add_low_rank(self, name: str, rank: int) -> None:
        """Parameters of name0 + activation(x name1) name2."""
        C = self.config.n_embd
        self.register_parameter(f"{name}1", nn.Parameter(torch.empty(C, rank)))
        self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, C)))
        self.register_parameter(f"{name}0", nn.Parameter(torch.empty(1, 1, C)))

    def add_unused(self, name: str, rank: int) -> None:
        """The same names for tensors of a file that nothing reads and nothing trains."""
        C = self.config.n_embd
        shapes = {"1": (C, rank), "2": (rank, C), "0": (1, 1, C)}
        for number, shape in shapes.items():
            self.register_buffer(f"{name}{number}", torch.empty(shape))

    def forward(
        self,
        x: Tensor,
        first: Tensor | None,
        shift: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C), the first block's values -> output and these, last inputs, WKV state."""
        before, shift = token_before(self.context, x, shift, cu_seqlens)
        blends = [getattr(self, f"x_{mixed}").flatten() for mixed in MIXED]
        x_r, x_w, x_k, x_v, x_a, x_g = fixed_mixtures(x, before, cu_seqlens, blends)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        parts = [self.low_rank("w", x_w, "tanh"), self.low_rank("a", x_a)]
        parts.append(LowRank(x_g, self.g1, self.g2, activation="sigmoid"))
        if first is not None:
            parts.append(self.low_rank("v", x_v))
        decay, rate, gate, *mix = low_ranks(*parts)
        values = [] if first is None else [first, *mix]
        inputs = self.memory_inputs(r, k, v, decay, rate, values)
        y, state = self.wkv(inputs, state, cu_seqlens)
        first = v if first is None else first
        return self.output(self.read_out(y, inputs, gate)), first, shift, state

    def low_rank(self, name: str, x: Tensor, activation: str = "none") -> LowRank:
        """name0 + activation(x name1) name2."""
        zero, one, two = (getattr(self, f"{name}{i}") for i in range(3))
        return LowRank(x, one, two, zero, activation)

    def memory_inputs(
        self, r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, values: Sequence[Tensor]
    ) -> Inputs:
        """What the linear parts made (B, T, C) -> r, k, v, w, a, b (B, T, H, N).

        `values` are the first block's and how they mix with v, none in the first block. They, decay
        and rate are still without their activations.
        """
        heads = self.config.n_head, self.config.head_size
        rest = wkv7_inputs(k, v, decay, rate, self.k_k, self.k_a, heads[0], values)
        r, k, v, w, a, b = (x.view(*r.shape[:2], *heads) for x in (r, *rest))
        return r, k, v, w, a, b

    def read_out(self, y: Tensor, inputs: Inputs, gate: Tensor) -> Tensor:
        """What the memory gave (B, T, H, N), normalised, with the bonus of the token, gated."""
        C = self.config.n_embd
        rows = [x.reshape(-1, C) for x in (y, *inputs[:3], gate)]
        return self.ln_x(*rows, self.r_k).view(gate.shape)

    def wkv(
        self, inputs: Inputs, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over r, k, v, w, a, b (B, T, H, N), from the initial or a given state."""
        return self.recall(wkv7, wkv7_across, inputs, state, cu_seqlens)


class ChannelMix(nn.Module):
    """The feed-forward half of a block: squared ReLU."""

    context: ContextGroup | None = None

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        C, dim_ffn = config.n_embd, config.dim_ffn
        self.x_k = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, dim_ffn, bias=False)
        self.value = nn.Linear(dim_ffn, C, bias=False)

    def forward(
        self, x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> output (B, T, C), last inputs (S, C)."""
        before, shift = token_before(self.context, x, shift, cu_seqlens)
        (x_k,) = fixed_mixtures(x, before, cu_seqlens, [self.x_k.flatten()])
        return self.value(squared_relu(self.key(x_k))), shift


class Block(NormedBlock):
    """x += time mix(ln1 x); x += channel mix(ln2 x). The first block normalises its input too."""

    att: TimeMix
    ffn: ChannelMix

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(TimeMix(config, layer), ChannelMix(config, layer), config.n_embd, layer)

    def forward(
        self,
        x: Tensor,
        first: Tensor | None,
        state: BlockState | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, BlockState]:
        """x (B, T, C), the first block's values (B, T, C) -> the same two, and the new state."""
        att_shift, wkv, ffn_shift = state or (None, None, None)
        if self.is_first:
            x = self.ln0(x)
        x, normed = self.ln1(x)
        y, first, att_shift, wkv = self.att(normed, first, att_shift, wkv, cu_seqlens)
        x, normed = self.ln2(x, y)
        y, ffn_shift = self.ffn(normed, ffn_shift, cu_seqlens)
        return x + y, first, BlockState(att_shift, wkv, ffn_shift)


class RWKV7(RecurrentModel):
    """The language model."""

    doubled_lr = ".att.w0"

    def __init__(self, config: ModelConfig, grad_checkpoint: int = 0):
        super().__init__(config, Block, grad_checkpoint)

    def hidden(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x, first = self.emb(tokens), None
        new_state = []
        for layer, block in enumerate(self.blocks):
            inputs = x, first, state[layer] if state else None, cu_seqlens
            x, first, block_state = self.through(block, *inputs)
            new_state.append(block_state)
        return self.ln_out(x), new_state

    def compiled_form(self) -> Any:
        from finchtune.models.rwkv7.inference import CompiledRWKV7

        return CompiledRWKV7(self)
