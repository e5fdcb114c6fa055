"""RWKV-6 without autograd, by compiled CPU operators: what writing text calls.

The model's formulas are those of `model.py`.
"""

import torch
from torch import Tensor

from finchtune.models.compiled import CompiledModel, Rows
from finchtune.models.products import NONE, SQUARED_RELU, TANH, prepared, products
from finchtune.models.rwkv6.model import ChannelMix, TimeMix


class CompiledTimeMix:
    """The time mix, its low-rank matrices turned so that a row makes an output."""

    def __init__(self, att: TimeMix):
        self.att, self.config = att, att.config
        maa = (att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)
        self.maa_x = att.time_maa_x.flatten(0, 1)
        self.maa = torch.cat(maa).flatten(0, 1)
        self.w1 = att.time_maa_w1.T.contiguous()
        self.w2 = list(att.time_maa_w2.mT.contiguous())
        self.decay = att.time_decay.flatten()
        self.decay_w1 = att.time_decay_w1.T.contiguous()
        self.decay_w2 = att.time_decay_w2.T.contiguous()
        self.u = att.time_faaaa.float().contiguous()
        layers = (att.receptance, att.key, att.value, att.gate)
        self.layers = [prepared(layer, self.decay.dtype) for layer in layers]
        self.output = prepared(att.output, self.decay.dtype)

    def __call__(
        self, x: Tensor, rows: Rows, shift: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (rows, C), the rows before and the state of each sequence -> output, new state."""
        att = self.att
        x_w, x_k, x_v, x_r, x_g = self.mixtures(x, rows, shift)
        low, r, k, v, gate = products(
            [x_w, x_r, x_k, x_v, x_g],
            [self.decay_w1, *self.layers],
            [TANH, NONE, NONE, NONE, NONE],
        )
        w = products([low], [self.decay_w2], [NONE])[0].add_(self.decay)
        y, state = self.wkv(r, k, v, w, rows, state)
        y = torch.ops.finchtune.gated_norm(
            y, gate, att.ln_x.weight, att.ln_x.bias, att.ln_x.groups, att.ln_x.eps
        )
        return products([y], [self.output], [NONE])[0], state

    def mixtures(self, x: Tensor, rows: Rows, shift: Tensor | None) -> list[Tensor]:
        """The five inputs x_w, x_k, x_v, x_r, x_g, each (rows, C)."""
        ops, batch = torch.ops.finchtune, rows.batch(x)
        (blended,) = ops.token_mix(batch, shift, rows.cu_seqlens, self.maa_x)
        (low,) = products([blended], [self.w1], [TANH])
        blends = products(low.chunk(5, dim=1), self.w2, [NONE] * 5)
        ops.token_mix_(blends, batch, shift, rows.cu_seqlens, self.maa)
        return blends

    def wkv(
        self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, rows: Rows, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over rows (rows, C)."""
        H, N = self.config.n_head, self.config.head_size
        if state is None or len(state) < rows.count:
            state = self.att.starting_state(state, rows.count)
            # Of its own memory: a step writes to it.
            state = torch.zeros(rows.count, H, N, N) if state is None else state.contiguous()
        if rows.cu_seqlens is None:
            return torch.ops.finchtune.wkv6_step_(r, k, v, w, self.u, state), state
        heads = [x.view(1, -1, H, N) for x in (r, k, v, w)]
        y, state, _ = torch.ops.finchtune.wkv6_forward(
            *heads, self.u, state, rows.cu_seqlens, False
        )
        return y.view(r.shape), state


class CompiledChannelMix:
    """The channel mix."""

    def __init__(self, ffn: ChannelMix):
        self.maa = torch.cat([ffn.time_maa_k, ffn.time_maa_r]).flatten(0, 1)
        layers = (ffn.key, ffn.receptance, ffn.value)
        self.key, self.receptance, self.value = (prepared(x, self.maa.dtype) for x in layers)

    def __call__(self, x: Tensor, rows: Rows, shift: Tensor | None) -> Tensor:
        """x (rows, C), the row before each sequence -> output (rows, C)."""
        ops = torch.ops.finchtune
        x_k, x_r = ops.token_mix(rows.batch(x), shift, rows.cu_seqlens, self.maa)
        k, r = products([x_k, x_r], [self.key, self.receptance], [SQUARED_RELU, NONE])
        return ops.sigmoid_gate(r, products([k], [self.value], [NONE])[0])


class CompiledRWKV6(CompiledModel):
    """The whole model."""

    time_mix, channel_mix = CompiledTimeMix, CompiledChannelMix
