"""RWKV-6 (x060, "Finch"): the model, nothing else.

Parameter names and shapes are those of the released weight files. Letters in shapes: B batch,
T tokens, C n_embd, H heads, N head_size, F dim_ffn, V vocab_size, M and D the ranks of the
token-shift and decay LoRAs. Source: "Eagle and Finch", arXiv 2404.05892, section 4 and appendix.
"""

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
from finchtune.models.rwkv6.config import ModelConfig
from finchtune.ops.context import wkv6_across
from finchtune.ops.elementwise import (
    GatedNorm,
    LowRank,
    fixed_mixtures,
    low_ranks,
    mixtures,
    sigmoid_gate,
    squared_relu,
)
from finchtune.ops.wkv6 import wkv6


class TimeMix(WKVMix):
    """Attention's stand-in: data-dependent token shift, decay, and the WKV recurrence."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        C, M, D = config.n_embd, config.dim_mix_lora, config.dim_decay_lora
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * M))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, M, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, D))
        self.time_decay_w2 = nn.Parameter(torch.empty(D, C))
        self.time_faaaa = nn.Parameter(torch.empty(config.n_head, config.head_size))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False)
        self.register_parameter("time_state", None)
        # The files' eps is 1e-5 times the square of a fixed divisor of 8.
        self.ln_x = GatedNorm(config.n_head, C, eps=64e-5)

    @staticmethod
    def as_state(initial: Tensor) -> Tensor:
        return initial.mT

    def mixtures(
        self, x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The five inputs x_w, x_k, x_v, x_r, x_g, each (B, T, C): learnt blends with the past."""
        maa = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        weights = self.time_maa_x.flatten(0, 1), [row.flatten() for row in maa]
        return mixtures(x, shift, cu_seqlens, *weights, self.time_maa_w1, self.time_maa_w2)

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> output (B, T, C), last inputs (S, C), WKV state (S, H, N, N)."""
        B, T, C = x.shape
        before, shift = token_before(self.context, x, shift, cu_seqlens)
        x_w, x_k, x_v, x_r, x_g = self.mixtures(x, before, cu_seqlens)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        decay = self.time_decay_w1, self.time_decay_w2, self.time_decay
        (w,) = low_ranks(LowRank(x_w, *decay, "tanh"))
        heads = (B, T, self.config.n_head, self.config.head_size)
        r, k, v, w = r.view(heads), k.view(heads), v.view(heads), w.view(heads)
        inputs = r, k, v, w, self.time_faaaa
        y, state = self.recall(wkv6, wkv6_across, inputs, state, cu_seqlens)
        y = self.ln_x(y.reshape(B * T, C), self.gate(x_g).view(B * T, C)).view(B, T, C)
        return self.output(y), shift, state


class ChannelMix(nn.Module):
    """The feed-forward half of a block: squared ReLU, gated by a receptance."""

    context: ContextGroup | None = None

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        C, dim_ffn = config.n_embd, config.dim_ffn
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, dim_ffn, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(dim_ffn, C, bias=False)

    def forward(
        self, x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> output (B, T, C), last inputs (S, C)."""
        before, shift = token_before(self.context, x, shift, cu_seqlens)
        maa = self.time_maa_k.flatten(), self.time_maa_r.flatten()
        x_k, x_r = fixed_mixtures(x, before, cu_seqlens, maa)
        k = self.value(squared_relu(self.key(x_k)))
        return sigmoid_gate(self.receptance(x_r), k), shift


class Block(NormedBlock):
    """x += time mix(ln1 x); x += channel mix(ln2 x). The first block normalises its input too."""

    att: TimeMix
    ffn: ChannelMix

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(TimeMix(config, layer), ChannelMix(config, layer), config.n_embd, layer)

    def forward(
        self, x: Tensor, state: BlockState | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        att_shift, wkv, ffn_shift = state or (None, None, None)
        if self.is_first:
            x = self.ln0(x)
        x, normed = self.ln1(x)
        y, att_shift, wkv = self.att(normed, att_shift, wkv, cu_seqlens)
        x, normed = self.ln2(x, y)
        y, ffn_shift = self.ffn(normed, ffn_shift, cu_seqlens)
        return x + y, BlockState(att_shift, wkv, ffn_shift)


class RWKV6(RecurrentModel):
    """The language model."""

    doubled_lr = ".time_decay"

    def __init__(self, config: ModelConfig, grad_checkpoint: int = 0):
        super().__init__(config, Block, grad_checkpoint)

    def hidden(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x = self.emb(tokens)
        new_state = []
        for layer, block in enumerate(self.blocks):
            block_state = state[layer] if state else None
            x, block_state = self.through(block, x, block_state, cu_seqlens)
            new_state.append(block_state)
        return self.ln_out(x), new_state

    def compiled_form(self) -> Any:
        from finchtune.models.rwkv6.inference import CompiledRWKV6

        return CompiledRWKV6(self)
