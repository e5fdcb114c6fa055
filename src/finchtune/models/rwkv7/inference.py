"""RWKV-7 without autograd, by compiled CPU operators: what writing text calls.

The model's formulas are those of `model.py`, which has the element-wise ones for both.
"""

import torch
from torch import Tensor

from finchtune.models.compiled import CompiledModel, Rows
from finchtune.models.products import NONE, SQUARED_RELU, TANH, prepared, products
from finchtune.models.rwkv7.model import MIXED, ChannelMix, TimeMix


class CompiledTimeMix:
    """The time mix, its low-rank matrices turned so that a row makes an output."""

    def __init__(self, att: TimeMix):
        self.att = att
        self.blends = torch.cat([getattr(att, f"x_{mixed}") for mixed in MIXED]).flatten(0, 1)
        parts = "wag" + ("v" if att.layer else "")
        self.down = {part: getattr(att, f"{part}1").T.contiguous() for part in parts}
        self.up = {part: getattr(att, f"{part}2").T.contiguous() for part in parts}
        layers, dtype = (att.receptance, att.key, att.value), self.blends.dtype
        self.layers = [prepared(layer, dtype) for layer in layers]
        self.output = prepared(att.output, dtype)

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        shift: Tensor | None,
        state: Tensor | None,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (rows, C), the rows before and the state of each sequence, the first block's values
        -> output, new state, these values.
        """
        att, mixed = self.att, rows.batch(x)
        mixtures = torch.ops.finchtune.token_mix(mixed, shift, rows.cu_seqlens, self.blends)
        x_r, x_w, x_k, x_v, x_a, x_g = mixtures
        own = {"w": x_w, "a": x_a, "g": x_g, "v": x_v}
        r, k, v, *low = products(
            [x_r, x_k, x_v, *(own[part] for part in self.down)],
            [*self.layers, *self.down.values()],
            [NONE, NONE, NONE, TANH, *[NONE] * (len(self.down) - 1)],
        )
        low[2] = torch.sigmoid(low[2])  # the gate's
        made = products(low, list(self.up.values()), [NONE] * len(low))
        up = {part: one.view(mixed.shape) for part, one in zip(self.up, made, strict=True)}
        decay, rate = up["w"] + att.w0, up["a"] + att.a0
        values = [] if first is None else [first, up["v"] + att.v0]
        r, k, v = (one.view(mixed.shape) for one in (r, k, v))
        inputs = att.memory_inputs(r, k, v, decay, rate, values)
        y, state = att.wkv(inputs, state, rows.cu_seqlens)
        y = att.read_out(y, inputs, up["g"])
        first = v if first is None else first
        return products([y.flatten(0, 1)], [self.output], [NONE])[0], state, first


class CompiledChannelMix:
    """The channel mix."""

    def __init__(self, ffn: ChannelMix):
        self.blend = ffn.x_k.flatten(0, 1)
        self.key, self.value = (prepared(x, self.blend.dtype) for x in (ffn.key, ffn.value))

    def __call__(self, x: Tensor, rows: Rows, shift: Tensor | None) -> Tensor:
        """x (rows, C), the row before each sequence -> output (rows, C)."""
        mix = torch.ops.finchtune.token_mix
        (x_k,) = mix(rows.batch(x), shift, rows.cu_seqlens, self.blend)
        (k,) = products([x_k], [self.key], [SQUARED_RELU])
        return products([k], [self.value], [NONE])[0]


class CompiledRWKV7(CompiledModel):
    """The whole model."""

    time_mix, channel_mix = CompiledTimeMix, CompiledChannelMix
